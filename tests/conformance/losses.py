"""Every loss of torch.nn, with every reduction that gives a number, and each of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from conformance.case import Case
from torch import Tensor, nn

ROWS, CLASSES = 7, 5


class Two(nn.Module):
    """A module with several outputs, for losses of several."""

    def __init__(self, width: int, outputs: int, then: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, width) for _ in range(outputs))
        self.then = then or nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.then(layer(x)) for layer in self.layers)


class Words(nn.Module):
    """A sequence of class scores for each row: [rows, classes, words], the layout of torch.nn's losses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).transpose(1, 2)


class Head(nn.Module):
    """A loss with weights of its own is a part of its module."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.body(x), labels)


class Spoken(nn.Module):
    """[words, rows, classes] of log-probabilities, the layout of CTCLoss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).log_softmax(-1).transpose(0, 1)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Each on seven rows: on two ranks, shards differ in length."""
    for name, module, loss, inputs, targets in _all(dtype):
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        yield Case(group="losses", name=name, module=module.to(dtype), inputs=given, loss=loss, targets=targets)


def _all(dtype: torch.dtype) -> Iterator[tuple[str, nn.Module, Any, Any, Any]]:
    torch.manual_seed(1)
    x = torch.randn(ROWS, 4, dtype=dtype)
    words = torch.randn(ROWS, 6, 4, dtype=dtype)
    labels = torch.randint(CLASSES, (ROWS,))
    labels[2] = -100
    word_labels = torch.randint(CLASSES, (ROWS, 6))
    word_labels[4:] = -100  # the second shard has nothing to learn
    real, chance = torch.randn(ROWS, CLASSES, dtype=dtype), torch.rand(ROWS, CLASSES, dtype=dtype)
    signs = torch.randint(2, (ROWS, CLASSES)).to(dtype) * 2 - 1
    weight = torch.rand(CLASSES, dtype=dtype) + 0.1
    linear, sigmoid = nn.Linear(4, CLASSES), nn.Sequential(nn.Linear(4, CLASSES), nn.Sigmoid())
    log_softmax = nn.Sequential(nn.Linear(4, CLASSES), nn.LogSoftmax(1))
    several = torch.full((ROWS, CLASSES), -1)
    several[:, 0], several[::2, 1] = 3, 1
    one_sign = signs[:, 0].contiguous()
    for reduction in ("mean", "sum"):
        given: dict[str, Any] = {"reduction": reduction}

        def named(kind: type[nn.Module], given: dict[str, Any] = given, **arguments: Any) -> tuple[str, nn.Module]:
            shown = ", ".join(
                f"{key}={'tensor' if isinstance(value, Tensor) else value}"
                for key, value in {**given, **arguments}.items()
            )
            return f"{kind.__name__}({shown})", kind(**given, **arguments)

        for arguments in (
            {},
            {"weight": weight},
            {"ignore_index": 1},
            {"label_smoothing": 0.2},
            {"weight": weight, "ignore_index": 0, "label_smoothing": 0.1},
        ):
            name, loss = named(nn.CrossEntropyLoss, **arguments)
            yield f"{name} of classes", linear, loss, x, labels if "ignore_index" not in arguments else labels.clamp(0)
            yield (
                f"{name} of words",
                Words(),
                loss,
                words,
                word_labels.clamp(0 if "ignore_index" in arguments else -100),
            )
            if "ignore_index" not in arguments:
                yield f"{name} of distributions", linear, loss, x, chance.softmax(1)
        for arguments in ({}, {"weight": weight}, {"ignore_index": 1}):
            name, loss = named(nn.NLLLoss, **arguments)
            yield name, log_softmax, loss, x, labels if "ignore_index" not in arguments else labels.clamp(0)
        for kind, choices in (
            (nn.MSELoss, ({},)),
            (nn.L1Loss, ({},)),
            (nn.SmoothL1Loss, ({}, {"beta": 0.3}, {"beta": 0.0})),
            (nn.HuberLoss, ({}, {"delta": 0.4})),
        ):
            for arguments in choices:
                yield *_with(named(kind, **arguments), linear), x, real
        for arguments in ({}, {"weight": weight}):
            yield *_with(named(nn.BCELoss, **arguments), sigmoid), x, chance
        for arguments in ({}, {"weight": weight}, {"pos_weight": weight}):
            yield *_with(named(nn.BCEWithLogitsLoss, **arguments), linear), x, chance
        for log_target in (False, True):
            target = chance.softmax(1).log() if log_target else chance.softmax(1)
            yield *_with(named(nn.KLDivLoss, log_target=log_target), log_softmax), x, target
            if reduction == "mean":
                batch = named(nn.KLDivLoss, {"reduction": "batchmean"}, log_target=log_target)
                yield *_with(batch, log_softmax), x, target
        for arguments in ({}, {"log_input": False}, {"full": True}, {"eps": 1e-3, "log_input": False}):
            yield *_with(named(nn.PoissonNLLLoss, **arguments), sigmoid), x, chance * 9
        yield *_with(named(nn.SoftMarginLoss), linear), x, signs
        for arguments in ({}, {"margin": 0.3}):
            yield *_with(named(nn.HingeEmbeddingLoss, **arguments), linear), x, signs
        for arguments in ({}, {"p": 2}, {"margin": 0.4}, {"weight": weight}):
            yield *_with(named(nn.MultiMarginLoss, **arguments), linear), x, labels.clamp(0)
        yield *_with(named(nn.MultiLabelMarginLoss), linear), x, several
        for arguments in ({}, {"weight": weight}):
            yield *_with(named(nn.MultiLabelSoftMarginLoss, **arguments), linear), x, (signs > 0).to(dtype)
        for arguments in ({}, {"margin": 0.2}):
            name, loss = named(nn.CosineEmbeddingLoss, **arguments)
            yield name, Two(3, 2), _of_pair(loss), x, one_sign
            name, loss = named(nn.MarginRankingLoss, **arguments)
            yield name, Two(1, 2, nn.Flatten(0)), _of_pair(loss), x, one_sign
        for arguments in ({}, {"p": 1, "margin": 0.5}, {"swap": True}):
            name, loss = named(nn.TripletMarginLoss, **arguments)
            yield name, Two(3, 3), _of_outputs(loss), x, None
        name, loss = named(nn.TripletMarginWithDistanceLoss, distance_function=nn.PairwiseDistance(), swap=True)
        yield name, Two(3, 3), _of_outputs(loss), x, None
        for arguments in ({}, {"full": True}):
            name, loss = named(nn.GaussianNLLLoss, **arguments)
            yield name, Two(CLASSES, 2, nn.Softplus()), _gaussian(loss), x, real
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
        for arguments in ({}, {"bias": True, "weight": weight, "ignore_index": 1, "options": chunks}):
            name, loss = named(nn.LinearCrossEntropyLoss, in_features=3, num_classes=CLASSES, **arguments)
            yield name, Head(loss), lambda output, target: output, (x, labels.clamp(0)), None
        for arguments in ({}, {"blank": 2, "zero_infinity": True}):
            name, loss = named(nn.CTCLoss, **arguments)
            lengths = (torch.tensor([6, 6, 5, 6, 4, 6, 6]), torch.tensor([2, 1, 2, 2, 1, 2, 2]))
            yield name, Spoken(), _ctc(loss), words, (torch.full((ROWS, 2), 1) + torch.tensor([0, 2]), *lengths)
    yield "InfoNCE", Two(3, 2), _contrastive, x, None
    yield "mean of squares by a callable", linear, lambda output, target: (output - target).square().mean(), x, real
    yield "median by a callable", linear, lambda output, target: (output - target).abs().median(), x, real


def _with(named: tuple[str, nn.Module], module: nn.Module) -> tuple[str, nn.Module, nn.Module]:
    return named[0], module, named[1]


def _of_pair(loss: nn.Module) -> Callable[[Any, Any], Tensor]:
    return lambda outputs, target: loss(*outputs, target)


def _of_outputs(loss: nn.Module) -> Callable[[Any, Any], Tensor]:
    return lambda outputs, target: loss(*outputs)


def _gaussian(loss: nn.Module) -> Callable[[Any, Any], Tensor]:
    return lambda outputs, target: loss(outputs[0], target, outputs[1])


def _ctc(loss: nn.Module) -> Callable[[Any, Any], Tensor]:
    return lambda output, targets: loss(output, *targets)


def _contrastive(outputs: Any, target: Any) -> Tensor:
    one, other = (nn.functional.normalize(each, dim=1) for each in outputs)
    return nn.functional.cross_entropy(one @ other.T / 0.1, torch.arange(one.shape[0]))
