"""Defines the operators that start from hidden states, and their peers. All N = B * S rows take part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators.inputs import KL_WEIGHT, LinearInputs
from benchmarks.operators.peers import (
    COMPILED_TRITON,
    CUTE,
    CUTLASS,
    TRITON,
    Package,
    Peer,
    compiled,
    import_alone,
    loss_of_logprobs,
    ours,
)

LIGER = {"distribution": "liger-kernel"}
LIGER_GRPO = {"module": "liger_kernel.chunked_loss.grpo_loss", **LIGER}
LIGER_FLCE = {"module": "liger_kernel.ops.fused_linear_cross_entropy", "needs_cuda": TRITON, **LIGER}
LIGER_SCALED_MODULE = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
LIGER_SCALED = {"module": LIGER_SCALED_MODULE, "majors": (8, 10, 11, 12), **LIGER}
"""On Hopper the same call takes kernels in CuTe, which is the next entry; elsewhere it is plain PyTorch."""
LIGER_CUTE = {"needs_cuda": CUTE, "extras": CUTLASS, **LIGER}
LIGER_SCALED_CUTE = {"module": LIGER_SCALED_MODULE, "majors": (9,), **LIGER_CUTE}
LIGER_CUTE_OPS = "liger_kernel.ops.cutedsl.ops"
LIGER_FLCE_HOPPER = {
    "module": f"{LIGER_CUTE_OPS}.fused_linear_cross_entropy_sm90",
    "majors": (9,),
    "vocab_multiple": 256,
    **LIGER_CUTE,
}
LIGER_FLCE_BLACKWELL = {"module": f"{LIGER_CUTE_OPS}.fused_linear_cross_entropy", "majors": (10,), **LIGER_CUTE}
QUACK = {
    "module": "quack.linear_cross_entropy",
    "distribution": "quack-kernels",
    "extras": (*CUTLASS, Package("einops", "einops")),
    "needs_cuda": CUTE,
    "majors": (9, 10, 11, 12),
}
CHUNKED = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
TORCH = {"too_old": "" if CHUNKED else "absent before torch 2.13"}
CCE = {"module": "cut_cross_entropy", "distribution": "cut-cross-entropy", "needs_cuda": COMPILED_TRITON}
FLA = {
    "module": "fla.modules.fused_linear_cross_entropy",
    "distribution": "flash-linear-attention",
    "needs_cuda": TRITON,
}
VERL = {"module": "verl.utils.kernel.linear_cross_entropy", "distribution": "verl", "needs_cuda": COMPILED_TRITON}
ROUNDED = "logits rounded to the operands' dtype"
WAITS = "checks the ids first, its default, for which the host waits"
SCALAR_ONLY = "unsupported: only the mean cross entropy, no weight per token"


def logprobs_of(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """[B, S, H], [V, H], [B, S] -> [B, S] float32: as trainers write it in plain PyTorch."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, ids[..., None])[..., 0]


def loss_of(hidden: Tensor, weight: Tensor, ids: Tensor, reference_logprobs: Tensor, advantages: Tensor) -> Tensor:
    return loss_of_logprobs(logprobs_of(hidden, weight, ids), reference_logprobs, advantages)


def cross_entropy_of(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1).float(), ids.flatten())


def _float32_logprobs(x: LinearInputs) -> Tensor:
    logits = torch.mm(x.hidden.flatten(0, 1), x.weight.T, out_dtype=torch.float32)
    return torch.log_softmax(logits, -1).gather(-1, x.ids.view(-1, 1)).view(x.ids.shape)


def _torch_logprobs(x: LinearInputs) -> Tensor:
    hidden, ids, options = x.hidden.flatten(0, 1), x.ids.flatten(), torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, x.weight, ids, reduction="none", options=options).view(x.ids.shape)


def _torch_cross_entropy(x: LinearInputs, chunked: bool) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return F.linear_cross_entropy(x.hidden.flatten(0, 1), x.weight, x.ids.flatten(), options=options)


