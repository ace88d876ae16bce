"""Provides layers where Transformer Engine is absent: an RMSNorm for sequence parallelism, attention over packed
sequences, and a router to experts.

Megatron-Core's own local layers refuse the first two, and context parallelism with them; its router calls Transformer
Engine whether it is there or not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from lens_megatron.batch.pack import chunks_held
from lens_megatron.types import SequenceBatch


@dataclass(kw_only=True)
class PackedSequences(PackedSeqParams):
    """Sequences laid end to end, in the forms that Megatron's layers, Transformer Engine and our layers take."""

    segments: tuple[tuple[int, int, int, int], ...]
    """(first query row, last + 1, first key, last + 1): runs of this rank's queries, and the keys before and under
    them, whose last ones are the queries' own. There is one per sequence, and two under context parallelism. Keys count
    among `key_rows`, or are rows where that is None."""
    run_bounds: tuple[Tensor, Tensor]
    """[segments + 1] int32 each: where the segments' queries and keys begin, and the ends."""
    key_order: Tensor | None = None
    """[S] int64 under context parallelism: where each row of the sequences stands among the ranks' gathered keys."""
    key_rows: Tensor | None = None
    """int64 under context parallelism, and where sequences share prompts: the key rows of every segment, one segment
    after the other."""
    positions: Tensor | None = None
    """[S] int64 where sequences share prompts: the position of every row in its sequence, for rotary embeddings."""


def packed_sequences(batch: SequenceBatch, cp_rank: int, cp_size: int) -> PackedSequences:
    """Works out what attention needs to know of `batch`, once for all layers."""
    device, runs = batch.input_ids.device, list(pairwise(batch.bounds))
    bounds = torch.tensor(batch.bounds, dtype=torch.int32).to(device)
    prefixes = batch.prefixes or ((0, 0),) * len(runs)
    longest = max(stop - start + last - first for (start, stop), (first, last) in zip(runs, prefixes, strict=True))
    key_order = torch.cat(list(_key_order(runs, cp_size))).to(device) if cp_size > 1 else None
    key_rows, run_bounds = None, (bounds, bounds)
    segments = tuple((start, stop, start, stop) for start, stop in runs)
    if cp_size > 1 or batch.prefixes:
        held = list(_held_segments(runs, cp_rank, cp_size) if cp_size > 1 else _sharing_segments(runs, prefixes))
        key_rows = torch.cat([rows for _, rows in held]).to(device)
        starts = [[0, *accumulate(lengths)] for lengths in ([b - a for (a, b), _ in held], [len(k) for _, k in held])]
        segments = tuple((a, b, c, d) for (a, b), (c, d) in zip(*map(pairwise, starts), strict=True))
        queries, keys = (torch.tensor(start, dtype=torch.int32).to(device) for start in starts)
        run_bounds = queries, keys
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        segments=segments,
        run_bounds=run_bounds,
        key_order=key_order,
        key_rows=key_rows,
        positions=batch.position_ids[0] if batch.prefixes else None,
    )


def _sharing_segments(
    runs: Sequence[tuple[int, int]], prefixes: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yields the queries of every sequence with the rows of its keys: the shared prompt's, then its own."""
    for run, prefix in zip(runs, prefixes, strict=True):
        yield run, torch.cat([torch.arange(*prefix), torch.arange(*run)])


def _held_segments(
    runs: Sequence[tuple[int, int]], cp_rank: int, cp_size: int
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yields a context-parallel rank's queries, two chunks of each sequence, with the rows of the keys of each."""
    for start, stop in runs:
        first, chunk = start // cp_size, (stop - start) // (2 * cp_size)
        for half, index in enumerate(chunks_held(cp_rank, cp_size)):
            begin = first + half * chunk
            yield (begin, begin + chunk), torch.arange(start, start + (index + 1) * chunk)


def _key_order(runs: Sequence[tuple[int, int]], cp_size: int) -> Iterator[Tensor]:
    """Yields, chunk by chunk of every sequence, which of the gathered rows they are; [rows of a chunk] int64 each."""
    held = runs[-1][1] // cp_size
    holders = {index: (rank, half) for rank in range(cp_size) for half, index in enumerate(chunks_held(rank, cp_size))}
    for start, stop in runs:
        first, chunk = start // cp_size, (stop - start) // (2 * cp_size)
        for index in range(2 * cp_size):
            rank, half = holders[index]
            begin = rank * held + first + half * chunk
            yield torch.arange(begin, begin + chunk)


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm with the mark by which Megatron sums its weight's gradient over a sequence-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence: flash attention on a GPU, PyTorch's fused attention elsewhere.

    Under context parallelism keys and values are gathered over the group; their gradient is reduce-scattered back.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **_: object,
    ):
        super().__init__(config=config)
        self.softmax_scale, self.cp_group = softmax_scale, pg_collection.cp

    def forward(
        self,
        query: Tensor,  # [S, heads, head_dim]
        key: Tensor,  # [S, groups, head_dim]
        value: Tensor,  # [S, groups, head_dim]
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSequences,
        **_: object,
    ) -> Tensor:  # [S, heads, head_dim]
        packed = packed_seq_params
        if packed.key_order is not None:
            key, value = (
                gather_from_sequence_parallel_region(x, group=self.cp_group)[packed.key_order] for x in (key, value)
            )
        if packed.key_rows is not None:  # every run's keys stand together
            key, value = key[packed.key_rows], value[packed.key_rows]
        if query.is_cuda and query.dtype != torch.float32:
            return self._flash(query, key, value, packed)
        parts = [self._attend(query[a:b], key[c:d], value[c:d]) for a, b, c, d in packed.segments]
        return torch.cat(parts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends one run of queries to its keys: row i of n sees all keys but the last n - 1 - i."""
        mask, (rows, columns) = None, (len(query), len(key))
        if rows != columns:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(b - a for a, b, _, _ in packed.segments), max(d - c for _, _, c, d in packed.segments)
        out = varlen_attn(
            *(query, key, value, *packed.run_bounds, *longest),
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal, aligned to the last key
            **grouped_keys_argument(varlen_attn, query.shape[1] != key.shape[1]),
        )
        return out if isinstance(out, Tensor) else out[0]


def grouped_keys_argument(attention: Callable[..., object], grouped: bool) -> dict[str, Any]:
    """Returns the argument that tells torch's `varlen_attn` whether keys have fewer heads than queries.

    Before torch 2.12 there is no such argument, and it takes both as they are.
    """
    return {"enable_gqa": grouped} if "enable_gqa" in signature(attention).parameters else {}


class Router(TopKRouter):
    """Megatron's router, whose logits come from a plain matrix product in float32 or, if configured, float64."""

    def gating(self, input: Tensor) -> Tensor:
        """Computes the logits: [S, B, D] -> [S, B, experts]."""
        dtype = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        return linear(input.to(dtype), self.weight.to(dtype))


def use_packed_attention(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Puts `PackedAttention` into a layer spec, which it changes and returns."""
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def use_own_layers(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Puts these layers into Megatron's local layer spec, which it changes and returns."""
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if attention.q_layernorm is not IdentityOp:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if layer.submodules.mlp.module is MoELayer:
            layer.submodules.mlp.submodules.router = Router
    spec.layer_norm = RMSNorm
    return spec
