"""GradientService, one method for each RPC: decode, call, encode. What all have in common is in rpc_handlers.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from google.protobuf.empty_pb2 import Empty

from gradwire_proto import codec
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.names import (
    check_request_id,
    parse_checkpoint_name,
    parse_command_name,
    parse_dataset_name,
    parse_model_name,
)
from gradwire_proto.v1 import checkpoint_pb2, dataset_pb2, kernels_pb2, model_pb2
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, Limits
from gradwire_server.calls import Call
from gradwire_server.checkpoint_list import CheckpointList
from gradwire_server.datasets import Datasets
from gradwire_server.fit_records import encode_steps_result
from gradwire_server.fits import Fits
from gradwire_server.function_host import FunctionHost
from gradwire_server.hosted_model import HostedModel
from gradwire_server.model_registry import ModelRegistry
from gradwire_server.server_info import ServerFacts
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.tensors.tensor_streams import encode_chunks, read_chunks, read_manifest


class Servicer:
    """Every RPC of GradientService."""

    def __init__(
        self,
        models: ModelRegistry,
        checkpoints: CheckpointList,
        functions: FunctionHost,
        datasets: Datasets,
        fits: Fits,
        tensors: TensorStore,
        facts: ServerFacts,
        limits: Limits,
    ) -> None:
        self._models = models
        self._checkpoints = checkpoints
        self._functions = functions
        self._datasets = datasets
        self._fits = fits
        self._tensors = tensors
        self._facts = facts
        self._limits = limits

    # --- models ---------------------------------------------------------------------------------------------------

    async def CreateModel(self, request: pb.CreateModelRequest, call: Call) -> model_pb2.Model:
        # In a thread: a large graph takes a while, and other requests should not.
        spec = await asyncio.to_thread(codec.decode_model_spec, request.model, "model", self._limits)
        values = codec.decode_named_tensors(request.tensors, "tensors", self._limits)
        example = self._example(request)
        wait = codec.decode_wait(request)
        info = await self._models.create(spec, values, example, request.model_id, call, wait=wait)
        return codec.encode_model_info(info)

    async def GetModel(self, request: pb.GetModelRequest, call: Call) -> model_pb2.Model:
        return codec.encode_model_info(self._models.describe(parse_model_name(request.name)).shown)

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        page, next_page_token = self._models.page(request.page_size, request.page_token)
        return pb.ListModelsResponse(models=map(codec.encode_model_info, page), next_page_token=next_page_token)

    async def DeleteModel(self, request: pb.DeleteModelRequest, call: Call) -> Empty:
        made_by = check_request_id(request.made_by, "made_by")
        await self._models.delete(parse_model_name(request.name), made_by, call)
        return Empty()

    async def UpdateModel(self, request: pb.UpdateModelRequest, call: Call) -> model_pb2.Model:
        update = codec.decode_model_update(request, self._limits)
        model = await self._model(request.name, call)
        return codec.encode_model_info(await model.update(update, call))

    async def AddVariant(self, request: pb.AddVariantRequest, call: Call) -> model_pb2.Model:
        model = await self._model(request.name, call)
        variant = await asyncio.to_thread(codec.decode_variant, request.variant)
        tensors = codec.decode_state_tensors(request.tensors, "tensors", self._limits)
        values = codec.decode_named_tensors(request.values, "values", self._limits)
        operators = codec.decode_operators(request.operators, "operators")
        example = self._example(request)
        return codec.encode_model_info(await model.add_variant(variant, tensors, values, operators, example, call))

    async def GetCommand(self, request: pb.GetCommandRequest, call: Call) -> model_pb2.Command:
        model_id, request_id = parse_command_name(request.name)
        return codec.encode_command_info(await self._models.command(model_id, request_id, wait=request.wait))

    # --- commands -------------------------------------------------------------------------------------------------

    async def TrainStep(self, request: pb.TrainStepRequest, call: Call) -> pb.TrainStepResponse:
        lr = codec.decode_learning_rate(request)
        model = await self._model(request.name, call)
        result = await model.train_step(self._batch(request), lr, call)
        response = pb.TrainStepResponse()
        codec.encode_step_result(result, response.result)
        return response

    async def ForwardBackward(self, request: pb.ForwardBackwardRequest, call: Call) -> pb.ForwardBackwardResponse:
        model = await self._model(request.name, call)
        result = await model.forward_backward(self._batch(request), call)
        return pb.ForwardBackwardResponse(result=codec.encode_step_result(result))

    async def OptimizerStep(self, request: pb.OptimizerStepRequest, call: Call) -> pb.OptimizerStepResponse:
        gradients = codec.decode_named_tensors(request.gradients, "gradients", self._limits) or None
        lr = codec.decode_learning_rate(request)
        groups = codec.decode_group_options(request)
        model = await self._model(request.name, call)
        result = await model.optimizer_step(gradients, lr, groups, call)
        return pb.OptimizerStepResponse(result=codec.encode_step_result(result))

    async def ZeroGrad(self, request: pb.ZeroGradRequest, call: Call) -> pb.ZeroGradResponse:
        model = await self._model(request.name, call)
        await model.zero_grad(call)
        return pb.ZeroGradResponse()

    async def LoadStateDict(self, request: pb.LoadStateDictRequest, call: Call) -> pb.LoadStateDictResponse:
        tensors = codec.decode_named_tensors(request.tensors, "tensors", self._limits)
        model = await self._model(request.name, call)
        step = await model.load_state_dict(tensors, request.partial, call)
        return pb.LoadStateDictResponse(step=step)

    async def LoadOptimizerState(
        self, request: pb.LoadOptimizerStateRequest, call: Call
    ) -> pb.LoadOptimizerStateResponse:
        state = codec.decode_optimizer_state(request, self._limits)
        model = await self._model(request.name, call)
        step = await model.load_optimizer_state(state, call)
        return pb.LoadOptimizerStateResponse(step=step)

    async def Backward(self, request: pb.BackwardRequest, call: Call) -> pb.BackwardResponse:
        query, cotangents = codec.decode_backward_query(request), codec.decode_cotangents(request, self._limits)
        max_inline_bytes = codec.decode_max_inline_bytes(request.max_inline_bytes)
        model = await self._model(request.name, call)
        result = await model.autograd.backward(query, cotangents, max_inline_bytes, call)
        return codec.encode_backward_result(result)

    async def Release(self, request: pb.ReleaseRequest, call: Call) -> pb.ReleaseResponse:
        names = codec.decode_retained_names(request.retained, "retained")
        model = await self._model(request.name, call)
        await model.autograd.release(names, call)
        return pb.ReleaseResponse()

    async def SetGradients(self, request: pb.SetGradientsRequest, call: Call) -> pb.SetGradientsResponse:
        gradients = codec.decode_named_tensors(request.gradients, "gradients", self._limits)
        model = await self._model(request.name, call)
        step = await model.autograd.set_gradients(gradients, tuple(request.dropped), call)
        return pb.SetGradientsResponse(step=step)

    # --- reads ----------------------------------------------------------------------------------------------------

    async def ComputeGradients(self, request: pb.ComputeGradientsRequest, call: Call) -> pb.ComputeGradientsResponse:
        query = codec.decode_gradient_query(request)
        batch = self._batch(request)
        max_inline_bytes = codec.decode_max_inline_bytes(request.max_inline_bytes)
        if request.WhichOneof("subject") == "function":
            function = await asyncio.to_thread(codec.decode_function, request.function, "function", self._limits)
            result = await self._functions.compute_gradients(function, batch, query, max_inline_bytes, call)
        else:
            model = await self._model(request.name, call)
            vectors = codec.decode_named_tensors(request.vectors, "vectors", self._limits) or None
            result = await model.compute_gradients(batch, query, vectors, max_inline_bytes, call)
        return codec.encode_gradient_result(result)

    async def DifferentiateFunction(
        self, request: pb.DifferentiateFunctionRequest, call: Call
    ) -> pb.DifferentiateFunctionResponse:
        query, vectors = codec.decode_derivative_query(request, self._limits)
        batch = self._batch(request)
        max_inline_bytes = codec.decode_max_inline_bytes(request.max_inline_bytes)
        function = await asyncio.to_thread(codec.decode_function, request.function, "function", self._limits)
        result = await self._functions.differentiate(function, batch, query, vectors, max_inline_bytes, call)
        return codec.encode_derivative_result(result)

    async def Forward(self, request: pb.ForwardRequest, call: Call) -> pb.ForwardResponse:
        inputs = codec.decode_value(request.inputs, "inputs", self._limits)
        seed = request.seed if request.HasField("seed") else None
        max_inline_bytes = codec.decode_max_inline_bytes(request.max_inline_bytes)
        retains = request.HasField("retain")
        if request.request_id and not request.training and not retains:
            raise InvalidArgument(
                "only a forward in training mode, or one that is retained, is a command",
                field="request_id",
                reason="REQUEST_ID_NOT_TAKEN",
            )
        model = await self._model(request.name, call)
        if retains:
            retention = codec.decode_retention(request.retain)
            result = await model.autograd.forward(inputs, retention, request.training, seed, max_inline_bytes, call)
            return codec.encode_forward_result(result)
        return codec.encode_forward_result(await model.forward(inputs, request.training, seed, max_inline_bytes, call))

    async def GetGradients(self, request: pb.GetGradientsRequest, call: Call) -> pb.GetGradientsResponse:
        wrt = tuple(request.wrt) or None
        max_inline_bytes = codec.decode_max_inline_bytes(request.max_inline_bytes)
        model = await self._model(request.name, call)
        gradients, step = await model.autograd.held_gradients(wrt, max_inline_bytes, call)
        response = pb.GetGradientsResponse(step=step)
        codec.encode_named_tensors(gradients, response.gradients)
        return response

    async def GetStateDict(self, request: pb.GetStateDictRequest, call: Call) -> pb.GetStateDictResponse:
        names = tuple(request.names) or None
        max_inline_bytes = codec.decode_max_inline_bytes(request.max_inline_bytes)
        model = await self._model(request.name, call)
        tensors, step = await model.state_dict(names, max_inline_bytes, call)
        response = pb.GetStateDictResponse(step=step)
        codec.encode_named_tensors(tensors, response.tensors)
        return response

    async def GetOptimizerState(self, request: pb.GetOptimizerStateRequest, call: Call) -> pb.GetOptimizerStateResponse:
        max_inline_bytes = codec.decode_max_inline_bytes(request.max_inline_bytes)
        model = await self._model(request.name, call)
        state, step = await model.optimizer_state(max_inline_bytes, call)
        response = pb.GetOptimizerStateResponse(step=step)
        codec.encode_value(state, response.state, "state")
        return response

    # --- checkpoints ------------------------------------------------------------------------------------------------

    async def CreateCheckpoint(self, request: pb.CreateCheckpointRequest, call: Call) -> checkpoint_pb2.Checkpoint:
        model_id, name = codec.decode_new_checkpoint(request)
        model = await self._models.get(model_id, call)
        return codec.encode_checkpoint(await model.save(name, call))

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, call: Call) -> checkpoint_pb2.Checkpoint:
        return codec.encode_checkpoint(await self._checkpoints.get(parse_checkpoint_name(request.name)))

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, call: Call) -> pb.ListCheckpointsResponse:
        page, next_page_token = await self._checkpoints.page(request.page_size, request.page_token)
        checkpoints = map(codec.encode_checkpoint, page)
        return pb.ListCheckpointsResponse(checkpoints=checkpoints, next_page_token=next_page_token)

    async def DeleteCheckpoint(self, request: pb.DeleteCheckpointRequest, call: Call) -> Empty:
        await self._checkpoints.delete(parse_checkpoint_name(request.name), call)
        return Empty()

    async def RestoreModel(self, request: pb.RestoreModelRequest, call: Call) -> model_pb2.Model:
        name, model_id, workers = codec.decode_restoration(request)
        wait = codec.decode_wait(request)
        return codec.encode_model_info(await self._models.restore(name, model_id, workers, call, wait=wait))

    # --- datasets ---------------------------------------------------------------------------------------------------

    async def CreateDataset(self, request: dataset_pb2.CreateDatasetRequest, call: Call) -> dataset_pb2.Dataset:
        batch = codec.decode_batch(request.batch, "batch", self._limits)
        ttl = codec.decode_ttl(request)
        return codec.encode_dataset(await self._datasets.create(request.dataset_id, batch, call, ttl=ttl))

    async def GetDataset(self, request: dataset_pb2.GetDatasetRequest, call: Call) -> dataset_pb2.Dataset:
        return codec.encode_dataset(self._datasets.get(parse_dataset_name(request.name)).info)

    async def ListDatasets(
        self, request: dataset_pb2.ListDatasetsRequest, call: Call
    ) -> dataset_pb2.ListDatasetsResponse:
        page, next_page_token = self._datasets.page(request.page_size, request.page_token)
        datasets = map(codec.encode_dataset, page)
        return dataset_pb2.ListDatasetsResponse(datasets=datasets, next_page_token=next_page_token)

    async def DeleteDataset(self, request: dataset_pb2.DeleteDatasetRequest, call: Call) -> Empty:
        await self._datasets.delete(parse_dataset_name(request.name), call)
        return Empty()

    async def Fit(self, request: dataset_pb2.FitRequest, call: Call) -> AsyncGenerator[dataset_pb2.FitResponse, None]:
        plan = codec.decode_fit_plan(request)
        model = await self._model(request.name, call)
        async with aclosing(self._fits.run(model, plan, call.request_id or "")) as steps:
            async for progress in steps:
                yield codec.encode_fit_progress(progress)

    async def FitSteps(self, request: dataset_pb2.FitStepsRequest, call: Call) -> dataset_pb2.FitStepsResponse:
        """No RPC: what a journal records of a fit is applied once more."""
        model = await self._model(request.name, call)
        return encode_steps_result(await model.fitting.apply(call))

    async def SwapKernels(self, request: kernels_pb2.SwapKernelsRequest, call: Call) -> kernels_pb2.SwapKernelsResponse:
        """No RPC: what a journal records of compiled kernels is applied once more."""
        model = await self._model(request.name, call)
        await model.life.kernels.apply(call)
        return kernels_pb2.SwapKernelsResponse()

    # --- tensors that travel apart, and the service itself ----------------------------------------------------------

    async def UploadTensors(
        self, requests: AsyncIterator[pb.UploadTensorsRequest | memoryview], call: Call
    ) -> pb.UploadTensorsResponse:
        types, name = await read_manifest(requests, self._limits)
        return pb.UploadTensorsResponse(name=await self._tensors.uploads.take(types, read_chunks(requests), name))

    def DownloadTensors(self, request: pb.DownloadTensorsRequest, call: Call) -> AsyncGenerator[bytes, None]:
        return encode_chunks(self._tensors.downloads.chunks(request.name))

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, call: Call) -> pb.GetServerInfoResponse:
        return codec.encode_server_info(self._facts.info())

    # --- parts of requests ------------------------------------------------------------------------------------------

    async def _model(self, name: str, call: Call) -> HostedModel:
        return await self._models.get(parse_model_name(name), call)

    def _batch(
        self,
        request: pb.TrainStepRequest
        | pb.ForwardBackwardRequest
        | pb.ComputeGradientsRequest
        | pb.DifferentiateFunctionRequest,
    ) -> Batch:
        return codec.decode_batch(request.batch, "batch", self._limits)

    def _example(self, request: pb.CreateModelRequest | pb.AddVariantRequest) -> Batch | None:
        if not request.HasField("example"):
            return None
        return codec.decode_batch(request.example, "example", self._limits)
