"""Every record that travels comes back as it was; what is not its bytes is refused, and nothing else happens."""

import math
import random
import struct
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import PROMPT, group

from lens_megatron.policy.export_plan import _Description
from lens_megatron.records import codec
from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.rollout.request_store import RequestBatch, _Withdrawal
from lens_megatron.rollout.vllm.tensor_parallel import Command, EnginePrompts
from lens_megatron.types import Group, Prompt, PurifiedPrompt, Rollout, Sample, TrainingGroup

RECORDS = (
    Prompt, PurifiedPrompt, Rollout, Group, TrainingGroup, Sample, Request, Completion, RequestBatch, _Withdrawal,
    Command, EnginePrompts, _Description,
)  # fmt: skip
HEADER_BYTES = 16
SCALARS = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(),
    bool: st.booleans(),
    str: st.text(st.characters(), max_size=6),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type that a record may have, at the edges too: NaN, the largest integers, halves of surrogates."""
    if hint in SCALARS:
        return SCALARS[hint]
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{field.name: values_of(hints[field.name]) for field in fields(hint)})
    if get_origin(hint) is tuple:
        return st.lists(values_of(get_args(hint)[0]), max_size=3).map(tuple)
    return st.one_of(*(st.none() if part is NoneType else values_of(part) for part in get_args(hint)))


def exactly(value: Any) -> Any:
    """`value`, comparable to the bit: NaN is equal to itself, 0.0 is not -0.0, 1 is not True."""
    if is_dataclass(value):
        return type(value).__name__, [exactly(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, tuple):
        return [exactly(item) for item in value]
    return struct.pack("<d", value) if isinstance(value, float) else (type(value).__name__, value)


@pytest.mark.parametrize("record_type", RECORDS, ids=lambda kind: kind.__name__)
def test_records_come_back_to_the_bit(record_type: type):
    @given(st.lists(values_of(record_type), max_size=3))
    def check(records: list[Any]) -> None:
        found = codec.decode(record_type, codec.encode(record_type, records))
        assert [exactly(record) for record in found] == [exactly(record) for record in records]

    check()


@pytest.mark.parametrize("record_type", RECORDS, ids=lambda kind: kind.__name__)
def test_any_bytes_are_records_or_a_value_error(record_type: type):
    """Cut off, with bytes changed, with bytes after them: whatever is read has its types, and is whole."""

    @given(values_of(record_type), st.randoms(use_true_random=False))
    def check(record: Any, chance: random.Random) -> None:
        whole = codec.encode(record_type, [record])
        for place in {chance.randrange(len(whole)) for _ in range(5)}:
            with pytest.raises(ValueError):
                codec.decode(record_type, whole[:place])
        with pytest.raises(ValueError, match="3 bytes follow the last of 1"):
            codec.decode(record_type, whole + b"\0\0\0")
        changed = bytearray(whole)
        for _ in range(3):
            changed[chance.randrange(len(changed))] = chance.choice((0, 1, 2, 127, 255))
        try:
            found = codec.decode(record_type, changed)
        except ValueError:
            return
        assert all(type(other) is record_type for other in found)

    check()


def test_counts_are_not_believed():
    """Numbers of tokens and of records that the bytes do not hold take no memory and no time."""
    whole = codec.encode(Completion, [Completion(7, (1, 2, 3), (-0.5, -0.25, -1.0), True, 4)])
    for count in (2**63 - 1, 2**64 - 1, 2**40, 9):
        changed = bytearray(whole)
        struct.pack_into("<Q", changed, HEADER_BYTES + 8, count)
        with pytest.raises(ValueError, match=f"{8 * count} bytes were to follow byte 32, and 66 do"):
            codec.decode(Completion, changed)
    with pytest.raises(ValueError, match="the end is missing"):
        codec.decode(Completion, struct.pack("<8sQ", whole[:8], 2**64 - 1))


def test_other_records_and_other_versions_are_refused():
    whole = codec.encode(Prompt, [PROMPT])
    with pytest.raises(ValueError, match="that of Rollout is [0-9a-f]{16}; run the same version of the project"):
        codec.decode(Rollout, whole)
    renamed, retyped, nested = (_changed_prompt(number="int"), _changed_prompt(index="float"), _holder(Prompt))
    assert (
        len({bytes(codec.encode(kind, [])[:8]) for kind in (Prompt, renamed, retyped, nested, _holder(renamed))}) == 5
    )
    for kind in (renamed, retyped, nested):
        with pytest.raises(ValueError, match="the bytes begin with the layout"):
            codec.decode(kind, whole)


def _changed_prompt(**first: str) -> type:
    """A record named Prompt with the fields of Prompt, but for the first."""
    hints = {name: {"int": int, "float": float}[kind] for name, kind in first.items()}
    rest = {field.name: hint for field, hint in zip(fields(Prompt), get_type_hints(Prompt).values(), strict=True)}
    del rest["index"]
    return dataclass(frozen=True)(type("Prompt", (), {"__annotations__": {**hints, **rest}}))


def _holder(kind: type) -> type:
    return dataclass(frozen=True)(type("Holder", (), {"__annotations__": {"held": kind}}))


def test_what_a_type_cannot_hold_is_not_written():
    completion = Completion(7, (1, 2**63), (-0.5, -0.25), True, 4)
    with pytest.raises(ValueError, match="a Completion cannot be encoded"):
        codec.encode(Completion, [completion])
    with pytest.raises(ValueError, match="a Prompt cannot be encoded"):
        codec.encode(Prompt, [group("1")])
    with pytest.raises(TypeError, match="which has no form in bytes"):
        codec.encode(_holder(dict), [])


def test_a_rollout_of_unequal_lengths_is_not_read_wrong():
    uneven = Rollout((5, 6), (-0.5,), True, group("1").native[0].origin, 0, math.nan, group("1").native[0].status)
    (found,) = codec.decode(Rollout, codec.encode(Rollout, [uneven]))
    assert found.token_ids == (5, 6) and found.log_probs == (-0.5,) and math.isnan(found.reward)
