r"""Reads files and Hugging Face datasets into `Record`s: the messages and the answer of every row, all checked.

    source                                    rows                      records
    .jsonl | .parquet | name[:split]   ->   {column: value}   ->   messages ending with the problem, answer

The answer is read from verl's `reward_model.ground_truth` if it exists, else from the first of `answer`, `solution`,
`label` and `ground_truth` that is not empty. From a text with a `\boxed{...}`, the last box is taken; from GSM8K's
last line `#### 72`, the part after the mark. A number becomes its shortest decimal: 27.0 gives "27", because parquet
returns a column of integers with one value missing as floats.

With whole rows, which graders and reward rules of the user's own look at, all columns are read and kept as text
(reward/rows.py). verl's ground truth may then be a list or an object too: the answer is its JSON text.
"""

import codecs
import json
import math
import os.path
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lens_megatron.config import DataConfig
from lens_megatron.errors import UserError
from lens_megatron.files import open_regular
from lens_megatron.reward import rows
from lens_megatron.reward.boxed import last_box

PROBLEM_KEYS = ("problem", "question", "prompt")
ANSWER_KEYS = ("reward_model.ground_truth", "answer", "solution", "label", "ground_truth")
SOURCE_KEY = "data_source"

_FILE_SUFFIXES = {".jsonl", ".parquet", ".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst"}
_DATASET_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_PARQUET_BATCH = 1024
_LONGEST_LINE = 16 << 20
_LONGEST_TEXT = 1_000_000
"""The most characters of a message: a tokenizer needs a gigabyte of memory for these, and aborts without it."""
_SIGNATURES = (
    (b"\x1f\x8b", "compressed by gzip", "decompress it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it with unzstd"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"PAR1", "parquet", "call it .parquet"),
    (codecs.BOM_UTF32_LE, "UTF-32", "save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16", "save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16", "save it as UTF-8"),
)
"""The first bytes of other formats, what they are, and the remedies. Longer signatures come first."""

Span = tuple[int, int]
"""The characters [start, end) of a text."""


class DataError(UserError):
    """A mistake in the user's data; the message names the file and line, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message: one turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """A record: the content of one row of a dataset.

    Example: Record(index=0, where="train.jsonl:1", messages=(Message("user", "5 + 7 = ?"),), answer="12",
    source="train").
    """

    index: int
    """The row of the dataset, counted from 0 without blank lines."""
    where: str
    """File and line, or dataset and row, counted from 1: the name of the row in errors."""
    messages: tuple[Message, ...]
    """The messages, with the configured system prompt. The last one is the user's and contains the problem."""
    answer: str
    source: str
    """The value of verl's `data_source`, else the name of the file or dataset."""
    row: str = ""
    """The whole row as `reward.rows.encode` writes it; empty where it was not asked for."""
    noise: tuple[Span, ...] = ()
    """The characters of the last message that the column `data.noise_key` marks as noise, in the column's order."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row as its file contains it."""

    where: str
    values: Mapping[str, Any]
    columns: Sequence[str]
    """All columns of the dataset; `values` may contain only the requested ones."""


def read_records(source: str, data: DataConfig, *, whole_rows: bool = False) -> list[Record]:
    """Returns all rows of `source`, in order. With `whole_rows` each record has all columns of its row too.

    Raises:
        DataError: the file or dataset does not exist, a row cannot be used, or there are no rows.
    """
    found, name = _open(source, None if whole_rows else _wanted_columns(data))
    records = [_record(index, row, data, name, whole=whole_rows) for index, row in enumerate(found)]
    if not records:
        raise DataError(f"{source}: holds no rows")
    return records


# ---- sources ------------------------------------------------------------------------------------------------------


def _open(source: str, wanted: set[str] | None) -> tuple[Iterator[_Row], str]:
    """Returns the rows of `source` with the `wanted` columns (None: all), and its name in the metrics."""
    expanded = os.path.expanduser(source)
    path = Path(expanded)
    if os.path.isdir(expanded):
        raise DataError(f"{source}: is a folder; name one .jsonl or .parquet file in it")
    if os.path.islink(expanded) and not os.path.exists(expanded):
        raise DataError(f"{source}: is a link that leads to no file (to {os.readlink(expanded)}); mend or replace it")
    if os.path.exists(expanded):
        if path.suffix.lower() == ".jsonl":
            return _jsonl_rows(path), path.stem
        if path.suffix.lower() == ".parquet":
            return _parquet_rows(path, wanted), path.stem
        raise DataError(f"{source}: cannot read {path.suffix or 'a file without suffix'}; use .jsonl or .parquet")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix.lower() in _FILE_SUFFIXES:
        raise DataError(f"{source}: no such file")
    name, _, split = source.partition(":")
    if not _DATASET_NAME.fullmatch(name):
        raise DataError(f"{source!r}: neither a .jsonl or .parquet file nor the name of a dataset (name or name:split)")
    return _hub_rows(name, split or "train", wanted), name


