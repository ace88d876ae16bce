"""lens_kernels against float64: values, gradients, edges, shards. Tolerances: see TOLERANCES.

Not covered: the Triton code (there is none yet), GPUs, more than 2^31 elements.
"""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lens_kernels import (
    interference_scores,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    select_interference_tokens,
    token_logprobs,
)
from lens_kernels.clipped_loss import k3
from oracle import crpo, log_softmax64, logprobs_and_entropy

# value: absolute, against float64 of the same rounded logits; gradient: relative to the row's largest entry. A float32
# log-probability of -13 is rounded to 1e-6, which a row's gradient inherits where its terms nearly cancel.
TOLERANCES = {torch.float32: (3e-6, 3e-5), torch.bfloat16: (3e-6, 5e-3), torch.float16: (3e-6, 1e-3)}
TERMS = ("old_logprobs", "advantages", "reference_logprobs", "policy_weights", "kl_weights", "entropy_weights")


def case(rows: int, columns: int, dtype=torch.float32, scale: float = 3.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=generator) * scale).to(dtype)
    ids = torch.randint(columns, (rows,), generator=generator)
    ids[::5] = -1
    return logits, ids


def loss_inputs(logits, ids, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    logp = logprobs_and_entropy(logits, ids)[0].float()
    rows = len(ids)
    old = logp + 0.4 * torch.randn(rows, generator=generator)
    old[1::4] = math.nan
    values = (
        old,
        torch.randn(rows, generator=generator),
        logp + 0.3 * torch.randn(rows, generator=generator),
        torch.rand(rows, generator=generator),
        torch.rand(rows, generator=generator),
        torch.rand(rows, generator=generator),
    )
    return dict(zip(TERMS, values, strict=True))


def oracle_loss(logits, ids, inputs, *, low=0.2, high=0.28, dual=3.0, temperature=1.0, valid=None):
    z = logits.double().requires_grad_()
    logp, entropy = logprobs_and_entropy(z, ids, temperature, valid)
    old, advantages, reference, pw, kw, ew = (inputs[name].double() for name in TERMS)
    losses, ratio, kl = crpo(
        logp, entropy, ids, old=old, advantages=advantages, reference=reference, pw=pw, kw=kw, ew=ew,
        low=low, high=high, dual=dual,
    )  # fmt: skip
    losses.sum().backward()
    return losses.sum().detach(), ratio.detach(), kl.detach(), z.grad


def assert_rows_close(found, expected, tolerance):
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    assert ((found.double() - expected).abs() / scale).max() <= tolerance if expected.numel() else True


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("columns", [1, 7, 127, 32000])
def test_logprobs_entropy_and_gradient(columns, dtype):
    logits, ids = case(9, columns, dtype)
    value, gradient = TOLERANCES[dtype]
    for temperature in (1.0, 0.7, torch.linspace(0.5, 2.0, 9)):
        z = logits.clone().requires_grad_()
        logp, entropy = token_logprobs(z, ids, temperature=temperature, return_entropy=True)
        exact = logits.double().requires_grad_()
        expected = logprobs_and_entropy(exact, ids, temperature)
        assert (logp - expected[0]).abs().max() < value * 4 and (entropy - expected[1]).abs().max() < value * 4
        (logp * 1.5 - 0.3 * entropy).sum().backward()
        (expected[0] * 1.5 - 0.3 * expected[1]).sum().backward()
        assert_rows_close(z.grad, exact.grad, gradient)
        assert not z.grad[ids < 0].any()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("columns", [7, 127, 32000])
def test_policy_loss_and_gradient(columns, dtype):
    logits, ids = case(21, columns, dtype)
    inputs = loss_inputs(logits, ids)
    z = logits.clone().requires_grad_()
    result = policy_loss(z, ids, clip_low=0.2, clip_high=0.28, dual_clip=3.0, **inputs)
    loss, ratio, kl, expected = oracle_loss(logits, ids, inputs)
    assert abs(result.loss - loss) < 2e-5
    valid = ids >= 0
    assert (result.ratio - ratio)[valid].abs().max() < 2e-5 and (result.kl - kl)[valid].abs().max() < 2e-5
    assert torch.equal(result.ratio[1::4][valid[1::4]], torch.ones(int(valid[1::4].sum())))
    (2.5 * result.loss).backward()
    assert_rows_close(z.grad, 2.5 * expected, TOLERANCES[dtype][1])
    again = policy_loss(logits.clone().requires_grad_(), ids, clip_high=0.28, dual_clip=3.0, **inputs)
    assert torch.equal(again.loss, result.loss)


def test_clip_examples_by_hand():
    # (rho, A) -> loss: (1.35, 1) -> -1.28 and (.7, -1) -> .8 clipped; (.7, 1) -> -.7; (5, -1) -> 3, by the dual clip.
    logits = torch.zeros(4, 2, requires_grad=True)
    old = math.log(0.5) - torch.tensor([1.35, 0.7, 0.7, 5.0]).log()
    result = policy_loss(
        logits, torch.zeros(4, dtype=torch.int64), old_logprobs=old, advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        clip_low=0.2, clip_high=0.28, dual_clip=3.0,
    )  # fmt: skip
    assert result.loss.item() == pytest.approx(-1.28 + 0.8 - 0.7 + 3.0, abs=1e-5)
    assert result.clipped.tolist() == [1.0, 1.0, 0.0, 1.0]
    result.loss.backward()
    assert logits.grad[:, 0].tolist() == pytest.approx([0.0, 0.0, -0.35, 0.0], abs=1e-6)


def test_k3_near_zero_where_the_naive_float32_formula_fails():
    d = torch.tensor([1e-5, -1e-4, 1e-3, -1e-2, 0.1, -0.1, 0.5, 3.0, -8.0])
    exact = d.double().exp() - 1 - d.double()
    exact[:3] = (d.double() ** 2 / 2 + d.double() ** 3 / 6)[:3]
    assert ((k3(d) - exact) / exact).abs().max() < 1e-6
    naive = d.exp() - d - 1
    assert ((naive - exact) / exact).abs().max() > 0.1
    assert k3(torch.tensor([0.1, -0.1, -0.5])).tolist() == pytest.approx([0.005171, 0.004837, 0.106531], abs=1e-6)


def test_temperature_and_padded_columns():
    logits, ids = case(10, 64)
    ids = ids.clamp(max=49)
    inputs = loss_inputs(logits[:, :50], ids)
    z = logits.clone().requires_grad_()
    result = policy_loss(z, ids, clip_high=0.28, dual_clip=3.0, temperature=0.8, valid_vocab_size=50, **inputs)
    loss, _, _, expected = oracle_loss(logits, ids, inputs, temperature=0.8, valid=50)
    assert abs(result.loss - loss) < 2e-5
    result.loss.backward()
    assert_rows_close(z.grad, expected, 1e-5)
    assert not z.grad[:, 50:].any()


def test_extreme_logits():
    inf = math.inf
    rows = [[-inf, 0.0, 1.0], [1e4, -1e4, 0.0], [80.0, 0.0, 0.0], [-inf, -inf, 2.0], [-1e4, -1e4 + 1, -1e4]]
    logits, ids = torch.tensor(rows, requires_grad=True), torch.tensor([1, 0, 0, 2, 1])
    logp, entropy = token_logprobs(logits, ids, return_entropy=True)
    expected = logprobs_and_entropy(logits.detach(), ids)
    assert (logp - expected[0]).abs().max() < 1e-6 and (entropy - expected[1]).abs().max() < 1e-6
    (logp + entropy).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_one_row_all_ignored(rows):
    logits = torch.randn(rows, 5, requires_grad=True)
    ids = torch.full((rows,), -1)
    result = policy_loss(logits, ids, old_logprobs=None, advantages=1.0)
    result.loss.backward()
    assert result.loss == 0 and not logits.grad.any()
    assert linear_token_logprobs(torch.randn(rows, 3), torch.randn(5, 3), ids).tolist() == [0.0] * rows


def test_leading_shapes_and_strides():
    logits, ids = case(12, 11)
    expected = token_logprobs(logits, ids)
    transposed = logits.view(3, 4, 11).transpose(0, 1)
    assert torch.equal(token_logprobs(transposed, ids.view(3, 4).T), expected.view(3, 4).T)
    wide = torch.randn(12, 30)
    wide[:, ::2][:, :11] = logits
    assert torch.equal(token_logprobs(wide[:, ::2][:, :11], ids), expected)


def test_inplace_backward_gives_the_same_gradient_and_refuses_a_second_use():
    logits, ids = case(6, 13)
    z = logits.clone().requires_grad_()
    token_logprobs(z, ids).sum().backward()
    leaf = logits.clone().requires_grad_()
    copy = leaf * 1
    logp = token_logprobs(copy, ids, inplace_backward=True)
    second = token_logprobs(copy, ids)
    logp.sum().backward(retain_graph=True)
    assert torch.allclose(leaf.grad, z.grad, atol=1e-7)
    with pytest.raises(RuntimeError):
        second.sum().backward()


def test_scores():
    a, b = case(8, 50, seed=0), case(8, 50, seed=1)
    ids = a[1]
    expected = (logprobs_and_entropy(a[0], ids)[0] - logprobs_and_entropy(b[0], ids)[0]).float()
    assert (interference_scores(a[0], ids, reference_logits=b[0]) - expected.abs()).abs().max() < 5e-6
    reference = token_logprobs(b[0], ids)
    assert (interference_scores(a[0], ids, reference_logprobs=reference, signed=True) - expected).abs().max() < 5e-6
    same = interference_scores(a[0], ids, reference_logprobs=token_logprobs(a[0], ids))
    assert not same.any()


def test_rounded_logits_lose_the_ranking_that_float32_keeps():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 2000, generator=generator) * 4
    moved = logits + 0.005 * torch.randn(512, 2000, generator=generator)
    ids = logits.argmax(-1)
    exact = (logprobs_and_entropy(moved, ids)[0] - logprobs_and_entropy(logits, ids)[0]).abs()
    top = set(exact.topk(26).indices.tolist())
    full = interference_scores(moved, ids, reference_logits=logits).topk(26).indices.tolist()
    rounded = interference_scores(moved.bfloat16(), ids, reference_logits=logits.bfloat16()).topk(26).indices.tolist()
    assert len(top & set(full)) >= 25 and len(top & set(rounded)) < 18


