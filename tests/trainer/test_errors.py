"""A user's mistakes: one message with the remedy, status 2, nothing written, nothing lost."""

from pathlib import Path

import pytest
import yaml
from toy_runs import Toy

from lens_megatron import train
from lens_megatron.config import from_tree
from lens_megatron.output import run_folder


def run(tree: dict, tmp_path: Path, capsys: pytest.CaptureFixture, *overrides: str) -> str:
    """The message of a run that must fail before it writes anything."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    before = snapshot(tmp_path)
    assert train.main(["--config", str(path), *overrides]) == 2
    assert snapshot(tmp_path) == before
    return capsys.readouterr().out


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lens.tua=0.5", "error: unknown option lens.tua; did you mean lens.tau?"),
        ("tau=0.5", "error: unknown option tau; did you mean lens.tau?"),
        ("lens.tau=1.5", "error: lens.tau: 1.5: Input should be less than or equal to 1"),
        ("lens.deletion_ratio=0", "error: lens.deletion_ratio: 0: Input should be greater than 0"),
        ("algorithm.clip_low=-0.1", "error: algorithm.clip_low: -0.1: Input should be greater than or equal to 0"),
        (
            "rollout.prompts_per_step=0",
            "error: rollout.prompts_per_step: 0: Input should be greater than or equal to 1",
        ),
        ("rollout.prompts_per_step=5000", "data.train has 24 usable prompts, rollout.prompts_per_step asks for 5000"),
        ("train.metric_for_best_model=acc", "error: train.metric_for_best_model: no metric 'acc'; data.eval gives "),
        ("train.updates_per_batch=3", "rollout.prompts_per_step (4) is not divisible by train.updates_per_batch (3)"),
        (
            "megatron.tensor_model_parallel_size=2",
            "world size 1 is not divisible by megatron.tensor_model_parallel_size",
        ),
        ("reward.grader=math_verfy", "unknown grader 'math_verfy'; did you mean math_verify?"),
        ("reward.grader=graders:no_such", "cannot be loaded: AttributeError"),
        (
            "reward.weights=[1.0, 2.0]",
            "reward.weights has 2 numbers for 1 graders (reward.grader=graders:compute_score)",
        ),
        ("reward.rules={flip: {}}", "reward.rules: unknown method 'flip'; did you mean flips?"),
        ("reward.rules={flips: {rate: 2}}", "reward.rules.flips.rate: 2: Input should be less than or equal to 1"),
        (
            "reward.rules={overlong: {cache: 7}}",
            "reward.rules.overlong.cache (7) exceeds rollout.max_response_length (6)",
        ),
        ("reward.rules={rpr: {mode: warmup}}", "reward.rules.rpr.mode=warmup with warmup_steps=0: mode=warmup needs"),
        ("data.max_prompt_length=3", "data.max_prompt_length"),
        ("rollout.max_response_length=1000", "exceeds the model's max_position_embeddings (256); lower one of them"),
        (
            "model.path=/nowhere",
            "error: model.path /nowhere: no config.json there; give a Hugging Face model directory",
        ),
        ("debug.load_rollouts=/nowhere", "cannot be read (No such file or directory); the folder holds 0 steps"),
        ("data.train=/nowhere.jsonl", "/nowhere.jsonl"),
        (
            "lens.purifier=oracle",
            "error: lens.purifier=oracle deletes what the data marks as noise, and data.noise_key is empty",
        ),
        (
            "lens",
            "error: no configuration file at lens; give a .yaml file, or an override: expected section.option",
        ),
    ],
)
def test_bad_options(override: str, message: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert message in run(toy.tree(tmp_path / "run"), tmp_path, capsys, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"problem": "a", "answer": "1"}\n{"problem": "b"\n', "train.jsonl:2"),
        ('{"problem": "a", "answer": "1"}\n\n{"problem": "b"}\n', "train.jsonl:3"),
        ('{"problem": 7, "answer": "1"}\n', "train.jsonl:1"),
        ("", "train.jsonl"),
    ],
)
def test_bad_data(content: str, message: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "train.jsonl").write_text(content)
    tree = toy.tree(tmp_path / "run", data={"train": str(tmp_path / "train.jsonl")})
    assert message in run(tree, tmp_path, capsys)


def test_a_model_without_tokenizer(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((toy.model / name).read_bytes())
    tree = toy.tree(tmp_path / "run", model={"path": str(tmp_path / "model")})
    assert "no tokenizer there" in run(tree, tmp_path, capsys)


def test_a_folder_that_is_not_a_run(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    for choice in ("resume", "restart", "fail"):
        message = run(toy.tree(tmp_path / "run"), tmp_path, capsys, f"run.if_exists={choice}")
        assert "holds files that are not a run of lens_megatron" in message


def test_a_folder_of_another_run(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture):
    other = from_tree(toy.tree(tmp_path / "run", optimizer={"lr": 5e-4}, lens={"tau": 0.25}))
    run_folder.take(other, {}).lease.release()
    message = run(toy.tree(tmp_path / "run"), tmp_path, capsys)
    assert "belongs to a run with other options: lens.tau, optimizer.lr;" in message
    assert "holds a run already" in run(toy.tree(tmp_path / "run"), tmp_path, capsys, "run.if_exists=fail")
