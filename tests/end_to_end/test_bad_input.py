"""What bad input gets: a typed error that names the field and the bound, within a second, and nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import gradwire
from gradwire import errors, optim

FEATURES, CLASSES = 5, 3


@contextmanager
def refused(kind: type[Exception], *, says: str = "", field: str | None = None, seconds: float = 1.0) -> Iterator[None]:
    """The block raises `kind` in time; the error's text holds `says` and its field path holds `field`.

    seconds: of this process' work; what others do meanwhile may make it five times as long.
    """
    start, worked = time.monotonic(), time.process_time()
    with pytest.raises(kind) as caught:
        yield
    took, worked = time.monotonic() - start, time.process_time() - worked
    error = caught.value
    assert worked < seconds and took < 5 * seconds, f"took {took:.2f} s, and {worked:.2f} s of work"
    assert says.lower() in str(error).lower()
    assert error.reason and error.reason.isupper()
    assert error.outcome == "not_applied"
    if field is not None:
        assert field in (error.field or ""), error.field


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, FEATURES), torch.randint(0, CLASSES, (rows,))


@pytest.fixture(scope="module")
def model(client: gradwire.Client) -> Iterator[gradwire.Model]:
    """A model on two ranks that every test here abuses, and that must work as if nothing had happened."""
    net = classifier()
    model = client.create_model(
        net, loss=nn.CrossEntropyLoss(), optimizer=optim.SGD(lr=0.1, momentum=0.9), example=batch(), workers=2
    )
    yield model
    model.delete()


@pytest.fixture(autouse=True)
def nothing_changes(model: gradwire.Model) -> Iterator[None]:
    """Around each test: the model's tensors and step stay as they were, and it still trains exactly as torch does."""
    before, step = model.state_dict(), model.info().step
    yield
    after = model.state_dict()
    assert model.info().step == step
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    local = classifier()
    local.load_state_dict(before)
    x, y = batch(7)
    loss = nn.functional.cross_entropy(local(x), y)
    result = model.compute_gradients(x, y)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)


def test_wrong_feature_size_names_the_input_and_the_shape(model):
    with refused(errors.InvalidArgument, says=f"{FEATURES}", field="inputs"):
        model.train_step(torch.randn(4, FEATURES + 1), torch.zeros(4, dtype=torch.int64))


def test_wrong_dtype_names_the_input_and_the_dtype(model):
    with refused(errors.InvalidArgument, says="float32", field="inputs"):
        model.train_step(torch.randn(4, FEATURES, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))


def test_rows_that_differ_between_inputs_and_targets_are_refused(model):
    with refused(errors.InvalidArgument, field="targets"):
        model.train_step(torch.randn(4, FEATURES), torch.zeros(5, dtype=torch.int64))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(3, 1)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


@pytest.fixture(scope="module")
def two_inputs(client: gradwire.Client) -> Iterator[gradwire.Model]:
    inputs = {"left": torch.randn(4, 2), "right": torch.randn(4, 3)}
    model = client.create_model(TwoInputs(), loss="mse_loss", example=(inputs, torch.randn(4, 1)), workers=2)
    yield model
    model.delete()


def test_missing_input_is_named(two_inputs):
    with refused(errors.InvalidArgument, says="right", field="inputs"):
        two_inputs.compute_gradients({"left": torch.randn(4, 2)}, torch.randn(4, 1))


def test_extra_input_is_named(two_inputs):
    inputs = {"left": torch.randn(4, 2), "right": torch.randn(4, 3), "middle": torch.randn(4, 1)}
    with refused(errors.InvalidArgument, says="middle", field="inputs"):
        two_inputs.compute_gradients(inputs, torch.randn(4, 1))


def test_wrong_input_size_of_a_deep_net_is_refused_within_a_second(client):
    layers = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(30):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 10))
    model = client.create_model(
        net, loss="cross_entropy", example=(torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,)))
    )
    with refused(errors.InvalidArgument, says="8", field="inputs"):
        model.compute_gradients(torch.randn(4, 3, 9, 9), torch.randint(0, 10, (4,)))
    model.delete()


def test_missing_targets_are_refused(model):
    with refused(errors.InvalidArgument, field="targets"):
        model.train_step(torch.randn(4, FEATURES))


def test_empty_batch_is_refused(model):
    with refused(errors.InvalidArgument, field="inputs"):
        model.train_step(torch.randn(0, FEATURES), torch.zeros(0, dtype=torch.int64))


