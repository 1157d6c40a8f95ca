"""What tests of modules on the service share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from end_to_end.local_twin import Pair, batch, make_net
from torch import nn

import gradwire


@pytest.fixture
def make_pair(client: gradwire.Client) -> Callable[..., Pair]:
    def make(workers: int = 2, net: nn.Module | None = None, **settings: Any) -> Pair:
        example = batch() if "loss" in settings else (batch()[0],)
        return Pair(client, net or make_net(), example, workers=workers, **settings)

    return make
