"""Reads from learning curves how much sooner one configuration is as good as another ever was."""

from collections.abc import Sequence
from dataclasses import dataclass

from lens_megatron.tools.report.seeds import Band


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """Compares the steps in which two configurations reach the best accuracy of one of them."""

    faster: str
    other: str
    best: float
    """The best mean accuracy of `other`, a share."""
    best_step: int
    """The first step at which `other` has it."""
    step: int | None
    """The first step at which `faster` has as much; None if it never has."""

    @property
    def factor(self) -> float | None:
        """Times as many steps as `faster` needed; None where it needed none or never came so far."""
        return self.best_step / self.step if self.step else None

    def sentence(self) -> str:
        """Says it in one sentence."""
        best = f"the best of {self.other} ({100 * self.best:.1f} % at step {self.best_step})"
        if self.step is None:
            return f"{self.faster} never reaches {best}."
        if self.factor is None:
            return f"{self.faster} has {best} before its first step."
        times = f"{self.factor:.2f} times fewer" if self.factor >= 1 else f"{1 / self.factor:.2f} times more"
        return f"{self.faster} reaches {best} at step {self.step}, {times} steps."


def speed_ups(curves: Sequence[Band]) -> tuple[SpeedUp, ...]:
    """Compares every two curves. One whose best is its first point has learned nothing, and is no mark to reach."""
    found = []
    for other in curves:
        if not other.points:
            continue
        best = max(other.points, key=lambda point: point.mean)
        if best.step == other.points[0].step:
            continue
        for faster in curves:
            if faster is other or not faster.points:
                continue
            reached = next((point.step for point in faster.points if point.mean >= best.mean), None)
            found.append(SpeedUp(faster.configuration, other.configuration, best.mean, best.step, reached))
    return tuple(found)
