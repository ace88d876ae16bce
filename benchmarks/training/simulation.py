"""Divides the samples of a large step among ranks and micro-batches, without training, in one process of Python."""

import random
import statistics
import time

from benchmarks.training.load import lengths
from lens_megatron.batch import balance

HIDDEN, BUDGET, ALIGNMENT = 2048, 16384, 4
"""The hidden size of Qwen2.5-3B, the default token budget, and the multiple to which context parallelism over 2 ranks
pads each sample."""


def simulate(samples: int, ranks: int, limit: int = 4096) -> dict:
    """Divides `samples` of the long tail among `ranks`, and cuts every rank's share into micro-batches.

    `deal_s` are the seconds that each rank spends on dividing all samples, and `cut_s_per_rank` those that it spends on
    cutting its own share.
    """
    sizes = [p + r for p, r in lengths("tail", samples, limit)]
    start = time.perf_counter()
    costs = [balance.cost(size, HIDDEN) for size in sizes]
    shares = balance.assign(costs, ranks)
    dealt = time.perf_counter()
    counts = [balance.fewest([sizes[i] for i in share], BUDGET) for share in shares]
    needed, seconds, within = max(counts), [], []
    for share in shares:
        own, own_costs = [sizes[i] for i in share], [costs[i] for i in share]
        begin = time.perf_counter()
        parts = balance.cut(own, own_costs, BUDGET, needed)
        seconds.append(time.perf_counter() - begin)
        within.append(balance.imbalance(own_costs, parts))
        assert sorted(i for part in parts for i in part) == list(range(len(own)))
        assert all(len(part) < 2 or sum(own[i] for i in part) <= BUDGET for part in parts)
    stop = time.perf_counter()
    neighbours = [range(samples * r // ranks, samples * (r + 1) // ranks) for r in range(ranks)]
    shuffled = random.Random(0).sample(costs, samples)
    padded = sum(-(-n // ALIGNMENT) * ALIGNMENT for n in sizes)
    return {
        "samples": samples,
        "ranks": ranks,
        "tokens": sum(sizes),
        "deal_s": round(dealt - start, 3),
        "deal_and_cut_of_all_ranks_s": round(stop - start, 3),
        "cut_s_per_rank": round(statistics.median(seconds), 5),
        "micro_batches_per_rank": needed,
        "fewest_of_any_rank": min(counts),
        "imbalance": round(balance.imbalance(costs, shares), 6),
        "imbalance_without_dealing": round(balance.imbalance(shuffled, neighbours), 4),
        "imbalance_of_micro_batches_median": round(statistics.median(within), 4),
        "padding_waste": 0.0,
        "padding_waste_cp2": round(1 - sum(sizes) / padded, 6),
        "padding_waste_if_padded_to_the_longest": round(1 - sum(sizes) / (max(sizes) * samples), 4),
        "budget_left_empty": round(1 - sum(sizes) / (needed * ranks * BUDGET), 4),
    }
