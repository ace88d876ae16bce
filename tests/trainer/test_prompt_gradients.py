"""Gradients at the tokens of prompts beside autograd on transformers; that layouts agree is in test_layouts.py."""

from pathlib import Path

import pytest
import torch
from test_policy import PAIRS, policy_of, saved_model
from transformers import PreTrainedModel

from lens_megatron.policy import prompt_gradients as module
from lens_megatron.policy.model import Policy, named_parameters
from lens_megatron.policy.parallel import Mesh
from lens_megatron.policy.prompt_gradients import prompt_gradients


def autograd_norms(model: PreTrainedModel, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """|| d -log p(answer | prompt) / d embedding || of every token of the prompt, in the model's precision."""
    embedded = model.get_input_embeddings()(torch.tensor([prompt + answer])).detach().requires_grad_()
    log_probs = model(inputs_embeds=embedded).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    (-log_probs.gather(1, torch.tensor(answer)[:, None]).sum()).backward()
    return embedded.grad[0, : len(prompt)].norm(dim=-1)


def state(policy: Policy) -> dict[str, torch.Tensor]:
    """Copies of all that training goes on from."""
    parameters = dict(named_parameters(policy.models()))
    tensors = {f"weight {name}": p.data for name, p in parameters.items()}
    tensors |= {f"sum of gradients {name}": p.main_grad for name, p in parameters.items()}
    tensors |= {f"gradient {name}": p.grad for name, p in parameters.items() if p.grad is not None}
    tensors |= {f"buffer {i} {name}": b for i, m in enumerate(policy.models()) for name, b in m.named_buffers()}
    for i, (parameter, moments) in enumerate(policy.optimizer.optimizer.state.items()):
        tensors |= {f"parameter {i}": parameter.data}
        tensors |= {f"moment {i} {name}": value for name, value in moments.items() if torch.is_tensor(value)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_norms_are_autograds_on_transformers_whatever_the_micro_batches(
    family: str, tied: bool, mesh: Mesh, tmp_path: Path
):
    model = saved_model(family, tied, tmp_path)
    model = model if family == "qwen3_moe" else model.double()  # transformers computes experts in float32 only
    policy = policy_of(tmp_path, mesh)
    for max_tokens in (1, 1000):
        found = prompt_gradients(policy, PAIRS, max_tokens=max_tokens)
        for (prompt, answer), norms in zip(PAIRS, found, strict=True):
            expected = autograd_norms(model, prompt, answer)
            assert norms.shape == (len(prompt),) and norms.dtype == torch.float32
            assert ((norms - expected).abs().max() / expected.max()) < 1e-5
    assert prompt_gradients(policy, [], max_tokens=10) == []


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_nothing_of_the_policy_changes(
    family: str, fails: bool, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved_model(family, True, tmp_path)
    policy = policy_of(tmp_path, mesh)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in named_parameters(policy.models()):
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    policy.optimizer.step()
    config = policy.bridge.config
    config.finalize_model_grads_func = config.grad_scale_func = ends = lambda *arguments, **options: 1 / 0
    before = state(policy)
    if fails:
        monkeypatch.setattr(module.torch.Tensor, "norm", lambda *arguments, **options: [][0])  # in the backward pass
        with pytest.raises(IndexError):
            prompt_gradients(policy, PAIRS, max_tokens=100)
    else:
        prompt_gradients(policy, PAIRS, max_tokens=100)
    after = state(policy)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert {name.partition(" ")[0] for name in before} >= {"weight", "sum", "gradient", "moment"}
    assert all(p.requires_grad for _, p in named_parameters(policy.models()))
    assert config.finalize_model_grads_func is config.grad_scale_func is ends
