"""Finds what a layout cannot cut of a model. The trainer asks before it builds one, and the plan before that."""

from collections.abc import Iterator
from typing import Protocol

from lens_megatron.config.options import Config

_DIMENSIONS = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size", "intermediate_size",
               "head_dim", "vocab_size", "max_position_embeddings")  # fmt: skip


class Dimensions(Protocol):
    """Fields of a model that the rules read; a Hugging Face config and planning's ModelShape have them.

    Models with experts have num_experts and moe_intermediate_size besides.
    """

    @property
    def model_type(self) -> str: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


def model_mistakes(config: Config, shape: Dimensions) -> Iterator[str]:
    """Returns why a model of these dimensions cannot be cut as asked, one message for each reason."""
    broken = list(_shape_mistakes(shape))
    yield from broken
    if broken:
        return
    tp, pp = config.megatron.tensor_model_parallel_size, config.megatron.pipeline_model_parallel_size
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(shape, name)
        if size % tp:
            yield (
                f"megatron.tensor_model_parallel_size ({tp}) does not divide the model's {name} ({size}); "
                f"choose a divisor of {size}"
            )
    if shape.num_hidden_layers % pp:
        yield (
            f"megatron.pipeline_model_parallel_size ({pp}) does not divide the model's num_hidden_layers "
            f"({shape.num_hidden_layers}); choose a divisor"
        )
    vp = config.megatron.virtual_pipeline_model_parallel_size
    if vp and pp == 1:
        yield (
            f"megatron.virtual_pipeline_model_parallel_size ({vp}) interleaves the stages of a pipeline, but "
            f"megatron.pipeline_model_parallel_size is 1; raise that to 2 or more, or leave this empty"
        )
    if vp and shape.num_hidden_layers % (pp * vp):
        yield (
            f"megatron.pipeline_model_parallel_size ({pp}) x megatron.virtual_pipeline_model_parallel_size ({vp}) = "
            f"{pp * vp} does not divide the model's num_hidden_layers ({shape.num_hidden_layers}); choose divisors"
        )
    if config.megatron.sequence_parallel and tp == 1:
        yield (
            "megatron.sequence_parallel divides rows among tensor-parallel ranks, but "
            "megatron.tensor_model_parallel_size is 1; raise that to 2 or more, or set sequence_parallel to false"
        )
    yield from _expert_mistakes(config, shape)
    yield from _engine_mistakes(config, shape)
    length = config.data.max_prompt_length + config.rollout.max_response_length
    if length > shape.max_position_embeddings:
        yield (
            f"data.max_prompt_length ({config.data.max_prompt_length}) + rollout.max_response_length "
            f"({config.rollout.max_response_length}) = {length} exceeds the model's max_position_embeddings "
            f"({shape.max_position_embeddings}); lower one of them"
        )


def _shape_mistakes(shape: Dimensions) -> Iterator[str]:
    """Finds dimensions that no model has. In a user's config.json any of them may be missing or of any type."""
    for name in _DIMENSIONS:
        size = getattr(shape, name, None)
        if type(size) is not int or not 1 <= size < 2**31:
            yield f"model.path: {name} in config.json is {size!r}, expected a whole number from 1; download it again"
            return
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if heads % groups:
        yield (
            f"model.path: num_key_value_heads ({groups}) in config.json does not divide num_attention_heads ({heads}); "
            "take both from the model"
        )


def _engine_mistakes(config: Config, shape: Dimensions) -> Iterator[str]:
    size, experts = config.ranks_per_engine, getattr(shape, "num_experts", 0)
    names = ["num_attention_heads", "intermediate_size"]
    if experts and not config.vllm.model_dump().get("enable_expert_parallel"):
        names.append("moe_intermediate_size")
    for name in names:
        if getattr(shape, name) % size:
            yield (
                f"vllm.tensor_parallel_size ({size}) does not divide the model's {name} ({getattr(shape, name)}); "
                f"choose a divisor of {getattr(shape, name)}"
            )
    heads = shape.num_key_value_heads
    if heads % size and size % heads:
        yield (
            f"vllm.tensor_parallel_size ({size}) neither divides the model's num_key_value_heads ({heads}) nor is a "
            f"multiple of it; choose one that does"
        )


def _expert_mistakes(config: Config, shape: Dimensions) -> Iterator[str]:
    ours = config.megatron
    tp, ep = ours.tensor_model_parallel_size, ours.expert_model_parallel_size
    etp = ours.expert_tensor_parallel_size or tp
    experts = getattr(shape, "num_experts", 0)
    if not experts:
        if ep > 1 or etp != tp:
            yield (
                f"megatron.expert_model_parallel_size ({ep}) and expert_tensor_parallel_size ({etp}) divide experts, "
                f"but a {shape.model_type} model has none; leave both at their defaults"
            )
        return
    if experts % ep:
        yield (
            f"megatron.expert_model_parallel_size ({ep}) does not divide the model's num_experts ({experts}); "
            f"choose a divisor of {experts}"
        )
    if tp > 1 and not ours.sequence_parallel:
        yield (
            f"megatron.tensor_model_parallel_size ({tp}) would give every tensor-parallel rank all rows to send to the "
            f"experts, which Megatron refuses; set megatron.sequence_parallel to true"
        )
    if etp > tp or (ep == 1 and etp != tp):
        yield (
            f"megatron.expert_tensor_parallel_size ({etp}) may be at most tensor_model_parallel_size ({tp}), and "
            f"differ from it only if experts are divided too, in groups of ranks of their own; set it to {tp}, "
            f"or raise expert_model_parallel_size ({ep})"
        )
    intermediate = getattr(shape, "moe_intermediate_size", 0)
    if intermediate % etp:
        yield (
            f"megatron.expert_tensor_parallel_size ({etp}) does not divide the model's moe_intermediate_size "
            f"({intermediate}); choose a divisor"
        )
