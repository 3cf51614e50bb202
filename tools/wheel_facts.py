"""wheel_facts.py WHEEL: its size, its tag, the libraries it takes from the machine, and the glibc that it needs.

Symbols of the C library that are newer than OLD are told by name: the wheel's tag can be no older than they are.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

OLD = (2, 28)  # torch's own wheels: where those run, ours should


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split("."))


def read(what: str, module: str | Path) -> str:
    return subprocess.run(["readelf", "--wide", what, module], capture_output=True, text=True, check=True).stdout


def required(symbols: str) -> dict[tuple[int, ...], list[str]]:
    """Version of glibc -> symbols of it that a module takes, from what `readelf --wide --dyn-syms` prints."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name, version in re.findall(r" UND (\S+)@GLIBC_([\d.]+)", symbols):
        found.setdefault(as_numbers(version), []).append(name)
    return found


def libraries(dynamic: str) -> list[str]:
    """From what `readelf --dynamic` prints."""
    return re.findall(r"\(NEEDED\)\s.*\[(.*)\]", dynamic)


def told(found: dict[tuple[int, ...], list[str]]) -> str:
    versions = sorted(found, reverse=True)
    newer = [f"{dotted(v)} for {', '.join(sorted(found[v]))}" for v in versions if v > OLD]
    older = next((dotted(v) for v in versions if v <= OLD), "none")
    text = f"needs glibc {dotted(versions[0])}"
    return text + (f" ({'; '.join(newer)}; all else {older})" if newer else "")


def dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if ".so" in name)
        module = archive.extract(name, folder)
        size = Path(module).stat().st_size
        symbols, dynamic = (read(what, module) for what in ("--dyn-syms", "--dynamic"))
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {size / 1e6:.1f} MB installed")
    print(f"tag {wheel.stem.partition('-')[2].partition('-')[2]}, {told(required(symbols))}")
    print(f"libraries that it finds at a user's: {', '.join(libraries(dynamic))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
