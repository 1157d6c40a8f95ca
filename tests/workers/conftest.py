"""What all tests of the workers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch_forks import TorchForks


@pytest.fixture(scope="session")
def torch_forks() -> Iterator[TorchForks]:
    """Starts programs that find torch imported."""
    forks = TorchForks()
    yield forks
    forks.close()
