"""The form of the JSON document: its version, what it must hold, how it is written and how older versions are read."""

from __future__ import annotations

import json
from typing import Any

SCHEMA = "fastrnn-benchmarks"
SCHEMA_VERSION = 2  # raise it when a key is removed or changes its meaning; new keys need no new version
STATUSES = ("error", "mismatch", "ok", "skipped")
KINDS = ("timing", "accuracy", "memory", "drift")  # the last is missing in older files


def upgraded(data: Any) -> Any:
    """An older document in today's form (changed in place); anything else as it is.

    Version 1 had neither memory rows, floors, kernels nor fits, and kept no list of peers.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("schema_version") != 1:
        return data
    data["schema_version"] = SCHEMA_VERSION
    data.setdefault("peers", {})
    for row in rows if isinstance(rows := data.get("rows"), list) else []:
        if isinstance(row, dict):
            row |= {"threads": 0, "memory": None}
            if row.get("timing"):
                row["timing"] |= {"kernels": {}, "floor": None}
    if isinstance(data.get("machine"), dict):
        data["machine"].setdefault("roofline", [])
    if isinstance(data.get("summary"), dict):
        data["summary"] |= {"fits": [], "thread_speedups": []}
    return data


Types = dict[str, type | tuple[type, ...]]
REQUIRED: Types = {
    "schema": str, "schema_version": int, "command": str, "complete": bool, "planned_rows": int,
    "settings": dict, "includes_input_gemm": bool, "machine": dict, "peers": dict, "rows": list, "summary": dict,
}  # fmt: skip
ROW_REQUIRED: Types = {
    "id": str, "kind": str, "family": str, "mode": str, "peer": str, "case": dict, "status": str,
    "message": str, "timing": (dict, type(None)), "accuracy": (dict, type(None)), "memory": (dict, type(None)),
    "command": str, "threads": int,
}  # fmt: skip
MACHINE_REQUIRED: Types = {
    "date": str, "cpu": dict, "threads": int, "environment": dict, "software": dict, "roofline": list,
}  # fmt: skip


def schema_problems(data: Any) -> list[str]:
    """What is wrong with a document, in words; empty when it is valid."""
    if not isinstance(data, dict):
        return ["not an object"]
    if data.get("schema") != SCHEMA:
        return [f"schema: expected {SCHEMA!r}, got {data.get('schema')!r}"]
    if data.get("schema_version") != SCHEMA_VERSION:
        return [f"schema_version: expected {SCHEMA_VERSION}, got {data.get('schema_version')!r}"]
    problems: list[str] = []

    def require(where: str, value: Any, required: Types) -> bool:
        if not isinstance(value, dict):
            problems.append(f"{where}: expected an object, got {type(value).__name__}")
            return False
        for key, kind in required.items():
            if key not in value:
                problems.append(f"{where}: {key} is missing")
            elif not isinstance(value[key], kind):
                problems.append(f"{where}: {key} is a {type(value[key]).__name__}")
        return True

    require("document", data, REQUIRED)
    require("machine", data.get("machine"), MACHINE_REQUIRED)
    rows = data.get("rows")
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        where = f"rows[{index}]"
        if not require(where, row, ROW_REQUIRED):
            continue
        if row.get("status") not in STATUSES:
            problems.append(f"{where}: status is {row.get('status')!r}")
        if row.get("status") == "ok" and sum(bool(row.get(kind)) for kind in KINDS) != 1:
            problems.append(f"{where}: ok, but not exactly one of {', '.join(KINDS)}")
    return problems


def json_text(document: dict[str, Any]) -> str:
    """The document as a file: a line for each of its keys and, in a list of objects, for each object (a row).

    So a run of a hundred rows has some hundred lines, and a difference between two runs is shown row by row.
    """

    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(json.dumps(item, default=str) for item in value) + "\n]"
        return json.dumps(value, default=str)

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {text(value)}" for key, value in document.items()) + "\n}\n"
