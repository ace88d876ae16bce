"""Sampling as whole runs see it: engines that share their work, and steps sampled ahead."""

from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from threading import Event

import pytest
from toy_runs import Toy, launch, rollout_rows

from lens_megatron.config import ConfigError, from_tree
from lens_megatron.results import CollectedGroups, SamplingStats
from lens_megatron.rollout.background import BackgroundSampling


def completions(folder: Path, step: int) -> list[tuple]:
    """The completions of a step with their prompts and origins, sorted."""
    return sorted((row["prompt_index"], row["origin"], row["completion"]) for row in rollout_rows(folder, step))


@pytest.mark.slow
def test_sharing_work_changes_no_group(toy: Toy, tmp_path: Path):
    """Two steps on two ranks, of which the first is trained on: the second shows that the updates were equal too."""
    eval_data = {"eval": [str(toy.eval)]}
    found = []
    for share_work in (False, True):
        folder = tmp_path / str(share_work)
        tree = toy.tree(folder / "run", rollout={"share_work": share_work}, data=eval_data)
        rows = launch(tree, folder, 2)
        found.append((rows, [completions(folder / "run", step) for step in (1, 2)]))
    (alone, expected), (shared, together) = found
    assert together == expected
    for row, reference in zip(shared, alone, strict=True):
        names = ("actor/grad_norm", "critic/rewards/mean", "lens/extra_rollouts", "val-core/eval/acc/mean@1")
        kept = [name for name in names if name in reference]
        assert kept and [row[name] for name in kept] == pytest.approx([reference[name] for name in kept], rel=1e-4)
    assert 0 <= shared[1]["perf/engine_idle_share/min"] <= shared[1]["perf/engine_idle_share/max"] <= 1


def test_steps_are_sampled_one_update_before_they_are_trained_on(toy: Toy, tmp_path: Path):
    """Also across an evaluation and a resumption: the first step of a run, or of a resumed one, is on-policy."""
    tree = toy.tree(
        tmp_path / "run",
        rollout={"off_policy_steps": 1},
        algorithm={"correction": "token_truncate", "kl_coef": 0.01},
        data={"eval": [str(toy.eval)]},
        train={"steps": 3, "eval_interval": 2},
    )
    rows = launch(tree, tmp_path, 2)
    assert [row["training/rollout_staleness/max"] for row in rows[1:]] == [0, 1, 1]
    assert [row["training/rollout_staleness/min"] for row in rows[1:]] == [0, 1, 1]
    versions = [{row["weight_version"] for row in rollout_rows(tmp_path / "run", step)} for step in (1, 2, 3)]
    assert versions == [{0}, {0}, {1}]
    assert rows[1]["rollout_corr/k3_kl"] < 1e-6 < rows[2]["rollout_corr/k3_kl"], "the correction sees the older policy"
    more = launch(tree, tmp_path, 2, "train.steps=5")
    assert [row["training/rollout_staleness/max"] for row in more[4:]] == [0, 1]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"off_policy_steps": 1}}, "algorithm.correction=none takes them for the current one's; choose"),
        (
            {"rollout": {"off_policy_steps": 1, "engine": "vllm"}, "algorithm": {"correction": "token_mask"}},
            "rollout.engine=vllm in the trainer's memory; choose vllm_server",
        ),
        ({"rollout": {"off_policy_steps": 2}}, "rollout.off_policy_steps"),
    ],
)
def test_steps_ahead_that_would_go_wrong_are_refused(toy: Toy, tmp_path: Path, sections: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        from_tree(toy.tree(tmp_path, **sections))


def test_collect_goes_on_in_the_background_and_its_errors_come_out():
    ahead, go = BackgroundSampling(), Event()
    expected = CollectedGroups([], SamplingStats(1.0))

    def sample() -> CollectedGroups:
        assert go.wait(30)
        return expected

    ahead.settle()  # nothing was begun
    ahead.begin(3, sample)
    with pytest.raises(NotYet):
        ahead.sampled.result(timeout=0.05)
    go.set()
    assert ahead.take() is expected and ahead.step == 3
    ahead.begin(4, lambda: 1 / 0)
    ahead.settle()
    with pytest.raises(ZeroDivisionError):
        ahead.take()
