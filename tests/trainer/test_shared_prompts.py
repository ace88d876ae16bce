"""Rollouts of one prompt share its rows: what is packed, which samples stay together, and that nothing else changes.

Whole updates under every layout, with prompts shared and not, are in test_layouts.py.
"""

from pathlib import Path

import pytest
import torch
from test_policy import policy_of, saved_model, tree

from lens_megatron.batch import bundles
from lens_megatron.batch.balance import cost
from lens_megatron.batch.bundles import Bundle, SampleSize
from lens_megatron.batch.pack import make_sequences
from lens_megatron.config import ConfigError, from_tree
from lens_megatron.policy.forward import micro_batches, prompt_scores, response_log_probs
from lens_megatron.policy.layers import packed_sequences
from lens_megatron.policy.model import Policy
from lens_megatron.policy.parallel import Mesh
from lens_megatron.types import SequenceLayout

SHARING = SequenceLayout(shares_prompts=True)
PAIRS = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6,)), ((1, 2, 3), (7, 8, 9)), ((1, 2), (3, 4))]


def test_a_prompt_has_its_rows_once():
    batch = make_sequences(PAIRS, torch.device("cpu"), SHARING)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 2, 3]]
    assert batch.bounds == (0, 5, 6, 9, 13)
    assert batch.prefixes == ((0, 0), (0, 3), (0, 3), (0, 0))
    assert batch.target_ids.tolist() == [4, 5, 6, 7, 8, 9, 3, 4]
    assert batch.positions.tolist() == [2, 3, 2, 2, 6, 7, 10, 11]  # the prompt's last row predicts three first tokens
    assert batch.lengths == (2, 1, 3, 2) and batch.tokens == 13 and batch.own is None
    packed = packed_sequences(batch, 0, 1)
    assert packed.key_rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 2, 6, 7, 8, 9, 10, 11, 12]
    assert packed.segments == ((0, 5, 0, 5), (5, 6, 5, 9), (6, 9, 9, 15), (9, 13, 15, 19))
    assert [ends.tolist() for ends in packed.run_bounds] == [[0, 5, 6, 9, 13], [0, 5, 9, 15, 19]]
    assert packed.max_seqlen_q == 6  # the longest prompt with its response, for the table of rotary embeddings


def test_padding_is_a_sequence_of_its_own():
    layout = SequenceLayout(sequence_parallel_size=4, shares_prompts=True)
    batch = make_sequences(PAIRS[:2], torch.device("cpu"), layout)
    assert batch.bounds == (0, 5, 6, 8) and batch.prefixes == ((0, 0), (0, 3), (0, 0)) and batch.tokens == 6
    assert packed_sequences(batch, 0, 1).key_rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]


def test_without_equal_prompts_nothing_changes():
    pairs = [PAIRS[0], PAIRS[3], PAIRS[1]]  # equal ones do not follow each other
    plain = make_sequences(pairs, torch.device("cpu"))
    sharing = make_sequences(pairs, torch.device("cpu"), SHARING)
    for name in ("input_ids", "position_ids", "target_ids", "positions"):
        assert getattr(sharing, name).equal(getattr(plain, name))
    assert sharing.bounds == plain.bounds and sharing.prefixes == () and sharing.tokens == plain.tokens
    assert packed_sequences(sharing, 0, 1).key_rows is None


def test_bundles_worked_by_hand():
    """Prompt a of 10 tokens with responses of 4, 3 and 5, b of 2 with 6: with 18 tokens a bundle takes two of a's."""
    sizes = [SampleSize("a", 10, 4), SampleSize("b", 2, 6), SampleSize("a", 10, 3), SampleSize("a", 10, 5)]
    together, alone = bundles.by_prompt(sizes, 1), bundles.single(sizes, 1)
    assert [(bundle.members, bundle.tokens) for bundle in together] == [((0, 2, 3), 22), ((1,), 8)]
    assert together[0].cost == cost(10, 1) + sum(cost(10 + n, 1) - cost(10, 1) for n in (4, 3, 5)) == 918
    assert alone == [Bundle((i,), n, cost(n, 1)) for i, n in enumerate((14, 8, 13, 15))]
    assert [b.members for b in bundles.by_prompt(sizes, 1, max_tokens=18)] == [(0, 2), (3,), (1,)]
    assert [b.members for b in bundles.by_prompt(sizes, 1, max_cost=cost(14, 1))] == [(0,), (2,), (3,), (1,)]
    assert [b.members for b in bundles.by_prompt(sizes, 1, max_tokens=1)] == [(0,), (2,), (3,), (1,)]
    assert bundles.by_prompt([], 1) == []


def pairs_of_groups() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for prompt, responses in ((9, (1, 4, 12)), (3, (7,)), (20, (5, 2, 6, 9))):
        ids = tuple(torch.randint(3, 120, (prompt,), generator=generator).tolist())
        made += [(ids, tuple(torch.randint(3, 120, (n,), generator=generator).tolist())) for n in responses]
    return made[::2] + made[1::2]  # those of a prompt do not stand together


def policies(family: str, folder: Path, mesh: Mesh) -> list[Policy]:
    saved_model(family, True, folder)
    return [policy_of(folder, mesh, train={"share_prompts": sharing}) for sharing in (True, False)]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama", "llama_linear_rope"])
def test_log_probs_are_those_of_whole_sequences(family: str, mesh: Mesh, tmp_path: Path):
    sharing, plain = policies(family, tmp_path, mesh)
    pairs = pairs_of_groups()
    for max_tokens in (10**6, 40, 1):
        found, expected = (
            response_log_probs(policy, pairs, max_tokens=max_tokens, temperature=0.8) for policy in (sharing, plain)
        )
        for value, wanted in zip(found, expected, strict=True):
            assert (value - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    scores = [prompt_scores(policy, [prompt for prompt, _ in pairs], max_tokens=100) for policy in (sharing, plain)]
    assert all(a.equal(b) for a, b in zip(*scores, strict=True))  # every prompt has its own rows there
    rows = [make_sequences([pairs[i] for i in part], mesh.device, policy.layout).bounds[-1]
            for policy in (sharing, plain) for part in micro_batches(policy, pairs, 10**6)]  # fmt: skip
    assert rows == [9 + 17 + 10 + 20 + 22, 3 * 9 + 17 + 10 + 4 * 20 + 22]


def test_a_cpu_shares_by_default_and_context_parallelism_cannot(mesh: Mesh, tmp_path: Path):
    saved_model("qwen3", True, tmp_path)
    assert policy_of(tmp_path, mesh).layout.shares_prompts
    with pytest.raises(ConfigError, match=r"train.share_prompts=true and megatron.context_parallel_size \(2\)"):
        from_tree(tree("unused", train={"share_prompts": True}, megatron={"context_parallel_size": 2}))
