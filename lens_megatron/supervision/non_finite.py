"""Writes the batch of an update that was skipped for a non-finite loss or gradient; too many in a row end the run.

    run.directory/non_finite/step_000012_update_0_rank_00003.jsonl    a line on the update, then one per sample

`policy.update` decides, from the loss summed and the gradient norm reduced over all ranks, so every rank skips alike.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lens_megatron.errors import ExitCode, UserError
from lens_megatron.files import write_atomically
from lens_megatron.results import UpdateStats
from lens_megatron.types import TrainingRow

logger = logging.getLogger(__name__)

KEPT = 10
"""Number of batches kept per rank: the first ones, which are nearest to the cause."""


class NonFiniteError(UserError):
    """`train.max_skipped_updates` updates in a row were skipped."""

    exit_code = ExitCode.NON_FINITE


def dump(
    folder: Path,
    name: str,
    stats: UpdateStats,
    rows: Sequence[TrainingRow],
) -> None:
    """Writes this rank's rows to `folder`/`name`.jsonl, unless there are KEPT files or the disk has no room."""
    lines = [_sample_line(row) for row in rows]
    head = {
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": stats.learning_rate,
        "samples": len(lines),
        "samples_not_finite": [i for i, line in enumerate(lines) if not line["finite"]],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rank = name.rsplit("_", 1)[-1]
        if len(list(folder.glob(f"*_{rank}.jsonl"))) < KEPT:
            write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in (head, *lines)))
    except OSError as error:
        logger.warning(f"{folder}: the batch of a skipped update cannot be written: {error}")


def _sample_line(row: TrainingRow) -> dict[str, Any]:
    sample, rollout = row.sample, row.sample.rollout
    line: dict[str, Any] = {
        "prompt": sample.prompt,
        "generation_prompt": sample.generation_prompt,
        "response": rollout.token_ids,
        "engine_log_probs": rollout.log_probs,
        "old_log_probs": _numbers(row.old_log_probs),
        "trainer_log_probs": _numbers(row.trainer_log_probs),
        "reference_log_probs": _numbers(row.reference_log_probs),
        "reward": rollout.reward,
        "advantage": sample.advantage,
        "weight": sample.weight,
        "origin": rollout.origin,
        "weight_version": rollout.weight_version,
    }
    numbers = [sample.advantage, sample.weight, rollout.reward]
    for name in ("engine_log_probs", "old_log_probs", "trainer_log_probs", "reference_log_probs"):
        numbers += line[name] or ()
    return {"finite": all(map(math.isfinite, numbers)), **line}


def _numbers(log_probs: Tensor | None) -> list[float] | None:
    return None if log_probs is None else log_probs.tolist()


def in_a_row(before: int, updates: Sequence[UpdateStats]) -> int:
    """Counts the updates that were skipped in a row up to now, of which `before` were in earlier steps."""
    for stats in updates:
        before = before + 1 if stats.skipped else 0
    return before


def check(skipped: int, limit: int, step: int, folder: Path) -> None:
    """Raises NonFiniteError at the limit; 0 sets no limit."""
    if limit and skipped >= limit:
        raise NonFiniteError(
            f"loss or gradient was not finite in {skipped} updates in a row, the last at step {step} "
            f"(train.max_skipped_updates={limit}); the weights are those before them. Look at the batches in {folder}: "
            "samples_not_finite lists the samples that came with a number that is not finite. If it is none, start a "
            "new run from the last checkpoint's hf/ folder with a lower optimizer.lr or algorithm.kl_coef; "
            "train.max_skipped_updates=0 goes on regardless"
        )
