"""Runs one rank of a measurement.

`torchrun -m benchmarks.training.worker SPEC.json OUT_PREFIX` writes OUT_PREFIX.RANK.json.

A spec: {"model", "shape", "dtype", "megatron", "sides", "rounds", "cases": [{"name", "kind", "samples", "limit",
"budget", "hand_over"}]}. Sides are "ours" and the peers; all of them take turns on the same samples, round by round, in
one process.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import load, roof
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.config import Config, from_tree
from lens_megatron.policy import platform
from lens_megatron.types import Group, Prompt, Sample, TrainingGroup

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""The largest relative difference of loss and gradient norm from ours with which a peer's seconds are reported."""


def configuration(spec: dict, budget: int) -> Config:
    return from_tree(configuration_tree(spec, budget))


def configuration_tree(spec: dict, budget: int) -> dict[str, Any]:
    """Returns the sections of a configuration with `budget` tokens per micro-batch."""
    return {
        "run": {"directory": "unused"},
        "data": {"train": "unused"},
        "model": {"path": spec["model"], "reference_path": f"{spec['model']}_reference", "dtype": spec["dtype"]},
        "algorithm": {"advantage": "grpo", "kl_coef": 0.05, "dual_clip": None},
        "lens": {"enabled": False},
        "optimizer": {"lr": 1e-6},
        "train": {"max_tokens_per_micro_batch": budget},
        "megatron": spec["megatron"],
    }


def one_group(samples: list[Sample]) -> TrainingGroup:
    """Takes all samples as rollouts of one prompt: with one optimizer step the ends of groups do not matter."""
    tokens, rollouts = samples[0].prompt, tuple(sample.rollout for sample in samples)
    prompt = Prompt(0, tokens, (False,) * len(tokens), answer="", problem="", source="synthetic")
    return TrainingGroup(Group(prompt, rollouts), rollouts, gate=False)


class Ours:
    """Runs `train_on` of the real trainer, without engine, data or graders."""

    def __init__(self, spec: dict, device: torch.device):
        from benchmarks.training.probe import PhaseClock
        from lens_megatron.policy.model import build_policy
        from lens_megatron.policy.parallel import build_mesh
        from lens_megatron.run import Run

        config = configuration(spec, spec["cases"][0]["budget"])
        mesh = build_mesh(config.megatron, 0, device)
        policy = build_policy(config, mesh)
        self.clock = PhaseClock()
        held = dict.fromkeys(field.name for field in fields(Run))  # all that an update does not need is None
        held |= {"config": config, "methods": load_methods(config), "mesh": mesh, "policy": policy, "clock": self.clock}
        self.run = Run(**held)

    def step(self, samples: list[Sample]) -> tuple[float, float]:
        from lens_megatron.phases.update import train_on

        mesh = self.run.mesh
        self.clock.cpu_seconds.clear()
        mine = load.split(samples, mesh.dp_rank, mesh.dp_size)
        updates, packings = train_on(self.run, [one_group(mine)], mine, step=0, total=mesh.dp_size)
        self.seconds, self.cpu_seconds = self.clock.take(), dict(self.clock.cpu_seconds)
        self.packing = packings[0]
        return updates[0].loss, updates[0].grad_norm

    def use(self, config: Config) -> None:
        self.run = replace(self.run, config=config, methods=load_methods(config))

    @property
    def padding_waste(self) -> float:
        """The share of padding in the rows of this data-parallel rank."""
        return self.packing.padding / self.packing.rows

    @property
    def imbalance(self) -> float:
        return self.packing.imbalance


