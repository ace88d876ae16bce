"""The model directory's tokenizer, and the few things the trainer asks of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase


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


def load_tokenizer(path: str) -> Tokenizer:
    """Raises TokenizerError when there is none in the directory or it cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # third-party readers raise anything at all on a damaged file
        raise TokenizerError(f"model.path {path}: no tokenizer can be read there: {error}") from error
    return Tokenizer(tokenizer)
