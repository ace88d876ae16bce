"""Finds which checkpoints of a run are whole: every file of each is read and compared with its checksum."""

from collections.abc import Iterator
from pathlib import Path

from lens_megatron.policy import checkpoint_files
from lens_megatron.policy.checked_files import DamageError
from lens_megatron.policy.checkpoint_files import CheckpointError
from lens_megatron.tools.diagnosis.check import Check, CheckStatus


def examine(path: Path) -> Iterator[Check]:
    """Makes one check per checkpoint, oldest first.

    Args:
        path: a run folder, its folder of checkpoints, or one checkpoint.

    Raises:
        CheckpointError: there is none at `path`, or it cannot be listed.
    """
    path = path.absolute()  # the current folder may be a checkpoint
    if checkpoint_files.step_of(path) is not None and path.is_dir():
        return map(examine_one, [path])
    found = [*checkpoint_files.published(path), *checkpoint_files.published(path / "checkpoints")]
    if not found:
        raise CheckpointError(f"no checkpoint in {path}; give a run folder, its checkpoints/ or one iter_* folder")
    return map(examine_one, found)


def examine_one(path: Path) -> Check:
    """Reads all of a checkpoint and compares it with its checksums."""
    try:
        checkpoint = checkpoint_files.inspect(path)
        checkpoint_files.verify(checkpoint)
    except DamageError as error:
        return Check(path.name, CheckStatus.FAIL, f"damaged: {error}", "a run passes it over; restore it from a copy")
    index = checkpoint.index
    size = sum(record.size for record in (*index.files.values(), *index.export.values()))
    found = f"{checkpoint.state.step} steps, {len(index.files) + len(index.export)} files, {size / 1e9:.3f} GB"
    if not checkpoint.has_checksums:
        remedy = "saved by an older version; the next save has checksums"
        return Check(path.name, CheckStatus.WARN, f"{found}: the sizes are right, there are no checksums", remedy)
    try:
        checkpoint_files.verify_export(checkpoint)
    except DamageError as error:
        remedy = "a run goes on from it; take the weights for use elsewhere from another checkpoint"
        return Check(path.name, CheckStatus.FAIL, f"{found}: whole but for its export: hf/{error}", remedy)
    return Check(path.name, CheckStatus.OK, f"{found}: whole" + (", without hf/" if not index.export else ""))
