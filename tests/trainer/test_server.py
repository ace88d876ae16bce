"""vLLM's servers on a CPU, started by somebody else: beside transformers, and with what can fail."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from server_fleet import KEY, PATIENT, QUICK, Fleet, check, finish, requests_of, states, sync_both_ways, until
from servers import Proxy, Rewrite
from toy_runs import Toy
from vllm_models import LONG, SHORT, needs_vllm, weights

from lens_megatron.config import ConfigError
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.rollout.engine import Completion, EnginesLostError, Request, WeightManifestError
from lens_megatron.rollout.servers.engine import ServerEngine
from lens_megatron.rollout.servers.health import ServerState

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def fleet(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    os.environ["LENS_VLLM_API_KEY"] = KEY
    fleet = Fleet(toy, tmp_path_factory.mktemp("servers"), servers=2)
    yield fleet
    fleet.stop()
    del os.environ["LENS_VLLM_API_KEY"]


@pytest.fixture(autouse=True)
def closed(fleet: Fleet) -> Iterator[None]:
    yield
    while fleet.engines:
        fleet.engines.pop().close()


def test_after_a_sync_servers_are_the_new_model_and_before_it_the_old_one(fleet: Fleet):
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


@pytest.fixture
def proxy(fleet: Fleet) -> Iterator[Proxy]:
    """A proxy before the first server."""
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
    engine = fleet.engine([proxy.address, fleet.processes[1].address], limits=replace(PATIENT, failures=1))
    fleet.messages.on_message = lambda line: proxy.cut()  # or it would be given the weights again, and serve
    proxy.rewrite = rewrite
    requests = requests_of(24)
    engine.submit(requests)
    check(fleet.models["tied"][0], requests, finish(engine, 24), 1)
    assert any(proxy.address in line and message in line for line in fleet.said), fleet.said
    assert state in fleet.said[0] and engine.capacity() == 16


def test_a_network_that_is_cut_and_mended_loses_nothing(fleet: Fleet, proxy: Proxy):
    engine = fleet.engine([proxy.address], limits=replace(PATIENT, silent_probes=100, failures=100))
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
    engine = fleet.engine([proxy.address], alone=False, limits=QUICK)
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
    engine, requests = fleet.engine(limits=QUICK), requests_of(32, tokens=80)
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
        ServerEngine(config, hf_config, (), [address], limits=PATIENT)
    with pytest.raises(ConfigError, match="did not start: no answer 0 s after its start"):
        ServerEngine(config, hf_config, (), ["http://127.0.0.1:9"], limits=replace(PATIENT, start_s=0.5))
    monkeypatch.setenv("LENS_VLLM_API_KEY", "another")
    with pytest.raises(ConfigError, match="answered 401.*LENS_VLLM_API_KEY must be its key"):
        ServerEngine(config, hf_config, (), [address], limits=PATIENT)
