"""What each purifier deletes, by numbers worked by hand, and what is computed for it."""

from collections import Counter
from dataclasses import fields, replace
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
from chosen import method
from records import PROMPT

from lens_megatron.algorithms.entry import Entry, Evidence
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.algorithms.purification import PromptEvidence, deletion_count
from lens_megatron.algorithms.purify import purify_prompts
from lens_megatron.algorithms.registry import Kind, names
from lens_megatron.config import ConfigError, LensConfig, from_tree
from lens_megatron.phases import collect
from lens_megatron.policy.forward import PromptLogProbs
from lens_megatron.types import Prompt, PurifiedPrompt

QUARTER = LensConfig(deletion_ratio=0.25)  # PROMPT has 6 tokens, of which the 4 at places 1 to 4 are eligible
EVIDENCE = PromptEvidence(
    scores=torch.tensor([0.0, 0.1, 0.3, 0.3, 0.2, 9.0]), gradients=torch.tensor([0.0, 0.5, 0.2, 0.7, 0.2, 0.1])
)


def purified(
    name: str,
    lens: LensConfig = QUARTER,
    prompt: Prompt = PROMPT,
    evidence: PromptEvidence = EVIDENCE,
    seed: int = 0,
    **options: object,
) -> PurifiedPrompt | None:
    (found,) = purify_prompts([prompt], [evidence], method(Kind.PURIFICATION, name, **options), lens, seeds=[seed])
    return found


BOTH = Entry(lambda *arguments: None, paper="nobody", needs=frozenset(Evidence) - {Evidence.WHOLE_RESPONSES})
"""A purifier of the user's own that needs everything."""


