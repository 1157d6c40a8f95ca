"""Commands, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientQuery:
    """What compute_gradients should return. `wrt`: names or globs, None for all that require gradients.

    per_example: each row's own gradients. They, and products with vectors, come without input gradients and outputs.
    top_k: the fraction of each parameter's gradient to return; None for all of it.
    """

    wrt: tuple[str, ...] | None = None
    input_gradients: bool = False
    outputs: bool = False
    training: bool = True
    seed: int | None = None
    gradient_dtype: str | None = None
    per_example: bool = False
    top_k: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivativeQuery:
    """What differentiate_function should return. See the messages Derivative and DifferentiateFunctionRequest.

    kind: "none", "vjp", "jvp", "jacobian", "hessian" or "hvp". wrt: leaves of the inputs, by index. outputs: how many
    are differentiated, the first ones. chunk_size: None for what the service finds good.
    """

    kind: str
    wrt: tuple[int, ...] = ()
    outputs: int = 1
    chunk_size: int | None = None
    strict: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time of a call went, in seconds. See the message of the same name for each part."""

    queue: float = 0.0
    transfer: float = 0.0
    compute: float = 0.0
    all_reduce: float = 0.0
    optimizer: float = 0.0
    recovery: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a training command answers. `loss` is the loss over the whole batch; None where none was computed.

    `lr`: the first parameter group's, of the update, or of the next one where there was none. `grad_norm`: of all
    gradients together, before they were clipped; None where the model does not clip. `skipped`: gradients
    overflowed, so that no update was made; only at precision "fp16". `loss_scale`: what the loss is scaled by from here
    on, as torch.amp.GradScaler does; None at other precisions, and where there is no optimizer.
    """

    loss: float | None
    step: int
    num_examples: int = 0
    grad_norm: float | None = None
    lr: float | None = None
    timing: Timing = Timing()
    rank_rows: tuple[int, ...] = ()
    skipped: bool = False
    loss_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientResult:
    """What compute_gradients answers: `gradients` by name, `input_gradients` nested as the inputs, `outputs`.

    Where the largest elements alone were asked for, a gradient is (shape, row-major indices, values); in the SDK it is
    a sparse tensor.
    """

    loss: float
    step: int
    num_examples: int
    gradients: Mapping[str, Any]
    input_gradients: Any = None
    outputs: Any = None
    timing: Timing = Timing()
    rank_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivativeResult:
    """What differentiate_function answers: the function's outputs, nested, and the derivative's tensors, in order."""

    outputs: Any
    derivatives: tuple[Any, ...]
    timing: Timing = Timing()


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """What forward answers. `retained`: what Backward knows it by, where it was retained; then the leaves of the
    outputs that Backward takes cotangents of are `differentiable_outputs`.
    """

    outputs: Any
    step: int
    timing: Timing = Timing()
    rank_rows: tuple[int, ...] = ()
    retained: str | None = None
    differentiable_outputs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What a forward keeps for Backward. `wrt`: names or globs of parameters, None for all that require gradients.

    `inputs`: the leaves whose gradients can be asked for. `release`: forwards to let go of first.
    """

    wrt: tuple[str, ...] | None = None
    inputs: tuple[int, ...] = ()
    release: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardQuery:
    """What a Backward of the forward `retained` should add and return. `wrt`: None for all parameters it retained.

    `keep`: for another Backward.
    """

    retained: str
    wrt: tuple[str, ...] | None = None
    input_gradients: bool = False
    keep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardResult:
    """What Backward answers: a gradient or None for each input that was retained; None where nobody asked."""

    input_gradients: list[Any] | None
    step: int
    timing: Timing = Timing()
    rank_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandInfo:
    """What became of a command. `state`: "running", "applied" or "not_applied"."""

    name: str
    state: str
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the service takes at most. Each is a setting of the server, and an error that names it."""

    message_bytes: int = 64 << 20
    tensor_bytes: int = 16 << 30
    graph_nodes: int = 100_000
    model_bytes: int = 64 << 30
    models: int = 256
    requests_in_flight: int = 1024
    requests_per_model: int = 256
    held_bytes: int = 16 << 30
    variants: int = 64
    held_seconds: float = 300.0
    retained_bytes: int = 16 << 30
    retained_forwards: int = 4096
    retained_seconds: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """Versions, capacity and limits of a service. local_socket: where clients on its machine share memory with it."""

    version: str
    torch_version: str
    workers: int
    free_workers: int
    gpus: float
    limits: Limits
    local_socket: str = ""
