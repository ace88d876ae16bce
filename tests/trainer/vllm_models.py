"""Small models that vLLM's attention on a CPU takes, and what transformers says of the same tokens."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from toy_runs import Toy
from transformers import Qwen3Config, Qwen3ForCausalLM

from lens_megatron.rollout.engine import Completion, Request

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="make setup-vllm")
"""To import it takes seconds, which processes that run other tests need not spend."""
SHORT, LONG = (5, 17, 9, 60, 33), tuple(3 + 7 * i % 90 for i in range(200))
"""LONG fills a block of 128 tokens, so vLLM caches its keys and values."""


def save(toy: Toy, folder: Path, tied: bool) -> None:
    own = Qwen3Config.from_pretrained(toy.model)
    own.update({"head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": tied})
    model = Qwen3ForCausalLM(own)
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1
    for path in toy.model.iterdir():
        if "token" in path.name or path.name == "chat_template.jinja":
            (folder / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(folder)


def other(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """`model` with weights of another draw, peaked enough that two of them never agree."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.15 if parameter.dim() > 1 else 1 + 0.1 * noise
    return model.eval()


def weights(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.data) for name, parameter in model.named_parameters()]


def error_in_log_probs(model: torch.nn.Module, request: Request, completion: Completion) -> float:
    """Largest difference in nats from transformers' log-probabilities of the same tokens."""
    tokens = torch.tensor([request.prompt + completion.token_ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(request.prompt) - 1 : -1] / (request.temperature or 1.0)
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    return (torch.tensor(completion.log_probs) - expected).abs().max().item()
