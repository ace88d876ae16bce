"""Makes `Prompt`s of a dataset in the order of training: renders, masks eligible tokens, and streams over epochs.

    source --datasets.read_records--> Record --_Renderer--> text, eligible spans --tokenizer--> Prompt
    PromptStream.at(position) -> the prompts in the order of training

A prompt is the chat template around the row's messages, with the answer-format instruction after the problem. A
tokenizer without a chat template gets the messages as lines of plain text. The characters of the rendered text that
purification may delete are mapped to tokens by their offsets: a token that crosses the boundary of the problem is kept.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateError
from tqdm import tqdm

from lens_megatron.config import DataConfig, LensConfig
from lens_megatron.data.datasets import DataError, Message, Record, Span, read_records
from lens_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataError", "LoadedPrompts", "PromptStream", "load_prompts", "render_chat"]

_BATCH, _BATCH_CHARACTERS = 512, 1_000_000
_PROGRESS_FROM = 2_000
_FRAMES = 16
_LONGEST_RENDERED = 4_000_000
"""The most characters of a rendered prompt: several long messages, or a template that repeats them, give more."""
_PLACEHOLDER, _OTHER = "<<the text of the user>>", "<<another text>>"


@dataclass(frozen=True)
class LoadedPrompts:
    """All prompts of one file or dataset."""

    prompts: tuple[Prompt, ...]
    dropped_too_long: int
    """The number of rows left out because they have more than `data.max_prompt_length` tokens."""
    source: str
    """The name of the file or dataset, as configured."""


def load_prompts(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    lens: LensConfig,
    *,
    whole_rows: bool = False,
) -> LoadedPrompts:
    """Reads, renders and tokenizes all rows of `source`; `Prompt.index` is the row, and dropped rows count too.

    With `lens.enabled=False` nothing may be deleted, so no token is eligible and none is marked as noise. `whole_rows`
    fills `Prompt.record`.

    Raises:
        DataError: a row cannot be used, there are no rows, all are too long, or the tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell where a token stands in the text; "
            "add a tokenizer.json to the model directory"
        )
    records = read_records(source, data, whole_rows=whole_rows)
    renderer, masker = _Renderer(tokenizer, data, lens), _Masker(tokenizer, lens)
    prompts: list[Prompt] = []
    shortest_dropped = None
    silent = True if len(records) <= _PROGRESS_FROM else None  # with None the bar is shown on a terminal only
    with tqdm(total=len(records), desc=f"Tokenizing {source}", unit=" prompts", disable=silent) as bar:
        for batch in _batches(records):
            drafts = [renderer.draft(record) for record in batch]
            for record, draft, (ids, offsets) in zip(batch, drafts, _tokenize(tokenizer, drafts), strict=True):
                if not ids:
                    raise DataError(f"{record.where}: the tokenizer makes no token of {draft.text!r}")
                if len(ids) > data.max_prompt_length:
                    shortest_dropped = min(len(ids), shortest_dropped or len(ids))
                    continue
                eligible, noise = masker.mask(draft, ids, offsets), masker.noise(draft, offsets)
                prompts.append(_prompt(record, draft, ids, eligible, noise))
            bar.update(len(batch))
    if not prompts:
        raise DataError(
            f"{source}: all {len(records)} prompts are longer than data.max_prompt_length={data.max_prompt_length}; "
            f"the shortest has {shortest_dropped} tokens"
        )
    return LoadedPrompts(tuple(prompts), len(records) - len(prompts), source)


def _prompt(
    record: Record, draft: "_Draft", ids: Sequence[int], eligible: tuple[bool, ...], noise: tuple[bool, ...]
) -> Prompt:
    return Prompt(
        index=record.index,
        token_ids=tuple(ids),
        eligible=eligible,
        answer=record.answer,
        problem=draft.problem,
        source=record.source,
        noise=noise,
        record=record.row,
    )


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Yields records to tokenize together, few if they are long: a tokenizer needs a thousand bytes per character."""
    batch: list[Record] = []
    characters = 0
    for record in records:
        size = sum(len(message.content) for message in record.messages)
        if batch and (len(batch) == _BATCH or characters + size > _BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(record)
        characters += size
    if batch:
        yield batch


@dataclass(frozen=True)
class PromptStream:
    """Passes endlessly over `prompts`, each time in another order. It has no state: a selection holds the position."""

    prompts: Sequence[Prompt]
    seed: int
    shuffle: bool = True
    _last_order: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)
    """A cache {epoch: permutation} of the last two used: computing one takes time in proportion to the dataset."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a stream needs at least one prompt")

    @property
    def epoch_length(self) -> int:
        """The number of prompts of one pass over the data."""
        return len(self.prompts)

    def at(self, position: int) -> Prompt:
        """Returns the prompt at `position`, counted from 0 over all epochs: a pure function of the position.

        Within one epoch every prompt comes exactly once.
        """
        if position < 0:
            raise ValueError(f"position must not be negative, got {position}")
        epoch, cursor = divmod(position, len(self.prompts))
        return self.prompts[self._order(epoch)[cursor]]

    def _order(self, epoch: int) -> range | np.ndarray:
        if not self.shuffle:
            return range(len(self.prompts))
        if epoch not in self._last_order:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.prompts))
            while len(self._last_order) > 1:
                del self._last_order[next(iter(self._last_order))]
            self._last_order[epoch] = order
        return self._last_order[epoch]


