"""The weight's gradient in Megatron's buffer, sequences that a chunk must not cut, and heads of other frameworks."""

import pytest
import torch
import torch.distributed as dist
from kernel_oracle import statistics, token_losses
from lens_kernels import _head, linear_policy_loss, linear_token_logprobs
from test_linear import assert_gradients, leaves, make
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulate_into(dtype):
    """Adds the scaled float32 gradient to what is there, leaves weight.grad None, and keeps float32 precision."""
    hidden, weight, _, ids = make(9, 20, dtype)
    exact = leaves(hidden, weight, double=True)
    logprobs, entropy = statistics(exact[0] @ exact[1].T, ids)
    (token_losses(logprobs, entropy, advantages=1.0, entropy_weights=0.1)[0].sum() * 0.25).backward()
    ours = leaves(hidden, weight)
    main_grad = torch.full(weight.shape, 0.5)
    result = linear_policy_loss(
        ours[0], ours[1], ids, advantages=1.0, entropy_weights=0.1, chunk_rows=4, accumulate_into=main_grad
    )
    assert main_grad.eq(0.5).all()  # nothing before the backward knows the scale
    (result.loss * 0.25).backward()
    assert ours[1].grad is None
    rounded = dtype == torch.bfloat16 and weight.is_cuda  # the logits' gradient, before its product
    torch.testing.assert_close(main_grad.double(), exact[1].grad + 0.5, rtol=1e-5, atol=5e-3 if rounded else 1e-6)


@pytest.fixture
def _memory_is_filled():
    """Deterministic mode makes uninitialised memory NaN: a placeholder whose values count shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_memory_is_filled")
@pytest.mark.parametrize("loss_gradient", [None, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_accumulate_into_marks_a_weight_as_megatrons_layers_do(tied, loss_gradient):
    """With a hook like that of Megatron's DDP; an embedding that shares the weight gets its gradient through it."""
    hidden, weight, _, ids = make(6, 20)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(weight), False
    parameter.zero_out_wgrad = tied

    def hook(_):
        assert parameter.grad is not None  # what overlap_grad_reduce needs
        if not parameter.grad_added_to_main_grad or parameter.zero_out_wgrad:
            parameter.main_grad += parameter.grad
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(hook)
    states = torch.nn.functional.embedding(ids, parameter) if tied else hidden
    into = {"accumulate_into": parameter.main_grad, "loss_gradient": loss_gradient}
    loss = linear_policy_loss(states, parameter, ids, advantages=1.0, **into).loss
    assert not parameter.grad_added_to_main_grad  # the hook has not run, and another layer's must not be held up
    loss.backward()
    plain = weight.clone().requires_grad_()
    states = torch.nn.functional.embedding(ids, plain) if tied else hidden
    linear_policy_loss(states, plain, ids, advantages=1.0).loss.backward()
    assert parameter.grad_added_to_main_grad
    torch.testing.assert_close(parameter.main_grad, plain.grad)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("path", ["chunks", "tiles"])
def test_a_known_loss_gradient_adds_in_the_forward(path, scale):
    hidden, weight, bias, ids = make(9, 20)
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    buffer, expected = torch.full(weight.shape, 0.5), torch.full(weight.shape, 0.5)
    settings = {"advantages": 1.0, "entropy_weights": 0.1, "chunk_rows": 4, "path": path}
    loss = linear_policy_loss(
        *ours[:2], ids, bias=ours[2], accumulate_into=buffer, loss_gradient=scale, **settings
    ).loss
    added = buffer.clone()
    (loss * scale).backward()
    assert buffer.equal(added) and ours[1].grad is None
    theirs_loss = linear_policy_loss(*theirs[:2], ids, bias=theirs[2], accumulate_into=expected, **settings).loss
    (theirs_loss * scale).backward()
    torch.testing.assert_close(buffer, expected)
    assert ours[0].grad.equal(theirs[0].grad) and ours[2].grad.equal(theirs[2].grad)


def test_another_loss_gradient_than_the_announced_one():
    hidden, weight, _, ids = make(9, 20)
    ours = leaves(hidden, weight)
    arguments = {"advantages": 1.0, "accumulate_into": torch.zeros_like(weight), "loss_gradient": 1.0}
    loss = linear_policy_loss(*ours, ids, **arguments).loss
    with pytest.raises(RuntimeError, match="loss_gradient: got 1.0, but the backward brought 0.5"):
        (loss * 0.5).backward()
    loss = linear_policy_loss(*ours, ids, **arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="loss_gradient: .* one backward only"):
        loss.backward()
    with pytest.raises(ValueError, match="loss_gradient: got 1.0, need None without accumulate_into"):
        linear_policy_loss(*ours, ids, advantages=1.0, loss_gradient=1.0)
    with pytest.raises(ValueError, match="loss_gradient: got inf, need a finite number"):
        linear_policy_loss(*ours, ids, **(arguments | {"loss_gradient": float("inf")}))


