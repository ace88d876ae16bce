"""One oracle of each library for all tests of a file."""

from collections.abc import Iterator

import pytest
from oracle_client import Oracle, start


@pytest.fixture(scope="module")
def verl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    yield from start("verl", tmp_path_factory.mktemp("verl"))


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    yield from start("trl", tmp_path_factory.mktemp("trl"))
