"""The model directory's tokenizer, and the few things the trainer asks of it."""

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
    if not any((Path(path) / name).is_file() for name in VOCABULARY_FILES):
        raise TokenizerError(
            f"model.path {path}: no tokenizer there ({' or '.join(VOCABULARY_FILES)}); copy the model's tokenizer files"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # third-party readers raise anything at all on a damaged file
        raise TokenizerError(f"model.path {path}: no tokenizer can be read there: {error}") from error
    if len(tokenizer) > vocab_size:
        raise TokenizerError(
            f"model.path {path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocab_size} rows; "
            "use the tokenizer that belongs to the model"
        )
    return Tokenizer(tokenizer)
