"""The checks on inputs that the trainer makes before it takes the device, without torch.distributed."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import Accepted, Trainer
from toy_runs import Toy, make_toy

from lens_megatron import build, train


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A small random model and its data, made once per session."""
    return make_toy(tmp_path_factory.mktemp("toy"))


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
