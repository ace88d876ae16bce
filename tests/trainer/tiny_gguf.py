"""Writes a Llama of two layers as a GGUF file, quantised as SmolLM2's: `python tiny_gguf.py FOLDER` (needs gguf).

FOLDER gets tiny.gguf, and expected.npz with the weights in transformers' names and order of rows, dequantised here by
the definition of the formats.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD = 2, 64, 4, 2, 96
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def alphabet() -> list[str]:
    """The 256 characters that GPT-2's byte-level encoding writes for the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def q4_1(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32: scale d and least value m in float16, then 16 bytes; the low halves are the first 16 elements.

    Returns the bytes and the float32 weights d * q + m that they stand for.
    """
    blocks = weight.reshape(-1, 32)
    least = blocks.min(1).astype(np.float16)
    scale = ((blocks.max(1) - blocks.min(1)) / 15).astype(np.float16)
    d, m = scale.astype(np.float32)[:, None], least.astype(np.float32)[:, None]
    q = np.clip(np.round((blocks - m) / d), 0, 15).astype(np.uint8)
    packed = np.concatenate(
        [scale[:, None].view(np.uint8), least[:, None].view(np.uint8), q[:, :16] | (q[:, 16:] << 4)], 1
    )
    return packed.reshape(weight.shape[0], -1), (d * q + m).reshape(weight.shape)


def pairs_from_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Transformers' order of rows -> llama.cpp's: row j of a head's first half comes beside row j of its second."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + j
             for head in range(heads) for j in range(size // 2) for half in (0, 1)]  # fmt: skip
    return weight[order]


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    vocabulary = [*SPECIAL, *alphabet(), "Ġa", "Ġ1"]
    writer, expected = gguf.GGUFWriter(folder / "tiny.gguf", "llama"), {}
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary) - len(SPECIAL)))
    writer.add_token_merges(["Ġ a", "Ġ 1"])
    for add, token in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2)):
        add(token)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, theirs: str, rows: int, columns: int, heads: int = 0) -> None:
        weight = rng.normal(size=(rows, columns)).astype(np.float32) * 0.2
        stored = pairs_from_halves(weight, heads) if heads else weight
        packed, meant = q4_1(stored)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        expected[theirs] = q4_1(weight)[1] if heads else meant

    def add_norm(name: str, theirs: str) -> None:
        expected[theirs] = rng.normal(size=WIDTH).astype(np.float32)
        writer.add_tensor(name, expected[theirs])

    add("token_embd.weight", "model.embed_tokens.weight", len(vocabulary), WIDTH)
    add_norm("output_norm.weight", "model.norm.weight")
    kv = WIDTH // HEADS * KV_HEADS
    for i in range(LAYERS):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        add_norm(f"{ours}attn_norm.weight", f"{theirs}input_layernorm.weight")
        add_norm(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight")
        add(f"{ours}attn_q.weight", f"{theirs}self_attn.q_proj.weight", WIDTH, WIDTH, HEADS)
        add(f"{ours}attn_k.weight", f"{theirs}self_attn.k_proj.weight", kv, WIDTH, KV_HEADS)
        add(f"{ours}attn_v.weight", f"{theirs}self_attn.v_proj.weight", kv, WIDTH)
        add(f"{ours}attn_output.weight", f"{theirs}self_attn.o_proj.weight", WIDTH, WIDTH)
        add(f"{ours}ffn_gate.weight", f"{theirs}mlp.gate_proj.weight", FEED_FORWARD, WIDTH)
        add(f"{ours}ffn_up.weight", f"{theirs}mlp.up_proj.weight", FEED_FORWARD, WIDTH)
        add(f"{ours}ffn_down.weight", f"{theirs}mlp.down_proj.weight", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.savez(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
