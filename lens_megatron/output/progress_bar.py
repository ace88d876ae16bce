"""Shows finished rollouts as a live bar on a terminal."""

from tqdm import tqdm

from lens_megatron.rollout.progress import SamplingProgress


class ProgressBar:
    """Implements `rollout.progress.ProgressDisplay`. The bar is shown while a step is sampled."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def begin(self, step: int) -> None:
        self.bar = tqdm(total=0, desc=f"step {step} sampling", unit="rollout", leave=False)

    def show(self, progress: SamplingProgress) -> None:
        if self.bar is None:
            return
        self.bar.total = progress.total
        self.bar.set_postfix_str(
            f"{progress.running} running, {progress.waiting} waiting, {progress.second_wave} second wave, "
            f"{progress.tokens_per_second:.0f} tokens/s",
            refresh=False,
        )
        self.bar.update(progress.finished - self.bar.n)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
