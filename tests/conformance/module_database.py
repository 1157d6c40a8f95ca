"""PyTorch's own module test database: several hundred pairs of a module and an input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from conformance.case import Case
from torch import nn

_MOST_PER_MODULE = 40


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every module in training mode, dropout off, with every input that the database has for it, up to forty."""
    # Here: it takes seconds, and whoever collects the tests has no use for it.
    from torch.testing._internal.common_modules import module_db

    # torch's own tests may not set flags like torch.backends.cudnn.deterministic; a rank in the same process does.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

    for info in module_db:
        torch.manual_seed(0)
        made = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True)
        # Evenly: a loss or two have hundreds, which differ in one argument each.
        step = max(1, -(-len(made) // _MOST_PER_MODULE))
        for index, each in list(enumerate(made))[::step]:
            if each.forward_input is None:
                continue
            torch.manual_seed(index)
            constructor = each.constructor_input
            module = info.module_cls(*constructor.args, **constructor.kwargs).to(dtype)
            _without_dropout(module)
            forward = each.forward_input
            if any(isinstance(parameter, nn.UninitializedParameter) for parameter in module.parameters()):
                module(*forward.args, **forward.kwargs)
            inputs = forward.args
            if forward.kwargs:
                names = _names(module, len(forward.args))
                inputs = {**dict(zip(names, forward.args, strict=True)), **forward.kwargs}
            name = f"{info.name.removeprefix('nn.')}[{index}]"
            yield Case(group=info.name, name=name, module=module, inputs=inputs)


def _without_dropout(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
        if isinstance(getattr(each, "dropout", None), float):
            each.dropout = 0.0  # type: ignore[assignment]


def _names(module: nn.Module, count: int) -> list[str]:
    import inspect

    return list(inspect.signature(module.forward).parameters)[:count]
