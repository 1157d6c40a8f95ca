"""Backward operators in functions with their own backward: torch's numbers where operands fit, errors where not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradwire_workers.programs.checked_backwards import BACKWARD_CHECKS
from gradwire_workers.programs.checked_operators import checked


def embedded(x, weight):
    return F.embedding(x[:, 0].detach().abs().long() % 3, weight, padding_idx=1)


def nll(x, weight):
    return F.nll_loss(x, x.detach().argmin(1), weight[:, 0].detach().abs(), ignore_index=2)


def nll2d(x, weight):
    return F.nll_loss(x, x.detach().argmin(1), reduction="none")


# By the operator of its backward: a function of x and of a weight [6, 5], and the shape of a row of x.
FORWARDS = {
    "max_pool2d_with_indices_backward": (lambda x, w: F.max_pool2d(x, 3, 2, 1), (2, 7, 6)),
    "max_pool3d_with_indices_backward": (lambda x, w: F.max_pool3d(x, 2, 1, ceil_mode=True), (2, 3, 4, 5)),
    "avg_pool2d_backward": (lambda x, w: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (2, 7, 6)),
    "avg_pool3d_backward": (lambda x, w: F.avg_pool3d(x, 2, count_include_pad=False), (2, 4, 4, 5)),
    "nll_loss_backward": (nll, (6,)),
    "nll_loss2d_backward": (nll2d, (4, 3, 5)),
    "reflection_pad1d_backward": (lambda x, w: F.pad(x, (1, 2), mode="reflect"), (2, 5)),
    "reflection_pad2d_backward": (lambda x, w: F.pad(x, (1, 2, 3, 0), mode="reflect"), (2, 5, 4)),
    "reflection_pad3d_backward": (lambda x, w: F.pad(x, (1, 2, 0, 1, 1, 1), mode="reflect"), (2, 3, 4, 5)),
    "replication_pad1d_backward": (lambda x, w: F.pad(x, (1, 2), mode="replicate"), (2, 5)),
    "replication_pad2d_backward": (lambda x, w: F.pad(x, (1, 2, 3, 0), mode="replicate"), (2, 5, 4)),
    "replication_pad3d_backward": (lambda x, w: F.pad(x, (1, 2, 0, 1, 1, 1), mode="replicate"), (2, 3, 4, 5)),
    "_prelu_kernel_backward": (lambda x, w: F.prelu(x, w[:, 0]), (6, 3)),
    "_cdist_backward": (lambda x, w: torch.cdist(x, w, p=1.5), (4, 5)),
    "unfold_backward": (lambda x, w: x.unfold(2, 3, 2), (2, 7)),
    "embedding_dense_backward": (embedded, (6,)),
    "_log_softmax_backward_data": (lambda x, w: x.log_softmax(1), (6,)),
    "native_layer_norm_backward": (lambda x, w: F.layer_norm(x, (5,), w[0], w[1]), (3, 5)),
}


def test_every_check_has_a_function_here():
    assert FORWARDS.keys() == BACKWARD_CHECKS.keys()


class Doubled(nn.Module):
    """A function whose gradients are twice those of its forward, by a function of its own."""

    def __init__(self, forward, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
        self.scale = nn.Parameter(torch.rand(width, dtype=torch.float64) + 0.5)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight):
                ctx.save_for_backward(x, weight)
                return forward(x, weight)

            @staticmethod
            def backward(ctx, *gradients):
                with torch.enable_grad():
                    x, weight = (each.detach().requires_grad_() for each in ctx.saved_tensors)
                    found = torch.autograd.grad(forward(x, weight), (x, weight), gradients, allow_unused=True)
                return tuple(None if each is None else 2 * each for each in found)

        self._function = Function

    def forward(self, x):
        return self._function.apply(x * self.scale, self.weight)


@pytest.mark.parametrize("operator", FORWARDS)
def test_gradients_by_checked_operators_are_torchs(round_trip, operator):
    torch.manual_seed(len(operator))
    forward, shape = FORWARDS[operator]
    net = Doubled(forward, shape[-1])
    trip = round_trip(net, torch.randn(3, *shape, dtype=torch.float64), loss=lambda output, _: output.square().sum())
    graph = trip.exported.program.variants[0].graph
    (function,) = graph.functions.values()
    assert operator in {node.operator.split(".")[1] for node in function.backward.nodes}
    trip.check(torch.randn(5, *shape, dtype=torch.float64), tolerance=1e-11)


def test_frequencies_of_an_embedding_are_torchs():
    operator = checked("aten.embedding_dense_backward.default")
    gradient, indices = torch.randn(4, 3, 5), torch.randint(0, 6, (4, 3))
    assert operator is not None
    found = operator(gradient, indices, 6, 2, True)
    weight = torch.randn(6, 5, requires_grad=True)
    looked_up = F.embedding(indices, weight, padding_idx=2, scale_grad_by_freq=True)
    assert torch.equal(found, torch.autograd.grad(looked_up, weight, gradient)[0])


# One call each in which only one operand is wrong.
HOSTILE = [
    ("avg_pool2d_backward", "ones(5000, 3, 2, 2), ones(2, 3, 4, 4), [2, 2], [2, 2], [0, 0], False, True, None"),
    ("avg_pool2d_backward", "ones(2, 3, 2, 2), ones(0, 3, 4, 4), [2, 2], [2, 2], [0, 0], False, True, None"),
    ("avg_pool3d_backward", "ones(0, 3, 2, 2, 2), ones(2, 3, 4, 4, 4), [2] * 3, [2] * 3, [0] * 3, False, True, None"),
    *(
        ("max_pool2d_with_indices_backward", f"ones(2, 3, 2, 2), {x}, [2, 2], [2, 2], [0, 0], [1, 1], False, {i}")
        for x, i in (
            ("ones(2, 3, 4, 4)", "full((2, 3, 2, 2), 10**12)"),
            ("ones(2, 3, 4, 4)", "full((2, 3, 2, 2), -1)"),
            ("ones(2, 3, 4, 4)", "full((2, 3, 2, 2), 16)"),
            ("ones(2, 3, 4, 4)", "zeros(1, dtype=int64)"),
            ("ones(1, 1, 4, 4)", "zeros(2, 3, 2, 2, dtype=int64)"),
            ("ones(2, 3, 4, 4)", "zeros(2, 3, 2, 2, dtype=int32)"),
        )
    ),
    *(
        (
            "max_pool3d_with_indices_backward",
            f"{g}, ones(1, 2, 4, 4, 4), [2] * 3, [2] * 3, [0] * 3, [1] * 3, False, {i}",
        )
        for g, i in (
            ("ones(1, 2, 2, 2, 2)", "full((1, 2, 2, 2, 2), 10**12)"),
            ("ones(1, 2, 2, 2, 2)", "full((1, 2, 2, 2, 2), 64)"),
            ("ones(90, 200, 2, 2, 2)", "zeros(90, 200, 2, 2, 2, dtype=int64)"),
        )
    ),
    *(
        ("nll_loss_backward", arguments)
        for arguments in (
            "ones(5), ones(5, 3), full((5,), 10**12), None, 0, -100, ones(())",
            "ones(5), ones(5, 3), full((5,), -1), None, 0, -100, ones(())",
            "ones(9000), ones(5, 3), zeros(5, dtype=int64), None, 0, -100, ones(())",
            "ones(()), ones(5, 3), zeros(9000, dtype=int64), None, 1, -100, ones(())",
            "ones(()), ones(5, 3), zeros(5, dtype=int64), ones(1), 1, -100, ones(())",
            "ones(()), ones(5, 3), zeros(5, dtype=int64), None, 1, -100, ones(0)",
        )
    ),
    *(
        ("nll_loss2d_backward", arguments)
        for arguments in (
            "ones(2, 4, 4), ones(2, 3, 4, 4), full((2, 4, 4), 10**12), None, 0, -100, ones(())",
            "ones(2, 4, 4), ones(2, 3, 4, 4), zeros(2, 900, 900, dtype=int64), None, 0, -100, ones(())",
            "ones(2, 4, 4), ones(2, 3, 4, 4), zeros(2, 4, 4, dtype=int64), ones(1), 0, -100, ones(())",
        )
    ),
    ("reflection_pad3d_backward", "ones(9, 9, 6, 6, 6), ones(2, 3, 4, 4, 4), [1] * 6"),
    ("replication_pad3d_backward", "ones(9, 9, 6, 6, 6), ones(2, 3, 4, 4, 4), [1] * 6"),
    ("_prelu_kernel_backward", "ones(900, 4), ones(3, 4), ones(3, 4)"),
    ("_cdist_backward", "ones(3, 5), ones(300, 4), ones(5, 4), 2., ones(3, 5)"),
    ("_cdist_backward", "ones(3, 5), ones(3, 4), ones(5, 400), 2., ones(3, 5)"),
    ("_cdist_backward", "ones(3, 5), ones(3, 4), ones(5, 4), 2., ones(1, 1)"),
    ("unfold_backward", "ones(300, 200, 2), [3, 4], 1, 2, 2"),
    ("unfold_backward", "ones(3, 2, 2), [3, 1], 1, 2, 2"),
    ("unfold_backward", "ones(3, 2, 2), [3, 4], 7, 2, 2"),
    ("embedding_dense_backward", "ones(4, 3), tensor([9, 0, 0, 0]), 5, -1, True"),
    ("embedding_dense_backward", "ones(4, 3), zeros(9000, dtype=int64), 5, -1, False"),
]

RUN = """
import sys, torch
from torch import full, int32, int64, ones, tensor, zeros
from gradwire_proto.errors import InvalidArgument
from gradwire_workers.programs.checked_operators import checked
torch.set_num_threads(1)
for line in sys.stdin:
    name, arguments = line.rstrip("\\n").split("|")
    try:
        eval(f"checked('aten.{name}.default')({arguments})")
    except InvalidArgument:
        continue
    print(line)
print("alive")
"""


def test_each_wrong_operand_is_refused_and_the_process_lives_on():
    lines = "".join(f"{name}|{arguments}\n" for name, arguments in HOSTILE)
    done = subprocess.run([sys.executable, "-c", RUN], input=lines, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout == "alive\n", (done.stdout, done.stderr[-2000:])
