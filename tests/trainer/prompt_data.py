"""Writes small datasets and loads their prompts, with a tokenizer small enough to read.

The tokenizer is byte-level BPE: a word with its space is one token if it is in WORDS, else its bytes are.
"""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lens_megatron.config import DataConfig, LensConfig
from lens_megatron.data.prompts import DataError, load_prompts
from lens_megatron.types import Prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["user", "system", "assistant", " How", "How", " many", " two", " apples", "Box", " it", "?\n", " .", "Why"]
BOX = "Box it."
GOOD = '{"problem": "How", "answer": "1"}'
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def make_tokenizer(template: str | None = CHATML, trim_offsets: bool = False, bos: bool = False):
    to_bytes = {chr(b): c for b, c in zip(range(33, 127), map(chr, range(33, 127)), strict=True)}
    to_bytes |= {" ": "Ġ", "\n": "Ċ"}
    vocab, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in WORDS:
        letters = [to_bytes[c] for c in word]
        for end in range(1, len(letters)):
            merge = ("".join(letters[:end]), letters[end])
            if merge not in merges:
                merges.append(merge)
                vocab.append("".join(merge))
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocab)}, merges))
    pieces = Regex(r" ?[A-Za-z]+|[0-9]|[?.]?\n| ?[^A-Za-z0-9\n ]| ")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", bos_token="<s>", chat_template=template, model_max_length=64
    )


TOKENIZER = make_tokenizer()


def write_jsonl(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def load(source: str, tokenizer=TOKENIZER, lens: LensConfig | None = None, **data):
    data = DataConfig(**{"train": source, "instruction": BOX, **data})
    return load_prompts(source, tokenizer, data, lens or LensConfig())


def text(prompt: Prompt, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(prompt.token_ids)


def pieces(prompt: Prompt, tokenizer=TOKENIZER) -> list[str]:
    """The eligible tokens."""
    return [tokenizer.decode([t]) for t, go in zip(prompt.token_ids, prompt.eligible, strict=True) if go]


def error(call, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    return str(caught.value)
