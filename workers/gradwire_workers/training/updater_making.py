"""The updater that a model begins with, and the one with which it goes on after its settings changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import ModelSpec
from gradwire_workers.training.clipping import Clipping
from gradwire_workers.training.loss_scale import LossScale
from gradwire_workers.training.updater import Updater


def make_updater(
    spec: ModelSpec,
    parameters: Mapping[str, nn.Parameter],
    aliases: Mapping[str, nn.Parameter],
    loss_scale: LossScale | None = None,
    *,
    field: str = "model.optimizer",
) -> Updater | None:
    """The updater of a model; None where it has no optimizer. InvalidArgument for what could not be done, by path.

    loss_scale: by which the loss is scaled; the updater keeps it current. field: where the optimizer comes from.
    """
    clipping = Clipping(norm=spec.clip_grad_norm, value=spec.clip_grad_value)
    clipping.check(parameters.values())
    if spec.optimizer is not None:
        updater = Updater(spec.optimizer, clipping, parameters, aliases, loss_scale, field=field)
        if loss_scale is not None:
            _check_scalable(updater.searches, parameters)
        return updater
    if clipping:
        name = "clip_grad_value" if spec.clip_grad_norm is None else "clip_grad_norm"
        message = "gradients are clipped before an update, and the model has no optimizer"
        raise InvalidArgument(message, field=f"model.{name}", reason="NO_OPTIMIZER")
    return None


def restored_updater(
    spec: ModelSpec,
    state: Mapping[str, Any] | None,
    trained: Mapping[str, nn.Parameter],
    parameters: Mapping[str, nn.Parameter],
    aliases: Mapping[str, nn.Parameter],
    loss_scale: LossScale | None,
) -> Updater | None:
    """The updater with which a model goes on that was saved: `state` is what its updater's gave.

    trained, parameters: those that are trained, and all there are, in their order.
    """
    if state is None or spec.optimizer is None:
        return None
    held = {name for group in state["param_groups"] for name in group["params"]}
    updater = make_updater(spec, {n: each for n, each in parameters.items() if n in held}, aliases, loss_scale)
    assert updater is not None
    updater.restore(state)
    updater.update_only(trained)
    return updater


def updater_after(
    updater: Updater | None,
    spec: ModelSpec,
    trained: Mapping[str, nn.Parameter],
    aliases: Mapping[str, nn.Parameter],
    loss_scale: LossScale | None,
    *,
    anew: bool,
) -> Updater | None:
    """The updater of a model once `trained` are the parameters that are trained; `updater` is as it was.

    anew: it gets the optimizer of `spec` from its beginning. Otherwise it goes on, but for LBFGS, whose history is
    one for all parameters and begins anew with them.
    """
    if not anew and updater is None:
        return None
    if not trained and not anew:
        raise InvalidArgument("no parameter would be left to train", field="trainable", reason="NOTHING_TO_TRAIN")
    if anew or updater is None:
        return make_updater(spec, trained, aliases, loss_scale, field="optimizer")
    if updater.searches:
        if updater.updates_exactly(trained):
            return updater
        made = make_updater(spec, trained, aliases, loss_scale)
        assert made is not None
        made.go_on_from(updater)
        return made
    if trained.keys() <= updater.held.keys():
        return updater
    held = {**updater.held, **trained}
    made = make_updater(spec, {name: held[name] for name in aliases if name in held}, aliases, loss_scale)
    assert made is not None
    made.go_on_from(updater)
    return made


def _check_scalable(searches: bool, parameters: Mapping[str, nn.Parameter]) -> None:
    """What torch.amp.GradScaler refuses when it comes to a step is refused before there is a model."""
    half = next((name for name, each in parameters.items() if each.dtype is torch.float16), None)
    if searches:
        message = "LBFGS evaluates its loss within a step, where no scale can be found for it, as in torch"
    elif half is not None:
        message = f"{half!r} is float16 itself, and its gradients cannot be unscaled, as in torch"
    else:
        return
    raise InvalidArgument(f"{message}; expected fp32 or bf16", field="model.precision", reason="OPTIMIZER_UNFIT")
