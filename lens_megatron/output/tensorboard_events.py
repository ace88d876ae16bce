"""Encodes TensorBoard's event files.

TensorBoard's own writer is a thread, which dies with a traceback on a full disk and leaves half a record behind.
"""

import io
import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def head(first_step: int) -> bytes:
    """Encodes the beginning of a file, which makes TensorBoard drop earlier files' values from `first_step` on."""
    now = time.time()
    return _records(
        Event(step=first_step, wall_time=now, file_version="brain.Event:2"),
        Event(step=first_step, wall_time=now, session_log=SessionLog(status=SessionLog.START)),
    )


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """Encodes all values of a step as one record."""
    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    return _records(Event(step=step, wall_time=time.time(), summary=summary))


def _records(*events: Event) -> bytes:
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()
