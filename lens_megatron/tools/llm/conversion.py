"""Converts a GGUF file of the Llama family: `python -m lens_megatron.tools.llm.conversion FILE FOLDER`.

transformers dequantises the weights to float32 and builds the tokenizer; what it made is compared, tensor by tensor,
with what gguf itself reads, and written as an ordinary Hugging Face directory. The process needs gguf and accelerate.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_file(file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of `file` into `folder`.

    Raises:
        ValueError: `file` holds no Llama model with a tokenizer and a chat template, or transformers reads other
            weights from it than gguf does.
    """
    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    if read.config.model_type != "llama":
        raise ValueError(f"the model is of the family {read.config.model_type!r}, expected 'llama'")
    state = read.state_dict()
    check_weights(file, state, read.config)
    model = LlamaForCausalLM(_plain_config(read.config))
    model.load_state_dict(state)
    model.generation_config = read.generation_config
    tokenizer = plain_tokenizer(file, read.config.max_position_embeddings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_weights(file: Path, state: dict[str, torch.Tensor], config: Any) -> None:
    """Compares `state`, {name in transformers: weight}, with the tensors of `file` as gguf dequantises them.

    Raises ValueError unless both have the same tensors with equal elements.
    """
    import gguf

    expected = {}
    for tensor in gguf.GGUFReader(file).tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = _name_in_transformers(tensor.name)
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            weight = halves_from_pairs(weight, heads)
        expected[name] = weight
    if config.tie_word_embeddings:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    if expected.keys() != state.keys():
        raise ValueError(f"these tensors are on one side only: {sorted(expected.keys() ^ state.keys())[:5]}")
    for name, weight in expected.items():
        if not np.array_equal(weight, state[name].numpy()):
            raise ValueError(f"transformers reads another {name} than gguf does")


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key projection: [heads * d, n] -> [heads * d, n].

    llama.cpp rotates neighbouring rows of a head together, transformers rows that are d / 2 apart. Rows 0 1 2 3 of a
    head of d = 4 become rows 0 2 1 3.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _name_in_transformers(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".")
    if parts[0] == "blk" and len(parts) == 3 and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{kind}"
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    raise ValueError(f"the tensor {name} belongs to no Llama model")


def _plain_config(config: Any) -> LlamaConfig:
    """Returns the configuration without the note that the weights were quantised."""
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    fields["rms_norm_eps"] = float(str(np.float32(config.rms_norm_eps)))  # GGUF has 1e-5 in float32: 9.99999975e-06
    return LlamaConfig(**fields)


def plain_tokenizer(file: Path, max_length: int) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of `file` in the form that any reader of Hugging Face directories loads.

    Raises ValueError where `file` has no chat template or no end token.
    """
    import gguf

    read = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if not read.chat_template or read.eos_token is None:
        raise ValueError("it has no chat template or no end token; take an instruct model")
    backend = read.backend_tokenizer
    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        # transformers drops it. It matters where several spaces precede a digit.
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token or read.eos_token,
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=max_length,
    )


def main() -> int:
    """Returns the exit status: 1 with a message where the file cannot be converted."""
    file, folder = map(Path, sys.argv[1:])
    try:
        convert_file(file, folder)
    except (ValueError, OSError, ImportError, KeyError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
