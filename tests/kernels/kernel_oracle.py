"""The operators written once more, in float64 PyTorch with the full softmax and plain autograd."""

import math

import torch
from torch import Tensor


def statistics(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor | float = 1.0,
    valid_vocab_size: int | None = None,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), 0 on ignored rows; differentiable by float64 logits [..., V]."""
    assert logits.dtype == torch.float64
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.double().expand(token_ids.shape)[..., None]
    if valid_vocab_size is not None:
        logits = logits.masked_fill(torch.arange(logits.shape[-1]) >= valid_vocab_size, -torch.inf)
    logp = torch.log_softmax(logits / temperature, -1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    target = logp.gather(-1, token_ids.clamp(min=0).long()[..., None])[..., 0]
    ignored = token_ids < 0
    return torch.where(ignored, 0, target), torch.where(ignored, 0, entropy)


def token_losses(
    logprobs: Tensor,
    entropy: Tensor,
    *,
    old_logprobs=None,
    advantages,
    reference_logprobs=None,
    policy_weights=1.0,
    kl_weights=0.0,
    entropy_weights=0.0,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    kl_limit=None,
    kl_estimator="k3",
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, ratio, kl) per row, as algorithms on paper have them."""
    advantages = torch.as_tensor(advantages, dtype=torch.float64).expand(logprobs.shape)
    old = logprobs.detach() if old_logprobs is None else old_logprobs.double().expand(logprobs.shape)
    old = torch.where(old.isnan(), logprobs.detach(), old)
    ratio = (logprobs - old).clamp(-20, 20).exp()
    policy = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        policy = torch.where(advantages < 0, torch.minimum(policy, -dual_clip * advantages), policy)
    kl = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        d = (reference_logprobs.double() - logprobs).clamp(-20, 20)
        kl = {"k1": -d, "k2": d * d / 2, "k3": d.expm1() - d}[kl_estimator]
        kl = kl.clamp(max=math.inf if kl_limit is None else kl_limit)
    return policy_weights * policy + kl_weights * kl - entropy_weights * entropy, ratio, kl


def assert_rows_near(actual: Tensor, expected: Tensor, tolerance: float, slack: Tensor | float = 0.0) -> None:
    """Gradients [..., V]: error at most tolerance * (the row's largest entry) + slack; zero rows must be exact."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    largest = expected.abs().amax(-1, keepdim=True)
    bound = tolerance * largest + torch.as_tensor(slack)[..., None] * (largest > 0)
    excess = ((actual.double() - expected).abs() - bound).amax() if actual.numel() else torch.tensor(0.0)
    assert excess <= 0, f"error exceeds the bound by {excess}"


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Results [...]: error at most tolerance * max(1, |expected|)."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