def _cce_logprobs(x: LinearInputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(x.hidden, x.weight, x.ids, reduction="none")


def _unfiltered_cce_logprobs(x: LinearInputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(x.hidden, x.weight, x.ids, reduction="none", filter_eps=None)


def _cce_cross_entropy(x: LinearInputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.hidden, x.weight, x.ids)


def _unfiltered_cce_cross_entropy(x: LinearInputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.hidden, x.weight, x.ids, filter_eps=None)


def _quack_logprobs(x: LinearInputs) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    hidden, ids = x.hidden.flatten(0, 1), x.ids.flatten()
    nll = linear_cross_entropy_func(hidden, x.weight, None, ids, reduction="none", inplace_backward=True)
    return -nll.view(x.ids.shape)


def _quack_cross_entropy(x: LinearInputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x.hidden.flatten(0, 1), x.weight, x.ids.flatten())


def _verl_logprobs(x: LinearInputs) -> Tensor:
    verl = import_alone(VERL["module"])
    logprobs, _ = verl.linear_cross_entropy(x.hidden.flatten(0, 1), x.weight, x.ids.flatten(), 1.0, "none", None)
    return logprobs.view(x.ids.shape)


def _liger_scaled_logprobs(x: LinearInputs) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(x.hidden.flatten(0, 1), x.weight, x.ids.flatten(), 1.0)
    return -nll.view(x.ids.shape)


def _liger_hopper_cross_entropy(x: LinearInputs) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return liger_fused_linear_cross_entropy_sm90(x.hidden.flatten(0, 1), x.weight, x.ids.flatten())


def _liger_blackwell_cross_entropy(x: LinearInputs) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x.hidden.flatten(0, 1), x.weight, x.ids.flatten())[0]


def _liger_grpo(x: LinearInputs) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    # bnpo is the mean over tokens; a chunk is one sequence, Liger's default.
    loss = LigerFusedLinearGRPOLoss(beta=KL_WEIGHT, loss_type="bnpo", compiled=x.hidden.is_cuda)
    mask = torch.ones_like(x.reference_logprobs)
    reference = x.reference_logprobs
    return loss(x.hidden, x.weight, x.ids, mask, x.advantages, ref_per_token_logps=reference)[0]


def _liger_cross_entropy(x: LinearInputs) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x.hidden.flatten(0, 1), x.weight, x.ids.flatten())[0]


def _fla_cross_entropy(x: LinearInputs) -> Tensor:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return fused_linear_cross_entropy_loss(x.hidden.flatten(0, 1), x.ids.flatten(), x.weight)


def _our_loss(function, x: LinearInputs) -> Tensor:
    weight = 1 / x.ids.numel()
    return function(
        x.hidden,
        x.weight,
        x.ids,
        advantages=x.advantages[:, None],
        reference_logprobs=x.reference_logprobs,
        policy_weights=weight,
        kl_weights=KL_WEIGHT * weight,
    ).loss


def _our_cross_entropy(function, x: LinearInputs) -> Tensor:
    weight = 1 / x.ids.numel()
    return function(x.hidden, x.weight, x.ids, objective=lambda logprobs, entropy, part: -weight * logprobs).loss


def _on_top(logprobs_of_peer):
    """Computes the policy loss in plain PyTorch from a peer's differentiable log-probabilities."""
    return lambda x: loss_of_logprobs(logprobs_of_peer(x), x.reference_logprobs, x.advantages)


FILTERED = "by default leaves out blocks with softmax below 2**-12, so that its gradients are not the full ones"
FULL = "filter_eps=None: the full gradients"

