"""Whole runs with servers that are killed, and trainers that are. Slow: every one starts servers, some twice."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from servers import announce_plugin
from toy_runs import Toy, command, environment
from vllm_models import needs_vllm, save

from lens_megatron.errors import ExitCode

pytestmark = [needs_vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("model")
    announce_plugin(tmp_path_factory.mktemp("plugin"))
    torch.manual_seed(0)
    save(toy, folder, tied=True)
    return Toy(folder, toy.train, toy.eval)


def processes_of(model: Toy) -> list[psutil.Process]:
    """The processes of servers, whose command lines name the model."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(model.model) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def servers_of(model: Toy) -> list[psutil.Process]:
    return [p for p in processes_of(model) if "lens_megatron.rollout.servers.end_with_parent" not in p.cmdline()]


def rows(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def running(process: subprocess.Popen, seconds: float) -> Iterator[None]:
    """Until it ends or `seconds` are over."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        yield
        time.sleep(0.2)


def test_a_run_whose_only_server_dies_once_goes_on(model: Toy, tmp_path: Path):
    """Between two looks at the rollouts: killed while it samples, or just before it would."""
    directory, killed = tmp_path / "run", []
    tree = model.tree(directory, rollout={"engine": "vllm_server", "max_response_length": 150}, train={"steps": 4})
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(command(tree, tmp_path, 1), env=environment(), stdout=output, stderr=output)
        for _ in running(process, 400):
            if not killed and rows(directory) >= 2:
                killed = servers_of(model)
                for server in killed:
                    server.kill()
    said = (tmp_path / "output").read_text()
    assert killed and process.poll() == 0, said[-4000:]
    assert re.search("server 0: [a-z]+ -> dead: ", said), said[-4000:]
    assert rows(directory) == 5
    assert not processes_of(model) and "EnginesLost" not in said


def test_a_run_whose_servers_die_again_and_again_ends_and_goes_on_later(model: Toy, tmp_path: Path):
    directory = tmp_path / "run"
    options = {"engine": "vllm_server", "max_response_length": 150, "prompts_per_step": 8}
    tree = model.tree(directory, rollout=options, train={"steps": 1000, "save_interval": 1})
    with (tmp_path / "output").open("w+") as output:
        start = {"env": environment(), "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command(tree, tmp_path, 1), **start)
        for _ in running(process, 240):
            if rows(directory) >= 2:
                for server in servers_of(model):
                    server.kill()
        said = (tmp_path / "output").read_text()
        assert process.poll() is not None and f"exitcode  : {ExitCode.ENGINES_LOST} " in said, said[-4000:]
        assert "no server is left for" in said and "server 0 is dead: " in said and "what was graded is kept" in said
        assert not processes_of(model)
        done = rows(directory)
        process = subprocess.Popen(command(tree, tmp_path, 1), **start)
        for _ in running(process, 240):
            if rows(directory) > done + 1:
                break
        ranks = [p for p in psutil.Process(process.pid).children() if "pretrain_lens.py" in " ".join(p.cmdline())]
        assert process.poll() is None and ranks and processes_of(model)
        for each in (psutil.Process(process.pid), *ranks):
            each.kill()
        process.wait()
        for _ in range(600):
            if not processes_of(model):
                break
            time.sleep(0.1)
        assert not processes_of(model), "servers outlived a trainer that was killed"
