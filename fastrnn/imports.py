"""What other modules are told about ours, once somebody imports them: fastrnn imports none of them itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_awaited: dict[str, Callable[[ModuleType], None]] = {}


class _Finder:
    """Stands first in sys.meta_path: all that it does is to see an awaited module come."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        tell = _awaited.pop(name, None)
        if tell is None:
            return None
        spec = importlib.util.find_spec(name)  # asks this finder again, which has nothing to say now, then the others
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_tell(module: ModuleType) -> None:
            run(module)
            tell(module)

        spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec


def when_imported(name: str, tell: Callable[[ModuleType], None]) -> None:
    """Calls tell(module) as soon as the module of this name is imported: now, where it is already."""
    if name in sys.modules:
        tell(sys.modules[name])
        return
    _awaited[name] = tell
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
