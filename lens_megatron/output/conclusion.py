"""Draws conclusions from a run's metrics: one sentence on learning and one on purification."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ACCURACY, NOISE = "val-core/", "val-aux/{source}/acc/standard_error"
"""The prefix of the names of accuracies, and the name of the standard error of an accuracy."""
LONGEST_SOURCE = 80
CLEAR = 2.0
"""A change of more than this many standard errors counts as real: chance alone exceeds it one time in twenty."""


@dataclass(frozen=True, slots=True)
class MeasuredAccuracy:
    """The accuracy after `step`: the mean over all sources of held-out problems."""

    step: int
    accuracy: float
    standard_error: float | None
    """The standard error of the accuracy; None where the metrics do not contain it."""


def accuracy_names(rows: Sequence[Mapping]) -> list[str]:
    """Returns the names of all accuracies in `rows`, sorted."""
    return sorted({name for row in rows for name in row if name.startswith(ACCURACY)})


def source_of(name: str) -> str:
    """Returns the source in the name of an accuracy, on one line and short: `val-core/a/b/acc/mean@1` -> `a/b`."""
    source = _source(name)
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in source)
    return shown if len(shown) <= LONGEST_SOURCE else f"{shown[: LONGEST_SOURCE - 3]}..."


def evaluations(rows: Sequence[Mapping]) -> list[MeasuredAccuracy]:
    """Returns the mean accuracy of every row that has the accuracies of all sources."""
    names = accuracy_names(rows)
    return [_evaluation(row, names) for row in rows if names and all(name in row for name in names)]


def learning(rows: Sequence[Mapping]) -> str:
    """Says whether the run learned: compares the first and the last evaluation's accuracy with the noise of one."""
    names, found = accuracy_names(rows), evaluations(rows)
    if not found:
        return "No accuracy was measured, so nothing can be said about learning; data.eval names held-out problems."
    first, last = found[0], found[-1]
    what = f"Accuracy on {source_of(names[0])}" if len(names) == 1 else f"The mean accuracy of {len(names)} sources"
    if first.step == last.step:
        return (
            f"{what} is {_percent(first.accuracy)} at step {first.step}{_noise_of(first)}, the only evaluation: "
            "whether the run learns shows at the next one."
        )
    change = last.accuracy - first.accuracy
    verb = "stayed at" if not change else "rose from" if change > 0 else "fell from"
    course = _percent(first.accuracy) if not change else f"{_percent(first.accuracy)} to {_percent(last.accuracy)}"
    if first.standard_error is None or last.standard_error is None:
        noise, verdict = "", "the noise is not in the metrics, so it may be chance."
    else:
        larger = max(first.standard_error, last.standard_error)
        noise = f"; the noise of one evaluation is +-{100 * larger:.1f}"
        verdict = _verdict(change, math.hypot(first.standard_error, last.standard_error))
    return f"{what} {verb} {course} in {last.step - first.step} steps ({100 * change:+.1f} points{noise}): {verdict}"


def purification(rows: Sequence[Mapping]) -> str:
    """Says how many prompts were hard and sampled again, and how many of them were rescued by that."""
    steps = [row for row in rows if "lens/prompts" in row]
    prompts, hard, rescued, extra = (
        int(sum(row[f"lens/{name}"] for row in steps))
        for name in ("prompts", "purified_prompts", "rescued_prompts", "extra_rollouts")
    )
    if not hard:
        return f"Of {prompts} prompts none was sampled again."
    return (
        f"Of {prompts} prompts {hard} were hard and sampled again, with {extra} rollouts; "
        f"{rescued} of them ({100 * rescued / hard:.0f} %) were rescued."
    )


def cost(rows: Sequence[Mapping]) -> str | None:
    """Says what second waves cost, and in how many groups they made or destroyed a contrast of rewards.

    Returns None without second waves, and for rows of versions that did not count all of that.
    """
    steps = [row for row in rows if "lens/prompts" in row]
    if not all("lens/extra_tokens" in row for row in steps) or not any(row["lens/extra_tokens"] for row in steps):
        return None
    rollouts, tokens, seconds, destroyed = (
        sum(row[f"lens/{name}"] for row in steps)
        for name in ("extra_rollouts", "extra_tokens", "extra_seconds", "destroyed_groups")
    )
    before, after = (
        round(sum(row[f"lens/zero_variance_{when}"] * row["lens/prompts"] for row in steps))
        for when in ("before", "after")
    )
    return (
        f"Second waves took {rollouts:,.0f} rollouts, {tokens:,.0f} tokens and {seconds:,.1f} s more; "
        f"{before:,} groups were without contrast before them, {after:,} after; "
        f"{destroyed:,.0f} groups lost their contrast by them."
    )


def _evaluation(row: Mapping, names: Sequence[str]) -> MeasuredAccuracy:
    errors = [row.get(NOISE.format(source=_source(name))) for name in names]
    known = [error for error in errors if error is not None]
    noise = math.hypot(*known) / len(names) if len(known) == len(names) else None
    return MeasuredAccuracy(row["step"], sum(row[name] for name in names) / len(names), noise)


def _verdict(change: float, noise: float) -> str:
    """Judges a change of accuracy. `noise` is its standard error, as if the two evaluations were independent."""
    if abs(change) <= CLEAR * noise or not change:
        return "this is within the noise, so the run shows neither learning nor harm; take more steps or more problems."
    return "this run learned." if change > 0 else "this run made the policy worse."


def _source(name: str) -> str:
    return name.removeprefix(ACCURACY).rpartition("/acc/")[0]


def _noise_of(evaluation: MeasuredAccuracy) -> str:
    return "" if evaluation.standard_error is None else f" (+-{100 * evaluation.standard_error:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
