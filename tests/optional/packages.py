"""Packages that only these tests need: `make test-extras` installs them (requirements.txt) and lets none be missing."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch


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


def import_torchvision() -> None:
    """Beside a build of torch for CPUs alone an index' torchvision does not load its library, and its import fails,
    and so does that of others which import it where it is installed. With the two operators that it describes defined
    it succeeds, and what of it is plain Python works."""
    if find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")


import_torchvision()


def _missing(name: str) -> str:
    return f"{name} is not installed: run `make test-extras`"
