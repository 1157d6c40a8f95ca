"""An exported graph made to read its inputs as the user's own forward does."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

PREFIX = "module."
"""What the names of the user's tensors begin with in a trace."""


def without_copies(exported: ExportedProgram) -> None:
    """Let the graph read its inputs themselves, and not the copies that `Traced` makes of those that need gradients."""
    graph = exported.graph_module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(inputs, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            for copy in [user for user in node.users if user.target is torch.ops.aten.clone.default][:1]:
                if len(node.users) == 1 and len(copy.args) == 1 and not copy.kwargs and node.meta["val"].requires_grad:
                    copy.replace_all_uses_with(node)
                    graph.erase_node(copy)
    exported.graph_module.recompile()


def keep_old_values(exported: ExportedProgram, assigned: set[str]) -> None:
    """Let the graph read copies of the buffers that it assigns.

    The user's own forward leaves the old tensor as it is, to be returned, or read again by the backward.
    """
    if not assigned:
        return
    graph = exported.graph_module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(inputs, exported.graph_signature.input_specs, strict=True):
        if str(spec.target).removeprefix(PREFIX) in assigned and spec.kind is InputKind.BUFFER:
            *_, latest, assignment = (None, *_versions(node))
            # Under the other names that its module has nobody writes it.
            if latest is None:
                continue
            with graph.inserting_after(inputs[-1]):
                old = graph.call_function(torch.ops.aten.clone.default, (node,))
            old.meta = dict(node.meta)
            for reader in [each for each in node.users if each not in (old, assignment)]:
                reader.replace_input_with(node, old)
            for reader in list(assignment.users):
                reader.replace_input_with(assignment, old if latest is node else latest)
            assignment.args = (node, *assignment.args[1:])
            if not old.users:
                graph.erase_node(old)
    exported.graph_module.recompile()


def _versions(node: fx.Node) -> list[fx.Node]:
    """A tensor and the nodes that change it in place, in order: each stands for it from there on."""
    versions = [node]
    while True:
        later = [
            each
            for each in versions[-1].users
            if isinstance(each.target, torch._ops.OpOverload)
            and each.target._schema.name.endswith("_")
            and each.args[0] is versions[-1]
        ]
        if not later:
            return versions
        versions.append(later[-1])
