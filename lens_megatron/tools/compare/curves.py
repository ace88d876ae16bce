"""Learning curves of arms from the fork on, and what is compared of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from lens_megatron.output.conclusion import evaluations
from lens_megatron.tools.compare.arms import TOKENS
from lens_megatron.tools.compare.paired import PairedDifference, compare
from lens_megatron.tools.compare.request import Budget, BudgetUnit


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """An accuracy, the mean over the sources of held-out problems, after what was spent since the fork."""

    spent: float
    """Steps or sampled tokens, as the budget counts."""
    accuracy: float


@dataclass(frozen=True, slots=True)
class ArmCurve:
    """The learning curve of a finished arm."""

    method: str
    seed_index: int
    points: tuple[CurvePoint, ...]
    """In the order of the steps. The first one may be of the fork itself, with nothing spent."""
    steps: int
    tokens: float
    """What the arm has spent since the fork."""

    @property
    def final(self) -> float:
        return self.points[-1].accuracy

    @property
    def height(self) -> float:
        return mean_height(self.points)


@dataclass(frozen=True, slots=True)
class MethodComparison:
    """What is known of a method, and of its difference from the baseline; the baseline has no difference."""

    method: str
    curves: tuple[ArmCurve, ...]
    """One per seed that is done, in their order."""
    spent_to_baselines_best: float | None
    """What the method's mean curve has spent where it first reaches the best of the baseline's; None: it never does."""
    speed_up: float | None
    """The same of the baseline divided by it: the methods' mean curves compared, without an interval."""
    final: PairedDifference | None = None
    height: PairedDifference | None = None
    """Differences from the baseline over the seeds that both have; None where they share none."""


def read_curve(method: str, seed_index: int, rows: Sequence[dict], fork_step: int, budget: Budget) -> ArmCurve:
    """Reads the curve of an arm from the rows of its metrics.jsonl."""
    since = [row for row in rows if row["step"] > fork_step]
    tokens = sum(row.get(TOKENS, 0.0) for row in since)

    def spent(step: int) -> float:
        if budget.unit is BudgetUnit.STEPS:
            return float(step - fork_step)
        return sum(row.get(TOKENS, 0.0) for row in since if row["step"] <= step)

    found = evaluations([row for row in rows if row["step"] >= fork_step])
    points = tuple(CurvePoint(spent(measured.step), measured.accuracy) for measured in found)
    return ArmCurve(method, seed_index, points, len(since), tokens)


def mean_height(points: Sequence[CurvePoint]) -> float:
    """Returns the area under the curve divided by its width: the mean accuracy on the way, by the trapezoidal rule."""
    width = points[-1].spent - points[0].spent
    if not width:
        return points[-1].accuracy
    area = sum((b.spent - a.spent) * (a.accuracy + b.accuracy) / 2 for a, b in pairwise(points))
    return area / width


def mean_curve(curves: Sequence[ArmCurve]) -> tuple[CurvePoint, ...]:
    """Returns the mean of the curves, evaluation by evaluation; those that not every seed has are left out."""
    columns = zip(*(curve.points for curve in curves), strict=False)
    return tuple(CurvePoint(fmean(p.spent for p in points), fmean(p.accuracy for p in points)) for points in columns)


def spent_to_reach(points: Sequence[CurvePoint], level: float) -> float | None:
    """Returns what was spent at the first evaluation with at least this accuracy; None where there is none."""
    return next((point.spent for point in points if point.accuracy >= level), None)


def compare_methods(curves: Sequence[ArmCurve], methods: Sequence[str], baseline: str) -> tuple[MethodComparison, ...]:
    """Compares every method with the baseline, in the order of `methods`. Arms without an evaluation take no part."""
    of_method = {
        name: tuple(sorted((c for c in curves if c.method == name and c.points), key=lambda curve: curve.seed_index))
        for name in methods
    }
    base = of_method[baseline]
    trained = [point for point in mean_curve(base) if point.spent > 0]
    best = max(trained, key=lambda point: point.accuracy, default=None)  # the first one of several
    return tuple(_compare(name, of_method[name], base, best, is_baseline=name == baseline) for name in methods)


def _compare(
    method: str, own: tuple[ArmCurve, ...], base: tuple[ArmCurve, ...], best: CurvePoint | None, *, is_baseline: bool
) -> MethodComparison:
    trained = [point for point in mean_curve(own) if point.spent > 0]
    reached = spent_to_reach(trained, best.accuracy) if best else None
    speed_up = best.spent / reached if best and reached else None
    if is_baseline:
        return MethodComparison(method, own, reached, speed_up)
    by_seed = {curve.seed_index: curve for curve in base}
    pairs = [(curve, by_seed[curve.seed_index]) for curve in own if curve.seed_index in by_seed]
    final = compare([a.final - b.final for a, b in pairs]) if pairs else None
    height = compare([a.height - b.height for a, b in pairs]) if pairs else None
    return MethodComparison(method, own, reached, speed_up, final, height)
