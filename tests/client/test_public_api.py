"""What users may rely on: the names, and that importing them costs nothing."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys

import pytest

import gradwire

NAMES = {
    "Architecture",
    "TLS",
    "Checkpoint",
    "Client",
    "CompiledKernels",
    "Dataset",
    "FitResult",
    "FitStatus",
    "Future",
    "GradientResult",
    "Limits",
    "Model",
    "ModelInfo",
    "ServerInfo",
    "Sharding",
    "StepResult",
    "Timing",
    "__version__",
    "connect",
    "errors",
    "launch",
    "optim",
}

PARAMETERS = {
    "connect": "target *token *tls *timeout *shared_memory",
    "launch": "workers storage *timeout *start_timeout *shared_memory **server_options",
    "Client.create_model": "module *example *loss *optimizer *workers *model_id *seed *device *gpus_per_worker"
    " *require_sharding *on_nan *labels *clip_grad_norm *clip_grad_value"
    " *precision *loss_reduction *loss_weight *durability *checkpoint_every *keep_checkpoints *deterministic"
    " *sync_batch_norm *compile *wait_for_capacity",
    "Client.get_model": "model_id",
    "Client.list_models": "",
    "Client.restore_model": "checkpoint *model_id *workers *wait_for_capacity",
    "Client.list_checkpoints": "",
    "Client.get_checkpoint": "name",
    "Client.delete_checkpoint": "name",
    "Client.upload_dataset": "inputs targets *dataset_id",
    "Client.get_dataset": "dataset_id",
    "Client.list_datasets": "",
    "Client.grad": "fn argnums has_aux",
    "Client.value_and_grad": "fn argnums has_aux",
    "Client.server_info": "",
    "Client.close": "",
    "Model.train_step": "inputs targets *lr",
    "Model.fit": "data *epochs *batch_size *shuffle *seed *validation *callbacks *progress",
    "Model.forward_backward": "inputs targets",
    "Model.optimizer_step": "gradients *lr",
    "Model.zero_grad": "",
    "Model.compute_gradients": "inputs targets *wrt *input_gradients *outputs *dtype *top_k *training *seed",
    "Model.forward": "inputs training",
    "Model.__call__": "inputs",
    "Model.state_dict": "",
    "Model.load_state_dict": "state_dict *partial",
    "Model.update": "*lr *optimizer *trainable *labels",
    "Model.held_gradients": "wrt",
    "Model.as_module": "",
    "Model.as_optimizer": "",
    "Model.save": "name",
    "Model.info": "",
    "Model.delete": "",
    "Model.optimizer_state_dict": "",
    "Model.load_optimizer_state_dict": "state_dict",
    "optim.SGD": "*groups *schedule *lr *momentum *dampening *weight_decay *nesterov *maximize *foreach"
    " *differentiable *fused",
    "optim.ParamGroup": "pattern **options",
}

FIELDS = {
    "StepResult": {"loss", "step", "num_examples", "grad_norm", "lr", "timing", "rank_rows", "skipped", "loss_scale"},
    "Timing": {"queue", "transfer", "compute", "all_reduce", "optimizer", "recovery", "total"},
    "Sharding": {"mode", "reason"},
    "CompiledKernels": {"batches", "state", "reason"},
    "Checkpoint": {"name", "model_id", "step", "command", "created_at", "nbytes", "automatic"},
}


def find(path: str):
    found = gradwire
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_public_names_are_these():
    assert set(gradwire.__all__) == NAMES
    for name in NAMES:
        assert getattr(gradwire, name) is not None
    assert set(dir(gradwire)) >= NAMES
    with pytest.raises(AttributeError, match="no_such_name"):
        gradwire.no_such_name  # noqa: B018


@pytest.mark.parametrize("path", PARAMETERS)
def test_signature_is_this(path):
    marks = {inspect.Parameter.KEYWORD_ONLY: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(find(path)).parameters.values()
    written = [marks.get(parameter.kind, "") + parameter.name for parameter in parameters if parameter.name != "self"]
    assert " ".join(written) == PARAMETERS[path]


@pytest.mark.parametrize("name", FIELDS)
def test_result_has_these_fields(name):
    assert set(find(name).__dataclass_fields__) == FIELDS[name]


def test_futures_offer_every_call_of_the_model_with_the_same_arguments():
    calls = [path.removeprefix("Model.") for path in PARAMETERS if path.startswith("Model.") and "__" not in path]
    calls = [call for call in calls if not call.startswith("as_")]  # these make no call
    from gradwire.model_futures import ModelFutures

    for call in calls:
        blocking, future = inspect.signature(find(f"Model.{call}")), inspect.signature(getattr(ModelFutures, call))
        assert blocking.parameters == future.parameters, call
        assert str(future.return_annotation) == f"Future[{blocking.return_annotation}]"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_everything_public_has_a_docstring(name):
    found = getattr(gradwire, name)
    if isinstance(found, str):
        return
    assert inspect.getdoc(found)
    for member, value in vars(found).items() if inspect.isclass(found) else ():
        if not member.startswith("_") and inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{member}"


def test_every_error_is_reachable_and_one_family():
    for name in gradwire.errors.__all__:
        error = getattr(gradwire.errors, name)
        assert issubclass(error, gradwire.errors.GradwireError | KeyboardInterrupt)


def test_importing_gradwire_brings_neither_torch_nor_grpc_nor_threads():
    code = (
        "import sys, threading, gradwire;"
        "print([m for m in ('torch', 'grpc', 'ray', 'numpy') if m in sys.modules], threading.active_count())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[] 1"
    assert answer.stderr == ""


def test_no_module_has_the_name_of_something_public():
    modules = {module.name for module in pkgutil.iter_modules(gradwire.__path__)}
    assert not (modules & NAMES) - {"errors", "optim"}
