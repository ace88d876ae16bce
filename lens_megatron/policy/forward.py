"""Runs passes without gradients: log-probabilities of given tokens, over all micro-batches in one pipelined run."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lens_megatron.batch import bundles
from lens_megatron.batch.bundles import SampleSize
from lens_megatron.batch.micro_batches import plan_micro_batches
from lens_megatron.batch.pack import Pair, make_sequences
from lens_megatron.policy.head import token_log_probs
from lens_megatron.policy.layers import packed_sequences
from lens_megatron.policy.model import Policy, reference_weights
from lens_megatron.types import SequenceBatch, SequenceLayout


def response_log_probs(policy: Policy, pairs: Sequence[Pair], *, max_tokens: int, temperature: float) -> list[Tensor]:
    """Computes log pi(response | prompt) under the weights now in the model, `max_tokens` per micro-batch.

    Where the policy shares prompts, pairs with the same prompt share its rows.

    Returns, on every rank of the model-parallel group, one float32 CPU tensor per pair, [tokens of its response].
    """
    return _run(policy, pairs, pack_pairs(policy, pairs, max_tokens, policy.layout), temperature)


class PromptLogProbs(NamedTuple):
    """Log-probabilities of a prompt's L tokens given their prefixes, in nats; float32 on the CPU, 0 at position 0."""

    policy: Tensor
    """[L]"""
    reference: Tensor
    """[L]"""

    @property
    def scores(self) -> Tensor:
        """Returns the interference score |log pi_theta - log pi_ref| of every token, [L] (LENS, eq. 1)."""
        return (self.policy - self.reference).abs()


def prompt_scores(policy: Policy, prompts: Sequence[tuple[int, ...]], *, max_tokens: int) -> list[Tensor]:
    """Returns the interference scores of `prompt_log_probs`, one [L] per prompt. A collective."""
    return [found.scores for found in prompt_log_probs(policy, prompts, max_tokens=max_tokens)]


def prompt_log_probs(policy: Policy, prompts: Sequence[tuple[int, ...]], *, max_tokens: int) -> list[PromptLogProbs]:
    """Computes log pi_theta and log pi_ref of every prompt token given its prefix. A collective.

    Both passes use the same code, batches and un-rounded float32 logits, so that equal weights give equal numbers.
    Returns one record per prompt on every rank of the model-parallel group.
    """
    pairs = [(prompt[:1], prompt[1:]) for prompt in prompts]
    packed = pack_pairs(policy, pairs, max_tokens, policy.layout_of_whole_sequences)
    with reference_weights(policy):
        reference = _run(policy, pairs, packed, temperature=1.0)
    current = _run(policy, pairs, packed, temperature=1.0)
    first = torch.zeros(1)
    return [
        PromptLogProbs(torch.cat([first, a]), torch.cat([first, b])) for a, b in zip(current, reference, strict=True)
    ]


def model_output(
    policy: Policy, model: torch.nn.Module, batch: SequenceBatch, embedded: Tensor | None = None
) -> Tensor:
    """Computes hidden states [S, 1, D], on the last stage after the final norm; [S/tp, 1, D] if sequence-parallel.

    Args:
        embedded: the embeddings of `batch`, in the same shape, if the first stage is not to compute them.
    """
    packed = packed_sequences(batch, policy.mesh.cp_rank, policy.mesh.cp_size)
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        decoder_input=embedded,
        packed_seq_params=packed,
    )


def run_pipeline(
    policy: Policy,
    forward_step: Callable[..., Any],
    batches: Sequence[Any],
    rows: int,
    *,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Runs all micro-batches through the pipeline's stages; returns what the last stage's losses give, one each.

    Args:
        forward_step: as Megatron's schedules call it, with (an iterator over `batches`, a model chunk).
        rows: S of the first micro-batch on this rank.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in policy.chunks],
        model=policy.chunks,
        num_microbatches=len(batches),
        seq_length=rows,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )


def micro_batches(
    policy: Policy, pairs: Sequence[Pair], max_tokens: int, layout: SequenceLayout | None = None
) -> list[list[int]]:
    """Calls `plan_micro_batches` for `layout`, by default the policy's own. A collective over data-parallel ranks.

    Where the layout shares prompts, pairs of the same prompt stand next to each other.
    """
    mesh, hidden_size, layout = policy.mesh, policy.bridge.config.hidden_size, layout or policy.layout
    sizes = [SampleSize(prompt, len(prompt), len(response)) for prompt, response in pairs]
    if layout.shares_prompts:
        together = bundles.by_prompt(sizes, hidden_size, max_tokens=max_tokens)
    else:
        together = bundles.single(sizes, hidden_size)
    return plan_micro_batches(
        together,
        max_tokens,
        multiple_of=mesh.pp_size if mesh.vp_size > 1 else 1,
        group=mesh.dp_group,
        device=mesh.device,
    )


class PackedPairs(NamedTuple):
    """Pairs in packed micro-batches."""

    parts: list[list[int]]
    """Indices of the pairs of each micro-batch."""
    batches: list[SequenceBatch]


def pack_pairs(policy: Policy, pairs: Sequence[Pair], max_tokens: int, layout: SequenceLayout) -> PackedPairs:
    """Packs the pairs into micro-batches. A collective over data-parallel ranks."""
    parts = micro_batches(policy, pairs, max_tokens, layout)
    device, nothing = policy.mesh.device, [((0, 0), ())]
    return PackedPairs(parts, [make_sequences([pairs[i] for i in part] or nothing, device, layout) for part in parts])


def _run(policy: Policy, pairs: Sequence[Pair], packed: PackedPairs, temperature: float) -> list[Tensor]:
    """Returns log-probabilities of every pair's targets, on the CPU of every rank of the model-parallel group."""
    parts, batches = packed
    if not parts:
        return []
    for chunk in policy.chunks:
        chunk.eval()

    def forward_step(
        iterator: Iterator[SequenceBatch], model: torch.nn.Module, *_: object
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        batch = next(iterator)

        def log_probs(hidden: Tensor, non_loss_data: bool) -> Tensor:
            return token_log_probs(policy, hidden, batch, temperature)

        return model_output(policy, model, batch), log_probs

    with torch.no_grad():
        rows = batches[0].input_ids.shape[1]
        results = run_pipeline(policy, forward_step, batches, rows, forward_only=True, collect_non_loss_data=True)
    flat = _on_every_rank(policy, results, batches).cpu()
    found = dict(zip((i for part in parts for i in part), flat.split(_lengths(parts, pairs)), strict=True))
    return [found[i] for i in range(len(pairs))]


def _lengths(parts: Sequence[Sequence[int]], pairs: Sequence[Pair]) -> list[int]:
    return [len(pairs[i][1]) for part in parts for i in part]


def _on_every_rank(policy: Policy, results: list[Tensor], batches: Sequence[SequenceBatch]) -> Tensor:
    """Gets the last stage's results, of all context-parallel ranks, in one [T of all micro-batches] float32 tensor."""
    mesh = policy.mesh
    totals = [sum(batch.lengths) for batch in batches]
    flat = torch.zeros(sum(totals), dtype=torch.float32, device=mesh.device)
    if mesh.is_last_stage:
        for whole, result, batch in zip(flat.split(totals), results, batches, strict=True):
            whole[slice(None) if batch.own is None else batch.own] = result
        if mesh.cp_size > 1:
            torch.distributed.all_reduce(flat, group=mesh.cp_group)
    if mesh.pp_size > 1 and len(flat):
        torch.distributed.broadcast(flat, src=mesh.last_stage_rank, group=mesh.pp_group)
    return flat
