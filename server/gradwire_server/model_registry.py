"""The models of the service, by id."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from bisect import bisect_right

from gradwire_proto.errors import (
    AlreadyExists,
    Cancelled,
    GradwireError,
    InvalidArgument,
    ModelNotFound,
    ResourceExhausted,
)
from gradwire_proto.names import check_model_id, command_name, model_name
from gradwire_proto.values import Batch, CommandInfo, Limits, ModelInfo, ModelSpec, NamedTensors
from gradwire_server.calls import Call
from gradwire_server.hosted_model import HostedModel
from gradwire_server.model_creation import ModelCreation
from gradwire_server.model_description import ModelDescription
from gradwire_server.program_checks import check_model
from gradwire_server.request_log import RequestLog, command_info
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.workers import Cluster

DEFAULT_PAGE, LARGEST_PAGE = 100, 1000


class ModelRegistry:
    """Makes, finds, lists and deletes models. Every model is in it from the start of its creation to its end."""

    def __init__(
        self, cluster: Cluster, tensors: TensorStore, limits: Limits, stored_replies: int, delete_seconds: float
    ) -> None:
        self._cluster = cluster
        self._tensors = tensors
        self._limits = limits
        self._stored_replies = stored_replies
        self._delete_seconds = delete_seconds
        self._descriptions: dict[str, ModelDescription] = {}
        self._creations: dict[str, ModelCreation] = {}
        self._hosted: dict[str, HostedModel] = {}
        self._deletions: dict[str, asyncio.Task[None]] = {}
        self._seen: RequestLog[ModelCreation] = RequestLog(stored_replies, 0)

    async def create(
        self, spec: ModelSpec, values: NamedTensors, example: Batch | None, model_id: str, call: Call
    ) -> ModelInfo:
        """Make a model; `model_id` "" lets the registry choose. A repeat of a request id joins it or gets its answer.

        Raises AlreadyExists, ResourceExhausted (the limit models, or too few free ranks) and what the ranks find wrong.
        """
        creation = self._seen.find(call)
        if creation is None:
            self._check_new(model_id)
            await asyncio.to_thread(check_model, spec, values, self._limits)
            # Again: others came meanwhile, this request's repeat perhaps.
            creation = self._seen.find(call) or self._begin(spec, values, example, model_id, call)
        return await creation.result()

    def _check_new(self, model_id: str) -> None:
        if model_id:
            check_model_id(model_id)
        if model_id in self._descriptions:
            raise AlreadyExists(
                f"there is a model {model_id!r} already",
                field="model_id",
                reason="MODEL_EXISTS",
                resource=model_name(model_id),
            )
        if len(self._descriptions) >= self._limits.models:
            raise ResourceExhausted(
                f"there are {len(self._descriptions)} models, as many as the server's setting models allows",
                reason="TOO_MANY_MODELS",
            )

    def _begin(
        self, spec: ModelSpec, values: NamedTensors, example: Batch | None, model_id: str, call: Call
    ) -> ModelCreation:
        self._check_new(model_id)
        model_id = model_id or f"model-{secrets.token_hex(6)}"
        batch = {"inputs": example.inputs, "targets": example.targets} if example is not None else None
        claim = self._tensors.uploads.claim({"tensors": values, "example": batch})
        description = self._descriptions[model_id] = ModelDescription(model_id, spec)

        async def make() -> ModelInfo:
            example = Batch(**claim.value["example"]) if claim.value["example"] is not None else None
            group = await self._cluster.start_group(spec, claim.value["tensors"], example, model_id=model_id)
            self._hosted[model_id] = HostedModel(
                group, description, self._tensors, self._limits, self._stored_replies, self._delete_seconds
            )
            return description.info

        def ended(creation: ModelCreation) -> None:
            del self._creations[model_id]
            if model_id not in self._hosted:
                del self._descriptions[model_id]
            if isinstance(creation.error, Cancelled):
                # Perhaps only the connection broke: then the caller comes back with the same handles.
                claim.give_back()
            else:
                claim.spend()

        creation = self._creations[model_id] = ModelCreation(model_id, call.request_id, make, ended)
        self._seen.add(call, creation)
        return creation

    def get(self, model_id: str) -> HostedModel:
        """The model. Raises ModelNotFound; FailedPrecondition while it is created or deleted."""
        model = self._hosted.get(model_id)
        if model is None:
            self.describe(model_id).check_usable()
            raise AssertionError("a usable model is hosted")
        return model

    def describe(self, model_id: str) -> ModelDescription:
        """The description of a model in any state. Raises ModelNotFound."""
        description = self._descriptions.get(model_id)
        if description is None:
            raise ModelNotFound(
                f"there is no model {model_id!r}", field="name", reason="MODEL_NOT_FOUND", resource=model_name(model_id)
            )
        return description

    def page(self, size: int, token: str) -> tuple[list[ModelInfo], str]:
        """(descriptions ordered by id, the next page's token or ""). `size` 0 lets the registry choose."""
        if size < 0:
            raise InvalidArgument(f"expected 0 or more, got {size}", field="page_size", reason="PAGE_SIZE_INVALID")
        size = min(size or DEFAULT_PAGE, LARGEST_PAGE)
        ids = sorted(self._descriptions)
        # The token is the last id that was seen: pages stay right when models come and go between them.
        first = bisect_right(ids, _decode_token(token)) if token else 0
        page = ids[first : first + size]
        more = first + size < len(ids)
        return [self._descriptions[each].brief for each in page], _encode_token(page[-1]) if more else ""

    async def command(self, model_id: str, request_id: str, *, wait: bool) -> CommandInfo:
        """What became of a command, the model's creation included."""
        creation = self._seen.get(request_id) if request_id in self._seen else None
        if creation is not None and creation.model_id == model_id:
            return await command_info(command_name(model_id, request_id), creation, wait=wait)
        return await self.get(model_id).command(request_id, wait=wait)

    async def delete(self, model_id: str) -> None:
        """Delete a model in any state and free its ranks. Ends what was begun, whoever waits, by killing its
        ranks where it takes longer than delete_seconds. Raises ModelNotFound.
        """
        description = self.describe(model_id)
        if model_id not in self._deletions:
            description.deleting()
            deletion = self._deletions[model_id] = asyncio.create_task(self._delete(model_id))
            deletion.add_done_callback(lambda _: self._deletions.pop(model_id))
        await asyncio.shield(self._deletions[model_id])

    async def _delete(self, model_id: str) -> None:
        creation = self._creations.get(model_id)
        if creation is not None:
            await creation.cancel()
        model = self._hosted.get(model_id)
        if model is None:
            return
        try:
            await model.close()
        finally:
            del self._hosted[model_id], self._descriptions[model_id]

    async def idle(self) -> None:
        """Return when no model is made and no request of a model waits or runs."""
        waits = [creation.wait() for creation in self._creations.values()]
        waits += [model.idle() for model in self._hosted.values()]
        await asyncio.gather(*waits)

    async def close(self) -> None:
        """Delete every model."""
        await asyncio.gather(*map(self.delete, list(self._descriptions)), return_exceptions=True)


def _encode_token(model_id: str) -> str:
    return base64.urlsafe_b64encode(model_id.encode()).decode()


def _decode_token(token: str) -> str:
    try:
        return check_model_id(base64.urlsafe_b64decode(token.encode("ascii")).decode("ascii"))
    except (GradwireError, ValueError, binascii.Error):
        raise InvalidArgument(
            "expected next_page_token of an earlier answer", field="page_token", reason="PAGE_TOKEN_INVALID"
        ) from None
