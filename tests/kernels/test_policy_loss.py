"""policy_loss: the printed examples, the float64 oracle, and the accuracy of k3."""

import math

import pytest
import torch
from kernel_oracle import assert_near, assert_rows_near, statistics, token_losses
from lens_kernels import k3, policy_loss, token_logprobs
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.usefixtures("backend")

GRADIENT_TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def logits_with(logprobs):
    """[T, 2] logits whose column 0 has these log-probabilities."""
    p = torch.tensor(logprobs, dtype=torch.float64).exp()
    return torch.stack([p.log(), (1 - p).log()], -1).float()


def check(logits, ids, inplace_backward=False, upstream=1.7, settings=None, **terms):
    """Values and gradients beside the oracle; `settings` say how logits become log-probabilities."""
    settings = settings or {}
    exact = logits.detach().double().requires_grad_()
    logprobs, entropy = statistics(exact, ids, **settings)
    losses, ratio, kl = token_losses(logprobs, entropy, **terms)
    kept = ids >= 0
    loss = losses[kept].sum()
    (loss * upstream).backward()

    terms.setdefault("old_logprobs", None)
    ours = logits.detach().requires_grad_()
    result = policy_loss(
        ours * 1,  # a non-leaf: with inplace_backward the leaf itself would be overwritten
        ids,
        inplace_backward=inplace_backward,
        **settings,
        **terms,
    )
    (result.loss * upstream).backward()
    expected = (logprobs, ratio, kl, entropy)
    for actual, wanted in zip((result.logprobs, result.ratio, result.kl, result.entropy), expected, strict=True):
        assert_near(actual, torch.where(kept, wanted.detach(), 0), 1e-5)
        assert not actual.requires_grad
    torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    # A float32 log-probability of -8 is off by 5e-7. The ratio and exp(reference - logprob) inherit that, which shows
    # in rows whose policy and KL gradients nearly cancel.
    policy_size = ratio * abs(terms["advantages"]) * terms.get("policy_weights", 1.0)
    kl_size = (kl + 2) * terms.get("kl_weights", 0.0)
    slack = 2e-6 * (policy_size + kl_size).detach()
    assert_rows_near(ours.grad, exact.grad, GRADIENT_TOLERANCE[logits.dtype], slack)
    return result


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"), [(1.35, 1, -1.28, 1), (0.7, -1, 0.8, 1), (0.7, 1, -0.7, 0)]
)
def test_clip_examples(ratio, advantage, loss, clipped):
    """PPO clip with e_lo .2, e_hi .28: value, flag, and whether any gradient flows."""
    logits = logits_with([-1.0]).requires_grad_()
    old = torch.tensor([-1.0 - math.log(ratio)])
    result = policy_loss(
        logits, torch.tensor([0]), old_logprobs=old, advantages=torch.tensor([float(advantage)]), clip_high=0.28
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)
    assert result.ratio.item() == pytest.approx(ratio, abs=1e-6)
    assert result.clipped.item() == clipped
    assert bool(logits.grad.any()) == (not clipped)


@pytest.mark.parametrize(("u", "kl"), [(0.1, 0.004837), (-0.1, 0.005171), (0.5, 0.106531)])
def test_k3_examples(u, kl):
    result = policy_loss(
        logits_with([-1.0]),
        torch.tensor([0]),
        old_logprobs=None,
        advantages=0.0,
        reference_logprobs=torch.tensor([-1.0 - u]),
        kl_weights=1.0,
    )
    assert result.kl.item() == pytest.approx(kl, abs=1e-6)
    assert result.loss.item() == pytest.approx(kl, abs=1e-6)


def test_lens_rescued_row():
    """A row sampled from the purified prompt: ratios, surrogates and weighted loss of the printed example."""
    advantage, weight = 0.904534, 0.75
    result = policy_loss(
        logits_with([-0.5, -2.0, -0.1]),
        torch.zeros(3, dtype=torch.long),
        old_logprobs=torch.tensor([-0.6, -1.2, -0.1]),
        advantages=advantage,
        policy_weights=weight / 3,
    )
    surrogate = [0.999665, 0.406433, 0.904534]
    assert result.ratio.tolist() == pytest.approx([1.105171, 0.449329, 1.0], abs=2e-6)
    assert (result.ratio * advantage).tolist() == pytest.approx(surrogate, abs=2e-6)
    assert sum(surrogate) / 3 == pytest.approx(0.770211, abs=1e-6)
    assert result.clipped.tolist() == [0.0, 0.0, 0.0]
    assert result.loss.item() == pytest.approx(-0.577658, abs=2e-6)


