"""Records of the methods' gradients on one batch, and the arithmetic on them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from lens_megatron.types import Origin, Sample

BLOCKS = 4
"""Layers are put together into at most this many groups."""
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class TokenClass(StrEnum):
    """Tells the response tokens of a batch apart by the rollout that they belong to."""

    NATIVE_SUCCESS = "native success"
    NATIVE_FAILURE = "native failure"
    RESCUED = "rescued"
    """Sampled from the purified prompt, and trained on under the original one."""


@dataclass(frozen=True, slots=True)
class ClassNumbers:
    """What a method makes of the tokens of a class."""

    name: TokenClass
    rollouts: int
    tokens: int
    """Response tokens of the rollouts that take part in the loss."""
    weight: float
    """The mean over tokens of what multiplies the loss: w~ of the LENS paper, eq. 4; 1 for GRPO."""
    advantage: float
    """The mean over tokens."""
    share: float
    """The class's part of the sum over all tokens of |weight * advantage|: how much of the loss is about it, if every
    token counts alike and the ratio is 1."""


@dataclass(frozen=True, slots=True)
class MethodGradient:
    """The gradient of a method's loss on the batch."""

    method: str
    groups: int
    """Those that the method's selection keeps."""
    norm: float
    """The 2-norm over all parameters, before any clipping: `actor/grad_norm` of a step on this batch."""
    norms: tuple[float, ...]
    """The 2-norm over the parameters of each layer group."""
    classes: tuple[ClassNumbers, ...]


@dataclass(frozen=True, slots=True)
class GroupCosines:
    """The cosines between the methods' gradients over the parameters of a layer group."""

    name: str
    """Of the layer group; `whole` for all parameters."""
    cosines: tuple[tuple[float | None, ...], ...]
    """[M, M] in the order of the methods; None where one of the two gradients is 0."""


@dataclass(frozen=True, slots=True)
class GradientReport:
    """The gradients of M methods on the same batch, at the weights of a checkpoint."""

    fork: str
    prompts: int
    second_waves: int
    """Prompts of the batch that were sampled a second time, purified."""
    layer_groups: tuple[str, ...]
    methods: tuple[MethodGradient, ...]
    whole: GroupCosines
    by_group: tuple[GroupCosines, ...]


def layer_group(name: str, layers: int) -> str:
    """Returns the layer group of a parameter, such as `layers 0-7`; what belongs to no layer has its own.

    Example: layer_group("decoder.layers.9.mlp.linear_fc1.weight", 30) == "layers 8-15".
    """
    found = _LAYER.search(name)
    if found is None:
        return {"embedding": "embedding", "output_layer": "head"}.get(name.split(".")[0], "final norm")
    size = math.ceil(layers / BLOCKS)
    first = int(found[1]) // size * size
    last = min(first + size, layers) - 1
    return f"layers {first}-{last}" if last > first else f"layer {first}"


def count_layers(names: Sequence[str]) -> int:
    return 1 + max((int(found[1]) for name in names if (found := _LAYER.search(name))), default=0)


def class_numbers(samples: Sequence[Sample]) -> tuple[ClassNumbers, ...]:
    """Returns what a method makes of each class of which the batch has a rollout that takes part in the loss."""
    of_class: dict[TokenClass, list[Sample]] = {name: [] for name in TokenClass}
    for sample in samples:
        if sample.keep:
            of_class[_class_of(sample)].append(sample)
    every = sum(map(_weight_of, (sample for found in of_class.values() for sample in found)))
    return tuple(_numbers(name, found, every) for name, found in of_class.items() if found)


def _class_of(sample: Sample) -> TokenClass:
    if sample.rollout.origin is Origin.PURIFIED:
        return TokenClass.RESCUED
    return TokenClass.NATIVE_SUCCESS if sample.rollout.correct else TokenClass.NATIVE_FAILURE


def _weight_of(sample: Sample) -> float:
    return len(sample.rollout.token_ids) * abs(sample.weight * sample.advantage)


def _numbers(name: TokenClass, samples: Sequence[Sample], every: float) -> ClassNumbers:
    lengths = [len(sample.rollout.token_ids) for sample in samples]
    tokens = sum(lengths)
    return ClassNumbers(
        name=name,
        rollouts=len(samples),
        tokens=tokens,
        weight=sum(n * s.weight for n, s in zip(lengths, samples, strict=True)) / tokens,
        advantage=sum(n * s.advantage for n, s in zip(lengths, samples, strict=True)) / tokens,
        share=sum(map(_weight_of, samples)) / every if every else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Products:
    """The scalar products of M gradients with each other."""

    names: tuple[str, ...]
    """Of the layer groups, in the order of the model."""
    by_group: Tensor
    """[groups, M, M] float64"""

    def norms(self, method: int) -> tuple[float, ...]:
        """Returns the norm of a method's gradient over each layer group."""
        return tuple(self.by_group[:, method, method].sqrt().tolist())

    def norm(self, method: int) -> float:
        return float(self.by_group[:, method, method].sum().sqrt())

    def cosines(self) -> tuple[GroupCosines, ...]:
        """Returns those of each layer group."""
        return tuple(_cosines(name, part) for name, part in zip(self.names, self.by_group, strict=True))

    def whole(self) -> GroupCosines:
        return _cosines("whole", self.by_group.sum(0))


def products(gradients: Sequence[Mapping[str, Tensor]]) -> Products:
    """Returns the scalar products of gradients, each a tensor per parameter's name, in float64."""
    parameters = list(gradients[0])
    layers = count_layers(parameters)
    names = tuple(dict.fromkeys(layer_group(name, layers) for name in parameters))
    found = torch.zeros(len(names), len(gradients), len(gradients), dtype=torch.float64)
    for parameter in parameters:
        flat = torch.stack([gradient[parameter].flatten().double() for gradient in gradients])
        found[names.index(layer_group(parameter, layers))] += flat @ flat.T
    return Products(names, found)


def _cosines(name: str, product: Tensor) -> GroupCosines:
    norms = product.diagonal().sqrt()
    cosines = (product / norms[:, None] / norms[None, :]).tolist()
    return GroupCosines(name, tuple(tuple(None if math.isnan(c) else c for c in row) for row in cosines))
