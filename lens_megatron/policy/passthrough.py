"""Checks `megatron.transformer`, `.ddp` and `.optimizer` against the fields of Megatron-Core's own records.

No device is needed, so that mistakes are found before one is taken.
"""

import dataclasses
import difflib
import math
import reprlib
from typing import Any, get_type_hints

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from lens_megatron.config import ConfigError, MegatronConfig

MODELS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
          "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk")  # fmt: skip
"""Fields of the transformer that say what model it is."""
LAYOUTS = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
           "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
           "sequence_parallel")  # fmt: skip
"""Fields of the transformer that are options of `megatron:` too."""


def check(options: MegatronConfig) -> None:
    """Raises ConfigError for a field that Megatron-Core does not have, that is not the user's, or of another type."""
    for name in options.transformer:
        if name in MODELS:
            raise ConfigError(f"megatron.transformer.{name} cannot be set: it is the model's in model.path; remove it")
        if name in LAYOUTS:
            raise ConfigError(f"megatron.transformer.{name} cannot be set: it is megatron.{name}; set that")
    if options.ddp.get("overlap_param_gather"):
        raise ConfigError(
            "megatron.ddp.overlap_param_gather: the engine's weights and the head are read outside the modules whose "
            "forward would wait for the gather; leave it false"
        )
    _check_fields("transformer", options.transformer, TransformerConfig)
    _check_fields("ddp", options.ddp, DistributedDataParallelConfig)
    _check_fields("optimizer", options.optimizer, OptimizerConfig)


def _check_fields(section: str, given: dict[str, Any], record: type) -> None:
    fields, types = {field.name: field for field in dataclasses.fields(record)}, get_type_hints(record)
    for name, value in given.items():
        where = f"megatron.{section}.{name}"
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise ConfigError(
                f"megatron.{section}: Megatron-Core's {record.__name__} has no field {reprlib.repr(name)}"
                + (f"; did you mean {near[0]}?" if near else "; remove it")
            )
        if value is None and fields[name].default is None:
            continue
        if why := _why_not(value, types[name]):
            raise ConfigError(f"{where} ({reprlib.repr(value)}): {why}; see Megatron-Core's {record.__name__}")


def _why_not(value: Any, wanted: Any) -> str:
    """Returns what keeps `value` from being of the type `wanted`; an empty text if nothing does."""
    if isinstance(value, float) and not math.isfinite(value):
        return "expected a finite number"
    try:
        found = TypeAdapter(wanted, config={"arbitrary_types_allowed": True}).validate_python(value)
    except ValidationError as error:
        return error.errors()[0]["msg"]
    except PydanticSchemaGenerationError:
        return ""  # a type that pydantic knows nothing of
    if isinstance(value, str) and not isinstance(found, str):
        return f"expected no text; write {found!r} without quotation marks"
    if isinstance(value, float) and isinstance(found, int):
        return f"expected a whole number; write {found}"
    return ""
