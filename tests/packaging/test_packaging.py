"""What comes first: the source distribution, what a build asks for and says, an extension module that does not fit."""

import email
import inspect
import os
import pydoc
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path, PurePosixPath

import pytest
import torch

import fastrnn
from fastrnn import _C, binary

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import build_backend  # noqa: E402
from build_copy import mirror  # noqa: E402

PUBLIC = torch.__version__.partition("+")[0]
PAGES = sorted(page for folder in (".", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md"))


def python(*arguments, cwd=ROOT, **environment):
    """Runs this Python, and not by way of this folder; an environment variable of None is taken away."""
    env = {**os.environ, "PYTHONPATH": None, **environment}
    env = {name: str(value) for name, value in env.items() if value is not None}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


# ---- what is packed ----


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the tree without anything built."""
    folder = tmp_path_factory.mktemp("a folder") / "sources"
    mirror(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(sources):
    """Name -> content of what the source distribution holds, packed where no torch is."""
    (sources.parent / "torch.py").write_text("raise ModuleNotFoundError('no torch')")
    hook = "import build_backend; build_backend.build_sdist('..')"
    done = python("-c", hook, cwd=sources, PYTHONPATH=f"tools:{sources.parent}")
    assert done.returncode == 0, done.stderr
    with tarfile.open(sources.parent / f"fastrnn-{fastrnn.__version__}.tar.gz") as archive:
        files = [member for member in archive if member.isfile()]
        return {member.name.partition("/")[2]: archive.extractfile(member).read() for member in files}


def test_sdist_holds_the_repository(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    made = {"PKG-INFO", "setup.cfg"}
    packed = {name for name in sdist if ".egg-info/" not in name} - made
    assert packed == {name for name in listed if (ROOT / name).exists()}


def test_sdist_holds_what_a_build_reads(sdist):
    """Every file of ours that a source includes, and every module that setup.py imports."""
    names = set(sdist)
    read = [name for name in names if name.startswith("csrc/") and PurePosixPath(name).suffix != ".json"]
    assert {PurePosixPath(name).suffix for name in read} == {".cpp", ".cu", ".cuh", ".h", ".inc"}
    for name in read:
        for included in re.findall(r'^\s*#\s*include "(.*)"', sdist[name].decode(), re.M):
            folders = (PurePosixPath(name).parent, "csrc", "tests/hostbuild")
            found = {os.path.normpath(f"{folder}/{included}") for folder in folders} & names
            assert found, f"{name} includes {included}"
    assert {"tools/cuda_toolkit.py", "tools/build_backend.py", "README.md", "LICENSE", "fastrnn/_C.pyi"} <= names


def test_sdist_is_for_any_torch_of_the_range(sdist):
    metadata = email.message_from_bytes(sdist["PKG-INFO"])
    bounds = set(build_backend.TORCH.removeprefix("torch").split(","))
    (required,) = [line for line in metadata.get_all("Requires-Dist") if line.startswith("torch")]
    assert set(required.removeprefix("torch").split(",")) == bounds


def test_wheel_is_for_the_torch_it_was_built_with(sources, tmp_path):
    done = python("setup.py", "--quiet", "dist_info", "--output-dir", tmp_path, cwd=sources)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("*.dist-info")
    metadata = email.message_from_bytes((folder / "METADATA").read_bytes())
    assert metadata["Name"] == "fastrnn" and metadata["Version"] == fastrnn.__version__
    assert f"torch=={PUBLIC}" in metadata.get_all("Requires-Dist")
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE"]
    text = metadata.get_payload()
    assert text.startswith("# fastrnn") and "`docs/recipes.md` (in the source distribution)" in text
    assert not re.findall(r"\]\((?!https?:)", text), "a link that leads nowhere outside of the repository"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    """Files, and sections by their headings."""
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
        name, _, section = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            known = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert section in known, link


def test_the_pages_name_files_that_exist():
    """What stands in backquotes and looks like a path of the repository."""
    for page in PAGES:
        for name in re.findall(r"`((?:csrc|fastrnn|tests|tools|benchmarks|docs|examples)/[\w./*-]+)", page.read_text()):
            assert list(ROOT.glob(name.partition("::")[0].rstrip("."))), f"{page.name}: {name}"


def test_every_page_is_on_the_site():
    """`make docs` itself tells what it cannot render, and links that lead nowhere there."""
    config = runpy.run_path(str(ROOT / "docs/conf.py"))
    listed = [config["root_doc"], *(page for pages in config["CONTENTS"].values() for page in pages)]
    pages = [*PAGES, *ROOT.glob("docs/*.rst")]
    assert sorted(listed) == sorted(str(page.relative_to(ROOT).with_suffix("")) for page in pages)


def test_every_public_name_is_on_the_page_of_the_api():
    told, module = [], ""
    for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", (ROOT / "docs/api.rst").read_text(), re.M):
        if directive in ("module", "currentmodule"):
            module = name
        elif directive in ("autoclass", "autofunction"):
            told.append(name if name.startswith("fastrnn.") else f"{module}.{name}")
    functional = [name for name, x in vars(fastrnn.functional).items() if is_public(name, x, fastrnn.functional)]
    public = {f"fastrnn.{name}" for name in set(fastrnn.__all__) - {"functional"}}
    public |= {f"fastrnn.functional.{name}" for name in [*functional, "LayerWeights"]}
    public |= {f"fastrnn.weights.{name}" for name in set(fastrnn.weights.__all__) - set(fastrnn.__all__)}
    assert sorted(told) == sorted(public)
    assert all(inspect.getdoc(pydoc.locate(name)) for name in public)


def is_public(name, x, module):
    return not name.startswith("_") and getattr(x, "__module__", None) == module.__name__


# ---- what a build asks for and says ----


def test_a_build_takes_the_torch_of_the_environment():
    """Also inside pip's build environment, which takes the packages away and leaves the interpreter."""
    assert build_backend.get_requires_for_build_wheel() == [f"torch=={PUBLIC}"]
    assert build_backend.get_requires_for_build_editable() == [f"torch=={PUBLIC}"]
    assert build_backend.get_requires_for_build_sdist() == []


def test_a_build_takes_any_torch_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert build_backend.get_requires_for_build_wheel() == [build_backend.TORCH]


def compiler(folder, version, owner="g++ Copyright (C) Free Software Foundation"):
    """A stand-in for a compiler that tells a version and compiles nothing."""
    script = folder / "other g++"
    script.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo '{owner} {version}';; -dump*) echo {version};; *) exit 1;; esac\n"
    )
    script.chmod(0o755)
    return f"'{script}'"


