"""The rows of a fit in the order in which it takes them, epoch after epoch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from gradwire_proto.errors import InvalidArgument

ROW_BYTES = 4

MOST_ROWS = 1 << 27
"""Those whose order can be known: two epochs' orders, the next one's too, take a gibibyte then."""


class RowOrders:
    """See the module. `orders(rows, seeds)` gives an epoch's order for each seed, which is `seed` + epoch.

    Raises InvalidArgument where there are too many rows.
    """

    def __init__(
        self, orders: Callable[[int, Sequence[int]], Awaitable[list[bytes]]], *, rows: int, epochs: int, seed: int
    ) -> None:
        if rows > MOST_ROWS:
            message = f"expected at most {MOST_ROWS} rows to shuffle, got {rows}"
            raise InvalidArgument(message, field="shuffle", reason="DATASET_ROWS")
        self._ask = orders
        self._rows = rows
        self._epochs = epochs
        self._seed = seed
        self._known: dict[int, bytes] = {}

    async def between(self, start: int, stop: int) -> bytes:
        """Those from the `start`-th to before the `stop`-th, counted through all epochs. Earlier ones are forgotten."""
        epochs = range(start // self._rows, (stop - 1) // self._rows + 1)
        missing = [epoch for epoch in epochs if epoch not in self._known]
        if missing:
            # And as many of those that come next: who asks waits for its turn.
            missing += range(epochs.stop, min(epochs.stop + len(epochs), self._epochs))
        found = await self._ask(self._rows, [self._seed + epoch for epoch in missing]) if missing else []
        self._known = {epoch: order for epoch, order in self._known.items() if epoch >= epochs[0]}
        self._known.update(zip(missing, found, strict=True))
        parts = []
        for epoch in epochs:
            first = epoch * self._rows
            low, high = max(start - first, 0), min(stop - first, self._rows)
            parts.append(self._known[epoch][low * ROW_BYTES : high * ROW_BYTES])
        return b"".join(parts)
