"""The allowlist holds what exports need, resolves in the installed PyTorch, and leaves out what could do harm."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from gradwire_proto.operators import RUN_GRAPHS, allowed_operators, has_schema, name_of, resolve, schema_of

HARMFUL = re.compile(
    r"aten\.(from_file|set_|set_data|resize.*|_resize.*|.*resize_as.*|empty.*|new_empty.*|as_strided.*|record_stream|.*pin_memory"
    r"|.*cudnn.*|.*miopen.*|.*mkldnn.*|.*_unsafe.*|unsafe_.*|.*sparse.*|.*nested.*|.*quantize.*|data|data_ptr|.*storage.*|save"
    r"|.*native_batch_norm.*|.*adaptive_avg_pool.*_backward|grid_sampler.*_backward|_fft_.*"
    r"|max_unpool.*|_ctc_loss.*|.*lu_solve|segment_reduce|dist_backward|requires_grad_|retain_grad|backward)\..*"
)

NEEDED = [
    "aten.add_.Tensor",
    "aten.copy_.default",
    "aten.clamp_min_.default",
    "aten.div.out",
    "aten.mul_.Tensor",
    "aten.lerp_.Scalar",
    "aten.fill_.Scalar",
    "aten.lift_fresh_copy.default",
    "aten.detach.default",
    "aten.detach_.default",
    "aten.convolution_backward.default",
    "aten.tanh_backward.default",
    "aten.sigmoid_backward.default",
    "aten.threshold_backward.default",
    "aten.native_layer_norm_backward.default",
    "aten._softmax_backward_data.default",
    "aten._log_softmax_backward_data.default",
    "aten.item.default",
    "aten._assert_scalar.default",
    "aten.sym_size.int",
    "operator.getitem",
    "operator.add",
    "operator.mul",
    "operator.floordiv",
    "torch.sym_max",
    "torch.sym_float",
    "higher_order.wrap_with_set_grad_enabled",
    "higher_order.wrap_with_autocast",
    "aten.lstm.input",
    "aten.scaled_dot_product_attention.default",
    "aten.batch_norm.default",
    "aten.index.Tensor",
    "aten.index_put_.default",
    "aten.where.self",
]


def test_every_listed_name_resolves_in_the_installed_pytorch():
    for name in allowed_operators() - RUN_GRAPHS:
        assert callable(resolve(name))
        if has_schema(name):
            assert name_of(resolve(name)) == name
            assert schema_of(name).startswith("aten::")


def test_operators_that_touch_files_storage_or_unwritten_memory_are_absent():
    assert [name for name in allowed_operators() if HARMFUL.fullmatch(name)] == []


@pytest.mark.parametrize(
    "name", ["aten.from_file.default", "os.system", "torch.os.system", "aten.__class__.default", ""]
)
def test_a_name_that_is_not_listed_does_not_resolve(name):
    with pytest.raises(KeyError):
        resolve(name)


def test_what_buffer_updates_custom_functions_and_sizes_need_is_listed():
    assert [name for name in NEEDED if name not in allowed_operators()] == []


def test_no_listed_operator_takes_a_generator_storage_or_stream_that_must_be_given():
    for name in allowed_operators():
        if has_schema(name):
            for argument in resolve(name)._schema.arguments:
                assert str(argument.type) not in ("Generator", "Storage", "Stream", "Any")


def test_the_file_is_what_the_proposal_makes_of_this_pytorch(repository):
    if not torch.__version__.startswith("2.13."):
        pytest.skip("operators.txt was proposed from PyTorch 2.13; newer ones know more operators")
    proposed = subprocess.run(
        [sys.executable, "propose_operators.py"], cwd=repository / "proto", capture_output=True, text=True, check=True
    )
    assert proposed.stdout == (repository / "proto/gradwire_proto/operators.txt").read_text()


def test_reading_the_list_does_not_import_torch():
    code = (
        "import sys, gradwire_proto.graph_check as g; from gradwire_proto.operators import allowed_operators as a; a()"
    )
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)
