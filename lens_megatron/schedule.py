"""Which samples go into which micro-batch: balanced by their cost, within a budget of tokens. Pure."""

import heapq
from collections.abc import Sequence


def cost(length: int, hidden_size: int) -> int:
    """Relative cost of one sequence of `length` tokens in a layer: its matrix products, and causal attention.

    Per token a layer's matrices take about 24 h^2 multiply-adds (SwiGLU, no grouping), attention h per token before it.
    """
    return length * (24 * hidden_size + length)


def fewest(lengths: Sequence[int], max_tokens: int) -> int:
    """How many micro-batches `cut` needs at least: what first-fit-decreasing takes. A sample over budget goes alone."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((i for i, room in enumerate(free) if room >= length), None)
        if place is None:
            free.append(max(0, max_tokens - length))
        else:
            free[place] -= length
    return len(free)


def cut(lengths: Sequence[int], max_tokens: int, count: int, hidden_size: int) -> list[list[int]]:
    """Indices of the samples of each of `count` micro-batches, in rising order; some are empty if samples are few.

    Costliest sample first, each into the cheapest micro-batch with room; where that strands one, first fit, which
    `fewest` promised. Raises ValueError if `count` is less than `fewest`.
    """
    needed = fewest(lengths, max_tokens)
    if count < needed:
        raise ValueError(f"count: got {count} micro-batches, need {needed} for a budget of {max_tokens} tokens")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    parts = _cheapest_first(lengths, order, max_tokens, count, hidden_size) or _first_fit(lengths, order, max_tokens)
    return [sorted(part) for part in parts] + [[] for _ in range(count - len(parts))]


def _cheapest_first(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, count: int, hidden_size: int
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
        for entry in (*full, (spent + cost(lengths[index], hidden_size), part)):
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
