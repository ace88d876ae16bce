"""Lowers the reward of responses that come close to the longest allowed one (DAPO, arXiv 2503.14476, eq. 13)."""

from pydantic import Field

from lens_megatron.algorithms.entry import Entry
from lens_megatron.algorithms.rewards import RolloutFacts
from lens_megatron.config import ConfigError, Section
from lens_megatron.reward.types import Grade


class OverlongOptions(Section):
    """The options of `overlong`."""

    cache: int | None = Field(None, ge=1)
    """The last tokens before rollout.max_response_length, over which the penalty grows from 0 to `factor`. When empty:
    a fifth of rollout.max_response_length, as in DAPO."""
    factor: float = Field(1.0, ge=0)
    """The penalty of the longest response."""


def overlong(grade: Grade, facts: RolloutFacts, options: OverlongOptions) -> Grade:
    """Returns r + min(-(|y| - (L_max - cache)) / cache * factor, 0), with the verdict unchanged.

    Raises ConfigError where the cache is longer than a response may be.
    """
    longest = facts.max_response_length
    cache = longest / 5 if options.cache is None else options.cache
    if cache > longest:
        raise ConfigError(
            f"reward.rules.overlong.cache ({options.cache}) exceeds rollout.max_response_length ({longest}), so that "
            "even an empty response would be too long; lower it"
        )
    penalty = min(-(facts.tokens - (longest - cache)) / cache * options.factor, 0.0)
    return grade.with_score(grade.score + penalty)


ENTRY = Entry(overlong, paper="DAPO, arXiv 2503.14476", options=OverlongOptions)