def exact(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


@pytest.mark.parametrize(
    ("ratio", "base", "eligible", "count"),
    [
        (0.05, "eligible", 5, 1),  # algorithms.md: |x| = 5
        (0.3, "eligible", 5, 2),
        (0.07, "eligible", 100, 7),  # 7.000000000000001 in floating point
        (0.25, "full", 4, 2),  # of 6 tokens
        (0.99, "full", 4, 4),  # 6 are wanted, and 4 may go
        (0.5, "eligible", 0, 0),
    ],
)
def test_how_many_tokens_leave(ratio: float, base: str, eligible: int, count: int):
    mask = [True] * eligible + [False] * 2
    assert deletion_count(mask, LensConfig(deletion_ratio=ratio, ratio_base=base)) == count


def test_gradient_deletes_the_smallest_norms_and_keeps_the_norms():
    found = purified("gradient")
    assert found == PurifiedPrompt((1, 10, 12, 13, 2), (2,), exact(EVIDENCE.gradients))  # the tie goes to the earlier
    assert purified("gradient", LensConfig(deletion_ratio=0.5)).deleted == (2, 4)
    drawn = {
        purified("gradient", QUARTER.model_copy(update={"tie_break": "random"}), seed=s).deleted for s in range(20)
    }
    assert drawn == {(2,), (4,)}
    assert purified("gradient", evidence=replace(EVIDENCE, gradients=torch.zeros(6))).deleted == (1,)  # no noise floor


SCORED = PromptEvidence(
    log_probs=torch.tensor([0.0, -2.0, -0.5, -3.0, -0.25, -9.0]),
    reference_log_probs=torch.tensor([0.0, -2.5, -1.5, -0.75, -0.5, -1.0]),
    scores=torch.tensor([0.0, 0.5, 1.0, 2.25, 0.25, 8.0]),
)
"""Places 1 to 4 are eligible: differences .5, 1, -2.25, .25, surprisals 2, .5, 3, .25."""


@pytest.mark.parametrize(
    ("options", "scores", "one", "two"),
    [
        ({}, (0.0, 0.5, 1.0, 2.25, 0.25, 8.0), (3,), (2, 3)),
        ({"score": "signed"}, (0.0, 0.5, 1.0, -2.25, 0.25, -8.0), (2,), (1, 2)),
        ({"score": "surprisal"}, (0.0, 2.0, 0.5, 3.0, 0.25, 9.0), (3,), (1, 3)),
        # Means of (.5), (.5 1), (.5 1 2.25), (1 2.25 .25), (2.25 .25), (.25): the ends' scores do not count.
        ({"score": "smoothed"}, (0.5, 0.75, 1.25, 3.5 / 3, 1.25, 0.25), (2,), (2, 4)),
        ({"score": "smoothed", "window": 1}, (0.0, 0.5, 1.0, 2.25, 0.25, 0.0), (3,), (2, 3)),
        ({"score": "smoothed", "window": 99}, (1.0,) * 6, (1,), (1, 2)),  # ties go by position
    ],
)
def test_scores_of_interference_worked_by_hand(options: dict, scores: tuple, one: tuple, two: tuple):
    found = purified("interference", evidence=SCORED, **options)
    assert found.deleted == one and found.scores == pytest.approx(scores)
    assert purified("interference", LensConfig(deletion_ratio=0.5), evidence=SCORED, **options).deleted == two


@pytest.mark.parametrize("score", ["interference", "signed", "surprisal", "smoothed"])
def test_the_floor_and_the_eligible_rules_hold_for_every_score(score: str):
    """The highest numbers of eligible tokens are 2.25, 1, 3 and 1.25; place 5 has more and is protected."""
    highest = {"interference": 2.25, "signed": 1.0, "surprisal": 3.0, "smoothed": 1.25}[score]
    for floor, deleted in ((highest, True), (highest + 0.01, False)):
        lens = QUARTER.model_copy(update={"min_score": floor})
        assert (purified("interference", lens, evidence=SCORED, score=score) is not None) == deleted
    still = PromptEvidence(torch.zeros(6), log_probs=-torch.ones(6), reference_log_probs=-torch.ones(6))
    assert (purified("interference", evidence=still, score=score) is None) == (score != "surprisal")
    random_ties = QUARTER.model_copy(update={"tie_break": "random", "min_score": 0.0})
    assert {purified("interference", random_ties, evidence=still, score=score, seed=s).deleted for s in range(40)} == {
        (1,), (2,), (3,), (4,)
    }  # fmt: skip


def test_a_score_says_what_it_lacks_and_a_window_has_a_middle():
    for score, name in (("signed", "log_probs"), ("surprisal", "log_probs"), ("smoothed", "scores")):
        with pytest.raises(ValueError, match=f"needs the prompt's {name}, got None"):
            purified("interference", evidence=PromptEvidence(), score=score)
    with pytest.raises(ConfigError, match="options.window: 4: expected an odd number"):
        method(Kind.PURIFICATION, "interference", score="smoothed", window=4)


def test_resampling_keeps_the_prompt_and_still_wants_a_second_wave():
    assert purified("resampling") == PurifiedPrompt(PROMPT.token_ids, (), (0.0,) * 6)
    nothing_may_go = replace(PROMPT, eligible=(False,) * 6)
    assert purified("resampling", prompt=nothing_may_go).token_ids == PROMPT.token_ids

    def retokenize(token_ids: tuple[int, ...]) -> tuple[int, ...]:
        raise AssertionError("there is no deletion that tokens could merge across")

    text = LensConfig(deletion="text")
    chosen = method(Kind.PURIFICATION, "resampling")
    (found,) = purify_prompts([PROMPT], [EVIDENCE], chosen, text, seeds=[0], retokenize=retokenize)
    assert found.token_ids == PROMPT.token_ids


def test_oracle_deletes_what_is_marked_and_may_go():
    marked = replace(PROMPT, noise=(True, True, False, True, False, True))
    found = purified("oracle", prompt=marked)
    assert found == PurifiedPrompt((1, 11, 13, 2), (1, 3), (1.0, 1.0, 0.0, 1.0, 0.0, 1.0))
    assert purified("oracle") is None  # the data marks nothing
    assert purified("oracle", prompt=replace(PROMPT, noise=(True, *(False,) * 4, True))) is None


def test_random_deletes_every_set_of_as_many_tokens_equally_often():
    """6000 draws of 2 out of 4 places: each of the 6 pairs within 4 standard deviations of 1000."""
    lens = LensConfig(deletion_ratio=0.5)
    found = [purified("random", lens, seed=seed) for seed in range(6000)]
    counts = Counter(one.deleted for one in found)
    assert set(counts) == set(combinations((1, 2, 3, 4), 2))
    assert all(abs(count - 1000) < 4 * (6000 * 1 / 6 * 5 / 6) ** 0.5 for count in counts.values())
    for one in found[:50]:
        highest = sorted((1, 2, 3, 4), key=lambda place: one.scores[place])[-2:]
        assert one.deleted == tuple(sorted(highest)) and all(0 <= draw < 1 for draw in one.scores)
    assert purified("random", lens, seed=3) == purified("random", lens, seed=3)
    assert purified("random", prompt=replace(PROMPT, eligible=(False,) * 6)) is None
    assert purified("random", LensConfig(min_score=1e9)) is not None  # it has no noise floor


@pytest.mark.parametrize("base", ["eligible", "full"])
@pytest.mark.parametrize("ratio", [0.01, 0.03, 0.07, 0.1, 0.34, 0.9])
def test_all_methods_that_delete_a_share_delete_as_many(ratio: float, base: str):
    """70 of 100 tokens are eligible; a whole prompt is never deleted."""
    length, eligible = 100, tuple(10 <= place < 80 for place in range(100))
    prompt = Prompt(0, tuple(range(length)), eligible, "1", "", "toy")
    numbers = torch.rand(length, generator=torch.Generator().manual_seed(0))
    evidence, lens = PromptEvidence(numbers, numbers), LensConfig(deletion_ratio=ratio, ratio_base=base)
    found = {name: purified(name, lens, prompt, evidence) for name in ("interference", "random", "gradient")}
    assert {len(one.deleted) for one in found.values()} == {deletion_count(eligible, lens)}
    for one in found.values():
        assert all(eligible[place] for place in one.deleted) and list(one.deleted) == sorted(one.deleted)
        assert one.token_ids == tuple(t for t in prompt.token_ids if t not in one.deleted)


@pytest.mark.parametrize("name", ["interference", "gradient"])
def test_a_method_says_what_it_lacks(name: str):
    with pytest.raises(ValueError, match=f"the purifier {name} needs the prompt's"):
        purified(name, evidence=PromptEvidence())


@pytest.mark.parametrize(
    ("lens", "computed"),
    [
        ({"purifier": "interference"}, ["scores"]),
        ({"purifier": "gradient"}, ["gradients"]),
        ({"purifier": "random"}, []),
        ({"purifier": "resampling"}, []),
        ({"purifier": "oracle"}, []),
        ({"purifier": f"{__name__}:BOTH"}, ["scores", "gradients"]),
        ({"enabled": False, "purifier": "gradient"}, []),
    ],
)
def test_evidence_is_computed_once_where_it_is_needed_and_nowhere_else(
    lens: dict, computed: list[str], monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []

    def scores(policy: object, prompts: list[tuple[int, ...]], *, max_tokens: int) -> list[PromptLogProbs]:
        calls.append("scores")
        assert prompts == [PROMPT.token_ids] * 2 and max_tokens == 77
        return [PromptLogProbs(SCORED.log_probs, SCORED.reference_log_probs)] * 2

    def gradients(policy: object, pairs: list, *, max_tokens: int) -> list[torch.Tensor]:
        calls.append("gradients")
        assert pairs == [(PROMPT.token_ids, (40, 41, 42))] * 2 and max_tokens == 77  # as long as a response at most
        return [EVIDENCE.gradients] * 2

    monkeypatch.setattr(collect, "prompt_log_probs", scores)
    monkeypatch.setattr(collect, "prompt_gradients", gradients)
    sections = {"train": {"max_tokens_per_micro_batch": 77}, "rollout": {"max_response_length": 3}, "lens": lens}
    required = {
        "run": {"directory": "unused"},
        "model": {"path": "unused"},
        "data": {"train": "unused", "noise_key": "n"},
    }
    config = from_tree(required | sections)
    tokenizer = SimpleNamespace(boxed=lambda answer: (40, 41, 42, 43) if answer == "7" else ())
    run = SimpleNamespace(policy=None, methods=load_methods(config), tokenizer=tokenizer, config=config)
    found = collect._evidence(run, [PROMPT, PROMPT])
    assert calls == computed
    expected = SCORED if "scores" in computed else PromptEvidence()
    expected = replace(expected, gradients=EVIDENCE.gradients if "gradients" in computed else None)
    for evidence, field in product(found, fields(PromptEvidence)):
        value, wanted = getattr(evidence, field.name), getattr(expected, field.name)
        assert value is wanted or value.equal(wanted)


def test_every_purifier_is_tested_here():
    assert names(Kind.PURIFICATION) == ["gradient", "interference", "oracle", "random", "resampling"]
