"""A module exported, sent and rebuilt computes what the module computes: outputs, loss, all gradients, all buffers."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradwire_proto.values import GraphLossSpec, OutputLossSpec, TorchLossSpec

BATCHES = (1, 2, 7, 64)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def test_an_mlp_equals_eager_at_every_batch_size(round_trip):
    trip = round_trip(mlp(), torch.randn(4, 10), torch.randint(3, (4,)), nn.CrossEntropyLoss())
    assert trip.exported.loss == TorchLossSpec(
        "cross_entropy", {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
    )
    for rows in BATCHES:
        trip.check(torch.randn(rows, 10), torch.randint(3, (rows,)), training=True)
        trip.check(torch.randn(rows, 10), torch.randint(3, (rows,)), training=False)


def test_convolution_and_batch_norm_equal_eager_and_variants_share_buffers(round_trip):
    trip = round_trip(ConvNet(), torch.randn(3, 2, 8, 8), torch.randint(3, (3,)), "cross_entropy")
    for rows in BATCHES:
        trip.check(torch.randn(rows, 2, 8, 8), torch.randint(3, (rows,)), training=True)
        # The running statistics that training has moved are those that eval reads.
        trip.check(torch.randn(rows, 2, 8, 8), torch.randint(3, (rows,)), training=False)
    moved = trip.built.mutated_buffers("train")
    assert {id(each) for each in moved} == {
        id(t) for name, t in trip.built.all_state().items() if "running" in name or "num_b" in name
    }
    assert trip.built.mutated_buffers("eval") == []
    assert trip.built.has_batch_norm("train") and not trip.built.has_batch_norm("eval")


def test_an_lstm_equals_eager(round_trip):
    trip = round_trip(Recurrent(), torch.randn(4, 5, 4), torch.randint(3, (4,)), "cross_entropy")
    for rows in BATCHES:
        trip.check(torch.randn(rows, 5, 4), torch.randint(3, (rows,)))
    assert not trip.built.is_random("train")


def test_a_transformer_encoder_equals_eager(round_trip):
    trip = round_trip(Transformer(), torch.randint(20, (4, 5)), torch.randint(3, (4,)), "cross_entropy")
    for rows in BATCHES:
        trip.check(torch.randint(20, (rows, 5)), torch.randint(3, (rows,)), training=True, tolerance=1e-5)
        trip.check(torch.randint(20, (rows, 5)), torch.randint(3, (rows,)), training=False, tolerance=1e-5)


def test_dropout_draws_what_eager_draws_from_the_same_seed(round_trip):
    trip = round_trip(Transformer(dropout=0.3), torch.randint(20, (4, 5)), torch.randint(3, (4,)), "cross_entropy")
    trip.check(torch.randint(20, (6, 5)), torch.randint(3, (6,)), tolerance=1e-5)
    assert trip.built.is_random("train") and not trip.built.is_random("eval")


def test_without_randomness_dropout_is_off_and_comes_back(round_trip):
    trip = round_trip(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)), torch.randn(3, 4))
    x = torch.randn(5, 4)
    with trip.built.without_randomness():
        torch.testing.assert_close(trip.built("train", x)[0], trip.module[0](x))
    assert (trip.built("train", x)[0] == 0).any()


def test_float64_stays_float64(round_trip):
    trip = round_trip(mlp().double(), torch.randn(4, 10, dtype=torch.float64), torch.randint(3, (4,)), "cross_entropy")
    trip.check(torch.randn(7, 10, dtype=torch.float64), torch.randint(3, (7,)), tolerance=1e-14)


class ManyInputs(nn.Module):
    """Positional, keyword and nested inputs; named and nested outputs; a constant that decides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, extra=None, scale=1.0, names=("a", "b")):
        h = self.linear(x) * scale
        if extra is not None:
            h = h + extra["bias"] + extra["list"][0] * extra["list"][1]
        return Outputs({"h": h, names[0]: h.sum(1)}, None, [h * 2, 3, x.shape[0]])


Outputs = namedtuple("Outputs", "main nothing rest")


