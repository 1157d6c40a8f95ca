"""Batch norm over each rank's own rows (sync_batch_norm=False): as DistributedDataParallel has it, by plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import BackwardQuery, OptimizerSpec, Retention
from gradwire_workers.sharding import row_range


class Net(nn.Module):
    """Two layers of batch norm, over several values a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.again, self.head = nn.BatchNorm2d(4, affine=False, momentum=0.3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(F.relu(self.norm(self.conv(x)))).flatten(1))


def batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, 4, 4, dtype=torch.float64), torch.randint(3, (rows,))


def make(make_group, module: nn.Module, ranks: int, loss: Any = nn.CrossEntropyLoss, example: Any = None, **spec: Any):
    return make_group(module, loss(), example or batch(6), ranks=ranks, sync_batch_norm=False, **spec)


def local(module: nn.Module, x: Tensor, ranks: int) -> list[Tensor]:
    """Each rank's outputs of its rows, alone. The module's running statistics move by rank 0's."""
    outputs = []
    for rank in range(ranks):
        start, stop = row_range(len(x), ranks, rank)
        if start < stop:
            one = module if rank == 0 else copy.deepcopy(module)
            for (name, buffer), other in zip(one.named_buffers(), module.buffers(), strict=True):
                assert rank == 0 or buffer is not other, name
            values: dict[str, Tensor] = dict(module.named_parameters())
            outputs.append(torch.func.functional_call(one, values, (x[start:stop],)))
    return outputs


def loss_of(module: nn.Module, x: Tensor, y: Tensor, ranks: int) -> Tensor:
    return F.cross_entropy(torch.cat(local(module, x, ranks)), y)


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_normalises_its_rows_and_all_take_rank_0s_running_statistics(ranks, make_group, assert_close):
    module = Net().double()
    group = make(make_group, module, ranks)
    assert group.whole == {"train": None, "eval": None}
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for rows in (6, 7, 2, 9):  # two rows leave a third rank without any
        x, y = batch(rows)
        optimizer.zero_grad()
        expected = loss_of(reference, x, y, ranks)
        expected.backward()
        optimizer.step()
        assert group.train_step(x, y) == pytest.approx(expected.item(), rel=1e-12)
        assert_close(group.state_dict(), reference.state_dict(), tolerance=1e-11)
    x, y = batch(5)
    optimizer.zero_grad()
    loss_of(reference, x, y, ranks).backward()
    optimizer.step()
    group.forward_backward(x, y)
    group.optimizer_step()
    assert_close(group.state_dict(), reference.state_dict(), tolerance=1e-11)
    torch.testing.assert_close(group.forward(x, training=True), torch.cat(local(reference, x, ranks)))
    assert_close(group.state_dict(), reference.state_dict(), tolerance=1e-11)


def test_reads_are_of_the_same_function_and_leave_every_rank_as_it_was(make_group, assert_close):
    module = Net().double()
    group = make(make_group, module, 2)
    before = group.state_dict()
    x, y = batch(7)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss_of(module, x, y, 2), list(parameters.values()), create_graph=True)
    vectors = {name: torch.randn_like(each) for name, each in parameters.items()}
    products = torch.autograd.grad(gradients, list(parameters.values()), list(vectors.values()))
    report, _, outputs = group.compute_gradients(x, y, outputs=True)
    detached = [each.detach() for each in gradients]
    assert_close(report.gradients, dict(zip(parameters, detached, strict=True)), tolerance=1e-11)
    torch.testing.assert_close(outputs, torch.cat(local(copy.deepcopy(module), x, 2)))
    report, _, _ = group.compute_gradients(x, y, vectors=vectors)
    assert group.rank_rows() == [4, 3]
    assert_close(report.gradients, dict(zip(parameters, products, strict=True)), tolerance=1e-9)
    assert all(map(torch.equal, before.values(), group.state_dict().values()))


def test_a_line_search_ends_with_the_same_bits_on_every_rank(make_group):
    group = make(make_group, Net().double(), 2, optimizer=OptimizerSpec("LBFGS", {"max_iter": 3}))
    before = group.state_dict()
    group.train_step(*batch(7))
    assert not torch.equal(group.state_dict()["norm.running_mean"], before["norm.running_mean"])


