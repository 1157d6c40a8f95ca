"""What a program or a batch gives to operators of the allowlist neither ends a process nor reads its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from gradwire_proto.errors import GradwireError, InvalidArgument
from gradwire_proto.operators import allowed_operators, resolve
from gradwire_workers.programs.arithmetic import bounded
from gradwire_workers.programs.checked_operators import checked

# Calls that, unchecked, end a process or answer with what lies beyond a tensor. (name, arguments)
HOSTILE = [
    ("native_batch_norm.default", "randn(2, 40000, 9), ones(1), ones(1), ones(1), ones(1), True, .1, 1e-5"),
    ("_native_batch_norm_legit.default", "randn(2, 40000, 9), ones(1), ones(1), ones(1), ones(1), True, .1, 1e-5"),
    ("native_batch_norm_backward.default", "*[ones(2, 4000, 9)] * 2, *[ones(1)] * 5, True, 1e-5, [True] * 3"),
    ("reflection_pad1d_backward.default", "ones(1, 1, 10), ones(1, 500, 8), [1, 1]"),
    ("reflection_pad2d_backward.default", "ones(1, 1, 10, 10), ones(50, 500, 8, 8), [1] * 4"),
    ("replication_pad1d_backward.default", "ones(1, 1, 10), ones(50, 500, 8), [1, 1]"),
    ("replication_pad2d_backward.default", "ones(1, 1, 10, 10), ones(50, 500, 8, 8), [1] * 4"),
    ("_adaptive_avg_pool2d_backward.default", "ones(1, 1, 2, 2), ones(50, 500, 4, 4)"),
    ("_adaptive_avg_pool3d_backward.default", "ones(1, 1, 2, 2, 2), ones(50, 500, 4, 4, 4)"),
    (
        "grid_sampler_2d_backward.default",
        "ones(1, 1, 2, 2), ones(5, 8, 4, 4), ones(5, 60, 60, 2), 0, 0, False, [True] * 2",
    ),
    ("native_layer_norm_backward.default", "*[ones(2000, 30)] * 2, [30], *[ones(1)] * 2, *[ones(30)] * 2, [True] * 3"),
    ("native_layer_norm_backward.default", "ones(1), ones(20, 30), [30], *[ones(20)] * 2, None, None, [True] * 3"),
    ("_fft_c2c.default", "ones(3, dtype=torch.complex64), [9], 0, True"),
    ("embedding_dense_backward.default", "ones(4, 3), tensor([10**12, 5, -7, 10**6]), 5, -1, True"),
    ("embedding_bag.default", "ones(4, 3), tensor([1, 2]), tensor([0, -(10**9)])"),
    ("embedding_bag.default", "ones(4, 3), tensor([1, 2]), tensor([0, 10**9])"),
    ("embedding_bag.padding_idx", "ones(4, 3), tensor([1, 10**9]), tensor([0, 1]), False, 2, False, None, False, 0"),
    ("_embedding_bag.default", "ones(4, 3), tensor([1, 2, 3]), tensor([0, 2, 1])"),
    ("ctc_loss.Tensor", "randn(9, 2, 5), tensor([[10**12], [-(10**9)]]), tensor([9, 9]), tensor([1, 1])"),
    ("ctc_loss.IntList", "randn(9, 2, 5), tensor([1, 10**12]), [9, 9], [1, 1]"),
    ("div.Tensor_mode", "tensor([-(2**63)] * 9), tensor([-1] * 9), rounding_mode='trunc'"),
    ("div_.Scalar_mode", "tensor([-(2**31)], dtype=torch.int32), -1, rounding_mode='trunc'"),
    ("divide.Tensor_mode", "tensor([-(2**63)]), tensor([[-1], [1]]), rounding_mode='trunc'"),
    ("div.Tensor_mode", "tensor([1]), tensor([0]), rounding_mode='trunc'"),
    ("fractional_max_pool2d.default", "ones(1, 1, 8, 8), [2, 2], [4, 4], torch.full((1, 1, 2), 1e9)"),
]

# Their processors' traps are caught by torch, or do not come: seen on these.
HARMLESS = [
    *((f"{name}.Tensor", "tensor([-(2**63)] * 9), tensor([-1] * 9)") for name in ("fmod", "remainder")),
    *((f"{name}.Scalar", "tensor([-(2**63)]), 0") for name in ("fmod", "remainder")),
    ("floor_divide.default", "tensor([-(2**63)] * 9), tensor([-1] * 9)"),
    ("floor_divide.default", "tensor([1]), tensor([0])"),
    ("div.Tensor_mode", "tensor([-(2**63)] * 9), tensor([-1] * 9), rounding_mode='floor'"),
]

RUN_ONE = """
import sys, torch
from torch import ones, randn, tensor
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.operators import allowed_operators, resolve
from gradwire_workers.programs.checked_operators import checked
torch.set_num_threads(1)
for line in sys.stdin:
    name, arguments, must_refuse = line.rstrip("\\n").split("|")
    if name in allowed_operators():
        try:
            eval(f"(checked(name) or resolve(name))({arguments})")
        except (InvalidArgument, RuntimeError, IndexError):
            continue
        assert must_refuse == "no", name
