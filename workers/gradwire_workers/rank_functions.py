"""The functions that a rank has built: each comes along the first time, and is remembered by digest after that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from gradwire_proto.codec import decode_graphs
from gradwire_proto.v1 import program_pb2
from gradwire_proto.values import Limits, ModelSpec, OutputLossSpec
from gradwire_workers.rank_answers import Fields, derivatives_of, gradients_of
from gradwire_workers.rank_tensors import incoming, outgoing
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.trainer import Trainer

_Answer: TypeAlias = Callable[[Trainer, Fields], Fields]


class RankFunctions:
    """See the module. Each call forgets the functions that the frontend forgot."""

    def __init__(self, segments: SegmentWriter) -> None:
        self._segments = segments
        self._known: dict[str, Trainer] = {}

    def __len__(self) -> int:
        return len(self._known)

    def compute_gradients(self, fields: Fields) -> Fields:
        """The value and gradients of a function."""
        return self._answer(fields, gradients_of)

    def differentiate(self, fields: Fields) -> Fields:
        """Another derivative of a function."""
        return self._answer(fields, derivatives_of)

    def clear(self) -> None:
        """Forget all of them."""
        for function in self._known.values():
            function.close()
        self._known.clear()

    def _answer(self, fields: Fields, answer: _Answer) -> Fields:
        torch.set_num_threads(fields["threads"])
        for digest in fields["forget"]:
            self._known.pop(digest).close()
        if known := self._known.get(fields["digest"]):
            return answer(known, fields)
        spec = ModelSpec(
            program=decode_graphs(program_pb2.Program.FromString(bytes(fields["program"]))),
            loss=OutputLossSpec(fields["output_leaf"]),
        )
        state = incoming(fields["tensors"], writable=True)
        function = Trainer(spec=spec, state=state, device=fields["device"], limits=Limits(**fields["limits"]))
        result = outgoing(answer(function, fields), self._segments)
        # Remembered only now: the frontend too remembers only what has been answered.
        self._known[fields["digest"]] = function
        return result
