"""The order in which prompts are drawn from a dataset."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.data.prompts import PromptStream
from lens_megatron.types import Prompt


def numbered(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(i, (i,), (False,), "1", "p", "s") for i in range(count))


def drawn(stream: PromptStream, steps) -> list[int]:
    return [prompt.index for step in steps for prompt in stream.take(step)]


def test_without_shuffling_a_step_runs_over_the_end_of_the_dataset():
    stream = PromptStream(numbered(5), 3, seed=0, shuffle=False)
    assert [[p.index for p in stream.take(step)] for step in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert [stream.epoch(step) for step in (0, 1, 5)] == [0.0, 0.6, 3.0]


def test_the_order_of_a_seed_is_fixed_for_ever():
    """A run resumed with a later version of this file must meet the prompts it has not seen."""
    assert drawn(PromptStream(numbered(8), 4, seed=7), range(4)) == [0, 6, 7, 2, 4, 5, 1, 3, 6, 3, 1, 0, 2, 4, 7, 5]


def test_a_step_larger_than_the_dataset_spans_epochs():
    assert Counter(drawn(PromptStream(numbered(3), 9, seed=0), [5])) == {0: 3, 1: 3, 2: 3}


def test_only_the_last_permutation_is_kept():
    """At millions of prompts, one per epoch would add up."""
    stream = PromptStream(numbered(4), 6, seed=0)
    drawn(stream, range(20))
    assert len(stream._last_order) == 1


def test_seed_and_epoch_change_the_order():
    stream = PromptStream(numbered(50), 50, seed=1)
    first, second = drawn(stream, [0]), drawn(stream, [1])
    assert first != second and first != list(range(50))
    assert drawn(PromptStream(numbered(50), 50, seed=2), [0]) not in (first, second)


@settings(deadline=None, max_examples=100, database=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31 - 1), st.integers(0, 30), st.booleans())
def test_each_epoch_holds_each_prompt_once_and_a_fresh_stream_goes_on_alike(count, per_step, seed, step, shuffle):
    stream = PromptStream(numbered(count), per_step, seed, shuffle)
    order = drawn(stream, range(step + 1))
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    assert len(set(order[len(order) // count * count :])) == len(order) % count
    fresh = PromptStream(numbered(count), per_step, seed, shuffle)
    assert drawn(fresh, [step]) == order[step * per_step :]
    assert drawn(stream, [0]) == order[:per_step]  # asked again, out of order


def test_a_stream_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="a stream needs at least one prompt"):
        PromptStream((), 1, 0)
    with pytest.raises(ValueError, match="prompts_per_step must be at least 1, got 0"):
        PromptStream(numbered(1), 0, 0)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        PromptStream(numbered(1), 1, 0).take(-1)
