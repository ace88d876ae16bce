"""The model directory's tokenizer, and the few things the trainer asks of it."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of these must be there: without any, transformers makes an empty tokenizer and says nothing."""


class TokenizerError(ValueError):
    """The user's model directory has no tokenizer that can be used."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    hf: PreTrainedTokenizerBase

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.hf.decode(token_ids, skip_special_tokens=True)

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens."""
        return self.hf.decode(token_ids, skip_special_tokens=False)

    def retokenize(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Ids of the text that `token_ids` decode to; differs from them where a merge crosses a deletion."""
        return tuple(self.hf.encode(self.decode_all(token_ids), add_special_tokens=False))


def load_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    """Raises TokenizerError when there is none, it cannot be read, or it has more tokens than the model."""
    _check_files(path)
    if not any((Path(path) / name).is_file() for name in VOCABULARY_FILES):
        raise TokenizerError(
            f"model.path {path}: no tokenizer there ({' or '.join(VOCABULARY_FILES)}); copy the model's tokenizer files"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # third-party readers raise anything on a damaged file, Rust's no Exception even
        raise TokenizerError(
            f"model.path {path}: no tokenizer can be read there: {type(error).__name__}: {error}; copy the model's "
            "tokenizer files again"
        ) from error
    if len(tokenizer) > vocab_size:
        raise TokenizerError(
            f"model.path {path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocab_size} rows; "
            "use the tokenizer that belongs to the model"
        )
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size:
        raise TokenizerError(
            f"model.path {path}: the tokenizer's token {token!r} is number {largest}, the model's embedding has "
            f"{vocab_size} rows; use the tokenizer that belongs to the model"
        )
    return Tokenizer(tokenizer)


def _check_files(path: str) -> None:
    """Raises TokenizerError for what would block its reader, or never end."""
    try:
        entries = list(os.scandir(path))
    except OSError as error:
        raise TokenizerError(f"model.path {path}: cannot be read: {error.strerror}; give a model directory") from error
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except OSError:
            continue  # a link that leads nowhere is as good as no file
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise TokenizerError(f"model.path {path}: {entry.name} is neither a file nor a folder; remove it")
