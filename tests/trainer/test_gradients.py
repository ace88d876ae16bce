"""The head on hidden states gives what plain autograd gives on full logits, whatever the layout and the route.

`head_gradients.py` is what every rank runs. Not covered: data parallelism (test_train.py) and sequence parallelism,
whose layer norms Megatron-Core has for GPUs alone.
"""

from itertools import product

import pytest
import torch
from head_gradients import CASES
from toy_runs import ROOT, run_ranks
from transformers import Qwen3Config, Qwen3ForCausalLM

from lens_megatron.batch.pack import make_sequences
from lens_megatron.types import SequenceLayout

SIZES = {
    "vocab_size": 131,  # odd: padding under tensor parallelism
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
    "bos_token_id": None,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    for (name, tied), (role, seed) in product((("tied", True), ("untied", False)), (("", 0), ("_reference", 1))):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied))
        for parameter in model.parameters():
            values = torch.randn_like(parameter) * 0.1 if parameter.dim() > 1 else torch.rand_like(parameter)
            parameter.data = values.bfloat16().float()  # one of the cases computes in bfloat16
        model.save_pretrained(folder / f"{name}{role}")
    return [str(folder / "tied"), str(folder / "untied")]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_scores_log_probs_and_gradients_are_autograds_on_full_logits(tp: int, pp: int, models: list[str]):
    result = run_ranks(tp * pp, ROOT / "tests" / "trainer" / "head_gradients.py", str(tp), str(pp), *models)
    assert result.stdout.count("worst") == len(models) * len(CASES)


def test_sequence_parallelism_gets_rows_it_can_cut():
    """7 rows for 4 ranks: one more, as a sequence of its own. Nothing else moves."""
    pairs = [((1, 2), (3, 4, 5)), ((6,), (7,))]
    plain = make_sequences(pairs, torch.device("cpu"))
    batch = make_sequences(pairs, torch.device("cpu"), SequenceLayout(sequence_parallel_size=4))
    assert plain.bounds == (0, 5, 7) and batch.bounds == (0, 5, 7, 8)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0]]
    assert batch.positions.equal(plain.positions) and batch.target_ids.equal(plain.target_ids)


def test_context_parallel_ranks_hold_mirrored_chunks():
    """6 tokens padded to 8 in 4 chunks of 2: rank 0 holds the first and last, rank 1 those between."""
    pairs = [((10, 11, 12), (13, 14, 15))]
    first, second = (make_sequences(pairs, torch.device("cpu"), SequenceLayout(rank, 2)) for rank in (0, 1))
    assert first.input_ids.tolist() == [[10, 11, 0, 0]] and first.position_ids.tolist() == [[0, 1, 6, 7]]
    assert second.input_ids.tolist() == [[12, 13, 14, 15]] and second.position_ids.tolist() == [[2, 3, 4, 5]]
    assert first.target_ids.tolist() == [] and first.own.tolist() == []
    assert second.target_ids.tolist() == [13, 14, 15] and second.positions.tolist() == [0, 1, 2]
    assert second.own.tolist() == [0, 1, 2] and first.bounds == second.bounds == (0, 8)
