"""Puts the chosen surrogate into the whole loss of a token: ratio, weights, KL, entropy and imitation.

loss = policy_weight * surrogate(ratio) + kl_weight * k3 - entropy_weight * H - imitation_weight * log p
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

import torch
from lens_kernels import k3
from lens_kernels.kl import LOG_RATIO_LIMIT
from torch import Tensor

from lens_megatron.algorithms.entry import Evidence, Method
from lens_megatron.algorithms.objectives import Surrogate
from lens_megatron.algorithms.objectives.clip import clip
from lens_megatron.config import AlgorithmConfig, ConfigError
from lens_megatron.types import TokenTerms


class ObjectiveResult(NamedTuple):
    """Losses of T tokens and what the metrics need; all are [T] float32."""

    losses: Tensor
    """Their sum is the micro-batch's loss; they carry a gradient."""
    ratio: Tensor
    """The ratio that the surrogate got, after `algorithm.rescued_ratio_floor`."""
    clipped: Tensor
    """1.0 where a clip holds, else 0."""
    kl: Tensor
    """The k3 estimate in nats, at most `algorithm.kl_limit`; 0 without a KL term."""


class PolicySlopes(NamedTuple):
    """Derivatives of the policy's part of the loss, weights included, by the T log-probabilities; [T] float32.

    They say how much of each token's gradient the ratio and its bounds leave. KL, entropy and imitation have no part.
    """

    taken: Tensor
    """Those of the loss as it is."""
    on_policy: Tensor
    """What they would be with every ratio at 1, as if the prompt that is trained on had generated the response."""


class FusedLossArguments(TypedDict):
    """Arguments of `lens_kernels.linear_policy_loss`, under their names there; the tensors are [T] float32."""

    old_logprobs: Tensor
    advantages: Tensor
    reference_logprobs: Tensor | None
    policy_weights: Tensor
    kl_weights: Tensor | None
    entropy_weights: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_limit: float | None


LossFunction = Callable[[Tensor, Tensor, TokenTerms, AlgorithmConfig], ObjectiveResult]
"""It takes (log-probabilities [T], entropies [T], terms of the T tokens, algorithm); all tensors are float32."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss and how the LM head computes it: by `fused` if that gives arguments, else by `losses`."""

    losses: LossFunction
    slopes: Callable[[Tensor, TokenTerms, AlgorithmConfig], PolicySlopes]
    """It takes (log-probabilities [T], terms of the T tokens, algorithm), and needs no pass over the model."""
    whole_sequences: bool = False
    """True: a token's loss depends on other tokens of its response, so the T tokens cannot be cut into chunks."""
    fused: Callable[[TokenTerms, AlgorithmConfig], FusedLossArguments | None] | None = None
    """Returns the arguments with which lens_kernels' own loss equals `losses`, or None where it cannot."""


def policy_objective(algorithm: AlgorithmConfig, surrogate: Method[Surrogate]) -> Objective:
    """Returns the loss of a run with this surrogate and `algorithm.ratio`.

    Its `losses` raise ConfigError where the surrogate returns anything but one number per token.
    """

    def losses(log_probs: Tensor, entropy: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig) -> ObjectiveResult:
        log_ratio = bounded_log_ratio(log_probs, terms, algorithm)
        found = surrogate.call(log_ratio, log_probs, terms, algorithm, surrogate.options)
        if found.losses.shape != log_probs.shape or found.clipped.shape != log_probs.shape:
            # Another shape might be broadcast: a mean instead of losses would train on something else without a word.
            raise ConfigError(
                f"algorithm.objective={surrogate.name} returned losses of shape {list(found.losses.shape)} and clipped "
                f"of shape {list(found.clipped.shape)} for {len(log_probs)} tokens; return one number per token in both"
            )
        kl = torch.zeros_like(log_probs)
        if algorithm.kl_coef:
            kl = k3(terms.reference_log_probs - log_probs, algorithm.kl_limit)
        total = (
            terms.policy_weights * found.losses
            + terms.kl_weights * kl
            - terms.entropy_weights * entropy
            - terms.imitation_weights * log_probs
        )
        ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        return ObjectiveResult(total, ratio, found.clipped, kl)

    def slopes(log_probs: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig) -> PolicySlopes:
        on_policy = replace(terms, old_log_probs=torch.full_like(terms.old_log_probs, math.nan))
        return PolicySlopes(*(_slopes(surrogate, log_probs, those, algorithm) for those in (terms, on_policy)))

    whole = algorithm.ratio != "token" or Evidence.WHOLE_RESPONSES in surrogate.needs
    can_fuse = surrogate.call is clip and not whole
    return Objective(losses, slopes, whole_sequences=whole, fused=fused_arguments if can_fuse else None)


