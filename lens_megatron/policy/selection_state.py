"""Puts the state of a selection back when a run goes on from a checkpoint."""

from lens_megatron.algorithms.entry import Method
from lens_megatron.algorithms.selection import Selection, SelectionFactory
from lens_megatron.algorithms.selection.every_prompt import EveryPrompt
from lens_megatron.policy.checked_files import DamageError
from lens_megatron.policy.checkpoint_files import STATE, CheckpointError, TrainingState


def restore(
    selection: Selection, method: Method[SelectionFactory], prompts_per_step: int, state: TrainingState
) -> None:
    """Puts the state back that `selection`, made by `method`, had after the checkpoint's last step.

    A checkpoint of an older version has none. Such a run took `prompts_per_step` prompts in every step, so that the
    position of `every_prompt` follows from the step.

    Raises:
        CheckpointError: the checkpoint has no state, and the method is another one.
        DamageError: the state is none of this method.
    """
    saved = state.selection
    if saved is None:
        if not isinstance(selection, EveryPrompt):
            raise CheckpointError(
                f"the checkpoint of step {state.step} was saved without a state of the selection, as older versions "
                f"do; selection.method={method.name} cannot go on from it: start another run with model.path at its hf/"
            )
        saved = {"position": state.step * prompts_per_step}
    try:
        selection.restore(saved)
    except Exception as error:  # the method can be the user's, and may raise anything
        raise DamageError(
            f"{STATE} holds no state of selection.method={method.name}: {type(error).__name__}: {error}"
        ) from error
