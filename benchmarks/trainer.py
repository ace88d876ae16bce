"""Measures the trainer beside transformers: tokens/s, model FLOP utilisation, memory, padding, idle stages.

    python -m benchmarks.trainer cpu                      # tiny model, here; a quarter of an hour
    python -m benchmarks.trainer gpu --shape qwen2.5-3b   # one GPU, beside transformers + Liger-Kernel
    python -m benchmarks.trainer gpu --tiny               # the same code at a tiny size, with or without a GPU
    python -m benchmarks.trainer balance                  # 1,000,000 samples for 1024 ranks

It writes one JSON file into --out and prints a table. TRAINER_NOTES.md says how it is measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_session.reading import NO_DEVICE
from benchmarks.training import load
from benchmarks.training.simulation import simulate

ROOT = Path(__file__).resolve().parents[1]
TRANSFORMERS = ("transformers, in order", "transformers, by length")
LIGER = ("transformers + Liger, by length",)
PHASES = {"ref": 1, "update_actor": 3}
"""The FLOPs of each phase, counted in forward passes."""

Case = dict[str, Any]


def case(name: str, kind: str, samples: int, limit: int, budget: int) -> Case:
    return {"name": name, "kind": kind, "samples": samples, "limit": limit, "budget": budget}


CPU_BATCHES = [case("constant 256", "constant", 24, 256, 2048), case("long tail to 256", "tail", 64, 256, 2048)]
CPU_MICRO_BATCHES = [case(f"{n} micro-batches", "constant", 32, 128, 4096 // n) for n in (1, 2, 4, 8, 16)]
CPU_LENGTHS = [case(f"{n} tokens", "constant", 4096 // n, n, 4096) for n in (64, 128, 256, 512, 1024, 2048)]
CPU_PIPELINE = [case("long tail, budget 800", "tail", 64, 256, 800)]
LAYOUTS = {
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
}
GPU_BATCHES = [case("constant 4096", "constant", 32, 4096, 16384), case("long tail to 4096", "tail", 128, 4096, 16384)]
TINY_BATCHES = [case("constant 32", "constant", 4, 32, 64), case("long tail to 32", "tail", 6, 32, 64)]


def launch(spec: dict, ranks: int) -> list[dict]:
    """Runs a worker and returns the results of each of its ranks.

    Raises CalledProcessError if the worker fails; its messages are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [*program, "-m", "benchmarks.training.worker", str(path), f"{folder}/out"],
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": paths},
            check=True,
            cwd=ROOT,
        )
        return [json.loads(Path(f"{folder}/out.{rank}.json").read_text()) for rank in range(ranks)]


def spread(values: Iterable[float], digits: int = 4) -> dict[str, float]:
    values = sorted(values)
    rounded = [round(v, digits) for v in (statistics.median(values), values[0], values[-1])]
    return dict(zip(("median", "least", "most"), rounded, strict=True))


