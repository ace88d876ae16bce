"""Bytes that a micro-batch's forward and backward pass need, layer by layer, from what each operator keeps.

S: tokens of a sequence, b: sequences, T = S b. H: hidden size; q, k: sizes of queries and keys of this rank;
F: intermediate size of this rank; n: attention heads of this rank; e: bytes of an element.
Sources: Megatron-Core 0.16.1's layers, read with torch.autograd.graph.saved_tensors_hooks for the local spec; for
Transformer Engine the tensors that its LayerNormLinear and flash attention save (Korthikanti et al., arXiv 2205.05198,
for the method). benchmarks/plan_error.py compares the local spec's on CPU with what was allocated.
"""

from dataclasses import dataclass

from lens_megatron.planning.layout import LayerSpec, Layout
from lens_megatron.planning.model_shape import ModelShape

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class MicroBatchBytes:
    """Of one micro-batch on one rank."""

    kept: int
    """From the forward to the backward pass, by this stage's layers."""
    layer: int
    """What recomputation brings back, one layer at a time."""
    kept_above: int
    """How far that takes what is kept above `kept`: the layer's MLP is done when its attention is recomputed alone."""
    forward_peak: int
    """Highest sum of temporaries inside a layer in a pass without gradients, its input included."""
    backward_peak: int
    """Highest sum inside a layer's backward pass, above what the layer keeps."""
    buffer: int
    """Megatron's attention buffer, made once and never freed (local spec)."""


