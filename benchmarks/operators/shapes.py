"""Names the shapes that are measured, in sets from the shortest to the longest run.

In every set the shapes that matter most come first, since a run with a budget may end before the last: the one whose
marks the notes give, then that of one rank among eight, which is how trainers of large models call the operators.

V is that of one rank: with tensor parallelism of 8 it is an eighth, and the collectives are left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    rows: int
    """T, sequences * sequence."""
    sequence: int
    """Rows per sequence."""
    vocab: int = 0
    """V, columns on this device."""
    hidden: int = 0
    """H; 0 where the operator starts from logits."""
    tensor_parallel: int = 1
    """The number of ranks among which the vocabulary is meant to be divided; it only labels the row."""

    def __str__(self) -> str:
        parts = [("T", self.rows), ("V", self.vocab), ("H", self.hidden)]
        name = "-".join(f"{letter}{size}" for letter, size in parts if size)
        return name if self.tensor_parallel == 1 else f"{name}-TP{self.tensor_parallel}"


LLAMA3, QWEN_SMALL, QWEN_7B = 128256, 151936, 152064  # vocabularies of the LENS paper's models


def _logits(rows: int, vocab: int, tensor_parallel: int = 1) -> Shape:
    return Shape(rows=rows, sequence=2048, vocab=vocab // tensor_parallel, tensor_parallel=tensor_parallel)


def _linear(rows: int, vocab: int, hidden: int, tensor_parallel: int = 1) -> Shape:
    vocab //= tensor_parallel
    return Shape(rows=rows, sequence=2048, vocab=vocab, hidden=hidden, tensor_parallel=tensor_parallel)


LOGITS = {
    "tiny": [Shape(rows=20, sequence=10, vocab=520)],
    "cpu": [Shape(rows=1024, sequence=256, vocab=32000), Shape(rows=256, sequence=128, vocab=QWEN_SMALL)],
    "quick": [_logits(8192, LLAMA3), _logits(65536, QWEN_7B, 8)],
    "standard": [_logits(8192, LLAMA3), _logits(65536, QWEN_7B, 8), _logits(8192, QWEN_7B)],
    "full": [
        _logits(8192, LLAMA3),
        *(_logits(65536, vocab, 8) for vocab in (QWEN_7B, LLAMA3, QWEN_SMALL)),
        *(_logits(8192, vocab) for vocab in (QWEN_7B, QWEN_SMALL)),
        *(_logits(rows, QWEN_7B) for rows in (32768, 65536)),
    ],
}
LINEAR = {
    "tiny": [Shape(rows=20, sequence=10, vocab=520, hidden=64)],
    "cpu": [
        Shape(rows=2048, sequence=512, vocab=32000, hidden=256),
        Shape(rows=512, sequence=256, vocab=QWEN_SMALL, hidden=256),
    ],
    "quick": [_linear(8192, LLAMA3, 4096), _linear(32768, QWEN_7B, 3584, 8)],
    "standard": [_linear(8192, LLAMA3, 4096), _linear(32768, QWEN_7B, 3584, 8), _linear(8192, QWEN_SMALL, 2048)],
    "full": [
        _linear(8192, LLAMA3, 4096),
        *(_linear(rows, QWEN_7B, 3584, 8) for rows in (32768, 65536)),
        *(_linear(8192, QWEN_SMALL, hidden) for hidden in (2048, 4096)),
        *(_linear(8192, LLAMA3, hidden) for hidden in (2048, 3072)),
        *(_linear(rows, QWEN_7B, 3584) for rows in (8192, 32768)),
    ],
}
CHECKED = {
    "logits": Shape(rows=260, sequence=130, vocab=4104),
    "linear": Shape(rows=260, sequence=130, vocab=4104, hidden=256),
}
"""Irregular shapes, small enough for float64, at which ours is compared with float64 before anything is timed."""
