"""Writes the results file: a description of the run, then one entry per case.

It is rewritten after each case, so that a run that is stopped keeps what it measured.
"""

from __future__ import annotations

import datetime
import enum
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

SCHEMA = 2
FOLDER = Path(__file__).resolve().parents[1] / "results"
DISTRIBUTIONS = (
    "torch",
    "triton",
    "lens-kernels",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-linear-attention",
    "verl",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "transformer-engine",
    "megatron-core",
)
SETTINGS = ("LENS_KERNELS_BACKEND", "OMP_NUM_THREADS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


class Status(enum.StrEnum):
    """What became of a peer in a case. Only a measured peer has seconds; every other row says why it has none."""

    MEASURED = "measured"
    WRONG = "wrong"
    """Its answer differs from ours, so that its time would say nothing."""
    FAILED = "failed"
    """It raised an error, or memory ran out."""
    ABSENT = "absent"
    """It could run on this device, and it is not installed or cannot be imported."""
    INAPPLICABLE = "inapplicable"
    """It does not do this work, or not on such a device or at such a shape."""
    SKIPPED = "skipped"
    """The session's time ended before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How ours compares with the peers of one case."""

    quickest: str | None
    """The measured peer whose median is the least; None if no peer was measured."""
    ratio: float | None
    """Its seconds divided by ours: the median of the ratios of the rounds. It is above 1 where ours is faster."""
    not_timed: tuple[str, ...]
    """The peers that could run on this device and have no time, each with status and reason. While there are any,
    nothing is known of the best peer, so that no report may use the word."""


def compare(rows: list[dict], ours: str) -> Comparison:
    """Compares the row called `ours` with the others; `rows` are those of one case. It is the peers' only judge."""
    by_name = {row["peer"]: row for row in rows}
    peers = [row for row in rows if row["peer"] != ours]
    timed = [row for row in peers if row["status"] == Status.MEASURED]
    harmless = (Status.MEASURED, Status.INAPPLICABLE)
    not_timed = tuple(f"{x['peer']} ({x['status']}: {x['reason']})" for x in peers if x["status"] not in harmless)
    if not timed or by_name[ours]["status"] != Status.MEASURED:
        return Comparison(quickest=None, ratio=None, not_timed=not_timed)
    quickest = min(timed, key=lambda row: row["seconds"]["median"])
    rounds = zip(quickest["seconds"]["rounds"], by_name[ours]["seconds"]["rounds"], strict=True)
    ratio = statistics.median(theirs / mine for theirs, mine in rounds)
    return Comparison(quickest=quickest["peer"], ratio=ratio, not_timed=not_timed)


def environment(device: torch.device, module: str = "pytest") -> dict:
    """Describes what a reader needs to run it again. It holds no path of this machine."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "device": describe(device),
        "versions": found,
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def describe(device: torch.device) -> dict:
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": card.name,
            "memory_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {
        "type": "cpu",
        "name": processor(),
        "threads": torch.get_num_threads(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def processor() -> str:
    """Returns the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # this is a copy of the files without their history
    return done.stdout.strip()


def results_path(folder: Path, device: torch.device, name: str = "operators") -> Path:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d_%H%M%S")
    return folder / f"{name}_{device.type}_{stamp}.json"


def write(path: Path, surroundings: dict, cases: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"schema": SCHEMA, "environment": surroundings, "cases": cases}, indent=1) + "\n")
    part.replace(path)
