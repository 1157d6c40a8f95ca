"""What a function is known by: one definition, for those who send functions and those who remember them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gradwire_proto.encoding.program_codec import encode_program
from gradwire_proto.values import Program, TensorData


def function_digest(
    program: Program,
    tensors: Mapping[str, TensorData],
    output_leaf: int = 0,
    *,
    pieces: Callable[[Any], Iterable[Any]] = lambda data: (data,),
) -> str:
    """SHA-256, in hex, of everything that a function's result depends on but its arguments.

    In this order: output_leaf and the length of the program's bytes, in decimal, each followed by a line feed; the
    program's message, serialized deterministically; then for every tensor, in the order of names, its name's length in
    bytes, its name, dtype, sizes with commas between them, and bytes: all but the last followed by a line feed.

    pieces: the bytes of `TensorData.data`, piece by piece, where they are not in memory.
    """
    serialized = encode_program(program).SerializeToString(deterministic=True)
    digest = hashlib.sha256(f"{output_leaf}\n{len(serialized)}\n".encode())
    digest.update(serialized)
    for name, tensor in sorted(tensors.items()):
        sizes = ",".join(map(str, tensor.shape))
        digest.update(f"{len(name.encode())}\n{name}\n{tensor.dtype}\n{sizes}\n".encode())
        for piece in pieces(tensor.data):
            digest.update(piece)
    return digest.hexdigest()
