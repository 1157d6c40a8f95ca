"""A saved state as a rank's message holds it, into tensors: views of the message, which the model copies once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradwire_proto.codec import decode_variant
from gradwire_proto.tensors import to_nested
from gradwire_proto.v1 import program_pb2
from gradwire_workers.rank_tensors import incoming
from gradwire_workers.training.model_state import SavedState


def saved_state_in(fields: Mapping[str, Any]) -> SavedState:
    """The state that `group_state.for_rank` described."""
    held = fields["held"]
    return SavedState(
        optimizer=to_nested(fields["optimizer"]),
        step=fields["step"],
        trained=fields["trained"],
        held=None if held is None else [incoming(parts) for parts in held],
        weights=fields["weights"],
        opened=[
            (decode_variant(program_pb2.Variant.FromString(bytes(variant)), require_graph=False), written)
            for variant, written in fields["opened"]
        ],
    )
