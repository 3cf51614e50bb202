"""The build backend of pyproject.toml: setuptools' own, with torch added to what a build needs.

A build runs under the torch it was made with alone, and the wheel says so. pip builds in an environment of its own: it
would put the newest torch there, and then replace the one of the environment that it installs into. So the version that
the latter has is asked for; where it has none, any that the sources can be built for.
"""

import sysconfig
from importlib.metadata import distributions

from setuptools.build_meta import *  # noqa: F403

TORCH = "torch>=2.11,<2.16"


def public_version(version: str) -> str:
    """2.13.0 of "2.13.0+cpu": the builds of one version differ in their devices, not for us."""
    return version.partition("+")[0]


def local_label(version: str, cuda: str | None = None) -> str:
    """+torch2.13.0 of "2.13.0+cpu", and .cu13 where there are kernels: what a build runs under (fastrnn/binary.py)."""
    return f"+torch{public_version(version)}" + (f".cu{cuda.split('.')[0]}" if cuda else "")


def torch_to_build_with() -> str:
    folders = [sysconfig.get_path(name) for name in ("purelib", "platlib")]  # also inside pip's build environment
    found = next(iter(distributions(name="torch", path=folders)), None)
    return f"torch=={public_version(found.version)}" if found else TORCH


def get_requires_for_build_wheel(config_settings=None):
    return [torch_to_build_with()]


def get_requires_for_build_editable(config_settings=None):
    return [torch_to_build_with()]


def get_requires_for_build_sdist(config_settings=None):
    return []
