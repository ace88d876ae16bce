"""The state of the selection in a checkpoint: as it was after the step, restored, missing, or damaged."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import pytest
from checkpoint_policy import config, train_step, writer
from chosen import method
from records import PROMPT
from test_checkpoints import STATE, edit, newest

from lens_megatron.algorithms.registry import Kind
from lens_megatron.algorithms.selection import Selection
from lens_megatron.algorithms.selection.every_prompt import EveryPrompt
from lens_megatron.data.prompts import PromptStream
from lens_megatron.policy import checkpoint, checkpoint_files, selection_state
from lens_megatron.policy.checkpoint_files import CheckpointError, TrainingState, steps_saved
from lens_megatron.policy.model import Policy, build_policy
from lens_megatron.policy.parallel import Mesh
from lens_megatron.results import Outcome


@pytest.fixture(scope="module")
def policy(root: Path, mesh: Mesh) -> Policy:
    built = config(root, {})
    made = build_policy(built, mesh)
    train_step(made, built.algorithm)
    return made


@pytest.fixture
def saved_twice(root: Path, policy: Policy, tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2, without a state of a selection."""
    with writer(policy, tmp_path / "checkpoints", root) as saver:
        saver.save(1)
        saver.save(2)
    return tmp_path / "checkpoints"


def observed(name: str, prompts: int) -> Selection:
    """A selection that has seen `prompts` prompts fail."""
    chosen = method(Kind.SELECTION, name)
    made = chosen.call(PromptStream([replace(PROMPT, index=row) for row in range(10)], 0), 0, chosen.options)
    failed = [Outcome(place, p.index, False, 0.0, 0.0, 1, 0) for place, p in enumerate(made.candidates(1, prompts))]
    made.observe(1, failed)
    return made


def restoring(selection: Selection, name: str) -> Callable[[TrainingState], None]:
    return partial(selection_state.restore, selection, method(Kind.SELECTION, name), 4)


@pytest.mark.parametrize("name", ["every_prompt", "greso"])
def test_the_selection_is_what_it_was_when_it_was_saved(name: str, root: Path, policy: Policy, tmp_path: Path):
    saved, found = observed(name, 7), observed(name, 2)
    expected = json.dumps(saved.state())
    with writer(policy, tmp_path, root, selection=saved, background=True) as saver:
        saver.save(1)
        saved.observe(2, [Outcome(0, saved.candidates(2, 1)[0].index, False, 1.0, 1.0, 1, 0)])
    state = checkpoint.resume(policy, tmp_path, restoring(found, name))
    assert json.dumps(found.state()) == json.dumps(state.selection) == expected != json.dumps(saved.state())
    assert state.epoch == 0.7


def test_an_older_checkpoint_goes_on_where_every_prompt_would_be(saved_twice: Path, policy: Policy):
    edit(STATE, lambda s: (s.pop("selection"), s.pop("epoch")))(newest(saved_twice))
    found = observed("every_prompt", 0)
    assert checkpoint.resume(policy, saved_twice, restoring(found, "every_prompt")).step == 2
    assert found.state() == {"position": 8}
    with pytest.raises(CheckpointError, match="checkpoint of step 2 .*selection.method=greso cannot go on from it"):
        checkpoint.resume(policy, saved_twice, restoring(observed("greso", 0), "greso"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"position": "8"}, "ValueError: position: expected a number of prompts, found '8'"),
        ({"position": -8}, "ValueError: position: expected a number of prompts, found -8"),
        ({}, "ValueError: expected position; found nothing"),
        ({"position": 8, "p_easy": 0.5}, "ValueError: expected position; found p_easy, position"),
    ],
)
def test_a_state_that_cannot_be_restored_is_damage(
    state: dict, message: str, saved_twice: Path, policy: Policy, caplog
):
    edit(STATE, lambda s: s.update(selection=state))(newest(saved_twice))
    found = observed("every_prompt", 0)
    assert checkpoint.resume(policy, saved_twice, restoring(found, "every_prompt")).step == 1
    assert found.state() == {"position": 4}
    (said,) = caplog.messages
    what = "state.json holds no state of selection.method=every_prompt"
    assert f"{newest(saved_twice)} cannot be used: {what}: {message}" in said


class Unusual(EveryPrompt):
    """A user's own method, whose state JSON cannot hold, and which raises what nobody expects."""

    def state(self) -> dict:
        return {"position": {self.position}}

    def restore(self, state: Mapping) -> None:
        raise AssertionError("what is this?")


def test_a_method_that_fails_ends_the_run_with_its_error(saved_twice: Path, root: Path, policy: Policy, caplog):
    unusual = Unusual(PromptStream([PROMPT], 0))
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        checkpoint.resume(policy, saved_twice, restoring(unusual, "every_prompt"))
    assert "AssertionError: what is this?" in caplog.text
    with (
        writer(policy, saved_twice, root, selection=unusual) as saver,
        pytest.raises(CheckpointError, match="not written .*TypeError: Object of type set is not JSON serializable"),
    ):
        saver.save(3)
    assert steps_saved(saved_twice) == 2


def test_the_state_of_a_million_prompts_is_a_line(tmp_path: Path):
    streaks = list(range(1000))
    state = TrainingState(3, 3, 3, 3, {"world_size": 0}, 0.5, {"position": 5, "prompts": streaks}, 0.25)
    checkpoint_files.write_index(tmp_path, state)
    text = (tmp_path / STATE).read_text()
    assert len(text.splitlines()) == 2 + len(fields(TrainingState))
    assert json.loads(text) == asdict(state)