def make(shape, dtype=torch.float32):
    """Logits with old and reference log-probabilities around the policy's own, so that both clips come up."""
    logits = (torch.randn(shape) * 2).to(dtype)
    ids = torch.randint(0, shape[-1], shape[:-1])
    logprobs = token_logprobs(logits, ids)
    terms = {
        "old_logprobs": logprobs + torch.randn(shape[:-1]) * 0.7,
        "advantages": torch.randn(shape[:-1]),
        "reference_logprobs": logprobs + torch.randn(shape[:-1]) * 0.3,
        "policy_weights": torch.rand(shape[:-1]),
        "kl_weights": torch.rand(shape[:-1]),
        "entropy_weights": torch.rand(shape[:-1]) * 0.1,
    }
    return logits, ids, terms


@pytest.mark.parametrize(
    ("columns", "dtype", "inplace"),
    [
        (1, torch.float32, True),
        (7, torch.float16, False),
        (127, torch.float32, False),
        (127, torch.bfloat16, True),
        (32000, torch.float32, True),
        (32000, torch.bfloat16, False),
    ],
)
def test_matches_oracle(columns, dtype, inplace):
    rows = 4 if columns == 32000 else 24
    logits, ids, terms = make((rows, columns), dtype)
    ids[2] = -1
    result = check(logits, ids, inplace_backward=inplace, **terms)
    assert result.clipped[2] == result.ratio[2] == 0


def test_soft_cap():
    """Before the temperature, as Gemma 2 has it; logits near 0, around the cap, and far beyond it."""
    logits, ids, terms = make((6, 40))
    logits *= torch.tensor([0.01, 1.0, 3.0, 10.0, 30.0, 1.0])[:, None]
    settings = {"logit_softcap": 5.0, "temperature": 0.7, "valid_vocab_size": 37}
    terms["old_logprobs"] = token_logprobs(logits, ids % 37, **settings) + torch.randn(6) * 0.3
    check(logits, ids % 37, settings=settings, **terms)


@pytest.mark.parametrize("left_out", ["reference_logprobs", "policy_weights", "kl_weights", "entropy_weights"])
def test_absent_terms(left_out):
    logits, ids, terms = make((16, 13))
    del terms[left_out]
    if left_out == "reference_logprobs":
        del terms["kl_weights"]
    check(logits, ids, **terms)


def test_dual_clip_and_asymmetric_clip():
    dual_clip = 1.5
    logits, ids, terms = make((80, 13))
    terms["old_logprobs"] = token_logprobs(logits, ids) + torch.randn(80) * 1.5
    result = check(logits, ids, clip_low=0.1, clip_high=0.4, dual_clip=dual_clip, **terms)
    a, rho = terms["advantages"], result.ratio
    low, high = (a < 0) & (rho < 0.9), (a > 0) & (rho > 1.4)
    dual = (a < 0) & (rho > dual_clip)
    assert low.any() and high.any() and dual.any()
    assert result.clipped.bool().equal(low | high | dual)


def test_broadcast_arguments_temperature_and_padding():
    """Megatron's [S, B, V]: advantages and weights per sequence [B], one number for the KL weight."""
    logits, ids, terms = make((5, 3, 20))
    ids %= 16
    terms |= {"advantages": torch.randn(3), "policy_weights": torch.rand(1, 3), "kl_weights": 0.3}
    check(logits, ids, settings={"temperature": torch.rand(5, 1) + 0.5, "valid_vocab_size": 16}, **terms)


def test_transposed_rows():
    logits, ids, terms = make((5, 3, 20))
    check(logits.transpose(0, 1), ids.T, **{name: value.T for name, value in terms.items()})


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    logits, ids, terms = make((rows, 9))
    result = check(logits, ids, **terms)
    assert result.loss.shape == ()


