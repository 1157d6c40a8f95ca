"""How many bytes of uploads, downloads and datasets the service holds, and the bound."""

from __future__ import annotations

from gradwire_proto.errors import ResourceExhausted


class HeldBytes:
    """A count with a bound, the setting held_bytes."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.count = 0

    def reserve(self, nbytes: int) -> None:
        """Count `nbytes` more, or raise ResourceExhausted HELD_BYTES_EXHAUSTED."""
        if self.count + nbytes > self.bound:
            # Room comes when others have used or fetched theirs; for more than the bound it never comes.
            may_fit = nbytes <= self.bound
            raise ResourceExhausted(
                f"{nbytes} bytes do not fit: {self.count} are held, and the server's setting held_bytes allows"
                f" {self.bound} for uploads, downloads and datasets together",
                reason="HELD_BYTES_EXHAUSTED",
                retryable=may_fit,
                retry_after=1.0 if may_fit else None,
            )
        self.count += nbytes

    def release(self, nbytes: int) -> None:
        """Count `nbytes` less."""
        self.count -= nbytes
