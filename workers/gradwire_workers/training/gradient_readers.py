"""What computes the gradients that a query asks for: of the batch, of each example, or the Hessian times vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gradwire_proto.values import GradientQuery, Limits
from gradwire_workers.shard import Shard
from gradwire_workers.training import tensor_names
from gradwire_workers.training.gradient_reading import GradientReading, read_gradients
from gradwire_workers.training.hessian_product import read_products
from gradwire_workers.training.passes import Passes
from gradwire_workers.training.per_example import read_per_example
from gradwire_workers.training.replica import Replica

Reader = Callable[[Shard, int], GradientReading]
"""(shard, number of the command) -> what this rank finds."""


@dataclass(frozen=True)
class ParameterNames:
    """A model's parameters by name, and under every name that they have."""

    own: Mapping[str, nn.Parameter]
    aliases: Mapping[str, nn.Parameter]


def gradient_reader(
    passes: Passes,
    replica: Replica,
    names: ParameterNames,
    query: GradientQuery,
    vectors: Mapping[str, Tensor] | None,
    limits: Limits,
) -> Reader:
    """Refuses names and vectors that fit no parameter, before anything is computed. `vectors`: of Hessian products."""
    if vectors:
        checked = tensor_names.check_gradients(vectors, names.aliases, field="vectors")
        along = dict(zip(vectors, checked.items(), strict=True))
        return lambda shard, command: read_products(replica, shard, query, along, command)
    parameters = tensor_names.select_parameters(query.wrt, names.own, names.aliases)
    if query.per_example:
        most = limits.tensor_bytes
        return lambda shard, command: read_per_example(replica, shard, query, parameters, command, most)
    return lambda shard, command: read_gradients(passes, shard, query, parameters, command)
