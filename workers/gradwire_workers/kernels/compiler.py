"""Compiles one training pass: `python -m gradwire_workers.kernels.compiler FOLDER`, where the order lies.

A process of its own, of low priority, which ends with the one that started it. Leaves the kernels in the folder,
or the reason why there are none.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.codec import decode_model_spec
from gradwire_proto.tensors import torch_dtype
from gradwire_proto.v1 import model_pb2
from gradwire_workers.kernels import inductor
from gradwire_workers.kernels.order import CompileOrder
from gradwire_workers.kernels.pass_trace import PassForm, trace_pass
from gradwire_workers.lifted_limits import limits_lifted
from gradwire_workers.shard import Shard
from gradwire_workers.training.determinism import compute_repeatably
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.trainable import set_trained

_PR_SET_PDEATHSIG = 1
_NICENESS = 10
_REASON_LENGTH = 300


def main(folder: Path) -> None:
    """Carry out the order in the folder, unless it has been."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(_NICENESS)
    with open(folder / inductor.LOCK, "w") as lock:
        # Other ranks of the node may want the same kernels.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / inductor.ARTIFACT).exists():
            return
        (folder / inductor.REFUSED).unlink(missing_ok=True)
        try:
            _compile(CompileOrder.decode((folder / inductor.ORDER).read_bytes()), folder)
        except Exception as error:
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _write(folder / inductor.REFUSED, text[:_REASON_LENGTH].encode())


def _compile(order: CompileOrder, folder: Path) -> None:
    torch.set_num_threads(order.threads)
    compiler = inductor.set_up(folder)
    form, graph, tensors, constants = trace_order(order)
    made = compiler.standalone_compile(
        graph, [*tensors, *constants], dynamic_shapes="from_example_inputs", options=inductor.OPTIONS
    )
    torch.save(constants, folder / inductor.CONSTANTS)
    _write(folder / inductor.FORM, json.dumps(form.encode()).encode())
    unfinished = folder / f"{inductor.ARTIFACT}.new"
    made.save(path=str(unfinished), format="binary")
    # Last, and at once: whoever finds it finds everything.
    os.replace(unfinished, folder / inductor.ARTIFACT)


def trace_order(order: CompileOrder) -> tuple[PassForm, Any, list[Tensor], list[Tensor]]:
    """(what the pass gives, its graph, tensors such as it takes, its constants), with zeros for what a rank has."""
    spec = decode_model_spec(model_pb2.Model.FromString(order.spec))
    compute_repeatably(order.device, strictly=spec.deterministic)
    state = {name: _strided(dtype, shape, stride) for name, dtype, shape, stride in order.tensors}
    # The rank has taken the program already, maybe under other limits.
    with limits_lifted():
        replica = Replica(spec, state, 0, torch.device(order.device), order.limits)
        parameters = replica.program.parameters_by_name()
        trained = {name: parameters[name] for name in order.trained}
        set_trained(parameters, trained)
        shard = Shard(
            variant=order.variant,
            rows=1,
            start=0,
            stop=1,
            inputs=replica.moved([_leaf(each) for each in order.inputs]),
            targets=replica.moved([_leaf(each) for each in order.targets]),
        )
        graph, tensors, constants, form = trace_pass(replica, list(trained.values()), shard, rows=order.rows)
    return form, graph, tensors, constants


def _leaf(described: tuple[Any, ...]) -> Any:
    if len(described) == 1:
        return described[0]
    dtype, shape = described
    return torch.zeros(shape, dtype=torch_dtype(dtype))


def _strided(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros, which take no memory as long as nobody writes to them."""
    numel = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    return torch.zeros(numel, dtype=torch_dtype(dtype)).as_strided(shape, stride)


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
