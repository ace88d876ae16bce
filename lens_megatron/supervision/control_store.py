"""Lets the ranks of a job exchange small named values outside of collectives, through a process that rank 0 starts.

    python -m lens_megatron.supervision.control_store HOST < secret   prints its port; ends with its input

torchrun's store has no authentication and listens on every interface. This one listens on one interface and answers
only callers who have the run's secret. It is a process of its own, so that it answers while rank 0 is frozen or hangs
in C code. Every request is answered at once; no request waits for another one's effect.
"""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence

from lens_megatron.supervision import channel
from lens_megatron.supervision.channel import Address, ChannelError, Door

LARGEST_MESSAGE = 256 << 20
"""The most bytes of one message."""

_LENGTH_BYTES = 4
_ABSENT = 2 ** (8 * _LENGTH_BYTES) - 1
_START_S = 60.0


class ControlStore:
    """A connection to the store. Threads may share it, but each then waits for the others.

    Every method but `close` raises ChannelError when the store cannot be reached; the next call tries again.

    Args:
        timeout_s: limit of one request; with None a request may last as long as the connection holds.
        process: the store's process, where this rank has started it; it is closed with this connection.
    """

    def __init__(
        self,
        address: Address,
        secret: bytes,
        timeout_s: float | None = None,
        process: "ControlProcess | None" = None,
    ):
        self.address, self.secret, self.timeout_s, self.process = address, secret, timeout_s, process
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    def clone(self, timeout_s: float | None = None) -> "ControlStore":
        """Returns another connection to the same store."""
        return ControlStore(self.address, self.secret, timeout_s)

    def set(self, key: str, value: bytes) -> None:
        self._ask(b"set", [key.encode(), value])

    def get(self, keys: Sequence[str]) -> list[bytes | None]:
        """Returns the value of each key, None where there is none."""
        return self._ask(b"get", [key.encode() for key in keys])

    def check(self, key: str) -> bool:
        """Returns True if the key has a value."""
        return self.get([key])[0] is not None

    def add(self, key: str, amount: int) -> int:
        """Adds `amount` to the value and returns the sum; a missing value counts as 0."""
        return self._ask_number(b"add", [key.encode(), b"%d" % amount])

    def append(self, name: str, value: bytes) -> int:
        """Writes to `name`/N and increments the number under `name` in one step; returns N, counted from 0."""
        return self._ask_number(b"append", [name.encode(), value])

    def delete(self, keys: Collection[str]) -> None:
        self._ask(b"delete", [key.encode() for key in keys])

    def close(self) -> None:
        with self._lock:
            self._hang_up()
        if self.process is not None:
            self.process.close()

    def _ask_number(self, verb: bytes, fields: Sequence[bytes]) -> int:
        (value,) = self._ask(verb, fields)
        if value is None:
            raise ChannelError(f"the store answered {verb.decode()} with nothing instead of a number")
        return int(value)

    def _ask(self, verb: bytes, fields: Sequence[bytes]) -> list[bytes | None]:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = channel.call(self.address, self.secret, 0, self.timeout_s or _START_S)
                    self._connection.settimeout(self.timeout_s)
                _send(self._connection, [verb, *fields])
                return _receive(self._connection)
            except BaseException:
                self._hang_up()  # half a message may have been sent
                raise

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Storage:
    """Holds the values of the store and answers requests."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def serve(self, connection: socket.socket, number: int) -> None:
        """Answers requests until the other end hangs up."""
        del number  # all who have the secret are equal
        with connection:
            try:
                while True:
                    request = _receive(connection)
                    verb, *fields = [field for field in request if field is not None]
                    if 1 + len(fields) < len(request):
                        raise ValueError("a request with a field that is absent")
                    with self._lock:
                        reply = self.answer(verb, fields)
                    _send(connection, reply)
            except (ChannelError, ValueError):
                return  # the caller is gone, or is none of this run's ranks

    def answer(self, verb: bytes, fields: list[bytes]) -> list[bytes | None]:
        """Returns the answer to one request. Raises ValueError for a message that is no request."""
        match verb, fields:
            case b"set", [key, value]:
                self.values[key] = value
                return []
            case b"get", keys:
                return [self.values.get(key) for key in keys]
            case b"add", [key, amount]:
                return [self._add(key, int(amount))]
            case b"append", [name, value]:
                number = int(self._add(name, 1)) - 1
                self.values[b"%s/%d" % (name, number)] = value
                return [b"%d" % number]
            case b"delete", keys:
                for key in keys:
                    self.values.pop(key, None)
                return []
        raise ValueError(f"no request: {verb!r} with {len(fields)} fields")

    def _add(self, key: bytes, amount: int) -> bytes:
        value = self.values[key] = b"%d" % (int(self.values.get(key, b"0")) + amount)
        return value


class ControlProcess:
    """The store's process, which ends when this one does, in whatever way this one ends.

    Args:
        host: address of this machine at which the other ranks reach it.

    Raises:
        OSError: it does not start, or cannot listen there.
    """

    def __init__(self, host: str):
        self.secret = channel.new_secret()
        words = [sys.executable, "-m", "lens_megatron.supervision.control_store", host]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None, "both are pipes"
        try:
            self.process.stdin.write(self.secret)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has printed the reason
        said = self.process.stdout.readline()
        if not said:
            self.close()
            raise OSError(f"the control store did not start at {host}, see above")
        self.address: Address = [host, int(said)]

    def close(self) -> None:
        self.process.communicate()  # it ends when its standard input ends


def serve(listener: socket.socket, secret: bytes) -> tuple[Door, Storage]:
    """Answers requests in threads of this process, until the door is closed."""
    storage = Storage()
    return Door(listener, secret, storage.serve), storage


def main(host: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the ranks need it while they save and stop
    secret = sys.stdin.buffer.read(channel.SECRET_BYTES)
    try:
        listener = channel.listen([host, 0])
    except OSError as error:
        sys.exit(f"error: the control store cannot listen at {host}: {error}")
    serve(listener, secret)
    print(listener.getsockname()[1], flush=True)
    sys.stdin.buffer.read()


def _send(connection: socket.socket, fields: Sequence[bytes | None]) -> None:
    lengths = [_ABSENT if field is None else len(field) for field in fields]
    parts = [part for length, field in zip(lengths, fields, strict=True) for part in (_number(length), field or b"")]
    message = b"".join(parts)
    channel.send(connection, _number(len(message)) + message)


def _receive(connection: socket.socket) -> list[bytes | None]:
    """Receives a message. Raises ChannelError, and ValueError for bytes that `_send` does not send."""
    size = int.from_bytes(channel.receive(connection, _LENGTH_BYTES), "big")
    if size > LARGEST_MESSAGE:
        raise ValueError(f"a message of {size} bytes; the largest may have {LARGEST_MESSAGE}")
    message, fields, place = channel.receive(connection, size), [], 0
    while place < size:
        length = int.from_bytes(message[place : place + _LENGTH_BYTES], "big")
        place += _LENGTH_BYTES
        fields.append(None if length == _ABSENT else message[place : place + length])
        place += 0 if length == _ABSENT else length
    if place != size:
        raise ValueError("a message whose fields are longer than itself")
    return fields


def _number(value: int) -> bytes:
    return value.to_bytes(_LENGTH_BYTES, "big")


if __name__ == "__main__":
    main(sys.argv[1])