def test_chunks_end_where_sequences_do():
    assert _head.chunk_slices(22, 6, (3, 5, 20, 22)) == [slice(0, 5), slice(5, 20), slice(20, 22)]
    assert _head.chunk_slices(7, 3, None) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert _head.chunk_slices(4, 9, (0, 2, 2, 4)) == [slice(0, 4)]
    assert _head.chunk_slices(0, 9, (0,)) == []


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("path", ["chunks", "tiles"])
def test_sequence_level_objective(path):
    """GSPO's ratio, the geometric mean over a sequence, in one pass; one sequence is longer than a chunk."""
    hidden, weight, _, ids = make(14, 20)
    ends = [3, 10, 12, 14]
    sequence = torch.tensor([0] * 3 + [1] * 7 + [2] * 2 + [3] * 2)
    old = torch.randn(14) - 3
    parts = []

    def gspo(logprobs, entropy, part):
        parts.append((part.start, part.stop))
        own = sequence[part] - sequence[part][0]
        sums = torch.zeros(int(own[-1]) + 1, dtype=logprobs.dtype).index_add(0, own, logprobs - old[part])
        return -(sums / own.bincount()).exp()[own] + 0.1 * entropy

    exact = leaves(hidden, weight, double=True)
    wanted = gspo(*statistics(exact[0] @ exact[1].T, ids), slice(0, 14)).sum()
    wanted.backward()
    parts.clear()
    ours = leaves(hidden, weight)
    loss = linear_policy_loss(*ours, ids, objective=gspo, boundaries=ends, chunk_rows=5, path=path).loss
    loss.backward()
    assert parts == [(0, 3), (3, 10), (10, 14)]
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert_gradients(ours, exact)


@pytest.mark.parametrize("ends", [[3, 2, 4], [2, 3], [-1, 4], []])
def test_boundaries_that_do_not_fit(ends):
    hidden, weight, _, ids = make(4, 20)
    with pytest.raises(ValueError, match="boundaries: got .* need row numbers that never fall, the last of them .* 4"):
        linear_policy_loss(hidden, weight, ids, objective=lambda lp, h, part: lp, boundaries=ends)
    with pytest.raises(ValueError, match="boundaries: got rows without an objective"):
        linear_policy_loss(hidden, weight, ids, advantages=1.0, boundaries=[4])


@pytest.fixture
def _one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_a_dtensor_is_refused_and_its_whole_tensor_is_trained():
    from torch.distributed.tensor import Partial

    hidden, weight, _, ids = make(4, 20)
    cut = torch.nn.Parameter(distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)]))
    with pytest.raises(ValueError, match=r"weight: got a DTensor, need .* weight.full_tensor\(grad_placements="):
        linear_token_logprobs(hidden, cut, ids)
    with pytest.raises(ValueError, match="hidden: got a DTensor"):
        linear_policy_loss(cut, weight, ids, advantages=1.0)
    whole = cut.full_tensor(grad_placements=[Partial()])
    linear_token_logprobs(hidden, whole, ids).sum().backward()
    plain = weight.clone().requires_grad_()
    linear_token_logprobs(hidden, plain, ids).sum().backward()
    torch.testing.assert_close(cut.grad.to_local(), plain.grad)


def test_a_zero3_parameter_is_refused():
    """DeepSpeed is not installed here: the weight has what its parameters have outside GatheredParameters."""
    hidden, weight, _, ids = make(4, 20)
    cut = torch.nn.Parameter(torch.empty(0))
    cut.ds_id, cut.ds_shape = 7, weight.shape
    with pytest.raises(
        ValueError, match=r"weight: got a parameter of shape \(20, 16\) that ZeRO-3 .*GatheredParameters"
    ):
        linear_token_logprobs(hidden, cut, ids)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_weight_is_refused(dtype):
    hidden, weight, _, ids = make(4, 20)
    with pytest.raises(ValueError, match=f"weight: got a quantised Tensor of {dtype}, need .* dequantise it"):
        linear_token_logprobs(hidden, weight.to(dtype), ids)
