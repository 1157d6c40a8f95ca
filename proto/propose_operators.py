"""Propose the operator allowlist from PyTorch's own schemas: prints what belongs into gradwire_proto/operators.txt.

    python proto/propose_operators.py > proto/gradwire_proto/operators.txt

Run it when the tested PyTorch version changes, and read the difference before committing it: an operator that appears
is one that any client may run on a rank. A new operator is listed only if no rule below leaves it out.
"""

from __future__ import annotations

import re
import sys

import torch

HEADER = """\
# The operators that a graph may name, one overload a line. Ranks run these and nothing else.
# Made by proto/propose_operators.py, which documents what is left out and why. Read every added line before committing.
"""

# Python's arithmetic on sizes, and what runs a graph of the message. Their functions are in operators.py.
NOT_ATEN = [
    # The message of a failed assertion on sizes is all that it takes.
    "aten._assert_scalar.default",
    "higher_order.cond",
    "higher_order.custom_function",
    "higher_order.wrap_with_autocast",
    "higher_order.wrap_with_set_grad_enabled",
    *(f"math.{name}" for name in ("ceil", "floor", "trunc")),
    *(f"operator.{name}" for name in ("add", "floordiv", "mod", "mul", "neg", "pow", "sub", "truediv")),
    *(f"operator.{name}" for name in ("and_", "or_", "eq", "ge", "gt", "le", "lt", "ne", "getitem")),
    *(f"torch.sym_{name}" for name in ("float", "int", "ite", "max", "min", "not", "sum")),
]

LEFT_OUT = {
    "reads files, or hands out or replaces storage, addresses and memory that was never written": (
        r"from_file|save|set_?|set_data|data|data_ptr|storage_offset|sym_storage_offset|record_stream|is_set_to"
        r"|.*pin_memory|is_pinned|resize.*|.*_resize.*|new_empty.*|empty.*|as_strided.*|.*view_from_.*|_?reshape_alias.*"
        r"|unflatten_dense_tensors|flatten_dense_tensors|unsafe_.*"
    ),
    "makes or reads tensors that are not dense: their constructors trust the indices they are given": (
        r".*sparse.*|.*coo.*|c?col_indices.*|c?row_indices.*|crow_indices.*|ccol_indices.*|indices.*|values.*|.*coalesce.*"
        r"|dense_dim|to_dense.*|hspmm|smm|sspaddmm|.*nested.*|.*padded.*|.*jagged.*|.*mkldnn.*|.*quantize.*|q_.*|qscheme"
        r"|int_repr|choose_qparams.*|fbgemm.*|fused_moving_avg.*"
    ),
    "belongs to one device; the general operator chooses it": (
        r".*cudnn.*|.*miopen.*|.*mps.*|.*cuda.*|.*xla.*|.*vulkan.*|.*overrideable|.*cufft.*|batch_norm_.*|cpu"
    ),
    "steps of autograd and of random state that a graph does not do itself": (
        r"backward|dist_backward|retain_grad|retains_grad|requires_grad_|grad|initial_seed|manual_seed|seed|output_nr|is_leaf"
        r"|set_grad_enabled|get_gradients|is_grad_enabled|warn|infinitely_differentiable.*|.*_jvp"
    ),
    "trusts the indices that it is given (a saved pooling index, a pivot)": (
        r"max_unpool.*|segment_reduce|adaptive_max_pool.*_backward"
        r"|fractional_max_pool.*_backward|embedding_backward|embedding_sparse_backward|to_here|histogramdd"
        r"|.*_backward_reduce|masked_scatter_backward|index_select_backward|gather_backward"
        r"|value_selecting_reduction_backward|cummaxmin_backward|sparse_mask.*|slow_conv.*|thnn_conv2d|conv_depthwise3d"
        r"|.*_interface.*|ctc_loss_backward|lu_unpack|ormqr|orgqr|.*_?lu_solve|linalg_ldl_solve|linalg_householder_product"
        r"|max_pool2d_backward|multilabel_margin_loss_backward|multi_margin_loss_backward|norm_except_dim_backward"
    ),
    "trusts shapes that it is given, and reads or writes beyond a tensor that is smaller": (
        r"native_batch_norm.*|_native_batch_norm_legit"
        r"|_adaptive_avg_pool[23]d_backward|grid_sampler_[23]d_backward|slice_inverse"
    ),
    "trusts dimensions or indices in a way that only its caller in PyTorch keeps in bounds": (r"_fft_(c2c|c2r|r2c)"),
    "a result that is not a tensor or a number": (
        r"equal|is_.*|allclose|result_type|can_cast|promote_types|get_device|device"
    ),
    "TorchScript's own": (
        r"Bool|Complex|Float|Int|.*Implicit|dict|len|sorted|remove|count|tensor|as_tensor|size|stride|dim|element_size"
        r"|hash_tensor|lift|range"
    ),
}

