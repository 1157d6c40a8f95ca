"""Resource names: `models/{model}`, `models/{model}/commands/{request_id}`, uploads and downloads."""

from __future__ import annotations

import re
from uuid import UUID

from gradwire_proto.errors import InvalidArgument, ModelNotFound

_MODEL_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
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
    if not request_id:
        return None
    try:
        if len(request_id) == 36:
            return str(UUID(request_id))
    except ValueError:
        pass
    raise InvalidArgument(f"expected a UUID, got {request_id[:80]!r}", field=field, reason="REQUEST_ID_INVALID")


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
