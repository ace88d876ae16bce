"""Damage anywhere in a checkpoint is found before anything is loaded, and every crash leaves the old or the new."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_policy import config, train_step, writer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import Qwen3ForCausalLM

from lens_megatron.policy import checkpoint, checkpoint_files, hf_export
from lens_megatron.policy.checked_files import DamageError, FileRecord, check_content, save_file, write_file
from lens_megatron.policy.checkpoint_files import CheckpointError, Index, published, steps_saved, superfluous, whole
from lens_megatron.policy.model import Policy, build_policy
from lens_megatron.policy.parallel import Mesh
from lens_megatron.policy.sharded_state import local_pieces
from lens_megatron.tools import doctor

RANK, INDEX, STATE = "rank_00000.safetensors", "index.json", "state.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def policy(root: Path, mesh: Mesh) -> Policy:
    return build_policy(config(root, {}), mesh)


@pytest.fixture(scope="module")
def two(root: Path, policy: Policy) -> tuple[Path, dict[int, Tensors]]:
    """Checkpoints of the steps 1 and 2, and what they hold."""
    expected = {}
    with writer(policy, root / "two", root) as saver:
        for step in (1, 2):
            train_step(policy, config(root, {}).algorithm)
            saver.save(step)
            expected[step] = tensors(policy)
    return root / "two", expected


@pytest.fixture
def damaged(two: tuple[Path, dict[int, Tensors]], tmp_path: Path) -> Path:
    """A copy of the two, to be damaged."""
    return shutil.copytree(two[0], tmp_path / "checkpoints")


def tensors(policy: Policy) -> Tensors:
    return {p.piece.name: p.tensor.clone() for p in local_pieces(policy)}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def newest(folder: Path) -> Path:
    return folder / "iter_0000002"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def edit(file: str, change: Callable[[dict], object], *, sealed: bool = True) -> Callable[[Path], None]:
    """Changes the contents of a JSON file; with `sealed` every checksum is made to agree, as no accident would."""

    def apply(path: Path) -> None:
        tree = json.loads((path / file).read_text())
        change(tree["index"] if file == INDEX else tree)
        content = json.dumps(tree).encode()
        (path / file).write_bytes(content)
        if sealed:
            seal(path, {} if file == INDEX else {file: FileRecord(len(content), checkpoint_files.checksum(content))})

    return apply


def seal(path: Path, changed: dict[str, FileRecord]) -> None:
    tree = json.loads((path / INDEX).read_text())
    tree["index"]["files"] |= {n: {"size": r.size, "checksum": r.checksum} for n, r in changed.items()}
    tree["checksum"] = checkpoint_files.checksum(checkpoint_files._json(tree["index"]))
    (path / INDEX).write_text(json.dumps(tree))


# ---- files with checksums -----------------------------------------------------------------------------------------


def test_a_file_is_what_safetensors_would_have_written(tmp_path: Path):
    chance = torch.Generator().manual_seed(0)
    given_tensors = {
        f"t{number}": torch.randint(0, 2, shape, generator=chance).to(dtype)
        for number, (dtype, shape) in enumerate(
            (dtype, shape)
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                          torch.int16, torch.int8, torch.uint8, torch.bool)
            for shape in ((), (0,), (3,), (2, 5), (1, 7, 1))
        )
    }  # fmt: skip
    given_tensors |= {"cut": torch.arange(24.0).view(4, 6)[:, 1:3], "one": torch.arange(6.0)[::6], "é\n": torch.ones(1)}
    record = save_file(given_tensors, tmp_path / "x", metadata={"format": "pt"})
    assert record.size == (tmp_path / "x").stat().st_size
    check_content(tmp_path / "x", record)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(given_tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in given_tensors.items())
    length = struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])[0]
    header = json.loads((tmp_path / "x").read_bytes()[8 : 8 + length])
    assert length % 8 == 0 and all(
        (8 + length + header[name]["data_offsets"][0]) % given_tensors[name].element_size() == 0
        for name in given_tensors
    )
    flip(tmp_path / "x", 8 * record.size - 1)
    with pytest.raises(DamageError, match=f"x has the checksum [0-9a-f]{{32}} instead of {record.checksum}"):
        check_content(tmp_path / "x", record)


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path):
    record = write_file(tmp_path / "x", b"abc")
    for change, message in (
        (lambda path: path.write_bytes(b"abcd"), "x has 4 bytes instead of 3"),
        (lambda path: path.unlink(), "x is missing"),
        (lambda path: path.mkdir(), "x is no file"),
        (lambda path: (path.rmdir(), path.symlink_to(path)), "x cannot be read"),
    ):
        change(tmp_path / "x")
        with pytest.raises(DamageError, match=message):
            check_content(tmp_path / "x", record)


# ---- damage -------------------------------------------------------------------------------------------------------

PIECE = {"file": RANK, "piece": {"key": "k", "global_shape": [4], "offset": [0], "shape": [4], "start": 0, "stop": 9}}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a weight": (lambda p: flip(p / RANK, 8 * (p / RANK).stat().st_size - 5), f"{RANK} has the checksum "),
    "a bit of a header": (lambda p: flip(p / RANK, 8 * 40), f"{RANK} has the checksum "),
    "a bit of the state": (lambda p: flip(p / STATE, 8 * 12), f"{STATE} has the checksum "),
    "a bit of an offset": (
        edit(INDEX, lambda i: i["pieces"][0]["piece"].update(start=1), sealed=False), f"{INDEX} has the checksum "
    ),
    "state of another step": (edit(STATE, lambda s: s.update(step=99)), "state.json is of step 99, the folder is "),
    "state of words": (edit(STATE, lambda s: s.update(step="2")), "state.json is not as it was written: step"),
    "state of fractions": (edit(STATE, lambda s: s.update(step=2.0)), "state.json is not as it was written: step"),
    "state of truth": (edit(STATE, lambda s: s.update(version=True)), "state.json is not as it was written: version"),
    "state below zero": (edit(STATE, lambda s: s.update(step=-2)), "state.json is not as it was written: step"),
    "state without layout": (edit(STATE, lambda s: s.pop("layout")), "state.json is not as it was written: layout"),
    "a selection of words": (
        edit(STATE, lambda s: s.update(selection="x")), "state.json is not as it was written: selection"
    ),
    "state gone": (lambda p: (p / STATE).unlink(), "state.json is missing"),
    "index gone": (lambda p: (p / INDEX).unlink(), "index.json is missing"),
    "index a list": (lambda p: (p / INDEX).write_text("[]"), "index.json holds a list instead of an object"),
    "index a number": (lambda p: (p / INDEX).write_text("3"), "index.json holds a int instead of an object"),
    "index empty": (lambda p: (p / INDEX).write_text(""), "index.json is not JSON: JSONDecodeError"),
    "index of bytes": (lambda p: (p / INDEX).write_bytes(b"\xff" * 99), "index.json is not JSON: UnicodeDecodeError"),
    "index that is deep": (lambda p: (p / INDEX).write_text("[" * 10**5), "index.json is not JSON: RecursionError"),
    "index a folder": (lambda p: ((p / INDEX).unlink(), (p / INDEX).mkdir()), "index.json cannot be read"),
    "index without keys": (lambda p: (p / INDEX).write_text("{}"), "index.json is of format None"),
    "index from the future": (
        lambda p: (p / INDEX).write_text('{"format": 3, "checksum": "", "index": {}}'), "index.json is of format 3"
    ),
    "negative size": (
        edit(INDEX, lambda i: i["files"][RANK].update(size=-1)), f"index.json is not as it was written: files.{RANK}."
    ),
    "a file elsewhere": (
        edit(INDEX, lambda i: i["files"].update({"../../x.safetensors": {"size": 1, "checksum": None}})),
        "index.json is not as it was written: files.../../x.safetensors",
    ),
    "a piece of no file": (
        edit(INDEX, lambda i: i["pieces"].append(PIECE | {"file": "rank_00009.safetensors"})),
        "index.json names rank_00009.safetensors, of which it has no size",
    ),
    "a piece beyond its box": (
        edit(INDEX, lambda i: i["pieces"].append(PIECE)), "index.json: k: elements 0 to 9 of a box of 4"
    ),
    "weights gone": (lambda p: (p / RANK).unlink(), f"{RANK} is missing"),
    "weights truncated": (lambda p: os.truncate(p / RANK, 999), f"{RANK} has 999 bytes instead of "),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_a_line_and_the_one_before_is_used(name: str, damaged: Path, two, policy: Policy, capsys, caplog):
    change, message = DAMAGES[name]
    change(newest(damaged))
    assert checkpoint.resume(policy, damaged).step == 1 and same(tensors(policy), two[1][1])
    (said,) = caplog.messages
    assert f"{newest(damaged)} cannot be used: {message}" in said
    if "has the checksum" not in message or RANK not in message:  # the quick look does not read the weights
        assert steps_saved(damaged) == 1
        assert [c.state.step for c in whole(damaged)] == [1]
    assert doctor.main(["--checkpoint", str(damaged)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("ok          iter_0000001") and f"fail        iter_0000002        damaged: {message}" in out


def test_with_none_left_the_remedy_is_named_and_nothing_is_to_be_deleted(damaged: Path, policy: Policy):
    for path in published(damaged):
        flip(path / RANK, 9999)
    with pytest.raises(
        CheckpointError, match="none of the 2 checkpoints .* restore one from a copy, .* aside"
    ) as error:
        checkpoint.resume(policy, damaged)
    assert "delete" not in str(error.value)


def test_the_generators_are_as_they_were_if_the_checkpoint_is_not_used(damaged: Path, policy: Policy, two):
    flip(newest(damaged) / RANK, 9999)
    before = tensors(policy)
    for path in published(damaged):
        flip(path / STATE, 100)
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError):
        checkpoint.resume(policy, damaged)
    assert torch.equal(torch.get_rng_state(), state) and same(tensors(policy), before)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_damage_never_loads_wrong_numbers(data: st.DataObject, two, policy: Policy, tmp_path: Path):
    source, expected = two
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    for _ in range(data.draw(st.integers(1, 3), "damages")):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "hf" not in path.parts)
        path = data.draw(st.sampled_from(files), "file")
        kind = data.draw(st.sampled_from(["flip", "cut", "delete", "garbage", "digit", "swap"]), "kind")
        size = path.stat().st_size
        if kind == "flip" and size:
            flip(path, data.draw(st.integers(0, 8 * size - 1), "bit"))
        elif kind == "cut":
            os.truncate(path, data.draw(st.integers(0, size), "size"))
        elif kind == "delete":
            path.unlink()
        elif kind == "garbage":
            path.write_bytes(data.draw(st.binary(max_size=400), "garbage"))
        elif kind == "digit":
            digit = data.draw(st.sampled_from(b"0123456789"), "digit")
            path.write_bytes(path.read_bytes().replace(b"2", bytes([digit]), 1))
        elif kind == "swap" and path.parent != folder / "iter_0000001" and path.parent != folder:
            path.write_bytes((two[0] / "iter_0000001" / path.name).read_bytes())
    try:
        state = checkpoint.resume(policy, folder)
    except CheckpointError:
        return
    assert same(tensors(policy), expected[state.step])
    assert steps_saved(folder) >= state.step


def test_damage_of_the_export_is_found_by_the_doctor_and_stops_no_run(damaged: Path, policy: Policy, capsys):
    flip(newest(damaged) / "hf" / "model.safetensors", 9999)
    assert checkpoint.resume(policy, damaged).step == 2
    assert doctor.main(["--checkpoint", str(newest(damaged))]) == 1
    assert "whole but for its export: hf/model.safetensors has the checksum" in capsys.readouterr().out
    shutil.rmtree(newest(damaged) / "hf")
    assert checkpoint.resume(policy, damaged).step == 2


def test_a_checkpoint_without_checksums_is_loaded_with_a_warning(damaged: Path, policy: Policy, two, capsys, caplog):
    tree = json.loads((newest(damaged) / INDEX).read_text())["index"]
    old = {
        "files": {RANK: tree["files"][RANK]["size"]},
        "pieces": [{"file": stored["file"], **stored["piece"]} for stored in tree["pieces"]],
    }
    (newest(damaged) / INDEX).write_text(json.dumps(old))
    assert checkpoint.resume(policy, damaged).step == 2 and same(tensors(policy), two[1][2])
    assert "iter_0000002 has no checksums, only sizes" in caplog.text
    assert doctor.main(["--checkpoint", str(damaged)]) == 0
    assert "warn        iter_0000002" in capsys.readouterr().out
    (newest(damaged) / INDEX).write_text(json.dumps(old | {"files": [RANK]}))
    assert checkpoint.resume(policy, damaged).step == 1


def test_the_doctor_takes_a_run_its_checkpoints_or_one_of_them(damaged: Path, capsys, monkeypatch):
    for place in (damaged.parent, damaged):
        assert doctor.main(["--checkpoint", str(place)]) == 0
        out = capsys.readouterr().out
        assert out.count(": whole\n") == 2 and "2 checks: 0 failed" in out
    monkeypatch.chdir(newest(damaged))
    assert doctor.main(["--checkpoint", "."]) == 0
    assert "2 steps, " in capsys.readouterr().out
    (damaged.parent / "none").mkdir()
    for place in (damaged.parent / "none", damaged.parent / "nothing", newest(damaged) / STATE):
        assert doctor.main(["--checkpoint", str(place)]) == 2
        assert f"{place}" in capsys.readouterr().err
    for arguments in ([], ["c.yaml", "--checkpoint", str(damaged)]):
        with pytest.raises(SystemExit) as end:
            doctor.main(arguments)
        assert end.value.code == 2


# ---- writing ------------------------------------------------------------------------------------------------------


def test_the_model_may_go_while_training(root: Path, policy: Policy, tmp_path: Path):
    shutil.copytree(root / "model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    with writer(policy, tmp_path / "checkpoints", tmp_path) as saver:
        shutil.rmtree(tmp_path / "model")
        saver.save(1)
    exported = tmp_path / "checkpoints" / "iter_0000001" / "hf"
    assert {path.name for path in exported.iterdir()} >= {"config.json", "tokenizer_config.json", "model.safetensors"}
    Qwen3ForCausalLM.from_pretrained(exported)
    with pytest.raises(CheckpointError, match="nothing could be saved to .*: FileNotFoundError: .*model"):
        writer(policy, tmp_path / "checkpoints", tmp_path)


class Killed(BaseException):
    """Stands for SIGKILL: nothing that handles exceptions handles it."""


STOPS = ["index", "aside", "publish", "tracker"]


@pytest.mark.parametrize("stop", STOPS)
def test_a_step_saved_twice_leaves_the_old_or_the_new(stop: str, damaged, root, policy: Policy, two, monkeypatch):
    """Killed at each stage of the second save, then started again."""
    checkpoint.resume(policy, damaged)
    names = {"aside": "iter_0000002", "publish": ".writing_iter_0000002"}
    rename = Path.rename

    def killed_before(path: Path, target: Path) -> Path:
        if path.name == names.get(stop):
            raise Killed
        return rename(path, target)

    def killed(*arguments: object, **options: object) -> None:
        raise Killed

    staged = writer(policy, damaged, root)._stage(2, metric=0.5)
    temporary = damaged / ".writing_iter_0000002"
    checkpoint._write_rank(temporary, 0, staged)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_before)
        if stop == "index":
            patch.setattr(checkpoint_files, "write_index", killed)
        if stop == "tracker":
            patch.setattr(checkpoint, "write_atomically", killed)
        saver = object.__new__(checkpoint.CheckpointWriter)
        saver.folder, saver.keep_last, saver.keep_best, saver.before_publishing = damaged, 9, 0, None
        with pytest.raises(Killed):
            saver._publish(temporary, staged.state)
    writer(policy, damaged, root)
    assert [path.name for path in published(damaged)] == ["iter_0000001", "iter_0000002"]
    assert not [path for path in damaged.iterdir() if path.name.startswith(".")]
    state = checkpoint.resume(policy, damaged)
    assert (state.step, state.metric) == (2, 0.5 if stop == "tracker" else None)
    assert same(tensors(policy), two[1][2])


def test_a_step_saved_twice_is_the_new_one(damaged: Path, root: Path, policy: Policy):
    flip(newest(damaged) / RANK, 9999)
    checkpoint.resume(policy, damaged)
    with writer(policy, damaged, root) as saver:
        saver.save(2, metric=0.25)
    assert sorted(p.name for p in damaged.iterdir()) == ["iter_0000001", "iter_0000002", checkpoint.TRACKER]
    assert checkpoint.resume(policy, damaged).metric == 0.25


def test_links_are_followed_and_what_is_behind_them_stays(damaged: Path, root: Path, policy: Policy, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    newest(damaged).rename(elsewhere)
    newest(damaged).symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(damaged)
    assert checkpoint.resume(policy, tmp_path / "link").step == 2
    with writer(policy, tmp_path / "link", root, keep_last=1) as saver:
        saver.save(2)
        assert (newest(damaged) / INDEX).is_file() and not newest(damaged).is_symlink()
        newest(damaged).rename(tmp_path / "other")
        newest(damaged).symlink_to(tmp_path / "other")
        saver.save(3)
    assert [path.name for path in published(damaged)] == ["iter_0000003"]
    assert (elsewhere / RANK).is_file() and (tmp_path / "other" / RANK).is_file()
    assert not [path for path in damaged.iterdir() if path.name.startswith(".")]


def test_a_damaged_one_is_not_counted_among_those_kept(damaged: Path, root: Path, policy: Policy):
    os.truncate(newest(damaged) / RANK, 999)
    checkpoint.resume(policy, damaged)
    with writer(policy, damaged, root, keep_last=2) as saver:
        saver.save(3)
    assert [path.name for path in published(damaged)] == ["iter_0000001", "iter_0000002", "iter_0000003"]


def test_names_that_are_no_checkpoints(tmp_path: Path):
    for name in ("iter_0000002.bak", "iter_2", "iter_0000003 (copy)", "iter_0000010", "iter_0000009", "iter_12345678"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000001").write_text("")
    assert [p.name for p in published(tmp_path)] == ["iter_0000009", "iter_0000010", "iter_12345678"]
    assert steps_saved(tmp_path) == 0 and whole(tmp_path) == [] and superfluous([], 1, 1) == []


def test_a_folder_that_cannot_be_listed_does_not_start_the_run_over(tmp_path: Path, policy: Policy):
    assert published(tmp_path / "none") == [] and checkpoint.resume(policy, tmp_path / "none") is None
    (tmp_path / "file").write_text("")
    for look in (published, steps_saved, lambda folder: checkpoint.resume(policy, folder)):
        with pytest.raises(CheckpointError, match="checkpoints in .*file cannot be listed: .*another run.directory"):
            look(tmp_path / "file")


def test_an_export_is_not_needed(root: Path, policy: Policy, tmp_path: Path):
    staged = writer(policy, tmp_path, root)._stage(1, None)
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    files = {RANK: checkpoint.shards.write_file(folder / RANK, staged.pieces, staged.generators)}
    checkpoint_files.write_receipt(folder, 0, checkpoint_files.WrittenFiles(files, {}))
    checkpoint_files.write_index(folder, staged.state)
    assert isinstance(checkpoint_files.read_index(folder), Index)
    assert checkpoint.resume(policy, tmp_path).step == 1
    assert doctor.main(["--checkpoint", str(tmp_path)]) == 0
    assert hf_export.write(staged.export, tmp_path / "hf").keys() >= {"config.json", "model.safetensors"}
