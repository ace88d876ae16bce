"""Metrics of packing and speed, worked by hand. What groups say is checked in test_train.py, on real runs."""

from dataclasses import replace

import pytest
import torch
from records import PROMPT, group, rollout, sample, training_rows

from lens_megatron.algorithms.rescue import replace_failures
from lens_megatron.batch import pack
from lens_megatron.config import AlgorithmConfig, LensConfig
from lens_megatron.output.metrics import tally_step, time_metrics
from lens_megatron.output.second_wave_metrics import extra_cost
from lens_megatron.results import Packing, SamplingStats, StepResult, SyncStats
from lens_megatron.types import PurifiedPrompt, SequenceLayout, TrainingGroup


def result(packings: tuple[Packing, ...]) -> StepResult:
    return StepResult(1, (), (), (), packings, SyncStats(0, 0, 0.0), SamplingStats(), 0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    """One rank's world, whose reductions change nothing."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)


def test_padding_is_a_share_of_all_rows_and_imbalance_a_mean_over_updates(world):
    """Updates of 100 and 300 rows with 8 and 32 of padding: 40 of 400 rows."""
    packings = (Packing(100, 8, 1.1), Packing(300, 32, 1.3))
    found = tally_step(result(packings)).reduce(None, torch.device("cpu"))
    assert found["perf/padding_waste"] == pytest.approx(0.1)
    assert found["perf/imbalance"] == pytest.approx(1.2)


def test_without_an_update_they_are_zero(world):
    found = tally_step(result(())).reduce(None, torch.device("cpu"))
    assert found["perf/padding_waste"] == found["perf/imbalance"] == 0.0


@pytest.mark.parametrize(
    "layout, rows", [(SequenceLayout(), 8 + 7), (SequenceLayout(0, 2, 1), 8 + 8), (SequenceLayout(0, 1, 4), 16)]
)
def test_only_the_layout_pads(layout: SequenceLayout, rows: int):
    """Samples of 8 and 7 tokens: CP2 pads each to a multiple of 4, four sequence-parallel ranks pad their sum."""
    samples = [sample(rollout(True)), sample(rollout(True, tokens=(5,)))]
    batches = pack.pack(
        training_rows(samples),
        scale=pack.count(samples),
        algorithm=AlgorithmConfig(),
        max_response_length=2,
        parts=[[0, 1]],
        device=torch.device("cpu"),
        layout=layout,
    )
    assert batches[0].sequences.bounds[-1] == rows


def groups_result(*groups: TrainingGroup) -> StepResult:
    return replace(result(()), groups=groups)


def test_what_second_waves_cost_and_gave(world):
    """Four groups. Second waves have 4 rollouts of 2 tokens each; speculation threw 30 tokens away."""
    lens = LensConfig()
    merged = [
        replace_failures(group(*waves), lens, seed=0)
        for waves in (
            ("1000", "1110"),  # its 3 failures leave for 3 successes: a contrast is destroyed
            ("0000", "0100"),  # a contrast is made
            ("0000", "0000"),  # the gate stays shut
            ("1100",),  # not hard
        )
    ]
    found = tally_step(groups_result(*merged)).reduce(None, torch.device("cpu"))
    rejecting = replace(groups_result(*merged[1:3]), rejected=(merged[0], merged[3]))  # they cost as much
    again = tally_step(rejecting).reduce(None, torch.device("cpu"))
    assert [again[name] for name in again if name.startswith("lens/")] == pytest.approx(
        [found[name] for name in again if name.startswith("lens/")]
    )
    assert found["lens/extra_rollouts"] == 12 and found["lens/gate_rate"] == pytest.approx(2 / 3)
    assert found["lens/zero_variance_before"] == found["lens/zero_variance_after"] == 0.5
    assert found["lens/destroyed_groups"] == 1
    found |= {"lens/discarded_tokens": 30.0, "timing_s/score": 0.5, "timing_s/second_wave": 2.0}
    assert extra_cost(found, purifies=True) == {"lens/extra_tokens": 54.0, "lens/extra_seconds": 2.5}


def test_groups_that_had_no_contrast_are_not_destroyed(world):
    merged = [
        replace_failures(group("0000"), LensConfig(), seed=0),
        replace_failures(group("1111"), LensConfig(), seed=0),
    ]
    found = tally_step(groups_result(*merged)).reduce(None, torch.device("cpu"))
    assert found["lens/destroyed_groups"] == 0 and found["lens/zero_variance_after"] == 1
    unpaid = [replace(one, reward=0.0) for one in group("1100").native]  # by a rule; no gate has opened
    merged = [replace_failures(replace(group("1100"), native=tuple(unpaid)), LensConfig(), seed=0)]
    assert tally_step(groups_result(*merged)).reduce(None, torch.device("cpu"))["lens/destroyed_groups"] == 0


def test_without_second_waves_nothing_is_extra(world):
    found = tally_step(result(())).reduce(None, torch.device("cpu"))
    found |= {"lens/discarded_tokens": 0.0, "timing_s/score": 1e-5, "timing_s/second_wave": 0.0}
    assert extra_cost(found, purifies=False) == {"lens/extra_tokens": 0.0, "lens/extra_seconds": 0.0}
    assert found["lens/extra_rollouts"] == found["lens/destroyed_groups"] == 0


def test_resampled_prompts_have_no_deleted_token(world):
    again = PurifiedPrompt(PROMPT.token_ids, (), (0.0,) * 6)
    merged = replace_failures(replace(group("0001", "0110"), purified=again), LensConfig(), seed=0)
    found = tally_step(groups_result(merged)).reduce(None, torch.device("cpu"))
    assert found["lens/deleted_tokens"] == found["lens/score_deleted"] == 0 and found["lens/extra_rollouts"] == 4


def test_tokens_per_second():
    """1200 tokens on 2 ranks, in a step of 3 s of which the update takes 2."""
    found = time_metrics({"step": 3.0, "update_actor": 2.0}, {"perf/total_num_tokens": 1200.0}, world_size=2)
    assert found["perf/throughput"] == 200.0 and found["perf/update_tokens_per_s"] == 600.0
    assert time_metrics({}, {}, world_size=2)["perf/update_tokens_per_s"] == 0.0
