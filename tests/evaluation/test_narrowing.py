"""Top-k, top-p and self-certainty by hand, and as the local engine samples with them."""

import math

import pytest
import torch
from toy_runs import Toy
from transformers import AutoModelForCausalLM

from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.narrowing import certainty, narrowed

PROMPT = (5, 17, 9)


@pytest.mark.parametrize(
    "top_p, top_k, expected",
    [
        (1.0, 0, [0.5, 0.05, 0.3, 0.15]),
        (0.75, 0, [0.625, 0, 0.375, 0]),
        (0.81, 0, [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95]),
        (0.01, 0, [1, 0, 0, 0]),
        (1.0, 2, [0.625, 0, 0.375, 0]),
        (0.6, 3, [0.625, 0, 0.375, 0]),  # top-k leaves .526 .316 .158, of which the first two make up .6
        (1.0, 9, [0.5, 0.05, 0.3, 0.15]),
    ],
)
def test_narrowing_by_hand(top_p: float, top_k: int, expected: list[float]):
    log_probs = torch.tensor([[0.5, 0.05, 0.3, 0.15]] * 2).log()
    found = narrowed(log_probs, torch.tensor([top_p, 1.0]), torch.tensor([top_k, 1]))
    torch.testing.assert_close(found.exp(), torch.tensor([expected, [1.0, 0, 0, 0]]))


def test_equal_probabilities_are_kept_in_the_order_of_their_ids():
    found = narrowed(torch.full((1, 4), 0.25).log(), torch.tensor([1.0]), torch.tensor([2]))
    torch.testing.assert_close(found.exp(), torch.tensor([[0.5, 0.5, 0, 0]]))


def test_certainty_by_hand():
    """Uniform: 0. For (1/2, 1/4, 1/8, 1/8): mean log = -(1+2+3+3)/4 ln 2, less ln 4, leaves ln 2 / 4."""
    log_probs = torch.tensor([[0.25] * 4, [0.5, 0.25, 0.125, 0.125]]).log()
    torch.testing.assert_close(certainty(log_probs), torch.tensor([0.0, math.log(2) / 4]), atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def engine(toy: Toy) -> LocalEngine:
    made = LocalEngine(str(toy.model), max_running_sequences=8)
    model = AutoModelForCausalLM.from_pretrained(toy.model)
    made.load_weights(((name, parameter.data) for name, parameter in model.named_parameters()), 0)
    return made


def run(engine: LocalEngine, *requests: Request) -> dict[int, Completion]:
    engine.submit(requests)
    done: dict[int, Completion] = {}
    while len(done) < len(requests):
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


def test_the_engine_draws_from_what_is_left(engine: LocalEngine, toy: Toy):
    model = AutoModelForCausalLM.from_pretrained(toy.model).eval()
    done = run(engine, *(Request(i, PROMPT, 1, 1.0, seed=i, top_k=3) for i in range(60)))
    with torch.no_grad():
        log_probs = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    best = log_probs.topk(3)
    expected = dict(zip(best.indices.tolist(), best.values.log_softmax(-1).tolist(), strict=True))
    assert {c.token_ids[0] for c in done.values()} == set(expected)
    for completion in done.values():  # the log-probability is that of the narrowed distribution
        assert completion.log_probs[0] == pytest.approx(expected[completion.token_ids[0]], abs=1e-5)


def test_one_token_left_is_greedy_and_others_are_not_touched(engine: LocalEngine):
    plain, crowd = Request(0, PROMPT, 8, 1.0, seed=4), Request(3, PROMPT, 8, 1.0, seed=4)
    alone = run(engine, plain)[0]
    done = run(engine, crowd, Request(1, PROMPT, 8, 1.0, 1, top_k=1), Request(2, PROMPT, 8, 0.0, 1))
    assert done[1].token_ids == done[2].token_ids and set(done[1].log_probs) == {0.0}
    assert done[3].token_ids == alone.token_ids and done[3].log_probs == pytest.approx(alone.log_probs, abs=1e-5)


def test_stop_tokens_end_a_completion(engine: LocalEngine):
    whole = run(engine, Request(0, PROMPT, 8, 0.0, 0))[0]
    third = whole.token_ids[2]
    cut = run(engine, Request(0, PROMPT, 8, 0.0, 0, stop=(third,)))[0]
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(third) + 1] and cut.finished


def test_the_engine_reports_certainty_at_temperature_1(engine: LocalEngine, toy: Toy):
    done = run(engine, Request(0, PROMPT, 5, 0.5, 3, certainty=True), Request(1, PROMPT, 5, 0.5, 3))
    model = AutoModelForCausalLM.from_pretrained(toy.model).eval()
    tokens = torch.tensor([PROMPT + done[0].token_ids])
    with torch.no_grad():
        log_probs = model(tokens).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    expected = (-log_probs.mean(-1) - math.log(log_probs.shape[-1])).mean().item()
    assert done[0].certainty == pytest.approx(expected, abs=1e-4) and done[1].certainty is None


@pytest.mark.parametrize("narrowing", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_impossible_narrowings_are_refused(engine: LocalEngine, narrowing: dict):
    with pytest.raises(ValueError, match="give a top_p above 0 and at most 1"):
        engine.submit([Request(0, PROMPT, 1, 1.0, 0, **narrowing)])
