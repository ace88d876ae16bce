"""Layers where Transformer Engine is absent: an RMSNorm for sequence parallelism, and attention over packed sequences.

Megatron-Core's own local layers refuse both, and context parallelism with them.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lens_megatron.types import SequenceBatch


@dataclass
class PackedSequences(PackedSeqParams):
    """Sequences laid end to end, as Megatron's layers and Transformer Engine understand them, and as ours do."""

    segments: tuple[tuple[int, int, int, int], ...] = ()
    """(first query row, last + 1, first key row, last + 1): runs of this rank's queries, and the keys before and under
    them, whose last rows are the queries' own. One per sequence; two under context parallelism."""
    key_order: Tensor | None = None
    """[S] int64 under context parallelism: where each row of the sequences stands among the ranks' gathered keys."""


def packed_sequences(batch: SequenceBatch, cp_rank: int, cp_size: int) -> PackedSequences:
    """What attention needs to know of `batch`. Context parallelism deals each sequence out as Megatron does:
    cut into 2 * cp_size chunks, rank r holds chunks r and 2 * cp_size - 1 - r."""
    bounds = torch.tensor(batch.bounds, dtype=torch.int32).to(batch.input_ids.device)
    longest = max(stop - start for start, stop in zip(batch.bounds, batch.bounds[1:], strict=False))
    segments, order, gathered = [], [], batch.bounds[-1] // cp_size
    for start, stop in zip(batch.bounds, batch.bounds[1:], strict=False):
        if cp_size == 1:
            segments.append((start, stop, start, stop))
            continue
        first, chunk = start // cp_size, (stop - start) // (2 * cp_size)
        for half, index in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank)):
            begin = first + half * chunk
            segments.append((begin, begin + chunk, start, start + (index + 1) * chunk))
        for index in range(2 * cp_size):
            rank, half = (index, 0) if index < cp_size else (2 * cp_size - 1 - index, 1)
            begin = rank * gathered + first + half * chunk
            order.append(torch.arange(begin, begin + chunk))
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        segments=tuple(segments),
        key_order=torch.cat(order).to(batch.input_ids.device) if order else None,
    )


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's, with the mark by which Megatron sums its weight's gradient over a sequence-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence: flash attention on a GPU, PyTorch's fused attention elsewhere.

    Under context parallelism keys and values are gathered over the group; their gradient is reduce-scattered back.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, pg_collection=None, **_: object):
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
        if query.is_cuda and query.dtype != torch.float32:
            return self._flash(query, key, value, packed.segments)
        parts = [self._attend(query[a:b], key[c:d], value[c:d]) for a, b, c, d in packed.segments]
        return torch.cat(parts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One run of queries; row i of n sees all but the last n - 1 - i keys."""
        mask, (rows, columns) = None, (len(query), len(key))
        if rows != columns:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, segments: tuple[tuple[int, int, int, int], ...]):
        from torch.nn.attention.varlen import varlen_attn

        if len(query) != len(key):  # flash attention wants each run's keys for itself
            rows = torch.cat([torch.arange(c, d) for _, _, c, d in segments]).to(key.device)
            key, value = key[rows], value[rows]

        def bounds(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)

        queries, keys = [b - a for a, b, _, _ in segments], [d - c for _, _, c, d in segments]
        return varlen_attn(
            *(query, key, value, bounds(queries), bounds(keys), max(queries), max(keys)),
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal, aligned to the last key
            enable_gqa=query.shape[1] != key.shape[1],
        )


def use_own_layers(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with these layers in place of its own."""
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if attention.q_layernorm is not IdentityOp:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    spec.layer_norm = RMSNorm
    return spec
