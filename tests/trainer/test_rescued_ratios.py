"""What the cross-prompt ratio does to rescued responses, and the forms of the loss that keep more of their gradient.

Numbers are worked by hand from the reference's rescued row, or come from autograd on whole logits in float64. That the
metrics do not depend on the layout is in test_layouts.py.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from chosen import objective
from lens_kernels import linear_policy_loss
from records import PROMPT, rollout, sample, training_rows
from torch import Tensor

from lens_megatron.algorithms import registry
from lens_megatron.algorithms.policy_objective import generation_log_ratio
from lens_megatron.algorithms.registry import Kind
from lens_megatron.batch import pack
from lens_megatron.config import AlgorithmConfig, Config, from_tree
from lens_megatron.output.metrics import rescued_metrics
from lens_megatron.phases import update
from lens_megatron.policy.rescued_ratios import gather_rescued, response_ratios
from lens_megatron.results import RescuedRatios
from lens_megatron.types import MicroBatch, Origin, Sample

REQUIRED = {"run": {"directory": "r"}, "model": {"path": "m"}, "data": {"train": "t"}}
NEW, OLD = torch.tensor([-0.5, -2.0, -0.1]), torch.tensor([-0.6, -1.2, -0.1])
"""The rescued row of the worked example: rho = 1.105171, .449329 and 1."""
A, W = 0.904534, 0.75
"""Its advantage and its weight w~; w~ A / 3 = .2261335."""
SHARE = W * A / 3
FORMS = {
    "literal": {},
    "imitation": {"imitation_coef": 0.3},
    "floor": {"rescued_ratio_floor": 0.5},
    "original prompt": {"rescued_ratio": "original_prompt"},
    "acl": {"ratio_form": "acl"},
}


def options(**others: object) -> AlgorithmConfig:
    return AlgorithmConfig(**({"aggregation": "seq-mean-token-mean", "kl_coef": 0.0} | others))


def micro_batch(rows: list[Sample], old: list[Tensor | None], algorithm: AlgorithmConfig) -> MicroBatch:
    (batch,) = pack.pack(
        training_rows(rows, old, [torch.full((len(row.rollout.token_ids),), -1.0) for row in rows]),
        scale=pack.count(rows),
        algorithm=algorithm,
        max_response_length=3,
        parts=[range(len(rows))],
        device=torch.device("cpu"),
    )
    return batch


def rescued(advantage: float = A, weight: float = W, tokens: tuple[int, ...] = (1, 2, 0)) -> Sample:
    return sample(rollout(True, Origin.PURIFIED, tokens), advantage, weight)


def loss_and_gradient(algorithm: AlgorithmConfig, row: Sample, old: Tensor | None) -> tuple[float, list[float]]:
    log_probs = NEW.clone().requires_grad_()
    terms = micro_batch([row], [old], algorithm).terms
    loss = objective(algorithm).losses(log_probs, torch.zeros(3), terms, algorithm).losses.sum()
    loss.backward()
    return loss.item(), log_probs.grad.tolist()


# ---- the forms, forward and backward --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "loss", "gradient"),
    [
        # -.2261335 x (1.105171 + .449329 + 1), and the same terms by token
        ("literal", -0.577658, [-SHARE * 1.105171, -SHARE * 0.449329, -SHARE]),
        # plus .3 x 2.6 / 3, whose derivative is -.1 at each token
        ("imitation", -0.577658 + 0.26, [-SHARE * 1.105171 - 0.1, -SHARE * 0.449329 - 0.1, -SHARE - 0.1]),
        # the second ratio counts as .5: -.2261335 x 2.605171
        ("floor", -0.589117, [-SHARE * 1.105171, -SHARE * 0.5, -SHARE]),
        # w~ divides the ratio and no longer multiplies the loss: 1.473561, .599106, 1.333333, of which the first and
        # the last are beyond 1.2 and have no gradient: -.301511 x (1.2 + .599106 + 1.2)
        ("acl", -A / 3 * 2.999106, [0.0, -A / 3 * 0.599106, 0.0]),
    ],
)
def test_the_worked_row_under_every_form(form: str, loss: float, gradient: list[float]):
    found = loss_and_gradient(options(**FORMS[form]), rescued(), OLD)
    assert found[0] == pytest.approx(loss, abs=1e-5) and found[1] == pytest.approx(gradient, abs=1e-6)


def test_against_the_original_prompt_the_first_update_has_the_gradient_of_log_pi():
    """The row is on-policy, so its old log-probabilities are None: -.2261335 at each token, and a loss of -w~ A."""
    found = loss_and_gradient(options(**FORMS["original prompt"]), rescued(), None)
    assert found[0] == pytest.approx(-W * A, abs=1e-6) and found[1] == pytest.approx([-SHARE] * 3, abs=1e-6)


def test_later_updates_against_the_original_prompt_have_the_ordinary_ratio():
    """log pi_old(y | x) = -.55, -2.4, -.1: ratios 1.051271, 1.491825 and 1, of which the second is clipped at 1.2."""
    old = torch.tensor([-0.55, -2.4, -0.1])
    found = loss_and_gradient(options(**FORMS["original prompt"]), rescued(), old)
    assert found[0] == pytest.approx(-SHARE * (1.051271 + 1.2 + 1), abs=1e-6)
    assert found[1] == pytest.approx([-SHARE * 1.051271, 0.0, -SHARE], abs=1e-6)


def test_the_floor_is_the_bounded_weight_times_the_gradient_of_log_pi():
    """As CISPO's loss with a lower bound has it, wherever PPO's upper clip does not hold; there it still does."""
    floored, found = options(rescued_ratio_floor=0.5), {}
    cispo = options(objective="cispo")
    for name, algorithm, own in (
        ("floor", floored, {}),
        ("cispo", cispo, {"lowest_ratio": 0.5, "highest_ratio": 1e6}),
    ):
        log_probs = torch.tensor([-9.0, -1.0, -0.2]).requires_grad_()  # rho = e^-7.8, e^-.1, e^.7
        terms = micro_batch([rescued()], [torch.tensor([-1.2, -0.9, -0.9])], algorithm).terms
        objective(algorithm, **own).losses(log_probs, torch.zeros(3), terms, algorithm).losses.sum().backward()
        found[name] = log_probs.grad
    assert found["floor"][:2].tolist() == pytest.approx(found["cispo"][:2].tolist(), rel=1e-5)
    assert found["floor"][0].item() == pytest.approx(-SHARE * 0.5, abs=1e-6)
    assert found["floor"][2] == 0 and found["cispo"][2].item() == pytest.approx(-SHARE * math.exp(0.7), rel=1e-5)


def test_only_rescued_rows_with_a_positive_advantage_have_a_floor():
    plain, floored = options(), options(rescued_ratio_floor=1.0)
    native, blamed = sample(rollout(True, tokens=(1, 2, 0)), A, W), rescued(advantage=-A)
    for row in (native, blamed, rescued(advantage=0.0)):
        assert loss_and_gradient(floored, row, OLD) == loss_and_gradient(plain, row, OLD)
    assert loss_and_gradient(floored, rescued(), OLD) != loss_and_gradient(plain, rescued(), OLD)


def test_a_floor_of_whole_responses_bounds_the_responses_ratio():
    """Their ratios are .496585 (product) and .791890 (geometric mean), so that .9 counts, with that of log pi."""
    for form, per_token in (("sequence", 3 * SHARE * 0.9), ("sequence_geometric", SHARE * 0.9)):
        loss, gradient = loss_and_gradient(options(ratio=form, rescued_ratio_floor=0.9), rescued(), OLD)
        assert loss == pytest.approx(-W * A * 0.9, abs=1e-6) and gradient == pytest.approx([-per_token] * 3, abs=1e-6)


@pytest.mark.parametrize("name", registry.names(Kind.OBJECTIVES))
def test_a_floor_keeps_losses_and_gradients_finite_where_ratios_overflow(name: str):
    algorithm = options(objective=name, rescued_ratio_floor=0.3)
    for shift in (1e4, -1e4, 90.0):
        loss, gradient = loss_and_gradient(algorithm, rescued(), NEW - shift)
        assert math.isfinite(loss) and all(map(math.isfinite, gradient))


# ---- through the LM head --------------------------------------------------------------------------------------------


def head_case(algorithm: AlgorithmConfig) -> tuple[MicroBatch, Tensor, Tensor]:
    rows = [rescued(), sample(rollout(True, tokens=(1, 2, 0)), 1.2, 0.5), rescued(-0.7, 1.0), rescued(2.0, 0.5)]
    at_once = algorithm.rescued_ratio == "original_prompt"
    old = [None if at_once else OLD + 1, OLD, OLD - 0.5, None if at_once else OLD + 3]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 4, generator=generator), torch.randn(3, 4, generator=generator)
    return micro_batch(rows, old, algorithm), hidden, weight


@pytest.mark.parametrize("form", FORMS)
def test_the_head_computes_every_form_fused_or_not(form: str):
    """Beside autograd on whole logits in float64. lens_kernels' own loss is taken where it has the form."""
    algorithm = AlgorithmConfig(kl_coef=0.2, entropy_coef=0.1, **FORMS[form])
    batch, hidden, weight = head_case(algorithm)
    ids, terms, chosen = batch.sequences.target_ids, batch.terms, objective(algorithm)

    def losses(log_probs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        return chosen.losses(log_probs, entropy, terms.at(part), algorithm).losses

    exact_h, exact_w = (x.double().requires_grad_() for x in (hidden, weight))
    every = (exact_h @ exact_w.T).log_softmax(-1)
    entropy = -(every.exp() * every).sum(-1)
    expected = losses(every.gather(1, ids[:, None])[:, 0], entropy, slice(0, 12)).sum()
    expected.backward()

    fused = chosen.fused(terms, algorithm)
    assert (fused is None) == (form in ("imitation", "floor"))
    ways = [{"objective": losses, "chunk_rows": 5}] + ([fused] if fused else [])
    for way in ways:
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        found = linear_policy_loss(h, w, ids, **way)
        found.loss.backward()
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for ours, exact in ((h.grad, exact_h.grad), (w.grad, exact_w.grad)):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)


