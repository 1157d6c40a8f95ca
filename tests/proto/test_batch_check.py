"""A batch finds the variant that it fits; one that fits none learns what is wrong with it."""

from __future__ import annotations

from math import prod

import pytest

from gradwire_proto.batch_check import flatten, select_variant
from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import (
    ITEM_SIZE,
    Batch,
    ConstantSpec,
    Leaf,
    LeafRef,
    Structure,
    Symbol,
    TensorData,
    TensorSpec,
    Value,
    Variant,
)


def tensor(*shape: int, dtype: str = "float32") -> TensorData:
    return TensorData(dtype, shape, bytes(prod(shape) * ITEM_SIZE[dtype]))


def spec(*shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(dtype, shape)


ONE_TENSOR = (LeafRef(0),)
TEN_FEATURES = (spec("rows", 10),)
AT_LEAST_ONE_ROW = (Symbol("rows", 1),)


def variant(
    structure: Structure = ONE_TENSOR,
    leaves: tuple[Leaf, ...] = TEN_FEATURES,
    *,
    targets: Structure = None,
    target_leaves: tuple[Leaf, ...] = (),
    symbols: tuple[Symbol, ...] = AT_LEAST_ONE_ROW,
    training: bool = True,
    name: str = "train",
) -> Variant:
    return Variant(
        name=name,
        training=training,
        graph=None,
        graph_inputs=(),
        input_structure=structure,
        input_leaves=leaves,
        output_structure=LeafRef(0),
        symbols=symbols,
        target_structure=targets,
        target_leaves=target_leaves,
    )


CLASSIFIER = variant(targets=LeafRef(0), target_leaves=(spec("rows", dtype="int64"),))


def refusal(candidate: Variant | list[Variant], inputs: Value, targets: Value = None, *, training: bool = True):
    candidates = candidate if isinstance(candidate, list) else [candidate]
    with pytest.raises(InvalidArgument) as caught:
        select_variant(candidates, Batch(inputs, targets), training=training, targets=True)
    return caught.value.reason, caught.value.field, caught.value.message


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_batch_of_any_size_fits_and_its_rows_are_counted(rows: int) -> None:
    batch = Batch((tensor(rows, 10),), tensor(rows, dtype="int64"))
    assert select_variant([CLASSIFIER], batch, training=True, targets=True) == (CLASSIFIER, rows)


def test_wrong_feature_size_names_what_was_expected_and_what_came() -> None:
    reason, field, message = refusal(CLASSIFIER, (tensor(4, 9),), tensor(4, dtype="int64"))
    assert (reason, field) == ("SHAPE_MISMATCH", "batch.inputs[0]")
    assert message == "expected float32[rows, 10], got float32[4, 9]"


def test_wrong_number_of_dimensions_is_a_shape_mismatch() -> None:
    assert refusal(CLASSIFIER, (tensor(10),), tensor(10, dtype="int64"))[:2] == ("SHAPE_MISMATCH", "batch.inputs[0]")


def test_wrong_dtype_is_told_even_where_the_shape_is_wrong_too() -> None:
    reason, field, message = refusal(CLASSIFIER, (tensor(4, 9, dtype="float64"),), tensor(4, dtype="int64"))
    assert (reason, field) == ("DTYPE_MISMATCH", "batch.inputs[0]")
    assert message == "expected float32[rows, 10], got float64[4, 9]"


def test_wrong_targets_are_told_by_their_field() -> None:
    assert refusal(CLASSIFIER, (tensor(4, 10),), tensor(4))[:2] == ("DTYPE_MISMATCH", "batch.targets")


def test_inputs_and_targets_of_different_rows_are_refused() -> None:
    reason, field, message = refusal(CLASSIFIER, (tensor(4, 10),), tensor(5, dtype="int64"))
    assert (reason, field) == ("ROWS_MISMATCH", "batch.targets")
    assert message == "expected 4 rows, as batch.inputs[0] has; got 5"


NAMED = variant({"x": LeafRef(0), "mask": LeafRef(1)}, (spec("rows", 2), spec("rows", dtype="bool")))


def test_dict_is_matched_by_name_in_any_order() -> None:
    inputs = {"mask": tensor(3, dtype="bool"), "x": tensor(3, 2)}
    assert select_variant([NAMED], Batch(inputs), training=True, targets=True) == (NAMED, 3)
    assert flatten(NAMED.input_structure, inputs, "batch.inputs") == [inputs["x"], inputs["mask"]]


def test_leaves_come_in_the_order_of_their_indices() -> None:
    assert flatten(({"b": LeafRef(2), "a": LeafRef(0)}, [LeafRef(1)]), ({"a": 0, "b": 2}, [1]), "inputs") == [0, 1, 2]


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"x": tensor(3, 2)}, "batch.inputs.mask"),
        ({"x": tensor(3, 2), "mask": tensor(3, dtype="bool"), "y": tensor(3)}, "batch.inputs.y"),
        ({"x": tensor(3, 2), "mask": None}, "batch.inputs.mask"),
        ((tensor(3, 2), tensor(3, dtype="bool")), "batch.inputs"),
        (tensor(3, 2), "batch.inputs"),
    ],
)
def test_missing_or_extra_name_is_named(inputs: Value, field: str) -> None:
    assert refusal(NAMED, inputs)[:2] == ("STRUCTURE_MISMATCH", field)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ((), "batch.inputs[0]"),
        ((tensor(3, 10), tensor(3)), "batch.inputs[1]"),
        ([tensor(3, 10)], "batch.inputs"),
        (({"x": tensor(3, 10)},), "batch.inputs[0]"),
        ((True,), "batch.inputs[0]"),
        (None, "batch.inputs"),
    ],
)
def test_missing_or_extra_position_is_named(inputs: Value, field: str) -> None:
    assert refusal(variant(), inputs)[:2] == ("STRUCTURE_MISMATCH", field)


