"""Every entry of a closed table can be chosen by its option, and every method of a registry can be found."""

from typing import get_args

import pytest

from lens_megatron.algorithms import registry
from lens_megatron.algorithms.aggregation import AGGREGATIONS
from lens_megatron.algorithms.corrections import CORRECTIONS
from lens_megatron.algorithms.registry import Kind
from lens_megatron.config import AlgorithmConfig, ConfigError

TABLES = {"aggregation": AGGREGATIONS, "correction": CORRECTIONS}
EVERY = [(kind, name) for kind in Kind for name in registry.names(kind)]


@pytest.mark.parametrize("option", TABLES)
def test_the_option_offers_what_the_table_holds(option: str):
    offered = get_args(AlgorithmConfig.model_fields[option].annotation)
    assert set(offered) == set(TABLES[option])


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=lambda part: str(part))
def test_every_method_says_what_it_is(kind: Kind, name: str):
    entry = registry.find(kind, name, "option")
    assert callable(entry.call) and entry.call.__doc__ and entry.paper
    assert all(field.description for field in entry.options.model_fields.values()), "an option without its meaning"
    entry.options()  # every option has a default


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grop", r"option: unknown method 'grop'; did you mean grpo\? \(your own: module:attribute\)"),
        ("xyz", "option: unknown method 'xyz'; known: crpo, .*grpo"),
        ("_hidden", "unknown method"),
        ("../grpo", "unknown method"),
        ("no_such_module:ENTRY", "cannot be loaded: ModuleNotFoundError: .*PYTHONPATH"),
        ("math:nothing", "math:nothing cannot be loaded: AttributeError"),
        ("math:pi", "math:pi is a float; expected an Entry"),
    ],
)
def test_a_name_without_a_method_is_refused(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        registry.find(Kind.ADVANTAGES, name, "option")


def test_options_that_a_method_does_not_have_are_refused():
    with pytest.raises(
        ConfigError, match=r"^unknown option algorithm.advantage_options.tau\nthe options of grpo are: none$"
    ):
        registry.choose(Kind.ADVANTAGES, "grpo", {"tau": 1}, "algorithm.advantage", "algorithm.advantage_options")


def test_a_misspelt_option_of_a_method_gets_the_near_one():
    with pytest.raises(ConfigError, match="^unknown option own.p_esy; did you mean p_easy"):
        registry.choose(Kind.SELECTION, "greso", {"p_esy": 1}, "selection.method", "own")
    with pytest.raises(ConfigError, match="^own.p_easy: 2: .*less than or equal to"):
        registry.choose(Kind.SELECTION, "greso", {"p_easy": 2}, "selection.method", "own")
