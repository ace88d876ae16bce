"""Says what a report shows, section by section."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lens_megatron.output import conclusion
from lens_megatron.tools.report import charts, phases
from lens_megatron.tools.report.charts import Curve, Figure, NamedScores, NamedShares
from lens_megatron.tools.report.digest import RunDigest
from lens_megatron.tools.report.run_data import Row, RunData
from lens_megatron.tools.report.seeds import (
    FEWEST_FOR_INTERVAL,
    Band,
    Configuration,
    Value,
    accuracy_band,
    band,
    metric,
    thinned,
    without_bounds,
)
from lens_megatron.tools.report.shares import NoisePrecision, StepShares, added
from lens_megatron.tools.report.speed_up import SpeedUp, speed_ups

MOST_POINTS = 40_000
"""Points of all curves of a page together. Longer curves are thinned."""
CURVES_OF_A_PAGE = 20
"""About as many curves as a page has per configuration, for dividing the points among them."""
MOST_PANELS = 3
"""Charts of single configurations are drawn for the first of them only, as a page must stay readable."""
MOST_STEPS = 150
"""Steps of a chart with a bar per step; more bars would be narrower than a pixel on a phone."""
MOST_SENTENCES = 6
"""Runs of which a section says something in words; the table of runs has all of them."""
PROBE = "lens_probe/"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PageSection:
    """A part of the page."""

    key: str
    """The section's address within the page."""
    title: str
    sentences: tuple[str, ...]
    figures: tuple[Figure, ...]
    speed_ups: tuple[SpeedUp, ...] = ()


