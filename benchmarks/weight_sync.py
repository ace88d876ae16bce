"""Measures weights on their way to every rank's engine: seconds and GB/s, beside mbridge's export and beside the roof.

    python -m benchmarks.weight_sync --rounds 7      # tiny clusters of processes, here; a few minutes

Every side ends with a copy of each tensor into storage of the receiver, as an engine makes it. The roof is the same
bytes in one flat tensor: for one rank a copy, for several a gloo broadcast and then that copy. The result is one
JSON file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.trainer import ROOT, spread

LAYOUTS = {
    "TP1 PP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "TP2 PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
BUCKETS = (16, 256)
"""Sizes of buckets in MiB."""


def save_model(folder: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(folder)
    return folder


def worker(model: str, options: dict, rounds: int, out: str) -> None:
    """Runs one rank and returns the seconds of each round of each side."""
    from lens_megatron.config import from_tree
    from lens_megatron.policy import platform
    from lens_megatron.policy.export import bytes_received, export_weights
    from lens_megatron.policy.hf_weights import GroupedNames
    from lens_megatron.policy.model import build_policy
    from lens_megatron.policy.parallel import build_mesh, shut_down

    device = platform.install()
    platform.init_process_group(device)
    tree = {
        "run": {"directory": "unused"},
        "model": {"path": model},
        "data": {"train": "unused"},
        "algorithm": {"kl_coef": 0.0},
        "lens": {"enabled": False},
        "megatron": options,
    }
    config = from_tree(tree)
    mesh = build_mesh(config.megatron, 0, device)
    policy = build_policy(config, mesh)
    engine = {name: torch.empty_like(tensor) for name, tensor in export_weights(policy)}
    size = sum(tensor.nbytes for tensor in engine.values())
    flat, there = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    narrow = {name: tensor.bfloat16() for name, tensor in engine.items()}

    def mbridge() -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            yield from policy.bridge.export_weights([GroupedNames(network) for network in policy.models()])

    def roof() -> None:
        if mesh.world_size > 1:
            torch.distributed.broadcast(flat, 0)
        there.copy_(flat)

    sides: dict[str, Callable[[], None]] = {
        f"ours, {n} MiB": lambda n=n: load(export_weights(policy, bucket_bytes=n << 20), engine) for n in BUCKETS
    }
    sides["ours, to bfloat16"] = lambda: load(export_weights(policy, torch.bfloat16), narrow)
    sides |= {"mbridge": lambda: load(mbridge(), engine), "roof": roof}
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            torch.distributed.barrier()
            start = time.perf_counter()
            side()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    found = {"bytes": size, "received": bytes_received(policy), "seconds": seconds}
    Path(f"{out}.{mesh.rank}.json").write_text(json.dumps(found))
    shut_down()


@torch.no_grad()
def load(stream: Iterator[tuple[str, Tensor]], engine: dict[str, Tensor]) -> None:
    for name, tensor in stream:
        engine[name].copy_(tensor)


def measure(model: Path, ranks: int, options: dict, rounds: int) -> dict:
    """Returns the seconds of the slowest rank in each round."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [*program, "-m", "benchmarks.weight_sync", "--worker", model, json.dumps(options)]
            + ["--rounds", str(rounds), "--out", f"{folder}/out"],
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": paths},
            check=True,
            cwd=ROOT,
        )
        found = [json.loads(Path(f"{folder}/out.{rank}.json").read_text()) for rank in range(ranks)]
    seconds = {name: [max(f["seconds"][name][i] for f in found) for i in range(rounds)] for name in found[0]["seconds"]}
    roof = seconds["roof"]
    return {
        "ranks": ranks,
        "bytes": found[0]["bytes"],
        "received_bytes_by_rank": [f["received"] for f in found],
        "sides": {
            name: {
                "seconds": spread(taken),
                "gb_per_s": spread((found[0]["bytes"] / s / 1e9 for s in taken), 3),
                "seconds_over_roof": spread((s / r for s, r in zip(taken, roof, strict=True)), 2),
            }
            for name, taken in seconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "OPTIONS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.worker[0], json.loads(chosen.worker[1]), chosen.rounds, str(chosen.out))
        return
    from benchmarks.training.roof import machine

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {
        "command": f"python -m benchmarks.weight_sync --rounds {chosen.rounds}",
        "commit": commit.stdout.strip(),
        "machine": machine(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "shape": SHAPE,
        "layouts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder))
        for name, (ranks, options) in LAYOUTS.items():
            found["layouts"][name] = measure(model, ranks, options, chosen.rounds)
            for side, row in found["layouts"][name]["sides"].items():
                seconds, speed = row["seconds"]["median"], row["gb_per_s"]["median"]
                print(f"{name:8} {side:18} {seconds:7.3f} s {speed:6.2f} GB/s", flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"weight_sync_cpu_{time.strftime('%Y%m%d_%H%M%S')}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
