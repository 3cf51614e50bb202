"""Packages that only these tests need: `make test-extras` installs them (requirements.txt) and lets none be missing."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def needs(name: str) -> ModuleType:
    """The package, or a skip of the whole file that says how it would run."""
    if os.environ.get("FASTRNN_EXTRAS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: run `make test-extras`", exc_type=ImportError)
