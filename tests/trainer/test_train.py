"""The real program on a toy model: whole runs over gloo, compared with one another.

What is not covered: that training improves anything (the demo shows that), and more than four ranks.
"""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from toy_runs import (
    ROOT,
    Toy,
    checkpoint_tensors,
    command,
    environment,
    launch,
    rollout_rows,
    run_program,
    start_ranks,
    write_config,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from lens_megatron.output.metrics import read_metrics

MOVES = {
    "tp2_to_one": ({"tensor_model_parallel_size": 2}, 2, {}, 1),
    "pp2_to_tp2": ({"pipeline_model_parallel_size": 2}, 2, {"tensor_model_parallel_size": 2}, 2),
    "one_to_dp2": ({}, 1, {"use_distributed_optimizer": True}, 2),
    "dp2_to_tp2pp2": (
        {"use_distributed_optimizer": True},
        2,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        4,
    ),
}
LAYOUTS = {"tp2": (2, 1, 2), "pp2": (1, 2, 2), "dp2": (1, 1, 2), "tp2pp2": (2, 2, 4)}


@pytest.fixture(scope="module")
def straight(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Four steps on one rank, rollouts saved for the others to train on."""
    folder = tmp_path_factory.mktemp("straight")
    sections = {"debug": {"save_rollouts": str(folder / "replay")}, "train": {"steps": 4}}
    tree = toy.tree(folder / "run", data={"eval": [str(toy.eval)]}, **sections)
    return folder, launch(tree, folder, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_rollouts_train_alike_under_every_layout(toy: Toy, straight, layout: str, tmp_path: Path):
    folder, expected = straight
    tp, pp, ranks = LAYOUTS[layout]
    tree = toy.tree(
        tmp_path / "run",
        debug={"load_rollouts": str(folder / "replay")},
        megatron={"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
        train={"steps": 2},
    )
    rows = launch(tree, tmp_path, ranks)
    for row, reference in zip(rows[1:], expected[1:3], strict=True):
        assert row["actor/loss"] == pytest.approx(reference["actor/loss"], rel=1e-5, abs=1e-8)
        assert row["actor/grad_norm"] == pytest.approx(reference["actor/grad_norm"], rel=1e-4)
        for name in ("actor/entropy", "actor/kl_loss", "critic/rewards/mean", "lens/abs_log_ratio_rescued"):
            assert row[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-8), name


def test_two_ranks_purify_draw_and_merge_as_one_does(toy: Toy, straight, tmp_path: Path):
    """Seeds go by the place in the step, which is the same for any number of ranks."""
    launch(toy.tree(tmp_path / "run", train={"steps": 1}), tmp_path, 2)
    names = ("prompt_index", "purified_prompt", "completion", "origin", "gate", "reward", "weight")
    alone, shared = (
        sorted(tuple(str(row[name]) for name in names) for row in rollout_rows(folder, 1))
        for folder in (straight[0] / "run", tmp_path / "run")
    )
    assert alone == shared and any("purified" in row for row in alone)


@pytest.mark.slow
def test_each_of_two_updates_per_batch_has_the_same_samples_on_two_ranks(toy: Toy, straight, tmp_path: Path):
    """Samples move between ranks, but never from one update to the next; old log-probabilities are of all samples."""
    folder, rows = straight[0], []
    for ranks in (1, 2):
        tree = toy.tree(
            tmp_path / str(ranks) / "run",
            debug={"load_rollouts": str(folder / "replay")},
            train={"steps": 2, "updates_per_batch": 2, "max_tokens_per_micro_batch": 128},
        )
        rows.append(launch(tree, tmp_path / str(ranks), ranks)[1:])
    for alone, shared in zip(*rows, strict=True):
        for name in ("actor/loss", "actor/grad_norm", "actor/ppo_kl", "actor/kl_loss", "lens/abs_log_ratio_rescued"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-7), name
        assert alone["perf/imbalance"] == 1 <= shared["perf/imbalance"] < 1.2
        assert alone["perf/total_num_tokens"] == shared["perf/total_num_tokens"]


def test_ratio_is_one_on_native_rows_and_purification_happens(straight):
    folder, rows = straight
    for row in rows[1:]:
        assert row["actor/ratio_min"] == row["actor/ratio_max"] == 1.0
        assert abs(row["actor/ppo_kl"]) < 1e-6
    assert sum(row["lens/purified_prompts"] for row in rows[1:]) > 0
    assert sum(row["lens/rescued_prompts"] for row in rows[1:]) > 0
    assert max(row["lens/abs_log_ratio_rescued"] for row in rows[1:]) > 0
    assert rows[1]["actor/kl_loss"] == 0.0 and rows[3]["actor/kl_loss"] > 0


def test_rollout_files_say_what_happened(straight, toy: Toy):
    folder, _ = straight
    rows = [row for step in range(1, 5) for row in rollout_rows(folder / "run", step)]
    rescued = [row for row in rows if row["origin"] == "purified"]
    assert rescued and all(row["status"] == "correct" and "[-" in row["purified_prompt"] for row in rescued)
    for row in rescued:
        kept = "".join(part.split("-]")[-1] for part in row["purified_prompt"].split("[-"))
        whole = row["purified_prompt"].replace("[-", "").replace("-]", "")
        assert len(kept) < len(whole) == len(row["prompt"])
    by_prompt: dict[tuple[int, int], float] = {}
    for row in rows:
        key = (row["step"], row["prompt_index"])
        by_prompt[key] = by_prompt.get(key, 0.0) + row["weight"] * row["advantage"]
    assert all(abs(total) < 1e-5 for total in by_prompt.values())


def test_exported_policy_answers_in_transformers(straight):
    folder, _ = straight
    path = folder / "run" / "checkpoints" / "iter_0000004" / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    trained = checkpoint_tensors(folder / "run", 4, 1)
    assert torch.equal(model.model.norm.weight, trained["0/model/decoder.final_layernorm.weight[0]"]), (
        "the export is not the checkpoint's policy"
    )
    inputs = tokenizer("Tom has 3 nuts.", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_killed_and_resumed_equals_straight_bit_for_bit(toy: Toy, straight, tmp_path: Path):
    folder, rows = straight
    grading = {"grader": "graders:late_murderous_score", "timeout_s": 120}
    tree = toy.tree(tmp_path / "run", data={"eval": [str(toy.eval)]}, train={"steps": 4}, reward=grading)
    variables = {"MURDER": str(tmp_path)}
    (tmp_path / "armed").touch()
    run_program(tree, tmp_path, 1, status=-signal.SIGKILL, variables=variables)
    assert not (tmp_path / "armed").exists(), "nobody was killed"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*")] == ["iter_0000002"]
    run_program(tree, tmp_path, 1, variables=variables)
    resumed = read_metrics(tmp_path / "run")
    expected, found = checkpoint_tensors(folder / "run", 4, 1), checkpoint_tensors(tmp_path / "run", 4, 1)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert [row["step"] for row in resumed] == [0, 1, 2, 3, 4]
    for name in ("actor/loss", "training/weight_version", "actor/lr", "critic/rewards/mean"):
        assert [row[name] for row in resumed[1:]] == [row[name] for row in rows[1:]], name
    assert resumed[4]["val-core/eval/acc/mean@1"] == rows[4]["val-core/eval/acc/mean@1"]


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_under_another_layout(toy: Toy, straight, move: str, tmp_path: Path):
    folder, expected = straight
    first, ranks, second, more_ranks = MOVES[move]
    sections = {"debug": {"load_rollouts": str(folder / "replay")}}
    launch(toy.tree(tmp_path / "run", megatron=first, train={"steps": 2}, **sections), tmp_path, ranks)
    tree = toy.tree(tmp_path / "run", megatron=second, train={"steps": 4}, **sections)
    rows = launch(tree, tmp_path, more_ranks)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row, reference in zip(rows[1:], expected[1:], strict=True):
        assert row["actor/loss"] == pytest.approx(reference["actor/loss"], rel=1e-4, abs=1e-7)
        assert row["actor/lr"] == reference["actor/lr"]
    assert rows[3]["actor/grad_norm"] == pytest.approx(expected[3]["actor/grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_twenty_kills_lose_no_checkpoint_and_change_nothing(toy: Toy, tmp_path: Path):
    """kill -9 of a random rank at a random moment; then the same command again, which goes on from the last save."""
    steps, kills, chance = 300, 20, random.Random(0)
    train = {"steps": steps, "save_interval": 1, "save_total_limit": steps}
    launch(toy.tree(tmp_path / "straight", train=train), tmp_path / "a", 2)
    arguments, saved = command(toy.tree(tmp_path / "run", train=train), tmp_path / "b", 2), set()

    def look() -> set[str]:
        now = {path.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*")}
        assert saved <= now, f"lost {saved - now}"
        return now

    for _ in range(kills):
        saved = look()  # a save in flight may have been published after the kill
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(arguments, env=environment(), stdout=log, stderr=log)
        while look() == saved:
            assert process.poll() is None, (tmp_path / "log").read_text()[-5000:]
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.4))
        os.kill(chance.choice(ranks_of(process.pid)), signal.SIGKILL)
        assert process.wait(120) != 0
    launch(toy.tree(tmp_path / "run", train=train), tmp_path / "b", 2)
    expected, found = (checkpoint_tensors(tmp_path / name, steps, 2) for name in ("straight", "run"))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def ranks_of(launcher: int) -> list[int]:
    """Process ids of torchrun's workers, those of their own helpers left out."""
    found = []
    for worker in psutil.Process(launcher).children():
        with suppress(psutil.NoSuchProcess):  # a zombie counts as none
            if any("pretrain_lens.py" in argument for argument in worker.cmdline()):
                found.append(worker.pid)
    return found


def test_sigterm_finishes_the_step_saves_and_exits_0(toy: Toy, tmp_path: Path):
    config = write_config(toy.tree(tmp_path / "run", train={"steps": 500, "save_interval": 500}), tmp_path)
    with start_ranks(1, ROOT / "pretrain_lens.py", "--config", config) as process:
        process.await_stdout("iteration      2/")
        process.send(signal.SIGTERM)
        assert process.wait() == [0], process.stdout() + process.stderr()
        output = process.stdout()
    saved = list((tmp_path / "run" / "checkpoints").glob("iter_*"))
    assert len(saved) == 1 and "the same command goes on from here" in output


@pytest.mark.parametrize("ahead", [0, 1])
def test_training_ends_with_its_epochs_and_goes_on_with_more_of_them(toy: Toy, ahead: int, tmp_path: Path):
    """24 prompts, 8 per step: an epoch has three steps."""
    tree = toy.tree(
        tmp_path / "run",
        data={"eval": [str(toy.eval)]},
        rollout={"prompts_per_step": 8, "rollouts_per_prompt": 2, "off_policy_steps": ahead},
        algorithm={"correction": "token_truncate"},
        train={"steps": 100, "epochs": 1, "save_interval": 100},
    )
    found = []
    for epochs in (1, 1.5):
        rows = launch(tree, tmp_path, 1, f"train.epochs={epochs}")
        found.append(
            (
                [row["step"] for row in rows],
                [row["step"] for row in rows if "val-core/eval/acc/mean@1" in row],
                sorted(path.parent.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*/hf")),
            )
        )
        assert not list((tmp_path / "run" / "unfinished").iterdir()), "a step was begun that nobody trains on"
    assert found[0] == ([0, 1, 2, 3], [0, 3], ["iter_0000003"])
    assert found[1] == ([0, 1, 2, 3, 4, 5], [0, 3, 5], ["iter_0000003", "iter_0000005"]), "step 5 completes 1.5 epochs"
    assert rows[4]["training/epoch"] == pytest.approx(4 / 3)
    said = run_program(tree, tmp_path, 1, "train.epochs=1.5").stdout
    assert "has done its 1.5 epochs already, in 5 steps; raise train.epochs" in said
    assert len(read_metrics(tmp_path / "run")) == 6


def test_grpo_is_the_same_program_without_purification(toy: Toy, tmp_path: Path):
    tree = toy.tree(
        tmp_path / "run",
        lens={"enabled": False},
        algorithm={"advantage": "grpo", "kl_coef": 0.0},
        train={"updates_per_batch": 2},
    )
    rows = launch(tree, tmp_path, 1)
    assert rows[-1]["lens/purified_prompts"] == 0 and rows[-1]["actor/grad_norm"] > 0
    assert {row["weight"] for row in rollout_rows(tmp_path / "run", 1)} == {1.0}
    assert rows[-1]["training/weight_version"] == 4