class Theirs:
    """Runs a peer's steps outside the mode that makes CUDA calls mean CPU, which would cost it time without need.

    It is built with all modes on: transformers loads weights by a mode of its own, and without it some stay
    uninitialised.
    """

    imbalance = 1.0

    def __init__(self, spec: dict, device: torch.device, side: str):
        from benchmarks.training.peer import Peer

        config = configuration(spec, spec["cases"][0]["budget"])
        cut = "in order" if side.endswith("in order") else "by length"
        self.peer = Peer(config, DTYPES[spec["dtype"]], device, cut, liger="Liger" in side)

    def step(self, samples: list[Sample]) -> tuple[float, float]:
        with self._plain():
            start = time.process_time()
            result = self.peer.step(samples)
            cpu = time.process_time() - start
        self.seconds, self.cpu_seconds = self.peer.seconds, {"ref + update_actor": cpu}
        self.padding_waste = self.peer.padding_waste
        return result

    def use(self, config: Config) -> None:
        self.peer.config = config

    @staticmethod
    def _plain() -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()


def measure(spec: dict, sides: dict[str, Any], case: dict, device: torch.device) -> dict:
    """Compares losses, warms up, then times `spec["rounds"]` rounds in which every side has its turn."""
    sizes = load.lengths(case["kind"], case["samples"], case["limit"])
    made = load.samples(sizes, load.SHAPES[spec["shape"]]["vocab_size"])
    for side in sides.values():
        side.use(configuration(spec, case["budget"]))
    first = {name: side.step(made) for name, side in sides.items()}
    expected = next(iter(first.values()))
    wrong = {
        name: values
        for name, values in first.items()
        if any(abs(x - y) > TOLERANCE[spec["dtype"]] * abs(y) for x, y in zip(values, expected, strict=True))
    }
    forward = roof.forward_flops(spec["shape"], sizes)
    result = {
        **case,
        "lengths": load.describe(sizes),
        "forward_flops": forward,
        "first_loss_and_gradient_norm": first,
        "wrong": sorted(wrong),
        "rounds": {name: [] for name in sides if name not in wrong},
        "gemm_flops_per_s": [],
    }
    for _ in range(spec["rounds"]):
        result["gemm_flops_per_s"].append(roof.gemm_rate(device))
        for name in result["rounds"]:
            torch.distributed.barrier()
            sides[name].step(made)
            result["rounds"][name].append({"seconds": sides[name].seconds, "cpu_seconds": sides[name].cpu_seconds})
    result["padding_waste"] = {name: sides[name].padding_waste for name in result["rounds"]}
    result["imbalance"] = {name: sides[name].imbalance for name in result["rounds"]}
    return result | measure_apart(spec, case, sides, made, list(result["rounds"]), device)


def measure_apart(
    spec: dict, case: dict, sides: dict[str, Any], made: list[Sample], names: list[str], device: torch.device
) -> dict:
    """Measures what would slow the timed rounds: memory, the way to host memory and back, idle time of stages."""
    from benchmarks.operators.timing import Runner, peak_extra_bytes
    from benchmarks.training.probe import StageProbe

    found: dict[str, Any] = {}
    if spec.get("memory"):
        steps: dict[str, Callable] = {name: lambda side=sides[name]: side.step(made) for name in names}
        found["peak_extra_bytes"] = {name: peak_extra_bytes(Runner(run=step), device) for name, step in steps.items()}
        if device.type == "cuda" and len(sides) == 1:
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
    if "ours" in names and case.get("hand_over"):
        from benchmarks.training.hand_over import hand_over

        found["hand_over"] = hand_over(sides["ours"].run.policy, spec["rounds"])
    if "ours" in names and sides["ours"].run.mesh.pp_size > 1:
        found["idle_share"] = []
        for _ in range(spec["rounds"]):
            probe = StageProbe()
            with probe.attached():
                sides["ours"].step(made)
            found["idle_share"].append(probe.idle_share())
            stages, steps = sides["ours"].run.mesh.pp_size, probe.steps["update_actor"]
            found["idle_share_of_equal_steps"] = (stages - 1) / (steps + stages - 1)
    return found


def main(spec: dict, out: str) -> None:
    device = platform.install()
    platform.init_process_group(device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    sides = {name: Ours(spec, device) if name == "ours" else Theirs(spec, device, name) for name in spec["sides"]}
    results = {"machine": roof.machine(), "cases": []}
    for case in spec["cases"]:
        results["cases"].append(measure(spec, sides, case, device))
        Path(f"{out}.{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
