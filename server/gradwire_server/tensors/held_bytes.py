"""How many bytes of uploads, downloads and datasets the service holds, and the bound."""

from __future__ import annotations

from gradwire_proto.errors import ResourceExhausted


class HeldBytes:
    """A count with a bound, which is the setting `setting`. whole: that of all owners, of which this is one's part."""

    def __init__(self, bound: int, setting: str = "held_bytes", whole: HeldBytes | None = None) -> None:
        self.bound = bound
        self.count = 0
        self._setting = setting
        self._whole = whole

    def reserve(self, nbytes: int) -> None:
        """Count `nbytes` more, or raise ResourceExhausted HELD_BYTES_EXHAUSTED."""
        self._check(nbytes)
        self.add(nbytes)

    def _check(self, nbytes: int) -> None:
        if self._whole is not None:
            self._whole._check(nbytes)
        if self.count + nbytes > self.bound:
            # Room comes when others have used or fetched theirs; for more than the bound it never comes.
            may_fit = nbytes <= self.bound
            raise ResourceExhausted(
                f"{nbytes} bytes do not fit: {self.count} are held, and the server's setting {self._setting} allows"
                f" {self.bound} for uploads, downloads and datasets together",
                reason="HELD_BYTES_EXHAUSTED",
                retryable=may_fit,
                retry_after=1.0 if may_fit else None,
            )

    def add(self, nbytes: int) -> None:
        """Count what is held already, bound or not."""
        if self._whole is not None:
            self._whole.add(nbytes)
        self.count += nbytes

    def release(self, nbytes: int) -> None:
        """Count `nbytes` less."""
        if self._whole is not None:
            self._whole.release(nbytes)
        self.count -= nbytes
