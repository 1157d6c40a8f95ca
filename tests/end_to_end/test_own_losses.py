"""Losses that the model returns, or that a client describes, over several ranks: torch's numbers on the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwire import optim
from gradwire.errors import ExportError, FailedPrecondition, InvalidArgument

TOLERANCE = 1e-12


def gpt2() -> nn.Module:
    import transformers as hf

    config = hf.GPT2Config(
        n_embd=16, n_head=2, n_layer=1, vocab_size=31, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    config.use_cache = False
    return hf.GPT2LMHeadModel(config)


def words(rows: int, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(2, 31, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}


def close(found: Tensor, expected: Tensor, everything: float) -> bool:
    allowed = TOLERANCE * max(float(expected.norm()), 1e-3 * everything)
    return float((found - expected).norm()) <= allowed


def check(model: Any, module: nn.Module, inputs: Any, loss: Tensor, targets: Any = None) -> None:
    """That the model's loss and gradients are those of `loss`, computed with `module` here."""
    names = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()))
    result = model.compute_gradients(inputs, targets)
    assert result.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    everything = sum(float(each.norm()) ** 2 for each in gradients) ** 0.5
    for name, expected in zip(names, gradients, strict=True):
        assert close(result.gradients[name], expected, everything), name


def test_gpt2_is_spread_over_ranks_and_exact_with_labels_and_gives_logits_without(client):
    torch.manual_seed(3)
    net = gpt2().double()
    model = client.create_model(net, optimizer=optim.SGD(lr=0.1), example=(words(4),), workers=3, require_sharding=True)
    sharding = model.info().sharding
    assert sharding.mode == "rows"
    assert "not -100 in inputs.labels but for its first column" in sharding.reason
    for rows in (5, 2):
        batch = words(rows)
        batch["labels"][torch.rand(batch["labels"].shape) < 0.4] = -100
        batch["labels"][1:] = -100  # every other rank has nothing to learn
        check(model, net, batch, net(**batch).loss)
        assert sum(model.compute_gradients(batch).rank_rows) == rows
    outputs = model.forward(batch)
    assert outputs.logits.shape == (2, 7, 31)
    expected = net(**batch).loss.item()
    assert float(outputs.loss) == pytest.approx(expected, rel=TOLERANCE)
    alone = {"input_ids": words(3)["input_ids"]}
    assert torch.allclose(model.forward(alone).logits, net.eval()(**alone).logits, atol=1e-12)
    assert model.train_step(batch).loss == pytest.approx(expected, rel=TOLERANCE)


class Focal(nn.Module):
    """A mean over what a mask of floats weighs, which no trial finds; a mask that says nothing is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.layer(x).square().squeeze(-1) * mask).sum() / mask.sum()


def masked(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4).double(), torch.rand(rows).double()


def test_loss_weight_spreads_a_loss_that_no_trial_finds(client):
    torch.manual_seed(0)
    net = Focal().double()
    alone = client.create_model(net, example=(masked(4),), workers=2)
    assert alone.info().sharding.mode == "whole" and "loss_weight" in alone.info().sharding.reason
    with pytest.raises(FailedPrecondition) as refused:
        client.create_model(net, example=(masked(4),), workers=2, require_sharding=True)
    assert refused.value.reason == "ROWS_NOT_INDEPENDENT"
    model = client.create_model(
        net, example=(masked(4),), workers=3, loss_weight=lambda inputs: inputs[1].sum(), require_sharding=True
    )
    assert "loss_weight" in model.info().sharding.reason
    for rows in (5, 2, 1):
        x, mask = masked(rows)
        mask[1:] = 0
        check(model, net, (x, mask), net(x, mask))
        # How a row's weight moves the mean depends on all rows: those gradients are computed by one rank.
        given = (x.requires_grad_(), mask.requires_grad_())
        expected = torch.autograd.grad(net(*given), given)
        found = model.compute_gradients((x.detach(), mask.detach()), input_gradients=True)
        assert found.rank_rows == (rows, 0, 0)
        for one, other in zip(found.input_gradients, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)


def test_weights_that_cancel_give_the_infinity_that_torch_gives(client):
    torch.manual_seed(0)
    net = Focal().double()
    model = client.create_model(net, example=(masked(4),), workers=2, loss_weight=lambda inputs: inputs[1].sum())
    x, mask = masked(4)[0], torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    for rows in (x, x.flip(0)):
        assert model.compute_gradients((rows, mask)).loss == net(rows, mask).item()  # of either sign


def mean_and_what_is_at_rest(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets) + F.relu(outputs.mean(0).abs() - 20).sum()


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Token-level cross entropy with class weights, as a callable of the outputs."""
    return F.cross_entropy(outputs.transpose(1, 2), targets, weight=torch.tensor([1.0, 2.0, 0.5]).double())


