"""Defines what every method of a registry declares about itself, and what a run holds of the methods it has chosen."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from lens_megatron.config import Section

Call = TypeVar("Call")


class Evidence(StrEnum):
    """What a method needs to be computed for it. A step computes each of them once if a method needs it, else never."""

    PROMPT_SCORES = "prompt_scores"
    """log pi_theta, log pi_ref and |their difference| of every token of a prompt: two forward passes over the prompts
    of a step."""
    PROMPT_GRADIENTS = "prompt_gradients"
    """The norm of the gradient of the answer's negative log-likelihood at every token of a prompt: a forward and a
    backward pass over the prompts of a step."""
    NOISE_MARKS = "noise_marks"
    """The tokens that the data marks as noise (`data.noise_key`). A run whose training data marks none is refused."""
    WHOLE_RESPONSES = "whole_responses"
    """All tokens of a response at once: the LM head then takes two passes instead of one."""


class NoOptions(Section):
    """The options of a method that has none."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[Call]):
    """A method as its file declares it, under the name ENTRY.

    Example: ENTRY = Entry(rloo, paper="Ahmadian et al. 2024, arXiv 2402.14740").
    """

    call: Call
    """The method itself. The package of its kind says what it takes and returns; its last argument is `options`."""
    paper: str
    """Where the method comes from; "this project" if from nowhere else."""
    options: type[Section] = NoOptions
    """The class of the method's own options."""
    needs: frozenset[Evidence] = frozenset()


@dataclass(frozen=True, slots=True)
class Method(Generic[Call]):
    """An entry that a run has chosen, with its options."""

    name: str
    call: Call
    options: Section
    needs: frozenset[Evidence] = frozenset()


AnyEntry = Entry[Callable[..., Any]]
