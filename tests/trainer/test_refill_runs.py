"""Whole runs whose selection rejects groups: under other layouts, killed, and with too few groups or none at all."""

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from records import group, rollout, sample
from toy_runs import Toy, checkpoint_tensors, command, environment, rollout_rows, run_program
from vllm_models import needs_vllm

from lens_megatron.batch.redistribute import Share
from lens_megatron.output.metrics import read_metrics, selection_metrics
from lens_megatron.phases import update
from lens_megatron.results import Outcome
from lens_megatron.types import TrainingGroup

COUNTS = ("selection/candidates", "selection/kept", "selection/rejected", "selection/pass_rate", "training/epoch")

TWO_UPDATES = {"steps": 2, "updates_per_batch": 2}


def picky(toy: Toy, folder: Path, wants: str, **sections: dict) -> dict:
    selection = {"method": f"refilling:{wants}", "candidate_batches": 4}
    return toy.tree(folder / "run", selection=selection, **sections)


def trained(folder: Path, step: int) -> list[tuple]:
    names = ("prompt_index", "purified_prompt", "completion", "origin", "gate", "reward", "weight")
    return sorted(tuple(str(row[name]) for name in names) for row in rollout_rows(folder / "run", step))


@pytest.fixture(scope="module")
def alone(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_program(picky(toy, folder, "HALF", train=TWO_UPDATES), folder, 1)
    return folder


LAYOUTS = {
    "dp2": (2, {}),
    "dp2_shared_queue": (2, {"rollout": {"share_work": True}}),
    "dp2_sequential": (2, {"rollout": {"schedule": "sequential", "max_running_sequences": 5}}),
    "tp2": (2, {"megatron": {"tensor_model_parallel_size": 2}}),
    "dp2tp2": (4, {"megatron": {"tensor_model_parallel_size": 2}}),
}


@pytest.mark.parametrize("layout", [*LAYOUTS][:-1] + [pytest.param("dp2tp2", marks=pytest.mark.slow)])
def test_several_ranks_keep_the_groups_that_one_keeps(toy: Toy, alone: Path, layout: str, tmp_path: Path):
    """In two updates of a step, each on the same groups. The second step shows that those of the first were equal."""
    ranks, sections = LAYOUTS[layout]
    run_program(picky(toy, tmp_path, "HALF", train=TWO_UPDATES, **sections), tmp_path, ranks)
    rows, expected = (read_metrics(folder / "run")[1:] for folder in (tmp_path, alone))
    for row, reference in zip(rows, expected, strict=True):
        assert trained(tmp_path, row["step"]) == trained(alone, row["step"])
        assert [row[name] for name in COUNTS] == [reference[name] for name in COUNTS]
        for name in ("actor/loss", "actor/grad_norm", "critic/rewards/mean", "critic/advantages/max"):
            assert row[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-7), name
        assert row["perf/generated_tokens"] - row["lens/discarded_tokens"] == (
            reference["perf/generated_tokens"] - reference["lens/discarded_tokens"]
        )
    assert all(row["selection/kept"] == 4 < row["selection/candidates"] for row in rows), "nothing was rejected"


def test_a_run_that_samples_ahead_takes_the_candidates_after_those_of_the_step_before(toy: Toy, tmp_path: Path):
    ahead = {"rollout": {"off_policy_steps": 1}, "algorithm": {"correction": "token_truncate"}, "train": {"steps": 3}}
    run_program(picky(toy, tmp_path, "ONE_IN_FOUR", **ahead), tmp_path, 2)
    rows = read_metrics(tmp_path / "run")[1:]
    assert [row["selection/candidates"] for row in rows] == [15, 15, 15]
    assert [row["training/epoch"] for row in rows] == pytest.approx([15 / 24, 30 / 24, 45 / 24])
    assert [row["training/rollout_staleness/max"] for row in rows] == [0, 1, 1]


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_engines_over_two_ranks_each_refill(roomy: Toy, ranks: int, tmp_path: Path):
    """One engine counts alone, two count together; the ranks of an engine train on different groups."""
    engine = {"rollout": {"engine": "vllm"}, "vllm": {"tensor_parallel_size": 2}, "train": {"steps": 1}}
    words = command(picky(roomy, tmp_path, "ONE_IN_FOUR", **engine), tmp_path, ranks)
    result = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    row = read_metrics(tmp_path / "run")[1]
    assert (row["selection/candidates"], row["selection/kept"]) == (15, 4)
    assert row["training/rollout_probs_diff_max"] < 1e-4 and row["actor/grad_norm"] > 0
    assert len({line["prompt_index"] for line in rollout_rows(tmp_path / "run", 1)}) == 4


def test_killed_in_the_middle_of_a_refill_and_resumed_equals_straight(toy: Toy, tmp_path: Path):
    sections = {
        "reward": {"grader": "refilling:murderous_score", "timeout_s": 120},
        "rollout": {"max_running_sequences": 4},
        "train": {"steps": 3, "save_interval": 1},
    }
    run = {"seed": 6}  # step 2 then samples seven candidates
    for name in ("straight", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        tree, variables = picky(toy, folder, "HALF", **sections), {"MURDER": str(folder)}
        tree["run"] |= run
        if name == "killed":
            (folder / "armed").touch()
            run_program(tree, folder, 1, status=-signal.SIGKILL, variables=variables)
            assert not (folder / "armed").exists(), "nobody was killed"
        result = run_program(tree, folder, 1, variables=variables)
    assert "groups of share 0 kept from the interrupted attempt" in result.stdout
    straight, killed = (checkpoint_tensors(tmp_path / name / "run", 3, 1) for name in ("straight", "killed"))
    assert straight.keys() == killed.keys() and all(torch.equal(straight[n], killed[n]) for n in straight)
    rows = [read_metrics(tmp_path / name / "run")[1:] for name in ("straight", "killed")]
    for column in ("step", "actor/loss", "critic/rewards/mean", *COUNTS):
        assert [row[column] for row in rows[0]] == [row[column] for row in rows[1]], column
    assert rows[0][1]["selection/candidates"] > 5


def states(folder: Path, ranks: int) -> list[tuple[dict, dict[str, torch.Tensor]]]:
    """What is kept of the training after the steps 1 and 2: counters, and weights with the optimizer's moments."""
    found = []
    for step in (1, 2):
        state = json.loads((folder / "run" / "checkpoints" / f"iter_{step:07d}" / "state.json").read_text())
        found.append((state, checkpoint_tensors(folder / "run", step, ranks)))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_when_no_group_passes_nothing_moves_and_the_run_goes_on(toy: Toy, ranks: int, tmp_path: Path):
    tree = picky(toy, tmp_path, "NONE", train={"save_interval": 1})
    printed = run_program(tree, tmp_path, ranks).stdout
    assert "step 1: 0 of 16 candidates passed selection.method=refilling:NONE" in printed
    assert "step 2: 0 of 1 updates are made" in printed and "of version 0" in printed
    rows = read_metrics(tmp_path / "run")[1:]
    assert [row["selection/candidates"] for row in rows] == [16, 16] and not any("actor/loss" in row for row in rows)
    assert [row["training/weight_version"] for row in rows] == [0, 0]
    assert all(row["perf/generated_tokens"] >= 16 * 4 for row in rows)
    (first, tensors), (second, later) = states(tmp_path, ranks)
    assert all(torch.equal(tensors[name], later[name]) for name in tensors)
    for name in ("version", "scheduler_steps"):
        assert first[name] == second[name] == 0
    assert rollout_rows(tmp_path / "run", 2) == []


@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_with_too_few_groups_trains_on_those(toy: Toy, updates: int, tmp_path: Path):
    """On two ranks two groups pass of eight candidates, one of them for each update."""
    tree = picky(toy, tmp_path, "ONE_IN_FOUR", train={"steps": 1, "updates_per_batch": updates})
    tree["selection"]["candidate_batches"] = 2
    printed = run_program(tree, tmp_path, 2).stdout
    assert "step 1: 2 of 8 candidates passed" in printed and "trains on 2 groups instead of 4" in printed
    assert "updates are made" not in printed
    row = read_metrics(tmp_path / "run")[1]
    assert (row["selection/kept"], row["selection/pass_rate"], row["training/weight_version"]) == (2, 0.25, updates)


def test_saved_groups_of_a_step_with_too_few_are_all_trained_on(toy: Toy, tmp_path: Path):
    """Saved by two ranks and loaded by one, whose selection would pass others; they merge as they did."""
    saving, loading = (tmp_path / name for name in ("saving", "loading"))
    saved = str(tmp_path / "saved")
    tree = picky(toy, saving, "ONE_IN_FOUR", train={"steps": 1}, debug={"save_rollouts": saved})
    tree["selection"]["candidate_batches"] = 2
    run_program(tree, saving, 2)
    tree = picky(toy, loading, "NONE", train={"steps": 1}, debug={"load_rollouts": saved})
    run_program(tree, loading, 1)
    assert trained(loading, 1) == trained(saving, 1) != []
    row, reference = (read_metrics(folder / "run")[1] for folder in (loading, saving))
    assert (row["selection/candidates"], row["selection/kept"], reference["selection/kept"]) == (2, 2, 2)
    assert row["actor/loss"] == pytest.approx(reference["actor/loss"], rel=1e-4, abs=1e-7)
    assert row["training/epoch"] == 2 / 24


def test_a_part_of_a_step_without_any_group_is_no_update(toy: Toy, tmp_path: Path):
    """Four candidates, one passes; of two updates the one with the group is made, and alone moves the optimizer."""
    tree = picky(toy, tmp_path, "ONE_IN_FOUR", train={"steps": 1, "updates_per_batch": 2})
    tree["selection"]["candidate_batches"] = 1
    printed = run_program(tree, tmp_path, 2).stdout
    assert "step 1: 1 of 2 updates are made" in printed
    row = read_metrics(tmp_path / "run")[1]
    assert (row["selection/kept"], row["training/weight_version"]) == (1, 1)


def test_when_every_rollout_is_left_out_of_the_loss_nothing_moves(toy: Toy, tmp_path: Path):
    tree = toy.tree(
        tmp_path / "run",
        algorithm={"mask_truncated": True},
        rollout={"max_response_length": 1, "prompts_per_step": 2, "rollouts_per_prompt": 2},
        train={"steps": 2, "save_interval": 1},
    )
    printed = run_program(tree, tmp_path, 1).stdout
    assert "step 1: 0 of 1 updates are made" in printed and "the loss has 0 rollouts of 2 groups" in printed
    (_, tensors), (second, later) = states(tmp_path, 1)
    assert all(torch.equal(tensors[name], later[name]) for name in tensors) and second["version"] == 0
    assert len(rollout_rows(tmp_path / "run", 2)) >= 4


def test_left_out_rollouts_are_in_no_share_and_parts_without_any_are_no_update(monkeypatch: pytest.MonkeyPatch):
    """Of three groups of two, for three updates: one rollout of the first and none of the second take part."""
    monkeypatch.setattr(update, "_redistribute", lambda run, samples: Share(samples, 1.0, len(samples)))
    samples = [replace(sample(rollout(True)), advantage=float(i), keep=i not in (1, 2, 3)) for i in range(6)]
    groups = [TrainingGroup(g, g.native, gate=False) for g in [group("10")] * 3]
    run = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(updates_per_batch=3)),
        places=range,
        is_main=False,
    )
    shares = update._shares(run, groups, samples, 1, 3)
    assert [[s.advantage for s in share.samples] for share in shares] == [[0.0], [4.0, 5.0]]


