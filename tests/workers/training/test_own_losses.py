"""Models that return their own loss are spread over ranks where a weight makes that exact, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 7


class Tagger(nn.Module):
    """A loss over the tokens of a batch, in one of many ways. Returns it beside the logits."""

    def __init__(self, kind: str = "tokens", *, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind, self.dropout = kind, nn.Dropout(dropout)
        self.embedding, self.norm = nn.Embedding(CLASSES, width), nn.BatchNorm1d(width)
        self.out = nn.Linear(width, CLASSES)
        self.register_buffer("class_weights", torch.linspace(0.5, 2.0, CLASSES))

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.dropout(torch.tanh(self.embedding(ids)))
        if "norm" in self.kind:
            hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        logits = self.out(hidden)
        return {"loss": self.loss(logits, labels), "logits": logits}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "at least zero":
            known = labels >= 0
            each = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
            return (each * known).sum() / known.sum()
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        taken = labels != -100
        match self.kind:
            case "tokens":
                return F.cross_entropy(logits.transpose(1, 2), labels)
            case "shifted":
                return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
            case "classes" | "classes norm":
                return F.cross_entropy(logits.transpose(1, 2), labels, weight=self.class_weights, ignore_index=2)
            case "masked" | "masked norm":
                return (each * taken).sum() / taken.sum()
            case "sum":
                return each.sum()
            case "rows":
                return ((each * taken).sum(1) / taken.sum(1).clamp(min=1)).mean()
            case "padded":
                return (each * (labels != 3)).sum() / (labels != 3).sum()
            case "one at least":
                flat = F.cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1), reduction="none")
                return (flat * taken.reshape(-1)).sum() / taken.sum().clamp(min=1)
            case "tokens and norm of parameters":
                return F.cross_entropy(logits.transpose(1, 2), labels) + 1e-3 * self.out.weight.square().sum()
            case "sum and norm of parameters":
                return each.sum() + 1e-7 * self.out.weight.square().sum()
            case "balance":
                chosen = logits.softmax(-1).mean((0, 1))
                return F.cross_entropy(logits.transpose(1, 2), labels) + 1e-6 * (chosen * chosen).sum()
            case "root of rows":
                return F.cross_entropy(logits.transpose(1, 2), labels) / logits.shape[0] ** 0.5
            case "rows and tokens":
                return each.sum(1).mean() + F.cross_entropy(logits.transpose(1, 2), labels)
            case "smoothed":
                weight = self.class_weights
                return F.cross_entropy(logits.transpose(1, 2), labels, weight=weight, label_smoothing=0.1)
            case "of parameters alone":  # every mean is right, and nothing tells them apart
                return self.out.bias.square().mean()
            case "largest":
                return each.max()
        raise AssertionError(self.kind)


def tokens(rows: int, length: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randint(CLASSES, (rows, length)), torch.randint(CLASSES, (rows, length))


def expected(module: nn.Module, *inputs: Any, **named: Any) -> tuple[float, dict[str, Tensor]]:
    module = copy.deepcopy(module)
    loss = module(*inputs, **named)["loss"]
    loss.backward()
    return loss.item(), {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


SPREAD = {
    "tokens": "not -100 in inputs[1]",
    "shifted": "but for its first column",
    "classes": "not 2 in inputs[1], by class weights",
    "classes norm": "by class weights",
    "masked norm": "not -100 in inputs[1]",
    "masked": "not -100 in inputs[1]",
    "at least zero": "at least 0 in inputs[1]",
    "one at least": "not -100 in inputs[1]",
    "sum": "a sum over rows",
    "rows": "a mean over rows",
    "padded": "not 3 in inputs[1]",
    "tokens and norm of parameters": "not -100 in inputs[1]",
    "smoothed": "by class weights",
}


@pytest.mark.parametrize(
    ("kind", "ranks", "dtype"),
    [
        *((kind, 2, torch.float64) for kind in SPREAD if kind not in ("tokens", "classes norm", "masked norm", "rows")),
        *((kind, 3, torch.float64) for kind in ("tokens", "classes norm")),
        *((kind, 2, torch.float32) for kind in ("masked norm", "rows")),
    ],
)
def test_its_own_loss_and_gradients_are_torchs_whatever_the_shards_have_to_learn(
    kind, ranks, dtype, make_group, assert_close
):
    torch.manual_seed(len(kind))
    module = Tagger(kind).to(dtype)
    group = make_group(module, None, (tokens(4), None), ranks=ranks)
    assert group.whole == {"train": None, "eval": None} and SPREAD[kind] in group.loss["train"]
    relative = 1e-12 if dtype is torch.float64 else 1e-5
    ignored = {"classes": 2, "classes norm": 2, "padded": 3}.get(kind, -100)
    for rows in (7, 2, 1, 4):
        ids, labels = tokens(rows)
        labels[torch.rand(labels.shape) < 0.4] = ignored
        labels[rows // 2 + 1 :] = ignored  # a shard, or more, without anything to learn
        if kind == "at least zero":
            labels[labels == ignored] = -torch.arange(1, 1 + int((labels == ignored).sum()))
        labels[0, 1] = 1
        loss, gradients = expected(module, ids, labels)
        report, _, outputs = group.compute_gradients((ids, labels), outputs=True)
        assert report.loss == pytest.approx(loss, rel=relative)
        assert_close(report.gradients, gradients)
        assert float(outputs["loss"]) == pytest.approx(loss, rel=relative)
        assert outputs["logits"].shape == (rows, 5, CLASSES)
        assert sum(group.rank_rows()) == rows


def test_training_with_shards_that_are_ignored_ends_with_torchs_weights(make_group, assert_close):
    module = Tagger("masked").double()
    group = make_group(module, None, (tokens(4), None), ranks=3)
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for rows in (6, 3, 5):
        ids, labels = tokens(rows)
        labels[1:] = -100
        loss = reference(ids, labels)["loss"]
        assert group.train_step((ids, labels)) == pytest.approx(loss.item(), rel=1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(group.state_dict(), reference.state_dict(), tolerance=1e-11)


def test_forward_gives_the_whole_batchs_loss_beside_everybodys_rows(make_group):
    module = Tagger("tokens").double().eval()
    group = make_group(module, None, (tokens(4), None))
    ids, labels = tokens(5)
    labels[3:] = -100
    outputs = group.forward((ids, labels))
    reference = module(ids, labels)
    assert float(outputs["loss"]) == pytest.approx(float(reference["loss"].detach()), rel=1e-12)
    assert torch.allclose(outputs["logits"], reference["logits"].detach(), rtol=1e-12)


@pytest.mark.parametrize("kind", ["tokens", "masked"])
def test_a_batch_without_any_target_gives_the_number_that_torch_gives(kind, make_group):
    group = make_group(Tagger(kind).double(), None, (tokens(4), None))
    ids, labels = tokens(5)
    report, _, outputs = group.compute_gradients((ids, labels.fill_(-100)), outputs=True)
    assert report.loss != report.loss and outputs["loss"].isnan()


WHOLE = {
    "sum and norm of parameters": "loss_weight",
    "balance": "depends on more than a row",
    "root of rows": "pow",
    "rows and tokens": "loss_weight",
    "largest": "computed with max after rows were put together",
    "of parameters alone": "loss_weight",
}


@pytest.mark.parametrize(
    ("kind", "zeros"),
    [*((kind, False) for kind in WHOLE), ("sum and norm of parameters", True), ("rows and tokens", True)],
)
def test_a_loss_that_no_weight_fits_stays_whole_and_says_why(kind, zeros, make_group):
    torch.manual_seed(0)
    module = Tagger(kind)
    if zeros:  # every token has the same loss at first
        nn.init.zeros_(module.out.weight)
        nn.init.zeros_(module.out.bias)
    if zeros and kind == "sum and norm of parameters":
        nn.init.constant_(module.out.weight, 1e-2)
    group = make_group(module, None, (tokens(4), None))
    assert WHOLE[kind] in group.whole["train"] and group.loss["train"] is None
    ids, labels = tokens(5)
    loss, _ = expected(module, ids, labels)
    assert group.train_step((ids, labels)) == pytest.approx(loss, rel=1e-6)
    assert group.rank_rows() == [5, 0]


@pytest.mark.parametrize("kind", ["tokens", "rows", "sum"])
def test_what_runs_out_of_time_runs_whole_and_says_so(kind, make_group):
    torch.manual_seed(0)
    module = Tagger(kind)
    group = make_group(module, None, (tokens(4), None), seconds=0.0)
    assert group.whole["train"] == group.whole["eval"]
    assert "takes longer than a client is let wait" in group.whole["train"] and group.loss["train"] is None
    ids, labels = tokens(5)
    loss, _ = expected(module, ids, labels)
    assert group.train_step((ids, labels)) == pytest.approx(loss, rel=1e-6)
    assert group.rank_rows() == [5, 0]


def test_time_that_runs_out_on_one_rank_alone_runs_out_on_all(make_group):
    group = make_group(Tagger("tokens"), None, (tokens(4), None))
    assert group.whole["train"] is None
    example = [list(tokens(4)), []]
    each = [(("train", *example), {"seconds": seconds}) for seconds in (float("inf"), 0.0)]
    reports = group.call("check_rows", each)
    assert all("takes longer" in report.reason for report in reports)


def test_evaluation_that_differs_from_training_in_dropout_alone_is_not_tried_again(make_group, assert_close):
    torch.manual_seed(0)
    found = {}
    for kind in ("masked", "masked norm"):
        module = Tagger(kind, dropout=0.3)
        group = make_group(module, None, (tokens(4), None))
        group.call_all("run", "trainer._replica.weigh('eval', None)")
        # No time at all: what is told is what was found for training.
        report, *_ = group.call_all(
            "check_rows", "eval", list(tokens(4)), seconds=0.0, like=("train", group.reports_of["train"])
        )
        found[kind] = report.reason
        if report.reason is not None:
            continue
        batch = tokens(5)
        batch[1][2:] = -100
        loss, gradients = expected(module.eval(), *batch)
        result, _, _ = group.compute_gradients(batch, training=False)
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert_close(result.gradients, gradients)
    assert found["masked"] is None
    assert "takes longer" in found["masked norm"]  # batch norm does something else in evaluation


def test_rows_are_not_taken_for_tokens_though_no_target_of_the_example_is_ignored(make_group):
    torch.manual_seed(1)
    for kind, words in (("rows", "a mean over rows"), ("tokens", "not -100"), ("padded", "not 3")):
        module = Tagger(kind)
        nn.init.zeros_(module.out.weight)
        nn.init.zeros_(module.out.bias)
        ids = torch.zeros(2, 5, dtype=torch.long)
        group = make_group(module, None, ((ids, ids + 1), None))
        assert words in group.loss["train"]


class Regressor(nn.Module):
    """A mean over rows, and what may become of it where a batch is unlike the example."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(4, 3)
        self.register_buffer("coefficient", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        hidden = self.layer(x)
        each = (hidden - y).square().mean(1)
        return {"loss": self.loss(each, hidden), "hidden": hidden}

    def loss(self, each: Tensor, hidden: Tensor) -> Tensor:
        match self.kind:
            case "clamped":
                return each.mean().clamp(max=20.0)
            case "without nan":
                return each.mean().nan_to_num(posinf=1.0, nan=2.0)
            case "chosen":
                return torch.cond(hidden.mean() < 5, lambda x: x.mean(), lambda x: x.square().mean(), (each,))
            case "scaled":
                return (each / (hidden.norm().clamp(min=100.0) / 100)).mean()
            case "flooded":
                return (each.mean() - 0.05).abs() + 0.05
            case "scheduled":
                return each.mean() + self.coefficient * hidden.mean(0).square().sum()
            case "scheduled sum":
                return each.mean() + self.coefficient * each.sum()
            case "relu":
                return each.mean() + F.relu(hidden.mean(0).abs() - 20).sum()
            case "two means":
                return 0.5 * each.mean() + 2 * F.l1_loss(hidden, torch.zeros_like(hidden)) - each.mean() / 4
            case "in place":
                loss = each.mean()
                loss += 0.1 * hidden.square().mean()
                return loss
        raise AssertionError(self.kind)


def pairs(rows: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4).double() * size, torch.randn(rows, 3).double()


AT_REST = {
    "clamped": "clamp",
    "without nan": "nan_to_num",
    "chosen": "cond",
    "scaled": "depends on more than a row",
    "flooded": "abs",
    "scheduled": "depends on more than a row",
    "scheduled sum": "loss_weight",
    "relu": "depends on more than a row",
}


@pytest.mark.parametrize("kind", AT_REST)
def test_what_is_at_rest_in_every_batch_like_the_example_is_seen_in_the_graph(kind, make_group, assert_close):
    torch.manual_seed(0)
    module = Regressor(kind).double()
    group = make_group(module, None, (pairs(4), None))
    assert AT_REST[kind] in group.whole["train"]
    for batch in (pairs(5, 100.0), pairs(5, 1e-3)):
        loss, gradients = expected(module, *batch)
        report, _, _ = group.compute_gradients(batch)
        assert report.loss == pytest.approx(loss, rel=1e-12)
        assert_close(report.gradients, gradients)


@pytest.mark.parametrize("kind", ["two means", "in place"])
def test_means_that_are_added_up_are_spread(kind, make_group, assert_close):
    torch.manual_seed(0)
    module = Regressor(kind).double()
    group = make_group(module, None, (pairs(4), None))
    assert group.loss["train"] == "a mean over rows"
    for batch in (pairs(5, 100.0), pairs(1)):
        loss, gradients = expected(module, *batch)
        report, _, _ = group.compute_gradients(batch)
        assert report.loss == pytest.approx(loss, rel=1e-12)
        assert_close(report.gradients, gradients)
