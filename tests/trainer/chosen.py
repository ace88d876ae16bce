"""Methods as a run has chosen them, for tests that call one alone."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lens_megatron.algorithms.entry import Method
from lens_megatron.algorithms.policy_objective import Objective, policy_objective
from lens_megatron.algorithms.purification import PromptEvidence
from lens_megatron.algorithms.purify import purify_prompts
from lens_megatron.algorithms.registry import Kind, choose
from lens_megatron.algorithms.weights import loss_weights
from lens_megatron.config import AlgorithmConfig, LensConfig
from lens_megatron.types import GroupNumbers, Prompt, PurifiedPrompt, TrainingGroup


class Judgement(NamedTuple):
    advantages: tuple[float, ...]
    weights: tuple[float, ...]


def method(kind: Kind, name: str, **options) -> Method:
    return choose(kind, name, options, "option", "options")


def judge(group: TrainingGroup, algorithm: AlgorithmConfig, **options) -> Judgement:
    """Advantages and weights of one group that is alone in its step, by `algorithm.advantage`."""
    advantage = method(Kind.ADVANTAGES, algorithm.advantage, **options)
    (credits,) = advantage.call([group], [GroupNumbers.of(group)], algorithm, advantage.options)
    return Judgement(tuple(credit.advantage for credit in credits), tuple(loss_weights(group, algorithm)))


def objective(algorithm: AlgorithmConfig, **options) -> Objective:
    return policy_objective(algorithm, method(Kind.OBJECTIVES, algorithm.objective, **options))


def purify(
    prompts: Sequence[Prompt], scores: Sequence[Tensor], lens: LensConfig, seeds: Sequence[int], **options
) -> list[PurifiedPrompt | None]:
    """By `lens.purifier`, from the prompts' interference scores."""
    evidence = [PromptEvidence(scores=score) for score in scores]
    return purify_prompts(prompts, evidence, method(Kind.PURIFICATION, lens.purifier, **options), lens, seeds=seeds)
