"""Loads the tokenizer of a model directory, and gives the trainer the few functions of it that it needs."""

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lens_megatron.data.model_files import in_one_line
from lens_megatron.errors import UserError

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""The files of which one must exist: without any, transformers makes an empty tokenizer without an error."""
_OPTIONS = "tokenizer_config.json"
_INCOMPLETE, _LONGEST = "\ufffd", 4
"""What a tokenizer writes for bytes that are no character yet, and the most bytes of a character in UTF-8."""
_JSON_FILES = (_OPTIONS, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


class TokenizerError(UserError):
    """The user's model directory has no tokenizer that can be used."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer of transformers, with the functions that the trainer needs."""

    hf: PreTrainedTokenizerBase

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text without special tokens."""
        return self.hf.decode(token_ids, skip_special_tokens=True)

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """Returns the text with special tokens."""
        return self.hf.decode(token_ids, skip_special_tokens=False)

    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """Returns the text of every token, special tokens too; joined they are what `decode_all` returns.

        Where several tokens are one character, the last of them has it and the others have no text.
        """
        texts: list[str] = []
        begin, end = 0, 0  # the tokens of the last complete text: a tokenizer may write a token otherwise after another
        for position in range(1, len(token_ids) + 1):
            before, text = self.decode_all(token_ids[begin:end]), self.decode_all(token_ids[begin:position])
            complete = position == len(token_ids) or not text.endswith(_INCOMPLETE) or position - end == _LONGEST
            texts.append(text[len(before) :] if complete else "")
            if complete:
                begin, end = end, position
        return texts

    def retokenize(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Returns the ids of the text that `token_ids` decode to; they differ where a merge crosses a deletion."""
        return tuple(self.hf.encode(self.decode_all(token_ids), add_special_tokens=False))

    def boxed(self, answer: str) -> tuple[int, ...]:
        """Returns the ids of `\\boxed{answer}`, which is how a response states the answer in the end."""
        return tuple(self.hf.encode(f"\\boxed{{{answer}}}", add_special_tokens=False))


def load_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    """Loads it. Raises TokenizerError when it does not exist, cannot be read or has more tokens than the model."""
    _check_files(path)
    folder = Path(path)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise TokenizerError(
            f"model.path {path}: no tokenizer there ({' or '.join(VOCABULARY_FILES)}); copy the model's tokenizer files"
        )
    for name in _JSON_FILES:
        _check_json(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except BaseException as error:  # third-party readers raise errors of any type on a damaged file, or panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"model.path {path}: no tokenizer can be read there: {type(error).__name__}: {in_one_line(error)}; "
            "copy the model's tokenizer files again"
        ) from error
    if not tokenizer.vocab_size:
        raise TokenizerError(f"model.path {path}: the tokenizer has no tokens; copy the model's tokenizer files again")
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
    """Raises TokenizerError for an entry that would block its reader or never end."""
    try:
        entries = list(os.scandir(path))
    except OSError as error:
        raise TokenizerError(f"model.path {path}: cannot be read: {error.strerror}; give a model directory") from error
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except OSError:
            continue  # a broken link counts as no file
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise TokenizerError(f"model.path {path}: {entry.name} is neither a file nor a folder; remove it")


def _check_json(path: Path) -> None:
    """Raises TokenizerError for a file that holds no JSON object. The library's own message would not name the file."""
    if not path.exists():
        if path.name == _OPTIONS:
            raise TokenizerError(
                f"model.path {path.parent}: no {path.name} there, without which the end token would be guessed; copy "
                "the model's tokenizer files"
            )
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(
            f"model.path: {path} cannot be read: {type(error).__name__}: {error}; copy the model's file again"
        ) from error
    if not isinstance(content, dict):
        raise TokenizerError(
            f"model.path: {path} holds a {type(content).__name__} instead of an object; copy the model's file again"
        )