def summarise(measured: Sequence[dict]) -> dict:
    """Summarises one case over all ranks: the seconds of each round are those of the slowest rank.

    Utilisation refers to the best roof of all rounds on the wall clock, and to the round's own in CPU seconds: other
    programs take wall time from a roof's milliseconds in one round and not in another.
    """
    main = measured[0]
    ranks, forward = len(measured), main["forward_flops"]
    roofs = [
        statistics.mean(m["gemm_flops_per_s"][i][0] for m in measured) for i in range(len(main["gemm_flops_per_s"]))
    ]
    cpu_roofs = [statistics.mean(m["gemm_flops_per_s"][i][1] for m in measured) for i in range(len(roofs))]
    sides = {}
    for name, rounds in main["rounds"].items():
        seconds = {
            phase: [max(m["rounds"][name][i]["seconds"].get(phase, 0.0) for m in measured) for i in range(len(rounds))]
            for phase in rounds[0]["seconds"]
        }
        whole = [sum(values) for values in zip(*seconds.values(), strict=True)]
        cpu = [sum(sum(m["rounds"][name][i]["cpu_seconds"].values()) for m in measured) for i in range(len(rounds))]
        sides[name] = {
            "seconds": {phase: spread(values) for phase, values in seconds.items()},
            "seconds_in_all": spread(whole),
            "cpu_seconds_in_all": spread(cpu),
            "tokens_per_s": spread((main["lengths"]["tokens"] / s for s in whole), 1),
            "mfu": {
                phase: spread(passes * forward / s / ranks / max(roofs) for s in seconds[phase])
                for phase, passes in PHASES.items()
            },
            "mfu_per_cpu_second": spread(4 * forward / s / r for s, r in zip(cpu, cpu_roofs, strict=True)),
            "padding_waste": round(statistics.mean(m["padding_waste"][name] for m in measured), 4),
            "imbalance": round(main["imbalance"][name], 4),
        }
        if "peak_extra_bytes" in main:
            sides[name]["peak_extra_mib"] = round(max(m["peak_extra_bytes"][name] for m in measured) / 2**20, 1)
    kept = ("name", "kind", "limit", "budget", "lengths", "forward_flops", "first_loss_and_gradient_norm", "wrong")
    apart = ("hand_over",)
    found = {key: main[key] for key in (*kept, *(key for key in apart if key in main))} | {
        "sides": sides,
        "roof_gflops": spread((r / 1e9 for r in roofs), 1),
    }
    if "peak_bytes" in main:
        found["peak_mib_in_all"] = round(max(m["peak_bytes"] for m in measured) / 2**20, 1)
    found["times_faster_than"] = compare(main["rounds"])
    if "idle_share" in main:
        found["idle_share_of_equal_steps"] = round(main["idle_share_of_equal_steps"], 4)
        found["idle_share_by_rank"] = [
            {phase: spread(row[phase] for row in m["idle_share"]) for phase in PHASES} for m in measured
        ]
    return found


def compare(rounds: dict[str, list[dict]]) -> dict[str, dict]:
    """Compares ours with each peer round by round: their seconds / our seconds, on the wall clock and of CPU."""
    others = [name for name in rounds if name != "ours" and "ours" in rounds]
    return {
        name: {
            clock: spread(
                sum(theirs[clock].values()) / sum(ours[clock].values())
                for theirs, ours in zip(rounds[name], rounds["ours"], strict=True)
            )
            for clock in ("seconds", "cpu_seconds")
        }
        for name in others
    }


def measure(spec: dict, ranks: int = 1) -> list[dict]:
    results = launch(spec, ranks)
    cases = [summarise([r["cases"][i] for r in results]) for i in range(len(spec["cases"]))]
    for found in cases:
        for name, side in found["sides"].items():
            phases = "  ".join(f"{p} {s['median']:.2f} s" for p, s in side["seconds"].items())
            speed, mfu = side["tokens_per_s"]["median"], side["mfu"]["update_actor"]["median"]
            print(f"{found['name']:24} {name:32} {speed:8.0f} tokens/s  update MFU {mfu:.2f}  {phases}", flush=True)
        for name in found["wrong"]:
            print(f"{found['name']:24} {name:32} WRONG: {found['first_loss_and_gradient_norm']}", flush=True)
    return cases


def on_cpu(models: Path, rounds: int) -> dict:
    """Compares with transformers, and measures growth with micro-batches and length, layouts, and `simulate`."""
    base = {"model": str(load.save_models(models, "cpu", torch.float32)), "shape": "cpu", "dtype": "float32"}
    base |= {"megatron": {}, "sides": ["ours"], "rounds": rounds}
    found: dict[str, Any] = {"balance": simulate(1_000_000, 1024)}
    sides = ["ours", *TRANSFORMERS]
    found["beside_transformers"] = measure({**base, "sides": sides, "cases": CPU_BATCHES, "memory": True})
    found["micro_batches"] = measure({**base, "cases": CPU_MICRO_BATCHES})
    found["sequence_length"] = measure({**base, "cases": CPU_LENGTHS})
    found["layouts"] = {
        name: measure({**base, "megatron": layout, "cases": CPU_PIPELINE}, 2) for name, layout in LAYOUTS.items()
    }
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRun:
    """What is measured on one GPU."""

    models: Path
    """The folder of the models, which are made where they are missing."""
    shape: str
    rounds: int
    tiny: bool
    """A tiny shape on whatever device there is: a rehearsal."""
    deadline: float
    """In seconds of time.monotonic(): the peer is not begun if it would not be done by then."""


