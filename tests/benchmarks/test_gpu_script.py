"""benchmarks/gpu_check.sh, rehearsed without a GPU: every step, the JSON and the table, at tiny sizes on the CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import report, small, steps, timing
from benchmarks.gpu.cudnn import PERSIST_STATIC, SMALL_H, STANDARD, algorithm, algorithms
from benchmarks.gpu.rows import TABLE, GpuRow, tiny
from fastrnn import ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

from tiers import entries as table_of_tiers  # noqa: E402
from tiers import read as read_tiers  # noqa: E402

H100 = (9, 0), 132


def case(cell="LSTM", B=16, H=512, dtype="float16", **options):
    return Case(family="f", cell=cell, T=10, B=B, I=options.pop("I", H), H=H, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("given", "forward", "expected"),
    [
        (case(), True, PERSIST_STATIC),
        (case(H=1024, B=128), False, PERSIST_STATIC),
        (case(dtype="bfloat16"), True, STANDARD),
        (case(dtype="float32"), True, STANDARD),
        (case(cell="GRU"), True, STANDARD),
        (case(cell="RNN"), True, PERSIST_STATIC),
        (case(cell="RNN", H=896, B=96), True, STANDARD),
        (case(B=12), True, STANDARD),
        (case(B=136), True, STANDARD),
        (case(H=1152), True, STANDARD),
        (case(H=520), True, STANDARD),
        (case(I=100), True, STANDARD),
        (case(layers=2), True, STANDARD),
        (case(bidirectional=True), True, STANDARD),
        (case(shortest=2), True, STANDARD),
        (case(proj=64), True, STANDARD),
        (case(H=192, dtype="bfloat16"), True, SMALL_H),
        (case(H=192, dtype="float32"), False, STANDARD),
        (case(H=193, dtype="float32"), True, STANDARD),
        (case(H=128, dtype="float32", layers=3), False, SMALL_H),
        (case(H=128, dtype="float64"), True, STANDARD),
        (case(cell="RNN", H=384, dtype="bfloat16"), True, SMALL_H),
        (case(cell="RNN", H=384, dtype="bfloat16"), False, STANDARD),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_cudnn_algorithm(given, forward, expected):
    assert algorithm(given, forward, *H100) == expected


def test_cudnn_algorithm_by_device():
    assert algorithm(case(), True, (8, 6), 142) == STANDARD
    assert algorithm(case(), True, (8, 0), 56) == STANDARD
    assert algorithms(case(H=192, dtype="float32"), "train", *H100) == "SMALL_H/STANDARD"
    assert algorithms(case(), "train", *H100) == PERSIST_STATIC


def test_table_has_no_row_twice_and_every_kind():
    assert len({row.id for row in TABLE}) == len(TABLE)
    kinds = {row.case.cell for row in TABLE}
    assert kinds == {"LSTM", "GRU", "RNN"}
    assert {row.case.dtype for row in TABLE} == {"float32", "bfloat16", "float16"}
    found = {algorithms(row.case, row.mode, *H100) for row in TABLE}
    assert {STANDARD, PERSIST_STATIC, SMALL_H} <= found
    for has in ("bidirectional", "shortest"):
        assert any(getattr(row.case, has) for row in TABLE)
    assert any(row.case.layers > 1 for row in TABLE) and any(row.tf32 for row in TABLE)
    assert any(row.resets for row in TABLE) and {row.mode for row in TABLE} == {"fwd", "train"}


REHEARSAL = ("--device", "cpu", "--dry-run", "--only", "resets", "--select", "no_rows or gradcheck")


def test_whole_run(tmp_path, capsys):
    """The script itself, less the compiler."""
    assert script.main(["--out", str(tmp_path), *REHEARSAL]) == 0
    printed = capsys.readouterr().out
    doc = json.loads((tmp_path / "gpu.json").read_text())
    assert doc["schema"] == "fastrnn-gpu" and doc["schema_version"] == report.SCHEMA_VERSION
    assert doc["machine"]["torch"] == torch.__version__ and doc["machine"]["date"]
    steps_taken = {step["name"]: step["status"] for step in doc["steps"]}
    done = dict.fromkeys(("tests", "calls", "tiers", "scaling", "timing"), "ok")
    assert steps_taken == done | dict.fromkeys(("build", "sanitizer", "profile"), "skipped")
    timed = [row for row in doc["rows"] if row["status"] == "ok"]
    others = [row for row in doc["rows"] if row["status"] != "ok"]
    assert timed and {row["message"] for row in others} == {"torchrl is not installed"}
    for row in timed:
        assert row["cudnn"] == "a call per step" and set(row["variants"]) == {"eager", "graph"}
        for variant in row["variants"].values():
            assert variant["ratio"]["low"] <= variant["ratio"]["median"] <= variant["ratio"]["high"]
    tail = printed.splitlines()
    assert tail[-1] == "passed" and any(line.startswith("mean ratio (worst)") for line in tail)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"gpu.json", "gpu.log", "tests.xml", "tiers.json", "scaling.json"}  # 8 come back, with profile.txt
    sizes = {call["id"].split("-")[0] for call in doc["calls"]}
    assert sizes == {"language", "lstm", "gru"} and not any(call["message"] for call in doc["calls"])
    for call in doc["calls"]:
        for side in ("ours", "theirs"):
            assert 0 < call[side]["host_us"] <= call[side]["us"] * 1.01
    assert json.loads((tmp_path / "scaling.json").read_text())["rows"]
    run, measured = read_tiers(tmp_path / "tiers.json")
    assert torch.__version__ in run and len(table_of_tiers(measured)) > 0


@pytest.mark.parametrize(
    ("option", "wanted"),
    [("--correctness", ["tests", "sanitizer"]), ("--timings", ["calls", "tiers", "scaling", "profile", "timing"])],
)
def test_half_of_a_run(tmp_path, monkeypatch, option, wanted):
    for name in ("tests", "sanitizer", "calls", "tiers", "scaling", "profile", "timing"):
        function = {"sanitizer": "sanitize", "timing": "timings"}.get(name, name)
        monkeypatch.setattr(script, function, lambda run, *rest, name=name: run.record(name, "ok") or [])
    assert script.main(["--out", str(tmp_path), option, *REHEARSAL]) == 0
    doc = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["name"] for step in doc["steps"]] == ["build", *wanted]


def test_limits_leave_room_inside_five_minutes():
    """Whatever hangs: of 290 seconds the rows against cuDNN have 50 left, and of the tests all are ended."""
    limit = script.LIMITS
    build = 60  # with objects that were carried
    before = build + limit["calls"] + limit["tiers"] + limit["scaling"] + limit["profile"]
    assert before + 2 * script.RESERVE_S <= 290 - 50
    assert build + limit["tests"] + limit["memcheck"] + limit["racecheck"] + script.RESERVE_S <= 290


def test_no_gpu_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--out", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_shell_script_hands_its_options_on():
    done = subprocess.run(
        [ROOT / "benchmarks/gpu_check.sh", "--help"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--dry-run" in done.stdout


ROWS = {row.id: row for row in TABLE}
PICKED = ("lstm-128x32x256x256-packed16-fwd", "gru-128x16x512x512-tf32-train", "lstm-128x64x512x512-layers2-bf16-train")


@pytest.mark.parametrize("name", PICKED)
def test_rows_run(name):
    record = timing.run_row(tiny(ROWS[name]), torch.device("cpu"), 0.01)
    assert record["status"] == "ok", record["message"]
    assert record["error"]["error"] <= record["error"]["allowed"]
    text = timing.line(record)
    assert name.split("-")[0] in text and "/" in text
    if "packed" in name:
        assert "message" in record["variants"]["graph"]


def broken(**changes):
    """steps.prepare with something in the contest replaced."""

    def prepare(row, device, seed=0):
        return replace(steps.prepare(row, device, seed), **changes)

    return prepare


def test_a_wrong_result_fails_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "prepare", broken(ours=lambda: (torch.full((5, 1, 8), torch.nan),)))
    out = tmp_path / "t.json"
    options = ["--out", str(out), "--device", "cpu", "--tiny", "--only", "gru-128x1x512x512-fwd", "--row", "0.01"]
    assert timing.main(options) == 1
    (record,) = json.loads(out.read_text())
    assert record["status"] == "mismatch" and "output: differs by inf" in record["message"]
    doc = report.document(report.machine("cpu"), [], [record])
    assert doc["summary"]["failed"] == ["mismatch"] and report.table(doc)[-1] == "FAILED: mismatch"


def test_an_error_is_a_row(monkeypatch):
    def fails():
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(timing, "prepare", broken(ours=fails))
    record = timing.run_row(tiny(TABLE[0]), torch.device("cpu"), 0.01)
    assert (record["status"], record["message"]) == ("error", "RuntimeError: no such kernel")


def test_time_runs_out_at_the_last_rows():
    table = [tiny(row) for row in TABLE[:3]]
    records = list(timing.run(table, torch.device("cpu"), 0.0, 0.01))
    assert [record["status"] for record in records[1:]] == ["not run"] * 2
    assert report.document(report.machine("cpu"), [], records)["summary"]["failed"] == []


def test_a_failed_step_fails_the_run():
    step = {"name": "memcheck", "status": "failed", "seconds": 3.0, "detail": "ERROR SUMMARY: 1 error"}
    doc = report.document(report.machine("cpu"), [step], [])
    assert doc["summary"]["failed"] == ["memcheck"] and report.table(doc)[-1] == "FAILED: memcheck"


def test_a_step_that_hangs_is_ended(tmp_path):
    run = script.Run(tmp_path, "cpu", 600, True)
    command = [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"]
    assert run.process("hang", command, tmp_path, 1.5) == (None, "began\n")
    assert (tmp_path / "gpu.log").read_text() == "== hang\nbegan\n"


def test_means_and_losses():
    def record(name, ratio, verdict):
        timing = {"ratio": {"median": ratio}, "verdict": verdict}
        facts = {"family": "lstm", "dtype": "float32"}
        return {"id": name, "case": facts, "mode": "fwd", "tf32": False, "variants": {"eager": timing, "graph": {}}}

    rows = [record("a", 4.0, "win"), record("b", 0.25, "loss")]
    (mean,) = report.means(rows)
    assert mean["ratio"] == pytest.approx(1.0) and (mean["worst"], mean["worst_row"]) == (0.25, "b")
    assert report.losses(rows) == ["  0.25  b (eager)"]


def test_small_sizes(capsys):
    assert small.main(["--device", "cpu"]) == 0
    calls = 6 * len(ops.CELLS)  # of three dtypes, two sizes each
    counts = ", ".join(f"{calls} calls of {tier}" for tier in ("step", "resident", "grid", "cluster"))
    assert capsys.readouterr().out == f"small sizes: {counts}\n"


def test_architecture_of_a_gpu(monkeypatch):
    for capability, expected in (((9, 0), "9.0a"), ((8, 0), "8.0"), ((12, 0), "12.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert script.architecture("cuda") == expected


def test_resets_of_the_peer():
    """A call per step with the state kept where no reset is: what ours does in one."""
    row = tiny(next(row for row in TABLE if row.resets and row.case.cell == "LSTM"))
    assert isinstance(row, GpuRow) and row.resets > 0.01
    contest = steps.prepare(replace(row, mode="train"), torch.device("cpu"))
    name, error, allowed = steps.worst_error(row, contest)
    assert error < 1e-5 < allowed, name
