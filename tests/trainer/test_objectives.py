"""Surrogates: numbers worked by hand, what holds for all of them, and their way through the LM head.

That they equal verl's and TRL's is in tests/oracles; the clip's own numbers are in test_algorithms.py.
"""

import math

import pytest
import torch
from chosen import method, objective
from lens_kernels import linear_policy_loss
from records import rollout, sample, training_rows
from torch import Tensor

from lens_megatron.algorithms import registry
from lens_megatron.algorithms.entry import Evidence, Method, NoOptions
from lens_megatron.algorithms.objectives import SurrogateResult
from lens_megatron.algorithms.policy_objective import policy_objective
from lens_megatron.algorithms.registry import Kind
from lens_megatron.batch import pack
from lens_megatron.config import AlgorithmConfig, ConfigError
from lens_megatron.types import MicroBatch

EVERY = registry.names(Kind.OBJECTIVES)
RATIOS = ["token", "sequence", "sequence_geometric"]
NEW, OLD = torch.tensor([-0.5, -2.0, -0.1]), torch.tensor([-0.6, -1.2, -0.1])
"""The rescued row of the worked example: ratios 1.105171, .449329 and 1, whose geometric mean is .791890."""


def packed(responses: list[tuple[float, float, Tensor | None]], algorithm: AlgorithmConfig, tokens: int) -> MicroBatch:
    """Responses of equal length: advantage, weight and old log-probabilities of each."""
    rows = [sample(rollout(True, tokens=(1, 2, 0)[:tokens]), a, w) for a, w, _ in responses]
    (batch,) = pack.pack(
        training_rows(rows, [old for *_, old in responses], [torch.full((tokens,), -1.0)] * len(rows)),
        scale=pack.count(rows),
        algorithm=algorithm,
        max_response_length=4,
        parts=[range(len(rows))],
        device=torch.device("cpu"),
    )
    return batch


def at_ratios(name: str, ratios: list[float], advantage: float, **options: float) -> tuple[list, list, list]:
    """Losses of tokens with these ratios, their gradients by log p divided by the ratio, and what is clipped."""
    algorithm = AlgorithmConfig(objective=name)
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    terms = packed([(advantage, 1.0, None)] * len(ratios), algorithm, tokens=1).terms
    chosen = method(Kind.OBJECTIVES, name, **options)
    found = chosen.call(log_ratio, log_ratio - 1.5, terms, algorithm, chosen.options)
    (gradient,) = torch.autograd.grad(found.losses.sum(), log_ratio)
    return found.losses.tolist(), (gradient / log_ratio.detach().exp()).tolist(), found.clipped.tolist()


def loss_of(name: str, log_probs: Tensor, batch: MicroBatch, algorithm: AlgorithmConfig) -> Tensor:
    entropy = torch.zeros_like(log_probs)
    return objective(algorithm).losses(log_probs, entropy, batch.terms, algorithm).losses.sum()


def test_sapo_worked():
    # f(1) = 2, f(1.5) = 2.489837, f(.5) = 1.510163 for tau = 1; slopes 4 p (1 - p) with p = sigmoid(tau (rho - 1)).
    losses, slopes, clipped = at_ratios("sapo", [1.0, 1.5, 0.5], advantage=1.0)
    assert losses == pytest.approx([-2.0, -2.489837, -1.510163], abs=1e-6)
    assert slopes == pytest.approx([-1.0, -0.940015, -0.940015], abs=1e-6) and clipped == [0.0] * 3
    # tau = 1.05 for negative advantages: f(1) = 1.904762, f(1.5) = 2.393585, with p = sigmoid(.525) = .628316.
    losses, slopes, _ = at_ratios("sapo", [1.0, 1.5], advantage=-1.0)
    assert losses == pytest.approx([1.904762, 2.393585], abs=1e-6)
    assert slopes == pytest.approx([1.0, 0.934140], abs=1e-6)


def test_sapos_temperatures_are_options():
    # tau = 2 at rho = 1.5: p = sigmoid(1) = .731059, f = 2 p, slope 4 p (1 - p) = .786448.
    losses, slopes, _ = at_ratios("sapo", [1.5], advantage=3.0, tau_positive=2.0)
    assert losses == pytest.approx([-3 * 1.462117], abs=1e-5) and slopes == pytest.approx([-3 * 0.786448], abs=1e-5)
    assert at_ratios("sapo", [1.5], advantage=-3.0, tau_negative=2.0)[0] == pytest.approx([3 * 1.462117], abs=1e-5)