def test_updates_have_the_same_groups_on_any_number_of_ranks():
    """Ranks hold the groups in turn. A full batch is cut as before: every rank's list into equal parts."""
    for total in range(14):
        for parts in (1, 2, 3):
            alone = [list(range(total))[part] for part in update.split_groups([1] * total, range(total), total, parts)]
            assert sum(alone, []) == list(range(total))
            assert max(map(len, alone)) - min(map(len, alone)) <= 1
            for ranks in (2, 3, 4):
                own = [list(range(rank, total, ranks)) for rank in range(ranks)]
                cuts = [update.split_groups([1] * len(held), held, total, parts) for held in own]
                of_parts = [
                    sorted(place for held, cut in zip(own, cuts, strict=True) for place in held[cut[part]])
                    for part in range(parts)
                ]
                assert of_parts == alone
                if total % (ranks * parts) == 0:
                    assert all(
                        len(held[part]) == total // ranks // parts
                        for held, cut in zip(own, cuts, strict=True)
                        for part in cut
                    )
    assert update.split_groups([4, 6, 5], (0, 2, 4), 6, 3) == [slice(0, 4), slice(4, 10), slice(10, 15)]


def test_selection_metrics_count_all_that_was_sampled():
    """Tokens 10 + 0, 20 + 5 and 30 + 0 of groups, and 7 of no group: 72. Two of three groups are kept."""
    outcomes = [
        Outcome(0, 4, True, 0.5, 0.5, 10, 0),
        Outcome(1, 9, False, 0, 0, 20, 5),
        Outcome(2, 3, True, 1, 1, 30, 0),
    ]
    assert selection_metrics(outcomes, 7.0) == {
        "selection/candidates": 3,
        "selection/kept": 2,
        "selection/rejected": 1,
        "selection/pass_rate": pytest.approx(2 / 3),
        "perf/generated_tokens": 72,
    }
    assert selection_metrics([], 0.0)["selection/pass_rate"] == 0
