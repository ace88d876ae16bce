"""A model for vLLM, made once per session, and datasets of a single row."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prompt_data import load, write_jsonl
from toy_runs import Toy
from vllm_models import save

from lens_megatron.types import Prompt


@pytest.fixture(scope="session")
def roomy(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy with heads of a size that vLLM's attention on CPU has, and a context for LONG."""
    folder = tmp_path_factory.mktemp("roomy")
    torch.manual_seed(0)
    save(toy, folder, tied=True)
    return Toy(folder, toy.train, toy.eval)


@pytest.fixture
def one(tmp_path: Path) -> Callable[..., Prompt]:
    """one(row, ...) -> the prompt of a dataset with that single row."""

    def load_one(row, **options) -> Prompt:
        if not isinstance(row, dict):
            row = {"problem": row, "answer": "1"}
        (prompt,) = load(write_jsonl(tmp_path / "one.jsonl", row), **options).prompts
        return prompt

    return load_one
