"""Defines operators that start from logits, and their peers. A sequence's last of S rows has no target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.operators.inputs import KL_WEIGHT, LogitsInputs
from benchmarks.operators.peers import (
    COMPILED_TRITON,
    CUTE,
    CUTLASS,
    TRITON,
    Package,
    Peer,
    compiled,
    loss_of_logprobs,
    one_rank_group,
    ours,
)

LIGER = {"distribution": "liger-kernel", "needs_cuda": TRITON}
FLA = {"distribution": "flash-linear-attention", "needs_cuda": TRITON}
FLA_COMPILED = {**FLA, "needs_cuda": COMPILED_TRITON}
LIGER_GRPO, LIGER_CE = "liger_kernel.ops.grpo_loss", "liger_kernel.ops.cross_entropy"
FLA_GRPO, FLA_CE = "fla.modules.grpo", "fla.modules.fused_cross_entropy"
QUACK = {
    "module": "quack.cross_entropy",
    "distribution": "quack-kernels",
    "extras": (*CUTLASS, Package("einops", "einops")),
    "needs_cuda": CUTE,
    "majors": (9, 10, 11, 12),
}
LIGER_CUTE = {
    "module": "liger_kernel.ops.cutedsl.ops.cross_entropy",
    "distribution": "liger-kernel",
    "extras": CUTLASS,
    "needs_cuda": CUTE,
    "majors": (9, 10),
}
ROUNDED_ROWS = "log-probabilities rounded to the logits' dtype"
WAITS = "reads counts of the ids back first, for which the host waits"
ONE_RANK = "in a process group of one rank, so that its collectives are copies"
MEGATRON = {
    "module": "megatron.core.fusions.fused_cross_entropy",
    "distribution": "megatron-core",
    "dtypes": (torch.bfloat16,),  # its gradients are bfloat16 whatever the logits are
    "session": one_rank_group,
}
TRANSFORMER_ENGINE = {
    "module": "transformer_engine.pytorch.cross_entropy",
    "distribution": "transformer-engine",
    "needs_cuda": "its kernels are Triton, and it refuses tensors of a CPU",
}


def logprobs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, S, V], [B, S - 1] -> [B, S - 1] float32: as trainers write it in plain PyTorch."""
    return torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, targets[..., None])[..., 0]