print("alive")
"""


def test_hostile_calls_are_refused_and_the_process_lives_on():
    lines = [f"aten.{name}|{arguments}|yes" for name, arguments in HOSTILE]
    lines += [f"aten.{name}|{arguments}|no" for name, arguments in HARMLESS]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ONE], input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and done.stdout == "alive\n", (done.returncode, done.stderr[-2000:])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_that_are_right_are_as_in_eager_and_wrong_offsets_of_a_batch_are_refused(round_trip, mode):
    bag = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=2)
    inputs = {"input": torch.tensor([1, 2, 4, 5, 4, 3]), "offsets": torch.tensor([0, 2, 4])}
    trip = round_trip(bag, inputs, loss=lambda outputs, _: outputs.square().mean())
    trip.check({"input": torch.randint(7, (6,)), "offsets": torch.tensor([0, 0, 5])}, training=True)
    for wrong in ([0, -5, 4], [0, 4, 2], [0, 2, 90]):
        with pytest.raises(InvalidArgument) as caught:
            trip.run({**inputs, "offsets": torch.tensor(wrong)})
        assert caught.value.reason == "INDEX_OUT_OF_RANGE"
    with pytest.raises(InvalidArgument):
        trip.run({**inputs, "input": torch.tensor([1, 2, 4, 5, 4, 7])})


def test_division_of_whole_numbers_is_eagers_but_for_the_one_that_has_no_answer(round_trip):
    class Halves(nn.Module):
        def forward(self, x, y):
            return torch.div(x, y, rounding_mode="trunc").double()

    trip = round_trip(Halves(), (torch.tensor([7, -7, 9]), torch.tensor([2, 2, -2])))
    trip.check((torch.tensor([5, -5, 1]), torch.tensor([2, -2, -1])), training=False)
    with pytest.raises(InvalidArgument) as caught:
        trip.run((torch.tensor([-(2**63), 1]), torch.tensor([-1, 1])), training=False)
    assert caught.value.reason == "INTEGER_OVERFLOW"


def test_checked_layer_norm_backward_is_torchs():
    x, gradient, weight = torch.randn(4, 5, 6), torch.randn(4, 5, 6), torch.randn(6)
    _, mean, deviation = torch.native_layer_norm(x, [6], weight, None, 1e-5)
    name = "aten.native_layer_norm_backward.default"
    given = (gradient, x, [6], mean, deviation, weight, None, [True, True, False])
    operator = checked(name)
    assert operator is not None
    for one, other in zip(operator(*given)[:2], resolve(name)(*given)[:2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("operator.mod", ("%50000000d", 5)),
        ("operator.mul", ([0], 10**12)),
        ("operator.add", ([0], [0])),
        ("operator.mul", (2**40, 2**40)),
        ("operator.pow", (9, 9**9)),
        ("operator.pow", (2, 63)),
        ("operator.pow", (10.0, 10**9)),
        ("operator.pow", (-8, 0.5)),
        ("operator.floordiv", (1, 0)),
        ("operator.add", (torch.ones(1), 1)),
        ("operator.getitem", ("text", 0)),
        ("operator.getitem", ([1], 5)),
        ("math.floor", (float("inf"),)),
        ("torch.sym_sum", ([2**62, 2**62],)),
        ("torch.sym_max", ("a", "b")),
    ],
)
def test_arithmetic_on_sizes_is_kept_to_numbers_of_64_bits(name, arguments):
    with pytest.raises(InvalidArgument) as caught:
        bounded(name)(*arguments)
    assert caught.value.reason == "ARITHMETIC_FAILED"


def test_arithmetic_on_sizes_is_pythons():
    for name in (each for each in allowed_operators() if each.startswith("operator.")):
        if name not in ("operator.getitem", "operator.neg"):
            assert bounded(name)(7, 3) == resolve(name)(7, 3)
    assert bounded("operator.pow")(2, -1) == 0.5 and bounded("operator.pow")(-1, 10**6) == 1
    assert bounded("operator.pow")(2.0, 0.5) == 2.0**0.5 and bounded("operator.neg")(4) == -4
    assert bounded("torch.sym_sum")([1, 2, 3]) == 6 and bounded("torch.sym_ite")(True, 1, 2) == 1
    assert bounded("operator.getitem")((1, "x"), 1) == "x"
    with pytest.raises(GradwireError):
        bounded("operator.pow")(2**40, 2)
