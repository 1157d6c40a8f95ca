"""gradwire: train any PyTorch model from a laptop as if the cluster's GPUs were local.

    import gradwire
    from gradwire import optim

    with gradwire.launch() as client:
        model = client.create_model(
            net, loss=nn.CrossEntropyLoss(), optimizer=optim.SGD(lr=0.1), example=(x, y), workers=2
        )
        print(model.train_step(x, y).loss)

Importing this package does nothing and is quick: torch and grpc come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from gradwire import errors, optim
from gradwire.architecture import Architecture
from gradwire.embedded_service import launch
from gradwire.fit_results import FitResult, FitStatus
from gradwire.tls import TLS
from gradwire_proto.values import (
    Checkpoint,
    CompiledKernels,
    GradientResult,
    Limits,
    ModelInfo,
    ServerInfo,
    Sharding,
    StepResult,
    Timing,
)

if TYPE_CHECKING:
    from gradwire.client import Client, connect
    from gradwire.datasets import Dataset
    from gradwire.futures import Future
    from gradwire.model import Model

__all__ = [
    "TLS",
    "Architecture",
    "Checkpoint",
    "Client",
    "CompiledKernels",
    "Dataset",
    "FitResult",
    "FitStatus",
    "Future",
    "GradientResult",
    "Limits",
    "Model",
    "ModelInfo",
    "ServerInfo",
    "Sharding",
    "StepResult",
    "Timing",
    "__version__",
    "connect",
    "errors",
    "launch",
    "optim",
]

__version__: str
"""The version of this distribution."""

_HOMES = {
    "Client": "gradwire.client",
    "Dataset": "gradwire.datasets",
    "Future": "gradwire.futures",
    "Model": "gradwire.model",
    "connect": "gradwire.client",
}
"""Where the names are that bring torch and grpc."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version("gradwire")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'gradwire' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
