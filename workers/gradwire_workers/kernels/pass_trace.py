"""A training pass as one graph of torch's operators: from parameters, buffers and a batch to loss and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from gradwire_proto.errors import FailedPrecondition
from gradwire_workers.shard import Shard
from gradwire_workers.training.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class PassForm:
    """What a compiled pass gives: the loss, of type `loss`, and the gradients of those parameters that are `reached`.

    outputs: type and shape of the program's outputs, None for what is no tensor.
    """

    loss: str
    reached: tuple[bool, ...]
    outputs: tuple[tuple[str, tuple[int, ...]] | None, ...]

    def encode(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def decode(cls, fields: dict[str, Any]) -> PassForm:
        """What `encode` gave."""
        outputs = tuple(None if each is None else (each[0], tuple(each[1])) for each in fields["outputs"])
        return cls(loss=fields["loss"], reached=tuple(fields["reached"]), outputs=outputs)


def trace_pass(
    replica: Replica, trained: Sequence[nn.Parameter], shard: Shard, *, rows: bool
) -> tuple[fx.GraphModule, list[Tensor], list[Tensor], PassForm]:
    """(the graph, tensors such as it takes, its constants, what it gives) of a pass over shards like this one.

    It takes every tensor of the program, the shard's tensors, what the loss is multiplied by in backward, and behind
    them the constants, which are the same in every pass. The pass
    is run once first: what it needs to look at once, such as sizes, is looked at then. Whatever the program raises
    comes out; FailedPrecondition LOSS_NOT_BY_ROW where the loss is to be divided, and is no sum over rows.
    """
    state = list(replica.program.all_state().values())
    leaves = [*shard.inputs, *shard.targets]
    found: dict[str, Any] = {}

    def run(*given: Tensor) -> list[Tensor]:
        values = dict(zip(state, given, strict=False))
        wanted = [values[each].detach().requires_grad_() for each in trained]
        values.update(zip(trained, wanted, strict=True))
        rest = iter(given[len(state) : -1])
        filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        count = len(shard.inputs)
        own = replace(shard, inputs=tuple(filled[:count]), targets=tuple(filled[count:]))
        with replica.program.reading(values), torch.enable_grad():
            outputs, loss = replica.traced(own, rows=rows)
        if loss is None:
            raise FailedPrecondition("its loss is computed on all ranks' outputs together", reason="LOSS_NOT_BY_ROW")
        gradients = torch.autograd.grad(loss, wanted, given[-1].to(loss.dtype), allow_unused=True)
        found["form"] = PassForm(
            loss=_dtype(loss),
            reached=tuple(each is not None for each in gradients),
            outputs=tuple((_dtype(each), tuple(each.shape)) if isinstance(each, Tensor) else None for each in outputs),
        )
        return [loss.detach(), *(each for each in gradients if each is not None)]

    tensors = [each.detach() for each in state]
    tensors += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    tensors.append(torch.ones((), dtype=torch.float32, device=replica.device))
    run(*tensors)
    tensors[-1] = tensors[-1].to(getattr(torch, found["form"].loss))
    graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    return graph, tensors, _lifted_constants(graph), found["form"]


def _lifted_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Have the graph take the tensors that it holds, such as a loss's weights, as its last arguments: these."""
    constants: list[Tensor] = []
    names: set[str] = set()
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        value = getattr(graph, node.target) if node.op == "get_attr" else None
        if isinstance(value, Tensor):
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"constant_{len(constants)}")
            node.replace_all_uses_with(last)
            graph.graph.erase_node(node)
            constants.append(value.detach())
            names.add(node.target)
    for name in names:
        # What a module still holds would be one argument more.
        delattr(graph, name)
    graph.recompile()
    return constants


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
