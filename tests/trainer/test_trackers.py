"""Trackers: what they get, what happens when they fail, and the option before them. wandb and trackio offline."""

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_runs import ROOT, Toy

from lens_megatron import config as configuration
from lens_megatron.config import Config, ConfigError
from lens_megatron.output.metrics import MetricsWriter, read_metrics
from lens_megatron.output.trackers import opening
from lens_megatron.output.trackers.opening import check_installed, open_trackers
from lens_megatron.output.trackers.tracker import GuardedTracker

LOG = """
import sys
from pathlib import Path
from lens_megatron import config
from lens_megatron.output.metrics import MetricsWriter
from lens_megatron.output.trackers.opening import open_trackers
made = config.load(sys.argv[1])
for first, value in ((1, 0.5), (2, 0.75)):  # the second launch does step 2 again
    writer = MetricsWriter(Path(made.run.directory), first_step=first, trackers=open_trackers(made, first))
    for step in (first, first + 1):
        writer.write(step, {"critic/rewards/mean": value + step})
    writer.add(step, {"val-core/toy/acc/mean@2": 0.25})
    writer.close()
"""


def make(folder: Path, *trackers: str) -> Config:
    toy = Toy(folder, folder / "train.jsonl", folder / "eval.jsonl")
    return configuration.from_tree(toy.tree(folder, run={"trackers": list(trackers)}))


def log_in_a_process(folder: Path, tracker: str, **environment: str) -> None:
    """Logs two launches of a run in a process of its own, which a library cannot leave threads in."""
    (folder / "lens_run.json").write_text('{"id": "abc123"}')
    (folder / "made.yaml").write_text(make(folder, tracker).model_dump_json())
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(
        [sys.executable, "-c", LOG, str(folder / "made.yaml")],
        env=os.environ | paths | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "cannot be opened" not in done.stdout + done.stderr, done.stderr


def test_tensorboard_gets_every_metric(tmp_path: Path):
    made = make(tmp_path, "tensorboard", "tensorboard")
    trackers = open_trackers(made, 1)
    assert len(trackers) == 1
    writer = MetricsWriter(tmp_path, first_step=1, trackers=trackers)
    writer.write(1, {"a": 0.5})
    writer.add(1, {"b": 0.25})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]} == {"a": 0.5, "b": 0.25}


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed: pip install -e '.[trackers]'")
def test_wandb_gets_every_metric_without_a_network(tmp_path: Path):
    log_in_a_process(tmp_path, "wandb", WANDB_MODE="offline")
    stored = b"".join(path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run-*/run-abc123.wandb"))
    assert b"critic/rewards/mean" in stored and b"val-core/toy/acc/mean@2" in stored


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed: pip install -e '.[trackers]'")
def test_trackio_gets_every_metric_without_a_network(tmp_path: Path):
    log_in_a_process(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    stored = b"".join(path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file())
    assert b"critic/rewards/mean" in stored and b"val-core/toy/acc/mean@2" in stored and b"abc123" in stored


def test_a_library_that_is_missing_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    check_installed(["tensorboard"])
    with pytest.raises(ConfigError, match=r"run.trackers: wandb: it is not installed; pip install 'wandb>=0.31'"):
        check_installed(["tensorboard", "wandb"])


def test_a_tracker_that_cannot_be_opened_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*_: object) -> None:
        raise ConnectionError("no login")

    monkeypatch.setattr(opening, "WandbTracker", refuse)
    assert len(open_trackers(make(tmp_path, "wandb", "tensorboard"), 1)) == 1
    assert caplog.messages == ["wandb cannot be opened: ConnectionError: no login; training goes on without it"]


class _Flaky:
    """Fails at steps 2 and 3, and when it is closed."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step: int, metrics: object) -> None:
        if step in (2, 3):
            raise RuntimeError("no network")
        self.steps.append(step)

    def close(self) -> None:
        raise TimeoutError("too slow")


def test_a_tracker_that_fails_in_the_middle_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "lens_megatron")
    flaky = _Flaky()
    writer = MetricsWriter(tmp_path, first_step=1, trackers=[GuardedTracker("wandb", flaky)])
    for step in (1, 2, 3, 4):
        writer.write(step, {"a": 1.0})
    writer.close()
    assert flaky.steps == [1, 4] and [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    failed, works, closed = caplog.messages
    assert failed.startswith("wandb failed at step 2: RuntimeError: no network; training goes on")
    assert works == "wandb works again; it lacks steps 2 to 3"
    assert closed.startswith("wandb could not be closed: TimeoutError: too slow")


@pytest.mark.parametrize(("value", "trackers"), [(True, ("tensorboard",)), (False, ())])
def test_the_older_option_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: bool, trackers: tuple[str, ...]
):
    caplog.set_level(logging.INFO, "lens_megatron")
    tree = json.loads(make(tmp_path).model_dump_json())
    del tree["run"]["trackers"]
    made = configuration.from_tree(tree | {"run": tree["run"] | {"tensorboard": value}})
    assert made.run.trackers == trackers
    said = f"run.tensorboard={str(value).lower()} is deprecated; set run.trackers=[{', '.join(trackers)}]"
    assert caplog.messages == [said]


def test_both_options_or_a_wrong_one_are_mistakes(tmp_path: Path):
    tree = json.loads(make(tmp_path).model_dump_json())
    for run, said in (
        ({"tensorboard": True}, "run.tensorboard and run.trackers are both set"),
        ({"trackers": ["mlflow"]}, "run.trackers"),
    ):
        with pytest.raises(ConfigError, match=said):
            configuration.from_tree(tree | {"run": tree["run"] | run})
