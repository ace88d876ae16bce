"""Computes the gradients of micro-batches and takes one optimizer step."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import NamedTuple

import torch
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from torch import Tensor

from lens_megatron.algorithms.mismatch import mismatch_sums, sums_record
from lens_megatron.algorithms.policy_objective import Objective, generation_log_ratio
from lens_megatron.config import AlgorithmConfig
from lens_megatron.policy.forward import model_output, run_pipeline
from lens_megatron.policy.head import MicroBatchLoss, micro_batch_loss
from lens_megatron.policy.model import Policy
from lens_megatron.policy.rescued_ratios import ResponseRatios, gather_rescued, response_ratios
from lens_megatron.results import MismatchSums, RescuedRatios, UpdateStats
from lens_megatron.types import LossScale, MicroBatch, TokenTerms

COMPARED = len(fields(MismatchSums)) - 1
SUMS, EXTREMES = 11 + 2 * COMPARED, 4
"""Lengths of the two parts of the vector that `_sums` makes of a micro-batch."""


class _Numbers(NamedTuple):
    """The numbers of a micro-batch that metrics are made of."""

    sums: Tensor
    """[SUMS + EXTREMES] float64"""
    ratios: ResponseRatios


def optimizer_step(
    policy: Policy,
    batches: Sequence[MicroBatch],
    scale: LossScale,
    objective: Objective,
    algorithm: AlgorithmConfig,
    temperature: float,
) -> UpdateStats:
    """Takes one optimizer step on this data-parallel rank's micro-batches. A collective over all ranks.

    The loss is the sum over all micro-batches of all ranks, whose weights already hold the global denominators, so
    neither the layout nor the cut into micro-batches changes it. With a loss or gradient that is not finite no step is
    taken and the statistics say `skipped`.
    """
    numbers = compute_gradients(policy, batches, objective, algorithm, temperature)
    sums, extremes = _reduce(policy, [part.sums for part in numbers])
    least, products = gather_rescued(policy.mesh, [part.ratios for part in numbers], scale.rescued_sequences)
    rescued = RescuedRatios(least, products, *sums[9:11].tolist())
    learning_rate = get_canonical_lr_for_logging(policy.optimizer.param_groups)
    policy.optimizer.prepare_grads()
    grad_norm = float(policy.optimizer.get_grad_norm())
    finite = math.isfinite(grad_norm) and math.isfinite(float(sums[0]))
    if finite:
        with policy.guard.changing():
            policy.optimizer.step()
            policy.scheduler.step(increment=1)
            policy.version += 1
    return _stats(sums, extremes, scale, rescued, grad_norm, learning_rate, skipped=not finite)


def compute_gradients(
    policy: Policy,
    batches: Sequence[MicroBatch],
    objective: Objective,
    algorithm: AlgorithmConfig,
    temperature: float,
) -> list[_Numbers]:
    """Puts the gradient of the loss into `main_grad` of every parameter, and changes no weight. A collective.

    The gradient is reduced over all ranks and not clipped. Returns what `_forward_backward` does.
    """
    for chunk in policy.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    with _router_losses_averaged(policy, batches):
        return _forward_backward(policy, batches, objective, algorithm, temperature)


def _forward_backward(
    policy: Policy,
    batches: Sequence[MicroBatch],
    objective: Objective,
    algorithm: AlgorithmConfig,
    temperature: float,
) -> list[_Numbers]:
    """Returns the numbers of each micro-batch on the last stage, nothing elsewhere."""

    def forward_step(
        iterator: Iterator[MicroBatch], model: torch.nn.Module, *_: object
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, _Numbers]]]:
        batch = next(iterator)

        def loss_function(hidden: Tensor) -> tuple[Tensor, Tensor, _Numbers]:
            result = micro_batch_loss(policy, hidden, batch, objective, algorithm, temperature)
            ratios = response_ratios(generation_log_ratio(result.log_probs, batch.own_terms, algorithm), batch)
            numbers = _Numbers(_sums(result, batch.own_terms, algorithm), ratios)
            # Megatron divides the loss in place, so the metric must not share its storage.
            return result.loss, torch.tensor(1, dtype=torch.int), numbers

        return model_output(policy, model, batch.sequences), loss_function

    return run_pipeline(policy, forward_step, batches, batches[0].sequences.input_ids.shape[1], forward_only=False)


@contextmanager
def _router_losses_averaged(policy: Policy, batches: Sequence[MicroBatch]) -> Iterator[None]:
    """Within the block, routers' own losses (load balance, size of logits) are means over the rows of the update.

    Megatron multiplies them by the rows a rank's router sees, and expects all gradients to be divided by the number of
    tokens in the end; here the policy's loss comes divided, so theirs must too. Padding counts: routers see it.
    """
    config, mesh = policy.bridge.config, policy.mesh
    names = [name for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff") if getattr(config, name)]
    if not names:
        yield
        return
    rows = torch.tensor(sum(batch.sequences.input_ids.numel() for batch in batches), device=mesh.device)
    torch.distributed.all_reduce(rows, group=mesh.dp_cp_group)
    kept = {name: getattr(config, name) for name in names}
    try:
        for name, coefficient in kept.items():
            # A micro-batch's loss comes in tp * cp parts, each multiplied by that many times fewer rows.
            setattr(config, name, coefficient * mesh.tp_size * mesh.cp_size / int(rows))
        yield
    finally:
        for name, coefficient in kept.items():
            setattr(config, name, coefficient)


def _sums(result: MicroBatchLoss, terms: TokenTerms, algorithm: AlgorithmConfig) -> Tensor:
    """Returns [SUMS + EXTREMES] float64: sums over the micro-batch's response tokens, those of MismatchSums for native
    and for rescued ones last; then max of -ratio and of ratio (native), and of |p - q| for either."""
    rescued, native = terms.rescued, ~terms.rescued
    comparable = rescued
    if algorithm.rescued_ratio == "original_prompt":  # the update's own pass is under another prompt than the engine's
        comparable = rescued & ~terms.trainer_log_probs.isnan()
    log_ratio = result.ratio.log()
    sums = [
        result.loss.detach(),
        (terms.kl_weights * result.kl).sum(),
        result.kl.sum(),
        result.entropy.sum(),
        -(log_ratio * native).sum(),
        (result.clipped * native).sum(),
        (result.clipped * rescued).sum(),
        (log_ratio * rescued).abs().sum(),
        native.sum(),
        (result.slopes.taken.abs() * rescued).sum(),
        (result.slopes.on_policy.abs() * rescued).sum(),
    ]
    extremes = [torch.full_like(result.loss, -math.inf)] * 2
    if native.numel():  # a tensor without elements has no maximum
        extremes = [torch.where(native, ratio, -math.inf).max() for ratio in (-result.ratio, result.ratio)]
    (*compared_native, largest_native), (*compared_rescued, largest_rescued) = (
        _compared(result, terms, chosen) for chosen in (native, comparable)
    )
    vector = (*sums, *compared_native, *compared_rescued, *extremes, largest_native, largest_rescued)
    return torch.stack([value.double() for value in vector])


def _compared(result: MicroBatchLoss, terms: TokenTerms, chosen: Tensor) -> Tensor:
    """Computes `MismatchSums` of the tokens that `chosen` [t] names, as a vector."""
    trainer = torch.where(terms.trainer_log_probs.isnan(), result.log_probs, terms.trainer_log_probs)
    return mismatch_sums(
        trainer[chosen], terms.engine_log_probs[chosen], terms.corrections[chosen], terms.limited[chosen]
    )


def _reduce(policy: Policy, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    mesh = policy.mesh
    sums = torch.zeros(SUMS, dtype=torch.float64, device=mesh.device)
    extremes = torch.full((EXTREMES,), -math.inf, dtype=torch.float64, device=mesh.device)
    if mesh.is_last_stage:
        stacked = torch.stack(vectors)
        sums, extremes = stacked[:, :SUMS].sum(0), stacked[:, SUMS:].amax(0)
        torch.distributed.all_reduce(sums, group=mesh.dp_cp_group)
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=mesh.dp_cp_group)
    if mesh.pp_size > 1:
        torch.distributed.broadcast(sums, src=mesh.last_stage_rank, group=mesh.pp_group)
        torch.distributed.broadcast(extremes, src=mesh.last_stage_rank, group=mesh.pp_group)
    return sums.cpu(), extremes.cpu()


def _stats(
    sums: Tensor,
    extremes: Tensor,
    scale: LossScale,
    ratios: RescuedRatios,
    grad_norm: float,
    learning_rate: float,
    skipped: bool,
) -> UpdateStats:
    loss, kl_loss, kl, entropy, ppo_kl, clipped_native, clipped_rescued, abs_log_ratio, native = sums[:9].tolist()
    tokens = max(1, scale.response_tokens)
    rescued = max(1, scale.response_tokens - native)
    any_native = native > 0
    return UpdateStats(
        loss=loss,
        policy_loss=loss - kl_loss,
        kl=kl / tokens,
        entropy=entropy / tokens,
        ppo_kl=ppo_kl / max(1, native),
        clip_fraction=(clipped_native + clipped_rescued) / tokens,
        clip_fraction_rescued=clipped_rescued / rescued,
        abs_log_ratio_rescued=abs_log_ratio / rescued,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        ratio_min=-float(extremes[0]) if any_native else 1.0,
        ratio_max=float(extremes[1]) if any_native else 1.0,
        skipped=skipped,
        mismatch_native=sums_record(sums[-2 * COMPARED : -COMPARED].tolist(), float(extremes[2])),
        mismatch_rescued=sums_record(sums[-COMPARED:].tolist(), float(extremes[3])),
        rescued=ratios,
    )