@pytest.mark.parametrize(
    ("ratio", "floor", "kept"),
    [
        (0.05, 0.0, [1, 0, 1, 1, 1]),
        (0.3, 0.0, [1, 0, 1, 0, 1]),
        (1.0, 0.0, [0, 0, 0, 0, 0]),
        (0.0, 0.0, [1, 1, 1, 1, 1]),
        (0.3, 0.95, [1, 1, 1, 1, 1]),
    ],
)
def test_selection_of_the_worked_example(ratio, floor, kept):
    scores = torch.tensor([0.1, 0.9, 0.0, 0.4, 0.05])
    mask, count, bounds = select_interference_tokens(scores, torch.tensor([0, 5]), ratio=ratio, min_score=floor)
    assert mask.tolist() == [bool(k) for k in kept] and count.tolist() == [sum(kept)]
    assert bounds.tolist() == [0, sum(kept)]


def test_selection_counts_ties_packing_and_eligibility():
    scores = torch.tensor([1.0, 1.0, 1.0, 5.0, math.nan, 2.0, 2.0])
    eligible = torch.tensor([True, True, True, True, True, True, False])
    mask, count, bounds = select_interference_tokens(scores, torch.tensor([0, 3, 7]), ratio=0.5, eligible=eligible)
    assert mask.tolist() == [False, False, True, False, True, False, True]
    assert count.tolist() == [1, 2] and bounds.tolist() == [0, 1, 3]
    for share, tokens, deleted in ((0.07, 100, 7), (0.05, 20, 1), (0.1, 30, 3), (0.03, 40, 2)):
        mask, _, _ = select_interference_tokens(torch.rand(tokens), torch.tensor([0, tokens]), ratio=share)
        assert tokens - int(mask.sum()) == deleted


