"""What the rollout files say of a group, from a group made by hand."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import records

from lens_megatron.algorithms.rescue import replace_failures
from lens_megatron.config import LensConfig
from lens_megatron.data.tokenizer import Tokenizer
from lens_megatron.output.rollout_files import rollout_lines
from lens_megatron.results import SamplingStats, StepResult
from lens_megatron.tools.demo.problems import stream
from lens_megatron.tools.demo.tokenizer import train_tokenizer
from lens_megatron.types import Prompt, PurifiedPrompt, Sample, TrainingGroup


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(p.problem for p in islice(stream("train", 0, {1: 1}), 50)))


def result(*groups: TrainingGroup) -> StepResult:
    samples = [Sample((), (), rollout, 0.5, 1.0) for group in groups for rollout in group.rollouts]
    return StepResult(1, groups, tuple(samples), (), (), None, SamplingStats(), 0)


def rows(tokenizer: Tokenizer, *groups: TrainingGroup) -> list[dict]:
    return [json.loads(line) for line in rollout_lines(result(*groups), tokenizer, 1)]


def test_a_group_is_described_once_with_deleted_tokens_noise_and_what_was_left_out(tokenizer: Tokenizer):
    ids = tuple(tokenizer.hf.encode("Tom has 9 nuts (see page 7)."))
    texts = [tokenizer.decode_all([token]) for token in ids]
    seven = texts.index("7")
    noise = tuple(place >= seven - 1 for place in range(len(texts)))
    prompt = Prompt(3, ids, tuple(place > 0 for place in range(len(texts))), "9", "", "toy", noise)
    purified = PurifiedPrompt(ids[:seven] + ids[seven + 1 :], (seven,), tuple(place / 3 for place in range(len(texts))))
    group = replace(records.group("0010", "0101", prompt), purified=purified, place=6)
    merged = replace_failures(group, LensConfig(), seed=0)
    single = records.group("10", prompt=prompt)
    first, *others = rows(tokenizer, merged, TrainingGroup(single, single.native, gate=False))
    shared = first["group"]
    assert "".join(shared["prompt_tokens"]) == first["prompt"] and shared["prompt_tokens"] == texts
    marked = list(range(seven - 1, len(texts)))
    assert (shared["deleted"], shared["noise"], shared["sampled_again"]) == ([seven], marked, True)
    assert shared["scores"][:3] == [0.0, 0.3333, 0.6667] and shared["eligible"][:2] == [False, True]
    # Two of three failures leave for the two successes of the second wave, whose two failures stay out as well.
    assert [(r["origin"], r["status"]) for r in shared["left_out"]] == 2 * [("native", "wrong")] + 2 * [
        ("purified", "wrong")
    ]
    assert [row["place"] for row in (first, *others)] == 4 * [6] + 2 * [0]
    assert ["group" in row for row in others] == [False, False, False, True, False]
    alone = others[3]["group"]
    assert (alone["scores"], alone["deleted"], alone["sampled_again"], alone["left_out"]) == (None, [], False, [])


def test_texts_of_tokens_join_to_the_text_where_characters_take_several_tokens(tokenizer: Tokenizer):
    text = "Tom has 9 € and 漢字 🙂, too."
    ids = tokenizer.hf.encode(text)
    texts = tokenizer.decode_each(ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert not any("\ufffd" in shown for shown in texts) and all(char in texts for char in "€漢字🙂")
    euro = tokenizer.hf.encode("€")
    assert len(euro) == 3 and tokenizer.decode_each(euro) == ["", "", "€"]
    broken = [*euro[:2], *ids, *tokenizer.hf.encode("\ufffd"), *euro[:1]]
    assert "".join(tokenizer.decode_each(broken)) == tokenizer.decode_all(broken)
    assert tokenizer.decode_each([]) == []
