"""float64 truth for every operator: plain log-softmax and autograd, no clever algebra."""

import torch
from torch import Tensor


def log_softmax64(logits: Tensor, temperature: float | Tensor = 1.0, valid: int | None = None) -> Tensor:
    x = logits.double()
    if valid is not None:
        x = x[..., :valid]
    tau = torch.as_tensor(temperature, dtype=torch.float64)
    return (x / (tau[..., None] if tau.dim() else tau)).log_softmax(-1)


def logprobs_and_entropy(logits: Tensor, ids: Tensor, temperature=1.0, valid: int | None = None):
    table = log_softmax64(logits, temperature, valid)
    chosen = table.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    entropy = -(table.exp() * table.masked_fill(table == -torch.inf, 0)).sum(-1)
    ignored = ids < 0
    return chosen.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)


def crpo(logp: Tensor, entropy: Tensor, ids: Tensor, *, old, advantages, reference, pw, kw, ew, low, high, dual):
    """Per-token losses; differentiable."""
    old = torch.where(old.isnan(), logp.detach(), old)
    ratio = (logp - old).clamp(-20, 20).exp()
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
    u = (reference - logp).clamp(-20, 20)
    kl = (u.exp() - u - 1).clamp(max=10)
    return (pw * loss + kw * kl - ew * entropy).masked_fill(ids < 0, 0), ratio, kl
