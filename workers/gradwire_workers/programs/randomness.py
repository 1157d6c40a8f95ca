"""Which operators of a graph draw random numbers, and the same graph with them switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from gradwire_proto.function_replay import ReplayedFunction
from gradwire_proto.graph_writes import parse_schema

# Parameters that decide whether an operator is random, and the value that makes it deterministic.
SWITCHES: dict[str, Any] = {"train": False, "training": False, "dropout": 0.0, "dropout_p": 0.0}
SWITCHED = frozenset(
    (
        *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
        *("dropout_", "feature_dropout_", "alpha_dropout_", "feature_alpha_dropout_"),
        *("rrelu", "rrelu_", "rrelu_with_noise", "rrelu_with_noise_", "rrelu_with_noise_functional"),
        *("scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    )
)


def is_random(module: fx.GraphModule) -> bool:
    """Whether running the graph draws random numbers."""
    return any(True for _ in _random_nodes(module))


def without_randomness(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes the same graph with dropout off and fixed numbers in place of random ones.

    Random numbers that have no stand-in here stay random.
    """
    copy = fx.GraphModule(module, fx.Graph())
    copy.graph = _copied(module.graph)
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copy, name, without_randomness(child))
        elif isinstance(child, ReplayedFunction):
            setattr(copy, name, child.with_graphs(without_randomness))
    for node in list(copy.graph.nodes):
        if _draws(node):
            _switch_off(node)
    copy.recompile()
    return copy


def _copied(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def _random_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    for graph_module in module.modules():
        if isinstance(graph_module, fx.GraphModule):
            yield from (node for node in graph_module.graph.nodes if _draws(node))


def _draws(node: fx.Node) -> bool:
    operator = node.meta.get("operator", "")
    if not operator.startswith("aten."):
        return False
    base = operator.split(".")[1]
    if base in SWITCHED:
        settings = {name: value for name, value, _ in _switches(node)}
        training = settings.get("train", settings.get("training", True))
        probability = settings.get("dropout", settings.get("dropout_p", settings.get("p", 1.0)))
        return training is not False and probability != 0
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _switches(node: fx.Node) -> list[tuple[str, Any, int]]:
    """(name, value, position) of each parameter that matters here."""
    found = []
    for index, parameter in enumerate(parse_schema(str(node.target._schema))):  # type: ignore[union-attr]
        if parameter.name in SWITCHES or parameter.name == "p":
            given = index < len(node.args)
            default = 0.0 if parameter.name == "dropout_p" else SWITCHES.get(parameter.name)
            value = node.args[index] if given else node.kwargs.get(parameter.name, default)
            found.append((parameter.name, value, index))
    return found


def _switch_off(node: fx.Node) -> None:
    base = node.meta["operator"].split(".")[1]
    if base in SWITCHED:
        for name, _, index in _switches(node):
            if name not in SWITCHES:
                continue
            if index < len(node.args):
                node.update_arg(index, SWITCHES[name])
            else:
                node.update_kwarg(name, SWITCHES[name])
    elif base in _STAND_INS:
        original = node.target
        node.target = _STAND_INS[base]
        node.meta["replaces"] = original


def _filled_like(value: float) -> Callable[..., Tensor]:
    def filled(like: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
        return torch.full_like(like, value, dtype=dtype)

    return filled


def _filled(value: float) -> Callable[..., Tensor]:
    def filled(size: list[int], *_: Any, dtype: torch.dtype | None = None, device: Any = None, **__: Any) -> Tensor:
        return torch.full(size, value, dtype=dtype or torch.get_default_dtype(), device=device)

    return filled


def _fill_in_place(value: float) -> Callable[..., Tensor]:
    def fill(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            return tensor.fill_(value)

    return fill


def _round(probabilities: Tensor, *_: Any, **__: Any) -> Tensor:
    return (probabilities.detach() >= 0.5).to(probabilities.dtype)


def _reversed_order(count: int, *_: Any, dtype: torch.dtype | None = None, device: Any = None, **__: Any) -> Tensor:
    # Not the identity: a permutation of the batch's rows must be seen to mix them.
    return torch.arange(count - 1, -1, -1, dtype=dtype or torch.int64, device=device)


_STAND_INS: dict[str, Callable[..., Any]] = {
    "rand": _filled(0.5),
    "randn": _filled(0.5),
    "rand_like": _filled_like(0.5),
    "randn_like": _filled_like(0.5),
    "uniform_": _fill_in_place(0.5),
    "normal_": _fill_in_place(0.5),
    "bernoulli_": _fill_in_place(1.0),
    "exponential_": _fill_in_place(1.0),
    "bernoulli": _round,
    "randperm": _reversed_order,
}
