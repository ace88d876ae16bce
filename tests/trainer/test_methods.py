"""Every file of configs/methods trains three steps over one base, and so does a method from a user's own file."""

import json
import math
import re
import runpy
import shutil
from collections.abc import Callable
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest
from toy_runs import ROOT, Toy, environment, rollout_rows, run_program

from lens_megatron import config as configuration
from lens_megatron.algorithms import listing
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.config import Config
from lens_megatron.output.metrics import read_metrics

FOLDER = ROOT / "configs" / "methods"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
REWARDS = [name for name in NAMES if name.startswith(("reward_", "rpr"))]
"""Files that only change rewards."""
STEPS = 3


class Finished(NamedTuple):
    steps: list[dict]
    """The metrics of each step."""
    rollouts: list[list[dict]]
    """What was trained on, per step."""
    said: str

    def total(self, metric: str) -> float:
        return sum(row[metric] for row in self.steps)

    @property
    def groups(self) -> list[list[dict]]:
        """The trained rollouts of every prompt of every step."""
        return [list(rows) for step in self.rollouts for _, rows in groupby(step, key=lambda row: row["prompt_index"])]


def files(name: str) -> list[Path]:
    """Those that a user would give for the method; what only changes rewards stands over GRPO."""
    return [FOLDER / f"{base}.yaml" for base in (["grpo", name] if name in REWARDS else [name])]


Training = Callable[..., Finished]


@pytest.fixture(scope="module")
def training(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """training(name) -> the run of the method, which is made once; training(label, *words) -> another one."""
    folder = tmp_path_factory.mktemp("methods")
    base = Toy(talkative(toy.model, folder), toy.train, toy.eval)

    @cache
    def train(name: str, *words: str) -> Finished:
        tree = base.tree(
            folder / name / "run",
            rollout={"max_response_length": 10},
            train={"steps": STEPS, "save_interval": STEPS, "async_save": False},
            lens={"tau": 0.9},
            run={"seed": 7},  # in three steps DAPO rejects a group, and of the first four some flip
        )
        given = words or [*map(str, files(name)), f"train.steps={STEPS}", "train.epochs="]
        paths = {"PYTHONPATH": f"{folder}:{environment()['PYTHONPATH']}"}
        ended = run_program(tree, folder / name, 1, *given, "lens.min_score=0", variables=paths)
        steps = [row for row in read_metrics(folder / name / "run") if row["step"] > 0]
        rollouts = [rollout_rows(folder / name / "run", row["step"]) for row in steps]
        return Finished(steps, rollouts, ended.stdout + ended.stderr)

    train.folder = folder
    return train


def talkative(model: Path, folder: Path) -> Path:
    """The same model, whose responses end with any of a fifth of the tokens: otherwise next to none would end."""
    shutil.copytree(model, folder / "model")
    path = folder / "model" / "generation_config.json"
    options = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(options | {"eos_token_id": list(range(0, 400, 5))}))
    return folder / "model"


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(training: Training, name: str):
    done = training(name)
    assert len(done.steps) == STEPS
    for row in done.steps:
        empty = "actor/loss" not in row
        assert not empty or f"step {row['step']}: " in done.said, "a step without an update must say why"
        assert empty or math.isfinite(row["actor/loss"]) and row["actor/skipped_updates"] == 0
    assert any(row.get("actor/grad_norm", 0) > 0 for row in done.steps), "no step has learnt anything"


PURIFYING = {"lens", "lens_literal", "lens_keep_one", "lens_grpo_advantage", "lens_dapo", "lens_greso", "lens_dr_grpo",
             "lens_imitation", "lens_ratio_floor", "lens_original_ratio", "lens_acl", "random_pruning",
             "gradient_pruning", "oracle_pruning"}  # fmt: skip
FILTERING = {"dapo", "dapo_extended", "greso", "greso_extended", "lens_dapo", "lens_greso"}


