"""Records of what the user asks `lens-compare` for."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lens_megatron.config.section import LARGEST_INTEGER
from lens_megatron.errors import UserError


class CompareError(UserError):
    """The comparison cannot be made as asked; the message names the thing, what was found and the remedy."""


class BudgetUnit(StrEnum):
    """What a budget counts from the fork on."""

    STEPS = "steps"
    """Steps of training."""
    TOKENS = "tokens"
    """Tokens that were sampled for training, `perf/generated_tokens`; those of evaluations are not among them."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What every arm may spend. Example: Budget(BudgetUnit.STEPS, 40)."""

    unit: BudgetUnit
    amount: int

    def __str__(self) -> str:
        return f"{self.unit}={self.amount}"


@dataclass(frozen=True, slots=True)
class ComparisonRequest:
    """A comparison as it was asked for on the command line."""

    fork: str
    """RUN@STEP."""
    methods: str
    """Names with commas between them."""
    out: Path
    seeds: int
    budget: Budget | None
    """None where no arm is to be trained."""
    baseline: str | None
    """The method that the others are compared with; None: grpo if it is among them, else the first."""
    ranks: int | None
    """Processes of an arm; None: as many as saved the checkpoint."""
    overrides: tuple[str, ...]
    gradients: bool


@dataclass(frozen=True, slots=True)
class GradientSettings:
    """What the program gradients.py is asked for, which it reads as JSON."""

    fork: str
    step: int
    """The step whose batch it is, one after the checkpoint's."""
    sampling: str
    """The configuration file by which the batch is sampled. Its run.directory holds the checkpoint."""
    methods: tuple[tuple[str, str], ...]
    """Name and configuration file of each method."""
    batch: str
    """The folder that keeps the batch, as debug.save_rollouts does."""
    out: str
    """The file for the report, JSON."""


def read_budget(text: str) -> Budget:
    """Reads `steps=K` or `tokens=K`. Raises CompareError."""
    found = re.fullmatch(r"(steps|tokens)=([0-9][0-9_]*)", text)
    amount = int(found[2].replace("_", "")) if found else 0
    if found is None or not 1 <= amount <= LARGEST_INTEGER:
        raise CompareError(
            f"--budget {text!r}: expected steps=K or tokens=K with K from 1 to {LARGEST_INTEGER}, such as steps=40"
        )
    return Budget(BudgetUnit(found[1]), amount)