def weighted_logprobs_of(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (logprobs_of(logits, targets) * weights).sum()


def loss_of(logits: Tensor, targets: Tensor, reference_logprobs: Tensor, advantages: Tensor) -> Tensor:
    return loss_of_logprobs(logprobs_of(logits, targets), reference_logprobs, advantages)


def scores_of(logits: Tensor, reference_logits: Tensor, targets: Tensor) -> Tensor:
    return (logprobs_of(logits, targets) - logprobs_of(reference_logits, targets)).abs()


def _liger_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return fused_selective_log_softmax(logits, targets, temperature=1.0)


def _liger_cross_entropy(inputs: LogitsInputs) -> Tensor:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return _weighted_by_liger(LigerCrossEntropyFunction, inputs)


def _liger_cute_cross_entropy(inputs: LogitsInputs) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.cross_entropy import LigerCrossEntropyFunction

    return _weighted_by_liger(LigerCrossEntropyFunction, inputs)


def _weighted_by_liger(function: type[torch.autograd.Function], inputs: LogitsInputs) -> Tensor:
    rows, columns = inputs.ids.numel(), inputs.logits.shape[-1]
    arguments = (None, -1, 0.0, 0.0, "none")  # class weights, ignored id, z-loss, smoothing, reduction
    nll = function.apply(inputs.logits.view(rows, columns), inputs.ids.view(-1), *arguments)[0]
    return (-nll.view(inputs.ids.shape)[:, :-1] * inputs.weights).sum()


def _fla_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    flat = logits.view(ids.numel(), logits.shape[-1])
    nll, _ = cross_entropy_loss(flat, ids.view(-1), ignore_index=-1, inplace_backward=True)
    return -nll.view(ids.shape)[:, :-1]


def _liger_loss(inputs: LogitsInputs) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    per_token, _, _ = triton_grpo_loss(
        inputs.logits,
        None,
        inputs.target_reference_logprobs,
        inputs.targets,
        inputs.advantages,
        temperature=1.0,
        beta=KL_WEIGHT,
        eps_low=0.2,
        eps_high=0.2,
        inplace=True,
        reduce=False,
    )
    return per_token.mean()


def _fla_loss(inputs: LogitsInputs) -> Tensor:
    from fla.modules.grpo import fused_grpo_loss

    reference = inputs.target_reference_logprobs
    return fused_grpo_loss(
        inputs.logits, reference, inputs.targets, inputs.advantages, beta=KL_WEIGHT, inplace=True
    ).mean()


def _quack_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    flat = logits.view(ids.numel(), logits.shape[-1])
    nll = cross_entropy(flat, ids.view(-1), ignore_index=-1, reduction="none", inplace_backward=True)
    return -nll.view(ids.shape)[:, :-1]


def _megatron_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return -fused_vocab_parallel_cross_entropy(logits, ids, torch.distributed.group.WORLD)[:, :-1]


def _transformer_engine_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return -parallel_cross_entropy(logits, ids, ignore_idx=-1, overwrite_input=True)[:, :-1]


def _weighted(logprobs_of_peer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[LogitsInputs], Tensor]:
    return lambda x: (logprobs_of_peer(x.logits, x.ids) * x.weights).sum()


def _on_top(logprobs_of_peer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[LogitsInputs], Tensor]:
    """Computes the policy loss in plain PyTorch from a peer's differentiable log-probabilities."""
    return lambda x: loss_of_logprobs(logprobs_of_peer(x.logits, x.ids), x.target_reference_logprobs, x.advantages)


def _our_loss(function, inputs: LogitsInputs) -> Tensor:
    weight = 1 / inputs.targets.numel()
    return function(
        inputs.logits,
        inputs.ids,
        old_logprobs=None,
        advantages=inputs.advantages[:, None],
        reference_logprobs=inputs.reference_logprobs,
        policy_weights=weight,
        kl_weights=KL_WEIGHT * weight,
        inplace_backward=True,
    ).loss


TOKEN_LOGPROBS = (
    ours("token_logprobs", lambda function, x: function(x.logits, x.ids)[:, :-1]),
    Peer(name="PyTorch eager", forward=lambda x: logprobs_of(x.logits, x.targets)),
    Peer(name="torch.compile", forward=lambda x: compiled(logprobs_of)(x.logits, x.targets)),
    Peer(
        name="Liger selective log-softmax",
        forward=lambda x: _liger_logprobs(x.logits, x.targets),
        module=LIGER_GRPO,
        **LIGER,
    ),
    Peer(name="fla cross entropy", forward=lambda x: _fla_logprobs(x.logits, x.ids), module=FLA_CE, **FLA),
    Peer(name="QuACK cross entropy", forward=lambda x: _quack_logprobs(x.logits, x.ids), **QUACK),
    Peer(
        name="Megatron-Core fused",
        forward=lambda x: _megatron_logprobs(x.logits, x.ids),
        note=ONE_RANK,
        **MEGATRON,
    ),
    Peer(
        name="Transformer Engine",
        forward=lambda x: _transformer_engine_logprobs(x.logits, x.ids),
        **TRANSFORMER_ENGINE,
    ),
)
TOKEN_LOGPROBS_BACKWARD = (
    ours(
        "token_logprobs",
        lambda function, x: (function(x.logits, x.ids, inplace_backward=True)[:, :-1] * x.weights).sum(),
        inplace=True,
    ),
    Peer(name="PyTorch eager", forward=lambda x: weighted_logprobs_of(x.logits, x.targets, x.weights)),
    Peer(
        name="torch.compile",
        forward=lambda x: compiled(weighted_logprobs_of)(x.logits, x.targets, x.weights),
    ),
    Peer(
        name="Liger cross entropy",
        forward=_liger_cross_entropy,
        module=LIGER_CE,
        inplace=True,
        rounds_rows=True,
        note=ROUNDED_ROWS,
        **LIGER,
    ),
    Peer(
        name="Liger cross entropy, CuTe",
        forward=_liger_cute_cross_entropy,
        inplace=True,
        rounds_rows=True,
        note=f"{ROUNDED_ROWS}; {WAITS}",
        **LIGER_CUTE,
    ),
    Peer(
        name="fla cross entropy",
        forward=_weighted(_fla_logprobs),
        module=FLA_CE,
        inplace=True,
        **FLA,
    ),
    Peer(name="QuACK cross entropy", forward=_weighted(_quack_logprobs), inplace=True, **QUACK),
    Peer(name="Megatron-Core fused", forward=_weighted(_megatron_logprobs), note=ONE_RANK, **MEGATRON),
    Peer(
        name="Transformer Engine",
        forward=_weighted(_transformer_engine_logprobs),
        inplace=True,
        **TRANSFORMER_ENGINE,
    ),
)
POLICY_LOSS = (
    ours("policy_loss", _our_loss, inplace=True),
    Peer(
        name="PyTorch eager",
        forward=lambda x: loss_of(x.logits, x.targets, x.target_reference_logprobs, x.advantages),
        note="no entropy",
    ),
    Peer(
        name="torch.compile",
        forward=lambda x: compiled(loss_of)(x.logits, x.targets, x.target_reference_logprobs, x.advantages),
        note="no entropy",
    ),
    Peer(
        name="Liger triton_grpo_loss",
        forward=_liger_loss,
        module="liger_kernel.transformers.grpo_loss",
        inplace=True,
        note="no entropy",
        **LIGER,
    ),
    Peer(
        name="fla fused_grpo_loss",
        forward=_fla_loss,
        module=FLA_GRPO,
        inplace=True,
        note="no entropy, on-policy only",
        **FLA_COMPILED,
    ),
    Peer(name="QuACK cross entropy + loss", forward=_on_top(_quack_logprobs), inplace=True, note="no entropy", **QUACK),
    Peer(
        name="Megatron-Core fused + loss",
        forward=_on_top(_megatron_logprobs),
        note=f"no entropy; {ONE_RANK}",
        **MEGATRON,
    ),
    Peer(
        name="Transformer Engine + loss",
        forward=_on_top(_transformer_engine_logprobs),
        inplace=True,
        note="no entropy",
        **TRANSFORMER_ENGINE,
    ),
)
INTERFERENCE_SCORES = (
    ours(
        "interference_scores",
        lambda function, x: function(x.logits, x.ids, reference_logits=x.reference_logits)[:, :-1],
    ),
    Peer(name="PyTorch eager", forward=lambda x: scores_of(x.logits, x.reference_logits, x.targets)),
    Peer(name="torch.compile", forward=lambda x: compiled(scores_of)(x.logits, x.reference_logits, x.targets)),
    Peer(
        name="Liger selective log-softmax, twice",
        forward=lambda x: (_liger_logprobs(x.logits, x.targets) - _liger_logprobs(x.reference_logits, x.targets)).abs(),
        module=LIGER_GRPO,
        **LIGER,
    ),
    Peer(
        name="fla cross entropy, twice",
        forward=lambda x: (_fla_logprobs(x.logits, x.ids) - _fla_logprobs(x.reference_logits, x.ids)).abs(),
        module=FLA_CE,
        **FLA,
    ),
    Peer(
        name="QuACK cross entropy, twice",
        forward=lambda x: (_quack_logprobs(x.logits, x.ids) - _quack_logprobs(x.reference_logits, x.ids)).abs(),
        **QUACK,
    ),
)


def true_logprobs(x: LogitsInputs, logits: Tensor | None = None) -> Tensor:
    logits = x.logits if logits is None else logits
    return torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, x.targets[..., None])[..., 0]


def true_weighted_logprobs(x: LogitsInputs) -> Tensor:
    return (true_logprobs(x) * x.weights).sum()


def true_loss(x: LogitsInputs) -> Tensor:
    return loss_of_logprobs(true_logprobs(x), x.target_reference_logprobs.double(), x.advantages.double())


def true_scores(x: LogitsInputs) -> Tensor:
    return (true_logprobs(x) - true_logprobs(x, x.reference_logits)).abs()