# Operators that trust values of their tensors, but that models need, are listed: ranks check what they are given first
# (gradwire_workers/programs/checked_operators.py, checked_backwards.py).

# Operators with a leading underscore are PyTorch's inner ones, left out but for these, which exports contain.
KEPT_PRIVATE = re.compile(
    r"_adaptive_avg_pool[23]d|_assert_async|_cast_(Double|Float|Half|Int|Long)|_cdist_(forward|backward)|_conj(_physical)?"
    r"|_convolution(_mode)?|_dim_arange|_embedding_bag|_functional_assert_scalar|_fused_rms_norm"
    r"|_linalg_(det|eigh|slogdet|solve_ex|svd)|_local_scalar_dense|_(log_)?softmax(_backward_data)?|_logcumsumexp"
    r"|_neg_view|_pad_(circular|enum)|_prelu_kernel(_backward)?|_safe_softmax|_shape_as_tensor|_stack"
    r"|_scaled_dot_product_attention_math|_standard_gamma|_sample_dirichlet|_to_copy|_trilinear|_unique2|_weight_norm"
    r"|_upsample_(bicubic|bilinear)2d_aa|_upsample_nearest_exact[123]d|__i?(and|or|xor|lshift|rshift)__"
)

# What an argument may be: the graph message can express nothing else. A generator can only be left out.
EXPRESSIBLE = re.compile(
    r"(Optional\[)*(List\[)?(Optional\[)?"
    r"(Tensor|int|SymInt|bool|float|number|complex|str|ScalarType|Layout|Device|MemoryFormat|Generator)\]*"
)
SECTION = re.compile("|".join(LEFT_OUT.values()))


def proposed() -> list[str]:
    """The names to list, sorted."""
    names = set(NOT_ATEN)
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace == "aten" and _is_safe(name) and _is_expressible(schema):
            overload = schema.overload_name or "default"
            if _exists(name, overload) and _writes_only_in_place(name, overload):
                names.add(f"aten.{name}.{overload}")
    return sorted(names)


def _is_safe(name: str) -> bool:
    if name.startswith("_"):
        return KEPT_PRIVATE.fullmatch(name) is not None
    return not SECTION.fullmatch(name)


def _is_expressible(schema: torch._C.FunctionSchema) -> bool:
    overload = schema.overload_name
    # Named dimensions print as str; a generator that must be given cannot be.
    if re.search(r"dimname|names|generator|deprecated", overload, re.IGNORECASE):
        return False
    types = [str(argument.type) for argument in schema.arguments]
    # Conversions of one tensor into a number are spelled item; the rest without tensors is TorchScript's.
    touches_tensors = any("Tensor" in str(item.type) for item in (*schema.arguments, *schema.returns))
    return touches_tensors and all(EXPRESSIBLE.fullmatch(each) for each in types)


def _exists(name: str, overload: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and overload in packet.overloads()


def _writes_only_in_place(name: str, overload: str) -> bool:
    """Whether outputs that the caller gives (out=) are written element by element: others resize them first."""
    operator = getattr(getattr(torch.ops.aten, name), overload)
    if not any(argument.is_out for argument in operator._schema.arguments):
        return True
    functional = overload.removesuffix("out").rstrip("_") or "default"
    tags = getattr(getattr(torch.ops.aten, name), functional, operator).tags
    return torch.Tag.pointwise in tags or torch.Tag.pointwise in operator.tags


if __name__ == "__main__":
    sys.stdout.write(HEADER + "\n".join(proposed()) + "\n")
