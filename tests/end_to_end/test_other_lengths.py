"""Sequence lengths and image sizes: one graph serves all that the module treats alike, on every number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradwire
from gradwire import optim
from gradwire.errors import InvalidArgument

VOCABULARY, CLASSES = 20, 5

Batch = tuple[Any, Any]


class Tagger(nn.Module):
    """A transformer encoder that labels each token."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        return self.out(self.encoder(self.embedding(tokens)))


class Positions(nn.Module):
    """Adds a table of positions, which ends."""

    def __init__(self, longest: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, CLASSES)
        self.positions = nn.Parameter(torch.randn(longest, CLASSES))

    def forward(self, tokens):
        return self.embedding(tokens) + self.positions[: tokens.shape[1]]


class Branches(nn.Module):
    """Does another thing with what is long."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, CLASSES)
        self.long = nn.Linear(CLASSES, CLASSES)

    def forward(self, tokens):
        x = self.embedding(tokens)
        if x.shape[1] > 4:
            x = self.long(x).tanh()
        return x * 2


class Recurrent(nn.Module):
    """An LSTM, whose length torch.export fixes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, CLASSES, batch_first=True)

    def forward(self, tokens):
        return self.lstm(self.embedding(tokens))[0]


class Pairs(nn.Module):
    """Adds up neighbours, two by two: for even lengths alone."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, CLASSES)

    def forward(self, tokens):
        return self.embedding(tokens).unflatten(1, (tokens.shape[1] // 2, 2)).sum((1, 2))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


def token_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100)


def transposed_loss(outputs, targets):
    return F.cross_entropy(outputs.transpose(1, 2), targets)


def tokens(rows: int, length: int) -> Batch:
    labels = torch.randint(0, CLASSES, (rows, length))
    labels[torch.rand(rows, length) < 0.2] = -100
    return torch.randint(0, VOCABULARY, (rows, length)), labels


def images(rows: int, height: int, width: int | None = None) -> Batch:
    return torch.randn(rows, 2, height, width or height + 1, dtype=torch.float64), torch.randint(0, CLASSES, (rows,))


def local_gradients(net: nn.Module, loss: Callable[..., Any], batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    net.zero_grad()
    value = loss(net(batch[0]), batch[1])
    value.backward()
    return value.item(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same(model: gradwire.Model, net: nn.Module, loss: Callable[..., Any], batch: Batch) -> None:
    """Loss, gradients and outputs are those of plain torch."""
    expected, gradients = local_gradients(net, loss, batch)
    result = model.compute_gradients(*batch)
    assert result.loss == pytest.approx(expected, rel=1e-9)
    assert result.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


def create(client: gradwire.Client, net: nn.Module, loss: Any, example: Any, workers: int = 1) -> gradwire.Model:
    return client.create_model(net, loss=loss, optimizer=optim.SGD(lr=0.1), example=example, workers=workers)


@pytest.mark.parametrize(
    ("make", "loss", "batch", "sizes", "workers"),
    [
        (Tagger, token_loss, tokens, [(4, 6), (3, 11), (2, 2), (1, 40)], 2),
        (Tagger, transposed_loss, tokens, [(4, 6), (3, 9)], 1),
        (convolutions, nn.CrossEntropyLoss(), images, [(4, 12, 14), (3, 9, 9), (5, 21, 10)], 2),
    ],
    ids=["tokens flattened", "tokens transposed", "images"],
)
def test_one_graph_serves_other_sizes_with_the_gradients_of_plain_torch(
    client: gradwire.Client, make: Any, loss: Any, batch: Any, sizes: list[tuple[int, ...]], workers: int
):
    torch.manual_seed(workers)
    net = make().double()
    model = create(client, copy.deepcopy(net), loss, batch(*sizes[0]), workers)
    variants = len(model.info().variants)
    for rows, *size in sizes:
        assert_same(model, net, loss, given := batch(rows, *size))
        net.train()
        torch.testing.assert_close(model(given[0]), net(given[0]).detach(), rtol=1e-8, atol=1e-10)
    assert len(model.info().variants) == variants
    assert workers == 1 or "rows are independent" in str(model.info().sharding)


def test_a_language_model_with_labels_of_its_own_serves_every_length_and_refuses_what_its_table_does(
    client: gradwire.Client,
):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=8,
        n_positions=16,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    net = transformers.GPT2LMHeadModel(config).double()

    def batch(rows: int, length: int):
        ids = torch.randint(0, VOCABULARY, (rows, length))
        ignored = torch.rand(rows, length) < 0.2
        ignored[0] = False
        return {"input_ids": ids, "labels": ids.masked_fill(ignored, -100)}

    model = create(client, copy.deepcopy(net), None, (batch(4, 6),))
    variants = len(model.info().variants)
    for rows, length in ((3, 9), (2, 2), (5, 16)):
        given = batch(rows, length)
        net.zero_grad()
        expected = net(**given).loss
        expected.backward()
        result = model.compute_gradients(given)
        # The model computes its loss in float32 whatever its parameters are.
        assert result.loss == pytest.approx(expected.item(), rel=1e-6)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(result.gradients[name], parameter.grad, rtol=1e-5, atol=1e-8, msg=name)
    assert len(model.info().variants) == variants
    with pytest.raises(IndexError):
        net(**batch(3, 17))
    with pytest.raises(InvalidArgument, match="out of range"):
        model.compute_gradients(batch(3, 17))
    # The model goes on.
    model.compute_gradients(batch(3, 16))


def test_a_sliced_table_of_positions_is_a_largest_length(client: gradwire.Client):
    net = Positions(longest=9).double()
    model = create(client, copy.deepcopy(net), token_loss, tokens(4, 6))
    variants = len(model.info().variants)
    for length in (2, 5, 9):
        assert_same(model, net, token_loss, tokens(3, length))
    assert len(model.info().variants) == variants
    with pytest.raises(RuntimeError):
        net(tokens(3, 10)[0])
    with pytest.raises(InvalidArgument, match="from 2 to 9, got 10") as refused:
        model.compute_gradients(*tokens(3, 10))
    assert refused.value.field == "batch.inputs"
    assert len(model.info().variants) == variants


@pytest.mark.parametrize("first", [3, 7])
def test_code_that_looks_at_the_length_has_a_graph_for_each_way(client: gradwire.Client, first: int):
    net = Branches().double()
    model = create(client, copy.deepcopy(net), token_loss, tokens(4, first))
    variants = len(model.info().variants)
    for length in (2, 4, 5, 12):
        net.zero_grad()
        expected, gradients = local_gradients(net, token_loss, given := tokens(3, length))
        result = model.compute_gradients(*given)
        assert result.loss == pytest.approx(expected, rel=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-8, atol=1e-11)
    # One more, for the other way.
    assert len(model.info().variants) == variants + 1


@pytest.mark.parametrize("make", [Recurrent, Pairs])
def test_where_a_length_cannot_stay_open_each_has_its_graph(client: gradwire.Client, make: type[nn.Module]):
    net = make().double()
    whole = make is Pairs
    loss = nn.MSELoss() if whole else token_loss

    def batch(rows: int, length: int) -> Batch:
        inputs, targets = tokens(rows, length)
        return inputs, torch.randn(rows, CLASSES, dtype=torch.float64) if whole else targets

    model = create(client, copy.deepcopy(net), loss, batch(4, 6), workers=2)
    variants = len(model.info().variants)
    for length in (8, 2, 8):
        assert_same(model, net, loss, batch(3, length))
    assert len(model.info().variants) == variants + 2
    if whole:
        with pytest.raises(InvalidArgument):
            model.compute_gradients(*batch(3, 7))


def test_an_example_of_length_one_fixes_that_length_alone(client: gradwire.Client):
    net = Positions(longest=9).double()
    model = create(client, copy.deepcopy(net), token_loss, tokens(4, 1))
    variants = len(model.info().variants)
    for length in (1, 5, 2, 9):
        assert_same(model, net, token_loss, tokens(3, length))
    assert len(model.info().variants) == variants + 1
