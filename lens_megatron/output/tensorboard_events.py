"""TensorBoard's event files as bytes.

TensorBoard's own writer is a thread, which dies with a traceback on a full disk and leaves half a record behind.
"""

import io
import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def head(first_step: int) -> bytes:
    """What a file begins with. TensorBoard drops what other files say of `first_step` and of steps after it."""
    now = time.time()
    return _records(
        Event(step=first_step, wall_time=now, file_version="brain.Event:2"),
        Event(step=first_step, wall_time=now, session_log=SessionLog(status=SessionLog.START)),
    )


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """One record with all values of a step."""
    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    return _records(Event(step=step, wall_time=time.time(), summary=summary))


def _records(*events: Event) -> bytes:
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()
