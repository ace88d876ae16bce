"""Builds one engine in this process, without torchrun, and gives it the weights of a model directory."""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from lens_megatron.config import ConfigError, from_tree
from lens_megatron.data.model_files import configured_end_tokens, stored_tensors
from lens_megatron.policy import platform
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.policy.model import DTYPES
from lens_megatron.policy.model_check import check_weights
from lens_megatron.policy.parallel import shut_down
from lens_megatron.rollout.engine import RolloutEngine
from lens_megatron.rollout.local import LocalEngine, checkpoint_weights
from lens_megatron.rollout.vllm import options as vllm_options
from lens_megatron.rollout.vllm.engine import VllmEngine

logger = logging.getLogger(__name__)

_BLOCKS, _BLOCK_BYTES = 64, 4096
_CONTENT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What is to sample."""

    model: str
    engine: str
    """local or vllm."""
    dtype: str
    """float32 or bfloat16."""
    max_running_sequences: int
    max_prompt_tokens: int
    max_new_tokens: int
    gpu_memory_utilization: float


def default_engine() -> str:
    """Returns vllm where there are a GPU and vLLM, else local."""
    return "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "local"


def default_dtype() -> str:
    return "bfloat16" if torch.cuda.is_available() else "float32"


def check_model_folder(path: str) -> PretrainedConfig:
    """Checks configuration and weight files by their headers. Raises ModelError."""
    hf_config = read_hf_config(path)
    configured_end_tokens(path)
    check_weights(path, hf_config)
    return hf_config


def fingerprint(path: str) -> str:
    """Returns 16 hexadecimal digits of a model directory: its small files, and 64 blocks of each weight file.

    Any training step changes nearly every weight, so blocks at even distances tell two checkpoints apart, and a model
    of 100 GB is read in moments.
    """
    found = hashlib.sha256()
    for name in _CONTENT:
        file = Path(path) / name
        found.update(f"{name}\0".encode() + (file.read_bytes() if file.is_file() else b""))
    for file in sorted(Path(path).glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            for block in range(_BLOCKS):
                opened.seek(size * block // _BLOCKS)
                found.update(opened.read(_BLOCK_BYTES))
    return found.hexdigest()[:16]


@contextmanager
def engine_of(choice: EngineChoice, hf_config: PretrainedConfig) -> Iterator[RolloutEngine]:
    """Builds the engine, awake and with the model's weights, and closes it after the block.

    Raises ConfigError where it cannot be built, or where torchrun has started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("lens-eval is one process; start it without torchrun")
    engine = _vllm(choice, hf_config) if choice.engine == "vllm" else _local(choice)
    try:
        engine.load_weights(weights_of(choice.model, hf_config), 0)
        engine.wake()
        yield engine
    finally:
        engine.close()
        if choice.engine == "vllm":
            shut_down()


def _local(choice: EngineChoice) -> LocalEngine:
    return LocalEngine(
        choice.model,
        max_running_sequences=choice.max_running_sequences,
        dtype=DTYPES[choice.dtype],
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def _vllm(choice: EngineChoice, hf_config: PretrainedConfig) -> VllmEngine:
    config = from_tree(
        {
            "run": {"directory": "unused"},
            "model": {"path": choice.model, "dtype": choice.dtype},
            "data": {"train": "unused", "max_prompt_length": choice.max_prompt_tokens},
            "rollout": {
                "engine": "vllm",
                "max_response_length": choice.max_new_tokens,
                "max_running_sequences": choice.max_running_sequences,
            },
            "vllm": {"gpu_memory_utilization": choice.gpu_memory_utilization},
        }
    )
    vllm_options.check(config, hf_config)
    platform.init_process_group(platform.install())
    return VllmEngine(config, hf_config)


def weights_of(path: str, hf_config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields every weight that the model's configuration asks for, by its name in checkpoints, file by file."""
    with torch.device("meta"):
        names = checkpoint_weights(AutoModelForCausalLM.from_config(hf_config)).keys()
    stored = stored_tensors(Path(path))
    for file in sorted({stored[name].file for name in names}):
        with safe_open(Path(path) / file, "pt") as opened:
            for name in names:
                if stored[name].file == file:
                    yield name, opened.get_tensor(name)