def attempt(folder, **environment):
    parts = ("--build-lib", folder / "lib", "--build-temp", folder / "temp")
    return python("setup.py", "--quiet", "build_ext", *parts, FASTRNN_CUDA="0", **environment)


def build(folder, **environment):
    """What a build says that is refused."""
    done = attempt(folder, **environment)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.skipif(not (Path(sysconfig.get_path("scripts")) / "ninja").exists(), reason="needs pip's ninja")
def test_build_takes_the_ninja_of_the_environment(tmp_path):
    """As `make` calls an interpreter of an environment that nobody has activated."""
    done = attempt(tmp_path, CXX=compiler(tmp_path, "12.2.0"), PATH=tmp_path)
    assert done.returncode != 0 and "ninja: build stopped" in done.stdout, done.stdout + done.stderr
    assert "could not find ninja" not in done.stderr


def test_build_without_a_compiler(tmp_path):
    said = build(tmp_path, CXX="no-such-compiler")
    assert "'no-such-compiler' was not found: install g++ 12 or newer, or set CXX" in said


def test_build_with_an_old_compiler(tmp_path):
    assert "is g++ 9.4.0: expected 12 or newer" in build(tmp_path, CXX=compiler(tmp_path, "9.4.0"))


def test_build_with_clang(tmp_path):
    """It compiles all of it, and the module then finds no OpenMP in torch."""
    assert "is clang: expected g++ 12 or newer" in build(tmp_path, CXX=compiler(tmp_path, "19.1.7", "clang version"))


def test_build_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch')")
    said = build(tmp_path, PYTHONPATH=tmp_path)
    assert "no torch in this environment" in said and build_backend.TORCH in said


def test_build_with_a_torch_out_of_range(tmp_path):
    """Both ends of the range; its own version stands in for the others, which must be let through."""
    for version in ("2.10.1", "2.16.0+cpu", "3.0.0"):
        (tmp_path / "sitecustomize.py").write_text(f"import torch\ntorch.__version__ = {version!r}\n")
        assert f"expected {build_backend.TORCH}, got torch {version}" in build(tmp_path, PYTHONPATH=tmp_path)


