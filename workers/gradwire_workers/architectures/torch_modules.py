"""The classes of torch.nn that a client may name, and modules made of them. No name of a client's reaches getattr."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import nn

from gradwire_proto.errors import GradwireError, InvalidArgument
from gradwire_workers.architectures.refusals import refused_by, unknown, wrong_value
from gradwire_workers.architectures.torch_arguments import check_argument

_DIMENSIONS = ("1d", "2d", "3d")
_NAMES = (
    # Left out: what holds no forward, makes its shapes of its first batch, trusts indices of a batch (EmbeddingBag,
    # MaxUnpool), spreads work by itself, draws numbers in its forward that are no dropout, or is a loss.
    *("Linear", "Bilinear", "Identity", "Flatten", "Unflatten", "Embedding", "PReLU"),
    *("ELU", "CELU", "SELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU"),
    *("LogSigmoid", "LogSoftmax", "Mish", "ReLU", "ReLU6", "RReLU", "Sigmoid", "SiLU", "Softmax", "Softmax2d"),
    *("Softmin", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink", "Threshold"),
    *("Dropout", "AlphaDropout", "FeatureAlphaDropout", *(f"Dropout{each}" for each in _DIMENSIONS)),
    *("LayerNorm", "GroupNorm", "RMSNorm", "LocalResponseNorm", "CosineSimilarity"),
    *("PairwiseDistance", "ChannelShuffle", "PixelShuffle", "PixelUnshuffle", "Fold", "Unfold"),
    *("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"),
    *("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "MultiheadAttention"),
    *("Transformer", "TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoder", "TransformerDecoderLayer"),
    *(
        f"{kind}{dimension}"
        for dimension in _DIMENSIONS
        for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm", "MaxPool", "AvgPool", "LPPool")
    ),
    *(
        f"{kind}{dimension}"
        for dimension in _DIMENSIONS
        for kind in ("AdaptiveAvgPool", "AdaptiveMaxPool", "CircularPad", "ConstantPad", "ReflectionPad")
    ),
    *(f"{kind}{dimension}" for dimension in _DIMENSIONS for kind in ("ReplicationPad", "ZeroPad")),
)
_SEQUENTIAL = "torch.nn.Sequential"
CLASSES: Mapping[str, type[nn.Module]] = {f"torch.nn.{name}": getattr(nn, name) for name in _NAMES}
"""By the name that clients use. torch.nn.Sequential, whose argument has a form of its own, comes on top."""

_MODULES: Mapping[str, Mapping[str, type[nn.Module]]] = {
    "torch.nn.TransformerEncoder": {"encoder_layer": nn.TransformerEncoderLayer, "norm": nn.Module},
    "torch.nn.TransformerDecoder": {"decoder_layer": nn.TransformerDecoderLayer, "norm": nn.Module},
}
"""Arguments that are modules, and of which class."""

_NOT_TAKEN = frozenset(
    # Where ranks compute is theirs to say; sparse gradients cannot be added up; max_norm writes weights in a forward.
    {"self", "args", "kwargs", "device", "dtype", "_weight", "_freeze", "sparse", "max_norm", "norm_type"}
    | {"custom_encoder", "custom_decoder"}
)


def names() -> tuple[str, ...]:
    """Every class of torch.nn that may be named."""
    return (_SEQUENTIAL, *CLASSES)


def build_torch_module(name: str, config: Mapping[str, Any], field: str) -> nn.Module:
    """The module of an allowed class. Modules among its arguments are made first, in the order of the config.

    Raises InvalidArgument: OPTION_UNKNOWN, OPTION_OUT_OF_RANGE, ARCHITECTURE_UNKNOWN, ARCHITECTURE_INVALID.
    """
    if name == _SEQUENTIAL:
        return _sequential(config, field)
    cls, parameters, modules = CLASSES[name], _parameters(CLASSES[name]), _MODULES.get(name, {})
    arguments: dict[str, Any] = {}
    for key, value in config.items():
        path = f'{field}["{key}"]'
        if key not in parameters:
            raise unknown(key, parameters, what=f"{name} takes no", field=path, reason="OPTION_UNKNOWN")
        if key not in modules:
            check_argument(parameters[key], value, path)
            arguments[key] = tuple(value) if isinstance(value, list) else value
            continue
        arguments[key] = None if value is None else _nested(value, path)
        if value is not None and not isinstance(arguments[key], modules[key]):
            raise wrong_value(path, f"a torch.nn.{modules[key].__name__}", value)
    return made(lambda: cls(**arguments), name, field)


def made(make: Callable[[], nn.Module], name: str, field: str) -> nn.Module:
    """What `make` makes; what its class refuses is the client's error."""
    try:
        return make()
    except GradwireError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        raise refused_by(name, error, field) from error


def _sequential(config: Mapping[str, Any], field: str) -> nn.Module:
    for key in config:
        if key != "layers":
            path = f'{field}["{key}"]'
            raise unknown(key, ["layers"], what=f"{_SEQUENTIAL} takes no", field=path, reason="OPTION_UNKNOWN")
    layers, path = config.get("layers", []), f'{field}["layers"]'
    if isinstance(layers, dict):
        named = OrderedDict((key, _nested(layer, f'{path}["{key}"]')) for key, layer in layers.items())
        return made(lambda: nn.Sequential(named), _SEQUENTIAL, path)
    if not isinstance(layers, (list, tuple)):
        raise wrong_value(path, "a list of architectures, or a dict of them by name", layers)
    return nn.Sequential(*(_nested(layer, f"{path}[{index}]") for index, layer in enumerate(layers)))


def _nested(value: Any, field: str) -> nn.Module:
    """The module that a dict {"name": ..., "config": {...}} describes."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise wrong_value(field, 'an architecture: {"name": "torch.nn.Linear", "config": {...}}', value)
    for key in value:
        if key not in ("name", "config"):
            path = f'{field}["{key}"]'
            raise unknown(
                key, ["name", "config"], what="an architecture in another has no", field=path, reason="OPTION_UNKNOWN"
            )
    name, config = value["name"], value.get("config", {})
    if name not in names():
        raise unknown(
            name, names(), what="no class of torch.nn here is", field=f"{field}.name", reason="ARCHITECTURE_UNKNOWN"
        )
    if not isinstance(config, dict):
        raise InvalidArgument(
            f"expected a dict of keyword arguments, got a {type(config).__name__}",
            field=f"{field}.config",
            reason="ARCHITECTURE_INVALID",
        )
    return build_torch_module(name, config, f"{field}.config")


@cache
def _parameters(cls: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """What a class is made with, by name; of recurrent ones what their base class is made with."""
    signatures = [inspect.signature(cls)]
    if issubclass(cls, nn.RNNBase):
        signatures.append(inspect.signature(nn.RNNBase))
    found = {name: each for signature in signatures for name, each in signature.parameters.items()}
    left_out = _NOT_TAKEN | ({"mode"} if issubclass(cls, nn.RNNBase) else set())
    if cls is nn.RNN:
        found["nonlinearity"] = inspect.Parameter("nonlinearity", inspect.Parameter.KEYWORD_ONLY, annotation=str)
    return {name: each for name, each in found.items() if name not in left_out}