LINEAR_TOKEN_LOGPROBS = (
    ours("linear_token_logprobs", lambda function, x: function(x.hidden, x.weight, x.ids)),
    Peer(name="PyTorch eager", forward=lambda x: logprobs_of(x.hidden, x.weight, x.ids), note=ROUNDED),
    Peer(
        name="PyTorch eager, float32 logits",
        forward=_float32_logprobs,
        needs_cuda="torch.mm(out_dtype=) has no CPU form",
        note="torch.mm(out_dtype=float32): logits never rounded, as ours",
    ),
    Peer(name="torch.compile", forward=lambda x: compiled(logprobs_of)(x.hidden, x.weight, x.ids), note=ROUNDED),
    Peer(
        name="torch linear_cross_entropy, chunked",
        forward=_torch_logprobs,
        note="float32 logits; log-probabilities rounded to the operands' dtype",
        **TORCH,
    ),
    Peer(name="Liger scaled cross entropy", forward=_liger_scaled_logprobs, note=ROUNDED, **LIGER_SCALED),
    Peer(name="Liger scaled cross entropy, CuTe", forward=_liger_scaled_logprobs, note=WAITS, **LIGER_SCALED_CUTE),
    Peer(name="cut-cross-entropy", forward=_cce_logprobs, **CCE),
    Peer(name="verl linear_cross_entropy", forward=_verl_logprobs, note="entropy too", **VERL),
    Peer(name="QuACK linear_cross_entropy", forward=_quack_logprobs, note=f"{ROUNDED}, all kept", **QUACK),
)
LINEAR_POLICY_LOSS = (
    ours("linear_policy_loss", _our_loss),
    Peer(
        name="PyTorch eager",
        forward=lambda x: loss_of(x.hidden, x.weight, x.ids, x.reference_logprobs, x.advantages),
        note=ROUNDED,
    ),
    Peer(
        name="torch.compile",
        forward=lambda x: compiled(loss_of)(x.hidden, x.weight, x.ids, x.reference_logprobs, x.advantages),
        note=ROUNDED,
    ),
    Peer(
        name="torch linear_cross_entropy + loss",
        forward=_on_top(_torch_logprobs),
        note="chunked; log-probabilities rounded to the operands' dtype",
        **TORCH,
    ),
    Peer(name="Liger fused linear GRPO", forward=_liger_grpo, note=ROUNDED, **LIGER_GRPO),
    Peer(
        name="Liger scaled cross entropy + loss",
        forward=_on_top(_liger_scaled_logprobs),
        note=ROUNDED,
        **LIGER_SCALED,
    ),
    Peer(
        name="Liger scaled cross entropy, CuTe + loss",
        forward=_on_top(_liger_scaled_logprobs),
        note=WAITS,
        **LIGER_SCALED_CUTE,
    ),
    Peer(name="cut-cross-entropy + loss", forward=_on_top(_cce_logprobs), note=FILTERED, **CCE),
    Peer(name="cut-cross-entropy, unfiltered + loss", forward=_on_top(_unfiltered_cce_logprobs), note=FULL, **CCE),
    Peer(name="verl linear_cross_entropy + loss", forward=_on_top(_verl_logprobs), **VERL),
    Peer(
        name="QuACK linear_cross_entropy + loss",
        forward=_on_top(_quack_logprobs),
        note=f"{ROUNDED}, all kept",
        **QUACK,
    ),
    Peer(name="Liger fused linear cross entropy", forward=_liger_cross_entropy, unsupported=SCALAR_ONLY, **LIGER_FLCE),
    Peer(name="fla fused linear cross entropy", forward=_fla_cross_entropy, unsupported=SCALAR_ONLY, **FLA),
)
LINEAR_CROSS_ENTROPY = (
    ours("linear_policy_loss", _our_cross_entropy),
    Peer(name="PyTorch eager", forward=lambda x: cross_entropy_of(x.hidden, x.weight, x.ids), note=ROUNDED),
    Peer(name="torch.compile", forward=lambda x: compiled(cross_entropy_of)(x.hidden, x.weight, x.ids), note=ROUNDED),
    Peer(
        name="torch linear_cross_entropy",
        forward=lambda x: _torch_cross_entropy(x, chunked=False),
        note="its default, without chunks: the softmax in the operands' dtype too",
        **TORCH,
    ),
    Peer(
        name="torch linear_cross_entropy, chunked",
        forward=lambda x: _torch_cross_entropy(x, chunked=True),
        note="float32 logits; weight gradient summed in the operands' dtype",
        **TORCH,
    ),
    Peer(
        name="Liger fused linear cross entropy",
        forward=_liger_cross_entropy,
        note=f"{ROUNDED}, weight gradient summed in that dtype",
        **LIGER_FLCE,
    ),
    Peer(
        name="Liger fused linear cross entropy, CuTe for Hopper",
        forward=_liger_hopper_cross_entropy,
        note=ROUNDED,
        **LIGER_FLCE_HOPPER,
    ),
    Peer(
        name="Liger fused linear cross entropy, CuTe for Blackwell",
        forward=_liger_blackwell_cross_entropy,
        note=ROUNDED,
        **LIGER_FLCE_BLACKWELL,
    ),
    Peer(name="fla fused linear cross entropy", forward=_fla_cross_entropy, note=ROUNDED, **FLA),
    Peer(name="cut-cross-entropy", forward=_cce_cross_entropy, note=FILTERED, **CCE),
    Peer(name="cut-cross-entropy, unfiltered", forward=_unfiltered_cce_cross_entropy, note=FULL, **CCE),
    Peer(name="QuACK chunked_linear_cross_entropy", forward=_quack_cross_entropy, note=ROUNDED, **QUACK),
)


def true_logprobs(x: LinearInputs) -> Tensor:
    logits = x.hidden.double() @ x.weight.double().T
    return torch.log_softmax(logits, -1).gather(-1, x.ids[..., None])[..., 0]


def true_loss(x: LinearInputs) -> Tensor:
    return loss_of_logprobs(true_logprobs(x), x.reference_logprobs.double(), x.advantages.double())


def true_cross_entropy(x: LinearInputs) -> Tensor:
    return -true_logprobs(x).mean()
