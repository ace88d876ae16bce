"""Starts the comparison of gradients: the settings of its process, the fork that it loads, its report."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lens_megatron.config import Config
from lens_megatron.files import write_atomically
from lens_megatron.output import run_folder
from lens_megatron.tools.compare import forks, gradient_table, processes
from lens_megatron.tools.compare.arms import configure
from lens_megatron.tools.compare.forks import ForkPoint
from lens_megatron.tools.compare.gradient_report import GradientReport
from lens_megatron.tools.compare.methods import ComparedMethod, find_methods
from lens_megatron.tools.compare.request import CompareError, GradientSettings

FOLDER = "gradients"
SAMPLER = "lens"
"""The method by which the batch is sampled."""
ALONE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
}
"""The layout of one process."""


@dataclass(frozen=True, slots=True)
class GradientPlan:
    """The configurations of a comparison of gradients."""

    sampling: Config
    methods: tuple[tuple[str, Config], ...]


def plan_gradients(
    fork: ForkPoint, methods: Sequence[ComparedMethod], out: Path, overrides: Sequence[str]
) -> GradientPlan:
    """Returns the configurations of the methods, and of LENS with tau = 1, which samples. Raises CompareError."""
    ours: dict[str, dict[str, Any]] = {
        "run": {"directory": str(out / FOLDER / "run"), "seed": fork.seed, "trackers": []},
        "data": {"eval": []},
        "rollout": {"off_policy_steps": 0},
        "train": {
            **{"steps": fork.step + 1, "epochs": None, "updates_per_batch": 1},
            **{"save_best_limit": 0, "metric_for_best_model": None},
        },
        "megatron": ALONE,
        "vllm": {"tensor_parallel_size": 1},
    }
    (sampler,) = find_methods(SAMPLER)
    every_failure = {**ours, "lens": {"tau": 1.0}}
    return GradientPlan(
        sampling=configure(fork, sampler, overrides, every_failure, 1),
        methods=tuple((method.name, configure(fork, method, overrides, ours, 1)) for method in methods),
    )


def compare_gradients(fork: ForkPoint, plan: GradientPlan, out: Path) -> str:
    """Computes the gradients in a process of their own; returns the report as Markdown, which it also writes.

    Raises CompareError where the process fails; what it printed last is in the message.
    """
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    settings = write_settings(fork, plan, folder)
    if not Path(plan.sampling.run.directory).exists():
        forks.begin(fork, plan.sampling)
    log = folder / "gradients.log"
    if processes.run(1, ["lens_megatron.tools.compare.gradients", str(settings)], log):
        raise CompareError(f"the gradients could not be compared. {processes.last_words(log)}")
    text = gradient_table.render(read_report(folder))
    write_atomically(folder / "gradients.md", text)
    return text


def write_settings(fork: ForkPoint, plan: GradientPlan, folder: Path) -> Path:
    """Writes what the process reads into the new `folder`; returns the file that it is given."""
    settings = GradientSettings(
        fork=str(fork),
        step=fork.step + 1,
        sampling=str(folder / "sampling.yaml"),
        methods=tuple((name, str(folder / f"method_{name}.yaml")) for name, _ in plan.methods),
        batch=str(folder / "batch"),
        out=str(folder / "gradients.json"),
    )
    configs = [(path, config) for (_, path), (_, config) in zip(settings.methods, plan.methods, strict=True)]
    for path, config in ((settings.sampling, plan.sampling), *configs):
        write_atomically(Path(path), run_folder.as_yaml(config))
    write_atomically(folder / "settings.json", json.dumps(asdict(settings), indent=1) + "\n")
    return folder / "settings.json"


def read_report(folder: Path) -> GradientReport:
    return TypeAdapter(GradientReport).validate_json((folder / "gradients.json").read_bytes())
