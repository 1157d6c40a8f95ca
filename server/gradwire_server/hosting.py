"""What all models of a service share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradwire_proto.values import Limits
from gradwire_server.keeping import Keeping
from gradwire_server.model_storage import ModelStorage
from gradwire_server.replaying import Replayer
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.workers import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosting:
    """See the module. `stored_replies` and `delete_seconds` are the settings of these names. most_models: of all
    owners, of whom `models_elsewhere` tells how many the others have.
    """

    cluster: Cluster
    tensors: TensorStore
    storage: ModelStorage
    replayer: Replayer
    limits: Limits
    keeping: Keeping
    stored_replies: int
    delete_seconds: float
    most_models: int
    models_elsewhere: Callable[[], int]