def test_build_switches(tmp_path):
    assert "FASTRNN_DEBUG_INFO: expected 0 or 1, got 'yes'" in build(tmp_path, FASTRNN_DEBUG_INFO="yes")


@pytest.mark.skipif(os.environ.get("FASTRNN_DEBUG_INFO") == "1", reason="it was asked for")
def test_module_has_no_debug_information():
    """34 of 38 MB, where Python's own flags decide."""
    assert b".debug_info" not in Path(_C.__file__).read_bytes()


# ---- a module that does not fit ----


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its extension module."""
    away = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(Path(fastrnn.__file__).parent, tmp_path / "fastrnn", ignore=away))


def refusal(package):
    done = python("-c", "import fastrnn", cwd=package.parent, PYTHONPATH=package.parent)
    assert done.returncode == 1 and done.stderr.count("Traceback") >= 1
    return done.stderr.splitlines()[-1]


def module(package, suffix=EXTENSION_SUFFIXES[0]):
    return package / f"_C{suffix}"


def test_not_built(package):
    said = refusal(package)
    assert said.startswith(f"ImportError: fastrnn is not built in {package}: build it") and "make build" in said


def test_built_for_another_python(package):
    module(package, ".cpython-38-x86_64-linux-gnu.so").write_bytes(b"")
    here = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    assert f"was built for Python 3.8 (_C.cpython-38-x86_64-linux-gnu.so), and this is {here}" in refusal(package)


def test_built_with_another_torch(package):
    """The file says so before it is loaded: this one is whole but for the version."""
    other = PUBLIC[:-1] + ("1" if PUBLIC[-1] == "0" else "0")  # a patch version on or back
    written = Path(_C.__file__).read_bytes().replace(b"with torch " + PUBLIC.encode(), b"with torch " + other.encode())
    module(package).write_bytes(written)
    said = refusal(package)
    assert f"was built with torch {other}" in said and f"and this is torch {torch.__version__}" in said
    assert f"or install torch {other}" in said


def test_built_from_other_sources(package):
    module(package).write_bytes(b"\x7fELF of an older version, which names no torch")
    assert f"{module(package)} was built from the sources of another version of fastrnn" in refusal(package)


def test_a_module_that_does_not_load(package):
    module(package).write_bytes(f"fastrnn built with torch {torch.__version__}, CUDA none;".encode())
    said = refusal(package)
    assert f"{module(package)}, built with torch {torch.__version__} as this is, does not load: " in said


@pytest.mark.parametrize(
    ("version", "cuda", "torch_cuda", "runs"),
    [
        ("2.13.0", "none", None, True),
        ("2.13.0+cpu", "none", "13.0", True),  # kernels for CPUs alone, under torch's CUDA build
        ("2.13.0+cu130", "13.0", "13.0", True),
        ("2.13.0+cu130", "13.0", "13.2", True),
        ("2.13.0+cu130", "13.0", "12.8", False),  # another libcudart
        ("2.13.0+cu130", "13.0", None, False),  # no libtorch_cuda
        ("2.13.1", "none", None, False),
        ("2.12.0", "none", None, False),
        ("2.13.0.dev20260101+cpu", "none", None, False),
    ],
)
def test_which_torch_fits(version, cuda, torch_cuda, runs, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0" if torch_cuda is None else "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert binary.runs_here(version, cuda) == runs


def test_the_module_names_its_torch():
    assert fastrnn.build_info()["torch"] == torch.__version__
    assert binary.built_with(Path(_C.__file__)) == (torch.__version__, torch.version.cuda if has_cuda() else "none")


def has_cuda():
    return fastrnn.build_info()["cuda_archs"] is not None


# ---- in a clone ----


@pytest.mark.skipif(
    not list(Path(sys.prefix).glob(".installed-torch-*")), reason="an environment that `make` did not make"
)
@pytest.mark.parametrize(
    "command", ["{root}/examples/ddp.py --steps 1", "{root}/examples/char_lm.py --help", "-m fastrnn"]
)
def test_commands_of_the_readme_run_from_any_folder(command, tmp_path):
    """In the environment that `make test` leaves, as it stands."""
    done = python(*(word.format(root=ROOT) for word in command.split()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
