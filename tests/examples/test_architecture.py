"""docs/architecture.md: the cell that it adds is one."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_cell_of_the_page_is_right(tmp_path):
    """Registered beside the others, with its backward against central differences of its forward."""
    header, line = re.findall(r"^```cpp\n(.*?)^```", (ROOT / "docs/architecture.md").read_text(), re.M | re.S)
    (tmp_path / "leaky.h").write_text(header.replace('"activations.h"', '"cells/activations.h"'))
    (tmp_path / "more.h").write_text(f'#include "leaky.h"\n#define FASTRNN_FOR_EACH_MORE_CELL(X) {line}')
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
    command += ['-DFASTRNN_MORE_CELLS="more.h"', str(ROOT / "tests/cpp/test_cells.cpp"), "-o", str(tmp_path / "cells")]
    subprocess.run(command, check=True)
    done = subprocess.run([str(tmp_path / "cells")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^leaky .* ok$", done.stdout, re.M)