def micro_batch_bytes(shape: ModelShape, layout: Layout, sequences: int, length: int) -> MicroBatchBytes:
    """Bytes of one micro-batch of `sequences` x `length` tokens, padding included, on one rank of a stage."""
    sizes = _Sizes.of(shape, layout, sequences, length)
    layers = shape.num_hidden_layers // layout.pp
    layer = sizes.attention_input() + sizes.core_attention() + sizes.mlp()
    hidden = sizes.tokens * sizes.hidden_share * sizes.element
    if layout.recompute == "full":
        checkpoints = -(-layers // layout.recompute_layers)
        kept = checkpoints * hidden
        layer *= min(layout.recompute_layers, layers)
    elif layout.recompute == "selective":
        kept = layers * (layer - sizes.core_attention() + sizes.checkpointed_attention())
    else:
        kept = layers * layer
    recomputed = {"full": layer, "selective": sizes.core_attention(), "none": 0}[layout.recompute]
    above = max(0, recomputed - sizes.mlp()) if layout.recompute == "selective" else recomputed
    return MicroBatchBytes(kept, recomputed, above, sizes.forward_peak(), sizes.backward_peak(), sizes.buffer())


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The letters of this module's docstring, and what follows from them."""

    tokens: int
    length: int
    scores: int
    """Elements of the attention matrix, n S S b."""
    hidden: int
    hidden_share: float
    """H, or H / tp where sequence parallelism cuts the norms' inputs."""
    query: int
    key: int
    head_dim: int
    heads: int
    intermediate: int
    element: int
    spec: LayerSpec
    qk_norm: bool
    grouped: bool
    fused_swiglu: bool

    @classmethod
    def of(cls, shape: ModelShape, layout: Layout, sequences: int, length: int) -> "_Sizes":
        heads = shape.num_attention_heads // layout.tp
        return cls(
            tokens=sequences * length,
            length=length,
            scores=heads * sequences * length * length,
            hidden=shape.hidden_size,
            hidden_share=shape.hidden_size / (layout.tp if layout.sequence_parallel else 1),
            query=shape.query_size // layout.tp,
            key=shape.key_size // layout.tp,
            head_dim=shape.head_dim,
            heads=heads,
            intermediate=shape.intermediate_size // layout.tp,
            element=layout.element_bytes,
            spec=layout.spec,
            qk_norm=shape.qk_norm,
            grouped=shape.num_attention_heads != shape.num_key_value_heads,
            fused_swiglu=layout.fused_swiglu,
        )

    def norm(self) -> int:
        """Input, reciprocal deviation and output of a norm over the hidden states."""
        wide = int(self.tokens * self.hidden_share)
        if self.spec is LayerSpec.LOCAL_CPU:
            return wide * (2 * FLOAT32 + self.element) + FLOAT32 * self.tokens
        return wide * 2 * self.element + FLOAT32 * self.tokens

    def attention_input(self) -> int:
        """The first norm, and the norms of queries and keys (Qwen3)."""
        mixed = (self.query + 2 * self.key) * self.element
        if not self.qk_norm:
            return self.norm()
        per_token = FLOAT32 * (self.heads + self.heads * self.key // self.query)
        if self.spec is not LayerSpec.LOCAL_CPU:
            return self.norm() + self.tokens * (per_token + mixed)
        copies = (self.query + self.key) * FLOAT32 if self.element < FLOAT32 else self.query * FLOAT32 + mixed
        return self.norm() + self.tokens * (per_token + copies + (self.query + self.key) * FLOAT32)

    def rotary(self) -> int:
        """Tables of cosines and sines, for queries and for keys."""
        return 4 * self.length * self.head_dim * self.element

    def values_within_mixed(self) -> int:
        """Values are a view of the projection's output, which stays for it; the norm of keys may count it already."""
        counted = self.qk_norm and (self.spec is not LayerSpec.LOCAL_CPU or self.element == FLOAT32)
        return 0 if counted else self.query + 2 * self.key

    def core_attention_inputs(self) -> int:
        """Queries and keys with their positions, values, and the rotary tables."""
        if self.spec is LayerSpec.TRANSFORMER_ENGINE:
            elements = self.query + self.key + self.values_within_mixed()
        else:  # keys and values are repeated for every query head of their group
            elements = 2 * self.query + (self.query if self.grouped else self.values_within_mixed())
        return self.tokens * self.element * elements + self.rotary()

    def checkpointed_attention(self) -> int:
        """What selective recomputation keeps of core attention: its inputs as they come, and its output."""
        elements = self.query + self.key + self.values_within_mixed() + self.query
        return self.tokens * self.element * elements + self.rotary()

    def core_attention(self) -> int:
        """Inputs and what attention itself keeps, its output included, which the projection keeps too."""
        output = self.tokens * self.query * self.element
        if self.spec is LayerSpec.TRANSFORMER_ENGINE:
            return self.core_attention_inputs() + output + self.tokens * self.heads * FLOAT32
        probabilities = FLOAT32 + (self.element if self.element < FLOAT32 else 0)
        mask = self.length * self.length
        return self.core_attention_inputs() + output + self.scores * probabilities + mask

    def mlp(self) -> int:
        """The second norm; gate and up projections, and the activation's steps."""
        factors = 3 if self.fused_swiglu else 5
        return self.norm() + self.tokens * factors * self.intermediate * self.element

    def buffer(self) -> int:
        return 0 if self.spec is LayerSpec.TRANSFORMER_ENGINE else self.scores * self.element

    def forward_peak(self) -> int:
        hidden = self.tokens * self.hidden * self.element
        qkv = self.tokens * (self.query + 2 * self.key) * self.element
        if self.spec is LayerSpec.TRANSFORMER_ENGINE:
            attention = 2 * qkv + self.tokens * self.query * self.element
        else:
            expanded = 3 * self.tokens * self.query * self.element
            # Scores, their float32 copy, the probabilities, and those in the model's precision.
            softmax = 2 * FLOAT32 if self.element == FLOAT32 else 2 * FLOAT32 + 2 * self.element
            attention = qkv + expanded + self.scores * softmax + self.length * self.length
        mlp = self.tokens * 5 * self.intermediate * self.element
        normed = self.tokens * self.hidden * FLOAT32
        return int(2 * hidden + normed + max(attention, mlp))

    def backward_peak(self) -> int:
        """The MLP's backward comes first; when attention's begins, what the MLP kept is free again.

        In bfloat16 softmax's backward holds the gradients of its float32 output and input, and no longer the rounded
        probabilities; in float32 a third tensor of that size is there, as measured.
        """
        hidden = 2 * self.tokens * self.hidden * FLOAT32
        mlp = self.tokens * 3 * self.intermediate * self.element
        attention = 3 * self.tokens * self.query * self.element - self.mlp()
        if self.spec is not LayerSpec.TRANSFORMER_ENGINE:
            attention += self.scores * (3 * FLOAT32 if self.element == FLOAT32 else 2 * FLOAT32 - self.element)
        return int(hidden + max(attention, mlp))