class Heads(nn.Linear):
    """float[n, t, 4] -> float[n, t, 3]"""


def tagged(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 5, 4).double(), torch.randint(3, (rows, 5))


def weight_of(inputs: Tensor, targets: Tensor) -> Tensor:
    taken = targets != -100
    return (torch.tensor([1.0, 2.0, 0.5]).double()[targets.where(taken, 0)] * taken).sum()


@pytest.mark.parametrize(("ranks", "given"), [(1, weight_of), (2, weight_of), (3, None)])
def test_token_level_cross_entropy_of_the_outputs_is_exact_gathered_or_weighed(client, ranks, given):
    torch.manual_seed(ranks)
    net = Heads(4, 3).double()
    model = client.create_model(
        net, loss=token_loss, example=tagged(4), workers=ranks, loss_weight=given, require_sharding=True
    )
    assert ranks == 1 or (given is not None) == ("loss_weight" in model.info().sharding.reason)
    for rows in (7, 2):
        x, y = tagged(rows)
        y[torch.rand(y.shape) < 0.3] = -100
        y[1:] = -100
        check(model, net, x, token_loss(net(x), y), y)


def mean_of_rows(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().pow(1.5).sum(-1).mean()


def numbers(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4).double(), torch.randn(rows, 3).double()


def test_one_worker_takes_what_holds_and_what_batch_norm_hides(client):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    for module in (net, net[0]):
        client.create_model(module, loss=mean_of_rows, example=numbers(4), loss_reduction="mean").delete()
    count = {"loss_weight": lambda x, y: torch.ones(x.shape[0]).sum()}
    client.create_model(net[0], loss=mean_of_rows, example=numbers(4), **count).delete()


@pytest.mark.parametrize(
    ("loss", "reduction"), [(mean_of_rows, "mean"), (lambda a, b: 3 * mean_of_rows(a, b) * a.shape[0], "sum")]
)
def test_loss_reduction_that_holds_is_used(client, loss, reduction):
    net = nn.Linear(4, 3).double()
    model = client.create_model(net, loss=loss, example=numbers(4), workers=3, loss_reduction=reduction)
    assert f"the loss is a {reduction} over rows" in model.info().sharding.reason
    assert model.info().loss_reduction == reduction
    for rows in (7, 2):
        x, y = numbers(rows)
        check(model, net, x, loss(net(x), y), y)


def info_nce(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ targets.T, torch.arange(outputs.shape[0]))


@pytest.mark.parametrize(
    ("loss", "batch", "reduction", "ranks"),
    [
        (mean_of_rows, numbers, "sum", 1),
        (mean_of_rows, numbers, "sum", 2),
        (info_nce, numbers, "mean", 1),
        (info_nce, numbers, "mean", 2),
        (lambda outputs, targets: F.mse_loss(outputs, targets).clamp(max=1e3), numbers, "mean", 1),
        (token_loss, tagged, "mean", 2),
        (nn.CrossEntropyLoss(), lambda rows: (torch.randn(rows, 4).double(), torch.randint(3, (rows,))), "mean", 2),
    ],
)
def test_loss_reduction_that_does_not_hold_is_refused_by_name(client, loss, batch, reduction, ranks):
    net = nn.Linear(4, 3).double()
    with pytest.raises(InvalidArgument) as refused:
        client.create_model(net, loss=loss, example=batch(4), workers=ranks, loss_reduction=reduction)
    assert (refused.value.field, refused.value.reason) == ("model.loss_reduction", "LOSS_REDUCTION_WRONG")


def test_what_rests_in_every_batch_that_is_tried_is_seen_where_rows_are_split(client):
    with pytest.raises(InvalidArgument) as refused:
        client.create_model(
            nn.Linear(4, 3).double(),
            loss=mean_and_what_is_at_rest,
            example=numbers(4),
            workers=2,
            loss_reduction="mean",
        )
    assert (refused.value.field, refused.value.reason) == ("model.loss_reduction", "LOSS_REDUCTION_WRONG")


class Positions(nn.Module):
    """A token-level loss that weighs places; a table says how, or the first six count."""

    def __init__(self, weights: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]) < 6 if self.weights is None else self.weights[: x.shape[1]]
        counts = (labels != -100) * places
        return (F.cross_entropy(self.layer(x).transpose(1, 2), labels, reduction="none") * counts).sum() / counts.sum()