def test_cispo_worked():
    # Coefficients of grad log p with a cap of 1.2: rho = 1.5 -> 1.2, rho = .5 -> .5; the gradient is that / rho here.
    _, slopes, clipped = at_ratios("cispo", [1.5, 0.5, 1.0], advantage=1.0, highest_ratio=1.2)
    assert slopes == pytest.approx([-1.2 / 1.5, -0.5 / 0.5, -1.0], abs=1e-6) and clipped == [1.0, 0.0, 0.0]
    _, slopes, clipped = at_ratios("cispo", [1.5], advantage=-1.0, highest_ratio=1.2)
    assert slopes == pytest.approx([1.2 / 1.5], abs=1e-6) and clipped == [1.0]
    losses, slopes, clipped = at_ratios("cispo", [0.5], advantage=2.0, lowest_ratio=0.8)
    assert losses == pytest.approx([-0.8 * 2.0 * (math.log(0.5) - 1.5)], abs=1e-6)
    assert slopes == pytest.approx([-0.8 * 2.0 / 0.5], abs=1e-6) and clipped == [1.0]


@pytest.mark.parametrize("form", RATIOS)
@pytest.mark.parametrize("name", EVERY)
def test_the_first_step_on_fresh_samples_is_the_policy_gradient(name: str, form: str):
    """On-policy, the gradient by log p of a token is minus its weight times its advantage, whatever the method."""
    algorithm = AlgorithmConfig(objective=name, ratio=form, kl_coef=0.0, aggregation="seq-mean-token-sum")
    batch = packed([(1.5, 0.5, None), (-0.5, 1.0, None)], algorithm, tokens=3)
    log_probs = torch.linspace(-2, -0.5, 6).requires_grad_()
    loss_of(name, log_probs, batch, algorithm).backward()
    # With a product of ratios, each of a response's three tokens carries the response.
    times = 3 if form == "sequence" and name != "cispo" else 1
    assert log_probs.grad.tolist() == pytest.approx([-0.375 * times] * 3 + [0.25 * times] * 3, rel=1e-5)


@pytest.mark.parametrize("form", RATIOS)
@pytest.mark.parametrize("name", EVERY)
def test_ratios_that_overflow_leave_losses_and_gradients_finite(name: str, form: str):
    algorithm = AlgorithmConfig(objective=name, ratio=form, kl_coef=0.1)
    for shift, advantage in ((1e4, 1.0), (1e4, -1.0), (-1e4, 1.0), (-1e4, -1.0), (90.0, -1.0)):
        batch = packed([(advantage, 1.0, torch.full((3,), -1.0 - shift))], algorithm, tokens=3)
        log_probs = torch.full((3,), -1.0, requires_grad=True)
        loss = loss_of(name, log_probs, batch, algorithm)
        loss.backward()
        assert loss.isfinite() and log_probs.grad.isfinite().all()


@pytest.mark.parametrize("form", ["sequence", "sequence_geometric"])
def test_sapo_of_a_whole_response(form: str):
    algorithm = AlgorithmConfig(objective="sapo", ratio=form, kl_coef=0.0)
    ratio, share = (0.496585, 1.0) if form == "sequence" else (0.791890, 1 / 3)
    log_probs = NEW.clone().requires_grad_()
    loss = loss_of("sapo", log_probs, packed([(2.0, 1.0, OLD)], algorithm, tokens=3), algorithm)
    loss.backward()
    p = 1 / (1 + math.exp(1 - ratio))
    assert loss.item() == pytest.approx(-2 * 4 * p, abs=1e-5)
    assert log_probs.grad.tolist() == pytest.approx([-2 * 4 * p * (1 - p) * ratio * share] * 3, abs=1e-5)


def test_cispo_of_a_whole_response():
    """Every token's log p has the ratio of the response as its weight."""
    algorithm = AlgorithmConfig(objective="cispo", ratio="sequence_geometric", kl_coef=0.0)
    log_probs = NEW.clone().requires_grad_()
    loss = loss_of("cispo", log_probs, packed([(2.0, 1.0, OLD)], algorithm, tokens=3), algorithm)
    loss.backward()
    assert loss.item() == pytest.approx(-2 * 0.791890 * -2.6 / 3, abs=1e-5)
    assert log_probs.grad.tolist() == pytest.approx([-2 * 0.791890 / 3] * 3, abs=1e-5)


