"""Whole runs with each purifier: what is sampled, deleted, counted, saved and replayed."""

from pathlib import Path

import pytest
import torch
from test_prompt_gradients import autograd_norms
from toy_runs import Toy, launch, rollout_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lens_megatron.algorithms.purification import deletion_count
from lens_megatron.config import LensConfig
from lens_megatron.rollout import replay
from lens_megatron.types import Group

RATIO = 0.2


def groups(folder: Path, step: int) -> list[Group]:
    return replay.read_groups(str(folder / "replay"), step, count=4, vocab_size=10**6)


@pytest.fixture(scope="module")
def resampled(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Two steps that sample hard prompts again as they are. The floor would stop interference at the first step."""
    folder = tmp_path_factory.mktemp("resampled")
    lens = {"purifier": "resampling", "min_score": 1e-4, "deletion": "text"}
    tree = toy.tree(folder / "run", lens=lens, debug={"save_rollouts": str(folder / "replay")})
    return folder, launch(tree, folder, 1)


def test_resampling_deletes_nothing_and_draws_anew(resampled):
    folder, rows = resampled
    for step in (1, 2):
        again = [group for group in groups(folder, step) if group.rescue]
        assert again and len(again) == rows[step]["lens/purified_prompts"]
        for group in again:
            assert group.purified.token_ids == group.prompt.token_ids and not group.purified.deleted
            assert not any(group.purified.scores)
            native, rescue = ([rollout.token_ids for rollout in wave] for wave in (group.native, group.rescue))
            assert native != rescue, "the second wave repeats the first"
        assert rows[step]["lens/deleted_tokens"] == 0


def test_resampled_rollouts_are_on_policy(resampled):
    """Their ratio is exactly 1, as native ones have it: they come from the prompt that they are trained on."""
    _, rows = resampled
    assert sum(row["lens/rescued_prompts"] for row in rows[1:]) > 0
    for row in rows[1:]:
        assert row["lens/abs_log_ratio_rescued"] == 0 and row["lens/clip_fraction_rescued"] == 0
        assert row["actor/ratio_min"] == row["actor/ratio_max"] == 1.0


def test_rollout_files_of_a_resampled_prompt_show_it_whole(resampled):
    folder, _ = resampled
    rows = [row for step in (1, 2) for row in rollout_rows(folder / "run", step)]
    again = [row for row in rows if row["origin"] == "purified"]
    assert again and all(row["purified_prompt"] == row["prompt"] for row in again)


def test_saved_resampled_groups_train_alike(resampled, toy: Toy, tmp_path: Path):
    folder, expected = resampled
    lens = {"purifier": "resampling"}
    rows = launch(toy.tree(tmp_path / "run", lens=lens, debug={"load_rollouts": str(folder / "replay")}), tmp_path, 1)
    for row, reference in zip(rows[1:], expected[1:], strict=True):
        for name in ("actor/loss", "actor/grad_norm", "lens/extra_rollouts", "lens/second_wave_tokens"):
            assert row[name] == reference[name], name


def test_costs_are_sums_of_their_parts_and_stand_in_the_summary(resampled):
    folder, rows = resampled
    for row in rows[1:]:
        assert row["lens/extra_rollouts"] == 4 * row["lens/purified_prompts"]
        assert row["lens/extra_tokens"] == row["lens/second_wave_tokens"] + row["lens/discarded_tokens"]
        assert row["lens/extra_seconds"] == row["timing_s/score"] + row["timing_s/second_wave"]
    tokens = sum(row["lens/extra_tokens"] for row in rows[1:])
    (line,) = [x for x in (folder / "run" / "summary.txt").read_text().splitlines() if "Second waves took" in x]
    assert f" {tokens:,.0f} tokens and " in line and "interference" not in line


def test_every_other_purifier_in_a_step(toy: Toy, tmp_path: Path):
    """On two ranks; what is deleted is worked out again from the saved groups, and gradients by transformers."""
    found = {}
    for name in ("random", "gradient", "oracle"):
        folder, lens = tmp_path / name, {"purifier": name, "deletion_ratio": RATIO, "min_score": 1e9}
        debug = {"save_rollouts": str(folder / "replay")}
        tree = toy.tree(folder / "run", lens=lens, debug=debug, train={"steps": 1}, data={"noise_key": "noise"})
        (row,) = launch(tree, folder, 2)[1:]
        found[name] = groups(folder, 1)
        assert row["lens/deleted_tokens"] > 0 and row["lens/extra_rollouts"] > 0
    for group in (*found["random"], *found["gradient"]):
        count = deletion_count(group.prompt.eligible, LensConfig(deletion_ratio=RATIO))
        eligible = [place for place, may_go in enumerate(group.prompt.eligible) if may_go]
        assert len(group.purified.deleted) == count and set(group.purified.deleted) <= set(eligible)
    assert any(group.purified for group in found["oracle"])
    for group in found["oracle"]:
        marked = [place for place, noise in enumerate(group.prompt.noise) if noise and group.prompt.eligible[place]]
        assert (list(group.purified.deleted) if group.purified else []) == marked
    model = AutoModelForCausalLM.from_pretrained(toy.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(toy.model)
    for group in found["gradient"]:
        answer = tuple(tokenizer.encode(f"\\boxed{{{group.prompt.answer}}}", add_special_tokens=False)[:6])
        expected = autograd_norms(model, group.prompt.token_ids, answer)
        assert torch.tensor(group.purified.scores).allclose(expected.float(), rtol=1e-3, atol=1e-5)


def test_without_purification_nothing_is_extra(toy: Toy, tmp_path: Path):
    (row,) = launch(toy.tree(tmp_path / "run", lens={"enabled": False}, train={"steps": 1}), tmp_path, 1)[1:]
    extra = ("extra_rollouts", "extra_tokens", "extra_seconds", "destroyed_groups", "gate_rate", "purified_rate")
    assert [row[f"lens/{name}"] for name in extra] == [0.0] * 6
    assert "Second waves" not in (tmp_path / "run" / "summary.txt").read_text()
