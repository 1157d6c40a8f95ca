"""What every forward is asked with: its inputs, and the variant that takes them."""

from __future__ import annotations

from typing import Any

from gradwire.gradient_queries import fresh_seed
from gradwire.rpc import Rpc
from gradwire.transfer import Uploads, inline_bytes
from gradwire.user_values import normalize
from gradwire.variants import Variants
from gradwire_proto import codec
from gradwire_proto.tensors import from_nested
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, Variant


def forward_request(
    rpc: Rpc, name: str, variants: Variants, inputs: Any, *, training: bool, is_read: bool
) -> tuple[pb.ForwardRequest, Uploads, Variant | None]:
    """The request to the model `name`, "models/{model}", what goes ahead of it, and what `Variants.choose` gives.

    is_read: whether it changes nothing, and keeps nothing for a backward.
    """
    rpc.check_usable()
    request = pb.ForwardRequest(name=name, training=training, max_inline_bytes=inline_bytes(rpc))
    if not training:
        # A command draws anew by its number, which a read does not have; in eval mode a retained forward does too.
        request.seed = fresh_seed()
    given = Batch(normalize(inputs, "inputs"))
    batch = Batch(from_nested(given.inputs, "inputs"))
    uploads = Uploads(rpc, for_read=is_read)
    variant = variants.choose(batch, given, uploads.deadline, training=training, targets=False)
    codec.encode_value(uploads.send_apart((batch.inputs,))[0], request.inputs, "inputs")
    return request, uploads, variant