def test_a_surrogate_whose_tokens_depend_on_each_other_gets_whole_responses():
    def mean_log_prob(log_ratio, log_probs, terms, algorithm, options):
        total = torch.zeros_like(log_probs).index_add(0, terms.first, log_probs)[terms.first]
        return SurrogateResult(-terms.advantages * total / 3, torch.zeros_like(log_probs))

    algorithm = AlgorithmConfig(kl_coef=0.0)
    needs = frozenset({Evidence.WHOLE_RESPONSES})
    chosen = policy_objective(algorithm, Method("mean_log_prob", mean_log_prob, NoOptions(), needs))
    assert chosen.whole_sequences and chosen.fused is None
    terms = packed([(1.0, 1.0, None), (2.0, 1.0, None)], algorithm, tokens=3).terms
    found = chosen.losses(torch.cat([NEW, OLD]), torch.zeros(6), terms, algorithm)
    assert found.losses.tolist() == pytest.approx([2.6 / 18] * 3 + [2 * 1.9 / 18] * 3)


def test_a_mean_in_the_place_of_losses_is_refused():
    def mean(log_ratio, log_probs, terms, algorithm, options):
        return SurrogateResult(-(terms.advantages * log_ratio).mean(), torch.zeros_like(log_probs))

    algorithm = AlgorithmConfig()
    chosen = policy_objective(algorithm, Method("mine:ENTRY", mean, NoOptions()))
    terms = packed([(1.0, 1.0, OLD)], algorithm, tokens=3).terms
    with pytest.raises(ConfigError, match=r"algorithm.objective=mine:ENTRY returned losses of shape \[\] .* 3 tokens"):
        chosen.losses(NEW, torch.zeros(3), terms, algorithm)


@pytest.mark.parametrize("name", ["sapo", "cispo"])
def test_ppos_clips_do_not_reach_other_surrogates(name: str):
    responses = [(1.0, 1.0, OLD), (-1.0, 1.0, OLD - 2)]
    found = []
    for clips in ({}, {"clip_low": 0.01, "clip_high": 0.01, "dual_clip": 1.1}):
        algorithm = AlgorithmConfig(objective=name, **clips)
        assert objective(algorithm).fused is None and not objective(algorithm).whole_sequences
        found.append(loss_of(name, torch.cat([NEW, NEW]), packed(responses, algorithm, tokens=3), algorithm))
    assert found[0].equal(found[1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sapo", {"tau_positive": 0}, "options.tau_positive: 0: .*greater than 0"),
        ("cispo", {"highest_ratio": 0.5}, "options.highest_ratio: 0.5: .*greater than or equal to 1"),
        ("cispo", {"epsilon_high": 5}, "(?s)unknown option options.epsilon_high.*lowest_ratio, highest_ratio"),
    ],
)
def test_options_out_of_bounds_are_refused(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        method(Kind.OBJECTIVES, name, **options)


@pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of CPU"))],
)
@pytest.mark.parametrize("name", EVERY)
def test_the_head_differentiates_a_surrogate_chunk_by_chunk(name: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    """Beside autograd on whole logits in float64; chunks of 5 rows cut two of four responses."""
    monkeypatch.setenv("LENS_KERNELS_BACKEND", backend)
    algorithm = AlgorithmConfig(objective=name, kl_coef=0.2, entropy_coef=0.1, imitation_coef=0.05)
    responses = [(1.2, 0.5, OLD), (-0.7, 1.0, OLD - 1), (2.0, 1.0, None), (-2.0, 1.0, OLD + 1)]
    batch = packed(responses, algorithm, tokens=3)
    ids, chosen = batch.sequences.target_ids, objective(algorithm)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 4, generator=generator), torch.randn(3, 4, generator=generator)

    def losses(log_probs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        return chosen.losses(log_probs, entropy, batch.terms.at(part), algorithm).losses

    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    found = linear_policy_loss(h, w, ids, objective=losses, chunk_rows=5)
    found.loss.backward()

    exact_h, exact_w = (x.double().requires_grad_() for x in (hidden, weight))
    all_log_probs = (exact_h @ exact_w.T).log_softmax(-1)
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
    expected = losses(all_log_probs.gather(1, ids[:, None])[:, 0], entropy, slice(0, 12)).sum()
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, exact in ((h.grad, exact_h.grad), (w.grad, exact_w.grad)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