def on_gpu(run: GpuRun, keep: Callable[[dict], None]) -> dict:
    """Measures ours, then the peer, each in its own process: both at once would not fit. Losses are compared
    afterwards. `keep` gets what is known after each of them.

    Raises SystemExit without a device, unless the run is tiny.
    """
    spec, peer, planned = _gpu_spec(run)
    found: dict[str, Any] = {"planned": planned}
    start = time.monotonic()
    found["ours"] = measure({**spec, "sides": ["ours"]})
    keep(found)
    taken = time.monotonic() - start
    if time.monotonic() + taken > run.deadline:
        return found | {peer: [], "peer_left_out": f"{peer}: ours took {taken:.0f} s, and --budget-s leaves it less"}
    try:
        found[peer] = measure({**spec, "sides": [peer]})
    except subprocess.CalledProcessError as error:
        return found | {peer: [], "peer_left_out": f"{peer}: its process ended with exit status {error.returncode}"}
    for ours, theirs in zip(found["ours"], found[peer], strict=True):
        pairs = zip(*(next(iter(c["first_loss_and_gradient_norm"].values())) for c in (ours, theirs)), strict=True)
        if any(abs(a - b) > spec["tolerance"] * abs(a) for a, b in pairs):
            theirs["wrong"], theirs["sides"] = [peer], {}
    return found


def _gpu_spec(run: GpuRun) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Returns the worker's spec without its sides, the peer, and what the plan expects."""
    from benchmarks.training import memory
    from benchmarks.training.worker import TOLERANCE, configuration, configuration_tree

    has_device = torch.cuda.is_available()
    if not has_device and not run.tiny:
        raise SystemExit(NO_DEVICE)
    shape, batches = ("tiny", TINY_BATCHES) if run.tiny else (run.shape, GPU_BATCHES)
    model = load.models_in(run.models, shape, torch.bfloat16)
    spec = {"model": str(model), "shape": shape, "dtype": "bfloat16", "megatron": {}, "rounds": run.rounds}
    spec |= {"memory": True, "tolerance": TOLERANCE["bfloat16"]}
    budget, layers = batches[0]["budget"], {}
    if not run.tiny:
        total = torch.cuda.get_device_properties(0).total_memory
        budget, layers = memory.fitting_choice(configuration_tree(spec, budget), batches, total, has_device)
    spec["megatron"] = {"transformer": layers}
    cases = [batch | {"budget": budget} for batch in batches]
    bytes_of = {c["name"]: memory.planned_bytes(configuration(spec, budget), c, has_device).as_json() for c in cases}
    planned = {"budget": budget, "layers": layers, "bytes": bytes_of}
    cases[-1] |= {"hand_over": True}
    return spec | {"cases": cases}, LIGER[0] if has_device else TRANSFORMERS[1], planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=("cpu", "gpu", "balance"))
    parser.add_argument("--shape", choices=sorted(set(load.SHAPES) - {"cpu", "tiny"}), default="qwen2.5-1.5b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="gpu: a tiny shape on any device, as a rehearsal")
    parser.add_argument("--models", type=Path, help="gpu: keep the models in this folder, and take them from there")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="gpu: leave the peer out after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    chosen = parser.parse_args()
    start = time.monotonic()
    about = _about(chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"trainer_{chosen.where}_{time.strftime('%Y%m%d_%H%M%S')}.json"

    def keep(found: dict) -> None:
        path.write_text(json.dumps(about | found, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        if chosen.where == "balance":
            found = {"balance": simulate(1_000_000, 1024)}
        elif chosen.where == "cpu":
            found = on_cpu(Path(folder), chosen.rounds)
        else:
            run = GpuRun(
                models=chosen.models or Path(folder),
                shape=chosen.shape,
                rounds=chosen.rounds,
                tiny=chosen.tiny,
                deadline=start + chosen.budget_s,
            )
            found = on_gpu(run, keep)
    keep(found)
    print(path)


def _about(chosen: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.training.roof import machine

    shape = "" if chosen.where != "gpu" else " --tiny" if chosen.tiny else f" --shape {chosen.shape}"
    return {
        "command": f"python -m benchmarks.trainer {chosen.where}{shape} --rounds {chosen.rounds}",
        "machine": machine(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "load_average": [round(x, 1) for x in os.getloadavg()],
    }


if __name__ == "__main__":
    main()
