"""Every loss gives on several ranks what it gives on the whole batch, ragged, empty and ignored shards included."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwire_proto.values import TorchLossSpec

CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def info_nce(outputs: Tensor, targets: Tensor) -> Tensor:
    normal = F.normalize(outputs, dim=1)
    return F.cross_entropy(normal @ normal.roll(1, 0).T / 0.1, torch.arange(outputs.shape[0]))


def classes(rows: int) -> Tensor:
    return torch.randint(4, (rows,))


def numbers(rows: int) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64)


def probabilities(rows: int) -> Tensor:
    return torch.rand(rows, 4, dtype=torch.float64).softmax(1)


def signs(rows: int) -> Tensor:
    return torch.randint(2, (rows, 4)).double() * 2 - 1


BY_NAME = {
    "cross_entropy": ({}, classes),
    "cross_entropy weights": ({"weight": CLASS_WEIGHTS, "label_smoothing": 0.1}, classes),
    "cross_entropy sum": ({"reduction": "sum"}, classes),
    "cross_entropy probabilities": ({"weight": CLASS_WEIGHTS, "label_smoothing": 0.2}, probabilities),
    "mse_loss": ({}, numbers),
    "l1_loss": ({"reduction": "sum"}, numbers),
    "smooth_l1_loss": ({"beta": 0.5}, numbers),
    "huber_loss": ({"delta": 0.5}, numbers),
    "binary_cross_entropy_with_logits": ({"pos_weight": CLASS_WEIGHTS, "weight": CLASS_WEIGHTS}, probabilities),
    "kl_div": ({"reduction": "batchmean"}, probabilities),
    "kl_div mean": ({"log_target": True}, numbers),
    "poisson_nll_loss": ({"full": True}, lambda rows: numbers(rows).abs() * 3),
    "soft_margin_loss": ({}, signs),
    "hinge_embedding_loss": ({"margin": 0.5}, signs),
    "multi_margin_loss": ({"weight": CLASS_WEIGHTS}, classes),
    "multilabel_soft_margin_loss": ({}, probabilities),
}


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides:UserWarning")  # kl_div's own
@pytest.mark.parametrize("case", BY_NAME)
def test_loss_by_name_on_three_ranks_equals_the_whole_batch(case, make_group, assert_close):
    (options, make_targets), name = BY_NAME[case], case.split()[0]
    module = net()
    group = make_group(
        module,
        lambda outputs, targets: outputs.sum() * 0 + targets.sum() * 0,
        (torch.randn(4, 6).double(), make_targets(4)),
        ranks=3,
        loss_spec=TorchLossSpec(name, options),
    )
    for rows in (7, 2):
        inputs, targets = torch.randn(rows, 6).double(), make_targets(rows)
        report, _, _ = group.compute_gradients(inputs, targets)
        expected = getattr(F, name)(module(inputs), targets, **options)
        gradients = torch.autograd.grad(expected, list(module.parameters()))
        assert report.loss == pytest.approx(expected.item(), rel=1e-12)
        assert_close(report.gradients, dict(zip(dict(module.named_parameters()), gradients, strict=True)))


def test_shard_whose_targets_are_all_ignored_counts_nothing(make_group, assert_close):
    module, loss = net(), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=3)
    group = make_group(module, loss, (torch.randn(4, 6).double(), classes(4)))
    inputs, targets = torch.randn(5, 6).double(), torch.tensor([0, 3, 2, 3, 3])
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        expected = loss(reference(inputs), targets)
        assert group.train_step(inputs, targets) == pytest.approx(expected.item(), rel=1e-12)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    assert_close(group.state_dict(), reference.state_dict())


def test_classes_for_each_pixel_are_weighed_over_all_of_them(make_group, assert_close):
    module = nn.Conv2d(2, 4, 3, padding=1).double()
    loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1)
    targets = torch.randint(4, (5, 3, 3))
    targets[torch.rand(5, 3, 3) < 0.4] = -100
    inputs = torch.randn(5, 2, 3, 3).double()
    group = make_group(module, loss, (inputs, targets), ranks=3)
    report, _, _ = group.compute_gradients(inputs, targets)
    expected = loss(module(inputs), targets)
    expected.backward()
    assert report.loss == pytest.approx(expected.item(), rel=1e-12)
    assert_close(report.gradients, {name: each.grad for name, each in module.named_parameters()})


@pytest.mark.parametrize("ranks", [2, 3])
def test_loss_that_compares_rows_with_each_other_is_exact(ranks, make_group, assert_close):
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    group = make_group(module, info_nce, (torch.randn(4, 6).double(), classes(4)), ranks=ranks)
    assert group.whole["train"] is None
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for rows in (7, 2, 5):
        inputs, targets = torch.randn(rows, 6).double(), classes(rows)
        expected = info_nce(reference(inputs), targets)
        assert group.train_step(inputs, targets) == pytest.approx(expected.item(), rel=1e-11)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    assert_close(group.state_dict(), reference.state_dict(), tolerance=1e-10)
