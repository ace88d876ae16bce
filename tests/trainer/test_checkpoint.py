"""Checkpoints: exact on the same layout, equal on others, safe while training goes on, whole or not there.

Worlds of one live in this process; a world of two goes through all its layouts in one launch. The whole program's
resume is in test_train.py.
"""

import json
import os
import random
import resource
import signal
import subprocess
import threading
from pathlib import Path

import checkpoint_policy
import numpy as np
import pytest
import torch
from checkpoint_policy import LAYOUTS, SIZES, config, exported, train_step, writer
from safetensors.torch import load_file
from test_policy import saved_model
from toy_runs import run_ranks, start_ranks
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lens_megatron.data.model_files import small_files
from lens_megatron.policy import checkpoint, checkpoint_files, hf_export, shards
from lens_megatron.policy.checkpoint_files import CheckpointError, TrainingState, superfluous
from lens_megatron.policy.model import Policy, build_policy
from lens_megatron.policy.parallel import Mesh
from lens_megatron.policy.sharded_state import local_pieces, optimizer_steps

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    # 131 tokens: padded under TP2. A tied head: two copies under PP2. Four layers: two chunks per stage under VPP2.
    sizes = SIZES | {"num_hidden_layers": 4, "tie_word_embeddings": True, "initializer_range": 0.2}
    Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32)).save_pretrained(folder / "model")
    return folder


def fresh(root: Path, mesh: Mesh, layout: dict | None = None, dtype: str = "float32") -> tuple[Policy, object]:
    built = config(root, layout or {}, dtype)
    return build_policy(built, mesh), built.algorithm


def tensors(policy: Policy) -> Weights:
    return {p.piece.name: p.tensor.clone() for p in local_pieces(policy)}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: Weights, b: Weights, tolerance: float = 1e-5) -> bool:
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() < tolerance for name in a)


def saved(root: Path, mesh: Mesh, folder: Path, *steps: int) -> Policy:
    """A policy that trained a step before each of its saves."""
    policy, algorithm = fresh(root, mesh)
    with writer(policy, folder, root) as saver:
        for step in steps:
            train_step(policy, algorithm)
            saver.save(step)
    return policy


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def draws() -> list:
    return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(3).tolist()]


# ---- the same layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_on_the_same_layout_it_is_exact_to_the_bit(dtype, distributed, root, mesh, tmp_path):
    layout = {"use_distributed_optimizer": distributed}
    straight, algorithm = fresh(root, mesh, layout, dtype)
    train_step(straight, algorithm)
    draws()
    with writer(straight, tmp_path, root) as saver:
        saver.save(1)
    expected = [train_step(straight, algorithm), train_step(straight, algorithm), draws()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    resumed, _ = fresh(root, mesh, layout, dtype)
    state = checkpoint.resume(resumed, tmp_path)
    assert (state.step, resumed.version, resumed.scheduler.num_steps, optimizer_steps(resumed)) == (1, 1, 1, 1)
    assert checkpoint.layout_change(state) == ""
    assert [train_step(resumed, algorithm), train_step(resumed, algorithm), draws()] == expected
    assert same(tensors(straight), tensors(resumed)) and same(exported(straight), exported(resumed))
    kinds = {name.split("/")[0] for name in tensors(resumed)}
    assert kinds == {"model", "exp_avg", "exp_avg_sq"} | ({"main"} if dtype == "bfloat16" else set())
    assert straight.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]


def test_before_the_first_update_it_is_exact_too(root, mesh, tmp_path):
    saved(root, mesh, tmp_path)
    (a, algorithm), (b, _) = fresh(root, mesh), fresh(root, mesh)
    with writer(a, tmp_path, root) as saver:
        saver.save(1)
    train_step(b, algorithm)
    checkpoint.resume(b, tmp_path)
    assert [train_step(a, algorithm), train_step(a, algorithm)] == [train_step(b, algorithm), train_step(b, algorithm)]
    assert same(tensors(a), tensors(b))


