"""The trainer's checks on its inputs without torch.distributed, and a model whose checkpoints are damaged."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_policy import SIZES
from refusals import Accepted, Trainer
from toy_runs import Toy
from transformers import Qwen3Config, Qwen3ForCausalLM

from lens_megatron import build, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model in `model`, beside which checkpoints are written."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def trainer(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Trainer]:
    """The trainer's checks in this process, which stop with `Accepted` where the trainer would take the device."""

    def accept(*_: object) -> None:
        raise Accepted

    monkeypatch.setattr(train.platform, "init_process_group", lambda *_: None)
    monkeypatch.setattr(train, "told_by_main", lambda look, device: look())
    monkeypatch.setattr(train.Stop, "meet", lambda stop: None)
    monkeypatch.setattr(build.platform, "open_control_store", accept)
    monkeypatch.setattr(build, "_start_graders", lambda config: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Trainer(toy, tmp_path, capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)
