"""Models, commands and their results that hypothesis makes up, and PAIRS: what every encoder takes."""

from __future__ import annotations

from hypothesis import strategies as st
from proto.made_up_programs import (
    ARGUMENTS,
    CONSTANTS,
    COUNTS,
    FLOATS,
    GRAPH_INPUTS,
    INT64,
    LEAVES,
    NAMED_TENSORS,
    NAMES,
    NODES,
    OPTIONS,
    SYMBOLS,
    TEXTS,
    VALUES,
    graphs,
    nested,
    programs,
    state_tensors,
    structures,
    tensors,
    variants,
    without_graphs,
)

from gradwire_proto import names, values

LOSSES = st.one_of(
    st.builds(values.TorchLossSpec, NAMES, OPTIONS),
    st.builds(values.GraphLossSpec),
    st.builds(values.OutputLossSpec, COUNTS),
)
SCHEDULES = st.recursive(
    st.builds(values.ScheduleSpec, NAMES, OPTIONS),
    lambda parts: st.builds(values.ScheduleSpec, NAMES, OPTIONS, st.lists(parts, max_size=2).map(tuple)),
    max_leaves=4,
)
OPTIMIZERS = st.builds(
    values.OptimizerSpec,
    NAMES,
    OPTIONS,
    st.lists(st.builds(values.ParameterGroupSpec, NAMES, OPTIONS), max_size=2).map(tuple),
    st.none() | SCHEDULES,
)
CLIPS = st.none() | st.floats(1e-300, 1e300)
LABELS = st.dictionaries(NAMES, TEXTS, max_size=1)  # One: a protobuf map has no order of its own.
ROWS = st.lists(COUNTS, max_size=3).map(tuple)
TIMINGS = st.builds(values.Timing, **dict.fromkeys(values.Timing.__dataclass_fields__, FLOATS))
LIMITS = st.builds(
    values.Limits,
    **{name: FLOATS if name.endswith("_seconds") else COUNTS for name in values.Limits.__dataclass_fields__},
)
PRECISIONS = st.sampled_from(["fp32", "bf16", "fp16"])
MODEL_UPDATES = st.builds(
    values.ModelUpdate,
    trainable=st.lists(st.tuples(NAMES, st.booleans()), max_size=3).map(tuple),
    optimizer=st.none() | OPTIMIZERS,
    lr=st.none() | st.floats(0, 10),
    labels=st.none() | LABELS,
).filter(lambda update: update != values.ModelUpdate())
ARCHITECTURES = st.builds(
    values.ArchitectureSpec,
    name=NAMES,
    config=st.dictionaries(NAMES, nested(CONSTANTS), max_size=3),
    weights=st.none() | st.sampled_from(["gpt2", "team/gpt2-1.0_b"]),
)
KEEPING = {
    "durability": st.sampled_from(["", "process", "disk"]),
    "checkpoint_every": st.integers(0, 2**31 - 1),
    "keep_checkpoints": st.integers(0, 2**31 - 1),
    "deterministic": st.booleans(),
    "sync_batch_norm": st.booleans(),
    "compile": st.booleans(),
}
SHAPES = st.lists(st.none() | st.lists(COUNTS, max_size=3).map(tuple), max_size=3).map(tuple)
BATCH_SHAPES = st.builds(values.BatchShapes, NAMES, SHAPES, SHAPES)
COMPILED = st.builds(values.CompiledKernels, BATCH_SHAPES, st.sampled_from(["compiling", "in_use", "refused"]), TEXTS)
REDUCTIONS = st.sampled_from([None, "mean", "sum"])
MODEL_SPECS = st.builds(
    values.ModelSpec,
    program=programs() | ARCHITECTURES,
    loss=st.none() | LOSSES,
    optimizer=st.none() | OPTIMIZERS,
    workers=st.integers(1, 2**31 - 1),
    device=st.sampled_from(["auto", "cuda"]),
    gpus_per_worker=st.floats(0.25, 8),
    seed=INT64,
    on_nan=st.sampled_from(["report", "refuse"]),
    require_sharding=st.booleans(),
    labels=LABELS,
    clip_grad_norm=CLIPS,
    clip_grad_value=CLIPS,
    precision=PRECISIONS,
    loss_reduction=REDUCTIONS,
    **KEEPING,
)
MODEL_INFOS = st.builds(
    values.ModelInfo,
    id=NAMES,
    state=st.sampled_from(["creating", "ready", "recovering", "failed", "deleting", "waiting"]),
    waits_for=st.text(max_size=20),
    step=COUNTS,
    workers=st.integers(0, 1000),
    sharding=st.none() | st.builds(values.Sharding, st.sampled_from(["rows", "whole"]), TEXTS),
    num_parameters=COUNTS,
    optimizer=st.none() | OPTIMIZERS,
    loss=st.none() | LOSSES,
    labels=LABELS,
    created_at=st.floats(1e9, 4e9),
    last_error=st.none() | TEXTS,
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    seed=INT64,
    on_nan=st.sampled_from(["report", "refuse"]),
    tensors=st.lists(state_tensors(), max_size=2).map(tuple),
    variants=st.lists(variants().map(without_graphs), max_size=2).map(tuple),
    rank_rows=ROWS,
    clip_grad_norm=CLIPS,
    clip_grad_value=CLIPS,
    precision=PRECISIONS,
    architecture=st.none() | NAMES,
    loss_reduction=REDUCTIONS,
    compiled=st.lists(COMPILED, max_size=2).map(tuple),
    **KEEPING,
)
MODEL_IDS = st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True)
CHECKPOINT_IDS = st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True)
CHECKPOINTS = st.builds(
    values.Checkpoint,
    name=CHECKPOINT_IDS | st.builds(names.automatic_checkpoint, MODEL_IDS, st.integers(0, 10**18 - 1)),
    model_id=MODEL_IDS,
    step=COUNTS,
    command=COUNTS,
    created_at=st.floats(1e9, 4e9),
    nbytes=COUNTS,
    automatic=st.booleans(),
)
STEP_RESULTS = st.builds(
    values.StepResult,
    loss=st.none() | FLOATS,
    step=COUNTS,
    num_examples=COUNTS,
    grad_norm=st.none() | FLOATS,
    lr=st.none() | FLOATS,
    timing=TIMINGS,
    rank_rows=ROWS,
    skipped=st.booleans(),
    loss_scale=st.none() | FLOATS,
)
GRADIENT_RESULTS = st.builds(
    values.GradientResult,
    loss=FLOATS,
    step=COUNTS,
    num_examples=COUNTS,
    gradients=NAMED_TENSORS,
    input_gradients=VALUES,
    outputs=VALUES,
    timing=TIMINGS,
    rank_rows=ROWS,
)
RETAINED = st.text("0123456789abcdef", min_size=32, max_size=32)
WRT = st.none() | st.lists(TEXTS.filter(bool), max_size=3).map(tuple)
FUNCTIONS = st.builds(
    values.FunctionSpec,
    digest=st.just("0123456789abcdef" * 4),
    program=programs("constant", most=1),
    tensors=NAMED_TENSORS,
    output_leaf=COUNTS,
) | st.builds(values.FunctionSpec, digest=st.just("f" * 64), program=st.none(), tensors=st.just({}), output_leaf=COUNTS)
SERVER_INFOS = st.builds(
    values.ServerInfo,
    version=TEXTS,
    torch_version=TEXTS,
    workers=st.integers(0, 1000),
    free_workers=st.integers(0, 1000),
    gpus=FLOATS,
    limits=LIMITS,
)
PAIRS = {
    "checkpoint": CHECKPOINTS,
    "tensor": tensors(),
    "value": VALUES,
    "batch": st.builds(values.Batch, VALUES, VALUES),
    "options": OPTIONS,
    "argument": ARGUMENTS,
    "node": NODES,
    "graph": graphs(2),
    "structure": structures().map(lambda drawn: drawn[0]),
    "leaf": LEAVES,
    "symbol": SYMBOLS,
    "graph_input": GRAPH_INPUTS,
    "state_tensor": state_tensors(),
    "variant": variants(),
    "program": programs(),
    "loss": LOSSES,
    "optimizer": OPTIMIZERS,
    "model_spec": MODEL_SPECS,
    "batch_shapes": BATCH_SHAPES,
    "compiled": COMPILED,
    "timing": TIMINGS,
    "step_result": STEP_RESULTS,
    "gradient_result": GRADIENT_RESULTS,
    "forward_result": st.builds(
        values.ForwardResult,
        outputs=VALUES,
        step=COUNTS,
        timing=TIMINGS,
        rank_rows=ROWS,
        retained=st.none() | RETAINED,
        differentiable_outputs=ROWS,
    ),
    "backward_result": st.builds(
        values.BackwardResult,
        input_gradients=st.none() | st.lists(st.none() | tensors(), max_size=3),
        step=COUNTS,
        timing=TIMINGS,
        rank_rows=ROWS,
    ),
    "retention": st.builds(
        values.Retention,
        wrt=WRT,
        inputs=st.lists(COUNTS, max_size=3, unique=True).map(tuple),
        release=st.lists(RETAINED, max_size=3).map(tuple),
    ),
    "derivative_result": st.builds(
        values.DerivativeResult,
        outputs=VALUES,
        derivatives=st.lists(tensors(), max_size=3).map(tuple),
        timing=TIMINGS,
    ),
    "function": FUNCTIONS,
    "command_info": st.builds(
        values.CommandInfo,
        name=TEXTS,
        state=st.sampled_from(["running", "applied", "not_applied"]),
        error=st.none() | TEXTS,
    ),
    "limits": LIMITS,
    "server_info": SERVER_INFOS,
}