def _wanted_columns(data: DataConfig) -> set[str]:
    configured = {key for key in (data.problem_key, data.answer_key, data.noise_key) if key}
    keys = {*PROBLEM_KEYS, *ANSWER_KEYS, SOURCE_KEY} | configured
    return keys | {key.partition(".")[0] for key in keys}


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
                where = f"{path}:{number}"
                if number == 1:
                    _refuse_other_formats(line, where)
                    line = line.removeprefix(codecs.BOM_UTF8)
                if len(line) > _LONGEST_LINE:
                    raise DataError(f"{where}: the line has more than {_LONGEST_LINE:,} bytes; shorten or remove it")
                if line.strip():
                    values = _parse(line.rstrip(), where)
                    yield _Row(where, values, list(values))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; use a .jsonl or .parquet file") from error


def _refuse_other_formats(start: bytes, where: str) -> None:
    for signature, name, remedy in _SIGNATURES:
        if start.startswith(signature):
            raise DataError(f"{where}: the file is {name}, not JSON lines; {remedy}")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: malformed JSON: {error.msg} at column {error.colno}; every line must be one JSON object"
        ) from None
    except (ValueError, RecursionError) as error:  # an integer has thousands of digits, or brackets nest too deep
        raise DataError(f"{where}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__} ({reprlib.repr(value)})")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object. Raises ValueError for a key that occurs twice, because either value might be meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{reprlib.repr(twice)} stands twice in one object; remove one")
    return values


