"""What is made of a run's document: tables, page, plots, comparison, README. No clock is read."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.documents import ROOT, document, drifted, every_kind, failed, measured_memory, timed

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from benchmarks import command_line, commands, compare, page, plots, readme, report, results, schema


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    return every_kind()


# ---- losses first, nothing dropped, in every output


def positions(text: str, rows: list[dict[str, Any]]) -> list[int]:
    """Where each row's id stands first; fails if one is missing."""
    return [text.index(row["id"]) for row in rows]


def test_every_output_holds_every_row_losses_first(everything: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=220, record=True, file=io.StringIO())
    report.print_report(everything, console)
    for text in (console.export_text(), report.markdown(everything)):
        for kind in report.KINDS:
            rows = [row for row in everything["rows"] if row["kind"] == kind]
            found = positions(text, rows)
            assert found == sorted(found)
    html = page.render(everything)
    whole = html[html.index("<h2>Every row") :]
    for row in everything["rows"]:
        assert whole.count(f'<td class="id">{row["id"]}</td>') == 1
    first = html[: html.index("<h2>In short")]
    for row in everything["rows"]:
        bad = row["status"] in results.FAILED or report.row_verdict(row) == "loss"
        assert (f'<td class="id">{row["id"]}</td>' in first) == bad
        if bad:
            assert row["command"] in first


def test_memory_and_time_losses_are_both_counted(everything: dict[str, Any]) -> None:
    assert everything["summary"]["verdicts"]["loss"] == sum(
        report.row_verdict(row) == "loss" for row in everything["rows"]
    )
    assert report.row_verdict(next(row for row in everything["rows"] if row["memory"])) == "loss"
    assert "memory-rnn-4x4x8x8-train-vs-torch" in "".join(row["id"] for row in everything["rows"][:6])


def test_most_rows_noisy_is_said_in_every_output() -> None:
    noisy = document(timed(2.0, noisy=True), timed(2.0, T=9))
    assert report.NO_EVIDENCE not in report.markdown(noisy), "one of two is not most"
    noisy = document(timed(2.0, noisy=True), timed(2.0, T=9, noisy=True), timed(2.0, T=10))
    assert report.NO_EVIDENCE in report.markdown(noisy)
    assert report.NO_EVIDENCE in page.render(noisy)


def test_a_time_under_the_floor_is_told() -> None:
    result = timed(2.0)
    assert result.timing is not None
    assert "under its floor" not in report.markdown(document(result))
    result.timing.floor = results.Floor(2e-3, 1.0, 1.0, "L2", "flops")
    assert "under its floor" in report.markdown(document(result))


def test_an_incomplete_run_says_so() -> None:
    assert "The run was stopped: 1 of 5" in page.render(document(timed(2.0), planned=5))


# ---- the page