def _slopes(surrogate: Method[Surrogate], log_probs: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig) -> Tensor:
    """Returns the derivatives [T] of the weighted surrogate by the log-probabilities, by autograd on T numbers."""
    with torch.enable_grad():
        leaf = log_probs.detach().requires_grad_()
        found = surrogate.call(bounded_log_ratio(leaf, terms, algorithm), leaf, terms, algorithm, surrogate.options)
        (slopes,) = torch.autograd.grad((terms.policy_weights * found.losses).sum(), leaf)
    return slopes


def fused_arguments(terms: TokenTerms, algorithm: AlgorithmConfig) -> FusedLossArguments | None:
    """Returns the clipped loss per token as arguments of lens_kernels' own; None where that has no such term.

    It knows neither an imitation term nor a floor of the ratio, which depends on the current log-probability.
    """
    if algorithm.imitation_coef or algorithm.rescued_ratio_floor:
        return None
    return FusedLossArguments(
        old_logprobs=terms.old_log_probs,
        advantages=terms.advantages,
        reference_logprobs=terms.reference_log_probs if algorithm.kl_coef else None,
        policy_weights=terms.policy_weights,
        kl_weights=terms.kl_weights if algorithm.kl_coef else None,
        entropy_weights=terms.entropy_weights if algorithm.entropy_coef else None,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        kl_limit=algorithm.kl_limit,
    )


def log_ratio_to_old(log_probs: Tensor, terms: TokenTerms) -> Tensor:
    """Returns log pi - log pi_old [T]; it is exactly 0, with the gradient of log pi, where the token is on-policy."""
    return log_probs - torch.where(terms.old_log_probs.isnan(), log_probs.detach(), terms.old_log_probs)


def generation_log_ratio(log_probs: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig) -> Tensor:
    """Returns log pi(y_t | x) - log pi_old(y_t | x') [T] in nats, x' being the prompt that generated the response.

    It says how well the prompt x that is trained on supports what x' has found, whatever ratio the loss uses. With
    `rescued_ratio=original_prompt` the trainer computes nothing under x' unless a correction needs it, and the engine's
    log-probabilities stand in. Elsewhere a token without a log-probability under x' is on-policy, and its log-ratio 0.
    """
    generated = terms.trainer_log_probs
    if algorithm.rescued_ratio == "original_prompt":
        generated = torch.where(generated.isnan(), terms.engine_log_probs, generated)
    return log_probs - torch.where(generated.isnan(), log_probs, generated)


def bounded_log_ratio(log_probs: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig) -> Tensor:
    """Returns the log-ratio [T] that the surrogate gets, raised to the log of `algorithm.rescued_ratio_floor`.

    The floor is for tokens of rescued responses with a positive advantage. Where rho is below it the ratio has the
    value of the floor and the gradient floor * grad log pi: the importance weight is bounded, and the policy gradient
    is kept. max(rho, floor), differentiated as it is written, would have no gradient just where rescue matters.
    Bounding only the weight, sg(max(rho, floor)) A log pi as in CISPO (arXiv 2506.13585), has the same gradient
    wherever no clip holds; here the ratio itself is bounded, so that PPO's upper clip still holds at 1 + clip_high. A
    negative advantage has no floor: PPO's lower clip is what stops the probability from falling further, and a floor
    above 1 - clip_low would undo it.
    """
    log_ratio = _log_ratio(log_probs, terms, algorithm)
    if not algorithm.rescued_ratio_floor:
        return log_ratio
    floor = math.log(algorithm.rescued_ratio_floor)
    below = terms.rescued & (terms.advantages > 0) & (log_ratio < floor)
    return torch.where(below, floor + (log_ratio - log_ratio.detach()), log_ratio)


def _log_ratio(log_probs: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig) -> Tensor:
    """Returns the log-ratio of each token, or of its response: then every token of a response has the same one.

    A response's ratio is the product over its tokens, or with `sequence_geometric` (GSPO, arXiv 2507.18071) their
    geometric mean. Its gradient is that of the response.
    """
    log_ratio = log_ratio_to_old(log_probs, terms)
    if algorithm.ratio == "token":
        return log_ratio
    total = _sum_per_response(log_ratio, terms)
    return total if algorithm.ratio == "sequence" else total / _sum_per_response(torch.ones_like(log_ratio), terms)


def _sum_per_response(values: Tensor, terms: TokenTerms) -> Tensor:
    """Sums per response, [T] -> [T]: every token gets the sum over the tokens of its response."""
    return torch.zeros_like(values).index_add(0, terms.first, values)[terms.first]
