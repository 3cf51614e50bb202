"""The list of checks: what each is called, in code and on the page."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.subjects import Subject

CHECKS: dict[str, Callable[[Subject], None]] = {}
TITLES: dict[str, str] = {}


def check(title: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enters a check under its function's name, with what the page calls it."""

    def enter(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS[function.__name__], TITLES[function.__name__] = function, title
        return function

    return enter
