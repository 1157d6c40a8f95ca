"""gradwire: train any PyTorch model from a laptop as if the cluster's GPUs were local.

    import gradwire
    from gradwire import optim

    with gradwire.launch() as client:
        model = client.create_model(net, loss=nn.CrossEntropyLoss(), optimizer=optim.SGD(lr=0.1), example=(x, y), workers=2)
        print(model.train_step(x, y).loss)

Importing this package does nothing and is quick: torch and grpc come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradwire import errors, optim
    from gradwire.client import Client, connect
    from gradwire.futures import Future
    from gradwire.launch import launch
    from gradwire.model import Model
    from gradwire.tls import TLS
    from gradwire_proto.values import GradientResult, Limits, ModelInfo, ServerInfo, Sharding, StepResult, Timing

__all__ = [
    "TLS",
    "Client",
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
    "TLS": "gradwire.tls",
    "Client": "gradwire.client",
    "Future": "gradwire.futures",
    "GradientResult": "gradwire_proto.values",
    "Limits": "gradwire_proto.values",
    "Model": "gradwire.model",
    "ModelInfo": "gradwire_proto.values",
    "ServerInfo": "gradwire_proto.values",
    "Sharding": "gradwire_proto.values",
    "StepResult": "gradwire_proto.values",
    "Timing": "gradwire_proto.values",
    "connect": "gradwire.client",
    "launch": "gradwire.launch",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "optim"):
        return import_module(f"gradwire.{name}")
    if name == "__version__":
        return _version("gradwire")
    if name not in _HOMES:
        raise AttributeError(f"module 'gradwire' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