def test_targets_that_are_missing_or_too_many_are_refused() -> None:
    assert refusal(CLASSIFIER, (tensor(4, 10),))[:2] == ("STRUCTURE_MISMATCH", "batch.targets")
    assert refusal(variant(), (tensor(4, 10),), tensor(4))[:2] == ("STRUCTURE_MISMATCH", "batch.targets")


def test_call_without_targets_does_not_ask_for_them() -> None:
    batch = Batch((tensor(4, 10),))
    assert select_variant([CLASSIFIER], batch, training=True, targets=False) == (CLASSIFIER, 4)


def test_mode_of_the_call_decides_between_variants_that_fit() -> None:
    train, evaluate = variant(), variant(training=False, name="eval")
    batch = Batch((tensor(4, 10),))
    for variants in ([train, evaluate], [evaluate, train]):
        assert select_variant(variants, batch, training=True, targets=True)[0] is train
        assert select_variant(variants, batch, training=False, targets=True)[0] is evaluate


def test_first_variant_that_fits_is_taken() -> None:
    short, long = variant(leaves=(spec("rows", 5),), name="short"), variant(leaves=(spec("rows", 8),), name="long")
    assert select_variant([short, long], Batch((tensor(2, 8),)), training=True, targets=True)[0] is long


@pytest.mark.parametrize(("training", "word"), [(True, "training"), (False, "eval")])
def test_program_without_a_variant_of_the_mode_says_so(training: bool, word: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        select_variant([variant(training=not training)], Batch((tensor(4, 10),)), training=training, targets=True)
    assert caught.value.reason == "NO_VARIANT" and word in str(caught.value)


def test_mismatch_of_the_closest_variant_is_told() -> None:
    far = variant({"x": LeafRef(0)})
    other_type = variant(leaves=(spec("rows", 10, dtype="float64"),))
    near = variant(leaves=(spec("rows", 12),))
    for order in ([far, other_type, near], [near, other_type, far], [other_type, near, far]):
        assert refusal(order, (tensor(4, 10),))[2] == "expected float32[rows, 12], got float32[4, 10]"


def test_batch_without_rows_is_refused_unless_the_variant_takes_it() -> None:
    assert refusal(variant(), (tensor(0, 10),))[:2] == ("BATCH_EMPTY", "batch.inputs[0]")
    willing = variant(symbols=(Symbol("rows", 0),))
    assert select_variant([willing], Batch((tensor(0, 10),)), training=True, targets=True) == (willing, 0)


def test_bounds_of_a_symbol_are_told() -> None:
    bounded = variant(symbols=(Symbol("rows", 2, 8),))
    assert refusal(bounded, (tensor(1, 10),)) == (
        "SHAPE_MISMATCH",
        "batch.inputs[0]",
        "expected rows from 2 to 8, got 1",
    )
    assert refusal(bounded, (tensor(9, 10),))[2] == "expected rows from 2 to 8, got 9"
    assert refusal(variant(symbols=(Symbol("rows", 2),)), (tensor(1, 10),))[2] == "expected rows at least 2, got 1"


def test_symbol_has_one_size_wherever_it_stands() -> None:
    pair = variant((LeafRef(0), LeafRef(1)), (spec("rows", "time"), spec("rows", "time")))
    batch = Batch((tensor(2, 5), tensor(2, 5)))
    assert select_variant([pair], batch, training=True, targets=True) == (pair, 2)
    reason, field, message = refusal(pair, (tensor(2, 5), tensor(2, 6)))
    assert (reason, field) == ("SHAPE_MISMATCH", "batch.inputs[1]")
    assert message == "expected float32[rows, time] with time = 5, as in batch.inputs[0]; got float32[2, 6]"


def test_variant_of_fixed_shape_has_no_rows() -> None:
    fixed = variant(leaves=(spec(4, 10),), symbols=())
    assert select_variant([fixed], Batch((tensor(4, 10),)), training=True, targets=True) == (fixed, 0)
    assert refusal(fixed, (tensor(5, 10),))[2] == "expected float32[4, 10], got float32[5, 10]"


@pytest.mark.parametrize("value", [True, 3, 0.5, "sum", float("nan")])
def test_constant_must_be_the_one_that_the_graph_has(value: bool | int | float | str) -> None:
    baked = variant((LeafRef(0), LeafRef(1)), (spec("rows"), ConstantSpec(value)))
    assert select_variant([baked], Batch((tensor(2), value)), training=True, targets=True) == (baked, 2)
    for other in (1, 1.0, False, "mean", tensor(1)):
        assert refusal(baked, (tensor(2), other))[:2] == ("CONSTANT_MISMATCH", "batch.inputs[1]")


def test_none_is_structure() -> None:
    optional = variant((LeafRef(0), None))
    assert select_variant([optional], Batch((tensor(2, 10), None)), training=True, targets=True) == (optional, 2)
    assert refusal(optional, (tensor(2, 10), tensor(2)))[:2] == ("STRUCTURE_MISMATCH", "batch.inputs[1]")


def test_tensor_without_dimensions_fits_where_one_is_expected() -> None:
    scaled = variant((LeafRef(0), LeafRef(1)), (spec("rows"), spec()))
    assert select_variant([scaled], Batch((tensor(2), tensor())), training=True, targets=True) == (scaled, 2)
    assert refusal(scaled, (tensor(2), tensor(1)))[0] == "SHAPE_MISMATCH"
