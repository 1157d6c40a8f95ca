"""Resource names: `models/{model}`, their commands, checkpoints, datasets, uploads and downloads."""

from __future__ import annotations

import re
from uuid import UUID

from gradwire_proto.errors import CheckpointNotFound, DatasetNotFound, InvalidArgument, ModelNotFound

_MODEL_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
_CHECKPOINT_ID = re.compile(r"[a-z0-9-]{1,63}")
_COMMAND_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_HELD = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_model_id(model_id: str, field: str = "model_id") -> str:
    """`model_id`, which must be 1 to 63 of [a-z0-9-], first a letter. What is no text is refused alike."""
    if not isinstance(model_id, str) or not _MODEL_ID.fullmatch(model_id):
        raise InvalidArgument(
            f"expected 1 to 63 of [a-z0-9-], first a letter; got {model_id!r:.80}",
            field=field,
            reason="MODEL_ID_INVALID",
        )
    return model_id


def check_request_id(request_id: str, field: str = "request_id") -> str | None:
    """The request id in lower case, None where none was given; it must be a UUID."""
    return _check_uuid(request_id, field, "REQUEST_ID_INVALID")


def check_upload_id(upload_id: str, field: str = "manifest.upload_id") -> str | None:
    """The upload id in lower case, None where none was given; it must be a UUID."""
    return _check_uuid(upload_id, field, "UPLOAD_ID_INVALID")


def upload_name(upload_id: str) -> str:
    """`uploads/{upload_id}`."""
    return f"uploads/{upload_id}"


def model_name(model_id: str) -> str:
    """`models/{model_id}`."""
    return f"models/{model_id}"


def parse_model_name(name: str, field: str = "name") -> str:
    """The id in `models/{model_id}`. A name of another form is refused; one that cannot exist is not found."""
    return _model_id(name, name, field, "models/{model}")


def command_name(model_id: str, request_id: str) -> str:
    """`models/{model_id}/commands/{request_id}`."""
    return f"models/{model_id}/commands/{request_id}"


def parse_command_name(name: str, field: str = "name") -> tuple[str, str]:
    """(model id, request id) in `models/{model_id}/commands/{request_id}`."""
    form = "models/{model}/commands/{request_id}"
    model, separator, request_id = name.partition("/commands/")
    if not separator or not request_id:
        raise _wrong_form(name, field, form)
    return _model_id(model, name, field, form), check_request_id(request_id, field) or ""


def check_checkpoint_id(checkpoint_id: str, field: str = "checkpoint_id") -> str:
    """`checkpoint_id`, which must be 1 to 63 of [a-z0-9-]. What is no text is refused alike."""
    if not isinstance(checkpoint_id, str) or not _CHECKPOINT_ID.fullmatch(checkpoint_id):
        raise InvalidArgument(
            f"expected 1 to 63 of [a-z0-9-], got {checkpoint_id!r:.80}", field=field, reason="CHECKPOINT_ID_INVALID"
        )
    return checkpoint_id


def automatic_checkpoint(model_id: str, number: int) -> str:
    """What `Checkpoint.name` says of one that the service took after command `number`: `{model_id}/{number}`."""
    return f"{model_id}/{number}"


def checkpoint_name(name: str, field: str = "checkpoint") -> str:
    """`checkpoints/{name}`; of the name of an automatic one, `models/{model_id}/checkpoints/{number}`."""
    if isinstance(name, str) and "/" in name:
        model_id, _, number = name.partition("/")
        if not _COMMAND_NUMBER.fullmatch(number):
            raise InvalidArgument(
                f"expected NAME or MODEL/NUMBER, got {name[:100]!r}", field=field, reason="CHECKPOINT_ID_INVALID"
            )
        return f"models/{check_model_id(model_id, field)}/checkpoints/{number}"
    return f"checkpoints/{check_checkpoint_id(name, field)}"


