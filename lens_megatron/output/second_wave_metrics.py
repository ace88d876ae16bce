"""Computes the metrics of second waves, `lens/*`: how many there were, what they changed, and what they cost.

They are the same for every method that makes the prompts of second waves.
"""

from collections.abc import Sequence

from lens_megatron.output.tally import Metrics, Tally
from lens_megatron.types import Origin, Prompt, PurifiedPrompt, Rollout, TrainingGroup


def tally_second_waves(tally: Tally, groups: Sequence[TrainingGroup]) -> None:
    """Adds the metrics `lens/*` of this data-parallel rank's groups, those that the selection rejected among them."""
    rescue = [r for g in groups for r in g.group.rescue]
    second = [g for g in groups if g.group.rescue]
    tally.mean("lens/purified_rate", [float(bool(g.group.rescue)) for g in groups])
    tally.mean("lens/gate_rate", [float(g.gate) for g in second])
    tally.mean("lens/rescued_rate", [float(g.gate) for g in groups])
    tally.total("lens/prompts", len(groups))
    tally.total("lens/purified_prompts", len(second))
    tally.total("lens/rescued_prompts", sum(g.gate for g in groups))
    tally.total("lens/extra_rollouts", len(rescue))
    tally.total("lens/second_wave_tokens", sum(len(r.token_ids) for r in rescue))
    tally.mean("lens/rescued_per_prompt", [float(_rescued(g)) for g in second if g.gate])
    purified = [(g.group.prompt, g.group.purified) for g in second if g.group.purified is not None]
    tally.mean("lens/deleted_tokens", [float(len(p.deleted)) for _, p in purified])
    tally.mean("lens/score_deleted", [p.scores[i] for _, p in purified for i in p.deleted])
    tally.mean("lens/score_kept", [score for prompt, p in purified for score in _kept_scores(prompt, p)])
    tally.mean("lens/success_before", [g.group.success_rate for g in second])
    tally.mean("lens/success_purified", [float(r.correct) for r in rescue])
    tally.mean("lens/zero_variance_before", [float(_constant(g.group.native)) for g in groups])
    tally.mean("lens/zero_variance_after", [float(_constant(g.rollouts)) for g in groups])
    tally.total("lens/destroyed_groups", sum(_is_destroyed(g) for g in groups))


def _is_destroyed(group: TrainingGroup) -> bool:
    """Returns whether the first wave had successes and failures, and the open gate left rewards that are all equal.

    That happens where it replaces every failure: nothing is left to learn from.
    """
    return group.gate and len({r.correct for r in group.group.native}) == 2 and _constant(group.rollouts)


def _rescued(group: TrainingGroup) -> int:
    return sum(r.origin is Origin.PURIFIED for r in group.rollouts)


def _kept_scores(prompt: Prompt, purified: PurifiedPrompt) -> list[float]:
    """Returns the purifier's numbers of the eligible tokens that were not deleted; see `PurifiedPrompt.scores`."""
    deleted = set(purified.deleted)
    return [score for i, score in enumerate(purified.scores) if prompt.eligible[i] and i not in deleted]


def _constant(rollouts: tuple[Rollout, ...]) -> bool:
    return len({r.reward for r in rollouts}) == 1


def extra_cost(metrics: Metrics, *, purifies: bool) -> Metrics:
    """Returns what second waves cost in a step of all ranks, whatever method made their prompts.

    `lens/extra_tokens` are the response tokens of second waves, those of cancelled ones included.
    `lens/extra_seconds` are `timing_s/score`, the time in which the trainer computes what the method decides by, plus
    `timing_s/second_wave`, the time for which second waves go on when all first waves have ended. What an engine does
    for second waves while first waves run adds no seconds. With `rollout.off_policy_steps=1` the trainer trains during
    the second of the two.

    Args:
        metrics: all others of the step.
        purifies: False where no method makes prompts for second waves, so that there are none and no cost.
    """
    seconds = metrics.get("timing_s/score", 0.0) + metrics["timing_s/second_wave"] if purifies else 0.0
    tokens = metrics["lens/second_wave_tokens"] + metrics["lens/discarded_tokens"]
    return {"lens/extra_tokens": tokens, "lens/extra_seconds": seconds}
