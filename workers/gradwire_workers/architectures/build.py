"""An architecture value -> ArchitectureProgram, with every check that untrusted input needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradwire_proto.values import ArchitectureSpec, Limits
from gradwire_workers.architectures import torch_modules, transformers_models
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.architectures.measure import check_size
from gradwire_workers.architectures.module_tensors import describe_tensors
from gradwire_workers.architectures.refusals import unknown
from gradwire_workers.architectures.torch_modules import build_torch_module
from gradwire_workers.architectures.transformers_models import build_transformers_model
from gradwire_workers.architectures.weights import load_weights
from gradwire_workers.lifted_limits import in_force
from gradwire_workers.programs.build import check_state


def build_architecture(
    spec: ArchitectureSpec,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    limits: Limits | None = None,
    weights_folder: str | None = None,
    values: Mapping[str, Tensor] | None = None,
    field: str = "model.program.architecture",
) -> ArchitectureProgram:
    """Build the module that a client named.

    Its weights are those that torch gives on the CPU after torch.manual_seed(seed), or those of `spec.weights` below
    `weights_folder`; or `values`, of every tensor that is no alias. Torch's random numbers are as before afterwards.
    Raises InvalidArgument (ARCHITECTURE_UNKNOWN, OPTION_UNKNOWN, OPTION_OUT_OF_RANGE, ARCHITECTURE_INVALID, and those
    of the weights), ResourceExhausted (MODEL_TOO_LARGE, TENSOR_TOO_LARGE) before anything is allocated, or
    FailedPrecondition (TRANSFORMERS_MISSING, WEIGHTS_NOT_ALLOWED), with the field's path.
    """
    limits = limits or Limits()

    def make() -> nn.Module:
        return _module(spec, field)

    check_size(make, in_force(limits), field)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
    if values:
        _take(module, values)
    elif spec.weights is not None:
        load_weights(*describe_tensors(module), weights_folder, spec.weights, f"{field}.weights")
    return ArchitectureProgram(module.to(device), limits)


def _take(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    tensors, by_name = describe_tensors(module)
    check_state(tensors, values, "tensors")
    with torch.no_grad():
        for name, value in values.items():
            by_name[name].copy_(value)


def _module(spec: ArchitectureSpec, field: str) -> nn.Module:
    if spec.name in torch_modules.names():
        return build_torch_module(spec.name, spec.config, f"{field}.config")
    if spec.name in transformers_models.names():
        return build_transformers_model(spec.name, spec.config, f"{field}.config")
    known = (*torch_modules.names(), *transformers_models.names())
    raise unknown(
        spec.name, known, what="no architecture here is", field=f"{field}.name", reason="ARCHITECTURE_UNKNOWN"
    )