@dataclass(frozen=True, slots=True)
class ReportInput:
    """All that was read, by configurations."""

    configurations: tuple[Configuration, ...]
    digests: Mapping[str, RunDigest]
    """The rollouts of every run by its name."""

    def digests_of(self, configuration: Configuration) -> list[RunDigest]:
        return [self.digests[run.name] for run in configuration.runs]

    def bands(self, value: Value) -> list[Band]:
        """Returns the band of every configuration that has any value, thinned to what a page has room for."""
        most = max(2, MOST_POINTS // (CURVES_OF_A_PAGE * len(self.configurations)))
        found = [band(configuration, value) for configuration in self.configurations]
        return [thinned(curve, most) for curve in found if curve.points]

    def curves(self, value: Value, kind: str = "") -> list[Curve]:
        return [Curve(curve, kind) for curve in self.bands(value)]


def sections(evidence: ReportInput) -> tuple[PageSection, ...]:
    """Returns the sections of the page in order, without those that have nothing to show."""
    made = (learning(evidence), dynamics(evidence), rescue(evidence), noise(evidence), cost(evidence))
    return tuple(section for section in made if section.figures or section.sentences)


def learning(evidence: ReportInput) -> PageSection:
    """Shows held-out accuracy, and how much sooner one configuration reaches the best of another."""
    found = [curve for curve in map(accuracy_band, evidence.configurations) if curve.points]
    several = any(len(configuration.runs) > 1 for configuration in evidence.configurations)
    caption = (
        "Bands are 95 % intervals of the mean over seeds (Student's t) where a configuration has at least "
        f"{FEWEST_FOR_INTERVAL} runs; the range of two runs; and of one run the 95 % interval of an evaluation over "
        "its problems (normal approximation)."
    )
    title = "Accuracy on held-out problems" + (", mean over seeds" if several else "")
    figures = [charts.curves(title, caption, "accuracy", [Curve(c) for c in found], percent=True)] if found else []
    names = sorted({n for c in evidence.configurations for r in c.runs for n in conclusion.accuracy_names(r.rows)})
    if len(names) > 1:
        for name in names:
            source = conclusion.source_of(name)
            figures += _figure(f"Accuracy on {source}", "", "accuracy", evidence.curves(metric(name)), percent=True)
    runs = [run for configuration in evidence.configurations for run in configuration.runs]
    sentences = [f"{run.name}: {conclusion.learning(run.rows)}" for run in runs[:MOST_SENTENCES]]
    return PageSection("learning", "Learning", tuple(sentences), tuple(figures), speed_ups(found))


def dynamics(evidence: ReportInput) -> PageSection:
    """Shows how training went: reward, entropy, length, divergence, gradient."""
    wanted = (
        ("critic/rewards/mean", "Training reward of the first wave", "mean reward of a rollout"),
        ("actor/entropy", "Entropy of the policy", "nats per token"),
        ("response_length/mean", "Length of responses", "tokens"),
        ("actor/kl_loss", "Divergence of the policy from the reference (k3 estimate)", "nats per token"),
        ("actor/grad_norm", "Norm of the gradient before clipping", "L2 norm"),
        ("response_length/clip_ratio", "Responses cut off at the longest length", "share of responses"),
    )
    figures = []
    for name, title, unit in wanted:
        share = unit.startswith("share")
        figures += _figure(title, "", unit, evidence.curves(metric(name)), percent=share, zero=share)
    return PageSection("dynamics", "Training dynamics", (), tuple(figures))


def rescue(evidence: ReportInput) -> PageSection:
    """Shows how hard prompts were, and what second waves changed."""
    again = "A hard prompt has a success rate below lens.tau in the first wave, and is sampled again from its "
    figures = [
        *_kinds(
            evidence,
            "Hard prompts, and those of them that were rescued",
            again + "purified form; it is rescued where that has more success.",
            "share of prompts",
            (("hard", metric("lens/purified_rate")), ("rescued", metric("lens/rescued_rate"))),
        ),
        *_kinds(
            evidence,
            "Accuracy on hard prompts before and after purification",
            "Before: first wave. After: second wave, from the purified prompt. Hard prompts are chosen for failing, so "
            "some of the rise is regression to the mean; the probe and random deletion show how much.",
            "share of correct rollouts",
            (("before", metric("lens/success_before")), ("after", metric("lens/success_purified"))),
        ),
        *_kinds(
            evidence,
            "Groups without any reward, before and after rescue",
            "Zero-reward share: no rollout of the group has a reward above 0.",
            "share of groups",
            (
                ("before", _of_shares(evidence, lambda s: s.zero_before)),
                ("after", _of_shares(evidence, lambda s: s.zero_after)),
            ),
        ),
        *_kinds(
            evidence,
            "Groups without contrast, before and after rescue",
            "All rewards of the group are equal, so it has no gradient.",
            "share of groups",
            (("before", metric("lens/zero_variance_before")), ("after", metric("lens/zero_variance_after"))),
        ),
        *_share_panels(evidence),
        *_score_panels(evidence),
    ]
    runs = [run for configuration in evidence.configurations for run in configuration.runs]
    return PageSection("rescue", "Hard prompts and their rescue", _about_rescue(runs), tuple(figures))


def _about_rescue(runs: Sequence[RunData]) -> tuple[str, ...]:
    said = [(run.name, _said(conclusion.purification, run, "lens/extra_rollouts")) for run in runs[:MOST_SENTENCES]]
    return tuple(f"{name}: {sentence}" for name, sentence in said if sentence)


def _said(conclude: Callable[[Sequence[Row]], str | None], run: RunData, name: str) -> str | None:
    """Returns what `conclude` says of the rows with the metric `name`; None where they lack another that it needs."""
    rows = [row for row in run.rows if name in row]
    try:
        return conclude(rows) if rows else None
    except KeyError:
        return None


def _share_panels(evidence: ReportInput) -> list[Figure]:
    caption = "By the first wave: failure has no correct rollout, mid some, high only correct ones."
    figures = []
    for configuration in evidence.configurations[:MOST_PANELS]:
        means = _mean_shares([digest.shares for digest in evidence.digests_of(configuration)])
        if means:
            title = f"Failed, mid and high groups of {configuration.name}"
            figures.append(charts.shares(title, caption, NamedShares(configuration.name, _even(means, MOST_STEPS))))
    return figures


def _score_panels(evidence: ReportInput) -> list[Figure]:
    figures = []
    for configuration in evidence.configurations[:MOST_PANELS]:
        bins = added(digest.scores for digest in evidence.digests_of(configuration))
        if bins:
            title = f"Scores of deleted and of kept tokens of {configuration.name}"
            caption = (
                "Tokens that may be deleted, in prompts that were sampled again. Each of the two adds up to 100 %."
            )
            figures.append(charts.scores(title, caption, NamedScores(configuration.name, bins)))
    if not figures:
        figures = _kinds(
            evidence,
            "Mean score of deleted and of kept tokens",
            "The rollout files have no scores of single tokens.",
            "score (interference: nats)",
            (("deleted", metric("lens/score_deleted")), ("kept", metric("lens/score_kept"))),
            percent=False,
        )
    return figures


def noise(evidence: ReportInput) -> PageSection:
    """Shows, where the data marks planted noise, whether it is what was deleted, and what the probe measured."""
    in_training = (("deleted", "lens/noise_share_deleted"), ("eligible", "lens/noise_share_eligible"))
    logged = any(name in row for run in _runs(evidence) for row in run.rows for _, name in in_training)
    counted: tuple[tuple[str, Value], ...] = (
        ("deleted", _of_precision(evidence, lambda p: (p.deleted_noise, p.deleted))),
        ("eligible", _of_precision(evidence, lambda p: (p.eligible_noise, p.eligible))),
    )
    figures = _kinds(
        evidence,
        "Planted noise among deleted tokens, and among all that could be deleted",
        "The second is the base rate: what random deletion would have.",
        "share of tokens",
        tuple((kind, metric(name)) for kind, name in in_training) if logged else counted,
    )
    for topic, names in probe_topics(_runs(evidence)).items():
        kinds = tuple((name.removeprefix(PROBE).replace("_", " "), metric(name)) for name in names)
        values = [row[name] for run in _runs(evidence) for row in run.rows for name in names if name in row]
        share = max(values) <= 1
        unit = "share" if share else "value"
        figures += _kinds(evidence, f"Probe on held-out prompts: {topic}", "", unit, kinds, percent=share)
    return PageSection("noise", "Does the score find the noise?", (), tuple(figures))


def probe_topics(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """Returns the names `lens_probe/*` by their first words, so that what belongs together is in one chart."""
    names = sorted({name for run in runs for row in run.rows for name in row if name.startswith(PROBE)})
    topics: dict[str, list[str]] = {}
    for name in names:
        if not name.endswith(("_error", "_low", "_high")):
            topics.setdefault(name.removeprefix(PROBE).replace("/", "_").split("_")[0], []).append(name)
    return topics


def cost(evidence: ReportInput) -> PageSection:
    """Shows the seconds of a step by phase."""
    caption = "Seconds of rank 0. An evaluation is spread over all steps."
    means = [part for configuration in evidence.configurations for part in phases.mean_seconds(configuration)]
    figures = []
    if means:
        figures.append(charts.phase_bars("Seconds of a step by phase, mean over all steps", caption, means))
    for configuration in evidence.configurations[:MOST_PANELS]:
        seconds = phases.step_seconds(configuration)
        steps = set(_even(tuple(dict.fromkeys(part.step for part in seconds)), MOST_STEPS))
        if len(steps) > 1:
            kept = [part for part in seconds if part.step in steps]
            title = f"Seconds of every step of {configuration.name}, by phase"
            figures.append(charts.phase_steps(title, "Seconds of rank 0.", kept))
    said = [(run.name, _said(conclusion.cost, run, "timing_s/step")) for run in _runs(evidence)[:MOST_SENTENCES]]
    sentences = tuple(f"{name}: {sentence}" for name, sentence in said if sentence)
    return PageSection("cost", "Cost", sentences, tuple(figures))


def _figure(
    title: str, caption: str, unit: str, found: Sequence[Curve], *, percent: bool = False, zero: bool = False
) -> list[Figure]:
    return [charts.curves(title, caption, unit, found, percent=percent, zero=zero)] if found else []


def _kinds(
    evidence: ReportInput,
    title: str,
    caption: str,
    unit: str,
    kinds: Sequence[tuple[str, Value]],
    *,
    percent: bool = True,
) -> list[Figure]:
    """Draws several curves of every configuration in one chart; none where nothing was measured.

    The bands of several configurations with several kinds would hide each other, and are left out.
    """
    plain = len(evidence.configurations) > 1
    found = [curve for kind, value in kinds for curve in evidence.curves(value, kind)]
    shown = [Curve(without_bounds(curve.band), curve.kind) if plain else curve for curve in found]
    return _figure(title, caption, unit, shown, percent=percent, zero=True)


def _of_shares(evidence: ReportInput, pick: Callable[[StepShares], float]) -> Value:
    return lambda run: {found.step: pick(found) for found in evidence.digests[run.name].shares}


def _of_precision(evidence: ReportInput, pick: Callable[[NoisePrecision], tuple[int, int]]) -> Value:
    def value(run: RunData) -> dict[int, float]:
        counts = {found.step: pick(found) for found in evidence.digests[run.name].precision}
        return {step: part / whole for step, (part, whole) in counts.items() if whole}

    return value


def _mean_shares(runs: Sequence[Sequence[StepShares]]) -> tuple[StepShares, ...]:
    """Returns the means over runs at the steps that all runs with any rollouts have."""
    curves = [{found.step: found for found in run} for run in runs if run]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return tuple(_mean_of([curve[step] for curve in curves]) for step in steps)


def _mean_of(found: Sequence[StepShares]) -> StepShares:
    def mean(pick: Callable[[StepShares], float]) -> float:
        return statistics.fmean(map(pick, found))

    return StepShares(
        step=found[0].step,
        groups=sum(s.groups for s in found),
        failure=mean(lambda s: s.failure),
        mid=mean(lambda s: s.mid),
        high=mean(lambda s: s.high),
        zero_before=mean(lambda s: s.zero_before),
        zero_after=mean(lambda s: s.zero_after),
    )


def _runs(evidence: ReportInput) -> list[RunData]:
    return [run for configuration in evidence.configurations for run in configuration.runs]


def _even(values: tuple[T, ...], most: int) -> tuple[T, ...]:
    """Returns at most `most` values, evenly chosen."""
    stride = -(-len(values) // most)
    return values[:: max(1, stride)]
