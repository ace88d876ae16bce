"""Computes bytes that a micro-batch's forward and backward pass need, layer by layer, from what each operator keeps.

R: rows, the packed tokens of this rank (those of a micro-batch / cp); L: length of its sequences. H: hidden size;
q, k: sizes of queries and keys of this rank; F: intermediate size of this rank; n: attention heads of this rank;
e: bytes of an element. Sources: Megatron-Core 0.16.1's layers and lens_megatron.policy.layers, read with
torch.autograd.graph.saved_tensors_hooks for the local spec; for Transformer Engine the tensors that its LayerNormLinear
and flash attention save (Korthikanti et al., arXiv 2205.05198, for the method). benchmarks/plan_error.py compares the
local spec's on CPU with what was allocated.
"""

from dataclasses import dataclass

from lens_megatron.tools.planning.layout import LayerSpec, ParallelLayout
from lens_megatron.tools.planning.model_shape import ModelShape

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Packed:
    """A micro-batch of `tokens` tokens in sequences of `length`, all context-parallel ranks together."""

    tokens: int
    length: int

    def rows(self, layout: ParallelLayout) -> int:
        """Tokens of one context-parallel rank."""
        return -(-self.tokens // layout.cp)


@dataclass(frozen=True, slots=True)
class MicroBatchBytes:
    """Bytes that one micro-batch needs on one rank."""

    kept: int
    """Bytes that the layers of one model chunk keep from the forward to the backward pass."""
    layer: int
    """The bytes that recomputation brings back, one layer at a time."""
    kept_above: int
    """The bytes by which recomputation raises what is kept above `kept`. When attention alone is recomputed, what the
    layer's MLP kept is free already."""
    forward_peak: int
    """Highest sum of temporaries inside a layer in a pass without gradients, its input included."""
    backward_peak: int
    """Highest sum inside a layer's backward pass, above what the layer keeps."""
    buffer: int
    """The rows of all tensor-parallel ranks, which sequence parallelism gathers into a buffer that stays."""
    hidden: int
    """The bytes of the residual stream's tensor."""
    sent: int
    """Inputs and outputs of a model chunk that a pipeline's schedule holds, beyond what the layers keep of them."""


def micro_batch_bytes(shape: ModelShape, layout: ParallelLayout, micro_batch: Packed) -> MicroBatchBytes:
    """Returns the bytes of one micro-batch, padding not included, on one rank of a stage."""
    sizes = _Sizes.of(shape, layout, micro_batch)
    layers = shape.num_hidden_layers // (layout.pp * layout.vp)
    layer = sizes.attention_input() + sizes.core_attention() + sizes.mlp()
    hidden = int(sizes.rows * sizes.hidden_share * sizes.element)
    recomputed = {"full": layer, "selective": sizes.attention_itself(), "none": 0}[layout.recompute]
    above = max(0, recomputed - sizes.mlp()) if layout.recompute == "selective" else recomputed
    if layout.recompute == "full":
        kept = -(-layers // layout.recompute_layers) * hidden
        recomputed *= min(layout.recompute_layers, layers)
        above = recomputed
    elif layout.recompute == "selective":
        kept = layers * (layer - sizes.core_attention() + sizes.checkpointed_attention())
    else:
        kept = layers * layer
    return MicroBatchBytes(
        kept=kept,
        layer=recomputed,
        kept_above=above,
        forward_peak=sizes.forward_peak(),
        backward_peak=sizes.backward_peak(),
        buffer=sizes.gathered() if layout.sequence_parallel else 0,
        hidden=hidden,
        sent=hidden,
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The letters of this module's docstring, and what follows from them."""

    rows: int
    sequences: float
    length: int
    cp: int
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
    fused_swiglu: bool

    @classmethod
    def of(cls, shape: ModelShape, layout: ParallelLayout, micro_batch: Packed) -> "_Sizes":
        return cls(
            rows=micro_batch.rows(layout),
            sequences=micro_batch.tokens / micro_batch.length,
            length=micro_batch.length,
            cp=layout.cp,
            hidden=shape.hidden_size,
            hidden_share=shape.hidden_size / (layout.tp if layout.sequence_parallel else 1),
            query=shape.query_size // layout.tp,
            key=shape.key_size // layout.tp,
            head_dim=shape.head_dim,
            heads=shape.num_attention_heads // layout.tp,
            intermediate=shape.intermediate_size // layout.tp,
            element=layout.element_bytes,
            spec=layout.spec,
            qk_norm=shape.qk_norm,
            fused_swiglu=layout.fused_swiglu,
        )

    def norm(self) -> int:
        """Input, reciprocal deviation and output of a norm over the hidden states."""
        wide = int(self.rows * self.hidden_share)
        deviation = FLOAT32 * wide // self.hidden
        if self.spec is LayerSpec.LOCAL_CPU:
            return wide * (2 * FLOAT32 + self.element) + deviation
        return wide * 2 * self.element + deviation

    def attention_input(self) -> int:
        """The first norm, and the norms of queries and keys (Qwen3)."""
        mixed = (self.query + 2 * self.key) * self.element
        if not self.qk_norm:
            return self.norm()
        per_row = FLOAT32 * (self.heads + self.heads * self.key // self.query)
        if self.spec is not LayerSpec.LOCAL_CPU:
            return self.norm() + self.rows * (per_row + mixed)
        copies = (self.query + self.key) * FLOAT32 if self.element < FLOAT32 else self.query * FLOAT32 + mixed
        return self.norm() + self.rows * (per_row + copies + (self.query + self.key) * FLOAT32)

    def rotary(self) -> int:
        """Cosines and sines of every row, for queries and for keys."""
        return 4 * self.rows * self.head_dim * self.element

    def mixed(self) -> int:
        """Values are a view of the projection's output, which stays for it; the norm of keys may count it already."""
        counted = self.qk_norm and (self.spec is not LayerSpec.LOCAL_CPU or self.element == FLOAT32)
        return 0 if counted else self.rows * (self.query + 2 * self.key) * self.element

    def output(self) -> int:
        return self.rows * self.query * self.element

    def checkpointed_attention(self) -> int:
        """The bytes that selective recomputation keeps of core attention: its inputs as they come, and its output."""
        positioned = self.rows * (self.query + self.key) * self.element
        return positioned + self.mixed() + self.rotary() + self.output()

    def core_attention(self) -> int:
        """Inputs and what attention itself keeps, its output included, which the projection keeps too."""
        if self.keys_gathered:
            return self.output() + self.rotary() + self.attention_itself()  # neither this rank's keys nor its values
        return self.checkpointed_attention() - self.output() + self.attention_itself()

    @property
    def keys_gathered(self) -> bool:
        """Our attention gathers keys and values over context parallelism; Transformer Engine's passes them round."""
        return self.cp > 1 and self.spec is not LayerSpec.TRANSFORMER_ENGINE

    def attention_itself(self) -> int:
        """The bytes that attention makes: outputs, the logarithm of each row's sum, gathered keys and values, masks.

        A CPU attends sequence by sequence: the kernel keeps each one's output, their concatenation goes on.
        """
        made = self.output() + FLOAT32 * self.rows * self.heads
        if self.spec is LayerSpec.LOCAL_CPU:
            made += self.output() + self.keys_and_values() + self.masks()
        elif self.keys_gathered:
            made += self.keys_and_values() * (2 * self.cp + 1) // (2 * self.cp)  # both runs' keys, each for itself
        return int(made)

    def keys_and_values(self) -> int:
        """Keys and values of whole sequences, gathered from all context-parallel ranks."""
        return 2 * self.rows * self.cp * self.key * self.element if self.keys_gathered else 0

    def masks(self) -> int:
        """A CPU's masks: the two runs of a sequence, of L / 2 cp queries each, see (2 cp + 1) L / 2 cp keys."""
        chunk = self.length / (2 * self.cp)
        return int(self.sequences * (2 * self.cp + 1) * chunk**2 * self.element) if self.keys_gathered else 0

    def mlp(self) -> int:
        """The second norm; gate and up projections, and the activation's steps."""
        factors = 3 if self.fused_swiglu else 5
        return self.norm() + self.rows * factors * self.intermediate * self.element

    def gathered(self) -> int:
        return self.rows * self.hidden * self.element

    def forward_peak(self) -> int:
        hidden = self.rows * self.hidden * self.element
        attention = 2 * self.rows * (self.query + 2 * self.key) * self.element + self.attention_itself()
        mlp = self.rows * 5 * self.intermediate * self.element
        normed = self.rows * self.hidden * FLOAT32
        return int(2 * hidden + normed + max(attention, mlp))

    def backward_peak(self) -> int:
        """The MLP's backward comes first; when attention's begins, what the MLP kept is free again."""
        hidden = 2 * self.rows * self.hidden * FLOAT32
        mlp = self.rows * 3 * self.intermediate * self.element
        attention = self.rows * (4 * self.query + 2 * self.key) * self.element + self.keys_and_values() - self.mlp()
        return int(hidden + max(attention, mlp))