@pytest.mark.parametrize("name", NAMES)
def test_only_methods_that_purify_sample_twice_and_delete(training: Training, name: str):
    done = training(name)
    assert (done.total("lens/extra_rollouts") > 0) == (name in PURIFYING | {"resampling"})
    assert (done.total("lens/deleted_tokens") > 0) == (name in PURIFYING)


@pytest.mark.parametrize("name", NAMES)
def test_only_methods_that_filter_reject_groups(training: Training, name: str):
    done = training(name)
    assert (done.total("selection/rejected") > 0) == (name in FILTERING)
    if name in FILTERING:
        assert all(len({row["status"] == "correct" for row in group}) == 2 for group in done.groups)


def test_the_noise_of_the_data_is_what_the_oracle_deletes(training: Training):
    marked = {row["purified_prompt"] for group in training("oracle_pruning").groups for row in group} - {None}
    assert marked and all("[-" in prompt for prompt in marked)


def test_twice_the_rollouts(training: Training):
    assert {len(group) for group in training("grpo_extended").groups} == {16}
    assert {len(group) for group in training("grpo").groups} == {4}


def test_a_failure_stays_in_every_group_of_lens_keep_one(training: Training):
    admitted = [group for group in training("lens_keep_one").groups if group[0]["gate"]]
    assert admitted and all(any(row["status"] != "correct" for row in group) for group in admitted)


def test_overlong_responses_lose_reward_and_their_part_in_the_loss(training: Training):
    for row in (row for group in training("dapo").groups for row in group):
        penalty = min(8 - row["response_tokens"], 0) / 2  # of 10 tokens the last fifth
        assert row["reward"] == (row["status"] == "correct") + penalty
    assert any(not row["finished"] for group in training("dapo").groups for row in group)


def verdicts(done: Finished) -> list[list[tuple[str, bool, float]]]:
    """Of step 1, whose weights and seeds are the same in all runs: completion, verdict and reward, by group."""
    rows = groupby(done.rollouts[0], key=lambda row: row["prompt_index"])
    return [[(row["completion"], row["status"] == "correct", row["reward"]) for row in group] for _, group in rows]


def test_flips_turn_whole_groups_around(training: Training):
    flipped = []
    for clean, noisy in zip(verdicts(training("grpo")), verdicts(training("reward_flips")), strict=True):
        assert [row[0] for row in clean] == [row[0] for row in noisy]
        flips = {now != before for (_, before, _), (_, now, _) in zip(clean, noisy, strict=True)}
        assert len(flips) == 1 and all(reward == correct for _, correct, reward in noisy)
        flipped += flips
    assert set(flipped) == {True, False}


@pytest.mark.parametrize("name", ["rpr", "rpr_warmup"])
def test_the_pattern_reward_replaces_the_verdicts_reward_but_not_the_verdict(training: Training, name: str):
    clean, patterns = verdicts(training("grpo")), verdicts(training(name))
    assert [[row[:2] for row in group] for group in clean] == [[row[:2] for row in group] for group in patterns]
    assert any(correct and reward < 1 for group in patterns for _, correct, reward in group)


@pytest.mark.parametrize("name", ["rpr_wrong", "rpr_calibrated"])
def test_right_answers_keep_their_reward(training: Training, name: str):
    assert all(reward == 1 for group in verdicts(training(name)) for _, correct, reward in group if correct)


def test_the_advantages_of_a_group(training: Training):
    def unlike(name: str) -> set[str]:
        """Of groups in which one of four is right: the advantage of that one."""
        groups = [group for group in training(name).groups if sum(row["reward"] for row in group) == 1]
        return {f"{row['advantage']:.4f}" for group in groups for row in group if row["reward"] and len(group) == 4}

    assert unlike("grpo") == {"1.5000"} and unlike("dr_grpo") == {"0.7500"} and unlike("rloo") == {"1.0000"}


