"""The largest elements of a gradient: exactly so many, and the same ones everywhere."""

from __future__ import annotations

import pytest
import torch

from gradwire_workers.training.top_k import largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999, 1.0])
def test_elements_are_those_that_torch_finds_largest(dtype, fraction):
    torch.manual_seed(0)
    gradient = torch.randn(13, 7, 11, dtype=dtype)
    shape, indices, values = largest(gradient, fraction)
    count = max(1, round(fraction * gradient.numel()))
    assert shape == (13, 7, 11) and len(indices) == count and values.dtype == dtype
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert torch.equal(values, gradient.view(-1)[indices])
    expected = gradient.view(-1).abs().topk(count).values
    assert torch.equal(values.abs().sort().values, expected.sort().values)


def test_first_ones_are_taken_of_those_that_are_as_large():
    gradient = torch.tensor([[1.0, -2.0, 2.0], [2.0, 0.5, -2.0]])
    assert largest(gradient, 0.5)[1].tolist() == [1, 2, 3]
    assert largest(torch.zeros(8), 0.25)[1].tolist() == [0, 1]


def test_nan_counts_as_infinite():
    gradient = torch.tensor([1.0, torch.nan, 3.0, -torch.inf, 2.0])
    _, indices, values = largest(gradient, 0.4)
    assert indices.tolist() == [1, 3] and values[0].isnan() and values[1] == -torch.inf
    # As large as any infinity, and larger than the largest number.
    gradient = torch.tensor([torch.inf, 1.0, torch.nan, torch.finfo().max, -torch.inf])
    assert [largest(gradient, fraction)[1].tolist() for fraction in (0.2, 0.6)] == [[0], [0, 2, 4]]


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((0, 3), 0), ((1,), 1)])
def test_tensors_with_few_elements_or_none(shape, count):
    whole, indices, values = largest(torch.ones(shape), 0.01)
    assert (whole, len(indices), len(values)) == (shape, count, count)
