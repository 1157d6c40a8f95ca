"""A sample of `make conformance`: the whole takes half an hour."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from conformance import losses, module_database, optimizers, transformer_families
from conformance.case import Case, check
from conformance.plain_export import can_export

CASES = 19
"""How many the sample has. To make them takes seconds, which only the process that runs them is to spend."""


@pytest.fixture(scope="module")
def sample() -> list[Case]:
    modules = itertools.islice(module_database.cases(torch.float64), 5, None, 67)
    # A transformer takes as long as all others together, and Qwen3 is one.
    taken = [each for each in modules if not each.name.startswith("Transformer")]
    taken += itertools.islice(losses.cases(torch.float64), 3, None, 19)
    return taken + [each for each in transformer_families.cases(torch.float64) if each.name == "Qwen3ForCausalLM"]


def test_the_whole_sample_is_tried(sample):
    assert len(sample) == CASES


@pytest.mark.parametrize("index", range(CASES))
def test_the_service_gives_what_torch_gives_or_refuses_what_torch_cannot_export(client, sample, index):
    case = sample[index]
    outcome = check(client, case, ranks=2)
    if outcome.verdict == "refused":
        assert not can_export(case), (case.name, outcome.detail)
    else:
        assert outcome.verdict == "passed", (case.name, outcome.detail)


@pytest.mark.parametrize(
    "case", itertools.islice(optimizers.cases(torch.float64), 0, None, 14), ids=lambda case: case.name
)
def test_updates_are_torchs_before_and_after_a_move_to_a_new_model(client, case: optimizers.OptimizerCase):
    outcome = optimizers.check(client, case, ranks=2)
    assert outcome.verdict == "passed", outcome.detail


def test_an_update_that_differs_is_seen(client):
    case = next(each for each in optimizers.cases(torch.float64) if each.name.startswith("StepLR"))
    outcome = optimizers.check(client, dataclasses.replace(case, scheduler=None), ranks=1)
    assert outcome.verdict == "wrong"


def test_a_case_that_differs_is_seen(client):
    case = next(iter(losses.cases(torch.float64)))
    # The reference is the module in this process; the service gets another one.
    other = torch.nn.Linear(4, 5).double()
    outcome = check(client, case, ranks=1, given=other)
    assert outcome.verdict == "wrong"
    assert "gradient of weight" in outcome.detail
