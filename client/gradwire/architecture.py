"""Models that the service builds itself, from names and numbers: nothing is exported, and no weights travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradwire.arguments import as_text
from gradwire.errors import InvalidArgument
from gradwire_proto.values import ArchitectureSpec


class Architecture:
    """A class of torch.nn or of transformers with its keyword arguments: what `Client.create_model` takes for a module.

        Architecture("torch.nn.Sequential", layers=[
            Architecture("torch.nn.Linear", in_features=4, out_features=8),
            Architecture("torch.nn.ReLU"),
            Architecture("torch.nn.Linear", in_features=8, out_features=1),
        ])
        Architecture("transformers.GPT2LMHeadModel", n_layer=2, n_embd=64, n_head=4)

    config: the class's own keyword arguments, or those of a transformers model's config class (`use_cache` is off).
    Arguments that are modules are Architectures, or dicts {"name": ..., "config": {...}}; "torch.nn.Sequential" takes
    `layers`, a list of them or a dict of them by name. The service has an allowlist of classes, and refuses what is
    unknown, `device`, `dtype`, paths and code among it.

    weights: a folder of safetensors on the service, below the one that its operator allows. Left out, the first weights
    are those of torch itself for the same class and config after `torch.manual_seed(seed)` on the CPU, with
    create_model's seed; modules among the arguments are made first, in the order in which they stand.

    Raises InvalidArgument for a value that is no number, text, None, or nesting of them and of Architectures.
    """

    def __init__(self, name: str, /, *, weights: str | None = None, **config: Any) -> None:
        self.name = as_text(name, "architecture.name")
        self.weights = None if weights is None else as_text(weights, "architecture.weights")
        self.config: dict[str, Any] = {key: _plain(value, f"architecture.{key}") for key, value in config.items()}

    def spec(self) -> ArchitectureSpec:
        """As the contract has it."""
        return ArchitectureSpec(name=self.name, config=self.config, weights=self.weights)

    def __repr__(self) -> str:
        weights = [f"weights={self.weights!r}"] if self.weights is not None else []
        words = [repr(self.name), *weights, *(f"{key}={value!r}" for key, value in self.config.items())]
        return f"Architecture({', '.join(words)})"


def _plain(value: Any, field: str) -> Any:
    if isinstance(value, Architecture):
        if value.weights is not None:
            raise InvalidArgument(
                "only the outermost architecture takes weights", field=field, reason="ARCHITECTURE_INVALID"
            )
        return {"name": value.name, "config": value.config}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{field}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {as_text(key, field): _plain(item, f"{field}.{key}") for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InvalidArgument(
        f"expected numbers, text, None, or architectures, got {type(value).__qualname__}",
        field=field,
        reason="ARCHITECTURE_INVALID",
    )