def _parquet_rows(path: Path, wanted: set[str] | None) -> Iterator[_Row]:
    try:
        with open_regular(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            columns, number = file.schema_arrow.names, 0
            for column in columns if wanted is None else wanted:
                if columns.count(column) > 1:
                    raise DataError(f"{path}: {columns.count(column)} columns are called {column!r}; rename them")
            for batch in file.iter_batches(_PARQUET_BATCH, columns=_choose(columns, wanted, str(path))):
                for values in batch.to_pylist():
                    number += 1
                    yield _Row(f"{path}, row {number}", values, columns)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error


def _hub_rows(name: str, split: str, wanted: set[str] | None) -> Iterator[_Row]:
    # It is imported here, because that takes two seconds and most runs read files.
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the network, the hub and every builder raise errors of their own types
        raise DataError(
            f"{name}:{split}: cannot be loaded as a Hugging Face dataset: {type(error).__name__}: {error}; "
            "if you meant a file, give its path; a dataset that needs a configuration must be saved as a file first"
        ) from error
    columns = dataset.column_names
    for number, values in enumerate(dataset.select_columns(_choose(columns, wanted, f"{name}:{split}")), 1):
        yield _Row(f"{name}:{split}, row {number}", values, columns)


def _choose(columns: Sequence[str], wanted: set[str] | None, where: str) -> list[str]:
    """Returns the columns to read: worked solutions and images can be most of a dataset."""
    chosen = [column for column in columns if wanted is None or column in wanted]
    if not chosen:
        raise DataError(
            f"{where}: no problem and no answer; the columns are: {', '.join(columns)}; "
            "set data.problem_key and data.answer_key"
        )
    return chosen


# ---- one row ------------------------------------------------------------------------------------------------------


def _record(index: int, row: _Row, data: DataConfig, name: str, *, whole: bool) -> Record:
    problem_key, problem = _find(row, data.problem_key, PROBLEM_KEYS, "problem")
    messages = _messages(problem, f"{row.where}: {problem_key}", data.system_prompt)
    key, value = _find(row, data.answer_key, ANSWER_KEYS, "answer")
    if key == problem_key:
        raise DataError(
            f"{row.where}: {key!r} would be both problem and answer (data.problem_key={data.problem_key!r}, "
            f"data.answer_key={data.answer_key!r}); set one of them to another column"
        )
    # A `solution` column that is found by default has worked solutions; one that the user names may have bare answers.
    worked = key == "solution" and data.answer_key is None
    answer = _whole_answer(value, row.where) if whole and key == ANSWER_KEYS[0] else None
    answer = answer or read_answer(value, f"{row.where}: {key}", needs_mark=worked)
    ground_truth = value if key == ANSWER_KEYS[0] else answer
    source = row.values.get(SOURCE_KEY)
    return Record(
        index=index,
        where=row.where,
        messages=messages,
        answer=answer,
        source=name if source is None else _text(source, f"{row.where}: {SOURCE_KEY}"),
        row=_encode(row, messages, isinstance(problem, list), ground_truth) if whole else "",
        noise=_noise(row, data.noise_key, messages[-1].content),
    )


def _encode(row: _Row, messages: Sequence[Message], conversational: bool, ground_truth: Any) -> str:
    turns = tuple({"role": message.role, "content": message.content} for message in messages)
    try:
        return rows.encode(rows.DataRow(turns, conversational, ground_truth, row.values))
    except ValueError as error:
        raise DataError(f"{row.where}: cannot be given to graders as JSON: {error}; simplify the row") from error


def _whole_answer(value: Any, where: str) -> str | None:
    """Returns the text of an answer that is a list or an object, as a user's own grader may want it, else None."""
    if not isinstance(value, list | dict):
        return None
    try:
        return json.dumps(value, default=str)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the answer cannot be written as JSON: {error}; simplify it") from error


def _find(row: _Row, configured: str | None, keys: Sequence[str], what: str) -> tuple[str, Any]:
    """Returns key and value of the first column that is not empty; null counts as empty."""
    for key in [configured] if configured else keys:
        value = _lookup(row.values, key)
        if value is not None:
            return key, value
    missing = f"in data.{what}_key={configured!r}" if configured else f"in any of {', '.join(keys)}"
    columns = ", ".join(map(str, row.columns)) or "none"
    raise DataError(f"{row.where}: no {what} {missing}; the columns are: {columns}; set data.{what}_key to one of them")


def _lookup(values: Any, key: str) -> Any:
    """Returns the value of a column, or of a field within it (`reward_model.ground_truth`), or None without one."""
    if key in values:
        return values[key]
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values


def _text(value: Any, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {type(value).__name__} ({reprlib.repr(value)})")
    if not may_be_empty and not value.strip():
        raise DataError(f"{where}: is empty")
    if len(value) > _LONGEST_TEXT:
        raise DataError(f"{where}: has {len(value):,} characters, the most is {_LONGEST_TEXT:,}; shorten or remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not valid Unicode: {value[error.start]!r} alone at {error.start}") from None
    return value


def _messages(value: Any, where: str, system_prompt: str | None) -> tuple[Message, ...]:
    """Makes messages of `value`, which is the user's text or a conversation that ends with it."""
    if isinstance(value, str):
        messages = [Message("user", _text(value, where))]
    elif isinstance(value, list):
        messages = [_message(entry, f"{where}[{number}]") for number, entry in enumerate(value)]
        if not messages:
            raise DataError(f"{where}: is empty")
        if messages[-1].role != "user":
            raise DataError(f"{where}: the last message must be from 'user', got {messages[-1].role!r}")
        _text(messages[-1].content, where)
    else:
        raise DataError(
            f"{where}: expected text or a list of {{role, content}}, got {type(value).__name__} ({reprlib.repr(value)})"
        )
    if system_prompt and all(message.role != "system" for message in messages):
        messages.insert(0, Message("system", system_prompt))
    return tuple(messages)


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping) or not {"role", "content"} <= entry.keys():
        raise DataError(f"{where}: expected {{role, content}}, got {type(entry).__name__} ({reprlib.repr(entry)})")
    role = _text(entry["role"], f"{where}.role")
    return Message(role, _text(entry["content"], f"{where}.content", may_be_empty=True))


def _noise(row: _Row, key: str | None, problem: str) -> tuple[Span, ...]:
    """Returns the spans that the column `key` marks in `problem`; none without such a column, or where it is null."""
    value = None if key is None else _lookup(row.values, key)
    if value is None:
        return ()
    remedy = "correct the column, or leave data.noise_key empty"
    if not isinstance(value, list):
        raise DataError(
            f"{row.where}: {key}: expected a list of [start, end) characters of the problem, got "
            f"{type(value).__name__} ({reprlib.repr(value)}); {remedy}"
        )
    for number, pair in enumerate(value):
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(place) is int for place in pair)
        if not (whole and 0 <= pair[0] <= pair[1] <= len(problem)):
            raise DataError(
                f"{row.where}: {key}[{number}]: expected two whole numbers [start, end] from 0 to {len(problem)}, the "
                f"characters of the problem, got {reprlib.repr(pair)}; {remedy}"
            )
    return tuple((start, end) for start, end in value)


def read_answer(value: Any, where: str, *, needs_mark: bool = False) -> str:
    """Returns the answer in a column's value, as the module's docstring says; `where` names the value in DataErrors."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: expected text or a number, got {type(value).__name__} ({reprlib.repr(value)})")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"{where}: expected a finite number, got {value}")
        return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
    if isinstance(value, int):
        return str(value)
    text = _text(value, where).strip()
    if "\\boxed" in text:
        content, why = last_box(text)
        if content is None:
            raise DataError(f"{where}: no answer: {why}")
        return content
    _, mark, tail = text.rpartition("\n")[2].rpartition("####")
    if mark:
        return _text(tail, f"{where}: the answer after ####").strip()
    if needs_mark:
        raise DataError(
            f"{where}: no \\boxed{{...}} and no '#### answer' in it; add a column `answer`, or set "
            "data.answer_key=solution if the column holds bare answers"
        )
    return text
