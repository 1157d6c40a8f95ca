"""Data that stays on the service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from gradwire.deadline import Deadline
from gradwire.errors import GradwireError, InvalidArgument
from gradwire.rpc import Rpc, new_request_id
from gradwire.transfer import Uploads
from gradwire.user_values import normalize
from gradwire_proto import codec
from gradwire_proto.names import check_dataset_id, dataset_name
from gradwire_proto.tensors import from_nested, torch_dtype
from gradwire_proto.v1 import dataset_pb2 as pb
from gradwire_proto.values import Batch, DatasetInfo, TensorData, Value, map_leaves

_SAMPLE_ROWS = 256

_LENT_SECONDS, _LENT_MOST = 600, 30 * 86_400
"""How long a dataset of one fit alone stays behind it, should its client be killed before it deletes it: at least, and
as long as the service allows. One that comes back within its timeout finds it.
"""


class Dataset:
    """Examples that stay on the service, for `Model.fit`. Made by `Client.upload_dataset` and `Client.get_dataset`.

    They stay until `delete`, also when the service is started again with the same storage.
    """

    def __init__(self, rpc: Rpc, info: DatasetInfo, sample: Batch | None = None) -> None:
        self._rpc = rpc
        self._info = info
        self._sample = sample

    @property
    def id(self) -> str:
        """What `Client.get_dataset` takes."""
        return self._info.id

    @property
    def num_examples(self) -> int:
        """Rows of every tensor."""
        return self._info.num_examples

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self._info.nbytes

    @property
    def created_at(self) -> float:
        """When it was made, in seconds since 1970."""
        return self._info.created_at

    def __len__(self) -> int:
        return self._info.num_examples

    def delete(self) -> None:
        """Delete it: nobody finds it any more. What was trained on it stays, and outlives what it should.

        Raises DatasetNotFound where it is gone.
        """
        request = pb.DeleteDatasetRequest(name=dataset_name(self.id), request_id=new_request_id())
        self._rpc.call("DeleteDataset", request, deletes=True)

    def described(self, rows: int) -> Batch:
        """A batch of so many rows as to types and shapes, without elements."""

        def cut(leaf: Any) -> Any:
            return TensorData(leaf.dtype, (rows, *leaf.shape[1:]), b"") if isinstance(leaf, TensorData) else leaf

        return Batch(map_leaves(cut, self._info.inputs), map_leaves(cut, self._info.targets))

    def example(self, rows: int) -> Batch:
        """A batch of so many rows to export with: of its first examples, or of zeros where they are not at hand."""
        if self._sample is None:

            def zeros(leaf: Any) -> Any:
                if not isinstance(leaf, TensorData):
                    return leaf
                return torch.zeros((rows, *leaf.shape[1:]), dtype=torch_dtype(leaf.dtype))

            return Batch(map_leaves(zeros, self._info.inputs), map_leaves(zeros, self._info.targets))

        def repeated(leaf: Any) -> Any:
            return leaf[torch.arange(rows) % len(leaf)] if isinstance(leaf, torch.Tensor) else leaf

        return Batch(map_leaves(repeated, self._sample.inputs), map_leaves(repeated, self._sample.targets))

    def __repr__(self) -> str:
        return f"<gradwire.Dataset {self.id!r} of {self.num_examples} examples>"


def upload_dataset(rpc: Rpc, inputs: Any, targets: Any, dataset_id: str | None, *, ttl: int | None = None) -> Dataset:
    """See `Client.upload_dataset`. ttl: seconds that it stays while no fit uses it, if it shall not stay for good."""
    rpc.check_usable()
    given = Batch(normalize(inputs, "batch.inputs"), normalize(targets, "batch.targets"))
    batch = from_nested(given.inputs, "batch.inputs"), from_nested(given.targets, "batch.targets")
    name = "" if dataset_id is None else check_dataset_id(dataset_id)
    request = pb.CreateDatasetRequest(dataset_id=name, request_id=new_request_id())
    if ttl is not None:
        request.ttl.FromSeconds(ttl)
    uploads = Uploads(rpc)
    codec.encode_batch(Batch(*uploads.send_apart(batch)), request.batch)
    reply = rpc.call("CreateDataset", request, deadline=uploads.deadline, send_again=uploads.send_again)
    return Dataset(rpc, codec.decode_dataset(reply), Batch(_first(given.inputs), _first(given.targets)))


def get_dataset(rpc: Rpc, dataset_id: str) -> Dataset:
    """See `Client.get_dataset`."""
    request = pb.GetDatasetRequest(name=dataset_name(check_dataset_id(dataset_id)))
    return Dataset(rpc, codec.decode_dataset(rpc.call("GetDataset", request)))


def list_datasets(rpc: Rpc) -> Iterator[Dataset]:
    """See `Client.list_datasets`."""
    request, deadline = pb.ListDatasetsRequest(), Deadline(rpc.timeout)
    while True:
        reply = rpc.call("ListDatasets", request, deadline=deadline)
        yield from (Dataset(rpc, codec.decode_dataset(each)) for each in reply.datasets)
        if not reply.next_page_token:
            return
        request.page_token = reply.next_page_token


class Lent:
    """Inside, a dataset; one that was made of tensors for this alone goes at the end."""

    def __init__(self, rpc: Rpc, given: Any, field: str) -> None:
        self._rpc = rpc
        self._given = given
        self._field = field
        self._own: Dataset | None = None

    def __enter__(self) -> Dataset:
        if isinstance(self._given, Dataset):
            return self._given
        inputs, targets = _inputs_and_targets(self._given, self._field)
        ttl = int(min(max(_LENT_SECONDS, 2 * self._rpc.timeout), _LENT_MOST))
        self._own = upload_dataset(self._rpc, inputs, targets, None, ttl=ttl)
        return self._own

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            # Of what went wrong before, more is to be said than that nobody is there to delete it.
            with suppress(GradwireError):
                self._own.delete()


def has_targets(given: Any, field: str) -> bool:
    """Whether a Dataset, or tensors for one, has targets. Raises InvalidArgument for a tuple that can be neither."""
    targets = given.described(1).targets if isinstance(given, Dataset) else _inputs_and_targets(given, field)[1]
    return targets is not None


def _inputs_and_targets(given: Any, field: str) -> tuple[Any, Any]:
    if not isinstance(given, (tuple, list)):
        return given, None
    if len(given) not in (1, 2):
        message = (
            f"expected a Dataset, (inputs, targets) or (inputs,), got a {type(given).__qualname__} of {len(given)}"
        )
        raise InvalidArgument(message, field=field, reason="DATASET_INVALID")
    return (given[0], given[1]) if len(given) == 2 else (given[0], None)


def _first(value: Value) -> Value:
    """The first rows, apart from what the user may change."""
    return map_leaves(lambda leaf: leaf[:_SAMPLE_ROWS].clone() if isinstance(leaf, torch.Tensor) else leaf, value)