class Links(HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed."""

    VOID = ("meta", "link", "br", "img", "path", "use", "rect", "image")

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(everything: dict[str, Any]) -> None:
    html = page.render(everything)
    links = Links()
    links.feed(html)
    assert links.open == []
    outside = [link for link in links.fetched if not link.startswith(("#", "data:"))]
    assert outside == []
    assert "@import" not in html
    assert "url(http" not in html
    assert "output: &lt;differs&gt;" in html
    assert html.count("<svg") == len(plots.figures(everything))


def test_the_page_tells_machine_method_and_command(everything: dict[str, Any]) -> None:
    html = page.render(everything)
    for text in ("a processor", "OMP_PROC_BIND=true", everything["command"], "peak GEMM float32 100", "KERAS"):
        assert text in html
    row = next(row for row in everything["rows"] if row["timing"])
    assert f"rerun {row['id']}" in html
    assert "a loop" in html
    assert "2 MB of weights read, which fit in L2" in html


def test_a_page_without_losses_says_so() -> None:
    assert "No row is lost, and none failed." in page.render(document(timed(2.0)))


# ---- plots


def test_there_is_a_plot_for_every_kind_of_row(everything: dict[str, Any], tmp_path: Path) -> None:
    made = {file.name for file in plots.save(everything, tmp_path)}
    names = {"ratios", "peers", "floor", "memory", "error", "drift", "scaling", "heat-lstm-vs-torch"}
    assert made == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for file in tmp_path.iterdir():
        if file.suffix == ".svg":
            ElementTree.fromstring(file.read_text())
        else:
            assert file.read_bytes().startswith(b"\x89PNG")


def test_plots_are_the_same_for_the_same_document(everything: dict[str, Any]) -> None:
    first, second = (plots.svg(plots.figures(everything)["heat-lstm-vs-torch"][1]) for _ in range(2))
    assert first == second


def test_no_plot_without_rows() -> None:
    assert plots.figures(document(failed("skipped", "why"))) == {}


def test_the_heat_map_shows_ratios_where_they_belong(everything: dict[str, Any]) -> None:
    axes = plots.figures(everything)["heat-lstm-vs-torch"][1].axes[0]
    shown = {(text.get_position(), text.get_text()) for text in axes.texts}
    widths, batches = (
        [label.get_text() for label in labels] for labels in (axes.get_xticklabels(), axes.get_yticklabels())
    )
    for row in everything["rows"]:
        case = row["case"]
        if row["timing"] and case["T"] == 8:
            place = (widths.index(str(case["H"])), batches.index(str(case["B"])))
            assert (place, f"{row['timing']['ratio']['median']:.2f}") in shown


# ---- comparing two runs


def outcome(a: results.Result, b: results.Result) -> str:
    (change,) = compare.changes(document(a), document(b), threshold=0.1)
    return change.outcome


def test_what_counts_as_a_regression() -> None:
    assert outcome(timed(2.0), timed(1.5)) == "regression"
    assert outcome(timed(1.5), timed(2.0)) == "improvement"
    assert outcome(timed(2.0), timed(1.9)) == "same", "under the threshold"
    assert outcome(timed(2.0, half_width=0.4), timed(1.5, half_width=0.4)) == "unclear", "the intervals overlap"
    assert outcome(timed(2.0), timed(1.5, noisy=True)) == "unclear"
    assert outcome(timed(2.0), failed("mismatch", "output differs")) == "regression"
    assert outcome(failed("error", "raised"), timed(2.0)) == "improvement"
    assert outcome(failed("error", "raised"), failed("error", "raised")) == "same"
    assert outcome(timed(2.0), failed("skipped", "not installed")) == "unclear"
    assert outcome(measured_memory([10, 11, 12], [30] * 3), measured_memory([20, 21, 22], [30] * 3)) == "regression"
    assert outcome(measured_memory([10, 11, 12], [30] * 3), measured_memory([10, 11, 12], [60] * 3)) == "same"
    assert outcome(drifted(0.01), drifted(0.011)) == "same"
    assert outcome(drifted(0.01), drifted(0.03)) == "unclear", "no failure, but worth a look"


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.01, 0.5), st.booleans())
def test_swapping_the_runs_turns_the_outcome(a: float, b: float, threshold: float, apart: bool) -> None:
    opposite = {"regression": "improvement", "improvement": "regression", "same": "same", "unclear": "unclear"}
    change = b / a
    edge = abs(abs(change - 1 / (1 + threshold))) < 1e-9 or abs(change - (1 + threshold)) < 1e-9
    if not edge:
        assert (
            compare.judge(1 / change, apart, False, threshold)
            == opposite[compare.judge(change, apart, False, threshold)]
        )


def test_comparison_lists_every_row_of_both_runs() -> None:
    a, b = document(timed(2.0), timed(2.0, T=9)), document(timed(1.0), timed(2.0, T=10))
    found = {change.id: change.outcome for change in compare.changes(a, b, 0.1)}
    assert found == {
        "lstm-8x2x16x16-fwd-vs-torch": "regression",
        "lstm-9x2x16x16-fwd-vs-torch": "only in A",
        "lstm-10x2x16x16-fwd-vs-torch": "only in B",
    }


def test_differing_machines_are_told() -> None:
    a, b = document(timed(2.0)), document(timed(2.0))
    assert compare.differences(a, b) == []
    b["machine"]["cpu"]["model"] = "another"
    b["settings"]["threads"] = 4
    b["peers"]["torch"]["version"] = "3.0"
    b["complete"] = False
    told = " ".join(compare.differences(a, b))
    for text in ("a processor | another", "threads: 2 | 4", "version of torch: 1.0 | 3.0", "B is incomplete"):
        assert text in told


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "bad.json")]
    for file, ratio in zip(files, (2.0, 1.0), strict=False):
        results.Document(document(timed(ratio))).save(file)
    files[2].write_text("{")
    assert commands.main(["compare", str(files[0]), str(files[1])]) == command_line.FAILURES
    assert "regression: 1" in capsys.readouterr().out
    assert commands.main(["compare", str(files[1]), str(files[0])]) == command_line.OK
    assert commands.main(["compare", str(files[0]), str(files[1]), "--threshold", "3"]) == command_line.OK
    for wrong in ("bad.json", "absent.json"):
        with pytest.raises(SystemExit) as stop:
            commands.compare([str(files[0]), str(tmp_path / wrong)])
        assert stop.value.code == command_line.USAGE
        assert wrong in capsys.readouterr().err


def test_report_from_a_stored_run(everything: dict[str, Any], tmp_path: Path) -> None:
    results.Document(everything).save(tmp_path / "run.json")
    outputs = [
        "--html",
        str(tmp_path / "new" / "r.html"),
        "--markdown",
        str(tmp_path / "r.md"),
        "--plots",
        str(tmp_path),
    ]
    assert commands.main(["report", str(tmp_path / "run.json"), *outputs]) == command_line.OK
    assert (tmp_path / "new" / "r.html").read_text() == page.render(json.loads(json.dumps(everything)))
    assert (tmp_path / "r.md").read_text() == report.markdown(everything)
    assert (tmp_path / "ratios.svg").exists()


# ---- older files


def test_files_of_version_1_are_read(everything: dict[str, Any]) -> None:
    old = copy.deepcopy(document(timed(2.0), failed("skipped", "why")))
    del old["peers"], old["machine"]["roofline"], old["summary"]["fits"], old["summary"]["thread_speedups"]
    for row in old["rows"]:
        del row["memory"], row["threads"]
        if row["timing"]:
            del row["timing"]["kernels"], row["timing"]["floor"]
    assert schema.schema_problems(schema.upgraded(copy.deepcopy(old))) != [], "version 2 asks for more"
    old["schema_version"] = 1
    assert schema.schema_problems(schema.upgraded(old)) == []
    for made in (report.markdown(old), page.render(old)):
        assert "lstm-8x2x16x16-fwd-vs-torch" in made
    assert compare.changes(old, document(timed(2.0)), 0.1)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.stem)
def test_committed_runs_are_valid_and_hold_no_paths(file: Path) -> None:
    data = results.Document.load(file).data
    assert data["complete"]
    text = file.read_text()
    assert not re.search(r"/(home|root|work|tmp|usr|opt)/", text)
    assert re.match(r"\d{4}-\d\d-\d\d-", file.name)
    assert data["machine"]["date"][:10] == file.name[:10]
    assert text == schema.json_text(json.loads(text)), "a line for each row"


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/results/gpu").glob("*.json")), ids=lambda file: file.stem)
def test_committed_runs_on_a_gpu(file: Path) -> None:
    text = file.read_text()
    data = json.loads(text)
    assert (data["schema"], data["schema_version"]) == ("fastrnn-gpu", 1)
    assert data["machine"]["date"][:10] == file.name[:10]
    assert not re.search(r"/(home|root|work|tmp|usr|opt)/", text)
    assert text == schema.json_text(data), "a line for each row"


# ---- README


@pytest.mark.parametrize("file", readme.DOCUMENTS, ids=lambda file: file.stem)
def test_the_documents_match_the_committed_runs(file: Path) -> None:
    assert readme.update(file, write=False) == [], f"python -m benchmarks readme --file {file}"
    assert len(readme.PART.findall(file.read_text())) >= (2 if file.stem == "gpu" else 3)


def test_every_document_with_such_tables_is_known() -> None:
    found = {file for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if readme.PART.search(file.read_text())}
    assert found == set(readme.DOCUMENTS)


@pytest.fixture
def committed(tmp_path: Path, everything: dict[str, Any]) -> Path:
    """A folder with a README and two runs of one suite, the newer one with every kind of row."""
    folder = tmp_path / "results"
    folder.mkdir()
    results.Document(document(timed(9.0))).save(folder / "2026-01-01-made.json")
    results.Document(everything).save(folder / "2026-01-02-made.json")
    return folder


def part(view: str, run: str = "2026-01-02-made.json") -> str:
    return f"before\n<!-- benchmarks begin: {run} {view} -->\nold\n<!-- benchmarks end -->\nafter\n"


def test_parts_of_the_readme_are_written_and_nothing_else(committed: Path) -> None:
    for view in readme.VIEWS:
        made, _ = readme.render(part(view), committed.parent, committed)
        assert made.startswith(f"before\n<!-- benchmarks begin: 2026-01-02-made.json {view} -->\n")
        assert made.endswith("\n<!-- benchmarks end -->\nafter\n")
        assert "old" not in made
        assert readme.render(made, committed.parent, committed)[0] == made, "once more changes nothing"


def test_a_pattern_names_the_newest_run(committed: Path) -> None:
    made, _ = readme.render(part("families", "*-made.json"), committed.parent, committed)
    assert "9.00" not in made
    assert "LSTM" in made


def test_tables_of_the_readme(committed: Path, everything: dict[str, Any]) -> None:
    data = results.Document.load(committed / "2026-01-02-made.json").data
    lost = "\n".join(readme.losses(data))
    for row in everything["rows"]:
        bad = row["status"] in results.FAILED or report.row_verdict(row) == "loss"
        assert (row["id"] in lost) == bad
    assert readme.losses(document(timed(2.0))) == ["No row is lost, and none failed."]
    (line,) = [
        line
        for line in readme.families(document(timed(2.0), timed(8.0, T=9), timed(0.5, mode="train")))
        if "4.0" in line
    ]
    assert line == "| LSTM | **4.00** (2 wins) | **0.50** (1 loss) |"


def test_the_headline() -> None:
    data = document(timed(2.0), timed(4.0, mode="train"), timed(8.0, family="gru"))
    (line,) = readme.headline(data)
    assert line.startswith("forward and training step: LSTM 2.00 and 4.00 (a processor, 2 threads, torch 2.13.0, ")


def test_the_table_of_a_gpu() -> None:
    def row(dtype: str, mode: str, tf32: bool = False, **ratios: float) -> dict[str, Any]:
        variants = {
            name: {"ratio": {"median": ratio}, "verdict": "loss" if ratio < 1 else "win"}
            for name, ratio in ratios.items()
        }
        return {"case": {"dtype": dtype}, "mode": mode, "tf32": tf32, "variants": variants}

    rows = [
        row("float32", "fwd", eager=4.0, graph=2.0), row("float32", "fwd", eager=1.0, graph=0.5),
        row("float32", "fwd", tf32=True, graph=8.0), row("float16", "train", graph=3.0),
    ]  # fmt: skip
    lines = readme.gpu_means({"rows": [*rows, {**rows[0], "variants": {"eager": {"message": "not run"}}}]})
    assert lines[2:] == [
        "| float16 | - | **3.00** (1 rows, 0 lost) | - | - |",
        "| float32 | **1.00** (2 rows, 1 lost) | - | **2.00** (2 rows, 0 lost) | - |",
        "| float32 as TF32 | **8.00** (1 rows, 0 lost) | - | - | - |",
        "| all | **2.00** (3 rows, 1 lost) | **3.00** (1 rows, 0 lost) | **2.00** (2 rows, 0 lost) | - |",
    ]


def test_the_table_of_peers_has_every_ratio_once(everything: dict[str, Any]) -> None:
    header, _, *lines = readme.peers(everything)
    assert header == "| theirs / ours | torch | jax | keras |"
    assert "| lstm-77x2x16x16 fwd | 1.10 | 0.50 | 3.00 |" in lines
    assert "| lstm-55x2x16x16 fwd | 2.00? | - | - |" in lines
    assert "| lstm-57x2x16x16 fwd | - | - | - |" in lines, "a skipped row stays"


def test_plots_of_the_readme_know_their_run(committed: Path) -> None:
    file = committed.parent / "README.md"
    run = committed / "2026-01-02-made.json"
    made, wanted = readme.render(part("plot:ratios"), committed.parent, committed)
    assert wanted == [(run, "ratios")]
    assert "](results/plots/2026-01-02-made-ratios.svg)" in made
    file.write_text(made)
    assert not readme.plot_is_current(run, "ratios")
    readme.write_plot(run, "ratios")
    assert readme.plot_is_current(run, "ratios")
    run.write_text(run.read_text() + "\n")
    assert not readme.plot_is_current(run, "ratios")
    with pytest.raises(ValueError, match="no rows for the plot 'nothing'"):
        readme.write_plot(run, "nothing")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (part("families", "absent.json"), "absent.json is not in benchmarks/results"),
        (part("nothing"), "expected one of families"),
        (part("families").replace("<!-- benchmarks end -->", ""), "has no end"),
    ],
)
def test_wrong_parts_are_refused(committed: Path, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        readme.render(text, committed.parent, committed)


# ---- pytest-benchmark


def test_the_pytest_benchmark_entry_runs_checked_rows(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "run.json"
    options = ["--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "--benchmark-warmup=off"]
    command = ["-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-k", "grucell", *options]
    done = subprocess.run(
        [sys.executable, *command, f"--benchmark-json={file}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    made = {entry["extra_info"]["key"]: entry for entry in json.loads(file.read_text())["benchmarks"]}
    assert "torch" in made
    for entry in made.values():
        assert entry["group"].startswith("grucell-1x32x256x256")
        assert entry["extra_info"]["kernel"]
        assert entry["extra_info"]["checked_error"] < 1e-4
