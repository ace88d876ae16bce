"""Reads completions that other harnesses have logged, so that their grading can be told from their sampling.

    lm-evaluation-harness   samples_TASK_TIME.jsonl (--log_samples): target, resps, one number per metric
    lighteval               details_TASK_TIME.parquet (--save-details): doc and model_response, before 0.11 gold and
                            predictions, sometimes as the text of a list

Formats are those of the projects' sources in 2026; a file of another form is refused with the columns that it has.
"""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lens_megatron.data.datasets import DataError, read_answer
from lens_megatron.files import open_regular

_SCORES = (
    "exact_match", "math_verify", "extractive_match", "acc", "pass@k:k=1&n=1", "pass@1", "em", "score",
)  # fmt: skip
"""Metrics that say whether one completion is correct, the first that is there counts."""


@dataclass(frozen=True, slots=True)
class LoggedSample:
    """A completion in another harness' log."""

    problem: str
    """The document's number."""
    sample: int
    text: str
    answer: str
    """The expected answer."""
    score: float | None
    """What the harness gave it; None where its log has one number for several completions, or none."""


def read_log(path: Path) -> list[LoggedSample]:
    """Returns all completions of a log. Raises DataError for a file that is none."""
    if path.suffix.lower() == ".jsonl":
        found = list(_lm_eval(path))
    elif path.suffix.lower() == ".parquet":
        found = list(_lighteval(path))
    else:
        raise DataError(f"{path}: expected samples_*.jsonl of lm-evaluation-harness or details_*.parquet of lighteval")
    if not found:
        raise DataError(f"{path}: holds no samples")
    return found


def _lm_eval(path: Path) -> Iterator[LoggedSample]:
    """Yields the samples of one filter: a log repeats every document for each of them, with the same completions."""
    first_filter = None
    for number, row in enumerate(_json_lines(path), 1):
        where = f"{path}:{number}"
        if not isinstance(row, Mapping) or not {"doc_id", "target", "resps"} <= row.keys():
            columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise DataError(f"{where}: no doc_id, target and resps, but {columns}; log with lm_eval --log_samples")
        first_filter = row.get("filter") if number == 1 else first_filter
        if row.get("filter") == first_filter:
            yield from _samples(str(row["doc_id"]), _texts(row["resps"], where), row["target"], row, where)


def _json_lines(path: Path) -> Iterator[Any]:
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: malformed JSON: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _lighteval(path: Path) -> Iterator[LoggedSample]:
    try:
        with open_regular(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
    for number, raw in enumerate(rows, 1):
        row, where = {key.strip("_"): value for key, value in raw.items()}, f"{path}, row {number}"
        if "doc" in row and "model_response" in row:
            doc, answered = row["doc"], row["model_response"]
            if not (isinstance(doc, Mapping) and isinstance(answered, Mapping)):
                raise DataError(f"{where}: doc and model_response are no records; lighteval --save-details writes them")
            gold, texts, scores = _gold_of(doc, where), answered.get("text"), row.get("metric")
        elif "gold" in row and "predictions" in row:
            gold, texts, scores = row["gold"], row["predictions"], row.get("metrics")
        else:
            raise DataError(
                f"{where}: neither doc and model_response nor gold and predictions, but {', '.join(row)}; give a file "
                "of lighteval --save-details"
            )
        first = _plain(gold)
        expected = first[0] if isinstance(first, list) and first else first
        yield from _samples(str(number - 1), _texts(texts, where), expected, scores or {}, where)


def _gold_of(doc: Mapping[str, Any], where: str) -> Any:
    choices, index = doc.get("choices"), doc.get("gold_index")
    place = index[0] if isinstance(index, list) and index else index
    if not (isinstance(choices, list) and isinstance(place, int) and 0 <= place < len(choices)):
        raise DataError(f"{where}: doc has no choice at gold_index {index}; it is no generative task")
    return choices[place]


def _texts(value: Any, where: str) -> list[str]:
    """Returns the completions in lists of lists, or in the text of such a list."""
    found: list[str] = []
    value = _plain(value)
    for item in value if isinstance(value, list) else [value]:
        found += _texts(item, where) if isinstance(item, list) else [item]
    if not found or not all(isinstance(text, str) for text in found):
        raise DataError(f"{where}: expected completions as text, got {str(value)[:80]!r}")
    return found


def _plain(value: Any) -> Any:
    """Returns the list that a text such as "['a', 'b']" is of: some versions write their columns so."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        try:
            listed = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
        if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
            return listed
    return value


def _samples(problem: str, texts: Sequence[str], expected: Any, scores: Any, where: str) -> Iterator[LoggedSample]:
    answer = read_answer(expected, f"{where}: the expected answer")
    score = _score(scores) if len(texts) == 1 and isinstance(scores, Mapping) else None
    for number, text in enumerate(texts):
        yield LoggedSample(problem, number, text, answer, score)


def _score(scores: Mapping[str, Any]) -> float | None:
    values = (scores.get(name) for name in _SCORES)
    return next((float(value) for value in values if isinstance(value, bool | int | float)), None)
