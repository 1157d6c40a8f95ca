"""Which parameters are trained, after some of them were frozen or unfrozen by names and globs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from gradwire_proto.errors import InvalidArgument
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.programs import BuiltProgram
from gradwire_workers.training.tensor_names import matches

AnyProgram = BuiltProgram | ArchitectureProgram


def trained_parameters(program: AnyProgram, changes: Sequence[tuple[str, bool]] = ()) -> dict[str, nn.Parameter]:
    """The parameters that require gradients after these changes, by name. Later changes go over earlier ones.

    A tied parameter is matched by any of its names. Changes nothing.
    InvalidArgument at trainable["pattern"]: NO_MATCH; PARAMETER_FROZEN where the graphs do not give a gradient that is
    asked for.
    """
    parameters = program.parameters_by_name()
    aliases = {name: each for name, each in program.state_tensors().items() if isinstance(each, nn.Parameter)}
    known = {**parameters, **aliases}
    trained = {each: each.requires_grad for each in parameters.values()}
    named = {each: name for name, each in parameters.items()}
    may_train = _may_train(program)
    for pattern, is_trained in changes:
        where = f'trainable["{pattern[:200]}"]'
        for parameter in (known[name] for name in matches(pattern, known, where)):
            if is_trained and named[parameter] not in may_train:
                raise InvalidArgument(
                    f"the graphs do not give the gradient of {named[parameter]!r}, which required none when the module"
                    " was exported: create the model with it unfrozen, and freeze it by an update",
                    field=where,
                    reason="PARAMETER_FROZEN",
                )
            trained[parameter] = is_trained
    return {name: each for name, each in parameters.items() if trained[each]}


def differentiable_parameters(program: AnyProgram) -> dict[str, nn.Parameter]:
    """All parameters whose gradient the graphs give, whether they are trained now or not."""
    may_train = _may_train(program)
    return {name: each for name, each in program.parameters_by_name().items() if name in may_train}


def _may_train(program: AnyProgram) -> frozenset[str]:
    return frozenset(each.name for each in program.tensors if each.requires_grad or each.may_train)


def set_trained(parameters: Mapping[str, nn.Parameter], trained: Mapping[str, nn.Parameter]) -> None:
    """Make those of `parameters` require gradients that are in `trained`, and no others."""
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
