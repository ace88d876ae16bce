"""Bundles samples of the same prompt, whose tokens are then computed once for all of them, by pure functions."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from lens_megatron.batch.balance import cost


@dataclass(frozen=True, slots=True)
class Bundle:
    """Samples that stay together: they share the rows of their prompt, or it is a single one."""

    members: tuple[int, ...]
    """Indices of the samples, ascending."""
    tokens: int
    """The rows that they take, without padding: those of the prompt once, and those of every response."""
    cost: int
    """The relative cost of these rows in a layer; see `balance.cost`."""


@dataclass(frozen=True, slots=True)
class SampleSize:
    """What bundling needs to know of a sample."""

    prompt: Hashable
    """Samples with an equal one have the same prompt."""
    prompt_tokens: int
    response_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens


def single(sizes: Sequence[SampleSize], hidden_size: int) -> list[Bundle]:
    """Returns one bundle per sample, in their order."""
    return [Bundle((i,), size.tokens, cost(size.tokens, hidden_size)) for i, size in enumerate(sizes)]


def by_prompt(
    sizes: Sequence[SampleSize],
    hidden_size: int,
    *,
    max_tokens: float = math.inf,
    max_cost: float = math.inf,
) -> list[Bundle]:
    """Returns bundles of samples with the same prompt, in the order of the prompts' first samples.

    Args:
        max_tokens: the most tokens of a bundle of several samples.
        max_cost: the highest cost of such a bundle.
    """
    alike: dict[Hashable, list[int]] = {}
    for i, size in enumerate(sizes):
        alike.setdefault(size.prompt, []).append(i)
    found = []
    for indices in alike.values():
        prompt = sizes[indices[0]].prompt_tokens
        alone = cost(prompt, hidden_size)
        members: list[int] = []
        tokens, spent = prompt, alone
        for i in indices:
            length = sizes[i].response_tokens
            added = cost(prompt + length, hidden_size) - alone
            if members and (tokens + length > max_tokens or spent + added > max_cost):
                found.append(Bundle(tuple(members), tokens, spent))
                members, tokens, spent = [], prompt, alone
            members.append(i)
            tokens, spent = tokens + length, spent + added
        found.append(Bundle(tuple(members), tokens, spent))
    return found
