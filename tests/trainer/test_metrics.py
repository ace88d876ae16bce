"""Metrics of packing and speed, worked by hand. What groups say is checked in test_train.py, on real runs."""

import pytest
import torch
from records import rollout, sample, training_rows

from lens_megatron.batch import pack
from lens_megatron.config import AlgorithmConfig
from lens_megatron.output.metrics import tally_step, time_metrics
from lens_megatron.results import Packing, SamplingStats, StepResult, SyncStats
from lens_megatron.types import SequenceLayout


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


def test_tokens_per_second():
    """1200 tokens on 2 ranks, in a step of 3 s of which the update takes 2."""
    found = time_metrics({"step": 3.0, "update_actor": 2.0}, {"perf/total_num_tokens": 1200.0}, world_size=2)
    assert found["perf/throughput"] == 200.0 and found["perf/update_tokens_per_s"] == 600.0
    assert time_metrics({}, {}, world_size=2)["perf/update_tokens_per_s"] == 0.0
