"""Trains the demo's tokenizer: lines of text -> a byte-level BPE in Hugging Face layout with a ChatML template.

Any text round-trips, because every byte has a token. A number of one or two digits is one token, without its space, so
that the number the model reads is the number it writes.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
VOCAB_SIZE = 1024
"""The largest number of tokens. The demo's small language runs out of merges before."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

WORDS = r" ?\\[a-z]+\{?| ?[A-Za-z]+|[0-9]{1,2}|\s| ?[^\sA-Za-z0-9]"
"""Pieces of text that no token crosses: a LaTeX command, a word, a number, one space, one other sign."""


def train_tokenizer(lines: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains on `lines`; all numbers 0..99 are single tokens whatever the lines hold."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = list(lines)
    numbers = [str(n) for n in range(100)] * max(20, len(lines) // 100)
    tokenizer.train_from_iterator([*lines, *numbers], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, IM_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )
