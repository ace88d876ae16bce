"""vLLM's servers on a CPU, as processes of their own: beside transformers, in a run, and with what can fail."""

import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from servers import GivenServer, Proxy, Rewrite, announce_plugin
from test_vllm import LONG, SHORT, error_in_log_probs, other, save, weights
from toy_runs import Toy, environment, launch, rollout_rows
from transformers import AutoModelForCausalLM

from lens_megatron.config import Config, ConfigError, from_tree
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.rollout.engine import Completion, EnginesLostError, Request, WeightManifestError
from lens_megatron.rollout.servers.client import Expected, ServerError, completion_of
from lens_megatron.rollout.servers.engine import ServerEngine
from lens_megatron.rollout.servers.health import Limits, ServerState
from lens_megatron.rollout.servers.process import ServerProcess, server_options

pytest.importorskip("vllm", reason="make setup-vllm")

KEY = "the key of these tests"
QUICK = Limits(probe_interval_s=0.2, answer_s=2.0, silent_probes=2, stuck_s=2.0, bucket_s=20.0, start_s=300.0)


class Messages(logging.Handler):
    """Keeps what is logged about the given servers, and apart from that what is about server 9."""

    def __init__(self, said: list[str], of_server_9: list[str]):
        super().__init__()
        self.said, self.of_server_9 = said, of_server_9
        self.logger = logging.getLogger("lens_megatron.rollout.servers")
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        (self.of_server_9 if "server 9: " in record.getMessage() else self.said).append(record.getMessage())

    def close(self) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(logging.NOTSET)
        super().close()


class Fleet:
    """Two servers of one model for all tests, one of another; engines come and go."""

    def __init__(self, toy: Toy, folder: Path):
        announce_plugin(folder / "plugin")
        self.folder = folder
        self.models = {}
        for name, tied in (("tied", True), ("untied", False)):
            (folder / name).mkdir()
            torch.manual_seed(0)
            save(toy, folder / name, tied=tied)
            base = AutoModelForCausalLM.from_pretrained(folder / name)
            self.models[name] = [other(base if seed == 2 else _copy(folder / name), seed) for seed in (1, 2)]
        options = self.options("tied")
        self.processes = [GivenServer(options, folder / f"given {i}.log", KEY) for i in range(2)]
        self.said: list[str] = []
        self.of_server_9: list[str] = []
        self.messages = Messages(self.said, self.of_server_9)
        self.engines: list[ServerEngine] = []

    def config(self, model: str, **rollout: object) -> Config:
        return from_tree(
            {
                "run": {"directory": str(self.folder / "run")},
                "model": {"path": str(self.folder / model)},
                "data": {"train": "unused", "max_prompt_length": 300},
                "rollout": {
                    "engine": "vllm_server",
                    "max_response_length": 200,
                    "max_running_sequences": 16,
                    **rollout,
                },
                # Six blocks: most tests run short of keys and values.
                "vllm": {"kv_cache_memory_bytes": 6 * 2 * 2 * 2 * 32 * 4 * 128},
            }
        )

    def options(self, model: str) -> dict[str, Any]:
        config = self.config(model)
        return server_options(config, read_hf_config(config.model.path))

    def stop(self) -> None:
        self.messages.close()
        for process in self.processes:
            process.stop()

    def engine(
        self, addresses: Sequence[str] | None = None, *, load: int | None = 1, limits: Limits = QUICK, **options: object
    ) -> ServerEngine:
        """Over the running tied servers, as over given ones; with weights of `load`."""
        addresses = [process.address for process in self.processes] if addresses is None else addresses
        config = self.config("tied", servers=list(addresses))
        hf_config = read_hf_config(config.model.path)
        self.said.clear()
        engine = ServerEngine(config, hf_config, (), addresses, limits=limits, **options)
        self.engines.append(engine)
        if load is not None:
            engine.load_weights(weights(self.models["tied"][0]), load)
        return engine


def _copy(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def fleet(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    os.environ["LENS_VLLM_API_KEY"] = KEY
    fleet = Fleet(toy, tmp_path_factory.mktemp("servers"))
    yield fleet
    fleet.stop()
    del os.environ["LENS_VLLM_API_KEY"]


@pytest.fixture(autouse=True)
def closed(fleet: Fleet) -> Iterator[None]:
    yield
    while fleet.engines:
        fleet.engines.pop().close()


@pytest.fixture(scope="module")
def own(fleet: Fleet) -> Iterator[Future[ServerEngine]]:
    """An engine that has started its server itself; it starts while other tests run."""
    process = ServerProcess("server 9", fleet.options("untied"), fleet.folder / "server 9.log")
    config = fleet.config("untied")
    process.start()
    hf_config = read_hf_config(config.model.path)
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(ServerEngine, config, hf_config, [process], limits=QUICK)
        yield engine
        engine.result().close()


def requests_of(count: int, tokens: int = 24) -> list[Request]:
    return [
        Request(i, (SHORT, LONG)[i % 2], 1 + (tokens + 5 * i) % (2 * tokens), (1.0, 0.7, 0.0)[i % 3], 99 + i)
        for i in range(count)
    ]


def finish(
    engine: ServerEngine, count: int, meanwhile: Callable[[int], None] = lambda done: None, *, seconds: float = 60
) -> dict:
    """What `step` returns until there are `count` completions. Fails when it lasts, or when one comes twice."""
    done: dict[int, Completion] = {}
    until = time.monotonic() + seconds
    while len(done) < count:
        assert time.monotonic() < until, (len(done), engine.progress(), [m.known for m in engine.pool.members])
        for completion in engine.step():
            assert completion.request_id not in done
            done[completion.request_id] = completion
        meanwhile(len(done))
    assert not engine.pool.requests and not engine.pool.lost
    return done


def check(model: torch.nn.Module, requests: Sequence[Request], done: dict[int, Completion], version: int) -> None:
    """Nothing lost, nothing extra, everything from these weights."""
    assert sorted(done) == sorted(request.request_id for request in requests)
    for request in requests:
        completion = done[request.request_id]
        assert completion.weight_version == version
        assert completion.finished or len(completion.token_ids) == request.max_new_tokens
        assert error_in_log_probs(model, request, completion) < 3e-5


def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def states(engine: ServerEngine) -> list[ServerState]:
    return [member.known.state for member in engine.pool.members]


def sync_both_ways(engine: ServerEngine, first: torch.nn.Module, second: torch.nn.Module) -> None:
    requests, seen = requests_of(12), []
    for version, (new, old) in enumerate([(first, second), (second, first), (first, second)]):
        engine.load_weights(iter(weights(new)), version)
        engine.submit(requests)
        done = finish(engine, len(requests))
        check(new, requests, done, version)
        long = max(requests, key=lambda request: len(done[request.request_id].token_ids))
        assert error_in_log_probs(old, long, done[long.request_id]) > 0.5
        seen.append({number: completion.token_ids for number, completion in done.items()})
    assert seen[0] == seen[2] != seen[1]


def test_after_a_sync_servers_are_the_new_model_and_before_it_the_old_one(fleet: Fleet, own: Future[ServerEngine]):
    """Tied heads, and prompts that the prefix cache holds, are where vLLM would keep the old one."""
    engine = fleet.engine(load=None)
    with pytest.raises(RuntimeError, match="no whole set of weights"):
        engine.submit([Request(1, SHORT, 4, 1.0, 0)])
    sync_both_ways(engine, *fleet.models["tied"])
    assert engine.capacity() == 32 and engine.progress().generated_tokens > 0


def test_a_completion_is_a_function_of_its_seed_whichever_server_makes_it(fleet: Fleet):
    requests, found = requests_of(8), []
    for addresses in ([fleet.processes[0].address], [fleet.processes[1].address], None):
        engine = fleet.engine(addresses)
        engine.submit(reversed(requests))
        found.append({number: c.token_ids for number, c in finish(engine, 8).items()})
        engine.close()
        fleet.engines.clear()
    assert found[0] == found[1] == found[2]


def test_requests_that_cannot_be_served_are_refused(fleet: Fleet):
    engine = fleet.engine()
    with pytest.raises(ValueError, match="prompt of 200 \\+ max_new_tokens 313 exceeds the servers' max_model_len 512"):
        engine.submit([Request(1, SHORT, 2, 1.0, 0), Request(2, LONG, 313, 1.0, 0)])
    with pytest.raises(ValueError, match="token ids must lie in"):
        engine.submit([Request(1, (10**6,), 2, 1.0, 0)])  # it would end a server
    assert engine.progress().waiting + engine.progress().running == 0
    engine.submit([Request(1, SHORT, 100, 1.0, 0)])
    with pytest.raises(ValueError, match="request 1 is in flight"):
        engine.submit([Request(1, SHORT, 2, 1.0, 0)])
    with pytest.raises(RuntimeError, match="1 requests in flight"):
        engine.load_weights([], 1)
    finish(engine, 1)


def test_out_of_room_for_keys_and_values_nothing_is_lost(fleet: Fleet):
    """Each needs three of the six blocks, and sixteen run at once."""
    engine = fleet.engine([fleet.processes[0].address])
    requests = [Request(i, LONG[i:], 100, 2.0, i) for i in range(16)]
    engine.submit(requests)
    check(fleet.models["tied"][0], requests, finish(engine, 16), 1)


def test_weights_that_are_not_exactly_the_models_are_refused(fleet: Fleet):
    engine, good = fleet.engine(), weights(fleet.models["tied"][0])
    for stream, message in [(good[:5] + good[6:], f"missing {good[5][0]}"), ([*good, good[5]], "duplicate")]:
        with pytest.raises(WeightManifestError, match=message):
            engine.load_weights(stream, 1)
        assert engine.capacity() == 0
        with pytest.raises(RuntimeError, match="no whole set of weights"):
            engine.submit([Request(1, SHORT, 2, 1.0, 0)])
    engine.load_weights(good, 2)
    requests = requests_of(4)
    engine.submit(requests)
    check(fleet.models["tied"][0], requests, finish(engine, 4), 2)


def test_what_is_taken_back_is_stopped_and_never_returned(fleet: Fleet):
    engine = fleet.engine([fleet.processes[0].address])
    long = [Request(i, SHORT, 450, 0.0, 0) for i in range(4)]
    engine.submit([*long, Request(9, SHORT, 2, 1.0, 0)])
    engine.cancel({request.request_id for request in long})
    assert list(finish(engine, 1)) == [9]
    engine.submit(long)  # under the same ids, as if new
    assert len(finish(engine, 4)) == 4


def test_control_endpoints_need_the_key(fleet: Fleet):
    """vLLM's own check of the key leaves them open."""
    port = fleet.processes[0].port
    for head, expected in [("", b"401"), ("Authorization: Bearer wrong\r\n", b"401"),
                           (f"Authorization: Bearer {KEY}\r\n", b"200")]:  # fmt: skip
        for path in ("/weight_info", "/health", "/v1/models"):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{head}Connection: close\r\n\r\n".encode())
                assert expected in connection.recv(100).splitlines()[0]
    words = fleet.processes[0].api().cmdline()
    assert KEY not in " ".join(words) and "127.0.0.1" in words


def answer(**change: object) -> dict:
    choice = {
        "token_ids": [5, 6, 1],
        "finish_reason": "stop",
        "weight_versions": [{"version": "a-1", "start": 0, "end": 3}],
        "logprobs": log_probs(-0.5, -0.5, -0.5),
    }
    return {"choices": [choice | change]}


def log_probs(*values: float) -> dict:
    return {"content": [{"token_id": t, "logprob": value} for t, value in zip((5, 6, 1), values, strict=False)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [5, 600, 1]}, "tokens outside 0..99"),
        ({"token_ids": [5, 1, 1]}, "3 tokens, and log-probabilities of 3 others"),
        ({"token_ids": []}, "weights"),
        ({"token_ids": None}, "not a completion"),
        ({"logprobs": None}, "not a completion"),
        ({"logprobs": log_probs(-0.5, -0.5)}, "3 tokens, and log-probabilities of 2 others"),
        ({"logprobs": log_probs(-0.5, math.nan, -0.5)}, "log-probability of nan"),
        ({"logprobs": log_probs(-0.5, -9999.0, -0.5)}, "log-probability of -9999"),
        ({"logprobs": log_probs(-0.5, 0.1, -0.5)}, "log-probability of 0.1"),
        ({"finish_reason": "length"}, "ended with 'length' after 3 of 8 tokens"),
        ({"finish_reason": "abort"}, "ended with 'abort'"),
        ({"weight_versions": [{"version": "a-0", "start": 0, "end": 3}]}, "a-0"),
        ({"weight_versions": [{"version": v, "start": 0, "end": 3} for v in ("a-0", "a-1")]}, "a-0"),
        ({"weight_versions": None}, "not a completion"),
    ],
)
def test_answers_that_are_no_completion_of_these_weights_are_refused(change: dict, message: str):
    request, expected = Request(1, (5, 6), 8, 1.0, 0), Expected(100, frozenset({1}), "a-1", 1)
    assert completion_of(answer(), request, expected) == Completion(1, (5, 6, 1), (-0.5,) * 3, True, 1)
    with pytest.raises(ServerError, match=message):
        completion_of(answer(**change), request, expected)


@pytest.fixture
def proxy(fleet: Fleet) -> Iterator[Proxy]:
    """Before the first server."""
    proxy = Proxy(fleet.processes[0].address)
    yield proxy
    while fleet.engines:
        fleet.engines.pop().close()
    proxy.close()


def _garbage(path: str, content: bytes) -> bytes:
    return content[: len(content) // 2] if "generate" in path else content


def _old_weights(path: str, content: bytes) -> bytes:
    return content.replace(b'"weight_versions":[{"version":"', b'"weight_versions":[{"version":"not-')


@pytest.mark.parametrize(
    ("rewrite", "state", "message"),
    [(_garbage, ServerState.DEAD, "not JSON"), (_old_weights, ServerState.STALE, "sampled with weights [('not-")],
)
def test_a_server_that_answers_wrongly_is_left_and_others_do_its_work(
    fleet: Fleet, proxy: Proxy, rewrite: Rewrite, state: ServerState, message: str
):
    engine = fleet.engine([proxy.address, fleet.processes[1].address], limits=replace(QUICK, failures=1))
    proxy.rewrite = rewrite
    requests = requests_of(24)
    engine.submit(requests)
    check(fleet.models["tied"][0], requests, finish(engine, 24), 1)
    assert any(proxy.address in line and message in line for line in fleet.said), fleet.said
    assert state in fleet.said[0] and engine.capacity() >= 16, "it may have been given the weights again since"


def test_a_network_that_is_cut_and_mended_loses_nothing(fleet: Fleet, proxy: Proxy):
    engine = fleet.engine([proxy.address], limits=replace(QUICK, silent_probes=100, failures=100))
    requests = requests_of(30, tokens=80)
    engine.submit(requests)

    def meanwhile(done: int) -> None:
        if done >= 3 and not proxy.was_cut:
            proxy.cut()
        if proxy.is_cut and states(engine) == [ServerState.SUSPECT]:
            proxy.mend()

    check(fleet.models["tied"][0], requests, finish(engine, 30, meanwhile), 1)
    assert any("healthy -> suspect" in line for line in fleet.said) and "suspect -> healthy" in fleet.said[-1]


def test_cut_off_for_good_the_run_ends_or_others_take_over(fleet: Fleet, proxy: Proxy):
    engine = fleet.engine([proxy.address], alone=False)
    requests = requests_of(30, tokens=80)
    engine.submit(requests)
    proxy.cut()
    done: list[Completion] = []
    until(lambda: bool(done.extend(engine.step()) or engine.pool.lost))
    assert engine.capacity() == 0
    taken = engine.returned()
    assert {c.request_id for c in done} ^ {r.request_id for r in taken} == set(range(30)), "each in one of the two"
    assert engine.step() == engine.returned() == []
    engine.alone = True
    engine.submit(taken)
    with pytest.raises(EnginesLostError, match=f"for {len(taken)} requests; server {proxy.address} is dead: 2 probes"):
        until(lambda: bool(engine.step()))


@pytest.mark.parametrize("part", ["server", "engine"])
def test_a_server_that_hangs_is_found_and_comes_back_when_its_weights_were_sent_again(fleet: Fleet, part: str):
    """A stopped server answers no probe; one whose engine is stopped answers them all, and makes no tokens."""
    api = fleet.processes[0].api()
    stopped = api if part == "server" else max(api.children(), key=lambda child: child.memory_info().rss)
    engine, requests = fleet.engine(), requests_of(32, tokens=80)
    engine.submit(requests)
    stopped.suspend()
    try:
        check(fleet.models["tied"][0], requests, finish(engine, 32), 1)
    finally:
        stopped.resume()
    assert any(" -> dead: " + {"server": "2 probes", "engine": "no token in"}[part] in line for line in fleet.said)
    until(lambda: engine.capacity() == 32)
    assert any("serves again, with weights of version 1" in line for line in fleet.said)
    engine.submit(requests)
    check(fleet.models["tied"][0], requests, finish(engine, 32), 1)
    engine.load_weights(weights(fleet.models["tied"][1]), 2)
    assert engine.capacity() == 32
    engine.submit(requests)
    check(fleet.models["tied"][1], requests, finish(engine, 32), 2)


def test_untied_heads_are_new_too(own: Future[ServerEngine], fleet: Fleet):
    sync_both_ways(own.result(), *fleet.models["untied"])


def kill(engine: ServerEngine) -> list[psutil.Process]:
    """Its only server, in the middle of its work. Returns the processes of that server."""
    (api,) = psutil.Process(engine.processes[0].process.pid).children()
    family = [api, *api.children(recursive=True)]
    api.kill()
    return family


def test_the_only_server_is_killed_and_its_requests_wait_until_it_serves_again(own: Future[ServerEngine], fleet: Fleet):
    engine, model = own.result(), fleet.models["untied"][0]
    process, requests = engine.processes[0], requests_of(30, tokens=80)
    engine.load_weights(weights(model), 5)
    before, family = (process.key, process.folder), []
    engine.submit(requests)
    done = finish(engine, 30, lambda done: family.extend(kill(engine)) if done and not family else None, seconds=300)
    check(model, requests, done, 5)
    assert any("-> dead: " in line for line in fleet.of_server_9), fleet.of_server_9[-5:]
    assert "server 9: serves again, with weights of version 5" in fleet.of_server_9
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), "its engine is gone too"
    assert process.key != before[0] and process.folder != before[1] and not before[1].exists()


@pytest.mark.slow
def test_where_others_serve_they_get_its_requests_at_once(own: Future[ServerEngine], fleet: Fleet):
    engine, model, requests = own.result(), fleet.models["untied"][0], requests_of(30, tokens=80)
    engine.load_weights(weights(model), 6)
    engine.alone = engine.pool.patient = False
    engine.submit(requests)
    done: list[Completion] = []
    until(lambda: bool(done.extend(engine.step()) or done))
    kill(engine)
    until(lambda: bool(done.extend(engine.step()) or engine.pool.lost))
    taken = engine.returned()
    assert sorted([c.request_id for c in done] + [r.request_id for r in taken]) == list(range(30))
    assert not engine.capacity() and not engine.hopeless()
    engine.load_weights(weights(model), 7)  # waits for it
    engine.submit(taken)
    check(model, taken, finish(engine, len(taken)), 7)
    engine.alone = engine.pool.patient = True


def test_a_server_of_the_trainers_own_answers_on_no_port(own: Future[ServerEngine]):
    process = own.result().processes[0]
    assert process.folder.stat().st_mode & 0o777 == 0o700
    guardian = psutil.Process(process.process.pid)
    hosts = {
        connection.laddr.ip
        for each in (guardian, *guardian.children(recursive=True))
        for connection in each.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert hosts <= {"127.0.0.1", "::1"}, "gloo's, of vLLM's own groups"
    (api,) = guardian.children()
    assert "--port" not in api.cmdline() and process.socket_path in api.cmdline()
    for head, expected in [("", b"401"), (f"Authorization: Bearer {process.key}\r\n", b"200")]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(process.socket_path)
            connection.sendall(f"GET /weight_info HTTP/1.1\r\nHost: x\r\n{head}Connection: close\r\n\r\n".encode())
            assert expected in connection.recv(100).splitlines()[0]


def test_a_server_that_dies_while_it_is_loaded_does_not_stop_the_others(fleet: Fleet):
    """The last test of these servers: one of them is gone after it."""
    engine, model = fleet.engine(load=None), fleet.models["tied"][0]

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for place, pair in enumerate(weights(model)):
            if place == 3:
                fleet.processes[0].api().kill()
            yield pair

    engine.load_weights(stream(), 3)
    assert engine.capacity() == 16 and any("-> dead: " in line for line in fleet.said)
    requests = requests_of(8)
    engine.submit(requests)
    check(model, requests, finish(engine, 8), 3)


def test_given_servers_that_do_not_fit_are_refused(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    address = fleet.processes[1].address
    config = fleet.config("tied", servers=[address], max_response_length=300)
    hf_config = read_hf_config(config.model.path)
    with pytest.raises(ConfigError, match=f"{address} has max_model_len 512, below .* = 600"):
        ServerEngine(config, hf_config, (), [address], limits=QUICK)
    with pytest.raises(ConfigError, match="did not start: no answer 0 s after its start"):
        ServerEngine(config, hf_config, (), ["http://127.0.0.1:9"], limits=replace(QUICK, start_s=0.5))
    monkeypatch.setenv("LENS_VLLM_API_KEY", "another")
    with pytest.raises(ConfigError, match="answered 401.*LENS_VLLM_API_KEY must be its key"):
        ServerEngine(config, hf_config, (), [address], limits=QUICK)


def test_nothing_that_a_trainer_started_outlives_it(tmp_path: Path):
    """Killed, it can end nothing; and what it started has children of its own."""
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '987']); print('up', flush=True); time.sleep(987)"
    trainer = (
        "import os, subprocess, sys, time\n"
        "guardian = [sys.executable, '-m', 'lens_megatron.rollout.servers.end_with_parent', str(os.getpid())]\n"
        f"subprocess.Popen([*guardian, sys.executable, '-c', {child!r}], stdout=open(sys.argv[1], 'w'))\n"
        "time.sleep(987)"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer, str(tmp_path / "log")], env=environment())
    until(lambda: (tmp_path / "log").exists() and "up" in (tmp_path / "log").read_text())
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3
    process.kill()
    process.wait()
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 5)


def test_the_program_trains_on_rollouts_of_two_servers(fleet: Fleet, toy: Toy, tmp_path: Path):
    fleet.stop()
    model = Toy(fleet.folder / "tied", toy.train, toy.eval)
    tree = model.tree(tmp_path / "run", rollout={"engine": "vllm_server", "servers": 2})
    rows = launch(tree, tmp_path, 2)
    assert [row["training/global_step"] for row in rows[1:]] == [1, 2]
    for step, row in enumerate(rows[1:], 1):
        assert row["actor/ratio_min"] == pytest.approx(1.0, abs=1e-4) and row["actor/grad_norm"] > 0
        assert len(rollout_rows(tmp_path / "run", step)) >= 16
    logs = sorted((tmp_path / "run" / "servers").iterdir())
    assert [log.name for log in logs] == ["server_0.log", "server_1.log"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
