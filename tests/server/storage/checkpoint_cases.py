"""A model with everything that a checkpoint has to hold, and how two of them are compared."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradwire.exporting.module_state import describe_state
from gradwire_proto.tensors import from_torch, to_torch
from gradwire_proto.values import (
    BatchShapes,
    GraphInput,
    LeafRef,
    ModelState,
    SplitDecision,
    StateTensor,
    TensorData,
    TensorSpec,
    Variant,
)
from gradwire_server.storage.saved_model import SavedModel, StoredReply
from gradwire_workers.segments import SegmentWriter

OWNER = "0123456789abcdef"
"""The id of the storage whose automatic checkpoints are written."""

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
"""What the contract has and safetensors too."""


class Net(nn.Module):
    """Tied weights, a buffer of every type, buffers that no state_dict has, and sizes that are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        for dtype in DTYPES:
            self.register_buffer(f"a_{dtype}", torch.arange(3).to(getattr(torch, dtype)))
        self.register_buffer("scratch", torch.randn(3, 3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids).mean(1)) * self.scale)


def net(seed: int = 0) -> Net:
    """One that differs from every other seed's in all its values."""
    torch.manual_seed(seed)
    made = Net()
    with torch.no_grad():
        made.train()
        made(torch.randint(7, (4, 3)))  # batch norm's own buffers move
    return made


def saved_model(folder: Path, module: nn.Module | None = None, **changes: Any) -> SavedModel:
    """A checkpoint's content, with its large tensors in segments in `folder`, as the ranks give them."""
    module = module or net()
    described = describe_state(module)
    constant = StateTensor(name="_constant0", role="constant", dtype="complex128", shape=(2,))
    values = {name: value.clone() for name, value in described.values.items()}
    values["_constant0"] = torch.tensor([1 + 2j, complex(math.nan, -math.inf)], dtype=torch.complex128)
    state = {
        "optimizer": "Adam",
        "state": {"embed.weight": {"step": torch.tensor(3.0), "exp_avg": torch.randn(7, 5)}, "scale": {}},
        "param_groups": [{"params": ["embed.weight"], "lr": 1e-3, "betas": (0.9, 0.999), "foreach": None}],
        "schedule": {"name": "StepLR", "state": {"last_epoch": 3, "best": math.inf, "worst": -0.0, "no": math.nan}},
        "scaler": {"scale": 65536.0, "growing": True},
    }
    writer = SegmentWriter(folder, f"rank-{secrets.token_hex(4)}")
    moments = writer.write([from_torch(state["state"]["embed.weight"]["exp_avg"])])[0]
    state["state"]["embed.weight"] = {"step": from_torch(torch.tensor(3.0)), "exp_avg": moments}
    held = {"embed.weight": from_torch(torch.randn(7, 5)), "scale": from_torch(torch.randn(()))}
    model_state = ModelState(
        tensors=dict(zip(values, writer.write(map(from_torch, values.values())), strict=True)),
        optimizer=state,
        step=3,
        command=5,
        trained=("embed.weight", "scale"),
        held=(held, None),
        splits={
            "train": SplitDecision(
                whole=None, inputs_whole=False, returns_loss=True, loss="mean", weight="rows", written=("scratch",)
            ),
            "eval": SplitDecision(whole="it says so", inputs_whole=True, returns_loss=False, loss=None, weight=None),
            "none": SplitDecision(
                whole=None, inputs_whole=False, returns_loss=False, loss=None, weight=None, written=()
            ),
        },
        opened=(opened(),),
        threads=1,
        kernels=(BatchShapes("train", ((7, 5), None), ((),)),),
    )
    saved = SavedModel(
        name="best",
        model_id="digits",
        automatic=False,
        created_at=1_700_000_000.25,
        request_id="00000000-0000-4000-8000-000000000001",
        spec=b"\x0a\x00 spec",
        layout=(*described.tensors, constant),
        workers=2,
        state=model_state,
        replies=(
            StoredReply(number=4, request_id="a", body=b"\x00\xff", method="TrainStep", reply=b"\x00reply"),
            StoredReply(number=5, request_id="b", body=b"", method="Forward", reply=None, refused="it kills ranks"),
        ),
    )
    state_changes = {name: changes.pop(name) for name in ("step", "command") if name in changes}
    return replace(saved, state=replace(model_state, **state_changes), **changes)


def automatic(folder: Path, number: int, model_id: str = "digits", **changes: Any) -> SavedModel:
    """One that nobody asked for."""
    named = {"name": f"{model_id}/{number}", "model_id": model_id, "automatic": True, "request_id": None}
    return saved_model(folder, command=number, **named, **changes)


def opened() -> Variant:
    """A variant of an architecture, as the service describes it."""
    return Variant(
        name="train",
        training=True,
        graph=None,
        graph_inputs=(GraphInput("input", 0),),
        input_structure=LeafRef(0),
        input_leaves=(TensorSpec("int64", ("rows", 3)),),
        output_structure=(LeafRef(0), None),
    )


def plain(value: Any) -> Any:
    """A value that compares by type and by bits: tensors as (dtype, shape, bytes), floats by their bits."""
    if isinstance(value, TensorData):
        return value.dtype, value.shape, to_torch(value).reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, float):
        return "float", value.hex() if not math.isnan(value) else "nan"
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return type(value).__name__, value


def content(saved: SavedModel) -> dict[str, Any]:
    """Everything that two equal ones have in common."""
    names = ("name", "model_id", "automatic", "created_at", "request_id", "spec", "layout", "workers", "replies")
    state = saved.state
    return {
        **{name: getattr(saved, name) for name in names},
        **{name: getattr(state, name) for name in ("step", "command", "trained", "splits", "opened", "threads")},
        "tensors": plain(state.tensors),
        "optimizer": plain(state.optimizer),
        "held": plain(state.held),
    }
