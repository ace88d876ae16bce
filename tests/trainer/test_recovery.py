"""Runs that are killed in the middle of sampling, restarted, or fed numbers that are not finite."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from records import PROMPT, group, rollout, sample, step_prompts, training_rows
from safetensors.torch import load_file
from toy_runs import ROOT, Toy, command, environment, run_program

from lens_megatron.algorithms.selection.every_prompt import EveryPrompt
from lens_megatron.data.prompts import PromptStream
from lens_megatron.errors import ExitCode
from lens_megatron.output.metrics import read_metrics
from lens_megatron.results import UpdateStats
from lens_megatron.rollout import replay, unfinished
from lens_megatron.rollout.unfinished import UnfinishedGroups
from lens_megatron.supervision import non_finite
from lens_megatron.types import Group, Prompt


def selection_state(run: Path, step: int) -> dict:
    state = json.loads((run / "checkpoints" / f"iter_{step:07d}" / "state.json").read_text())
    return state["selection"]


def exported(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"iter_{step:07d}" / "hf" / "model.safetensors")


@pytest.mark.parametrize(
    ("again", "ranks", "method"),
    [
        ("by the user", 1, "every_prompt"),
        pytest.param("by torchrun", 1, "every_prompt", marks=pytest.mark.slow),
        pytest.param("by torchrun", 2, "every_prompt", marks=pytest.mark.slow),
        pytest.param("by torchrun", 1, "greso", marks=pytest.mark.slow),
        pytest.param("by torchrun", 2, "greso", marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_middle_of_sampling_and_started_again_equals_straight(
    toy: Toy, again: str, ranks: int, method: str, tmp_path: Path
):
    sections = {
        "selection": {"method": method},
        "reward": {"grader": "graders:murderous_score", "timeout_s": 120},
        "rollout": {"max_running_sequences": 4},
        "train": {"steps": 3, "save_interval": 1},
    }
    outputs = []
    for name in ("straight", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        tree, variables = toy.tree(folder / "run", **sections), {"MURDER": str(folder)}
        if name == "straight":
            result = run_program(tree, folder, ranks, variables=variables)
        elif again == "by the user":
            (folder / "armed").touch()
            run_program(tree, folder, ranks, status=-signal.SIGKILL, variables=variables)
            result = run_program(tree, folder, ranks, variables=variables)
        else:
            tree["run"]["if_exists"] = "restart"  # which torchrun's second attempt does not do
            arguments = command(tree, folder, ranks)
            arguments[3:3] = ["--max-restarts", "1"]
            (folder / "armed").touch()
            result = subprocess.run(
                arguments, env=environment() | variables, capture_output=True, text=True, timeout=300
            )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
        outputs.append(result.stdout)
        assert not list((folder / "run" / "unfinished").iterdir())
    assert not (tmp_path / "killed" / "armed").exists(), "nobody was killed"
    assert "1 steps done" in outputs[1] and "kept from the interrupted attempt" in outputs[1], outputs[1]
    assert "kept from" not in outputs[0]
    straight, killed = (exported(tmp_path / name / "run", 3) for name in ("straight", "killed"))
    assert straight.keys() == killed.keys() and all(torch.equal(straight[n], killed[n]) for n in straight)
    states = [selection_state(tmp_path / name / "run", 3) for name in ("straight", "killed")]
    assert states[0] == states[1] and states[0]["position"] >= 12
    rows = [read_metrics(tmp_path / name / "run") for name in ("straight", "killed")]
    for column in ("step", "actor/loss", "critic/rewards/mean", "perf/generated_tokens"):
        assert [row[column] for row in rows[0][1:]] == [row[column] for row in rows[1][1:]], column


def test_another_number_of_ranks_goes_on_with_the_same_selection(toy: Toy, tmp_path: Path):
    """The learning rate is too small to change a draw. Of 24 prompts 8 are taken per step: the second epoch skips."""
    sections = {
        "selection": {"method": "greso", "options": {"p_easy": 0.05, "p_hard": 0.05}},
        "rollout": {"prompts_per_step": 8},
        "lens": {"enabled": False},
        "algorithm": {"advantage": "grpo", "kl_coef": 0.0},
        "optimizer": {"lr": 1e-30},
    }
    for name, ranks in (("straight", (1, 1)), ("moved", (1, 2))):
        for steps, count in zip((3, 5), ranks, strict=True):
            tree = toy.tree(tmp_path / name / "run", train={"steps": steps, "save_interval": 9}, **sections)
            run_program(tree, tmp_path / name, count)
    straight, moved = (selection_state(tmp_path / name / "run", 5) for name in ("straight", "moved"))
    assert straight == moved and straight["prompts"]
    assert straight["position"] > 40, "prompts were skipped"


def test_ranks_that_torchrun_restarts_find_one_another():
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(ROOT / "tests" / "trainer" / "restart_worker.py")
    result = subprocess.run(
        [*arguments, "--max-restarts", "1", script], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "exitcode: -9" in result.stderr, "nobody was killed"


def test_updates_that_are_not_finite_are_skipped_by_all_dumped_and_stop_the_run(toy: Toy, tmp_path: Path):
    # Only the second rank has rescued samples, whose imitation term overflows; the first rank's own numbers are finite.
    (tmp_path / "saved").mkdir()
    outcomes = [("1100", ""), ("0000", "1000")] * 2
    asked = [replace(PROMPT, index=index) for index in range(4)]
    groups = [replay.to_json(group(*outcome, prompt=prompt)) for outcome, prompt in zip(outcomes, asked, strict=True)]
    for step in (1, 2, 3):
        replay.replay_path(str(tmp_path / "saved"), step).write_text("\n".join(groups) + "\n")
    tree = toy.tree(
        tmp_path / "run",
        debug={"load_rollouts": str(tmp_path / "saved")},
        algorithm={"imitation_coef": 3e38},
        train={"steps": 3, "max_skipped_updates": 2, "share_prompts": False},  # which would deal the samples otherwise
    )
    result = run_program(tree, tmp_path, 2, status=ExitCode.NON_FINITE)
    assert "error: loss or gradient was not finite in 2 updates in a row, the last at step 2 (train.max_skipped_up" in (
        result.stdout
    )
    rows = read_metrics(tmp_path / "run")
    assert [row["actor/skipped_updates"] for row in rows[1:]] == [1.0, 1.0]
    assert [row["training/weight_version"] for row in rows[1:]] == [0, 0]
    for step in (1, 2):
        for rank in range(2):
            path = tmp_path / "run" / "non_finite" / f"step_{step:06d}_update_0_rank_{rank:05d}.jsonl"
            head, *samples = map(json.loads, path.read_text().splitlines())
            assert not math.isfinite(head["loss"] + head["grad_norm"]) and head["samples"] == len(samples) == 8
            assert {s["origin"] for s in samples} == ({"native"} if rank == 0 else {"native", "purified"})
            assert all(len(s["response"]) == len(s["reference_log_probs"]) for s in samples)


def test_a_dump_names_the_samples_that_came_not_finite_and_keeps_the_first_ones(tmp_path: Path):
    samples = [sample(rollout(True)), sample(rollout(True), advantage=math.nan), sample(rollout(False))]
    rows = training_rows(samples, [None, None, torch.tensor([-1.0, -math.inf])])
    stats = UpdateStats(*[0.0] * 8, grad_norm=math.inf, learning_rate=1.0, ratio_min=1.0, ratio_max=1.0, skipped=True)
    for step in range(20):
        non_finite.dump(tmp_path, f"step_{step:06d}_update_0_rank_00000", stats, rows)
    non_finite.dump(tmp_path, "step_000019_update_0_rank_00001", stats, rows)
    assert len(list(tmp_path.iterdir())) == non_finite.KEPT + 1
    head, *samples = map(json.loads, (tmp_path / "step_000000_update_0_rank_00000.jsonl").read_text().splitlines())
    assert head["samples_not_finite"] == [1, 2] and samples[2]["old_log_probs"] == [-1.0, -math.inf]
    assert samples[0]["prompt"] == [1, 10, 11, 12, 13, 2] and samples[0]["response"] == [5, 6]


def test_skipped_updates_are_counted_in_a_row_only(tmp_path: Path):
    class Update:
        def __init__(self, skipped: bool):
            self.skipped = skipped

    made, lost = Update(False), Update(True)
    assert non_finite.in_a_row(2, [lost]) == 3 and non_finite.in_a_row(2, [made, lost]) == 1
    assert non_finite.in_a_row(2, [lost, made]) == 0 and non_finite.in_a_row(2, []) == 2
    non_finite.check(2, 3, 7, tmp_path)
    non_finite.check(99, 0, 7, tmp_path)
    with pytest.raises(non_finite.NonFiniteError, match="3 updates in a row, the last at step 7 .*updates=3"):
        non_finite.check(3, 3, 7, tmp_path)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, (1, i, 2), (False, True, False), "7", "p", "toy") for i in range(count)]


def test_a_step_has_the_same_prompts_whoever_asks_and_however_many_ranks_share_them():
    before, after = (EveryPrompt(PromptStream(prompts(10), seed=3)) for _ in range(2))
    order = []
    for step in range(6):
        order.append(before.candidates(step, 4))
        before.position += 4
    after.restore({"position": 16})
    assert after.candidates(4, 4) == order[4], "a restart at step 4 sees other prompts"
    for dp_size, model_size in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)):
        shares = {}
        for dp_rank in range(dp_size):
            for model_rank in range(model_size):
                # As phases.collect deals them, and as build.build_run numbers the shares.
                shares[dp_rank + dp_size * model_rank] = order[5][dp_rank::dp_size][model_rank::model_size]
        world = dp_size * model_size
        assert shares == {share: order[5][share::world] for share in range(world)}


def of(prompt: Prompt, native: str = "1100", version: int = 0) -> Group:
    made = group(native, prompt=prompt)
    versioned = tuple(
        type(r)(r.token_ids, r.log_probs, r.finished, r.origin, version, r.reward, r.status) for r in made.native
    )
    return Group(prompt, versioned, place=prompt.index)


def test_kept_groups_are_those_of_the_step_the_weights_and_the_prompt(tmp_path: Path):
    rows = prompts(4)
    asked = step_prompts(rows)
    first = UnfinishedGroups(tmp_path, 0, 1)
    first.append(3, 0, of(rows[0]))
    first.append(3, 2, of(rows[2], version=1))
    first.append(4, 1, of(rows[1]))
    assert first.read(3, asked, version=0) == {}, "groups of this attempt are not an earlier one's"
    second = UnfinishedGroups(tmp_path, 0, 1)
    assert second.read(3, asked, version=0) == {0: of(rows[0])}
    assert second.read(3, asked, version=1) == {2: of(rows[2], version=1)}
    assert second.read(4, asked, version=0) == {1: of(rows[1])}
    assert second.read(5, asked, version=0) == {}
    changed = Prompt(0, (1, 99, 2), (False, True, False), "7", "p", "toy")
    assert second.read(3, step_prompts([changed]), version=0) == {}, "another prompt in the same row of the dataset"
    second.remove(3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000004_00000_of_00001.jsonl"]


def test_a_prompt_that_stands_twice_in_a_step_is_kept_twice(tmp_path: Path):
    """At the end of one epoch and the beginning of the next; each place has drawn rollouts of its own."""
    (prompt,) = prompts(1)
    asked, first = step_prompts([prompt, prompt]), of(prompt, "1100")
    second = replace(of(prompt, "0010"), place=1)
    store = UnfinishedGroups(tmp_path, 0, 1)
    store.append(1, 1, second)
    assert UnfinishedGroups(tmp_path, 0, 1).read(1, asked, version=0) == {1: second}
    store.append(1, 0, first)
    assert UnfinishedGroups(tmp_path, 0, 1).read(1, asked, version=0) == {0: first, 1: second}
    assert UnfinishedGroups(tmp_path, 1, 2).read(1, asked[1:], version=0) == {1: second}


def test_a_torn_line_is_ignored_and_written_after(tmp_path: Path):
    rows = prompts(3)
    asked = step_prompts(rows)
    UnfinishedGroups(tmp_path, 0, 1).append(1, 0, of(rows[0]))
    UnfinishedGroups(tmp_path, 0, 1).append(1, 1, of(rows[1]))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    again = UnfinishedGroups(tmp_path, 0, 1)
    assert list(again.read(1, asked, version=0)) == [0]
    again.append(1, 2, of(rows[2]))
    assert list(UnfinishedGroups(tmp_path, 0, 1).read(1, asked, version=0)) == [0, 2]


@pytest.mark.parametrize("shares", [1, 2, 3, 4])
def test_another_number_of_ranks_finds_every_kept_group(tmp_path: Path, shares: int):
    asked = step_prompts(prompts(12))
    for share in range(2):
        old = UnfinishedGroups(tmp_path, share, 2)
        for prompt in asked[share::2][:4]:
            old.append(1, prompt.place, of(prompt.prompt))
    new = [UnfinishedGroups(tmp_path, share, shares) for share in range(shares)]
    found = [store.read(1, asked[store.share :: shares], version=0) for store in new]
    assert sum(map(len, found)) == 8
    for store, groups in zip(new, found, strict=True):
        assert groups.keys() <= {prompt.place for prompt in asked[store.share :: shares]}
        assert all(group.prompt == asked[place].prompt for place, group in groups.items())
        store.remove(1)
    assert not list(tmp_path.iterdir())


def test_a_rank_reads_only_its_own_file_when_the_number_of_ranks_is_the_same(tmp_path: Path, monkeypatch):
    for share in range(2):
        UnfinishedGroups(tmp_path, share, 2).append(1, share, of(prompts(2)[share]))
    read = []
    monkeypatch.setattr(unfinished, "_read", lambda path: read.append(path.name) or [])
    UnfinishedGroups(tmp_path, 1, 2).read(1, step_prompts(prompts(2)), version=0)
    assert read == ["step_000001_00001_of_00002.jsonl"]


def test_a_full_disk_loses_kept_groups_but_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    store = UnfinishedGroups(tmp_path / "file" / "folder", 0, 1)
    store.append(1, 0, of(prompts(1)[0]))
    store.append(1, 0, of(prompts(1)[0]))
    assert caplog.text.count("are not kept for a restart") == 1
