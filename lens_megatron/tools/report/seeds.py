"""Puts the seeds of one configuration together: means and intervals of a metric over runs, step by step."""

import math
import os.path
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lens_megatron.output import conclusion
from lens_megatron.tools.report.run_data import RunData

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
               2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
               2.042)  # fmt: skip
"""The 97.5 % quantile of Student's t distribution with 1, 2, ... 30 degrees of freedom."""
NORMAL_QUANTILE = 1.960
FEWEST_FOR_INTERVAL = 3
"""Of two runs the interval is nine times as wide as the distance between them, and says nothing that the range does
not."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The runs that differ in their seed only."""

    name: str
    runs: tuple[RunData, ...]


@dataclass(frozen=True, slots=True)
class BandPoint:
    """A metric after a step: its mean over the runs, with a 95 % interval of the mean or the range of the runs."""

    step: int
    mean: float
    low: float | None
    """The bounds are those of the interval with FEWEST_FOR_INTERVAL runs or more, and with fewer the least and the
    greatest value. None where nothing is known of the spread."""
    high: float | None
    runs: int


@dataclass(frozen=True, slots=True)
class Band:
    """A metric of a configuration over the steps."""

    configuration: str
    points: tuple[BandPoint, ...]


Value = Callable[[RunData], dict[int, float]]
"""Returns a number per step of a run."""


def configurations(runs: Sequence[RunData]) -> tuple[Configuration, ...]:
    """Returns the configurations in the order of their first runs. A run without options is one of its own."""
    groups: dict[object, list[RunData]] = {}
    for run in runs:
        groups.setdefault(run.settings or run.name, []).append(run)
    names = _distinct([_common_name([run.name for run in group]) for group in groups.values()])
    return tuple(Configuration(name, tuple(group)) for name, group in zip(names, groups.values(), strict=True))


def _common_name(names: Sequence[str]) -> str:
    """Returns what the names begin with, without a number for the seed: lens_s0, lens_s1 -> lens."""
    if len(names) == 1:
        return names[0]
    stem = re.sub(r"[-_./ ]*(seeds?|s|runs?)?[-_. ]*\d*$", "", os.path.commonprefix(list(names)))
    return stem or names[0]


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def metric(name: str) -> Value:
    """Returns the function that reads the metric `name` of a run."""
    return lambda run: {int(row["step"]): row[name] for row in run.rows if name in row}


def accuracy(run: RunData) -> dict[int, float]:
    """Returns the mean accuracy over all sources of held-out problems, at the steps where all were measured."""
    return {found.step: found.accuracy for found in conclusion.evaluations(run.rows)}


def band(configuration: Configuration, value: Value) -> Band:
    """Returns the mean of `value` over the runs at every step that all runs with any value have reached."""
    curves = [curve for curve in map(value, configuration.runs) if curve]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return Band(configuration.name, tuple(_point(step, [curve[step] for curve in curves]) for step in steps))


def accuracy_band(configuration: Configuration) -> Band:
    """Returns the band of the accuracy. Of a single run the interval is that of one evaluation over its problems."""
    if len(configuration.runs) > 1:
        return band(configuration, accuracy)
    points = []
    for found in conclusion.evaluations(configuration.runs[0].rows):
        half = None if found.standard_error is None else NORMAL_QUANTILE * found.standard_error
        low, high = (None, None) if half is None else (found.accuracy - half, found.accuracy + half)
        points.append(BandPoint(found.step, found.accuracy, low, high, 1))
    return Band(configuration.name, tuple(points))


def _point(step: int, values: Sequence[float]) -> BandPoint:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return BandPoint(step, mean, None, None, len(values))
    if len(values) < FEWEST_FOR_INTERVAL:
        return BandPoint(step, mean, min(values), max(values), len(values))
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return BandPoint(step, mean, mean - half, mean + half, len(values))


def t_quantile(degrees: int) -> float:
    """Returns the 97.5 % quantile of Student's t; beyond 30 degrees of freedom that of the normal distribution."""
    return T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else NORMAL_QUANTILE


def thinned(curve: Band, most: int) -> Band:
    """Returns at most about `most` points, evenly chosen; the last one is always among them."""
    stride = math.ceil(len(curve.points) / most)
    last = len(curve.points) - 1
    return Band(curve.configuration, tuple(p for i, p in enumerate(curve.points) if (last - i) % stride == 0))


def without_bounds(curve: Band) -> Band:
    """Returns the means alone."""
    return replace(curve, points=tuple(replace(point, low=None, high=None) for point in curve.points))