# ---- text and spans -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Draft:
    """A rendered row before tokenization."""

    text: str
    problem: str
    spans: tuple[Span, ...] | None
    """The characters that may be deleted; None allows all of them."""
    noise: tuple[Span, ...] = ()
    """The characters that the data marks as noise."""


def render_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str) -> str:
    """Returns the text of a conversation up to where the model answers: by the chat template, else line by line.

    Args:
        where: the name of the row in errors.

    Raises DataError where the template refuses the messages, or writes far too much.
    """
    if not tokenizer.chat_template:
        return "".join(f"{message.content}\n" for message in messages)
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program: `1 / 0` in it raises ZeroDivisionError here
        roles = textwrap.shorten(", ".join(message.role for message in messages), 200)
        why = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: the chat template refuses the messages ({roles}): {why}") from error
    if len(text) > _LONGEST_RENDERED:
        raise DataError(
            f"{where}: the chat template makes {len(text):,} characters of the messages, the most is "
            f"{_LONGEST_RENDERED:,}; shorten the row, or correct the template"
        )
    return str(text)


class _Renderer:
    """Renders a record as the text that the model reads, with the spans of characters that `lens.eligible` selects."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, lens: LensConfig):
        self.tokenizer, self.instruction, self.lens = tokenizer, data.instruction, lens
        self.frames: dict[tuple[Message, ...], tuple[str, str]] = {}

    def draft(self, record: Record) -> _Draft:
        *earlier, last = record.messages
        content, problem, spans = self._add_instruction(last.content, record.where)
        text = self._render((*earlier, Message("user", content)), record.where)
        frame = self._frame(tuple(earlier), record.where)
        if not self.lens.enabled:
            return _Draft(text, problem, ())
        noise: tuple[Span, ...] = ()
        if record.noise:  # the instruction follows the problem, so places in the problem are places in the content
            noise = self._locate(record.noise, content, text, frame, record.where, "leave data.noise_key empty")
        if self.lens.eligible in ("all", "all_nonspecial"):
            return _Draft(text, problem, None, noise)
        if self.lens.eligible == "user":
            spans = ((0, len(content)),)
        remedy = "set lens.eligible=all_nonspecial"
        return _Draft(text, problem, self._locate(spans, content, text, frame, record.where, remedy), noise)

    def _add_instruction(self, text: str, where: str) -> tuple[str, str, tuple[Span, ...]]:
        """Returns the user's message, the problem in it, and the problem's spans there, instructions excluded."""
        wanted = self.instruction.strip()
        if not wanted:
            return text, text, ((0, len(text)),)
        if wanted not in text:
            return f"{text}\n{self.instruction}", text, ((0, len(text)),)
        pieces, spans, end = text.split(wanted), [], 0
        for piece in pieces:
            spans.append((end, end + len(piece)))
            end += len(piece) + len(wanted)
        problem = "".join(pieces).strip()
        if not problem:
            raise DataError(f"{where}: the problem is empty but for the instruction {wanted!r}")
        return text, problem, tuple(spans)

    def _render(self, messages: tuple[Message, ...], where: str) -> str:
        return render_chat(self.tokenizer, messages, where)

    def _frame(self, earlier: tuple[Message, ...], where: str) -> tuple[str, str]:
        """Returns the template's text before and after the user's last message, which it must contain exactly once."""
        if earlier in self.frames:
            return self.frames[earlier]
        text, other = (self._render((*earlier, Message("user", mark)), where) for mark in (_PLACEHOLDER, _OTHER))
        times = text.count(_PLACEHOLDER)
        if times > 1 or text == other:
            raise DataError(
                f"{where}: the chat template writes the user's message {times} times instead of once; correct "
                "chat_template in the model directory"
            )
        before, _, after = text.rpartition(_PLACEHOLDER)
        if len(self.frames) == _FRAMES:
            self.frames.clear()
        self.frames[earlier] = before, after
        return before, after

    def _locate(
        self, spans: tuple[Span, ...], content: str, text: str, frame: tuple[str, str], where: str, remedy: str
    ) -> tuple[Span, ...]:
        """Returns the spans of `content` as spans of the rendered `text`.

        The content is located by the text around it. Searching for it would find a problem such as "a" in "assistant".
        """
        before, after = frame
        inside = text[len(before) : len(text) - len(after)]
        if not (text == before + inside + after and inside.strip() == content.strip()):
            raise DataError(
                f"{where}: the chat template changes the text of the problem, so that its tokens cannot be told from "
                f"the template's; {remedy}"
            )
        shift = len(before) + _leading_spaces(inside) - _leading_spaces(content)
        first, last = len(before), len(before) + len(inside)
        return tuple((max(start + shift, first), min(end + shift, last)) for start, end in spans)


def _leading_spaces(text: str) -> int:
    return len(text) - len(text.lstrip())


def _is_inside(text: str, span: Span, spans: Sequence[Span]) -> bool:
    """Returns whether one of `spans` holds the characters of `span`, or all but the spaces that it begins with."""
    piece = text[span[0] : span[1]]
    start = span[0] + (_leading_spaces(piece) if piece.strip() else 0)
    return bool(piece) and any(first <= start and span[1] <= last for first, last in spans)


# ---- tokens and masks ---------------------------------------------------------------------------------------------


def _tokenize(tokenizer: "PreTrainedTokenizerBase", drafts: Sequence[_Draft]) -> list[tuple[list[int], list[Span]]]:
    """Returns ids and character offsets of every draft. A chat template writes its own beginning-of-sequence token."""
    encoded = tokenizer(
        [draft.text for draft in drafts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    bos = tokenizer.bos_token_id
    if tokenizer.chat_template or bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return pairs
    return [([bos, *ids], [(0, 0), *offsets]) for ids, offsets in pairs]


@dataclass(frozen=True, slots=True)
class _Trait:
    """The properties of a token that do not depend on its place."""

    special: bool
    blank: bool
    leading: int
    """The number of characters of white space that the token begins with."""


class _Masker:
    """Makes the mask of eligible tokens from tokens and spans."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", lens: LensConfig):
        self.tokenizer = tokenizer
        self.keep_special, self.keep_blank = lens.eligible != "all", lens.protect_whitespace
        added = tokenizer.added_tokens_decoder
        self.special = {*tokenizer.all_special_ids, *(token for token in added if added[token].special)}
        self.traits: dict[int, _Trait] = {}

    def mask(self, draft: _Draft, ids: Sequence[int], offsets: Sequence[Span]) -> tuple[bool, ...]:
        """Returns [L] True where the token may be deleted."""
        if draft.spans == ():
            return (False,) * len(ids)
        eligible = [self._may_go(token, span, draft) for token, span in zip(ids, offsets, strict=True)]
        eligible[0] = False  # the first token has no prefix and so no score
        return tuple(eligible)

    def noise(self, draft: _Draft, offsets: Sequence[Span]) -> tuple[bool, ...]:
        """Returns [L] True where a token lies within what the data marks as noise; () where it marks nothing.

        White space that a token begins with may lie outside. A token without characters of its own is never noise.
        """
        if not draft.noise:
            return ()
        return tuple(_is_inside(draft.text, span, draft.noise) for span in offsets)

    def _may_go(self, token: int, span: Span, draft: _Draft) -> bool:
        trait = self.traits.get(token) or self._learn(token)
        piece = draft.text[span[0] : span[1]]
        if trait.special and self.keep_special:
            return False
        # The piece is checked too: an ideographic space may be three tokens, none of which decodes to it.
        if self.keep_blank and (trait.blank or piece.isspace()):
            return False
        if draft.spans is None:
            return True
        # Llama 3's offsets exclude the spaces that a token begins with; Qwen's include them.
        start = span[0] - (trait.leading if not piece[:1].isspace() else 0)
        return any(first <= start and span[1] <= last for first, last in draft.spans)

    def _learn(self, token: int) -> _Trait:
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        trait = _Trait(token in self.special, not text.strip(), _leading_spaces(text))
        self.traits[token] = trait
        return trait
