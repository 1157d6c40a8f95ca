"""Any number of ranks computes what plain torch computes on the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    inputs, classes = (10,), 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvNet(nn.Module):
    inputs, classes = (2, 6, 6), 3

    def __init__(self) -> None:
        super().__init__()
        # No biases before batch norm: their gradient is 0, and what float32 makes of it is rounding alone.
        self.conv1, self.norm1 = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2).flatten(1))


class Lstm(nn.Module):
    inputs, classes = (5, 6), 3

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    inputs, classes = (6, 8), 5

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def make(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(torch.initial_seed() % 1000 + 7)
    return kind().to(dtype)


def batch(module: nn.Module, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, *type(module).inputs, dtype=dtype), torch.randint(type(module).classes, (rows,))


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float64), (2, torch.float32), (3, torch.float64)], ids=str)
@pytest.mark.parametrize("kind", [Mlp, ConvNet, Lstm, Transformer])
def test_momentum_steps_of_any_batch_size_equal_plain_torch(kind, ranks, dtype, make_group, assert_close):
    module = make(kind, dtype)
    group = make_group(module, nn.CrossEntropyLoss(), batch(module, 4, dtype), ranks=ranks)
    assert group.whole["train"] is None
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    # One row a batch is too few for batch norm over it alone, but not over an image's pixels.
    for rows in (1, 7, 64):
        start = copy.deepcopy(module.state_dict())
        group.call_all("load_state_dict", {k: v.clone() for k, v in start.items()}, partial=False)
        group.call_all("load_optimizer_state", {**group.call_all("optimizer_state")[0], "state": {}})
        reference = copy.deepcopy(module)
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            inputs, targets = batch(module, rows, dtype)
            report, _, _ = group.compute_gradients(inputs, targets)
            loss = group.train_step(inputs, targets)
            assert group.rank_rows() == [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
            optimizer.zero_grad()
            expected = F.cross_entropy(reference(inputs), targets)
            expected.backward()
            assert loss == pytest.approx(expected.item(), rel=tolerance)
            assert report.loss == pytest.approx(expected.item(), rel=tolerance)
            assert_close(report.gradients, {name: each.grad for name, each in reference.named_parameters()})
            optimizer.step()
        assert_close(group.state_dict(), reference.state_dict())