def test_all_rows_ignored():
    """NaN everywhere: neither logits nor per-row arguments of ignored rows may be used."""
    logits = torch.full((3, 5), torch.nan, requires_grad=True)
    nan = torch.full((3,), torch.nan)
    result = policy_loss(
        logits,
        torch.full((3,), -1),
        old_logprobs=nan,
        advantages=nan,
        reference_logprobs=nan,
        policy_weights=nan,
        kl_weights=nan,
        entropy_weights=nan,
    )
    result.loss.backward()
    assert all(x.eq(0).all() for x in result)
    assert logits.grad.eq(0).all()


def test_nan_marks_on_policy_rows():
    """Ratio exactly 1, with the gradient of old_logprobs = logprobs.detach(); other rows keep theirs."""
    logits, ids, terms = make((30, 11))
    terms["old_logprobs"][::2] = torch.nan
    result = check(logits, ids, **terms)
    assert result.ratio[::2].eq(1).all() and result.ratio[1::2].ne(1).all()
    assert result.clipped[::2].eq(0).all()
    logits, ids, terms = make((30, 11))
    terms["old_logprobs"] = None
    assert check(logits, ids, **terms).ratio.eq(1).all()


def test_zero_clip_still_trains_on_policy_rows():
    logits, ids, terms = make((6, 11))
    terms["old_logprobs"] = None
    assert check(logits, ids, clip_low=0.0, clip_high=0.0, **terms).clipped.eq(0).all()


