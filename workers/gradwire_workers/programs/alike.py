"""Whether two variants compute the same but for random operators, as a module's for training and evaluation may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gradwire_proto.codec import encode_variant
from gradwire_proto.graph_writes import parse_schema
from gradwire_proto.values import CustomFunction, Graph, Node, Variant
from gradwire_workers.programs.randomness import SWITCHED, SWITCHES


def are_alike(one: Variant, other: Variant, operators: Mapping[str, str]) -> bool:
    """Whether the variants are the same where dropout and its like are off. operators: the schemas, by name."""
    # As bytes, which tell 1 from 1.0 and from True.
    first, second = (
        encode_variant(replace(_switched_off(each, operators), name="", training=False)) for each in (one, other)
    )
    return first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def _switched_off(variant: Variant, operators: Mapping[str, str]) -> Variant:
    return replace(
        variant,
        graph=_graph(variant.graph, operators),
        loss_graph=_graph(variant.loss_graph, operators),
        weight_graph=_graph(variant.weight_graph, operators),
    )


def _graph(graph: Graph | None, operators: Mapping[str, str]) -> Any:
    if graph is None:
        return None
    return replace(
        graph,
        nodes=tuple(_node(node, operators) for node in graph.nodes),
        subgraphs={name: _graph(each, operators) for name, each in graph.subgraphs.items()},
        functions={name: _function(each, operators) for name, each in graph.functions.items()},
    )


def _function(function: CustomFunction, operators: Mapping[str, str]) -> CustomFunction:
    forward, backward = _graph(function.forward, operators), _graph(function.backward, operators)
    return replace(function, forward=forward, backward=backward)


def _node(node: Node, operators: Mapping[str, str]) -> Node:
    parts = node.operator.split(".")
    if parts[0] != "aten" or parts[1] not in SWITCHED:
        return node
    arguments, keywords = list(node.arguments), dict(node.keyword_arguments)
    for index, parameter in enumerate(parse_schema(operators[node.operator])):
        if parameter.name not in SWITCHES:
            continue
        if index < len(arguments):
            arguments[index] = SWITCHES[parameter.name]
        elif parameter.name in keywords:
            keywords[parameter.name] = SWITCHES[parameter.name]
    return replace(node, arguments=tuple(arguments), keyword_arguments=keywords)