def labelled(rows: int, length: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 3, (rows, length)).masked_fill(torch.rand(rows, length) < 0.3, -100)
    return torch.randn(rows, length, 4).double(), labels


PLACES = [None, torch.where(torch.arange(140) < 60, 1.0, 3.0).double()]


@pytest.mark.parametrize("weights", PLACES, ids=["the first six", "a table"])
def test_a_weight_that_holds_at_the_examples_length_alone_is_not_used(client, weights):
    torch.manual_seed(5)
    net = Positions(weights).double()
    model = client.create_model(net, example=(labelled(6, 5),), workers=2)
    variants = len(model.info().variants)
    for rows, length in ((7, 9), (5, 90), (6, 5)):
        batch = labelled(rows, length)
        check(model, net, batch, net(*batch))
    assert len(model.info().variants) == variants  # one graph for all lengths, and so one weight


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("weights", PLACES, ids=["the first six", "a table"])
def test_loss_weight_must_hold_at_other_lengths_too(client, weights, ranks):
    net = Positions(weights).double()
    with pytest.raises(InvalidArgument) as refused:
        client.create_model(
            net, example=(labelled(6, 5),), workers=ranks, loss_weight=lambda inputs: (inputs[1] != -100).sum()
        )
    assert refused.value.reason == "LOSS_WEIGHT_WRONG"


@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_weight_that_does_not_hold_is_refused_by_name(client, ranks):
    with pytest.raises(InvalidArgument, match="loss_weight does not hold") as refused:
        client.create_model(
            Heads(4, 3).double(),
            loss=token_loss,
            example=tagged(4),
            workers=ranks,
            loss_weight=lambda x, y: (y != -100).sum(),
        )
    assert refused.value.reason == "LOSS_WEIGHT_WRONG" and refused.value.field.endswith(".weight_graph")


@pytest.mark.parametrize(
    ("arguments", "kind", "field"),
    [
        ({"loss_reduction": "median"}, InvalidArgument, "model.loss_reduction"),
        ({"loss_reduction": "mean", "loss": None}, InvalidArgument, "model.loss_reduction"),
        ({"loss_weight": 3}, InvalidArgument, "loss_weight"),
        ({"loss_weight": lambda x, y: y}, ExportError, "loss_weight"),
        ({"loss_weight": lambda x, y: y.sum(), "loss": None}, InvalidArgument, "loss_weight"),
        ({"loss_weight": lambda x, y: y.sum(), "loss_reduction": "sum"}, InvalidArgument, "model.loss_reduction"),
    ],
)
def test_what_a_loss_cannot_be_weighed_by_is_refused(client, arguments, kind, field):
    with pytest.raises(kind) as refused:
        client.create_model(
            copy.deepcopy(nn.Linear(4, 3)).double(), **{"loss": mean_of_rows, "example": numbers(4), **arguments}
        )
    assert refused.value.field == field
