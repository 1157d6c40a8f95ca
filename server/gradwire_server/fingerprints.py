"""What tells one request from another: a short digest of its method and message."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path

import xxhash

_OLD_BYTES = 32


def fingerprint(method: str, raw: bytes | memoryview) -> bytes:
    """16 bytes: XXH3-128, which reads faster than memory gives. It finds mistakes and damage, not forgeries."""
    digest = xxhash.xxh3_128(method.encode())
    digest.update(raw)
    return digest.digest()


def file_fingerprint(path: Path) -> bytes:
    """The same of what is in a file, whose pages are not copied. Raises OSError. Blocks."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return fingerprint("", b"")
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            return xxhash.xxh3_128(pages).digest()


def fits(known: bytes, body: bytes, method: str, raw: bytes | memoryview) -> bool:
    """Whether `known`, perhaps stored by an older version, is of the request whose fingerprint is `body`."""
    if len(known) == _OLD_BYTES:
        return known == hashlib.sha256(method.encode() + raw).digest()
    return known == body
