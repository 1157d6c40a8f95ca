"""What autograd saves for a backward that may come much later: how many bytes, and whether it is still as it was."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gradwire_proto.errors import FailedPrecondition

_Packed = tuple[Tensor, int]


class SavedTensors:
    """Counts the memory of the tensors that are saved in `recorded()`. `known`: tensors that live anyway.

    As torch does, and does not where it is given hooks, it refuses a saved tensor that was changed in place since.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {each.untyped_storage().data_ptr() for each in known}
        self._sizes: dict[int, int] = {}

    def recorded(self) -> AbstractContextManager[None]:
        """Inside, autograd's saved tensors are seen."""
        return saved_tensors_hooks(self._pack, _unpack)

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count these too."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._known:
                self._sizes[storage.data_ptr()] = storage.nbytes()

    @property
    def nbytes(self) -> int:
        """Bytes of all that was counted, memory that tensors share once."""
        return sum(self._sizes.values())

    def _pack(self, tensor: Tensor) -> _Packed:
        self.count((tensor,))
        # Detached: a node that holds on to its own output would never be freed. The version stays shared.
        return tensor.detach(), tensor._version


def _unpack(packed: _Packed) -> Tensor:
    tensor, version = packed
    if tensor._version != version:
        raise FailedPrecondition(
            "one of the variables needed for gradient computation has been modified by an inplace operation since the"
            f" forward: a tensor of shape {list(tensor.shape)} is at version {tensor._version}, expected version"
            f" {version}; an update between forward and backward changes the parameters in place",
            reason="MODIFIED_IN_PLACE",
        )
    return tensor