@pytest.mark.parametrize("chunk_rows", [None, 1, 5])
def test_linear_functions_equal_the_ones_from_logits(chunk_rows):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(14, 6, generator=generator), torch.randn(23, 6, generator=generator)
    rows = torch.tensor([0, 3, 4, 7, 9, 10, 13])
    _, ids = case(7, 23)
    inputs = loss_inputs((hidden @ weight.T)[rows], ids)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    result = linear_policy_loss(h, w, ids, rows=rows, chunk_rows=chunk_rows, clip_high=0.28, dual_clip=3.0, **inputs)
    (0.5 * result.loss).backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (h64 @ w64.T)[rows]
    loss, _, _, d_logits = oracle_loss(logits.detach(), ids, inputs)
    logits.backward(0.5 * d_logits)
    assert abs(result.loss - loss) < 2e-5
    assert_rows_close(h.grad, h64.grad, 1e-5)
    assert_rows_close(w.grad, w64.grad, 1e-5)
    main_grad, again = torch.ones_like(weight), weight.clone().requires_grad_()
    more = linear_policy_loss(
        hidden, again, ids, rows=rows, chunk_rows=chunk_rows, clip_high=0.28, dual_clip=3.0, accumulate_into=main_grad,
        **inputs,
    )  # fmt: skip
    (0.5 * more.loss).backward()
    assert again.grad is None and torch.allclose(main_grad - 1, w.grad, atol=1e-6)
    logp, entropy = linear_token_logprobs(hidden, weight, ids, rows=rows, chunk_rows=chunk_rows, return_entropy=True)
    expected = logprobs_and_entropy((hidden.double() @ weight.double().T)[rows], ids)
    assert (logp - expected[0]).abs().max() < 5e-6 and (entropy - expected[1]).abs().max() < 5e-6


