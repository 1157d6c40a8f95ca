"""An Architecture holds names and numbers, and says of anything else where it stands."""

from __future__ import annotations

import pytest
import torch

from gradwire import Architecture
from gradwire.errors import InvalidArgument
from gradwire_proto.values import ArchitectureSpec

LINEAR = Architecture("torch.nn.Linear", in_features=2, out_features=3)


def test_architectures_and_dicts_nest_alike():
    plain = {"name": "torch.nn.Linear", "config": {"in_features": 2, "out_features": 3}}
    nested = Architecture("torch.nn.Sequential", weights="team", layers=(LINEAR, plain))
    config = {"layers": [plain, plain]}
    assert nested.spec() == ArchitectureSpec(name="torch.nn.Sequential", config=config, weights="team")
    assert Architecture("torch.nn.Sequential", layers={"a": LINEAR}).spec().config == {"layers": {"a": plain}}


def test_an_argument_may_have_the_name_name():
    assert Architecture("torch.nn.Linear", name=3).spec().config == {"name": 3}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"layers": [LINEAR, torch.nn.ReLU()]}, "architecture.layers[1]"),
        ({"activation": torch.relu}, "architecture.activation"),
        ({"weight": torch.zeros(2)}, "architecture.weight"),
        ({"layers": {"a": [object()]}}, "architecture.layers.a[0]"),
        ({"layers": [Architecture("torch.nn.Linear", weights="gpt2")]}, "architecture.layers[0]"),
    ],
)
def test_what_is_neither_is_refused_where_it_stands(config, field):
    with pytest.raises(InvalidArgument) as refused:
        Architecture("torch.nn.Sequential", **config)
    assert (refused.value.reason, refused.value.field) == ("ARCHITECTURE_INVALID", field)


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(InvalidArgument) as refused:
        Architecture(torch.nn.Linear)  # type: ignore[arg-type]
    assert refused.value.field == "architecture.name"
