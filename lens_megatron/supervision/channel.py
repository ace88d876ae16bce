"""Connects processes that share a secret: each end proves to the other that it has the secret before anything else.

    caller   -> its challenge
    listener -> its challenge, HMAC(secret, "listener", both challenges)
    caller   -> its number,    HMAC(secret, "caller", both challenges, number)

Data sent afterwards is neither encrypted nor signed: whoever can read or change the network's packets still can.
This module imports nothing but the standard library, because small processes use it too.
"""

import hmac
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

Address = str | list[Any] | tuple[Any, ...]
"""Path of a Unix socket, or host and port."""

SECRET_BYTES = 32
HANDSHAKE_S = 10.0
STRANGERS = 32
"""Number of connections that may be open at once without a proof; when one more comes, the oldest of them is closed."""

_MAC_BYTES, _NUMBER_BYTES = 32, 4
_POLL_S = 0.5


class ChannelError(RuntimeError):
    """The other end is gone, too slow, or does not have the secret; the message says which, and where it is."""


def listen(address: Address) -> socket.socket:
    """Returns a socket that listens on exactly this address; port 0 means any free port. Raises OSError."""
    if isinstance(address, str):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen()
        return listener
    host, port = address
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def address_of(listener: socket.socket) -> Address:
    """The address with which `call` reaches `listener`."""
    name = listener.getsockname()
    return name if isinstance(name, str) else list(name[:2])


def address_towards(host: str, port: int) -> str:
    """Returns this machine's address on the network where `host` is. Raises OSError."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        probe.connect(target)  # sends nothing
        return probe.getsockname()[0]


def call(address: Address, secret: bytes, number: int, timeout_s: float) -> socket.socket:
    """Returns a proven connection to the process that listens at `address`; its operations time out after `timeout_s`.

    Args:
        number: tells the listener who calls.

    Raises:
        ChannelError: no process listens there, or one that does not have the secret.
    """
    try:
        if isinstance(address, str):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout_s)
            connection.connect(address)
        else:
            connection = socket.create_connection(tuple(address), timeout_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise ChannelError(f"cannot reach {address}: {error}") from error
    try:
        own = secrets.token_bytes(SECRET_BYTES)
        send(connection, own)
        answer = receive(connection, SECRET_BYTES + _MAC_BYTES)
        both = own + answer[:SECRET_BYTES]
        if not hmac.compare_digest(answer[SECRET_BYTES:], _proof(secret, b"listener", both)):
            raise ChannelError(f"whoever listens at {address} does not have the secret")
        said = number.to_bytes(_NUMBER_BYTES, "big")
        send(connection, said + _proof(secret, b"caller", both + said))
    except BaseException:
        connection.close()
        raise
    return connection


class Door:
    """Listens, and admits only callers who prove that they have the secret; others get one challenge and no more.

    Args:
        admit: called with each proven connection and its caller's number, in a thread of its own.
        timeout_s: limit of every operation on such a connection; None sets no limit.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: bytes,
        admit: Callable[[socket.socket, int], None],
        timeout_s: float | None = None,
    ):
        self.listener, self.secret, self.admit, self.timeout_s = listener, secret, admit, timeout_s
        self.refused: deque[str] = deque(maxlen=8)
        """The reasons for which callers were last refused, with their addresses."""
        self._closing = threading.Event()
        self._strangers: list[socket.socket] = []
        self._lock = threading.Lock()
        self.listener.settimeout(_POLL_S)
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def close(self) -> None:
        """Stops accepting callers. Existing connections stay as they are."""
        self._closing.set()
        _cut_off(self.listener)
        self.listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, source = self.listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if self._closing.is_set():
                    return
                time.sleep(_POLL_S)  # the process may be out of file descriptors
                continue
            with self._lock:
                self._strangers.append(connection)
                if len(self._strangers) > STRANGERS:
                    _cut_off(self._strangers[0])
            threading.Thread(target=self._meet, args=(connection, source), name="caller", daemon=True).start()

    def _meet(self, connection: socket.socket, source: object) -> None:
        try:
            number = self._check(connection)
            connection.settimeout(self.timeout_s)
        except (ChannelError, OSError) as error:
            self.refused.append(f"{source or 'a local process'}: {error}")
            connection.close()
            return
        finally:
            with self._lock:
                self._strangers.remove(connection)
        if self._closing.is_set():
            connection.close()
        else:
            self.admit(connection, number)

    def _check(self, connection: socket.socket) -> int:
        """Returns the caller's number. Raises ChannelError unless the caller has the secret."""
        connection.settimeout(HANDSHAKE_S)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        theirs, own = receive(connection, SECRET_BYTES), secrets.token_bytes(SECRET_BYTES)
        both = theirs + own
        send(connection, own + _proof(self.secret, b"listener", both))
        answer = receive(connection, _NUMBER_BYTES + _MAC_BYTES)
        said = answer[:_NUMBER_BYTES]
        if not hmac.compare_digest(answer[_NUMBER_BYTES:], _proof(self.secret, b"caller", both + said)):
            raise ChannelError("it does not have the secret")
        return int.from_bytes(said, "big")


def send(connection: socket.socket, data: bytes | memoryview) -> None:
    """Sends all of `data`. Raises ChannelError."""
    try:
        connection.sendall(data)
    except OSError as error:
        raise ChannelError(f"the connection broke while sending: {error or type(error).__name__}") from error


def receive(connection: socket.socket, size: int) -> bytes:
    """Returns exactly `size` bytes. Raises ChannelError."""
    data = bytearray(size)
    receive_into(connection, memoryview(data))
    return bytes(data)


def receive_into(connection: socket.socket, place: memoryview) -> None:
    """Fills `place` with received bytes. Raises ChannelError."""
    done = 0
    while done < len(place):
        try:
            count = connection.recv_into(place[done:])
        except OSError as error:
            raise ChannelError(f"the connection broke while receiving: {error or type(error).__name__}") from error
        if not count:
            raise ChannelError("the other end hung up")
        done += count


def _cut_off(connection: socket.socket) -> None:
    """Shuts `connection` down, which ends the operation that another thread waits for on it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def new_secret() -> bytes:
    return os.urandom(SECRET_BYTES)


def _proof(secret: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, role + said, "sha256")