def test_objective_of_the_callers_own():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 4, generator=generator, requires_grad=True)
    weight, ids = torch.randn(11, 4, generator=generator), torch.arange(9)
    advantages = torch.randn(9, generator=generator)
    result = linear_policy_loss(
        hidden, weight, ids, chunk_rows=4,
        objective=lambda logp, entropy, part: -advantages[part] * logp.exp() - 0.1 * entropy,
    )  # fmt: skip
    result.loss.backward()
    h = hidden.detach().double().requires_grad_()
    logp, entropy = logprobs_and_entropy(h @ weight.double().T, ids)
    (-advantages.double() * logp.exp() - 0.1 * entropy).sum().backward()
    assert_rows_close(hidden.grad, h.grad, 1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, i: token_logprobs(z, i[:2]), "token_ids"),
        (lambda z, i: token_logprobs(z, i.float()), "token_ids"),
        (lambda z, i: token_logprobs(z.long(), i), "logits"),
        (lambda z, i: token_logprobs(z, i, temperature=0.0), "temperature"),
        (lambda z, i: token_logprobs(z, i, valid_vocab_size=9), "valid_vocab_size"),
        (lambda z, i: policy_loss(z, i, old_logprobs=None, advantages=1.0, clip_low=-0.1), "clip_low"),
        (lambda z, i: policy_loss(z, i, old_logprobs=None, advantages=1.0, kl_weights=1.0), "reference_logprobs"),
        (lambda z, i: linear_token_logprobs(z, z, i, chunk_rows=0), "chunk_rows"),
        (lambda z, i: select_interference_tokens(z[0], torch.tensor([0, 5]), ratio=1.5), "ratio"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 5), torch.tensor([0, 1, 2]))


def test_out_of_vocabulary_ids_are_refused_on_request(monkeypatch):
    monkeypatch.setenv("LENS_KERNELS_CHECK_IDS", "1")
    with pytest.raises(ValueError, match="id 5"):
        token_logprobs(torch.randn(1, 5), torch.tensor([5]))


def shard_rank(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    group = dist.group.WORLD
    logits, ids = case(17, 60)
    ids = ids.clamp(max=49)
    inputs = loss_inputs(logits[:, :50], ids)
    whole = policy_loss(logits, ids, clip_high=0.28, dual_clip=3.0, valid_vocab_size=50, **inputs)
    # Unequal shards; the last one of four holds nothing but padding.
    cuts = {2: [0, 41, 60], 4: [0, 7, 30, 51, 60]}[world]
    z = logits[:, cuts[rank] : cuts[rank + 1]].clone().requires_grad_()
    result = policy_loss(z, ids, clip_high=0.28, dual_clip=3.0, valid_vocab_size=50, tp_group=group, **inputs)
    assert abs(result.loss - whole.loss) < 1e-5 and (result.entropy - whole.entropy).abs().max() < 1e-6 * 10
    result.loss.backward()
    expected = oracle_loss(logits, ids, inputs, valid=50)[3][:, cuts[rank] : cuts[rank + 1]]
    assert (z.grad - expected).abs().max() < 1e-5
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(17, 6, generator=generator), torch.randn(60, 6, generator=generator)
    inputs = loss_inputs((hidden @ weight.T)[:, :50], ids)
    h, w = hidden.clone().requires_grad_(), weight[cuts[rank] : cuts[rank + 1]].clone().requires_grad_()
    linear = linear_policy_loss(h, w, ids, valid_vocab_size=50, tp_group=group, chunk_rows=5, **inputs)
    linear.loss.backward()
    h1, w1 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_policy_loss(h1, w1, ids, valid_vocab_size=50, **inputs).loss.backward()
    assert (h.grad - h1.grad).abs().max() < 1e-5
    assert (w.grad - w1.grad[cuts[rank] : cuts[rank + 1]]).abs().max() < 1e-5
    dead = torch.full((3, 4), -math.inf) if rank else torch.zeros(3, 4)
    assert token_logprobs(dead, torch.tensor([0, 1, -1]), tp_group=group)[:2].tolist() == pytest.approx(
        [-math.log(4)] * 2
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_shards_give_the_whole_vocabulary(world, unused_port):
    mp.spawn(shard_rank, args=(world, unused_port), nprocs=world)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_log_softmax_oracle_is_itself_right():
    assert log_softmax64(torch.tensor([[0.0, math.log(3.0)]]))[0].exp().tolist() == pytest.approx([0.25, 0.75])
