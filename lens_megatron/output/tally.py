"""Sums up metrics by name on every rank, and over ranks."""

from dataclasses import dataclass, field

import torch
from torch.distributed import ProcessGroup

Metrics = dict[str, float]


@dataclass(slots=True)
class Tally:
    """Collects local sums, counts and maxima by name."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def mean(self, name: str, values: list[float]) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + sum(values)
        self.counts[name] = self.counts.get(name, 0.0) + len(values)

    def total(self, name: str, value: float) -> None:
        self.sums[name], self.counts[name] = value, -1.0

    def share(self, name: str, part: float, whole: float) -> None:
        self.sums[name], self.counts[name] = part, whole

    def spread(self, name: str, values: list[float]) -> None:
        """Adds the metrics name/mean, name/max and name/min of `values`."""
        self.mean(f"{name}/mean", values)
        self.maxima[f"{name}/max"] = max(values, default=-torch.inf)
        self.maxima[f"{name}/min"] = max((-v for v in values), default=-torch.inf)

    def reduce(self, group: ProcessGroup, device: torch.device) -> Metrics:
        """Returns the global values; a mean over nothing is 0."""
        names = list(self.sums)
        sums = torch.tensor(
            [[self.sums[n] for n in names], [max(0.0, self.counts[n]) for n in names]], dtype=torch.float64
        )
        maxima = torch.tensor(list(self.maxima.values()) or [0.0], dtype=torch.float64)
        sums, maxima = sums.to(device), maxima.to(device)
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX, group=group)
        metrics = {
            name: total if self.counts[name] < 0 else total / count if count else 0.0
            for name, total, count in zip(names, *sums.tolist(), strict=True)
        }
        for name, value in zip(self.maxima, maxima.tolist(), strict=False):
            value = -value if name.endswith("/min") else value
            metrics[name] = value if abs(value) != torch.inf else 0.0
        return metrics