def test_extreme_ratios_stay_finite():
    """Log-ratios beyond +-20 are cut off, with gradient 0, and so is what exceeds kl_limit."""
    logits = torch.randn(4, 7)
    ids = torch.tensor([0, 1, 2, 3])
    logprobs = token_logprobs(logits, ids)
    shift = torch.tensor([60.0, -60.0, 5.0, -15.0])
    check(logits, ids, old_logprobs=logprobs - shift, advantages=torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    kl = {"advantages": 0.0, "reference_logprobs": logprobs + shift, "kl_weights": 1.0}
    assert check(logits, ids, kl_limit=10.0, **kl).kl.max() == 10
    assert check(logits, ids, **kl).kl.max() == pytest.approx(math.exp(20) - 21)


@pytest.mark.parametrize("kl_limit", [None, 10.0, 0.01])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_limit_bounds_the_value_and_takes_the_gradient_away(estimator, kl_limit):
    """Values and gradients beside float64, the reference some nats above the policy: within a limit and beyond it."""
    shift = torch.tensor([-25.0, -12.0, -10.0, -2.0, -0.1, 0.1, 2.5, 2.7, 8.0, 19.0, 25.0])
    logits = torch.tensor([[0.4, -1.0, 2.0]]).repeat(len(shift), 1)
    ids = torch.ones(len(shift), dtype=torch.long)
    reference = token_logprobs(logits, ids) + shift
    ours = logits.clone().requires_grad_()
    kl = {"reference_logprobs": reference, "kl_weights": 0.5, "kl_limit": kl_limit, "kl_estimator": estimator}
    result = policy_loss(ours, ids, advantages=0.0, **kl)
    result.loss.backward()
    exact = logits.double().requires_grad_()
    d = (reference.double() - torch.log_softmax(exact, -1)[:, 1]).clamp(-20, 20)
    value = {"k1": -d, "k2": d * d / 2, "k3": torch.expm1(d) - d}[estimator]
    limited = value if kl_limit is None else value.clamp(max=kl_limit)
    (0.5 * limited).sum().backward()
    torch.testing.assert_close(result.kl.double(), limited.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.loss.double(), 0.5 * limited.detach().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=0)
    flat = (shift.abs() > 20) | (value > (kl_limit or math.inf)).to(shift.device)
    assert ours.grad.any(1).equal(~flat)


@pytest.mark.parametrize(
    ("estimator", "kl", "slope"), [("k1", -0.5, 1.0), ("k2", 0.125, -0.5), ("k3", 0.148721, -0.648721)]
)
def test_kl_estimators_worked_by_hand(estimator, kl, slope):
    """The reference half a nat above a policy of probability exp(-1); the derivative is by the log-probability."""
    logits = logits_with([-1.0]).requires_grad_()
    reference = {"reference_logprobs": torch.tensor([-0.5]), "kl_weights": 1.0, "kl_estimator": estimator}
    result = policy_loss(logits, torch.tensor([0]), advantages=0.0, **reference)
    result.loss.backward()
    assert result.kl.item() == pytest.approx(kl, abs=1e-6)
    assert result.loss.item() == pytest.approx(kl, abs=1e-6)
    at_target = slope * (1 - math.exp(-1))
    assert logits.grad.tolist()[0] == pytest.approx([at_target, -at_target], abs=1e-6)


def test_minus_infinity_target_has_finite_gradient():
    logits = torch.randn(2, 6)
    logits[0, 2] = -torch.inf
    ours = logits.requires_grad_()
    ids = torch.tensor([2, 3])
    old = torch.tensor([-1.0, -1.0])
    result = policy_loss(
        ours, ids, old_logprobs=old, advantages=1.0, reference_logprobs=old, kl_weights=0.1, entropy_weights=0.1
    )
    result.loss.backward()
    assert result.loss.isfinite() and ours.grad.isfinite().all()
    assert result.kl[0] == pytest.approx(math.exp(20) - 21)


def naive_k3(d):
    return d.exp() - d - 1


@pytest.mark.parametrize("sign", [1, -1])
def test_k3_relative_accuracy(sign):
    """1e-6 relative over nine decades; the textbook formula in float32 is off by more than its value below 1e-3."""
    d = sign * torch.logspace(-8, 1, 4001)
    exact = torch.expm1(d.double()) - d.double()
    small = d.abs() < 1e-4  # where float64 would itself cancel
    exact[small] = (d.double() ** 2 / 2 + d.double() ** 3 / 6)[small]
    assert ((k3(d) - exact) / exact).abs().max() < 1e-6
    assert (k3(d) >= 0).all()
    near = d.abs() < 1e-3
    assert ((naive_k3(d) - exact) / exact)[near].abs().max() > 1


@pytest.mark.parametrize("limit", [None, 10.0])
def test_k3_under_autograd(limit):
    """exp(d) - 1, and 0 beyond +-20 nats or beyond the limit; nothing is NaN at infinity."""
    d = torch.tensor([-torch.inf, -1e4, -21.0, -15.0, -1.5, -0.5, 0.0, 1e-4, 0.5, 2.0, 3.0, 19.0, 21.0, torch.inf])
    d.requires_grad_()
    values = k3(d, limit)
    values.sum().backward()
    clamped = d.detach().double().clamp(-20, 20)
    exact = torch.where(clamped.abs() < 1e-3, clamped**2 / 2 + clamped**3 / 6, torch.expm1(clamped) - clamped)
    flat = (d.detach().abs() > 20) | (exact > (limit or torch.inf))
    torch.testing.assert_close(values.double(), exact.clamp(max=limit or torch.inf), rtol=1e-6, atol=0)
    torch.testing.assert_close(d.grad.double(), torch.expm1(clamped).masked_fill(flat, 0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-5, 0.1, 1.1])
def test_kl_value_and_gradient_are_accurate_through_the_loss(scale):
    """Against the float64 k3 of the float32 log-probabilities that the function itself reports."""
    logits, ids, _ = make((24, 17))
    ours = logits.requires_grad_()
    reference = token_logprobs(logits.detach(), ids) + torch.randn(24) * scale
    result = policy_loss(
        ours, ids, old_logprobs=None, advantages=0.0, reference_logprobs=reference, kl_weights=torch.ones(24)
    )
    result.loss.backward()
    d = reference.double() - result.logprobs.double()
    exact = torch.where(d.abs() < 1e-4, d**2 / 2 + d**3 / 6, torch.expm1(d) - d)
    torch.testing.assert_close(result.kl.double(), exact, rtol=1e-6, atol=0)
    p = result.logprobs.double().exp()
    at_target = ours.grad.gather(1, ids[:, None])[:, 0]
    expected = -torch.expm1(d) * (1 - p)
    torch.testing.assert_close(at_target.double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("terms_as", [float, torch.tensor])
def test_one_number_for_all_rows(terms_as):
    """Numbers and tensors of one element, which no kernel spreads over the rows first."""
    logits, ids, terms = make((6, 11))
    numbers = {"advantages": 0.7, "policy_weights": 0.3, "kl_weights": 0.2, "entropy_weights": 0.1}
    spread = {name: torch.full((6,), value) for name, value in numbers.items()}
    given = {name: terms_as(value) for name, value in numbers.items()}
    results = []
    for loss_terms in (terms | spread, terms | given):
        ours = logits.clone().requires_grad_()
        result = policy_loss(ours, ids, **loss_terms)
        result.loss.backward()
        results.append((*result, ours.grad))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_results_may_be_edited_in_place():
    """Every result has memory of its own, and none of it serves the backward."""
    logits, ids, terms = make((6, 11))
    plain, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    policy_loss(plain, ids, **terms).loss.backward()
    result = policy_loss(ours, ids, **terms)
    assert len({x.untyped_storage().data_ptr() for x in result}) == len(result)
    loss = result.loss * 1
    for value in result:
        value.detach().fill_(7.0)
    result.logprobs.clamp_(max=-1.0)
    loss.backward()
    assert ours.grad.equal(plain.grad)


def test_objective_of_the_callers_own():
    """A sequence-level clipped ratio (GSPO), whose rows depend on each other, beside plain autograd."""
    logits, ids, terms = make((6, 11))
    ids[1] = -1

    def losses(logprobs, entropy, part):
        assert part == slice(0, 6)
        sequence = (logprobs - terms["old_logprobs"]).view(2, 3).mean(1).exp().repeat_interleave(3)
        return -sequence.clamp(0.9, 1.3) * terms["advantages"] - 0.1 * entropy

    plain, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = losses(*token_logprobs(plain, ids, return_entropy=True), slice(0, 6))
    (expected[ids >= 0].sum() * 1.7).backward()
    result = policy_loss(ours, ids, objective=losses)
    (result.loss * 1.7).backward()
    torch.testing.assert_close(result.loss, expected[ids >= 0].sum())
    assert result.ratio is result.clipped is result.kl is None
    torch.testing.assert_close(ours.grad, plain.grad)
    assert ours.grad[1].eq(0).all()


def test_objective_under_torch_compile(monkeypatch):
    """No graph holds the function: it runs between graphs, with equal results, and fullgraph=True is refused."""
    monkeypatch.setenv("LENS_KERNELS_BACKEND", "reference")  # interpreted kernels cannot be traced
    logits, ids, terms = make((6, 11))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def losses(logprobs, entropy, part):
        return logprobs.square() - 0.1 * entropy * terms["advantages"]

    def train(logits, ids):
        result = policy_loss(logits * 2, ids, objective=losses)
        return result.loss * 3 + result.entropy.sum()

    plain, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = train(plain, ids)
    expected.backward()
    actual = torch.compile(train, backend=counter)(ours, ids)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours.grad, plain.grad)
    assert counter.frame_count >= 2  # what comes before the call and after it
    with pytest.raises(torch._dynamo.exc.Unsupported, match="apply_outside_graphs"):
        torch.compile(train, fullgraph=True, backend="aot_eager")(ours, ids)


def test_inplace_backward_refuses_a_second_use():
    logits, ids, terms = make((4, 30))
    logits = logits.requires_grad_() * 1
    loss = policy_loss(logits, ids, inplace_backward=True, **terms).loss
    other = token_logprobs(logits, ids, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True: the logits were changed"):
        other.backward()
    with pytest.raises(RuntimeError, match="inplace_backward=True: the logits were changed"):
        loss.backward()


def test_second_backward_without_inplace():
    logits, ids, terms = make((4, 30))
    ours = logits.requires_grad_()
    loss = policy_loss(ours, ids, **terms).loss
    loss.backward(retain_graph=True)
    once = ours.grad.clone()
    loss.backward()
    assert ours.grad.equal(2 * once)
