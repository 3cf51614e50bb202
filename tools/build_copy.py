"""build_copy.py FOLDER: copies the working tree to FOLDER and builds the extension in place there, with this Python.

So the extension that another environment has beside fastrnn/*.py stays as it is. Files that have not changed keep their
times in FOLDER, and its build/ is kept, so that only what changed is compiled again.
"""

import filecmp
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile",
    "requirements-dev.txt", "csrc", "fastrnn", "tests", "benchmarks", "tools", "examples", "docs", ".ci", ".github",
    ".gitignore",
)  # fmt: skip


def wanted(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".so", ".pyc")


def mirror(source: Path, target: Path) -> None:
    """Makes target's files those of source. A file that differs gets a new time: older than no object made of it."""
    files = {path.relative_to(source) for part in PARTS for path in (source / part, *(source / part).rglob("*"))}
    files = {name for name in files if wanted(source / name)}
    for name in files:
        copy = target / name
        if not copy.is_file() or not filecmp.cmp(source / name, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, copy)
            shutil.copymode(source / name, copy)
    for part in PARTS:
        for path in (target / part, *(target / part).rglob("*")):
            if wanted(path) and path.relative_to(target) not in files:
                path.unlink()


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    mirror(ROOT, folder)
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, "setup.py", "build_ext", "--inplace"])
