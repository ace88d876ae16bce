"""Decides which bundles of samples go to which rank and micro-batch, balanced by cost within a token budget.

All functions are pure. A bundle is one sample, or several that share their prompt: see bundles.py.
"""

import heapq
from collections.abc import Sequence


def cost(length: int, hidden_size: int) -> int:
    """Returns the relative cost of a sequence of `length` tokens in a layer: matrix products and causal attention.

    Per token a layer's matrices take about 24 h^2 multiply-adds (SwiGLU, no grouping), attention h per token before it.
    """
    return length * (24 * hidden_size + length)


def assign(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Returns the indices of the bundles of each data-parallel rank, in rising order; a rank may have none.

    The costliest bundle goes first, each to the rank with the least to do, of several such ranks to the lowest. The
    maximum is at most 4/3 of the best possible one (Graham 1969, "Bounds on multiprocessing timing anomalies"). Every
    rank that knows all costs comes to the same answer.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]  # (cost so far, rank)
    for index in _largest_first(costs):
        spent, rank = heap[0]
        shares[rank].append(index)
        heapq.heapreplace(heap, (spent + costs[index], rank))
    return [sorted(share) for share in shares]


def imbalance(costs: Sequence[int], shares: Sequence[Sequence[int]]) -> float:
    """Returns the cost of the costliest share divided by the mean: 1 is perfect, and 1 is returned for no bundles."""
    sums = [sum(costs[i] for i in share) for share in shares]
    total = sum(sums)
    return max(sums) * len(sums) / total if total else 1.0


def fewest(lengths: Sequence[int], max_tokens: int) -> int:
    """Returns how many micro-batches first-fit-decreasing takes, which `cut` needs. A bundle over budget goes alone."""
    return len(_first_fit(lengths, _largest_first(lengths), max_tokens))


def cut(lengths: Sequence[int], costs: Sequence[int], max_tokens: int, count: int) -> list[list[int]]:
    """Returns the indices of the bundles of each of `count` micro-batches, in rising order; some may be empty.

    The longest bundle goes first, each into the cheapest micro-batch with room; where one finds no room, first fit
    takes over, which `fewest` promised. Raises ValueError if `count` is less than `fewest`.

    Args:
        lengths: tokens of every bundle.
        costs: their costs, as `cost` counts them.
    """
    order = _largest_first(lengths)
    fitted = _first_fit(lengths, order, max_tokens)
    if count < len(fitted):
        raise ValueError(f"count: got {count} micro-batches, need {len(fitted)} for a budget of {max_tokens} tokens")
    parts = _cheapest_first(lengths, costs, order, max_tokens, count) or fitted
    return [sorted(part) for part in parts] + [[] for _ in range(count - len(parts))]


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))


def _cheapest_first(
    lengths: Sequence[int], costs: Sequence[int], order: Sequence[int], max_tokens: int, count: int
) -> list[list[int]] | None:
    parts: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    heap = [(0, part) for part in range(count)]  # (cost so far, micro-batch)
    for index in order:
        full = []
        while heap and tokens[heap[0][1]] and tokens[heap[0][1]] + lengths[index] > max_tokens:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        spent, part = heapq.heappop(heap)
        parts[part].append(index)
        tokens[part] += lengths[index]
        for entry in (*full, (spent + costs[index], part)):
            heapq.heappush(heap, entry)
    return parts


def _first_fit(lengths: Sequence[int], order: Sequence[int], max_tokens: int) -> list[list[int]]:
    parts: list[list[int]] = []
    free: list[int] = []
    for index in order:
        place = next((i for i, room in enumerate(free) if room >= lengths[index]), None)
        if place is None:
            place = len(parts)
            parts.append([])
            free.append(max_tokens)
        parts[place].append(index)
        free[place] = max(0, free[place] - lengths[index])
    return parts
