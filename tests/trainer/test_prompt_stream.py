"""The order in which prompts are drawn from a dataset."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.data.prompts import PromptStream
from lens_megatron.types import Prompt


def numbered(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(i, (i,), (False,), "1", "p", "s") for i in range(count))


def drawn(stream: PromptStream, start: int, stop: int) -> list[int]:
    return [stream.at(position).index for position in range(start, stop)]


def test_without_shuffling_prompts_come_as_they_stand():
    stream = PromptStream(numbered(5), seed=0, shuffle=False)
    assert drawn(stream, 0, 12) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert stream.epoch_length == 5


def test_the_order_of_a_seed_is_fixed_for_ever():
    """A run resumed with a later version of this file must meet the prompts it has not seen."""
    assert drawn(PromptStream(numbered(8), seed=7), 0, 16) == [0, 6, 7, 2, 4, 5, 1, 3, 6, 3, 1, 0, 2, 4, 7, 5]


def test_only_the_last_two_permutations_are_kept():
    """At millions of prompts, one per epoch would add up."""
    stream = PromptStream(numbered(4), seed=0)
    drawn(stream, 0, 120)
    assert len(stream._last_order) == 2


def test_seed_and_epoch_change_the_order():
    stream = PromptStream(numbered(50), seed=1)
    first, second = drawn(stream, 0, 50), drawn(stream, 50, 100)
    assert first != second and first != list(range(50))
    assert drawn(PromptStream(numbered(50), seed=2), 0, 50) not in (first, second)


@settings(deadline=None, max_examples=100, database=None)
@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 2**31 - 1), st.booleans())
def test_each_epoch_holds_each_prompt_once_and_a_fresh_stream_goes_on_alike(count, position, seed, shuffle):
    stream = PromptStream(numbered(count), seed, shuffle)
    order = drawn(stream, 0, position + 1)
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    assert len(set(order[len(order) // count * count :])) == len(order) % count
    assert drawn(PromptStream(numbered(count), seed, shuffle), position, position + 1) == order[-1:]
    assert drawn(stream, 0, 1) == order[:1]  # asked again, out of order


def test_a_stream_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="a stream needs at least one prompt"):
        PromptStream((), 0)
    with pytest.raises(ValueError, match="position must not be negative, got -1"):
        PromptStream(numbered(1), 0).at(-1)
