"""Servers that the trainer has started itself, on a CPU: killed, started again, ended with it, and in a whole run."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from server_fleet import PATIENT, Fleet, check, finish, requests_of, sync_both_ways, until
from toy_runs import ROOT, Toy, environment, rollout_rows, start_ranks, write_config
from vllm_models import needs_vllm, weights

from lens_megatron.output.metrics import read_metrics
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.rollout.engine import Completion
from lens_megatron.rollout.servers import end_with_parent
from lens_megatron.rollout.servers.engine import ServerEngine
from lens_megatron.rollout.servers.process import ServerProcess

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def fleet(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(toy, tmp_path_factory.mktemp("servers"), servers=0)
    yield fleet
    fleet.stop()


@pytest.fixture(scope="module")
def own(fleet: Fleet) -> Iterator[ServerEngine]:
    """An engine that has started its server itself."""
    process = ServerProcess("server 9", fleet.options("untied"), fleet.folder / "server 9.log")
    config = fleet.config("untied")
    process.start()
    hf_config = read_hf_config(config.model.path)
    engine = ServerEngine(config, hf_config, [process], limits=PATIENT)
    yield engine
    engine.close()


@pytest.mark.slow
def test_untied_heads_are_new_too(own: ServerEngine, fleet: Fleet):
    sync_both_ways(own, *fleet.models["untied"])


def kill(engine: ServerEngine) -> list[psutil.Process]:
    """Kills the engine's only server in the middle of its work. Returns the processes of that server."""
    (api,) = psutil.Process(engine.processes[0].process.pid).children()
    family = [api, *api.children(recursive=True)]
    api.kill()
    return family


@pytest.mark.slow
def test_the_only_server_is_killed_and_its_requests_wait_until_it_serves_again(own: ServerEngine, fleet: Fleet):
    engine, model = own, fleet.models["untied"][0]
    process, requests = engine.processes[0], requests_of(30, tokens=80)
    engine.load_weights(weights(model), 5)
    before, family = (process.key, process.folder), []
    engine.submit(requests)
    done = finish(engine, 30, lambda done: family.extend(kill(engine)) if done and not family else None)
    check(model, requests, done, 5)
    assert any("-> dead: " in line for line in fleet.said), fleet.said[-5:]
    assert "server 9: serves again, with weights of version 5" in fleet.said
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), "its engine is gone too"
    assert process.key != before[0] and process.folder != before[1] and not before[1].exists()


@pytest.mark.slow
def test_where_others_serve_they_get_its_requests_at_once(own: ServerEngine, fleet: Fleet):
    engine, model, requests = own, fleet.models["untied"][0], requests_of(30, tokens=80)
    engine.load_weights(weights(model), 6)
    engine.alone = engine.pool.waits_for_restarts = False
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
    engine.alone = engine.pool.waits_for_restarts = True


def assert_answers_on_no_port(guardian: psutil.Process) -> None:
    (api,) = guardian.children()
    words, key = api.cmdline(), api.environ()["VLLM_API_KEY"]
    assert "--port" not in words and key not in words
    path = Path(words[words.index("--uds") + 1])
    assert path.parent.stat().st_mode & 0o777 == 0o700
    hosts = {
        connection.laddr.ip
        for each in (guardian, *guardian.children(recursive=True))
        for connection in each.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert hosts <= {"127.0.0.1", "::1"}, "gloo's, of vLLM's own groups"
    for head, expected in [("", b"401"), (f"Authorization: Bearer {key}\r\n", b"200")]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(f"GET /weight_info HTTP/1.1\r\nHost: x\r\n{head}Connection: close\r\n\r\n".encode())
            assert expected in connection.recv(100).splitlines()[0]


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
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))


def test_the_program_trains_on_rollouts_of_two_servers_that_answer_on_no_port(fleet: Fleet, toy: Toy, tmp_path: Path):
    """The graders wait until the servers, one of each rank, have been looked at."""
    model = Toy(fleet.folder / "tied", toy.train, toy.eval)
    grading = {"grader": "graders:patient_score", "timeout_s": 240}
    tree = model.tree(tmp_path / "run", rollout={"engine": "vllm_server", "servers": 2}, reward=grading)
    words, variables = ["--config", write_config(tree, tmp_path)], {"PATIENCE": str(tmp_path)}
    with start_ranks(2, ROOT / "pretrain_lens.py", *words, variables=variables) as ranks:
        until(lambda: (tmp_path / "waits").exists() or not ranks.runs())
        assert ranks.runs(), ranks.stdout() + ranks.stderr()
        for pid in ranks.pids:
            (guardian,) = (p for p in psutil.Process(pid).children() if end_with_parent.__name__ in p.cmdline())
            assert_answers_on_no_port(guardian)
        (tmp_path / "go").touch()
        assert ranks.wait() == [0, 0], ranks.stdout() + ranks.stderr()
    rows = read_metrics(tmp_path / "run")
    assert [row["training/global_step"] for row in rows[1:]] == [1, 2]
    for step, row in enumerate(rows[1:], 1):
        assert row["actor/ratio_min"] == pytest.approx(1.0, abs=1e-4) and row["actor/grad_norm"] > 0
        assert len(rollout_rows(tmp_path / "run", step)) >= 16
    logs = sorted((tmp_path / "run" / "servers").iterdir())
    assert [log.name for log in logs] == ["server_0.log", "server_1.log"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
