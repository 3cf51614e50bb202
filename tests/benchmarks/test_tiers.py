"""tools/tiers.py: from the times of tiers to a table."""

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import tiers  # noqa: E402

RUN = "Some GPU, torch 2.11.0+cu130, driver 1.2, 2026-12-01"


def row(tier, fwd, bwd, B=1, h=64, cell="lstm", dtype="bfloat16"):
    return {"cell": cell, "dtype": dtype, "h": h, "B": B, "tier": tier, "fwd": fwd, "bwd": bwd}


def written(tmp_path, rows):
    path = tmp_path / "tiers.json"
    path.write_text(json.dumps({"what": "times", "machine": RUN, "rows": rows}))
    return path


def test_the_fastest_tier_of_each_pass():
    table = tiers.entries([row("grid", 2.0, 1.0), row("resident", 1.0, 2.0), row("step", 9.0, 9.0)])
    assert [(e.backward, e.tier, e.B, e.h) for e in table] == [(False, "resident", 1, 64), (True, "grid", 1, 64)]
    assert table[0].line() == "{4, Arithmetic::kHalf, false, 1, 64, Tier::kResident},  // resident 1, grid 2, step 9"


def test_neighbours_with_one_tier_are_one_entry():
    rows = []
    for B in (1, 8):
        for h, us in ((64, 1.0), (128, 1.0), (256, 5.0), (512, 6.0)):
            rows += [row("resident", us, us, B, h), row("grid", 3.0, 3.0, B, h)]
    table = [(e.B, e.h, e.tier) for e in tiers.entries(rows) if not e.backward]
    assert table == [(8, 128, "resident"), (8, 512, "grid")]


def test_a_tier_of_one_pass(tmp_path, capsys):
    forward, neither = row("cluster", 1.0, 1.0), row("step", 1.0, 1.0)
    del forward["bwd"], neither["fwd"], neither["bwd"]
    rows = [forward, row("grid", 2.0, 2.0)]
    assert {(e.backward, e.tier) for e in tiers.entries(rows)} == {(False, "cluster"), (True, "grid")}
    assert tiers.main([str(written(tmp_path, rows))]) == 0
    assert tiers.main([str(written(tmp_path, [*rows, neither]))]) == 2
    assert "rows[2]: expected fwd or bwd, got neither" in capsys.readouterr().err


def test_a_tie_changes_no_tier():
    rows = [row("resident", 1.0, 1.0), row("grid", 2.0, 2.0)]
    rows += [row("resident", 1.04, 1.06, h=128), row("grid", 1.0, 1.0, h=128)]
    assert [(e.backward, e.h, e.tier) for e in tiers.entries(rows)] == [
        (False, 128, "resident"), (True, 64, "resident"), (True, 128, "grid"),
    ]  # fmt: skip


def test_launches_count_half_and_float16_is_as_bfloat16():
    rows = [row("grid", 3.0, 3.0), row("step", 4.0, 8.0), row("cluster", 1.0, 1.0, dtype="float16")]
    assert [(e.dtype, e.backward, e.tier) for e in tiers.entries(rows)] == [
        ("bfloat16", False, "step"), ("bfloat16", True, "grid"),
    ]  # fmt: skip


def test_batches_that_differ_stay():
    rows = []
    for B, us in ((1, 1.0), (8, 1.0), (16, 5.0), (32, 1.0)):
        rows += [row("resident", us, us, B), row("grid", 3.0, 3.0, B)]
    table = tiers.entries(rows)
    assert [(e.B, e.tier) for e in table if e.backward] == [(8, "resident"), (16, "grid"), (32, "resident")]
    assert tiers.tier_of(table, "lstm", "bfloat16", True, 9, 10) == "grid"
    assert tiers.tier_of(table, "lstm", "bfloat16", True, 33, 10) is None
    assert tiers.tier_of(table, "gru", "bfloat16", True, 1, 10) is None


def test_no_measured_call_loses_more_than_a_tie():
    """Whatever was measured, some of it missing."""
    chance = random.Random(0)
    for _ in range(30):
        rows = [
            row(tier, chance.choice((1.0, 1.03, 2.0)), chance.uniform(1, 2), B, h, cell, dtype)
            for cell in ("lstm", "gru")
            for dtype in ("bfloat16", "float32")
            for B in (1, 4, 16)
            for h in (32, 64, 100, 256)
            for tier in ("resident", "grid", "cluster", "step")
            if chance.random() < 0.8
        ]
        table, best = tiers.entries(rows), {}
        for each in rows:
            for name in tiers.PASSES:
                call = each["cell"], each["dtype"], name == "bwd", each["B"], each["h"]
                best.setdefault(call, {})[each["tier"]] = each[name]
        for call, us in best.items():
            tier = tiers.tier_of(table, *call)
            if "step" in us:
                us["step"] *= tiers.STEP
            assert us.get(tier, 99) <= (1 + tiers.TIE) * min(us.values()), call
        assert 0 < len(table) <= len(best)


def test_the_command(tmp_path, capsys):
    path, to = written(tmp_path, [row("grid", 2.0, 1.0), row("resident", 1.0, 2.0)]), tmp_path / "tiers.inc"
    assert tiers.main([str(path), "--write", str(to)]) == 0
    head, _, *lines = to.read_text().splitlines()
    assert RUN in head and len(lines) == 2 and "Tier::kGrid" in lines[1]
    told = capsys.readouterr()
    assert told.out == "" and f"2 entries of 1 measured calls, {RUN}" in told.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fwd": "fast"}, "rows[1]: fwd: expected float, got 'fast'"),
        ({"h": 0}, "rows[1]: h: expected int, got 0"),
        ({"tier": None}, "rows[1]: tier: expected str, got None"),
        ({"fwd": 0.0}, "rows[1]: fwd: expected float, got 0.0"),
        ({"dtype": "int8"}, "rows[1]: dtype: expected one of float32, tf32, bfloat16, float16, got 'int8'"),
        ({"cell": "mgu"}, "rows[1]: cell: expected one of lstm, gru, rnn_tanh, got 'mgu'"),
    ],
    ids=str,
)
def test_a_wrong_file_is_told(tmp_path, capsys, change, message):
    path = written(tmp_path, [row("grid", 2.0, 1.0), row("step", 2.0, 1.0) | change])
    assert tiers.main([str(path)]) == 2
    assert message in capsys.readouterr().err
    path.write_text("[]")
    assert tiers.main([str(path)]) == 2
    assert "expected JSON with machine and rows" in capsys.readouterr().err
