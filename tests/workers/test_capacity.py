"""What does not fit is refused at once, with both numbers."""

from __future__ import annotations

import pytest

from gradwire_proto.errors import FailedPrecondition, ResourceExhausted
from gradwire_proto.values import ModelSpec, Program
from gradwire_workers.pool.capacity import Capacity

PROGRAM = Program(torch_version="2.13.0", tensors=(), variants=(), operators={})


def spec(**changes) -> ModelSpec:
    return ModelSpec(program=PROGRAM, **changes)


def test_too_many_workers_name_the_field_and_both_numbers():
    capacity = Capacity(workers=4, gpus=0)
    capacity.claim(capacity.demand(spec(workers=3)))
    with pytest.raises(ResourceExhausted, match=r"asks for 2 workers; 1 of the service's 4 are free") as caught:
        capacity.claim(capacity.demand(spec(workers=2)))
    assert (caught.value.reason, caught.value.field, caught.value.retryable) == (
        "WORKERS_EXHAUSTED",
        "model.workers",
        True,
    )
    with pytest.raises(ResourceExhausted) as caught:
        capacity.claim(capacity.demand(spec(workers=5)))
    assert not caught.value.retryable, "it will never fit"


def test_what_is_freed_can_be_claimed_again():
    capacity = Capacity(workers=2, gpus=2)
    demand = capacity.demand(spec(workers=2))
    for _ in range(3):
        capacity.claim(demand)
        assert (capacity.free_workers, capacity.free_gpus) == (0, 0)
        capacity.free(demand)


def test_auto_means_gpus_where_there_are_some():
    assert Capacity(workers=2, gpus=1).demand(spec(gpus_per_worker=0.5)).gpus == 0.5
    assert Capacity(workers=2, gpus=1).demand(spec()).device == "cuda"
    assert Capacity(workers=2, gpus=1).demand(spec(device="cpu")).gpus == 0
    assert Capacity(workers=2, gpus=0).demand(spec()).device == "cpu"


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"device": "cuda"}, "model.device"), ({"gpus_per_worker": 1.0}, "model.gpus_per_worker")],
)
def test_a_service_without_gpus_names_the_field_that_needs_one(changes, field):
    with pytest.raises(FailedPrecondition) as caught:
        Capacity(workers=2, gpus=0).demand(spec(**changes))
    assert (caught.value.reason, caught.value.field) == ("NO_GPUS", field)


def test_too_many_gpus_name_both_numbers():
    capacity = Capacity(workers=8, gpus=2)
    with pytest.raises(ResourceExhausted, match="asks for 3 GPUs; 2 of the service's 2 are free"):
        capacity.claim(capacity.demand(spec(workers=3, device="cuda")))
