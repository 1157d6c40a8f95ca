"""A program value and its tensors -> BuiltProgram, with every check that untrusted input needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.graph_check import check_program, check_tensors, check_variant
from gradwire_proto.operators import allowed_operators, has_schema, schema_of
from gradwire_proto.values import Limits, Program, StateTensor, Variant
from gradwire_workers.lifted_limits import in_force
from gradwire_workers.programs.built_program import BuiltProgram


def build_program(
    program: Program,
    state: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    *,
    limits: Limits | None = None,
    field: str = "program",
    casts: bool = False,
) -> BuiltProgram:
    """Build a program that a client sent.

    state: every tensor that is not an alias, by name, of the type and shape that the program says. On `device` already
    it is used as it is: the memory must be writable and nobody else's. casts: whether it will run under autocast.
    Raises InvalidArgument (OPERATOR_NOT_ALLOWED, SCHEMA_MISMATCH, GRAPH_MALFORMED, TENSOR_MISSING ...) or
    ResourceExhausted, with the field's path.
    """
    limits = limits or Limits()
    check_program(program, limits=in_force(limits), field=field)
    check_schemas(program.operators, f"{field}.operators")
    check_state(program.tensors, state, "tensors")
    return BuiltProgram(program, state, torch.device(device), limits, casts=casts)


def add_variant(
    built: BuiltProgram,
    variant: Variant,
    tensors: tuple[StateTensor, ...],
    values: Mapping[str, Tensor],
    operators: Mapping[str, str],
    *,
    limits: Limits | None = None,
    field: str = "variant",
) -> None:
    """Add a variant that a client sent to a built program, after the same checks."""
    limits = in_force(limits or Limits())
    everything = (*built.program.tensors, *tensors)
    check_tensors(everything, limits=limits, field="tensors")
    check_variant(variant, everything, {**built.program.operators, **operators}, limits=limits, field=field)
    check_schemas(operators, "operators")
    check_state(tensors, values, "values")
    built.add_variant(variant, tensors, values, operators)


def check_schemas(operators: Mapping[str, str], field: str) -> None:
    """The client's operators must be what this PyTorch means by their names."""
    for name, schema in operators.items():
        if not has_schema(name):
            continue
        if name not in allowed_operators():
            raise InvalidArgument(
                f"operator {name[:80]!r} is not in the allowlist", field=field, reason="OPERATOR_NOT_ALLOWED"
            )
        if schema != (ours := schema_of(name)):
            raise InvalidArgument(
                f"{name} is {ours!r} in PyTorch {torch.__version__}, but {schema[:300]!r} in the client's",
                field=f"{field}[{name!r}]",
                reason="SCHEMA_MISMATCH",
            )


def check_state(tensors: tuple[StateTensor, ...], state: Mapping[str, Tensor], field: str) -> None:
    """Each tensor that is no alias must have a value of its type and shape, and nothing else may."""
    expected = {each.name: each for each in tensors if each.alias_of is None}
    for name, spec in expected.items():
        value = state.get(name)
        if value is None:
            raise InvalidArgument(f"tensor {name!r} has no value", field=field, reason="TENSOR_MISSING")
        found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if found != (wanted := f"{spec.dtype}{list(spec.shape)}"):
            raise InvalidArgument(
                f"expected {wanted}, got {found}", field=f"{field}[{name!r}]", reason="TENSOR_MISMATCH"
            )
    for name in state:
        if name not in expected:
            raise InvalidArgument(f"the program has no tensor {name!r}", field=field, reason="TENSOR_UNKNOWN")
