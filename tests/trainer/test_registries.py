"""Every entry of a registry can be chosen by its option, and every choice of the option has an entry."""

from typing import get_args

import pytest

from lens_megatron.algorithms.advantages import ADVANTAGES
from lens_megatron.algorithms.aggregation import AGGREGATIONS
from lens_megatron.algorithms.corrections import CORRECTIONS
from lens_megatron.algorithms.objectives import OBJECTIVES
from lens_megatron.config import AlgorithmConfig

REGISTRIES = {
    "advantage": ADVANTAGES,
    "ratio": OBJECTIVES,
    "aggregation": AGGREGATIONS,
    "correction": CORRECTIONS,
}


@pytest.mark.parametrize("option", REGISTRIES)
def test_the_option_offers_what_the_registry_holds(option: str):
    offered = get_args(AlgorithmConfig.model_fields[option].annotation)
    assert set(offered) == set(REGISTRIES[option])
