"""Describes the machine, and imports every module of the trainer there.

python -m benchmarks.gpu_session.machine              # prints a JSON object
python -m benchmarks.gpu_session.machine FOLDER       # the case `machine`: also imports; writes FOLDER/result.json
"""

import importlib
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

TOOLS = ("nvidia-smi", "compute-sanitizer", "ncu", "nsys", "nvcc", "cuobjdump", "git")
DISTRIBUTIONS = (
    "torch", "triton", "transformers", "megatron-core", "mbridge", "math-verify", "numpy", "pydantic", "pytest",
    "pytest-benchmark", "liger-kernel", "cut-cross-entropy", "fla-core", "verl", "quack-kernels", "transformer-engine",
    "vllm",
)  # fmt: skip
ABSENT_ON_PURPOSE = {"vllm", "altair", "vl_convert", "scipy"}
"""Top-level modules that the pack leaves out: what needs them is not imported."""


def describe() -> dict[str, Any]:
    """Returns what a reader of the results needs to know of the machine; `gpu` is None where there is none."""
    import torch

    found: dict[str, Any] = {"gpu": None, "python": platform.python_version(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_bytes": card.total_memory,
            "l2_bytes": card.L2_cache_size,
            "multiprocessors": card.multi_processor_count,
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found | {
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
        "tools": {name: shutil.which(name) is not None for name in TOOLS},
        "cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage("/tmp").free,
        "free_shared_memory_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
    }


def name_of(machine: dict[str, Any]) -> str:
    """Returns what tells two machines' results apart, in a line."""
    versions = machine["versions"]
    return f"{machine['gpu'] or 'no GPU'}, torch {versions['torch']}, Triton {versions['triton']}"


def import_everything() -> tuple[int, dict[str, str], list[str]]:
    """Imports every module of both packages: (how many, {module: error}, modules that need what is left out)."""
    from lens_megatron.policy import platform as training_platform

    training_platform.install()  # Megatron-Core must be imported after it
    imported, failed, left_out = 0, {}, []
    for package in ("lens_kernels", "lens_megatron"):
        root = importlib.import_module(package)
        for module in pkgutil.walk_packages(root.__path__, f"{package}."):
            try:
                importlib.import_module(module.name)
                imported += 1
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] in ABSENT_ON_PURPOSE:
                    left_out.append(module.name)
                else:
                    failed[module.name] = f"{type(error).__name__}: {error}"
            except Exception as error:  # each module's error is wanted, whatever it is
                failed[module.name] = f"{type(error).__name__}: {error}"
    return imported, failed, left_out


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 if a module cannot be imported."""
    machine = describe()
    if not arguments:
        print(json.dumps(machine))
        return 0
    imported, failed, left_out = import_everything()
    headline = f"{name_of(machine)}; {imported} modules imported, {len(failed)} not"
    result = {"headline": headline, "machine": machine, "not_imported": failed, "needs_what_is_left_out": left_out}
    Path(arguments[0], "result.json").write_text(json.dumps(result))
    for module, error in failed.items():
        print(f"{module}: {error}")
    if failed:
        print(f"cannot be imported: {', '.join(failed)}")
    return int(bool(failed))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
