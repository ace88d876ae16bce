"""This project's way from rewards to a loss and its gradient, `to_samples` -> `pack` -> `losses`, in float64.

The trainer works in float32. All inputs are numbers that float32 has, and what `pack` returns is turned into float64
before the loss, so that only the weights of tokens are rounded (6e-8).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import pytest
import torch
from chosen import method, objective
from records import PROMPT
from torch import Tensor

from lens_megatron.algorithms.registry import Kind
from lens_megatron.algorithms.samples import to_samples
from lens_megatron.batch import pack
from lens_megatron.config import AlgorithmConfig
from lens_megatron.reward.types import GradeStatus
from lens_megatron.types import Group, GroupNumbers, Origin, Rollout, Sample, TokenTerms, TrainingGroup, TrainingRow

LIMIT = 9
"""`rollout.max_response_length`."""


@dataclass(frozen=True)
class Responses:
    """Groups of responses, group by group; log-probabilities are [L] of each response, float64."""

    rewards: list[list[float]]
    log_probs: list[Tensor]
    old: list[Tensor]
    """Those of the first response are its `log_probs`: it is on-policy."""
    reference: list[Tensor]
    engine: list[Tensor]
    finished: list[bool]
    """Every fourth response is not."""

    @property
    def groups(self) -> list[int]:
        return [index for index, group in enumerate(self.rewards) for _ in group]

    @property
    def flat_rewards(self) -> list[float]:
        return [reward for group in self.rewards for reward in group]

    @property
    def mask(self) -> Tensor:
        return padded([torch.ones_like(part) for part in self.log_probs])


def random_responses(seed: int, sizes: Sequence[int] = (4, 2, 3), extreme: bool = False) -> Responses:
    """Ratios on both sides of every clip, dual clip too; `extreme`: a few of e^25 and e^-25."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    lengths = torch.randint(1, LIMIT + 1, (count,), generator=generator).tolist()

    def normal(length: int, scale: float) -> Tensor:
        return scale * torch.randn(length, generator=generator)

    new = [-4 * torch.rand(length, generator=generator) - 0.05 for length in lengths]
    old = [part + normal(len(part), 0.8) for part in new]
    old[0] = new[0]
    if extreme:
        old[1][0], old[2][-1] = new[1][0] - 25, new[2][-1] + 25
    rewards = (torch.rand(count, generator=generator) + torch.randint(0, 2, (count,), generator=generator)).split(
        list(sizes)
    )
    return Responses(
        [group.double().tolist() for group in rewards],
        [part.double() for part in new],
        [part.double() for part in old],
        [(part + normal(len(part), 1.0)).double() for part in new],
        [(part + normal(len(part), 0.3)).double() for part in old],
        [number % 4 != 2 for number in range(count)],
    )


def padded(parts: Sequence[Tensor]) -> Tensor:
    """[N, T], with zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


class OurLoss(NamedTuple):
    loss: float
    magnitude: float
    """The sum over tokens of the absolute losses, by which the loss is compared: it is a sum of both signs."""
    gradient: Tensor
    """[N, T] by the log-probabilities."""
    clipped: float
    """The mean over tokens."""


def assert_equal(found: OurLoss, expected: dict) -> None:
    """`expected` is what an oracle's function of that purpose returned."""
    assert found.loss == pytest.approx(expected["loss"], abs=1e-6 * found.magnitude)
    assert_gradients_equal(found.gradient, expected["gradient"])


def assert_gradients_equal(found: Tensor, expected: list) -> None:
    """Policy and KL may pull a token both ways: where they cancel, the rounding of the weights is what is left."""
    largest = found.abs().max().item()
    assert largest > 0
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7 * largest)


def our_loss(responses: Responses, algorithm: AlgorithmConfig, **objective_options: float) -> OurLoss:
    kept = [sample.keep for sample in our_samples(responses, algorithm)]
    terms = in_float64(token_terms(responses, algorithm))
    parts = [part.clone().requires_grad_() for part in responses.log_probs]
    log_probs = torch.cat([part for part, keep in zip(parts, kept, strict=True) if keep])
    found = objective(algorithm, **objective_options).losses(log_probs, torch.zeros_like(log_probs), terms, algorithm)
    assert found.losses.dtype == torch.float64
    found.losses.sum().backward()
    gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
    losses = found.losses.detach()
    return OurLoss(losses.sum().item(), losses.abs().sum().item(), padded(gradients), found.clipped.mean().item())


def our_advantages(responses: Responses, algorithm: AlgorithmConfig) -> list[float]:
    return [sample.advantage for sample in our_samples(responses, algorithm)]


def our_samples(responses: Responses, algorithm: AlgorithmConfig) -> list[Sample]:
    groups = training_groups(responses)
    advantage = method(Kind.ADVANTAGES, algorithm.advantage)
    return to_samples(groups, list(map(GroupNumbers.of, groups)), advantage, algorithm)


def token_terms(responses: Responses, algorithm: AlgorithmConfig) -> TokenTerms:
    """Those of the samples that are kept, as phases/update.py leaves the others out."""
    columns = zip(our_samples(responses, algorithm), responses.old, responses.reference, strict=True)
    rows = [
        TrainingRow(sample, old if number else None, old, reference)
        for number, (sample, old, reference) in enumerate(columns)
        if sample.keep
    ]
    samples = [row.sample for row in rows]
    (batch,) = pack.pack(
        rows,
        scale=pack.count(samples),
        algorithm=algorithm,
        max_response_length=LIMIT,
        parts=[range(len(rows))],
        device=torch.device("cpu"),
    )
    return batch.terms


def training_groups(responses: Responses) -> list[TrainingGroup]:
    engine = zip(responses.engine, responses.finished, strict=True)
    groups = []
    for place, rewards in enumerate(responses.rewards):
        rollouts = tuple(rollout(reward, *next(engine)) for reward in rewards)
        groups.append(TrainingGroup(Group(PROMPT, rollouts, place=place), rollouts, gate=False))
    return groups


def rollout(reward: float, engine: Tensor, finished: bool) -> Rollout:
    status = GradeStatus.CORRECT if reward >= 1 else GradeStatus.WRONG
    return Rollout((1,) * len(engine), tuple(engine.tolist()), finished, Origin.NATIVE, 0, reward, status)


def in_float64(terms: TokenTerms) -> TokenTerms:
    named = {field.name: getattr(terms, field.name) for field in fields(terms)}
    return replace(terms, **{name: t.double() for name, t in named.items() if t.dtype == torch.float32})
