"""Every case: a module, an option and a check; and the record of those that must fail."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support import autograd, functorch, graphs  # noqa: F401 -- their checks enter the list, in this order
from tests.support.checks import CHECKS
from tests.support.subjects import KINDS, LAYERS, LIBRARIES, OPTIONS, OURS_ALONE, PLAIN, RANDOM, Subject

RECORD = Path(__file__).parent / "failures.json"  # {case id: the error}

# What each option is combined with; COMPILED for one kind alone, being slow, and not where results are random or
# sizes come from data.
COMBINED = (
    "backward",
    "double_backward",
    "func_jvp",
    "forward_over_reverse",
    "saved_tensors",
    "checkpoints",
    "vmap_input",
    "vmap_weights",
    "per_sample_gradients",
    "compile_aot",
    "export_dynamic",
)
COMPILED = ("compile_aot", "export_dynamic")


@dataclass(frozen=True)
class Case:
    library: str
    kind: str
    option: str
    check: str

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.library, self.kind, self.option.replace(" ", "_"), self.check)))

    def run(self, device: str = "cpu") -> None:
        CHECKS[self.check](Subject(self.library, self.kind, self.option, device))


def applies(library: str, kind: str, option: str) -> bool:
    """torch.nn takes another path for half types on other processors, so what it does with them is not recorded."""
    if option == "proj_size" and kind != "LSTM":
        return False
    return library == "fastrnn" or option not in (*OURS_ALONE, "bfloat16", "float16")


def combined(kind: str, option: str) -> Iterator[str]:
    """The checks that an option is run with."""
    for name in COMBINED:
        if name not in COMPILED or (kind == "LSTM" and option not in (*RANDOM, "PackedSequence")):
            yield name


CASES = [
    *(Case(library, kind, PLAIN, name) for library in LIBRARIES for name in CHECKS for kind in KINDS),
    *(
        Case(library, kind, option, name)
        for library in LIBRARIES
        for option in OPTIONS
        for kind in LAYERS
        if applies(library, kind, option)
        for name in combined(kind, option)
    ),
]


# ---- what must fail ----

record = json.loads(RECORD.read_text()) if RECORD.exists() else {"torch": "", "failures": {}}
FAILURES: dict[str, str] = record["failures"]
MEASURED_WITH: str = record["torch"]  # what torch.nn does is known of this version alone


def torch_version() -> str:
    return torch.__version__.partition("+")[0]


def described(error: BaseException) -> str:
    """Type and the beginning of the text, without what changes from run to run."""
    text = re.sub(r'"/[^"]*"', '"..."', " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:110].rstrip()


def outcome(case: Case, device: str = "cpu") -> str:
    """ "" if the case passes, else what it raised."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    try:
        case.run(device)
    except Exception as error:
        return described(error)
    return ""
