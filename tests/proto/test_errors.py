"""Errors keep what they say through pickling and copying, as they must between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from gradwire_proto import errors

ATTRIBUTES = {
    "reason": "SOME_REASON",
    "field": "batch.inputs[0]",
    "request_id": "5f8d1c1e-5c9c-4d0e-9a53-6b1f2c3d4e5f",
    "retryable": True,
    "retry_after": 1.5,
    "outcome": "unknown",
    "resource": "models/digits",
}
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.GradwireError) and kind.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_error_is_the_same_after_pickling_and_copying(kind: type[errors.GradwireError], again) -> None:
    for error in (kind("what went wrong", **ATTRIBUTES), kind(), kind("only words")):
        twin = again(error)
        assert type(twin) is kind
        assert (twin.message, twin.attributes(), str(twin)) == (error.message, error.attributes(), str(error))
    assert kind("what", **ATTRIBUTES).attributes() == ATTRIBUTES


def test_docstring_draws_every_error() -> None:
    lines = (errors.__doc__ or "").splitlines()
    start = lines.index("GradwireError")
    tree = lines[start : lines.index("", start)]
    assert {line.lstrip(" │├└─").split()[0] for line in tree} == {kind.__name__ for kind in KINDS}


def test_error_is_found_by_its_name_and_nothing_else_is() -> None:
    assert errors.by_name("RankLost") is errors.RankLost
    for name in ("annotations", "by_name", "Exception", "NoSuchError", "__builtins__"):
        assert errors.by_name(name) is errors.InternalError


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.InvalidArgument, ValueError),
        (errors.ModelNotFound, LookupError),
        (errors.DeadlineExceeded, TimeoutError),
        (errors.Unavailable, ConnectionError),
    ],
)
def test_error_is_caught_as_the_builtin_that_it_is(kind: type, builtin: type) -> None:
    with pytest.raises(builtin):
        raise kind("what")


def test_message_starts_with_the_field() -> None:
    assert (
        str(errors.InvalidArgument("expected 2, got 3", field="batch.inputs[0]"))
        == "batch.inputs[0]: expected 2, got 3"
    )