def test_one_rank_has_the_same_bits_as_without_a_choice(make_group):
    module, batches, states = Net().double(), [batch(5), batch(7)], []
    for synchronised in (True, False):
        group = make_group(module, nn.CrossEntropyLoss(), batch(6), ranks=1, sync_batch_norm=synchronised)
        losses = [group.train_step(*each) for each in batches]
        states.append((losses, group.state_dict()))
    assert states[0][0] == states[1][0]
    assert all(map(torch.equal, states[0][1].values(), states[1][1].values()))


def test_ranks_talk_once_for_each_type_of_buffer_and_not_in_a_layer(make_group):
    count = """
groups, calls = trainer._groups, []
kept = groups._track
def counted(start, result):
    calls.append(result.numel())
    return kept(start, result)
groups._track = counted
faults["calls"] = calls
"""
    seen = []
    for synchronised in (True, False):
        group = make_group(Net().double(), nn.CrossEntropyLoss(), batch(6), sync_batch_norm=synchronised)
        group.call_all("run", count)
        group.train_step(*batch(7))
        seen.append(len(group.call_all("run", "result = faults['calls']")[0]))
    # Forward and back in two layers; in their place statistics and counters, from rank 0.
    assert seen[0] - 4 == seen[1] - 2


def test_a_rank_with_one_value_for_a_channel_refuses_the_batch_and_says_why(make_group, fails_as):
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    group = make(make_group, module, 2, nn.MSELoss, (x, torch.randn(6, 3).double()))
    before = group.state_dict()
    with fails_as(InvalidArgument, "BATCH_TOO_SMALL", "batch.inputs"):
        group.train_step(x[:3], torch.randn(3, 3).double())
    assert any("sync_batch_norm=False" in str(error) for error in group.errors)
    assert all(map(torch.equal, before.values(), group.state_dict().values()))
    group.train_step(x[:4], torch.randn(4, 3).double())


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y, ignore_index=2)


def test_a_loss_that_the_module_returns_is_found_to_be_a_mean_over_targets(make_group, assert_close):
    module = OwnLoss().double()
    x, y = batch(8)
    y[:2] = torch.tensor([0, 1])
    group = make(make_group, module, 2, lambda: None, ((x, y), None))
    assert group.whole["train"] is None and group.reports_of["train"].own_statistics
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for rows in (8, 6):
        expected = F.cross_entropy(torch.cat(local(reference.net, x[:rows], 2)), y[:rows], ignore_index=2)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert group.train_step((x[:rows], y[:rows])) == pytest.approx(expected.item(), rel=1e-12)
        assert_close(group.state_dict(), reference.state_dict(), tolerance=1e-11)


class MinusMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h - 1e-3 * h.mean(0)


def test_rows_that_depend_on_each_other_elsewhere_are_found_and_batch_norm_is_told_apart(make_group, assert_close):
    example = torch.randn(6, 4), torch.randn(6, 4)
    group = make(make_group, nn.BatchNorm1d(4), 2, nn.MSELoss, example)
    assert group.whole == {"train": None, "eval": None}
    assert group.reports_of["train"].own_statistics and not group.reports_of["eval"].own_statistics
    module = MinusMean()
    group = make(make_group, module, 2, nn.MSELoss, example)
    assert group.whole["train"] is not None and not group.reports_of["train"].own_statistics
    # One rank computes the batch: whole, and exactly.
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    expected = F.mse_loss(reference(example[0]), example[1])
    expected.backward()
    optimizer.step()
    assert group.train_step(*example) == pytest.approx(expected.item(), rel=1e-6)
    assert_close(group.state_dict(), reference.state_dict())


def test_a_retained_forward_survives_a_rejoin_for_its_backward_needs_no_connection(make_group, assert_close):
    module = Net().double()
    group = make(make_group, module, 2)
    x, _ = batch(7)
    shards = group.shards(x, None, with_targets=False)
    group.over_shards("retained_forward", shards, Retention(), "a", training=True)
    group.call_all("rejoin", group.processes.new_generation())
    cotangent = torch.randn(7, 3, dtype=torch.float64)
    parts = cotangent.split([4, 3])
    group.call("backward", [((BackwardQuery(retained="a"), [part]), {}) for part in parts])
    torch.cat(local(module, x, 2)).backward(cotangent)
    expected = {name: each.grad for name, each in module.named_parameters()}
    assert_close(group.call_all("held_gradients")[0], expected, tolerance=1e-11)
    assert_close(group.state_dict(), module.state_dict(), tolerance=1e-11)
