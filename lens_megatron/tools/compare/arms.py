"""An arm of a comparison: one method with one seed, from the fork on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_megatron import config as configuration
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.config import Config
from lens_megatron.config.files import apply_override, merge
from lens_megatron.config.section import LARGEST_INTEGER
from lens_megatron.errors import UserError
from lens_megatron.output.conclusion import ACCURACY
from lens_megatron.output.metrics import read_metrics
from lens_megatron.policy import checkpoint_files
from lens_megatron.tools.compare.forks import ForkPoint
from lens_megatron.tools.compare.methods import ComparedMethod, with_method
from lens_megatron.tools.compare.request import Budget, BudgetUnit, CompareError

OURS = ("run.directory", "run.seed", "run.if_exists", "train.steps", "train.epochs", "debug.save_rollouts",
        "debug.load_rollouts", "debug.rollout_only")  # fmt: skip
"""Options that a comparison sets itself."""
TOKENS = "perf/generated_tokens"


@dataclass(frozen=True, slots=True)
class Arm:
    """A method with a seed, and the configuration of its run."""

    method: str
    seed_index: int
    """0 for the run's own seed."""
    config: Config

    @property
    def name(self) -> str:
        return f"{self.method}/seed_{self.seed_index}"

    @property
    def folder(self) -> Path:
        return Path(self.config.run.directory)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an arm has come."""

    last_step: int | None
    """The step that ends it; None while sampled tokens decide and have not reached the budget."""
    saved_step: int
    """The step of its newest checkpoint; that of the fork where it has none of its own."""
    evaluated: bool
    """Whether the accuracy after its last step is known, or nothing is evaluated."""

    @property
    def is_done(self) -> bool:
        return self.saved_step == self.last_step and self.evaluated


def make_arm(
    fork: ForkPoint,
    method: ComparedMethod,
    seed_index: int,
    budget: Budget,
    out: Path,
    overrides: Sequence[str],
    ranks: int,
) -> Arm:
    """Returns the arm of a method and a seed; its folder is out/METHOD/seed_I.

    All arms of a seed index have the same `run.seed`, that of the run plus the index. Overrides win over the method.

    Raises:
        CompareError: the options do not go together, or one of OURS is overridden.
    """
    asked = {override.partition("=")[0].strip() for override in overrides}
    limits = {"save_total_limit": 1 if budget.unit is BudgetUnit.STEPS else 2, "save_best_limit": 0}
    limits = {option: value for option, value in limits.items() if f"train.{option}" not in asked}
    directory, seed = out / method.name / f"seed_{seed_index}", fork.seed + seed_index
    ours: dict[str, dict[str, Any]] = {
        "run": {"directory": str(directory), "seed": seed},
        "train": {**limits, "steps": _most_steps(fork, budget), "epochs": None},
    }
    config = configure(fork, method, overrides, ours, ranks)
    if budget.unit is BudgetUnit.TOKENS and config.optimizer.lr_decay_style != "constant":
        raise CompareError(
            f"--budget {budget}: optimizer.lr_decay_style={config.optimizer.lr_decay_style} needs to know the number "
            "of steps; give --budget steps=K, or optimizer.lr_decay_style=constant"
        )
    return Arm(method.name, seed_index, config)


def configure(
    fork: ForkPoint,
    method: ComparedMethod,
    overrides: Sequence[str],
    ours: Mapping[str, Mapping[str, Any]],
    ranks: int,
) -> Config:
    """Returns the options of the run with the method's laid over them, then the overrides, then `ours`.

    Raises CompareError, which names the method, where options do not go together or one of OURS is overridden.
    """
    try:
        tree = with_method(fork.options, method)
        for override in overrides:
            option = override.partition("=")[0].strip()
            if option in OURS or "." not in option:
                raise CompareError(
                    f"override {override!r}: give section.option=value with another option than those that "
                    f"lens-compare sets itself: {', '.join(OURS)}"
                )
            apply_override(tree, override)
        tree["debug"] = {}  # the run's own rollouts must neither be read nor overwritten
        config = configuration.from_tree(merge(tree, merge(ours, {"run": {"if_exists": "resume"}})))
        configuration.check_world(config, ranks)
        load_methods(config)
    except UserError as error:
        raise CompareError(f"{method.name}: {error}") from error
    return config


def _most_steps(fork: ForkPoint, budget: Budget) -> int:
    """Returns the step after which an arm ends in any case: each step samples at least one token."""
    return min(fork.step + budget.amount, LARGEST_INTEGER)


def progress(arm: Arm, fork: ForkPoint, budget: Budget) -> Progress:
    """Reads how far the arm has come from its folder. Raises OSError, CheckpointError."""
    rows = read_metrics(arm.folder)
    last = fork.step + budget.amount if budget.unit is BudgetUnit.STEPS else step_that_reaches(rows, fork.step, budget)
    saved = checkpoint_files.steps_saved(arm.folder / "checkpoints") or fork.step
    accuracies = any(row["step"] == last and any(name.startswith(ACCURACY) for name in row) for row in rows)
    return Progress(last, saved, accuracies or not arm.config.data.eval)


def step_that_reaches(rows: Sequence[dict], fork_step: int, budget: Budget) -> int | None:
    """Returns the first step by which the tokens sampled since the fork make up the budget; None before it.

    Args:
        rows: those of metrics.jsonl, in the order of their steps.
    """
    tokens = 0.0
    for row in rows:
        tokens += row.get(TOKENS, 0.0) if row["step"] > fork_step else 0.0
        if tokens >= budget.amount:
            return row["step"]
    return None
