"""Facts about where a run was made, enough to judge whether two runs may be compared. No names, no paths."""

from __future__ import annotations

import importlib
import os
import platform
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cpuinfo  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped]

# Flags that decide which kernels are taken, here or in a peer.
FLAGS = re.compile(r"^(avx\w*|fma|f16c|amx\w*|sse4_[12]|neon|asimd\w*|sve\w*|bf16|i8mm)$")
PREFIXES = "OMP|GOMP|KMP|MKL|OPENBLAS|ONEDNN|DNNL|ATEN|TORCH|FASTRNN|MALLOC|XLA|JAX|TF|KERAS|ORT|OV"
VARIABLES = re.compile(rf"^({PREFIXES})_\w+$|^GLIBC_TUNABLES$")
PINNING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}
OTHER_PINNING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def missing_pinning(environment: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """What to set before torch is loaded: pinning where the user chose none, and the threads asked for."""
    if any(name in environment for name in OTHER_PINNING):
        wanted: dict[str, str] = {}
    else:
        wanted = {name: value for name, value in PINNING.items() if name not in environment}
    if threads is not None and environment.get("OMP_NUM_THREADS") != str(threads):
        wanted["OMP_NUM_THREADS"] = str(threads)
    return wanted


def environment_facts(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that change threads, kernels or the allocator; of paths only the last part."""
    facts = {name: value for name, value in sorted(environment.items()) if VARIABLES.match(name)}
    if preload := environment.get("LD_PRELOAD"):
        facts["LD_PRELOAD"] = " ".join(Path(part).name for part in re.split(r"[ :]+", preload))
    return {name: re.sub(r"\S*/", "", value) for name, value in facts.items()}


def caches() -> list[dict[str, Any]]:
    """Of core 0: level, type, size as the kernel prints it, logical cores that share it. Linux only."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size, shared = (
                (folder / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        ranges = [part.partition("-") for part in shared.split(",")]
        sharers = sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
        found.append({"level": int(level), "type": kind, "size": size, "shared_by": sharers})
    return found


def cpu_facts() -> dict[str, Any]:
    info = cpuinfo.get_cpu_info()
    load = psutil.getloadavg()[0]
    return {
        "model": info.get("brand_raw", platform.processor()),
        "vendor": info.get("vendor_id_raw"),
        "family_model_stepping": [info.get("family"), info.get("model"), info.get("stepping")],
        "architecture": info.get("arch_string_raw", platform.machine()),
        "flags": sorted({flag.replace("avx512_", "avx512") for flag in info.get("flags", []) if FLAGS.match(flag)}),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "caches": caches(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_1min": round(load, 2),
    }


class OtherWork:
    """What else the machine did since this was made: other processes, and time stolen by the host."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Wall clock, busy time of all cores, our own; in seconds."""
        times = psutil.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # guest time is part of user time already
        busy = sum(value for name, value in times.items() if name not in idle)
        return time.perf_counter(), busy, time.process_time()

    def share(self) -> float:
        """Part of all cores' time, 0 to 1. The system counts in ticks of 10 ms: 0 where too short to tell."""
        wall, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        if wall < 0.2:
            return 0.0
        return min(max((busy - own) / (wall * (psutil.cpu_count() or 1)), 0.0), 1.0)


def build_info(namespace: Any) -> Any:
    """What fastrnn says about its own build, as JSON can hold it; None where it says nothing."""
    describe = getattr(namespace, "build_info", None)
    if not callable(describe):
        return None
    try:
        described = describe()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {str(k): v for k, v in described.items()} if isinstance(described, Mapping) else str(described)


def software_facts() -> dict[str, Any]:
    import torch

    libraries = re.compile(r"Math Kernel Library|MKL-DNN|oneDNN|OpenMP|CPU capability")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "torch": torch.__version__,
        "torch_libraries": [
            line.strip(" -") for line in torch.__config__.show().splitlines() if libraries.search(line)
        ],
        "onednn_enabled": torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available(),
        "fastrnn": None,
        "fastrnn_build": None,
    }
    try:
        fastrnn = importlib.import_module("fastrnn")
    except Exception as error:
        return facts | {"fastrnn_missing": type(error).__name__}
    return facts | {"fastrnn": getattr(fastrnn, "__version__", None), "fastrnn_build": build_info(fastrnn)}


def machine_facts(threads: int) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_facts(),
        "threads": threads,
        "environment": environment_facts(),
        "software": software_facts(),
    }
