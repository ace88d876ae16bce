"""Checks by their headers that the weight files of a model directory hold the model of its config.json."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from lens_megatron.config import Config
from lens_megatron.data.model_files import ModelError, StoredTensor, configured_end_tokens, in_one_line, stored_tensors
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.rollout.local import checkpoint_weights

_DTYPES = ("F64", "F32", "F16", "BF16")
_SAME = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "tie_word_embeddings", "hidden_act", "rms_norm_eps", "rope_parameters",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "attention_bias", "mlp_bias",
)  # fmt: skip
"""Fields of config.json that decide how weights are used; the reference, computed by the policy's model, must agree."""


def check_model(config: Config) -> PretrainedConfig:
    """Reads config.json, generation_config.json and the headers of all weights, of the reference too.

    Raises ModelError naming the option, the file and the remedy.
    """
    hf_config = read_hf_config(config.model.path)
    configured_end_tokens(config.model.path)
    check_weights(config.model.path, hf_config)
    if config.model.reference_path:
        check_reference(config.model.reference_path, hf_config)
    return hf_config


def check_weights(path: str, hf_config: PretrainedConfig, option: str = "model.path") -> None:
    """Reads the headers of all weight files.

    Raises:
        ModelError: a file is missing or damaged, a tensor missing, of another shape, or of a type that has no
            gradient; config.json describes a model that cannot be built.
    """
    expected = _expected_shapes(path, hf_config, option)
    stored = stored_tensors(Path(path), option)
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ModelError(
            f"{option} {path}: {len(missing)} of {len(expected)} tensors that config.json asks for are in no weight "
            f"file, {missing[0]} first; a file is missing or belongs to another model: download it again"
        )
    for name, shape in expected.items():
        _check_tensor(f"{option} {path}", name, stored[name], shape)


def _check_tensor(where: str, name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ModelError(
            f"{where}: {stored.file}: {name} has shape {list(stored.shape)}, config.json asks for {list(shape)}; "
            "the file belongs to another model: download it again"
        )
    if stored.dtype not in _DTYPES:
        raise ModelError(
            f"{where}: {stored.file}: {name} is of type {stored.dtype}; supported: {', '.join(_DTYPES)}. Give the "
            "model before it was quantized"
        )


def check_reference(path: str, policy_config: PretrainedConfig, option: str = "model.reference_path") -> None:
    """Checks the reference as `check_weights` does, and that the policy's model computes it. Raises ModelError."""
    config = read_hf_config(path, option)
    for name in _SAME:
        here, there = _plain(getattr(policy_config, name, None)), _plain(getattr(config, name, None))
        if here != there:
            raise ModelError(
                f"{option} {path}: {name} is {there}, model.path has {here}; the reference must be a model of the "
                "policy's architecture"
            )
    check_weights(path, config, option)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _expected_shapes(path: str, hf_config: PretrainedConfig, option: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor by its name in checkpoints; a tied head is left out."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
    except Exception as error:  # sizes that fit no model fail anywhere in transformers or torch
        raise ModelError(
            f"{option} {path}: config.json describes a model that cannot be built: {type(error).__name__}: "
            f"{in_one_line(error)}; download it again"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in checkpoint_weights(model).items()}
