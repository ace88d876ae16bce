"""The parts of a stop: what another thread saves of the last finished step, and who may stop whom."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_policy import config, train_step, writer
from records import PROMPT
from safetensors.torch import load_file
from toy_runs import ROOT, environment, start_ranks
from warm_ranks import Ranks

from lens_megatron.algorithms.selection.every_prompt import EveryPrompt
from lens_megatron.data.prompts import PromptStream
from lens_megatron.output import metrics
from lens_megatron.policy import checkpoint_files, shards
from lens_megatron.policy.last_step import PolicyLastStep, is_exported
from lens_megatron.policy.model import Policy, build_policy, reference_weights
from lens_megatron.policy.offload import TrainerMemory
from lens_megatron.policy.parallel import Mesh
from lens_megatron.results import Outcome
from lens_megatron.supervision import heartbeat, stop

WORKER = Path(__file__).with_name("stop_worker.py")


def trained(root: Path, mesh: Mesh, layout: dict | None = None, dtype: str = "float32") -> tuple[Policy, object]:
    """A policy that is one step further than its reference policy, and the options of the algorithm."""
    built = config(root, layout or {}, dtype)
    algorithm = built.algorithm.model_copy(update={"kl_coef": 0.1})
    policy = build_policy(built.model_copy(update={"algorithm": algorithm}), mesh)
    train_step(policy, built.algorithm)
    return policy, built.algorithm


def agree(failure: str | None) -> str | None:
    return failure


def save_elsewhere(step: PolicyLastStep) -> str | None:
    """As a stop does it: on a thread, which holds the step."""
    found: list[str | None] = []

    def act() -> None:
        assert step.hold(1.0) is not None
        found.append(step.save(agree))
        step.release()

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    return found[0]


def stored(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict]:
    path = folder / f"iter_{step:07d}"
    return load_file(path / "rank_00000.safetensors"), json.loads((path / "state.json").read_text())


def assert_same(a: tuple[dict, dict], b: tuple[dict, dict]) -> None:
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    assert [name for name in a[0] if not torch.equal(a[0][name], b[0][name])] == []


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["at rest", "reference", "away", "within an update", "after more draws"])
def test_what_a_thread_saves_is_what_the_main_one_would_have(where, dtype, distributed, root, mesh, tmp_path):
    policy, algorithm = trained(root, mesh, {"use_distributed_optimizer": distributed}, dtype)
    memory = TrainerMemory(policy, enabled=True)
    with writer(policy, tmp_path / "usual", root) as usual:
        usual.save(1, metric=0.5)
    with writer(policy, tmp_path / "aside", root) as saver:
        step = PolicyLastStep(policy, memory, saver, lambda: None)
        step.finish(1, metric=0.5)
        if where == "at rest":
            assert save_elsewhere(step) is None
        elif where == "reference":
            with reference_weights(policy):
                assert save_elsewhere(step) is None
        elif where == "away":
            memory.to_host()
            assert save_elsewhere(step) is None
            memory.to_device()
        elif where == "within an update":
            policy.guard.keep_copy()
            train_step(policy, algorithm)
            assert save_elsewhere(step) is None
        else:
            torch.rand(5)
            assert save_elsewhere(step) is None
    assert_same(stored(tmp_path / "aside", 1), stored(tmp_path / "usual", 1))
    assert not is_exported(tmp_path / "aside", 1) and checkpoint_files.steps_saved(tmp_path / "aside") == 1
    assert not list((tmp_path / "aside").glob(".*"))
    if where != "within an update":
        saver.save(1, metric=0.5)
        found, expected = (load_file(tmp_path / f / "iter_0000001/hf/model.safetensors") for f in ("aside", "usual"))
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def test_a_thread_saves_the_selection_as_it_was_after_the_step(root, mesh, tmp_path):
    """The next step's prompts have been observed, while it has not been trained yet."""
    policy, _ = trained(root, mesh)
    selection = EveryPrompt(PromptStream([PROMPT], 0))
    selection.position = 4
    with writer(policy, tmp_path, root, selection=selection) as saver:
        step = PolicyLastStep(policy, TrainerMemory(policy, enabled=False), saver, lambda: None)
        step.finish(1)
        selection.observe(2, [Outcome(0, PROMPT.index, True, 0.5, 0.5, 1, 0)])
        assert save_elsewhere(step) is None
        assert stored(tmp_path, 1)[1]["selection"] == {"position": 4} and stored(tmp_path, 1)[1]["epoch"] == 4.0
        step.finish(2)
        assert save_elsewhere(step) is None
        assert stored(tmp_path, 2)[1]["selection"] == {"position": 5}


def test_nobody_saves_a_step_that_is_half_done(root, mesh, tmp_path):
    policy, algorithm = trained(root, mesh)
    with writer(policy, tmp_path, root) as saver:
        step = PolicyLastStep(policy, TrainerMemory(policy, enabled=False), saver, lambda: None)
        assert step.hold(0.1) is None, "nothing was finished"
        step.finish(1)
        assert step.hold(0.1) == 1
        assert not policy.guard.lock.acquire(blocking=False), "the optimizer's step would have to wait"
        step.release()
        with policy.guard.changing():
            assert step.hold(0.1) is None
        assert step.hold(0.1) is None, "the step's rollouts and its row are still to be written"
        step.finish(2)
        assert step.hold(0.1) == 2
        step.release()
        train_step(policy, algorithm)
        assert step.hold(0.1) is None