def test_what_the_ratio_leaves_of_rescued_responses(training: Training):
    """All of their gradient where the ratio is against the original prompt, and more of it with a floor than without.
    The purified prompt of step 1, its weights and its seeds are the same under all of these methods."""
    names = ("lens", "lens_ratio_floor", "lens_original_ratio", "lens_imitation")
    literal, floored, original, imitation = (training(name).steps for name in names)
    assert sum("lens/rescued_gradient_share" in row for row in original) > 0
    for row in original:
        assert row.get("lens/rescued_gradient_share", 1.0) == 1.0 and row["lens/abs_log_ratio_rescued"] == 0
        assert not 0 < row.get("training/rollout_probs_diff_max_rescued", 0.0), "another prompt's are no mismatch"
    first = [steps[0] for steps in (literal, floored, original, imitation)]
    assert 0 < first[0]["lens/rho_min"] < 1
    for row in first[1:]:
        for name in ("lens/rho_min", "lens/rho_min_median", "lens/rho_product"):
            assert row[name] == pytest.approx(first[0][name], rel=1e-4)
    shares = [row["lens/rescued_gradient_share"] for row in first]
    assert shares[0] <= shares[1] <= 1.2 and shares[3] == pytest.approx(shares[0])


# ---- the files ------------------------------------------------------------------------------------------------------


def loaded(*names: str) -> Config:
    return configuration.load([ROOT / "configs" / "demo.yaml", *(FOLDER / f"{name}.yaml" for name in names)])


@pytest.mark.parametrize("name", NAMES)
def test_its_first_line_says_what_it_is(name: str):
    first = (FOLDER / f"{name}.yaml").read_text().partition("\n")[0]
    assert re.fullmatch(rf"# {name}: .*\((.*arXiv \d{{4}}\.\d{{5}}.*|this project)\)\.", first)
    (file,) = [file for file in listing.files() if file.name == name]
    assert file.line == first.partition(": ")[2]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_and_option_that_it_names_exists(name: str):
    load_methods(loaded(name))


@pytest.mark.parametrize("below", ["lens_dapo", "sapo", "cispo", "lens_literal", "lens_greso", "reward_flips"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REWARDS])
def test_it_means_the_same_over_any_base(name: str, below: str):
    plain, over = loaded(name), loaded(below, name)
    assert over.algorithm == plain.algorithm and over.reward == plain.reward
    assert (over.selection.method, over.selection.options) == (plain.selection.method, plain.selection.options)
    assert over.lens == plain.lens or not (over.lens.enabled or plain.lens.enabled)


@pytest.mark.parametrize("name", REWARDS)
def test_a_file_of_rewards_changes_nothing_else_and_adds_to_other_rules(name: str):
    alone, together = loaded("dapo", name), loaded("dapo")
    assert alone.model_copy(update={"reward": together.reward}) == together
    assert set(alone.reward.rules) > set(together.reward.rules) == {"overlong"}


# ---- the example of CONTRIBUTING ------------------------------------------------------------------------------------


def test_the_example_of_a_method_of_ones_own_works(training: Training, monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = dict(re.findall(r"```(?:python|yaml)\n# (\w+\.(?:py|yaml))[^\n]*\n(.*?)```", page, re.DOTALL))
    assert set(blocks) == {"opo.py", "opo.yaml", "test_opo.py"}
    assert sum(len([line for line in text.splitlines() if line.strip()]) for text in blocks.values()) <= 30
    for name, text in blocks.items():
        (training.folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(training.folder))
    tests = [call for name, call in runpy.run_path(str(training.folder / "test_opo.py")).items() if "test_" in name]
    assert tests
    for test in tests:
        test()
    done = training("opo", str(FOLDER / "grpo.yaml"), str(training.folder / "opo.yaml"))
    assert len(done.steps) == STEPS and any(row["actor/grad_norm"] > 0 for row in done.steps)
    for group in done.groups:
        assert abs(sum(row["advantage"] * row["response_tokens"] for row in group)) < 1e-6, "what the method promises"
