"""Which sizes a variant leaves open, and when train and eval mode share a graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.values import ConstantSpec, Symbol, TensorSpec


class Forward(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def train_variant(function, *inputs, targets=None, loss=None):
    return ModuleExporter(Forward(function), loss).export_model(inputs, targets).variants[0].variant


def test_dimension_0_of_every_leaf_of_the_batch_is_rows():
    variant = train_variant(
        lambda m, x, scale, flag, table: m.linear(x) * scale + table.sum(),
        torch.randn(6, 4),
        torch.randn(6, 1),
        True,
        torch.randn(3, 2),
    )
    assert variant.symbols == (Symbol("rows", min=1), Symbol("size_0", min=2), Symbol("size_1", min=2))
    assert variant.input_leaves == (
        TensorSpec("float32", ("rows", 4)),
        TensorSpec("float32", ("rows", 1)),
        ConstantSpec(True),
        TensorSpec("float32", ("size_0", "size_1")),
    )


def test_a_one_row_example_is_enlarged():
    exporter = ModuleExporter(nn.Linear(4, 2), "mse")
    exported = exporter.export_model(torch.randn(1, 4), torch.randn(1, 2))
    assert exported.program.variants[0].input_leaves == (TensorSpec("float32", ("rows", 4)),)
    assert exported.example.inputs.shape == (2, 4) and exported.example.targets.shape == (2, 2)


def test_a_module_that_takes_one_row_only_stays_at_one_row():
    def one(module, x):
        assert x.shape[0] == 1
        return module.linear(x)

    assert train_variant(one, torch.randn(1, 4)).input_leaves == (TensorSpec("float32", (1, 4)),)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.linear(x) if x.shape[0] % 2 == 0 else x,
        lambda m, x: m.linear(x) * int(x.shape[0]),
        lambda m, x: sum(m.linear(x[i]) for i in range(x.shape[0])),
        lambda m, x: m.linear(x).view(-1, 2, 4),
    ],
)
def test_where_python_fixes_the_rows_the_variant_has_fixed_sizes(function):
    variant = train_variant(function, torch.randn(6, 4))
    assert variant.symbols == () and variant.input_leaves == (TensorSpec("float32", (6, 4)),)


def test_len_leaves_rows_open():
    variant = train_variant(lambda m, x: m.linear(x) / len(x) + torch.arange(len(x))[:, None], torch.randn(6, 4))
    assert variant.symbols == (Symbol("rows", min=1),)


def test_a_graph_that_is_wrong_for_one_row_starts_at_two():
    variant = train_variant(
        lambda m, x: m.linear(x)[:, :1].squeeze() + torch.zeros(x.shape[0], 2).sum(1), torch.randn(6, 4)
    )
    assert variant.symbols[0].min in (1, 2)
    variant = train_variant(lambda m, x: m.linear(x) if x.shape[0] > 1 else m.linear(x) * 2, torch.randn(6, 4))
    assert variant.symbols == (Symbol("rows", min=2),)


def test_a_module_without_modes_is_exported_once():
    exported = ModuleExporter(nn.Sequential(nn.Linear(4, 4), nn.ReLU())).export_model(torch.randn(3, 4))
    train, evaluation = exported.program.variants
    assert (train.name, train.training) == ("train", True) and (evaluation.name, evaluation.training) == ("eval", False)
    assert evaluation.graph is train.graph


@pytest.mark.parametrize("module", [nn.Dropout(0.3), nn.BatchNorm1d(4)])
def test_a_module_that_reads_its_mode_is_exported_for_each(module):
    exported = ModuleExporter(nn.Sequential(nn.Linear(4, 4), module)).export_model(torch.randn(3, 4))
    train, evaluation = exported.program.variants
    assert train.graph != evaluation.graph


def test_a_module_with_its_own_train_is_exported_for_each_mode():
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.factor = nn.Linear(4, 4), 1

        def train(self, mode=True):
            self.factor = 1 if mode else 2
            return super().train(mode)

        def forward(self, x):
            return self.linear(x) * self.factor

    train, evaluation = ModuleExporter(Doubles()).export_model(torch.randn(3, 4)).program.variants
    assert train.graph != evaluation.graph


def test_a_mode_that_is_read_behind_our_back_is_seen_by_the_outputs():
    module = Forward(lambda m, x: m.linear(x) * (2 if m.__dict__["training"] else 1))
    train, evaluation = ModuleExporter(module).export_model((torch.randn(3, 4),)).program.variants
    assert train.graph != evaluation.graph


def test_the_users_own_flags_hold_in_training():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module[1].eval()
    train = ModuleExporter(module).export_model(torch.randn(3, 4)).program.variants[0]
    (norm,) = [node for node in train.graph.nodes if node.operator == "aten.batch_norm.default"]
    assert norm.arguments[5] is False


def test_another_variant_has_other_sizes_and_shares_constants():
    constant = torch.randn(4)
    exporter = ModuleExporter(Forward(lambda m, x: m.linear(x.view(-1, 2, 4)) + constant))
    first = exporter.export_model((torch.randn(6, 4),))
    another = exporter.export_variant((torch.randn(8, 4),), training=True, name="train-2")
    assert another.variant.input_leaves == (TensorSpec("float32", (8, 4)),)
    assert another.tensors == () and another.values == {}
    assert len([t for t in first.program.tensors if t.role == "constant"]) == 1
    assert exporter.export_variant((torch.randn(8, 4),), training=False, name="e").variant.training is False


def test_a_variant_for_a_batch_without_targets_has_no_loss():
    exporter = ModuleExporter(nn.Linear(4, 1), lambda o, t: (o - t).square().mean())
    exporter.export_model(torch.randn(3, 4), torch.randn(3, 1))
    variant = exporter.export_variant(torch.randn(3, 2, 4), training=False, name="eval-2").variant
    assert variant.loss_graph is None and variant.target_leaves == ()


def test_a_loss_may_do_without_targets():
    exported = ModuleExporter(nn.Linear(4, 1), lambda outputs, targets: outputs.square().mean()).export_model(
        torch.randn(3, 4)
    )
    assert exported.program.variants[0].loss_graph is not None


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_rows_are_fixed_where_a_batch_of_fewer_does_not_fit_itself(rows):
    # Each row against each: the target's second dimension is rows too, and nothing says so.
    variant = train_variant(
        lambda m, x: (m.linear(x) @ x.T).softmax(1),
        torch.randn(rows, 4),
        targets=torch.rand(rows, rows),
        loss=lambda output, target: (output - target).abs().mean(),
    )
    assert variant.symbols == ()
    assert variant.input_leaves == (TensorSpec("float32", (rows, 4)),)
    assert variant.target_leaves == (TensorSpec("float32", (rows, rows)),)
