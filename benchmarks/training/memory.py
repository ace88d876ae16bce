"""Asks `lens_megatron.plan` for the memory of a measured case, and for a token budget that fits the GPU."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.training import load
from lens_megatron.config import Config, from_tree
from lens_megatron.tools.planning import memory
from lens_megatron.tools.planning.activations import Packed
from lens_megatron.tools.planning.layout import LayerSpec, layout_of
from lens_megatron.tools.planning.model_shape import read_shape

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CHOICES: tuple[tuple[int, dict[str, Any]], ...] = ((16384, {}), (8192, {}), (4096, {}), (16384, FULL))
"""(token budget, options of Megatron's layers), the fastest first: recomputation costs a third more arithmetic."""
USABLE = 0.92
"""The share of the GPU's memory that a plan may fill. The rest is for the CUDA context and fragments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBytes:
    """Bytes that `lens_megatron.plan` reckons with."""

    weights: int
    gradients: int
    optimizer: int
    update: int
    """The highest sum of activations and logits in a forward and backward pass."""
    log_probs: int
    """The same in a pass without gradients, and the reference's weights."""

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + max(self.update, self.log_probs)

    def as_json(self) -> dict[str, int]:
        """Returns all of them by name, and the peak."""
        return {**asdict(self), "peak": self.peak}


def planned_bytes(config: Config, case: dict[str, Any], on_gpu: bool) -> PlannedBytes:
    """Plans `case`, in which micro-batches are filled up to their budget, on one GPU or on the CPU."""
    layout = layout_of(config, 1, LayerSpec.LOCAL if on_gpu else LayerSpec.LOCAL_CPU)
    shape = read_shape(config.model.path)
    sizes = load.lengths(case["kind"], case["samples"], case["limit"])
    longest = max(p + r for p, r in sizes)
    tokens = max(longest, case["budget"])
    responses = round(tokens * max(r / (p + r) for p, r in sizes))
    state = memory.state_bytes(shape, layout, 0)
    micro_batches = -(-sum(p + r for p, r in sizes) // tokens)
    update = memory.update_peaks(shape, layout, Packed(tokens, longest), responses, micro_batches, 0)
    forward = memory.forward_peaks(shape, layout, Packed(tokens, longest), responses, 0)
    return PlannedBytes(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        update=update.activations + update.head,
        log_probs=forward.activations + forward.head + state.weights,
    )


def fitting_choice(
    tree: dict[str, Any], cases: Sequence[dict[str, Any]], memory_bytes: int, on_gpu: bool
) -> tuple[int, dict[str, Any]]:
    """Returns the first of CHOICES whose plan fits `memory_bytes` in all cases; `tree` is a configuration's sections.

    Raises ValueError, with the least that any of them needs, where none does.
    """
    least = None
    for budget, layers in CHOICES:
        config = from_tree(tree | {"megatron": {"transformer": layers}})
        needed = max(planned_bytes(config, case | {"budget": budget}, on_gpu).peak for case in cases)
        if needed <= USABLE * memory_bytes:
            return budget, layers
        least = min(needed, least or needed)
    raise ValueError(
        f"memory_bytes: got {memory_bytes / 2**30:.1f} GiB, of which {USABLE:.0%} may be used; {tree['model']['path']} "
        f"needs {(least or 0) / 2**30:.1f} GiB at the least: take a smaller --shape"
    )
