"""check_installed.py WHEEL: the wheel's content, and the package that was installed from it, beside torch.nn."""

import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import torch

import fastrnn

assert Path(fastrnn.__file__).is_relative_to(sys.prefix), fastrnn.__file__
public = torch.__version__.partition("+")[0]
told = version("fastrnn")
labels = {"", f"torch{public}", f"torch{public}.cu{(torch.version.cuda or '').split('.')[0]}"}
assert told.partition("+")[0] == fastrnn.__version__ and told.partition("+")[2] in labels, told
assert f"torch=={public}" in requires("fastrnn"), requires("fastrnn")

# Nothing of another package: libtorch and libgomp are torch's, libstdc++ is the machine's.
names = set(zipfile.ZipFile(sys.argv[1]).namelist())
info = f"fastrnn-{told}.dist-info"
for part in ("fastrnn/py.typed", "fastrnn/_C.pyi", "fastrnn/weights/__init__.py", f"{info}/licenses/LICENSE"):
    assert part in names, part
strangers = [name for name in names if not name.startswith(("fastrnn/", info + "/"))]
assert not strangers, strangers
assert sum(".so" in name for name in names) == 1, names
library = Path(fastrnn._C.__file__).read_bytes()
assert b".debug_info" not in library, "built with debug information"
# A cell's kernels of all instruction sets and dtypes, dual numbers among them, are some 1.8 MB; the binding is 3 MB.
limit = (len(torch.ops.fastrnn.cell_names()) + 1) << 21
assert fastrnn.build_info()["cuda_archs"] or len(library) < limit, f"{len(library)} bytes, more than {limit}"

for name in ("LSTM", "GRU", "RNN"):
    theirs, ours = getattr(torch.nn, name)(3, 4), getattr(fastrnn, name)(3, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3, requires_grad=True)
    results = []
    for model in (theirs, ours):
        output, _ = model(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])))
    torch.testing.assert_close(results[1], results[0])
