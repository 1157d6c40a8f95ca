"""The models of the service, by id."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable

from gradwire_proto.errors import AlreadyExists, GradwireError, ModelNotFound, ResourceExhausted
from gradwire_proto.names import check_model_id, command_name, model_name
from gradwire_proto.values import Batch, CommandInfo, ModelInfo, ModelSpec, NamedTensors
from gradwire_server.admission import draining
from gradwire_server.calls import Call
from gradwire_server.checkpoint_reading import read_checkpoint
from gradwire_server.deletions import Deletion, Deletions
from gradwire_server.hosted_model import HostedModel
from gradwire_server.hosting import Hosting
from gradwire_server.model_creation import ModelCreation
from gradwire_server.model_description import ModelDescription, not_ready, recovering
from gradwire_server.model_making import Making, made_of_checkpoint, made_of_spec
from gradwire_server.pages import page_of
from gradwire_server.program_checks import check_model
from gradwire_server.request_log import RequestLog, command_info
from gradwire_server.storage.checkpoint_store import key_of
from gradwire_server.storage.saved_model import StoredReply
from gradwire_server.stored_replies import EndedCommand, ended_command
from gradwire_server.tensors.file_threads import in_thread


class ModelRegistry:
    """Makes, finds, lists and deletes models. Every model is in it from the start of its creation to its end."""

    def __init__(self, hosting: Hosting) -> None:
        self._hosting = hosting
        self._descriptions: dict[str, ModelDescription] = {}
        self._creations: dict[str, ModelCreation] = {}
        self._hosted: dict[str, HostedModel] = {}
        self._seen: RequestLog[ModelCreation | Deletion] = RequestLog(
            hosting.stored_replies, hosting.limits.message_bytes
        )
        self._deletions = Deletions("DeleteModel", self._seen, hosting.storage.deletions)

    def open(self, deletions: Iterable[StoredReply]) -> None:
        """Begin to bring back the models of the storage. Requests for one wait for it.

        deletions: these requests, among others, were answered by an earlier process of the service.
        """
        self._deletions.restore(deletions)
        for model_id, made_by in self._hosting.storage.open().items():
            description = self._descriptions[model_id] = ModelDescription(model_id, None)
            model = self._hosted[model_id] = HostedModel(description, self._hosting)
            if made_by is not None:
                description.made_by = made_by.request_id
                self._seen.restore(made_by.request_id, made_by.body, ended_command(made_by), made_by.ended_at)
            model.life.recovery.restore()
        self._hosting.storage.begin_sweep()

    async def create(
        self,
        spec: ModelSpec,
        values: NamedTensors,
        example: Batch | None,
        model_id: str,
        call: Call,
        *,
        wait: float = 0.0,
    ) -> ModelInfo:
        """Make a model; `model_id` "" lets the registry choose. A repeat of a request id joins it or gets its answer.

        wait: seconds that it may wait for ranks, in the order of asking, where too few are free now.

        Raises AlreadyExists, ResourceExhausted (the limit models, or too few free ranks), Unavailable MODEL_RECOVERING
        while a model of the storage may still take ranks, and what the ranks find wrong.
        """
        creation = self._seen.find(call)
        if creation is None:
            self._check_new(model_id)
            await asyncio.to_thread(check_model, spec, values, self._hosting.limits)
            # Again: others came meanwhile, this request's repeat perhaps.
            creation = self._seen.find(call)
        if creation is None:
            self._check_new(model_id)
            creation = self._begin(made_of_spec(self._hosting, spec, values, example, call, wait), model_id, call)
        return await creation.result(call.deadline)

    async def restore(
        self, name: str, model_id: str | None, workers: int | None, call: Call, *, wait: float = 0.0
    ) -> ModelInfo:
        """Make a model of the checkpoint `name`. None: the id, or as many ranks, as the model had that was saved.
        wait: as for `create`.

        Raises CheckpointNotFound, FailedPrecondition CHECKPOINT_CORRUPT and CHECKPOINT_VERSION, and what `create` does.
        """
        creation = self._seen.find(call)
        if creation is None:
            store = self._hosting.storage.checkpoints
            await self._hosting.storage.swept()
            model_id = model_id or (await in_thread(store.get, key_of(name), threads=store.threads)).model_id
            self._check_new(model_id)
            saved, spec = await read_checkpoint(store, name, workers)
            try:
                # Again: others came meanwhile, this request's repeat perhaps.
                creation = self._seen.find(call)
                if creation is None:
                    self._check_new(model_id)
            except GradwireError:
                await in_thread(saved.remove_files)
                raise
            if creation is None:
                creation = self._begin(made_of_checkpoint(self._hosting, saved, spec, call, wait), model_id, call)
            else:
                await in_thread(saved.remove_files)
        return await creation.result(call.deadline)

    def _begin(self, making: Making, model_id: str, call: Call) -> ModelCreation:
        model_id = model_id or f"model-{secrets.token_hex(6)}"
        description = self._descriptions[model_id] = ModelDescription(model_id, making.spec)
        description.made_by = call.request_id
        new = HostedModel(description, self._hosting)

        async def run() -> ModelInfo:
            info = await making.make(new)
            self._hosted[model_id] = new
            return info

        def end(creation: ModelCreation) -> None:
            del self._creations[model_id]
            if creation.error is not None and description.has_failed:
                # Something of it may be left in the storage, and can be deleted.
                creation.error.outcome = "unknown"
                self._hosted[model_id] = new
            elif model_id not in self._hosted:
                del self._descriptions[model_id]
            making.ended(creation)

        creation = self._creations[model_id] = ModelCreation(model_id, call.request_id, run, end)
        self._seen.add(call, creation)
        return creation

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
        self._check_room()
        for model in self._hosted.values():
            if model.life.recovery.wants_ranks:
                raise recovering(
                    f"{model.description.name} is being brought back, and comes first: it may need the ranks"
                )

    def __len__(self) -> int:
        return len(self._descriptions)

    def _check_room(self) -> None:
        hosting, mine = self._hosting, len(self)
        all_of_them = mine + hosting.models_elsewhere()
        for count, most, setting in (
            (all_of_them, hosting.most_models, "models"),
            (mine, hosting.limits.models, "owner_models"),
        ):
            if count >= most:
                raise ResourceExhausted(
                    f"there are {count} models, as many as the server's setting {setting} allows",
                    reason="TOO_MANY_MODELS",
                )

    async def get(self, model_id: str, call: Call) -> HostedModel:
        """The model, once it has been brought back. Raises ModelNotFound; FailedPrecondition while it is made."""
        model = self._get(model_id)
        await model.life.recovery.there(call)
        return model

    def _get(self, model_id: str) -> HostedModel:
        model = self._hosted.get(model_id)
        if model is None:
            description = self.describe(model_id)
            description.check_usable()
            raise not_ready(description.name)
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
        models, next_page_token = page_of(self._descriptions, size, token)
        return [each.brief for each in models], next_page_token

    def needs_checkpoint(self, model_id: str, number: int) -> bool:
        """Whether a model would be brought back from its automatic checkpoint of that number."""
        model = self._hosted.get(model_id)
        return model is not None and model.life.checkpoints.is_needed(number)

    async def command(self, model_id: str, request_id: str, *, wait: bool) -> CommandInfo:
        """What became of a command, the model's creation included. See HostedModel.command."""
        creation = self._seen.get(request_id) if request_id in self._seen else None
        if self._is_creation(creation, model_id, request_id):
            return await command_info(command_name(model_id, request_id), creation, wait=wait)
        return await self._get(model_id).command(request_id, wait=wait)

    def _is_creation(
        self, seen: ModelCreation | Deletion | EndedCommand | None, model_id: str, request_id: str
    ) -> bool:
        """Whether the request with that id, which was `seen`, was to make the model."""
        if isinstance(seen, ModelCreation):
            return seen.model_id == model_id
        description = self._descriptions.get(model_id)
        return description is not None and description.made_by == request_id

    async def delete(self, model_id: str, made_by: str | None, call: Call) -> None:
        """Delete a model in any state and free its ranks. Ends what was begun, whoever waits, by killing its
        ranks where it takes longer than delete_seconds. A repeat of a request id leaves alone what was made since.

        made_by: only a model that the request with this id has made; None: whoever made it. Raises ModelNotFound.
        """
        if await self._deletions.is_repeated(call):
            return
        description = self.describe(model_id)
        if made_by is not None and description.made_by != made_by:
            raise ModelNotFound(
                f"the model {model_id!r} was made by another request",
                field="made_by",
                reason="MODEL_NOT_FOUND",
                resource=model_name(model_id),
            )
        description.deleting()
        await self._deletions.run(model_id, lambda: self._delete(model_id), call)

    async def _delete(self, model_id: str) -> None:
        creation = self._creations.get(model_id)
        if creation is not None:
            await creation.cancel()
        model = self._hosted.get(model_id)
        if model is None:
            return
        await model.life.close()
        try:
            storage = self._hosting.storage
            await in_thread(storage.delete, model_id, threads=storage.checkpoints.threads)
        except GradwireError as error:
            # It is still in the storage, and deleting it may be tried again.
            model.description.failed(error)
            raise
        del self._hosted[model_id], self._descriptions[model_id]

    def drain(self) -> None:
        """Give up the models that wait for ranks: whoever wants them asks again, another frontend perhaps."""
        for model_id, creation in self._creations.items():
            if self._descriptions[model_id].waits:
                creation.give_up(draining())

    async def idle(self) -> None:
        """Return when no model is made and no request of a model waits or runs."""
        waits = [creation.wait() for creation in self._creations.values()]
        waits += [model.life.idle() for model in self._hosted.values()]
        await asyncio.gather(*waits)

    async def save_changed(self) -> None:
        """Take a checkpoint of every model that has changed since its newest one. What fails is logged."""
        await asyncio.gather(*(model.life.checkpoints.save_changed() for model in self._hosted.values()))

    async def close(self) -> None:
        """End every model. The storage keeps them."""
        creations = [creation.cancel() for creation in list(self._creations.values())]
        await asyncio.gather(*creations, self._deletions.close(), return_exceptions=True)
        await asyncio.gather(*(model.life.close() for model in self._hosted.values()), return_exceptions=True)
