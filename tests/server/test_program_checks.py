"""What is said of a loss that nobody would look at is refused before any rank sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import GraphInput, GraphLossSpec, Limits, ModelInfo, Variant
from gradwire_server.program_checks import check_model, check_new_variant


def weighing(fakes: Any) -> Variant:
    plain = fakes.variant()
    inputs = (GraphInput("tensor", "w"), GraphInput("input", 0))
    return replace(plain, weight_graph=plain.graph, weight_graph_inputs=inputs)


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"loss_reduction": "mean"}, "NO_LOSS", "model.loss_reduction"),
        ({"weighs": True}, "NO_LOSS", "model.program.graphs.variants[0].weight_graph"),
        (
            {"weighs": True, "loss": GraphLossSpec(), "loss_reduction": "sum"},
            "WEIGHTS_TWICE",
            "model.program.graphs.variants[0].weight_graph",
        ),
    ],
)
def test_weights_without_a_loss_or_given_twice_are_refused(changes, reason, field, fakes):
    weighs = changes.get("weighs", False)
    spec = fakes.model_spec(**{name: each for name, each in changes.items() if name != "weighs"})
    if weighs:
        spec = replace(spec, program=replace(spec.program, variants=(weighing(fakes),)))
    with pytest.raises(InvalidArgument) as caught:
        check_model(spec, {"w": fakes.two_floats()}, Limits())
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_variant_that_weighs_for_a_model_without_a_loss_is_refused(fakes):
    spec = fakes.model_spec()
    model = ModelInfo(
        id="m",
        state="ready",
        step=0,
        workers=1,
        sharding=None,
        num_parameters=2,
        optimizer=None,
        loss=None,
        labels={},
        created_at=0.0,
        tensors=spec.program.tensors,
    )
    with pytest.raises(InvalidArgument) as caught:
        check_new_variant(model, spec.program.operators, weighing(fakes), (), {}, {}, Limits())
    assert (caught.value.reason, caught.value.field) == ("NO_LOSS", "variant.weight_graph")
