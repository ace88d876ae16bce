"""Divides the seconds of a step among the phases that a reader of a report thinks in."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lens_megatron.tools.report.run_data import Row
from lens_megatron.tools.report.seeds import Configuration

PHASES = (
    ("score the prompts", ("score",)),
    ("sample and grade", ("gen",)),
    ("old log-probabilities", ("old_log_prob",)),
    ("reference", ("ref",)),
    ("update", ("update_actor",)),
    ("weights to the engine", ("update_weights", "sync_check", "wake", "sleep")),
    ("exchange between ranks", ("exchange",)),
)
"""Phases within a step, each with the names `timing_s/*` that it adds up."""
AFTER = (
    ("evaluate and probe", ("testing", "probe")),
    ("save", ("save_checkpoint", "write_rollouts")),
)
"""Phases between steps, which `timing_s/step` does not contain."""
OTHER = "the rest of the step"
NAMES = (*(name for name, _ in PHASES), OTHER, *(name for name, _ in AFTER))


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """The seconds of a phase, after a step or in the mean over all steps of a configuration."""

    configuration: str
    step: int
    phase: str
    seconds: float


def step_seconds(configuration: Configuration) -> tuple[PhaseSeconds, ...]:
    """Returns the seconds of every phase of every step, as means over the runs that have the step."""
    by_step: dict[int, list[Row]] = {}
    for row in (row for run in configuration.runs for row in run.rows if "timing_s/step" in row):
        by_step.setdefault(int(row["step"]), []).append(row)
    return tuple(
        PhaseSeconds(configuration.name, step, phase, seconds)
        for step, rows in sorted(by_step.items())
        for phase, seconds in _means(rows)
    )


def mean_seconds(configuration: Configuration) -> tuple[PhaseSeconds, ...]:
    """Returns the mean seconds of every phase over all steps, with `step` 0. An evaluation is spread over all steps."""
    rows = [row for run in configuration.runs for row in run.rows if "timing_s/step" in row]
    return tuple(PhaseSeconds(configuration.name, 0, phase, seconds) for phase, seconds in _means(rows)) if rows else ()


def _means(rows: Sequence[Row]) -> list[tuple[str, float]]:
    divided = [_divided(row) for row in rows]
    return [(name, statistics.fmean(parts[i] for parts in divided)) for i, name in enumerate(NAMES)]


def _divided(row: Row) -> list[float]:
    """Returns the seconds of every phase in the order of NAMES."""
    inside = [_seconds(row, names) for _, names in PHASES]
    # Evaluations after the step send weights too, and are counted in the same phase, which may exceed the step then.
    rest = max(0.0, row["timing_s/step"] - sum(inside))
    return [*inside, rest, *(_seconds(row, names) for _, names in AFTER)]


def _seconds(row: Row, names: Sequence[str]) -> float:
    return sum(row.get(f"timing_s/{name}", 0.0) for name in names)