def test_only_safetensors_json_and_text_and_the_export_loads(root, mesh, tmp_path):
    policy = saved(root, mesh, tmp_path, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".txt"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "iter_0000001" / "hf")
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in exported(policy).items())
    staged = hf_export.stage(policy, small_files(str(root / "model")), max_shard_bytes=100_000)
    assert len(staged.own) > 2
    hf_export.write(staged, tmp_path / "sharded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert same({n: p.data for n, p in model.named_parameters()}, {n: p.data for n, p in weights.items()})


# ---- other layouts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(root: Path, mesh: Mesh) -> dict:
    """A world of one: a checkpoint after one step, and what the next step makes of it."""
    policy, algorithm = fresh(root, mesh)
    train_step(policy, algorithm)
    with writer(policy, root / "one", root) as saver:
        saver.save(1)
    before = exported(policy)
    loss = train_step(policy, algorithm)
    lr = policy.optimizer.param_groups[0]["lr"]
    return {"before": before, "loss": loss, "after": exported(policy), "tensors": tensors(policy), "lr": lr}


@pytest.fixture(scope="module")
def visited(root: Path, one: dict) -> Path:
    """Two ranks have been through all LAYOUTS, from the checkpoint of the world of one."""
    run_ranks(2, Path(checkpoint_policy.__file__), "visit", root)
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_world_of_one_goes_on_as_any_world_of_two(name, one, visited):
    assert same(load_file(visited / f"{name}.before.safetensors"), one["before"])
    found = json.loads((visited / f"{name}.json").read_text())
    assert found["loss"] == pytest.approx(one["loss"], abs=1e-6) and found["lr"] == one["lr"]
    assert close(load_file(visited / f"{name}.after.safetensors"), one["after"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_world_of_two_goes_on_as_a_world_of_one(name, one, visited, root, mesh):
    policy, algorithm = fresh(root, mesh)
    state = checkpoint.resume(policy, visited / name)
    assert state.step == 2 and "world_size 2 -> 1" in checkpoint.layout_change(state)
    assert same(exported(policy), load_file(visited / f"{name}.after.safetensors"))
    assert close(tensors(policy), one["tensors"])
    assert train_step(policy, algorithm) < one["loss"]


@pytest.mark.parametrize(("source", "name"), list(zip(LAYOUTS, list(LAYOUTS)[1:], strict=False)))
def test_a_world_of_two_goes_on_as_another(source, name, visited):
    found = load_file(visited / f"{name}.handed_on.safetensors")
    assert same(found, load_file(visited / f"{source}.after.safetensors"))


# ---- in the background --------------------------------------------------------------------------------------------


def test_training_goes_on_while_the_state_of_the_save_is_written(root, mesh, tmp_path, monkeypatch):
    # The state is in host memory already, as under CPU offload, where `.cpu()` copies nothing.
    policy, algorithm = fresh(root, mesh)
    go, save_file = threading.Event(), shards.save_file
    monkeypatch.setattr(shards, "save_file", lambda *a, **k: go.wait(60) and save_file(*a, **k))
    states = []
    with writer(policy, tmp_path, root, background=True) as saver:
        train_step(policy, algorithm)
        states.append(tensors(policy))
        saver.save(1)
        train_step(policy, algorithm)
        saver.poll()
        assert checkpoint_files.published(tmp_path) == [] and not same(tensors(policy), states[0])
        states.append(tensors(policy))
        go.set()
        saver.save(2)
        train_step(policy, algorithm)
    assert names(tmp_path) == ["iter_0000001", "iter_0000002"]
    for expected in reversed(states):
        found, _ = fresh(root, mesh)
        newest = checkpoint.resume(found, tmp_path)
        assert same(tensors(found), expected)
        checkpoint._delete(tmp_path / f"iter_{newest.step:07d}")


def test_a_save_in_flight_is_published_at_exit_and_a_late_failure_is_raised(root, mesh, tmp_path, monkeypatch, caplog):
    policy, _ = fresh(root, mesh)
    with pytest.raises(ZeroDivisionError), writer(policy, tmp_path, root, background=True) as saver:
        saver.save(1)
        raise ZeroDivisionError
    assert names(tmp_path) == ["iter_0000001"]
    monkeypatch.setattr(shards, "save_file", lambda *a, **k: 1 / 0)
    with writer(policy, tmp_path, root, background=True) as saver:
        saver.save(2)
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            saver.poll(wait=True)
        saver.save(3)
    assert "checkpoint not written" in caplog.text and names(tmp_path) == ["iter_0000001"]


# ---- what is kept -------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept():
    metrics = [0.5, None, 0.9, 0.9, 0.1, None]
    states = [(Path(str(i)), TrainingState(i, i, i, i, {}, metric)) for i, metric in enumerate(metrics)]
    kept = {(last, best): [0, 1, 2, 3, 4, 5] for last in (1, 2) for best in (0, 1, 2, 9)}
    for (last, best), all_of_them in kept.items():
        gone = {int(path.name) for path in superfluous(states, last, best)}
        kept[last, best] = [i for i in all_of_them if i not in gone]
    assert kept[1, 0] == [5] and kept[2, 0] == [4, 5]
    assert kept[1, 1] == [3, 5] and kept[2, 2] == [2, 3, 4, 5] and kept[1, 9] == [0, 2, 3, 4, 5]


def test_superfluous_checkpoints_are_deleted_and_the_tracker_names_the_newest(root, mesh, tmp_path):
    policy, _ = fresh(root, mesh)
    with writer(policy, tmp_path, root, keep_last=1, keep_best=1) as saver:
        for step, metric in ((1, 0.3), (2, 0.8), (3, 0.5), (4, None)):
            saver.save(step, metric)
            assert (tmp_path / checkpoint.TRACKER).read_text() == f"{step}\n"
    assert names(tmp_path) == ["iter_0000002", "iter_0000004"]


# ---- faults -------------------------------------------------------------------------------------------------------


def test_a_write_that_stops_half_way_leaves_the_checkpoint_before_it(root, mesh, tmp_path):
    policy = saved(root, mesh, tmp_path, 1)
    expected, limits = tensors(policy), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with writer(policy, tmp_path, root) as saver, pytest.raises(CheckpointError, match="File too large"):
            saver.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["iter_0000001"] and (tmp_path / checkpoint.TRACKER).read_text() == "1\n"
    assert checkpoint.resume(policy, tmp_path).step == 1 and same(tensors(policy), expected)


def test_nothing_names_a_checkpoint_before_it_is_there_nor_while_it_is_deleted(root, mesh, tmp_path, monkeypatch):
    policy = saved(root, mesh, tmp_path, 1)
    rename = Path.rename

    def fail_to_publish(path: Path, target: Path) -> Path:
        if path.name.startswith(".writing"):
            raise PermissionError(f"no {path.name} today")
        return rename(path, target)

    with monkeypatch.context() as patch, writer(policy, tmp_path, root) as saver:
        patch.setattr(Path, "rename", fail_to_publish)
        with pytest.raises(CheckpointError, match="no .writing_iter_0000002 today"):
            saver.save(2)
    assert names(tmp_path) == ["iter_0000001"] and (tmp_path / checkpoint.TRACKER).read_text() == "1\n"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)  # killed at its first file
        checkpoint._delete(tmp_path / "iter_0000001")
    assert checkpoint_files.published(tmp_path) == []
    with writer(policy, tmp_path, root):
        assert names(tmp_path) == []


def test_a_full_disk_leaves_the_checkpoint_before_it(root, mesh, tmp_path):
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        policy = saved(root, mesh, tmp_path / "disk", 1)
        with writer(policy, tmp_path / "disk", root) as saver, pytest.raises(CheckpointError, match="No space left"):
            saver.save(2)
        assert names(tmp_path / "disk") == ["iter_0000001"]
        assert checkpoint.resume(policy, tmp_path / "disk").step == 1
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_folder_that_cannot_be_written(root, mesh, tmp_path):
    policy, _ = fresh(root, mesh)
    (tmp_path / "file").write_text("")
    with writer(policy, tmp_path / "file", root) as saver:
        with pytest.raises(
            CheckpointError, match="not written to .*file: NotADirectoryError.*Free space or permissions"
        ):
            saver.save(1)


DAMAGES = {
    "rank_00000.safetensors has": lambda p: os.truncate(p / "rank_00000.safetensors", 1000),
    "rank_00000.safetensors is missing": lambda p: (p / "rank_00000.safetensors").unlink(),
    "index.json is not JSON": lambda p: os.truncate(p / "index.json", 1000),
    "index.json is of format None": lambda p: (p / "index.json").write_text("{}"),
    "state.json has 11 bytes instead of": lambda p: (p / "state.json").write_text('{"step": 3}'),
    "rank_00000.safetensors has the checksum": lambda p: scramble(p / "rank_00000.safetensors"),
}


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(message, root, mesh, tmp_path, caplog):
    policy = saved(root, mesh, tmp_path, 1, 2)
    before = load_file(tmp_path / "iter_0000001" / "hf" / "model.safetensors")
    DAMAGES[message](tmp_path / "iter_0000002")
    assert checkpoint.resume(policy, tmp_path).step == 1 and same(exported(policy), before)
    (line,) = caplog.messages
    assert "iter_0000002 cannot be used" in line and message in line and "trying the one before it" in line
    DAMAGES[message](tmp_path / "iter_0000001")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints .* run.if_exists=restart"):
        checkpoint.resume(policy, tmp_path)
    if "has the checksum" not in message:  # sizes alone do not show it
        assert checkpoint_files.steps_saved(tmp_path) == 0


def test_a_damaged_checkpoint_does_not_crowd_out_the_one_written_after_it(root, mesh, tmp_path):
    policy = saved(root, mesh, tmp_path, 1, 5)
    os.truncate(tmp_path / "iter_0000005" / "rank_00000.safetensors", 1000)
    assert checkpoint.resume(policy, tmp_path).step == 1
    with writer(policy, tmp_path, root, keep_last=1) as saver:
        saver.save(3)
    assert names(tmp_path) == ["iter_0000003", "iter_0000005"]
    assert checkpoint.resume(policy, tmp_path).step == 3


def test_another_models_checkpoint_is_refused(root, mesh, tmp_path, caplog):
    saved(root, mesh, tmp_path, 1)
    other = saved_model("qwen2", False, tmp_path / "other" / "model")
    assert other is not None
    policy, _ = fresh(tmp_path / "other", mesh)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoint.resume(policy, tmp_path)
    assert "layer_norm_weight has shape [4, 64] there and [2, 64] here" in caplog.text
    half_precision, _ = fresh(root, mesh, dtype="bfloat16")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoint.resume(half_precision, tmp_path)
    assert "there is no tensor main/" in caplog.text


def test_kill_9_in_the_middle_of_a_save(root, mesh):
    with start_ranks(1, Path(checkpoint_policy.__file__), "half", root) as process:
        process.await_stdout("half written\n")
        process.send(signal.SIGKILL)
        assert process.wait() == [-signal.SIGKILL]
    folder = root / "half"
    assert names(folder) == [".writing_iter_0000002", "iter_0000001"]
    policy, _ = fresh(root, mesh)
    before = exported(policy)
    with writer(policy, folder, root) as saver:
        assert names(folder) == ["iter_0000001"]
        assert checkpoint.resume(policy, folder).step == 1 and same(exported(policy), before)
        saver.save(2)
    assert names(folder) == ["iter_0000001", "iter_0000002"]