# ---- which log-probabilities are computed ---------------------------------------------------------------------------


def configuration(**sections: dict) -> Config:
    return from_tree(REQUIRED | sections)


NATIVE, RESCUED = sample(rollout(True)), rescued(tokens=(5, 6))
X, PURIFIED = PROMPT.token_ids, RESCUED.generation_prompt
SEVERAL = {"rollout": {"prompts_per_step": 4}, "train": {"updates_per_batch": 2}}
ORIGINAL = {"rescued_ratio": "original_prompt"}


@pytest.mark.parametrize(
    ("sections", "passes", "on_policy"),
    [
        # (native row, rescued row): the prompts under which each is computed before the update, and whether rho is 1
        ({}, ([], [PURIFIED]), (True, False)),
        ({"algorithm": ORIGINAL}, ([], []), (True, True)),
        ({"algorithm": ORIGINAL} | SEVERAL, ([X], [X]), (False, False)),
        ({"algorithm": ORIGINAL | {"ratio_form": "acl"}}, ([X], [X]), (False, False)),
        ({"algorithm": ORIGINAL | {"correction": "token_mask"}}, ([X], [PURIFIED]), (True, True)),
        ({"algorithm": ORIGINAL | {"correction": "token_mask"}} | SEVERAL, ([X], [X, PURIFIED]), (False, False)),
        ({"algorithm": {"correction": "token_mask"}} | SEVERAL, ([X], [PURIFIED]), (False, False)),
    ],
)
def test_no_pass_is_made_that_the_loss_does_not_need(
    sections: dict, passes: tuple, on_policy: tuple, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def log_probs(run: object, pairs: list) -> list[Tensor]:
        asked.extend(pairs)
        return [torch.full((len(response),), float(-len(prompt))) for prompt, response in pairs]

    monkeypatch.setattr(update, "_log_probs", log_probs)
    config = configuration(**sections)
    run = SimpleNamespace(config=config, policy=SimpleNamespace(version=0))
    found = update.trainer_log_probs(run, [NATIVE, RESCUED])
    expected = [(X, NATIVE.rollout.token_ids) for _ in passes[0]]
    assert asked == expected + [(prompt, RESCUED.rollout.token_ids) for prompt in passes[1]]
    for row, before, wanted, at_once in zip((NATIVE, RESCUED), found, passes, on_policy, strict=True):
        assert (before.old is None) == at_once == update.is_on_policy(config, row, version=0)
        if not at_once:
            assert before.old.tolist() == [-len(update.ratio_prompt(config, row))] * 2
        assert (before.trainer is not None) == (row.generation_prompt in wanted)
        assert before.trainer is None or before.trainer.tolist() == [-len(row.generation_prompt)] * 2


def test_rows_that_older_weights_sampled_get_their_log_probs_under_the_original_prompt():
    config = configuration(algorithm=ORIGINAL)
    assert list(update.prompts_before(config, RESCUED, version=1)) == [X]
    assert not update.is_on_policy(config, RESCUED, version=1)


# ---- the metrics ----------------------------------------------------------------------------------------------------


def test_the_share_of_the_gradient_that_the_ratio_leaves():
    """(1.105171 + .449329 + 1) / 3, and with the second ratio raised to .5; a clipped token counts as 0."""
    for form, share in (("literal", 0.851500), ("floor", 0.868390), ("imitation", 0.851500)):
        algorithm = options(**FORMS[form])
        slopes = objective(algorithm).slopes(NEW, micro_batch([rescued()], [OLD], algorithm).terms, algorithm)
        assert slopes.on_policy.tolist() == pytest.approx([-SHARE] * 3, abs=1e-6)
        assert (slopes.taken.abs().sum() / slopes.on_policy.abs().sum()).item() == pytest.approx(share, abs=1e-5)
    algorithm = options()
    terms = micro_batch([rescued()], [OLD - 0.2], algorithm).terms  # ratios 1.35, .549 and 1.22
    assert objective(algorithm).slopes(NEW, terms, algorithm).taken.tolist() == pytest.approx(
        [0.0, -SHARE * 0.548812, 0.0], abs=1e-6
    )
    algorithm = options(**FORMS["original prompt"])
    at_once = objective(algorithm).slopes(NEW, micro_batch([rescued()], [None], algorithm).terms, algorithm)
    assert at_once.taken.equal(at_once.on_policy)


@pytest.mark.parametrize("name", registry.names(Kind.OBJECTIVES))
@pytest.mark.parametrize("form", ["token", "sequence_geometric"])
def test_slopes_are_the_gradient_of_the_loss_without_its_other_terms(name: str, form: str):
    algorithm = options(objective=name, ratio=form)
    terms = micro_batch([rescued(), sample(rollout(True, tokens=(1, 2, 0)), -1.0)], [OLD, OLD], algorithm).terms
    log_probs = torch.cat([NEW, NEW]).requires_grad_()
    objective(algorithm).losses(log_probs, torch.zeros(6), terms, algorithm).losses.sum().backward()
    torch.testing.assert_close(objective(algorithm).slopes(log_probs, terms, algorithm).taken, log_probs.grad)


def test_rho_is_against_the_purified_prompt_whatever_the_loss_divides_by():
    rows = [replace(rescued(), rollout=replace(rescued().rollout, log_probs=(-0.7, -1.0, -0.2)))]
    for form, old, expected in (
        ("literal", OLD, [0.1, -0.8, 0.0]),
        ("acl", OLD, [0.1, -0.8, 0.0]),
        ("literal", None, [0.0, 0.0, 0.0]),  # the purified prompt is the original one
        ("original prompt", None, [0.2, -1.0, 0.1]),  # the engine's numbers stand in
    ):
        algorithm = options(**FORMS[form])
        terms = micro_batch(rows, [old], algorithm).terms
        assert generation_log_ratio(NEW, terms, algorithm).tolist() == pytest.approx(expected, abs=1e-6), form


def test_responses_are_reduced_over_micro_batches_and_context_parallel_ranks(monkeypatch: pytest.MonkeyPatch):
    """Responses of 2, 1 and 3 tokens, the second native; two context-parallel ranks hold tokens 0, 3 and 1, 2, 4, 5."""
    rows = [rescued(tokens=(1, 2)), sample(rollout(True, tokens=(1,))), rescued()]
    batch = micro_batch(rows, [torch.zeros(2), torch.zeros(1), torch.zeros(3)], options())
    log_ratio = torch.tensor([-0.1, -0.7, -5.0, -3.0, 0.2, -0.5])
    parts = []
    for own in ([0, 3], [1, 2, 4, 5]):
        held = replace(batch, sequences=replace(batch.sequences, own=torch.tensor(own)))
        parts.append(response_ratios(log_ratio[own], held))
    assert parts[0].least.tolist() == pytest.approx([-0.1, math.inf, -3.0])
    assert parts[1].total.tolist() == pytest.approx([-0.7, -5.0, -0.3])
    assert parts[0].rescued.tolist() == [True, False, True]

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    mesh = SimpleNamespace(is_last_stage=True, dp_size=1, dp_rank=0, dp_group=None, dp_cp_group=None, pp_size=1,
                           device=torch.device("cpu"))  # fmt: skip
    whole = response_ratios(log_ratio, batch)
    least, products = gather_rescued(mesh, [whole, whole], 4)
    assert least == pytest.approx([math.exp(x) for x in (-3.0, -3.0, -0.7, -0.7)], rel=1e-6)
    assert products == pytest.approx([math.exp(x) for x in (-3.3, -3.3, -0.8, -0.8)], rel=1e-6)
    assert gather_rescued(mesh, [], 0) == ((), ())


def test_metrics_pool_all_updates_of_a_step():
    updates = [
        RescuedRatios((0.1, 0.4), (0.02, 0.3), 1.0, 4.0),
        RescuedRatios(),
        RescuedRatios((0.9,), (2.0,), 2.0, 2.0),
    ]
    assert rescued_metrics(updates) == pytest.approx(
        {
            "lens/rho_min": 1.4 / 3,
            "lens/rho_min_median": 0.4,
            "lens/rho_product": 0.3,
            "lens/rescued_gradient_share": 0.5,
        }
    )
    assert rescued_metrics([]) == rescued_metrics([RescuedRatios()]) == {}
    assert "lens/rescued_gradient_share" not in rescued_metrics([RescuedRatios((0.5,), (0.5,))])
