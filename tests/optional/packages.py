"""Packages that only these tests need: `make test-extras` installs them (requirements.txt) and lets none be missing."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest


def needs(name: str) -> ModuleType:
    """The package, or a skip of the whole file that says how it would run."""
    if os.environ.get("FASTRNN_EXTRAS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=_missing(name), exc_type=ImportError)


def folder(name: str) -> Path:
    """Where a package's files lie, which is not imported; or the same skip."""
    parent, _, _ = name.rpartition(".")
    spec = find_spec(name) if not parent or find_spec(parent) else None
    if spec is None or not spec.submodule_search_locations:
        if os.environ.get("FASTRNN_EXTRAS"):
            raise ModuleNotFoundError(_missing(name))
        pytest.skip(_missing(name), allow_module_level=True)
    return Path(next(iter(spec.submodule_search_locations)))


def _missing(name: str) -> str:
    return f"{name} is not installed: run `make test-extras`"
