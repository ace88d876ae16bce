"""The row of a dataset as text, for graders and reward rules that look at more than the answer.

JSON holds text, numbers, true, false, null, lists and objects. Dates and times become ISO 8601 text, durations seconds,
decimals floats, NumPy's arrays lists, and UUIDs text. What JSON has no form for, such as bytes, images and audio,
becomes null: a reward function sees that the column is there, and nothing heavy travels between processes.
"""

import datetime
import decimal
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DataRow:
    """A row of a dataset, as reward functions see it."""

    messages: tuple[Mapping[str, str], ...]
    """The conversation as {role, content}, with the configured system prompt, without `data.instruction`."""
    conversational: bool
    """True where the data holds a conversation, False where it holds the user's text alone."""
    ground_truth: Any
    """The value of verl's `reward_model.ground_truth` as it is; without that column the answer."""
    columns: Mapping[str, Any]
    """All columns by name."""


def encode(row: DataRow) -> str:
    """Returns the row as ASCII JSON.

    Raises:
        ValueError: a value nests too deeply, or an integer has thousands of digits.
    """
    content = {
        "messages": row.messages,
        "conversational": row.conversational,
        "ground_truth": row.ground_truth,
        "columns": row.columns,
    }
    try:
        return json.dumps(content, default=_plain, skipkeys=True)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def decode(record: str) -> DataRow:
    """Returns the row that `encode` made `record` of."""
    content = json.loads(record)
    return DataRow(tuple(content["messages"]), content["conversational"], content["ground_truth"], content["columns"])


def user_text(messages: Sequence[Mapping[str, str]]) -> str:
    """Returns the text of the last message, which is the user's."""
    return messages[-1]["content"]


def _plain(value: Any) -> Any:
    """Returns what stands for a value that JSON has no form for."""
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    # NumPy's numbers and arrays have it; so have tensors.
    plain = getattr(value, "tolist", None)
    return plain() if callable(plain) else None
