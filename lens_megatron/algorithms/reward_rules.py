"""Applies the reward rules of a run to a grade, one after the other."""

from collections.abc import Sequence

from lens_megatron.algorithms.entry import Method
from lens_megatron.algorithms.rewards import RewardRule, RolloutFacts
from lens_megatron.errors import UserError
from lens_megatron.reward.adapters import MAX_SCORE
from lens_megatron.reward.types import Grade, GradeStatus
from lens_megatron.types import Origin, Prompt


class RewardRuleError(UserError):
    """A reward rule raised, or returned no grade; the message names it."""


def apply_rules(grade: Grade, facts: RolloutFacts, rules: Sequence[Method[RewardRule]]) -> Grade:
    """Returns the grade after all `rules`, in order. Raises RewardRuleError where one fails."""
    for rule in rules:
        grade = _apply(grade, facts, rule)
    return grade


def try_rules(rules: Sequence[Method[RewardRule]], prompt: Prompt, max_response_length: int) -> None:
    """Applies the rules to a made-up wrong answer to `prompt`, so that a mistake in one is found before any sampling.

    Raises RewardRuleError, or the rule's own UserError where its options do not fit the run.
    """
    facts = RolloutFacts(
        prompt=prompt,
        completion=prompt.problem,
        tokens=max(1, min(len(prompt.token_ids), max_response_length)),
        finished=True,
        origin=Origin.NATIVE,
        step=1,
        max_response_length=max_response_length,
        group_seed=0,
        rollout_seed=0,
    )
    apply_rules(Grade(GradeStatus.WRONG, 0.0, 0.0), facts, rules)


def _apply(grade: Grade, facts: RolloutFacts, rule: Method[RewardRule]) -> Grade:
    where = f"reward.rules: {rule.name}, on a rollout of row {facts.prompt.index} in step {facts.step}"
    try:
        found = rule.call(grade, facts, rule.options)
    except UserError:
        raise
    except Exception as error:  # the rule may be the user's, and may raise anything
        raise RewardRuleError(f"{where}: {type(error).__name__}: {error}; correct the rule") from error
    if not isinstance(found, Grade):
        raise RewardRuleError(f"{where}: returned a {type(found).__name__}; return a Grade (reward/types.py)")
    score = found.score
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= MAX_SCORE:
        raise RewardRuleError(
            f"{where}: returned the score {score!r}; return a finite number of at most {MAX_SCORE:g} in magnitude"
        )
    return found
