"""Reads Hugging Face directories into Megatron shards through mbridge.

`build_bridge` wraps mbridge's bridge of the model family with what its version lacks: the local layer spec of a machine
without Transformer Engine, rotary scaling of Llama 3, transformers 5's rope parameters, per-instance name tables,
experts that are modules of their own.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mbridge.core.bridge import _MODEL_REGISTRY, Bridge
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import unwrap_model
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig

from lens_megatron.data.model_files import ModelError, in_one_line
from lens_megatron.policy.layers import use_own_layers, use_packed_attention

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The values that Megatron-Core's RotaryEmbedding hard-codes for scaled rope."""

_LOCAL_NORMS = {
    "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"],
    "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
}


def read_hf_config(path: str, option: str = "model.path") -> PretrainedConfig:
    """Reads and checks config.json of the model directory that `option` names.

    Raises:
        ModelError: no such directory, unreadable, unsupported family or rope type, or missing weights.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{option} {path}: no config.json there; give a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises anything at all on a damaged file
        raise ModelError(
            f"{option} {path}: config.json cannot be read: {in_one_line(error)}; download it again"
        ) from error
    if config.model_type not in FAMILIES:
        raise ModelError(f"{option} {path}: model type {config.model_type!r}; supported: {', '.join(FAMILIES)}")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{option} {path}: no *.safetensors file there; weights in other formats are not read")
    try:
        if getattr(config, "head_dim", None) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
        rope = dict(config.rope_parameters)
        config.rope_theta = rope["rope_theta"]
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{option} {path}: config.json describes no model: {type(error).__name__}: {error}; download it again"
        ) from error
    _check_rope(f"{option} {path}", rope)
    return config


def _check_rope(where: str, rope: dict) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"{where}: rope type {kind!r}; supported: default, linear, llama3")
    for key, value in LLAMA3_ROPE.items() if kind == "llama3" else ():
        if rope.get(key) != value:
            raise ModelError(f"{where}: llama3 rope with {key}={rope.get(key)}; supported: {value}")


def build_bridge(
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    tp_size: int,
    sequence_parallel: bool = False,
    *,
    shares_prompts: bool = False,
) -> Bridge:
    """Builds a bridge whose `config` (TransformerConfig) fits this machine; it needs Megatron's parallel state.

    Args:
        shares_prompts: sequences may share prompts, which Transformer Engine's attention and its fused rotary
            embeddings cannot; ours take their places.
    """
    family = _MODEL_REGISTRY[hf_config.model_type]
    local = not transformer_engine_available()
    attributes = {"local_spec": local, "shares_prompts": shares_prompts}
    bridge_class = type(f"Lens{family.__name__}", (_LensBridge, family), attributes)
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
    if shares_prompts:
        extra["apply_rope_fusion"] = False
    if hf_config.model_type == "qwen3_moe":
        extra |= _expert_options(hf_config, local)
    bridge.set_extra_args(**extra)
    return bridge


def _expert_options(hf_config: PretrainedConfig, local: bool) -> dict[str, Any]:
    """Returns the options that mbridge's Qwen3-MoE bridge leaves out or assumes, as transformers computes the model."""
    sparse = [
        i not in hf_config.mlp_only_layers and (i + 1) % hf_config.decoder_sparse_step == 0
        for i in range(hf_config.num_hidden_layers)
    ]
    balanced = hf_config.output_router_logits  # transformers adds the loss there too; it is off in published models
    return {
        "moe_layer_freq": [int(layer) for layer in sparse],
        "moe_grouped_gemm": not local,
        "moe_router_dtype": "fp32",
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss" if balanced else "none",
        "moe_aux_loss_coeff": hf_config.router_aux_loss_coef if balanced else 0.0,
    }


def transformer_engine_available() -> bool:
    """Returns whether Transformer Engine is installed and has a GPU to run on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


class _LensBridge:
    """Is mixed in before an mbridge class, whose hooks it overrides."""

    local_spec: bool
    shares_prompts: bool
    has_vp_stage: bool
    config: TransformerConfig
    hf_config: PretrainedConfig
    _DIRECT_MAPPING: dict[str, str]
    _OTHER_MAPPING: dict[str, list[str]]
    _MLP_MAPPING: dict[str, list[str]]

    def _adjust_mapping_for_shared_weights(self) -> None:
        self._DIRECT_MAPPING = dict(self._DIRECT_MAPPING)  # mbridge would write into the class, for every later model
        self._OTHER_MAPPING = {**self._OTHER_MAPPING, **_LOCAL_NORMS}
        dense = Bridge._MLP_MAPPING  # which the bridges of models with experts leave out
        self._MLP_MAPPING = {**dense, **self._MLP_MAPPING, **_LOCAL_NORMS}
        if self.hf_config.tie_word_embeddings:
            self._DIRECT_MAPPING["output_layer.weight"] = "model.embed_tokens.weight"

    def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        self.has_vp_stage = True
        spec = get_gpt_decoder_block_spec(self.config, use_transformer_engine=not self.local_spec, vp_stage=vp_stage)
        if self.local_spec:
            return use_own_layers(spec)
        return use_packed_attention(spec) if self.shares_prompts else spec

    def _get_gptmodel_args(self) -> dict[str, Any]:
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


class GroupedNames:
    """Shows mbridge a model whose experts are named as Transformer Engine names those of one grouped product:
    `experts.linear_fc1.weight3`, not `experts.local_experts.3.linear_fc1.weight`."""

    def __init__(self, model: torch.nn.Module):
        self.decoder, self._model = model.decoder, model
        self._state = {_grouped_name(name): value for name, value in model.state_dict().items()}

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((_grouped_name(name), parameter) for name, parameter in self._model.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        return self._state  # mbridge asks once per tensor


def _grouped_name(name: str) -> str:
    return re.sub(r"\.local_experts\.(\d+)\.(linear_fc\d\.weight)$", r".\2\1", name)


def import_weights(bridge: Bridge, chunks: Sequence[torch.nn.Module], path: str) -> None:
    """Loads a Hugging Face directory into this rank's shards. Raises ModelError when a tensor is missing."""
    try:
        with torch.no_grad():
            bridge.load_weights([GroupedNames(model) for model in unwrap_model(list(chunks))], path)
    except (KeyError, OSError, RuntimeError, AssertionError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(f"{path}: the weights do not fit its config.json: {error}") from error
