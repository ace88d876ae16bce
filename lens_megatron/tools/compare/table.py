"""The comparison of methods as Markdown, with what may be concluded said in words."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

from lens_megatron.tools.compare.curves import MethodComparison
from lens_megatron.tools.compare.paired import LEVEL, MOST_SEEDS, POWER, PairedDifference
from lens_megatron.tools.compare.request import Budget


def render(fork: str, budget: Budget, baseline: str, found: Sequence[MethodComparison], seeds: int) -> str:
    """Returns the comparison as Markdown."""
    done = min(len(method.curves) for method in found)
    lines = [
        f"# {len(found)} methods from {fork}",
        "",
        f"Every arm went on from the same checkpoint for {budget}, with the same `run.seed` as the other arms of its "
        f"seed. Done: {done} of {seeds} seeds of every method. Differences are paired by seed, method - {baseline}.",
        "",
        *_accuracies(budget, found),
    ]
    if any(method.final for method in found):
        lines += ["", "## Differences of the final accuracy", "", *_differences([(m, m.final) for m in found])]
        lines += [
            "",
            "## Differences of the mean accuracy on the way",
            "",
            *_differences([(m, m.height) for m in found]),
        ]
    lines += ["", "## What may be said", "", *(f"* {sentence}" for sentence in _conclusions(baseline, found))]
    return "\n".join([*lines, "", *_legend(budget, baseline)]) + "\n"


def _accuracies(budget: Budget, found: Sequence[MethodComparison]) -> Iterator[str]:
    yield (
        f"| method | seeds | final accuracy | mean accuracy on the way | {budget.unit} to the baseline's best | "
        "speed-up | steps | sampled tokens |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for method in found:
        if not method.curves:
            yield f"| {method.method} | 0 | | | | | | |"
            continue
        reached = "never" if method.spent_to_baselines_best is None else f"{method.spent_to_baselines_best:,.0f}"
        yield _row(
            method.method,
            str(len(method.curves)),
            _spread([curve.final for curve in method.curves]),
            _spread([curve.height for curve in method.curves]),
            reached,
            "" if method.speed_up is None else f"{method.speed_up:.2f}",
            f"{fmean(curve.steps for curve in method.curves):,.0f}",
            f"{fmean(curve.tokens for curve in method.curves):,.0f}",
        )


def _differences(rows: Sequence[tuple[MethodComparison, PairedDifference | None]]) -> Iterator[str]:
    yield "| method | seeds | difference in points | 95 % interval | p | seeds for a claim of this size |"
    yield "|---|---|---|---|---|---|"
    for method, difference in rows:
        if difference is None:
            continue
        interval, p_value, needed = "one seed: none", "", ""
        if difference.low is not None and difference.high is not None and difference.p_value is not None:
            interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
            p_value = f"{difference.p_value:.3f}"
            needed = str(difference.seeds_needed or _why_no_number(difference))
        count = str(len(difference.differences))
        yield _row(method.method, count, f"{100 * difference.mean:+.1f}", interval, p_value, needed)


def _why_no_number(difference: PairedDifference) -> str:
    if not difference.mean:
        return "no difference"
    return "all differences are equal" if not difference.deviation else f"more than {MOST_SEEDS:,}"


def _conclusions(baseline: str, found: Sequence[MethodComparison]) -> Iterator[str]:
    """Says of every method, in one sentence, what its final accuracy shows."""
    for method in found:
        if method.method == baseline:
            continue
        if method.final is None:
            yield f"{method.method}: no seed with an accuracy is done for both, so nothing can be said."
        else:
            yield f"{method.method}: {_conclusion(baseline, method.final)}"
    if all(method.method == baseline for method in found):
        yield f"There is no method beside {baseline} to compare."


def _conclusion(baseline: str, difference: PairedDifference) -> str:
    count, points = len(difference.differences), f"{100 * difference.mean:+.1f} points"
    if difference.p_value is None:
        return f"{points} with one seed, which says nothing about another seed."
    needed = f"; a claim of this size needs {difference.seeds_needed} seeds" if difference.seeds_needed else ""
    if difference.least_p_value >= LEVEL:
        return (
            f"{points} over {count} seeds; whatever they show, the test without suppositions cannot fall below p = "
            f"{difference.least_p_value:.3f}, so nothing can be claimed{needed}."
        )
    if difference.p_value < LEVEL:
        word = "higher" if difference.mean > 0 else "lower"
        found = f"{points} over {count} seeds, p = {difference.p_value:.3f}"
        return f"the final accuracy is {word} than that of {baseline}: {found}."
    return f"{points} over {count} seeds may be chance (p = {difference.p_value:.3f}){needed}."


def _legend(budget: Budget, baseline: str) -> Iterator[str]:
    yield (
        "The interval is Student's over seeds; p is of the two-sided sign-flip test. Neither is corrected for the "
        "number of methods: with m methods beside the baseline, claim only what has p < .05 / m. Seeds for a claim are "
        f"those with which a two-sided paired t test at {LEVEL:g} finds the observed mean with probability {POWER:g}, "
        "were mean and deviation the true ones; the observed difference of a promising method is mostly too large, so "
        "the true number is mostly larger. The mean accuracy on the way is the area under the learning curve divided "
        f"by its width in {budget.unit}. The speed-up compares mean curves: {budget.unit} at which {baseline}'s is "
        "highest, divided by those at which the method's first is as high; it has no interval, and follows the noise "
        "of single evaluations."
    )


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread} %"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
