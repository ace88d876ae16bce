"""Computes what follows from a dense transformer's dimensions: parameters, KV cache, FLOPs.

Its functions are pure. Fields are named as in Hugging Face's config.json, so that a shape can stand where a config is
read.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from lens_megatron.config import ConfigError

FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
"""The parts that the layers of a family have beyond those of Llama."""
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SUFFIXES = ("-instruct", "-base", "-it")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a dense transformer."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Elements of the keys of one token. Its values have as many."""
        return self.num_key_value_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """The published number of parameters: a tied head counts once. Example: 7,615,616,512 for Qwen2.5-7B."""
        return self.stage_parameters(tp=1, pp=1, stage=0)

    def stage_parameters(self, tp: int, pp: int, stage: int) -> int:
        """Parameters on one rank of pipeline stage `stage`, vocabulary padding and replicated norms counted."""
        layers = self.num_hidden_layers // pp * self.layer_parameters(tp)
        embedding = self.padded_vocab_size(tp) // tp * self.hidden_size
        first, last = stage == 0, stage == pp - 1
        total = layers + embedding * first + self.hidden_size * last
        if last and not (self.tie_word_embeddings and first):
            total += embedding  # the head; of a tied one, the last stage's own copy
        return total

    def layer_parameters(self, tp: int) -> int:
        """Parameters of one layer on one tensor-parallel rank. Norms are whole on each."""
        qkv = self.query_size + 2 * self.key_size
        matrices = self.hidden_size * (qkv + self.query_size + 3 * self.intermediate_size)
        biases = qkv if self.qkv_bias else 0
        return (matrices + biases) // tp + 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding, a multiple of `tp`."""
        return -(-self.vocab_size // tp) * tp

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of the keys and values of one token in all layers. Example: 57,344 for Qwen2.5-7B in bf16."""
        return 2 * self.num_hidden_layers * self.key_size * element_bytes

    def forward_flops(self, tokens: float, context: float, heads: float | None = None) -> float:
        """Operations of a forward pass over `tokens` tokens that see `context` tokens each on average.

        Args:
            heads: how many of the tokens reach the LM head; all of them by default.
        """
        layer = self.layer_parameters(1) * self.num_hidden_layers
        attention = 2 * 2 * self.num_hidden_layers * self.query_size * context
        head = 2 * self.vocab_size * self.hidden_size
        return tokens * (2 * layer + attention) + (tokens if heads is None else heads) * head


def _shape(model_type: str, dimensions: str, vocab_size: int, tied: bool, positions: int) -> ModelShape:
    layers, hidden, heads, groups, head_dim, intermediate = map(int, dimensions.split())
    return ModelShape(
        model_type, layers, hidden, heads, groups, head_dim, intermediate, vocab_size, tied, positions,
        **FAMILIES[model_type],
    )  # fmt: skip


# layers, hidden, heads, KV heads, head dimension, intermediate; vocabulary, tied, positions
SHAPES = {
    "Llama-3.2-3B": _shape("llama", "28 3072 24 8 128 8192", 128256, True, 131072),
    "Qwen2.5-3B": _shape("qwen2", "36 2048 16 2 128 11008", 151936, True, 32768),
    "Qwen2.5-7B": _shape("qwen2", "28 3584 28 4 128 18944", 152064, False, 131072),
    "Qwen2.5-32B": _shape("qwen2", "64 5120 40 8 128 27648", 152064, False, 131072),
    "Qwen3-4B": _shape("qwen3", "36 2560 32 8 128 9728", 151936, True, 32768),
    "Qwen3-8B": _shape("qwen3", "36 4096 32 8 128 12288", 151936, False, 32768),
}
"""The paper's models and Qwen2.5-32B. `-Base` and `-Instruct` have the shape of their model."""


def read_shape(path: str) -> ModelShape:
    """The shape of the model directory `path`, or, where nothing stands there, of the table's model of that name.

    Raises:
        ConfigError: config.json cannot be used; neither a directory nor a name in the table.
    """
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        return _from_table(path)
    try:
        return from_hf(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"model.path {path}: config.json cannot be used: {error}") from error


def from_hf(tree: dict) -> ModelShape:
    """Reads a shape from the contents of config.json. Raises ValueError for what is missing or not supported."""
    if not isinstance(tree, dict) or tree.get("model_type") not in FAMILIES:
        kind = tree.get("model_type") if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"model type {kind!r}; the plan knows {', '.join(FAMILIES)}, and no experts yet")
    if missing := [key for key in _NEEDED if not isinstance(tree.get(key), int) or tree[key] < 1]:
        raise ValueError(f"no positive whole number for {', '.join(missing)}")
    heads = tree["num_attention_heads"]
    return ModelShape(
        tree["model_type"],
        tree["num_hidden_layers"],
        tree["hidden_size"],
        heads,
        tree.get("num_key_value_heads") or heads,
        tree.get("head_dim") or tree["hidden_size"] // heads,
        tree["intermediate_size"],
        tree["vocab_size"],
        bool(tree.get("tie_word_embeddings", False)),
        tree.get("max_position_embeddings", 32768),
        **FAMILIES[tree["model_type"]],
    )


def _from_table(path: str) -> ModelShape:
    name = Path(path).name.lower()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    known = {key.lower(): shape for key, shape in SHAPES.items()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {next(k for k in SHAPES if k.lower() == near[0])}?" if near else ""
    raise ConfigError(
        f"model.path {path}: no config.json there, and {Path(path).name!r} is not in the table of known models{hint} "
        f"(known: {', '.join(SHAPES)}); give a Hugging Face model directory"
    )
