"""Refuses what a graph of a user's module cannot carry, before it is lost silently, and watches what it reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules import module as module_internals

from gradwire_proto.errors import ExportError


def refuse_scripted(module: nn.Module, subject: str) -> None:
    """Raise ExportError for TorchScript, whose forward runs where no export can follow."""
    for name, each in module.named_modules():
        if isinstance(each, torch.jit.ScriptModule):
            raise ExportError(
                f"{subject}{f', at {name!r},' if name else ''} is a TorchScript module (torch.jit): give the nn.Module"
                " that it was made from",
                field=name or None,
                reason="EXPORT_TORCHSCRIPT",
            )


def refuse_hooks(module: nn.Module) -> None:
    """Raise ExportError for hooks on gradients, which would not run on the service. Forward hooks are traced."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ExportError(
                f"parameter {name!r} is not initialised: call the lazy module once before", reason="EXPORT_FAILED"
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ExportError(
                f"parameter {name!r} has a hook on its gradient, which would not run on the service",
                field=name,
                reason="EXPORT_HOOK",
            )
    for name, each in module.named_modules():
        if each._backward_hooks or each._backward_pre_hooks:
            raise ExportError(
                f"module {name or type(each).__qualname__!r} has a backward hook, which would not run on the service",
                field=name or None,
                reason="EXPORT_HOOK",
            )
    if module_internals._global_backward_hooks or module_internals._global_backward_pre_hooks:
        raise ExportError("a global backward hook is registered, which would not run there", reason="EXPORT_HOOK")


@contextmanager
def training_flag_watched(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Yields a list that receives every submodule whose `training` flag is read inside, by this thread.

    A module that reads no flag computes the same in training and in eval mode.
    """
    thread, ours, read = threading.get_ident(), {id(each) for each in module.modules()}, []

    def get(self: nn.Module) -> bool:
        if threading.get_ident() == thread and id(self) in ours:
            read.append(self)
        return self.__dict__["training"]

    def put(self: nn.Module, value: bool) -> None:
        self.__dict__["training"] = value

    # A property goes before the instances' own attribute, and gives what that holds: other threads see no difference.
    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield read
    finally:
        del nn.Module.training


def modes_are_plain(module: nn.Module) -> bool:
    """Whether train() and eval() do nothing but set flags."""
    return all(type(each).train is nn.Module.train and type(each).eval is nn.Module.eval for each in module.modules())