@pytest.mark.parametrize("rows", [2, 5])
def test_nested_inputs_and_outputs_come_back_as_they_were(round_trip, rows):
    def inputs(n):
        extra = {"bias": torch.randn(4), "list": [torch.randn(n, 4), torch.randn(n, 1)]}
        return {"x": torch.randn(n, 4), "extra": extra, "scale": 0.5}

    trip = round_trip(ManyInputs(), inputs(3))
    trip.check(inputs(rows))
    outputs, _, _ = trip.run(inputs(rows))
    assert isinstance(outputs, Outputs) and outputs.nothing is None and outputs.rest[1:] == [3, rows]


def test_a_tuple_is_passed_by_position(round_trip):
    trip = round_trip(ManyInputs(), (torch.randn(3, 4), None, 2.0))
    trip.check((torch.randn(5, 4), None, 2.0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


def test_tied_weights_are_one_parameter_with_two_names(round_trip):
    trip = round_trip(Tied(), torch.randint(12, (4, 3)), torch.randint(12, (4,)), "cross_entropy")
    trip.check(torch.randint(12, (6, 3)), torch.randint(12, (6,)))
    state = trip.built.state_tensors()
    assert list(state) == list(trip.module.state_dict())
    assert state["head.weight"] is state["embedding.weight"]
    assert list(trip.built.parameters_by_name()) == ["embedding.weight"] and len(list(trip.built.parameters())) == 1


class Odd(nn.Module):
    """Frozen and unused parameters, a temporary buffer, a plain tensor, a counter, and a tensor made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.first.bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.plain = torch.arange(4.0)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.first(x) * self.mask + self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.zeros(4)


def test_odd_tensors_keep_their_roles(round_trip):
    trip = round_trip(Odd(), torch.randn(3, 4), torch.randn(3, 4), nn.MSELoss())
    for rows in (2, 5):
        trip.check(torch.randn(rows, 4), torch.randn(rows, 4))
    _, _, gradients = trip.run(torch.randn(2, 4), torch.randn(2, 4))
    assert "first.bias" not in gradients and gradients["unused.weight"] is None
    roles = {tensor.name: tensor.role for tensor in trip.exported.program.tensors}
    assert roles["mask"] == "temporary_buffer" and roles["calls"] == "buffer"
    assert sum(role == "constant" for role in roles.values()) == 2
    assert list(trip.built.state_tensors()) == list(trip.module.state_dict())
    assert not trip.built.parameters_by_name()["first.bias"].requires_grad


class OwnLoss(nn.Module):
    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.as_dict = as_dict

    def forward(self, x, labels):
        logits = self.linear(x)
        loss = F.cross_entropy(logits, labels)
        return {"logits": logits, "loss": loss} if self.as_dict else loss


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_model_may_return_its_own_loss(round_trip, as_dict):
    trip = round_trip(OwnLoss(as_dict), {"x": torch.randn(3, 4), "labels": torch.randint(2, (3,))})
    assert trip.exported.loss == OutputLossSpec(1 if as_dict else 0)
    trip.check({"x": torch.randn(6, 4), "labels": torch.randint(2, (6,))})


CENTRE, TEMPERATURE = torch.randn(3), nn.Parameter(torch.tensor(2.0))


class CustomLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(3))

    def forward(self, outputs, targets):
        return ((outputs - targets) ** 2 * self.weight).mean()


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, targets: ((outputs - targets - CENTRE) / TEMPERATURE).abs().mean(),
        lambda outputs, targets: (
            F.normalize(outputs) @ F.normalize(targets).T @ torch.ones(len(targets)) @ torch.ones(len(targets))
        ),
        CustomLoss(),
        lambda outputs, targets: F.cosine_embedding_loss(outputs, targets, torch.ones(len(outputs))),
    ],
)
def test_any_callable_is_a_loss(round_trip, loss):
    trip = round_trip(mlp(), torch.randn(4, 10), torch.randn(4, 3), loss)
    assert trip.exported.loss == GraphLossSpec() and trip.exported.variants[0].variant.symbols
    for rows in BATCHES:
        trip.check(torch.randn(rows, 10), torch.randn(rows, 3), tolerance=1e-5)


@pytest.mark.parametrize(
    ("loss", "sent"),
    [
        ("mse", TorchLossSpec("mse_loss")),
        ("smooth_l1_loss", TorchLossSpec("smooth_l1_loss")),
        (F.l1_loss, TorchLossSpec("l1_loss")),
        (nn.HuberLoss(delta=0.5), TorchLossSpec("huber_loss", {"reduction": "mean", "delta": 0.5})),
        (nn.MSELoss(reduction="sum"), TorchLossSpec("mse_loss", {"reduction": "sum"})),
    ],
)
def test_losses_of_torch_travel_by_name(round_trip, loss, sent):
    trip = round_trip(mlp(), torch.randn(4, 10), torch.randn(4, 3), loss)
    assert trip.exported.loss == sent
    trip.check(torch.randn(7, 10), torch.randn(7, 3))


def test_a_loss_that_broadcasts_travels_as_a_graph(round_trip):
    trip = round_trip(nn.Linear(10, 1), torch.randn(4, 10), torch.randn(4), nn.MSELoss())
    assert trip.exported.loss == GraphLossSpec()
    trip.check(torch.randn(7, 10), torch.randn(7))


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        h = self.one(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
            gate = torch.sigmoid(self.two(h))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.two(h)
        return h * gate + low.float()


def test_regions_without_gradients_and_with_autocast_are_kept(round_trip):
    trip = round_trip(Regions(), torch.randn(3, 4), torch.randn(3, 4), "mse")
    for rows in (2, 6):
        trip.check(torch.randn(rows, 4), torch.randn(rows, 4))
    assert trip.built.mutated_buffers("train") == [trip.built.all_state()["average"]]


def test_spectral_and_weight_norm_equal_eager(round_trip):
    module = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    )
    trip = round_trip(module, torch.randn(3, 4), torch.randn(3, 3), "mse")
    for _ in range(3):
        trip.check(torch.randn(6, 4), torch.randn(6, 3), tolerance=1e-5)


def test_an_embedding_that_renormalises_its_weight_equals_eager(round_trip):
    module = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    before = module[0].weight.detach().clone()
    trip = round_trip(module, torch.randint(9, (3, 2)), torch.randn(3, 3), "mse")
    assert torch.equal(module[0].weight, before)
    trip.check(torch.randint(9, (5, 2)), torch.randn(5, 3))
    assert [id(t) for t in trip.built.mutated_buffers("train")] == [id(trip.built.all_state()["0.weight"])]


def test_an_input_that_the_module_changes_in_place_is_left_alone(round_trip):
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(x.mul_(2))

    trip = round_trip(InPlace(), torch.randn(3, 4))
    x = torch.randn(5, 4)
    kept = x.clone()
    trip.built("train", x)
    assert torch.equal(x, kept)


def test_batch_norm_over_one_value_per_channel_is_refused_as_eager_does(round_trip):
    from gradwire_proto.errors import InvalidArgument

    trip = round_trip(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(3, 4))
    assert trip.exported.variants[0].variant.symbols[0].min == 1
    with pytest.raises(InvalidArgument, match="more than 1 value per channel"):
        trip.built("train", torch.randn(1, 4))


def test_batch_norm_can_be_replaced_in_every_variant(round_trip):
    calls = []

    def double(x, *others):
        calls.append(len(others))
        return x * 2

    trip = round_trip(nn.Sequential(nn.BatchNorm1d(4)), torch.randn(3, 4))
    trip.built.replace_batch_norm(double)
    x = torch.randn(5, 4)
    assert torch.equal(trip.built("train", x)[0], x * 2) and calls == [8]
    trip.built("eval", x)
    assert calls == [8]


def test_a_factory_follows_the_users_default_type(round_trip):
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) + torch.ones(3) * torch.rand(3)

    torch.set_default_dtype(torch.float64)
    try:
        trip = round_trip(Zeros(), torch.randn(3, 4), torch.randn(3, 3), "mse")
    finally:
        torch.set_default_dtype(torch.float32)
    outputs, _, _ = trip.run(torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
    assert outputs.dtype == torch.float64


def test_an_input_without_a_derivative_is_taken(round_trip):
    class MarginLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, signs):
            return F.soft_margin_loss(self.linear(x), signs)

    trip = round_trip(MarginLoss(), (torch.randn(3, 4), torch.randn(3, 3).sign()))
    assert trip.exported.loss == OutputLossSpec(0)
    trip.check((torch.randn(6, 4), torch.randn(6, 3).sign()))
