"""What other packages are told about ours, once somebody imports them: fastrnn imports none of them itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Awaited:
    """Waits in sys.meta_path for the import of one module, and leaves with it."""

    def __init__(self, name: str, tell: Callable[[ModuleType], None]) -> None:
        self.name, self.tell = name, tell

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)  # so that the others are asked
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_tell(module: ModuleType) -> None:
            run(module)
            self.tell(module)

        spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec


def when_imported(name: str, tell: Callable[[ModuleType], None]) -> None:
    """Calls tell(module) as soon as the module of this name is imported: now, where it is already."""
    if name in sys.modules:
        tell(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Awaited(name, tell))
