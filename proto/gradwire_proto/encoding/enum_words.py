"""Two-way tables between the words that the code uses and the numbers of the proto's enums. Each table exists once."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import gradient_service_pb2, kernels_pb2, model_pb2, program_pb2, tensor_pb2
from gradwire_proto.values import ITEM_SIZE


class EnumWords:
    """Turns `word` into the enum's number and back; what the table lacks is refused.

    `unspecified` is the word that the zero of the enum stands for; without one, zero is refused like an unknown number.
    """

    def __init__(
        self, enum: EnumTypeWrapper, prefix: str, words: Iterable[str], *, unspecified: str | None = None
    ) -> None:
        self._enum_name = enum.DESCRIPTOR.name
        self.numbers = {word: enum.Value(f"{prefix}_{word.upper()}") for word in words}
        self.words = {number: word for word, number in self.numbers.items()}
        if unspecified is not None:
            self.numbers.setdefault(unspecified, 0)
            self.words[0] = unspecified

    def number(self, word: str, field: str) -> int:
        """The enum's number of `word`."""
        number = self.numbers.get(word)
        if number is None:
            raise self._refusal(repr(word), field)
        return number

    def word(self, number: int, field: str) -> str:
        """The word of the enum's `number`."""
        word = self.words.get(number)
        if word is None:
            raise self._refusal("no value" if number == 0 else f"the unknown number {number}", field)
        return word

    def _refusal(self, got: str, field: str) -> InvalidArgument:
        known = ", ".join(filter(None, self.numbers))
        return InvalidArgument(
            f"expected a {self._enum_name}, one of {known}; got {got}", field=field, reason="ENUM_VALUE_UNKNOWN"
        )


DTYPES = EnumWords(tensor_pb2.DType, "DTYPE", ITEM_SIZE)
LAYOUTS = EnumWords(program_pb2.Layout, "LAYOUT", ["strided"])
MEMORY_FORMATS = EnumWords(
    program_pb2.MemoryFormat, "MEMORY_FORMAT", ["contiguous", "preserve", "channels_last", "channels_last_3d"]
)
TENSOR_ROLES = EnumWords(program_pb2.TensorRole, "TENSOR_ROLE", ["parameter", "buffer", "temporary_buffer", "constant"])
MODEL_STATES = EnumWords(
    model_pb2.ModelState, "MODEL_STATE", ["creating", "ready", "failed", "deleting", "recovering", "waiting"]
)
KERNELS_STATES = EnumWords(kernels_pb2.KernelsState, "KERNELS_STATE", ["compiling", "in_use", "refused"])
SHARDING_MODES = EnumWords(model_pb2.ShardingMode, "SHARDING_MODE", ["rows", "whole"])
ON_NAN = EnumWords(model_pb2.OnNan, "ON_NAN", ["report", "refuse"], unspecified="report")
DURABILITIES = EnumWords(model_pb2.Durability, "DURABILITY", ["none", "process", "disk"], unspecified="")
PRECISIONS = EnumWords(model_pb2.Precision, "PRECISION", ["fp32", "bf16", "fp16"], unspecified="fp32")
LOSS_REDUCTIONS = EnumWords(model_pb2.LossReduction, "LOSS_REDUCTION", ["mean", "sum"])
DEVICES = EnumWords(model_pb2.Device, "DEVICE", ["cpu", "cuda"], unspecified="auto")
COMMAND_STATES = EnumWords(model_pb2.CommandState, "COMMAND_STATE", ["running", "applied", "not_applied"])
DERIVATIVES = EnumWords(
    gradient_service_pb2.Derivative, "DERIVATIVE", ["none", "vjp", "jvp", "jacobian", "hessian", "hvp"]
)
