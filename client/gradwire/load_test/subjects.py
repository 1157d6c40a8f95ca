"""The models that are put under load, and the request that each gets over and over."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradwire import optim
from gradwire.errors import GradwireError, InvalidArgument
from gradwire.load_test.made_up_batches import made_up_batch
from gradwire.load_test.options import Options
from gradwire.load_test.requests import Prepared
from gradwire.transfer import INLINE_BYTES
from gradwire_proto.names import model_name

if TYPE_CHECKING:
    from gradwire.calls import Call
    from gradwire.client import Client
    from gradwire.model import Model

LABELS = {"made-by": "gradwire-load-test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, its request, and the reply that it gave once, in bytes."""

    model_id: str
    request: Prepared
    reply: bytes


@contextmanager
def subjects(client: Client, options: Options, warn: Callable[[str], None]) -> Iterator[tuple[Subject, ...]]:
    """The models of a load test, each asked once. Those that are created here are deleted at the end, however it comes.

    warn: told of a model that could not be deleted. Raises the GradwireError of one that cannot be made, found or fed.
    """
    created: list[Model] = []
    try:
        if options.model_ids:
            models = [client.get_model(model_id.removeprefix("models/")) for model_id in options.model_ids]
            yield tuple(_existing(client, model, options) for model in models)
        else:
            yield tuple(_created(client, number, created, options) for number in range(options.models))
    finally:
        for model in created:
            try:
                model.delete()
            except GradwireError as error:
                warn(f"{model_name(model.id)} is left over: {error}")


def _created(client: Client, number: int, created: list[Model], options: Options) -> Subject:
    generator = torch.Generator().manual_seed(options.seed + number)
    features, *_, classes = options.layers
    # An example of two rows at least: one does not tell which dimension is the batch.
    rows = max(options.batch, 2)
    inputs = torch.randn(rows, features, generator=generator)
    targets = torch.randint(0, classes, (rows,), generator=generator)
    model = client.create_model(
        perceptron(options.layers),
        loss="cross_entropy",
        optimizer=optim.SGD(lr=0.01),
        example=(inputs, targets),
        workers=options.workers,
        model_id=f"load-test-{uuid.uuid4().hex[:8]}-{number}",
        labels=LABELS,
    )
    created.append(model)
    return _subject(client, model, inputs[: options.batch], targets[: options.batch], options.method)


def perceptron(layers: Sequence[int]) -> nn.Module:
    """float32[n, first size] -> float32[n, last size], with a ReLU between layers."""
    modules: list[nn.Module] = []
    for features, units in pairwise(layers):
        modules += [nn.Linear(features, units), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _existing(client: Client, model: Model, options: Options) -> Subject:
    training = options.method != "forward"
    inputs, targets = made_up_batch(model.info(), training=training, rows=options.batch, seed=options.seed)
    try:
        return _subject(client, model, inputs, targets, options.method)
    except GradwireError as error:
        message = f"{model_name(model.id)} does not take what was made up by its types and shapes: {error.message}"
        raise type(error)(message, **error.attributes()) from None


def _subject(client: Client, model: Model, inputs: Any, targets: Any, method: str) -> Subject:
    _check_fits_one_message(inputs, targets)
    call = _call(model, inputs, targets, method)
    request = Prepared.of(call)
    # Once through the SDK: what is wrong with a request is better said before it is sent a thousand times.
    single = type(call.request).FromString(request.message())
    try:
        reply = client._rpc.call(call.method, single, command=_command(model, single) if call.command else None)
    except GradwireError as error:
        if error.field != "max_inline_bytes":
            raise
        message = (
            "the answer is too large for one message of the service, and larger ones are not measured: take smaller"
        )
        raise InvalidArgument(f"{message} layers", field="--layers", reason="ANSWER_TOO_LARGE") from None
    return Subject(model_id=model.id, request=request, reply=reply.SerializeToString())


def _call(model: Model, inputs: Any, targets: Any, method: str) -> Call[Any]:
    calls = model._calls
    if method == "forward":
        return calls.forward(inputs, training=False)
    if method == "train_step":
        return calls.train_step(inputs, targets, None)
    return calls.compute_gradients(
        inputs,
        targets,
        wrt=None,
        input_gradients=False,
        outputs=False,
        dtype=None,
        top_k=None,
        training=True,
        seed=None,
    )


def _command(model: Model, request: Any) -> str:
    return f"{model_name(model.id)}/commands/{request.request_id}"


def _check_fits_one_message(*values: Any) -> None:
    """Larger batches are uploaded ahead of their request, which this does not measure."""
    size = sum(leaf.numel() * leaf.element_size() for value in values for leaf in _tensors(value))
    if size > INLINE_BYTES:
        message = f"a batch of {size:,} bytes does not travel in one message, which takes {INLINE_BYTES:,}"
        raise InvalidArgument(message, field="--batch", reason="BATCH_TOO_LARGE")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
