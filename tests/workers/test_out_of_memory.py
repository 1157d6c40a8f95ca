"""Memory that cannot be had is a limit of the service, not a defect of it."""

from __future__ import annotations

import pytest
import torch

from gradwire_proto.errors import ResourceExhausted
from gradwire_workers.training.out_of_memory import out_of_memory_told


def test_torchs_refusal_to_allocate_is_resource_exhausted():
    with pytest.raises(ResourceExhausted, match="out of memory") as caught, out_of_memory_told():
        torch.empty(1 << 50)
    assert caught.value.reason == "OUT_OF_MEMORY"


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="size"), out_of_memory_told():
        torch.zeros(2) + torch.zeros(3)
