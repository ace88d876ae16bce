"""Hugging Face directory <-> Megatron shards, through mbridge.

`build_bridge` wraps mbridge's bridge of the model family with what its version lacks: the local layer spec of a machine
without Transformer Engine, rotary scaling of Llama 3, transformers 5's rope parameters, per-instance name tables.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from mbridge.core.bridge import _MODEL_REGISTRY, Bridge
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from lens_megatron.policy.layers import use_own_layers

FAMILIES = ("llama", "qwen2", "qwen3")
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-Core's RotaryEmbedding hard-codes for scaled rope."""

_LOCAL_NORMS = {
    "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"],
    "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
}


class ModelError(ValueError):
    """The user's model directory cannot be used; the message says why and what to do."""


def read_hf_config(path: str) -> PretrainedConfig:
    """Reads and checks config.json of a model directory.

    Raises:
        ModelError: no such directory, unreadable, a family or rope type that is not supported, weights missing.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path {path}: no config.json there; give a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"model.path {path}: config.json cannot be read: {error}") from error
    if config.model_type not in FAMILIES:
        raise ModelError(f"model.path {path}: model type {config.model_type!r}; supported: {', '.join(FAMILIES)}")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"model.path {path}: no *.safetensors file there; weights in other formats are not read")
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    rope = dict(config.rope_parameters)
    config.rope_theta = rope["rope_theta"]
    _check_rope(path, rope)
    return config


def _check_rope(path: str, rope: dict) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"model.path {path}: rope type {kind!r}; supported: default, linear, llama3")
    for key, value in LLAMA3_ROPE.items() if kind == "llama3" else ():
        if rope.get(key) != value:
            raise ModelError(f"model.path {path}: llama3 rope with {key}={rope.get(key)}; supported: {value}")


def build_bridge(
    hf_config: PretrainedConfig, dtype: torch.dtype, tp_size: int, sequence_parallel: bool = False
) -> Bridge:
    """A bridge whose `config` (TransformerConfig) fits this machine. Needs Megatron's parallel state."""
    family = _MODEL_REGISTRY[hf_config.model_type]
    local = not transformer_engine_available()
    bridge_class = type(f"Lens{family.__name__}", (_LensBridge, family), {"local_spec": local})
    padding = tp_size if hf_config.vocab_size % tp_size else None
    bridge = bridge_class(hf_config, dtype=dtype, make_vocab_size_divisible_by=padding)
    extra = {"calculate_per_token_loss": True, "sequence_parallel": sequence_parallel}
    if local:
        extra |= {
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
            "gradient_accumulation_fusion": False,
            "use_cpu_initialization": not torch.cuda.is_available(),
        }
    bridge.set_extra_args(**extra)
    return bridge


def transformer_engine_available() -> bool:
    """True where Transformer Engine is installed and has a GPU to run on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


class _LensBridge:
    """Mixed in before an mbridge class; overrides its hooks."""

    local_spec: bool

    def _adjust_mapping_for_shared_weights(self) -> None:
        self._DIRECT_MAPPING = dict(self._DIRECT_MAPPING)  # mbridge would write into the class, for every later model
        self._OTHER_MAPPING = {**self._OTHER_MAPPING, **_LOCAL_NORMS}
        self._MLP_MAPPING = {**self._MLP_MAPPING, **_LOCAL_NORMS}
        if self.hf_config.tie_word_embeddings:
            self._DIRECT_MAPPING["output_layer.weight"] = "model.embed_tokens.weight"

    def _get_transformer_layer_spec(self, vp_stage: int | None = None):
        self.has_vp_stage = True
        spec = get_gpt_decoder_block_spec(self.config, use_transformer_engine=not self.local_spec, vp_stage=vp_stage)
        return use_own_layers(spec) if self.local_spec else spec

    def _get_gptmodel_args(self) -> dict:
        rope = dict(self.hf_config.rope_parameters)
        kind = rope.get("rope_type", "default")
        arguments = {
            "vocab_size": self.hf_config.vocab_size,
            "max_sequence_length": self.hf_config.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": rope["rope_theta"],
        }
        if kind == "linear":
            arguments["seq_len_interpolation_factor"] = rope["factor"]
        if kind == "llama3":
            arguments |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
        return arguments


def import_weights(bridge: Bridge, chunks: list[torch.nn.Module], path: str) -> None:
    """Loads a Hugging Face directory into this rank's shards. Raises ModelError when a tensor is missing."""
    try:
        with torch.no_grad():
            bridge.load_weights(chunks, path)
    except (KeyError, OSError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{path}: the weights do not fit its config.json: {error}") from error


def export_weights(bridge: Bridge, chunks: list[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Streams every weight once, whole, under its Hugging Face name, to every rank of the model-parallel group.

    A collective: all ranks of the group must exhaust it. A tied head is sent as the embedding alone.
    """
    seen = set()
    stream = bridge.export_weights(chunks)
    while True:
        with torch.no_grad():  # else the gathers would enter the graph of the next backward pass
            item = next(stream, None)
        if item is None:
            return
        name, tensor = item
        if name not in seen:
            seen.add(name)
            yield name, tensor.detach()
