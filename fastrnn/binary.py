"""Whether the extension module fastrnn._C was built for this Python and this torch: found out before it is loaded.

A module that was built with another torch may load, and then crash or compute nonsense: torch's classes have no layout
that lasts. So the file itself is asked before it is loaded. The patch version counts, too, as in torch's own extensions
(torchvision names it in its requirements); "+cpu" or "+cu130" does not, but for a module with CUDA kernels.
"""

import importlib.machinery
import importlib.util
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MARK = re.compile(rb"fastrnn built with torch ([^,;]+), CUDA ([^,;]+);")  # csrc/torch/module.cpp
AGAIN = "build it in this environment (pip install --no-build-isolation ., or make build in a clone)"


def built_with(file: Path) -> tuple[str, str] | None:
    """The torch version and its CUDA version ("none" in a build without CUDA kernels) that stand in the file."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = MARK.search(content)
        return (found[1].decode(), found[2].decode()) if found else None


def runs_here(version: str, cuda: str) -> bool:
    """Whether a module built with this torch and CUDA runs under the torch of this process."""
    same_cuda = cuda == "none" or (torch.version.cuda or "none").split(".")[0] == cuda.split(".")[0]
    return version.partition("+")[0] == torch.__version__.partition("+")[0] and same_cuda


@contextmanager
def checked() -> Iterator[None]:
    """Around the first import of fastrnn._C.

    Raises:
        ImportError: there is none, or one for another Python or another torch. The text says which.
    """
    folder = Path(__file__).parent
    spec = importlib.util.find_spec("fastrnn._C")
    if spec is None or spec.origin is None:
        others = sorted(file.name for file in folder.glob("_C.*.so"))
        if not others:
            raise ImportError(
                f"fastrnn is not built in {folder}: {AGAIN}. If it is installed, Python found this folder first: start "
                "it elsewhere"
            )
        tag = re.match(r"_C\.cpython-(\d)(\d+)-", others[0])
        built_for = f"Python {tag[1]}.{tag[2]} ({others[0]})" if tag else others[0]
        raise ImportError(
            f"fastrnn's extension module was built for {built_for}, and this is Python {sys.version_info[0]}."
            f"{sys.version_info[1]}, which looks for _C{importlib.machinery.EXTENSION_SUFFIXES[0]}: {AGAIN}"
        )
    file = Path(spec.origin)
    found = built_with(file)
    if found is None:
        raise ImportError(f"{file} was built from the sources of another version of fastrnn: {AGAIN}")
    if not runs_here(*found):
        raise ImportError(
            f"fastrnn's extension module was built with torch {found[0]}, and this is torch {torch.__version__}: "
            f"{AGAIN}, or install torch {found[0].partition('+')[0]}"
        )
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{file}, built with torch {found[0]} as this is, does not load: {error}") from error