def parse_checkpoint_name(name: str, field: str = "name") -> str:
    """What `Checkpoint.name` says, of a resource name. One of another form is refused; an impossible one not found."""
    form = "checkpoints/{checkpoint} or models/{model}/checkpoints/{number}"
    match name.split("/"):
        case ["checkpoints", checkpoint_id] if checkpoint_id:
            if _CHECKPOINT_ID.fullmatch(checkpoint_id):
                return checkpoint_id
        case ["models", model_id, "checkpoints", number] if model_id and number:
            if _MODEL_ID.fullmatch(model_id) and _COMMAND_NUMBER.fullmatch(number):
                return f"{model_id}/{number}"
        case _:
            raise _wrong_form(name, field, form)
    raise CheckpointNotFound(f"there is no checkpoint {name[:100]!r}", field=field, resource=name[:100])


def check_dataset_id(dataset_id: str, field: str = "dataset_id") -> str:
    """`dataset_id`, which must be 1 to 63 of [a-z0-9-], first a letter. What is no text is refused alike."""
    if not isinstance(dataset_id, str) or not _MODEL_ID.fullmatch(dataset_id):
        raise InvalidArgument(
            f"expected 1 to 63 of [a-z0-9-], first a letter; got {dataset_id!r:.80}",
            field=field,
            reason="DATASET_ID_INVALID",
        )
    return dataset_id


def dataset_name(dataset_id: str) -> str:
    """`datasets/{dataset_id}`."""
    return f"datasets/{dataset_id}"


def parse_dataset_name(name: str, field: str = "name") -> str:
    """The id in `datasets/{dataset_id}`. A name of another form is refused; one that cannot exist is not found."""
    collection, separator, dataset_id = name.partition("/")
    if collection != "datasets" or not separator or not dataset_id or "/" in dataset_id:
        raise _wrong_form(name, field, "datasets/{dataset}")
    if not _MODEL_ID.fullmatch(dataset_id):
        raise DatasetNotFound(f"there is no dataset {dataset_id[:80]!r}", field=field, resource=name[:100])
    return dataset_id


def handle_name(held: str, index: int) -> str:
    """The name of one tensor of an upload or download: `uploads/abc` and 0 make `uploads/abc/tensors/0`."""
    return f"{held}/tensors/{index}"


def parse_handle_name(name: str, field: str = "handle") -> tuple[str, int]:
    """(`uploads/{upload}` or `downloads/{download}`, index) of a tensor's handle."""
    held, separator, index = name.rpartition("/tensors/")
    collection, _, identity = held.partition("/")
    well_formed = collection in ("uploads", "downloads") and _HELD.fullmatch(identity)
    # isascii: str.isdigit alone takes digits of every script.
    if not (separator and well_formed and index.isascii() and index.isdigit() and len(index) < 10):
        raise _wrong_form(name, field, "uploads/{upload}/tensors/{index} or downloads/{download}/tensors/{index}")
    return held, int(index)


def _check_uuid(text: str, field: str, reason: str) -> str | None:
    if not text:
        return None
    try:
        if len(text) == 36:
            return str(UUID(text))
    except ValueError:
        pass
    raise InvalidArgument(f"expected a UUID, got {text[:80]!r}", field=field, reason=reason)


def _model_id(model: str, name: str, field: str, form: str) -> str:
    collection, separator, model_id = model.partition("/")
    if collection != "models" or not separator or not model_id or "/" in model_id:
        raise _wrong_form(name, field, form)
    if not _MODEL_ID.fullmatch(model_id):
        raise ModelNotFound(
            f"there is no model {model_id[:80]!r}", field=field, reason="MODEL_NOT_FOUND", resource=model[:100]
        )
    return model_id


def _wrong_form(name: str, field: str, form: str) -> InvalidArgument:
    return InvalidArgument(f"expected {form}, got {name[:100]!r}", field=field, reason="NAME_INVALID")