def test_a_save_in_flight_is_waited_for_and_not_done_twice(root, mesh, tmp_path, monkeypatch):
    policy, _ = trained(root, mesh)
    go, write = threading.Event(), shards.write_file
    monkeypatch.setattr(shards, "write_file", lambda *given: (go.wait(60), write(*given))[1])
    with writer(policy, tmp_path, root, background=True) as saver:
        step = PolicyLastStep(policy, TrainerMemory(policy, enabled=False), saver, lambda: None)
        step.finish(1)
        saver.save(1)
        step.hold(1.0)
        threading.Timer(0.5, go.set).start()
        assert step.is_saved()
        step.release()
        step.finish(2)
        step.hold(1.0)
        assert not step.is_saved()
        step.release()


def test_a_full_disk_leaves_what_was_there_and_says_so(root, mesh, tmp_path, monkeypatch):
    policy, _ = trained(root, mesh)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with writer(policy, tmp_path, root) as saver:
        saver.save(1)
        step = PolicyLastStep(policy, TrainerMemory(policy, enabled=False), saver, lambda: None)
        step.finish(2)
        monkeypatch.setattr(shards, "write_file", full)
        assert "No space left on device" in save_elsewhere(step)
    assert checkpoint_files.steps_saved(tmp_path) == 1 and not list(tmp_path.glob(".writing*"))


def test_a_row_is_added_to_and_never_written_twice(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, first_step=1)
    writer.add(0, {"val": 0.5})
    writer.add(0, {"val": 0.6})
    writer.write(1, {"loss": 1.0, "timing_s/gen": 2.0})
    writer.add(1, {"val": 0.7})
    expected = [{"step": 0, "val": 0.6}, {"step": 1, "loss": 1.0, "timing_s/gen": 2.0, "val": 0.7}]
    assert metrics.read_metrics(tmp_path) == expected
    more = metrics.with_more_seconds(expected[1], {"gen": 0.5, "testing": 3.0})
    assert more == {"timing_s/gen": 2.5, "timing_s/testing": 3.0}


def test_the_watchdog_does_not_count_rounds(mesh):
    before = heartbeat.collectives_begun()
    group = torch.distributed.new_group(backend="gloo", group_desc=heartbeat.UNCOUNTED)
    torch.distributed.all_reduce(torch.ones(1), group=group)
    assert heartbeat.collectives_begun().keys() == before.keys()


# ---- who may stop whom --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "number", "code", "said"),
    [
        ("alone", signal.SIGTERM, 0, ["SIGTERM: stopped before anything was begun"]),
        ("boundary", signal.SIGINT, 0, ["SIGINT: stopping within seconds", "saved by the main thread"]),
        (
            "stuck",
            signal.SIGHUP,
            0,
            ["SIGHUP: stopping within seconds", "saving", "abandoned", "stopped as asked after step 7; the same"],
        ),
        ("failing", signal.SIGTERM, 2, ["saving", "abandoned", "step 7 could not be saved: no space left"]),
    ],
)
def test_a_signal_ends_the_process_in_order(how: str, number: int, code: int, said: list[str]):
    with begun(how) as process:
        process.send(number)
        assert process.wait() == [code], process.stdout() + process.stderr()
        output = process.stdout()
    places = [output.find(text) for text in said]
    assert -1 not in places and places == sorted(places), output
    assert ("saving" in output) == ("saving" in said), "the main thread was first"


def test_a_program_that_ends_does_not_wait_for_its_threads_next_round(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stop, "ROUND_S", 3600.0)
    with pytest.raises(ZeroDivisionError), stop.Stop() as listening:
        raise ZeroDivisionError
    assert not listening._thread.is_alive()


def test_only_a_second_ctrl_c_that_is_meant_kills():
    with begun("impatient") as process:
        for _ in range(2):  # one from the terminal, one from torchrun
            process.send(signal.SIGINT)
            time.sleep(0.2)
        process.await_stdout("saving")
        process.send(signal.SIGTERM)  # a scheduler that repeats itself
        time.sleep(6)
        assert process.runs()
        process.send(signal.SIGINT)
        assert process.wait() == [128 + signal.SIGINT]


def test_who_started_it_with_nohup_means_it():
    with begun("nohup") as process:
        process.send(signal.SIGHUP)
        time.sleep(2)
        assert process.runs()
        process.send(signal.SIGTERM)
        assert process.wait() == [0]


@pytest.mark.slow
def test_a_rank_that_is_left_alone_does_not_outlive_its_launchers_patience():
    """torchrun tells the others to stop when one fails; this one's main thread would not notice for an hour."""
    with begun("lost", ranks=2) as processes:
        processes.await_end_of(1)
        processes.send(signal.SIGTERM, rank=0)
        assert processes.wait() == [1, 9]
        assert "could not be saved: another rank was lost" in processes.stdout()


def test_a_signal_while_the_program_is_being_imported_ends_it_with_0():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / "pretrain_lens.py"), "--config", "none"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "torch." in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 0


@contextmanager
def begun(how: str, ranks: int = 1) -> Iterator[Ranks]:
    """The worker, which waits for a signal."""
    with start_ranks(ranks, WORKER, how, together=False) as processes:
        processes.await_stdout("listening" if how in ("alone", "nohup") else "training")
        yield processes


def test_slurms_script_passes_a_signal_on_and_waits(tmp_path: Path):
    fakes = {
        "scontrol": "echo node1",
        "python": "exit 0",
        "srun": '[[ "$*" == *doctor* ]] && exit 0\n'
        "trap 'echo told; sleep 2; echo saved; exit 1' TERM\ntouch $READY\nwhile true; do sleep 0.1; done",
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node1", "READY": str(tmp_path / "ready")}
    process = subprocess.Popen(
        ["bash", str(ROOT / "configs" / "slurm" / "train.sbatch"), "some.yaml"],
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output.split() == ["told", "saved"] and process.returncode == 1
