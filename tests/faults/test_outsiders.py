"""Strangers at every door of a run: they get a challenge and nothing more, and who belongs there notices nothing."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import watchdog_worker
from torch.distributed import TCPStore
from toy_runs import environment, start_ranks

from lens_megatron.rollout.request_store import RequestStore
from lens_megatron.rollout.servers.process import ServerProcess, private_folder
from lens_megatron.rollout.servers.weight_transfer import SocketLink
from lens_megatron.supervision import channel, control_store
from lens_megatron.supervision.channel import ChannelError
from lens_megatron.supervision.control_store import ControlProcess, ControlStore

LOOPBACK = ["127.0.0.1", 0]
DEADLINE_S = 60.0

Guess = Callable[[socket.socket], None]
"""What a stranger does with an open connection."""


def silence(connection: socket.socket) -> None:
    """Opens it, and waits."""


def noise(connection: socket.socket) -> None:
    connection.sendall(os.urandom(4096))


def length(connection: socket.socket) -> None:
    """The length of a message that no memory could hold."""
    connection.sendall(b"\xff" * 68)


def proof(connection: socket.socket) -> None:
    """The right conversation with a wrong secret, as worker 0."""
    connection.sendall(bytes(32))
    channel.receive(connection, 64)
    connection.sendall(bytes(4 + 32))


GUESSES = [silence, noise, length, proof]


def everything(connection: socket.socket) -> bytes:
    """What comes until the other end hangs up."""
    connection.settimeout(DEADLINE_S)
    found = b""
    try:
        while data := connection.recv(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return found


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("guess", GUESSES)
def test_a_stranger_at_the_weight_transfer_gets_none_and_does_not_keep_the_server_out(
    guess: Guess, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(channel, "HANDSHAKE_S", 1.0)
    link, weights = SocketLink(LOOPBACK, workers=2, timeout_s=DEADLINE_S), torch.arange(1 << 20).view(torch.uint8)
    told = link.init_info()
    stranger = socket.create_connection(tuple(told["address"]))
    guess(stranger)
    workers = [channel.call(told["address"], bytes.fromhex(told["secret"]), place, DEADLINE_S) for place in range(2)]
    link.join()
    sending = threading.Thread(target=link.send, args=(weights,))
    sending.start()
    for worker in workers:
        assert channel.receive(worker, weights.nbytes) == bytes(weights.numpy())
    sending.join()
    until(lambda: len(link.door.refused) == 1)
    assert "127.0.0.1" in link.door.refused[0]
    received = everything(stranger)
    assert len(received) == (0 if guess in (silence, proof) else 64), "a challenge and its answer are all that it gets"
    link.close()
    with pytest.raises(ChannelError, match="cannot reach"):
        channel.call(told["address"], bytes.fromhex(told["secret"]), 0, DEADLINE_S)


def test_if_only_strangers_come_for_weights_the_message_says_who():
    link = SocketLink(LOOPBACK, workers=1, timeout_s=1.0)
    with pytest.raises(ChannelError, match="does not have the secret"):
        channel.call(link.address, channel.new_secret(), 0, DEADLINE_S)
    with pytest.raises(ChannelError, match="0 of the server's 1 workers came .* turned away .*127.0.0.1.*hung up"):
        link.join()
    link.close()


def test_a_server_takes_weights_from_nobody_but_its_trainer():
    with channel.listen(LOOPBACK) as listener:
        address, said = channel.address_of(listener), []

        def pretend() -> None:
            connection, _ = listener.accept()
            said.append(channel.receive(connection, 32))
            connection.sendall(os.urandom(64) + b"weights" * 100)
            said.append(everything(connection))

        stranger = threading.Thread(target=pretend)
        stranger.start()
        with pytest.raises(ChannelError, match="does not have the secret"):
            channel.call(address, channel.new_secret(), 0, DEADLINE_S)
        stranger.join()
    assert said[1] == b"", "it proved something to a stranger"


def test_an_answer_cannot_be_used_twice():
    """A stranger repeats what it overheard of a worker."""
    link = SocketLink(LOOPBACK, workers=2, timeout_s=DEADLINE_S)
    overheard: list[bytes] = []

    class Overheard(socket.socket):
        def sendall(self, data: bytes) -> None:
            overheard.append(bytes(data))
            super().sendall(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel.socket, "create_connection", lambda address, timeout: _connected(Overheard(), address))
        worker = channel.call(link.address, link.secret, 0, DEADLINE_S)
    stranger = socket.create_connection(tuple(link.address))
    for message in overheard:
        stranger.sendall(message)
    assert len(everything(stranger)) == 64
    until(lambda: bool(link.connections and link.door.refused))  # both are its threads' work
    assert list(link.connections) == [0] and "does not have the secret" in link.door.refused[0]
    worker.close()
    link.close()


def _connected(connection: socket.socket, address: tuple) -> socket.socket:
    connection.connect(address)
    return connection


@pytest.fixture
def process() -> Iterator[ControlProcess]:
    process = ControlProcess("127.0.0.1")
    yield process
    process.close()


@pytest.mark.parametrize("guess", GUESSES)
def test_strangers_at_the_control_store_neither_write_nor_disturb(process: ControlProcess, guess: Guess):
    first, second = (RequestStore(ControlStore(process.address, process.secret), rank, 2) for rank in range(2))
    first.begin(4, 1)
    with ExitStack() as strangers:
        for _ in range(3 * channel.STRANGERS):
            stranger = strangers.enter_context(socket.create_connection(tuple(process.address)))
            try:
                guess(stranger)
            except (ChannelError, OSError):
                pass  # it was cut off already
        second.begin(8, 1)  # a connection that is opened now
        totals = first.look()
    assert (totals.capacity, totals.ranks_here, totals.unfinished) == (12, 2, 0)
    with pytest.raises(ChannelError, match="does not have the secret"):
        ControlStore(process.address, channel.new_secret()).set("1/batches", b"garbage")
    assert first.look() == totals


def test_torchs_clients_cannot_speak_with_it(process: ControlProcess):
    with pytest.raises(RuntimeError):
        TCPStore(*process.address, is_master=False, timeout=timedelta(seconds=2)).set("watchdog/alarm", "1")
    assert not ControlStore(process.address, process.secret).check("watchdog/alarm")


def test_the_control_store_listens_on_one_interface(process: ControlProcess):
    open_ports = [c.laddr for c in psutil.Process(process.process.pid).net_connections("inet") if c.status == "LISTEN"]
    assert [address.ip for address in open_ports] == ["127.0.0.1"]
    words = psutil.Process(process.process.pid)
    assert process.secret.hex() not in " ".join(words.cmdline() + [*words.environ().values()])


def test_what_is_no_request_ends_its_connection_only(process: ControlProcess):
    good, bad = (ControlStore(process.address, process.secret) for _ in range(2))
    good.set("text", b"x")
    for verb, fields in [(b"add", [b"text", b"1"]), (b"add", [b"n", b"much"]), (b"burn", []), (b"set", [b"alone"])]:
        with pytest.raises(ChannelError, match="hung up"):
            bad._ask(verb, fields)
    assert bad.get(["text", "n"]) == good.get(["text", "n"]) == [b"x", None]


def test_the_control_store_ends_with_the_rank_that_started_it():
    script = (
        "import time\nfrom lens_megatron.supervision.control_store import ControlProcess\n"
        "print(ControlProcess('127.0.0.1').process.pid, flush=True)\ntime.sleep(987)"
    )
    rank = subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, text=True)
    store = psutil.Process(int(rank.stdout.readline()))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        store.send_signal(number)  # it is needed while the ranks save and stop
    rank.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    assert store.is_running() and store.status() != psutil.STATUS_ZOMBIE
    rank.kill()
    rank.communicate()
    until(lambda: not store.is_running() or store.status() == psutil.STATUS_ZOMBIE)


def test_an_alarm_from_outside_does_not_end_a_run(tmp_path: Path):
    """The alarm is put into torchrun's store, where anyone may write; ranks do not look for it there.

    Nor does the watchdog end phases that keep to their deadline while all of them together last longer.
    """
    limit = timedelta(seconds=DEADLINE_S)
    with start_ranks(2, Path(watchdog_worker.__file__), tmp_path, "fine", "1", together=False) as ranks:
        store = TCPStore("127.0.0.1", ranks.port, is_master=False, timeout=limit, wait_for_workers=False)
        for key in ("watchdog/0/alarm", "watchdog/alarm"):
            store.add(key, 1)
            store.set(f"default_pg/0//{key}", "1")
        assert ranks.wait() == [0, 0], ranks.stderr()
    assert not (tmp_path / "watchdog").exists()


def test_folders_for_servers_sockets_are_private_and_their_paths_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    folder = private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700 and len(str(folder)) < 70
    folder.rmdir()


def test_every_start_of_a_server_has_a_key_and_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sleeper = [sys.executable, "-c", "import time; time.sleep(987)"]
    monkeypatch.setattr("lens_megatron.rollout.servers.process.command", lambda options, listen: sleeper)
    server = ServerProcess("server 0", {}, tmp_path / "log")
    seen = []
    for _ in range(2):
        server.start()
        seen.append((server.key, server.folder))
        assert server.folder.is_dir()
    server.stop()
    assert len({key for key, _ in seen}) == len({folder for _, folder in seen}) == 2
    assert not any(folder.exists() for _, folder in seen)


def test_a_servers_folder_goes_when_its_trainer_is_killed(tmp_path: Path):
    folder = tmp_path / "sockets"
    folder.mkdir()
    trainer = (
        "import os, subprocess, sys, time\n"
        "module = 'lens_megatron.rollout.servers.end_with_parent'\n"
        "guardian = [sys.executable, '-m', module, '--remove', sys.argv[1], str(os.getpid())]\n"
        "server = [sys.executable, '-c', 'import sys, time; open(sys.argv[1], \"w\"); time.sleep(987)']\n"
        "subprocess.Popen([*guardian, *server, sys.argv[1] + '/http'])\n"
        "time.sleep(987)"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer, str(folder)], env=environment())
    until((folder / "http").exists)
    process.kill()
    process.wait()
    until(lambda: not folder.exists())


def test_requests_and_answers_of_the_store_are_what_torchs_were():
    secret, listener = channel.new_secret(), channel.listen(LOOPBACK)
    door, storage = control_store.serve(listener, secret)
    store = ControlStore(channel.address_of(listener), secret)
    assert store.get([]) == [] and store.get(["a"]) == [None]
    store.set("a", b"")
    store.set("b", b"\0" * 70_000)
    assert store.get(["a", "b", "c"]) == [b"", b"\0" * 70_000, None]
    assert [store.add("n", 5), store.add("n", -7)] == [5, -2]
    assert [store.append("list", b"x"), store.append("list", b"y")] == [0, 1]
    assert store.get(["list", "list/0", "list/1"]) == [b"2", b"x", b"y"]
    store.delete(["a", "b", "n", "list", "list/0", "absent"])
    assert list(storage.values) == [b"list/1"]

    def count() -> None:
        clone = store.clone(DEADLINE_S)
        for _ in range(200):
            clone.add("n", 1)
        clone.close()

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.add("n", 0) == 1600
    door.close()
    store.close()