def test_extra_positional_input_is_refused(model):
    with refused(errors.InvalidArgument, field="inputs"):
        model.train_step((torch.randn(4, FEATURES), torch.randn(4, FEATURES)), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("target", [CLASSES, -1, 10**9])
@pytest.mark.parametrize("row", [0, 5])
def test_target_out_of_range_names_the_bound_on_whichever_rank_it_falls(model, target, row):
    x, y = batch(6)
    y[row] = target
    with refused(errors.InvalidArgument, says=str(CLASSES), field="targets"):
        model.train_step(x, y)


def test_one_row_for_batch_norm_in_training_is_refused_as_torch_does(model):
    with refused(errors.InvalidArgument, says="more than 1 value per channel"):
        model.train_step(*batch(1))


def test_nan_loss_is_reported_by_default(client):
    model = client.create_model(nn.Linear(2, 1), loss="mse_loss", optimizer=optim.SGD(lr=0.1), example=_pair(2))
    result = model.compute_gradients(torch.full((2, 2), float("nan")), torch.zeros(2, 1))
    assert result.loss != result.loss
    model.delete()


@pytest.mark.parametrize("workers", [1, 2])
def test_nan_loss_is_refused_by_on_nan_and_the_step_is_not_applied(client, workers):
    model = client.create_model(
        nn.Linear(2, 1),
        loss="mse_loss",
        optimizer=optim.SGD(lr=0.1),
        example=_pair(4),
        workers=workers,
        on_nan="refuse",
    )
    before = model.state_dict()
    inputs = torch.randn(4, 2)
    inputs[3, 1] = float("nan")
    with refused(errors.GradwireError, says="nan"):
        model.train_step(inputs, torch.zeros(4, 1))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.train_step(torch.randn(4, 2), torch.zeros(4, 1)).step == 1
    model.delete()


def test_unknown_model_is_not_found(client):
    with refused(errors.ModelNotFound, says="no-such-model"):
        client.get_model("no-such-model")


def test_deleted_model_is_not_found(client):
    model = client.create_model(nn.Linear(2, 1), loss="mse_loss", example=_pair(2))
    model.delete()
    with refused(errors.ModelNotFound):
        model.compute_gradients(*_pair(2))


def test_glob_that_matches_nothing_is_named(model):
    with refused(errors.InvalidArgument, says="encoder.*", field="wrt"):
        model.compute_gradients(*batch(), wrt=["0.*", "encoder.*"])


def test_client_gradient_for_a_name_that_does_not_exist_is_named(model):
    with refused(errors.InvalidArgument, field="no.such.parameter"):
        model.optimizer_step({"no.such.parameter": torch.zeros(3)})


def test_client_gradient_of_another_shape_names_both_shapes(model):
    with refused(errors.InvalidArgument, field="0.weight"):
        model.optimizer_step({"0.weight": torch.zeros(3)})


def test_optimizer_step_without_gradients_is_refused(model):
    with refused(errors.FailedPrecondition):
        model.optimizer_step()


@pytest.mark.parametrize("arguments", [{"lr": -1.0}, {"lr": 0.1, "momentum": -0.5}, {"lr": 0.1, "nesterov": True}])
def test_optimizer_argument_out_of_range_is_refused_where_it_is_written(arguments):
    with refused(errors.InvalidArgument):
        optim.SGD(**arguments)


def test_negative_learning_rate_of_one_step_is_refused(model):
    with refused(errors.InvalidArgument, says="lr"):
        model.train_step(*batch(), lr=-0.1)


def test_module_that_cannot_be_exported_says_why(client):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x):
            return self.linear(x) if x.sum().item() > 0 else -self.linear(x)

    with refused(errors.ExportError, seconds=10):
        client.create_model(Branches(), loss="mse_loss", example=_pair(2))


def test_example_that_does_not_fit_the_module_quotes_torch(client):
    with refused(errors.InvalidArgument, says="shape", seconds=10):
        client.create_model(nn.Linear(3, 1), loss="mse_loss", example=_pair(2))


def test_more_ranks_than_the_service_has_names_both_numbers(client):
    with refused(errors.ResourceExhausted, says="1000", seconds=10):
        client.create_model(nn.Linear(2, 1), loss="mse_loss", example=_pair(2), workers=1000)


def test_state_dict_with_a_missing_name_is_refused(model):
    state = model.state_dict()
    state.pop("0.weight")
    with refused(errors.InvalidArgument, says="0.weight"):
        model.load_state_dict(state)


def test_state_dict_with_another_shape_is_refused(model):
    state = model.state_dict()
    state["3.bias"] = torch.zeros(CLASSES + 1)
    with refused(errors.InvalidArgument, field="3.bias"):
        model.load_state_dict(state)


def test_model_id_that_is_taken_is_refused(client):
    model = client.create_model(nn.Linear(2, 1), loss="mse_loss", example=_pair(2), model_id="taken")
    with refused(errors.AlreadyExists, says="taken", seconds=10):
        client.create_model(nn.Linear(2, 1), loss="mse_loss", example=_pair(2), model_id="taken")
    model.delete()


def test_require_sharding_refuses_a_model_that_mixes_rows(client):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x):
            h = self.linear(x)
            return h - h.mean(0)

    with refused(errors.FailedPrecondition, says="row", seconds=10):
        client.create_model(Centred(), loss="mse_loss", example=_pair(4), workers=2, require_sharding=True)


def _pair(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2), torch.randn(rows, 1)
