"""Sends rollouts from rank to rank: seconds to encode, gather and decode them, by codec and by JSON, beside the roofs.

    python -m benchmarks.exchange --rollouts 256 --tokens 4096 --rounds 9      # two processes over gloo, here

Every rank has half of the rollouts, as after sampling, and wants those of both. JSON is what ranks exchanged before:
lines of text, as a tensor whose bytes were taken out by `bytes(tensor.tolist())`. Codec and JSON take turns. The time
of a round is that of the slower rank. Two roofs: the same bytes copied in memory, which nothing can undercut, and
`struct.unpack` of as many numbers, which is what it costs to make Python's numbers and tuples at all.
"""

import argparse
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from benchmarks.trainer import ROOT, spread
from lens_megatron.records import between_ranks, codec
from lens_megatron.reward.types import GradeStatus
from lens_megatron.rollout import replay
from lens_megatron.types import Group, Origin, Prompt, Rollout

PER_GROUP = 8
PROMPT_TOKENS = 256
VOCABULARY = 151_936


@dataclass(frozen=True)
class Parts:
    """Seconds of one exchange on one rank. The parts are measured one after the other, apart from `whole`."""

    whole: float
    encode: float
    gather: float
    decode: float


def make_groups(rollouts: int, tokens: int, seed: int) -> list[Group]:
    """Groups of PER_GROUP rollouts of `tokens` tokens each, with random tokens and log-probabilities."""
    generator = np.random.default_rng(seed)
    prompt = Prompt(seed, (7,) * PROMPT_TOKENS, (True,) * PROMPT_TOKENS, "12", "5 + 7 = ?" * 20, "benchmark")

    def rollout() -> Rollout:
        ids = tuple(generator.integers(0, VOCABULARY, tokens).tolist())
        log_probs = tuple((-generator.exponential(size=tokens)).tolist())
        return Rollout(ids, log_probs, True, Origin.NATIVE, 3, 1.0, GradeStatus.CORRECT)

    return [Group(prompt, tuple(rollout() for _ in range(PER_GROUP))) for _ in range(rollouts // PER_GROUP)]


def encode_json(groups: list[Group]) -> bytes:
    return "\n".join(map(replay.to_json, groups)).encode()


def decode_json(tensor: Tensor) -> list[Group]:
    return [replay._parse(line) for line in bytes(tensor.tolist()).decode().splitlines()]


def gather(data: bytes, group: ProcessGroup) -> list[Tensor]:
    """Returns the bytes of every rank, which all have one length."""
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    everything = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(everything, own, group=group)
    return everything


def timed(work: Callable[[], object]) -> tuple[float, object]:
    torch.distributed.barrier()
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def exchange_json(groups: list[Group], group: ProcessGroup) -> Parts:
    """The former way: every rank decoded its own rollouts too."""
    encode, data = timed(lambda: encode_json(groups))
    longest = torch.tensor([len(data)])
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
    gathering, tensors = timed(lambda: gather(data.ljust(int(longest)), group))
    decode, _ = timed(lambda: [decode_json(tensor) for tensor in tensors])
    return Parts(encode + gathering + decode, encode, gathering, decode)


def exchange_codec(groups: list[Group], group: ProcessGroup) -> Parts:
    whole, found = timed(lambda: between_ranks.all_gather(Group, groups, group))
    assert [len(part) for part in found] == [len(groups)] * 2
    del found  # freeing it is not part of the next measurement
    encode, data = timed(lambda: codec.encode(Group, groups))
    gathering, _ = timed(lambda: gather(data, group))
    decode, found = timed(lambda: codec.decode(Group, data))
    assert found == groups
    return Parts(whole, encode, gathering, decode)


def copy_seconds(size: int) -> float:
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    return min(timed(lambda: np.copyto(target, source))[0] for _ in range(5))


def unpack_seconds(rollouts: int, tokens: int) -> float:
    """Times as many integers and floats as this rank gets from the other one, in tuples of `tokens`."""
    data = [np.arange(tokens).tobytes(), np.random.default_rng(0).random(tokens).tobytes()]
    seconds, _ = timed(
        lambda: [
            struct.unpack(f"<{tokens}{code}", part)
            for _ in range(rollouts)
            for code, part in zip("qd", data, strict=True)
        ]
    )
    return seconds


def worker(rollouts: int, tokens: int, rounds: int, out: str) -> None:
    """Runs one rank and writes the seconds of every round."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    groups = make_groups(rollouts // 2, tokens, rank)
    size, text = len(codec.encode(Group, groups)), len(encode_json(groups))
    found = {"bytes": {"codec": size, "json": text}, "codec": [], "json": [], "copy": [], "unpack": []}
    for number in range(rounds + 1):
        row = {
            "codec": vars(exchange_codec(groups, world)),
            "json": vars(exchange_json(groups, world)),
            "copy": copy_seconds(size),
            "unpack": unpack_seconds(rollouts // 2, tokens),
        }
        for name, seconds in row.items():
            if number:  # the first round warms up
                found[name].append(seconds)
    Path(f"{out}.{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def measure(rollouts: int, tokens: int, rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [*program, "-m", "benchmarks.exchange", "--worker", "--out", f"{folder}/out"]
            + ["--rollouts", str(rollouts), "--tokens", str(tokens), "--rounds", str(rounds)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            check=True,
            cwd=ROOT,
        )
        return summarise([json.loads(Path(f"{folder}/out.{rank}.json").read_text()) for rank in range(2)])


def summarise(ranks: list[dict]) -> dict:
    """Summarises the slower rank of each round; roofs are divided by the codec's seconds of the same round."""
    rounds = range(len(ranks[0]["copy"]))
    sides = {
        side: {part: [max(r[side][i][part] for r in ranks) for i in rounds] for part in Parts.__dataclass_fields__}
        for side in ("codec", "json")
    }
    copy, unpack = ([max(r[name][i] for r in ranks) for i in rounds] for name in ("copy", "unpack"))
    whole, decode = sides["codec"]["whole"], sides["codec"]["decode"]
    return {
        "bytes_per_rank": ranks[0]["bytes"],
        "seconds": {
            side: {part: spread(seconds, 5) for part, seconds in parts.items()} for side, parts in sides.items()
        },
        "rounds": {side: parts["whole"] for side, parts in sides.items()},
        "json_over_codec": spread((a / b for a, b in zip(sides["json"]["whole"], whole, strict=True)), 1),
        "copy_seconds": spread(copy, 5),
        "copy_gb_per_s": spread((ranks[0]["bytes"]["codec"] / s / 1e9 for s in copy), 1),
        "unpack_seconds": spread(unpack, 5),
        "copy_over_whole": spread((a / b for a, b in zip(copy, whole, strict=True)), 3),
        "unpack_over_decode": spread((a / b for a, b in zip(unpack, decode, strict=True)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=256, help="of both ranks together; a multiple of 16")
    parser.add_argument("--tokens", type=int, default=4096, help="of each rollout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.rollouts, chosen.tokens, chosen.rounds, chosen.out)
        return
    from benchmarks.training.roof import machine

    sizes = f"--rollouts {chosen.rollouts} --tokens {chosen.tokens} --rounds {chosen.rounds}"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    row = {
        "command": f"python -m benchmarks.exchange {sizes}",
        "commit": commit.stdout.strip(),
        "machine": {**machine(), "python": platform.python_version()},
        "cores_allowed": len(os.sched_getaffinity(0)),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        **measure(chosen.rollouts, chosen.tokens, chosen.rounds),
    }
    for side, parts in row["seconds"].items():
        for part, seconds in parts.items():
            print(f"{side:6} {part:7} {seconds['median']:8.4f} s ({seconds['least']:.4f} to {seconds['most']:.4f})")
    folder = Path(chosen.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"exchange_cpu_{time.strftime('%Y%m')}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(path)


if __name__ == "__main__":
    main()
