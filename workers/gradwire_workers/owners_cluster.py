"""A cluster as one owner has it: the ranks that it gives serve nobody else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradwire_proto.values import (
    Batch,
    DerivativeQuery,
    DerivativeResult,
    FunctionSpec,
    GradientQuery,
    GradientResult,
    ModelSpec,
    NamedTensors,
    TensorData,
)
from gradwire_workers.pool.capacity import Capacity
from gradwire_workers.worker_group import WorkerGroup

if TYPE_CHECKING:
    from gradwire_workers.cluster import Cluster


class OwnersCluster:
    """See the module."""

    def __init__(self, cluster: Cluster, owner: str) -> None:
        self._cluster = cluster
        self._owner = owner

    @property
    def capacity(self) -> Capacity:
        """What there is and what is free, for all owners together."""
        return self._cluster.capacity

    async def start_group(
        self, spec: ModelSpec, tensors: NamedTensors, example: Batch | None, **how: Any
    ) -> WorkerGroup:
        """See `Cluster.start_group`."""
        return await self._cluster.start_group(spec, tensors, example, owner=self._owner, **how)

    async def compute_function_gradients(
        self, function: FunctionSpec, batch: Batch, query: GradientQuery
    ) -> GradientResult:
        """Gradients of a function that no model holds. See `FunctionRank`."""
        return await self._cluster.functions(self._owner).compute_gradients(function, batch, query)

    async def differentiate_function(
        self, function: FunctionSpec, batch: Batch, query: DerivativeQuery, vectors: Sequence[TensorData]
    ) -> DerivativeResult:
        """Another derivative of a function that no model holds. See `FunctionRank`."""
        return await self._cluster.functions(self._owner).differentiate(function, batch, query, vectors)
