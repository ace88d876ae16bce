"""One rank of two that write rollouts: `rollout_files_worker.py FOLDER`. Prints what it says and what it is
refused; rank 1's part of step 2 cannot be written, nor can rank 0 join the parts of step 4."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from lens_megatron.output.console import messages_on_console
from lens_megatron.output.rollout_files import RolloutFileError, RolloutFiles


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    mesh = SimpleNamespace(rank=rank, model_rank=0, dp_rank=rank, dp_size=2, device=torch.device("cpu"))
    side = RolloutFiles(folder, "rollouts", mesh, required=False)
    if rank == 0:
        (folder / ".step_000001.00002").write_text("of an attempt with three ranks\n")
        (folder / ".step_000002.00001").mkdir()
        (folder / "step_000004.jsonl").mkdir()
    torch.distributed.barrier()
    for step in range(1, 6):
        side.write(step, [f"step {step} rank {rank}"])
    asked = RolloutFiles(folder, "debug.save_rollouts", mesh, required=True)
    for step in (1, 2, 4):
        try:
            asked.write(step, [f"step {step} rank {rank}"])
        except RolloutFileError as error:
            print(f"refused: {error}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with messages_on_console():
        main()
