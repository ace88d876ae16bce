"""The trainer's benchmark counts right and times no wrong answer. Its seconds are nobody's business here."""

from pathlib import Path

import pytest
import torch

from benchmarks import trainer
from benchmarks.training import load, peer, roof, simulation


def test_flops_by_hand(monkeypatch: pytest.MonkeyPatch):
    """2 heads of 2, 1 key-value head, h 4, FFN 8, V 16, 1 layer; samples of 1+2 and 2+1 tokens.

    Matrices 4*(4+2*2+4) + 3*4*8 = 144, twice 6 tokens: 1728. Attention 4*4 per pair, 2*(3*4/2) pairs: 192. Head
    2*4*16 for each of 3 response tokens: 384.
    """
    shape = {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    monkeypatch.setitem(load.SHAPES, "toy", {**shape, "vocab_size": 16, "num_hidden_layers": 1})
    assert roof.forward_flops("toy", [(1, 2), (2, 1)]) == 1728 + 192 + 384


def test_length_distributions():
    assert load.lengths("constant", 2, 16) == [(2, 14)] * 2
    tail = load.lengths("tail", 4000, 4096)
    assert tail == load.lengths("tail", 4000, 4096) and max(r for _, r in tail) == 4096
    assert 0.02 < load.describe(tail)["share_at_longest"] < 0.06
    with pytest.raises(ValueError, match="kind: got 'flat', expected constant or tail"):
        load.lengths("flat", 1, 16)


def test_peers_batches_keep_the_budget_and_every_sample():
    samples = load.samples([(2, 3), (2, 6), (1, 1), (2, 2)], vocab_size=32)
    assert [len(batch) for batch in peer.batches_in_order(samples, 16)] == [2, 2]
    by_length = peer.batches_by_length(samples, 16)
    assert by_length == [[samples[1], samples[0]], [samples[3], samples[2]]]
    assert [len(batch) for batch in peer.batches_by_length(samples, 1)] == [1] * 4


def test_every_rank_samples_its_run_of_neighbours():
    samples = load.samples([(2, 3)] * 5, vocab_size=32)
    assert [len(load.split(samples, rank, 2)) for rank in range(2)] == [2, 3]
    assert sum((load.split(samples, rank, 3) for rank in range(3)), []) == samples


def test_division_of_samples_among_ranks():
    found = simulation.simulate(4000, 8)
    assert found["imbalance"] < 1.01 < found["imbalance_without_dealing"]
    assert found["fewest_of_any_rank"] <= found["micro_batches_per_rank"]
    assert found["budget_left_empty"] < 0.05 < found["padding_waste_if_padded_to_the_longest"]


def _rank(update: list[float], waste: float) -> dict:
    rounds = [{"seconds": {"ref": 1.0, "update_actor": s}, "cpu_seconds": {"update_actor": 2.0}} for s in update]
    rows = {"kind": "constant", "limit": 8, "budget": 8, "first_loss_and_gradient_norm": {}, "wrong": []}
    return {
        **rows,
        "name": "case",
        "lengths": {"tokens": 1200},
        "forward_flops": 4e9,
        "rounds": {"ours": rounds},
        "gemm_flops_per_s": [(4e9, 4e9)] * len(update),
        "padding_waste": {"ours": waste},
        "imbalance": {"ours": 1.5},
    }


def test_a_round_takes_as_long_as_its_slowest_rank():
    """Two ranks: updates of 3 and 5 s, the slower each round; 1200 tokens in 1 + 3 and 1 + 5 s.

    Update MFU: 12 GFLOP / 3 or 5 s / 2 ranks / 4 GFLOP/s.
    """
    found = trainer.summarise([_rank([3.0, 4.0], 0.1), _rank([2.0, 5.0], 0.3)])["sides"]["ours"]
    assert found["seconds"]["update_actor"] == {"median": 4.0, "least": 3.0, "most": 5.0}
    assert found["tokens_per_s"] == {"median": 250.0, "least": 200.0, "most": 300.0}
    assert found["mfu"]["update_actor"] == {"median": 0.4, "least": 0.3, "most": 0.5}
    assert found["mfu_per_cpu_second"]["median"] == 1.0  # 16 GFLOP, 2 CPU seconds on each rank, 4 GFLOP/s
    assert found["padding_waste"] == 0.2 and found["imbalance"] == 1.5


def test_speed_is_compared_round_by_round():
    seconds = {"ours": [1.0, 2.0, 4.0], "transformers": [3.0, 4.0, 4.0]}
    rounds = {
        name: [{"seconds": {"a": s}, "cpu_seconds": {"a": 1.0}} for s in values] for name, values in seconds.items()
    }
    found = trainer.compare(rounds)
    assert found["transformers"]["seconds"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert "ours" not in found and trainer.compare({"ours": rounds["ours"]}) == {}


@pytest.mark.slow
def test_transformers_do_the_same_update(tmp_path: Path):
    """Loss and gradient norm, to 1e-4, on the real trainer: else the benchmark would time nothing."""
    model = load.save_models(tmp_path, "cpu", torch.float32)
    spec = {"model": str(model), "shape": "cpu", "dtype": "float32", "megatron": {}, "rounds": 1}
    cases = [trainer.case("tail", "tail", 16, 128, 800)]
    found = trainer.measure({**spec, "sides": ["ours", *trainer.TRANSFORMERS], "cases": cases})[0]
    assert found["wrong"] == [] and set(found["sides"]) == {"ours", *trainer.TRANSFORMERS}
