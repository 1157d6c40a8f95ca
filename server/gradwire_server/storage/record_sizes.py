"""How many bytes of records lie behind a command, for whoever decides when a checkpoint is due."""

from __future__ import annotations

from array import array


class RecordSizes:
    """Of the commands from `first` on, one after the other."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._before = 0
        self._totals = array("Q")  # Up to each command, that one included.

    def add(self, nbytes: int, commands: int = 1) -> None:
        """The record of the next command has so many bytes, or that of so many commands that are one."""
        self._totals.extend([self._all + nbytes] * commands)

    def after(self, number: int) -> int:
        """Bytes of the records behind command `number`, as far as they are not forgotten."""
        count = min(number - self._first + 1, len(self._totals))
        return self._all - (self._totals[count - 1] if count > 0 else self._before)

    def forget(self, number: int) -> None:
        """The records up to command `number` no longer count."""
        count = min(number - self._first + 1, len(self._totals))
        if count > 0:
            self._before = self._totals[count - 1]
            self._first += count
            del self._totals[:count]

    @property
    def _all(self) -> int:
        return self._totals[-1] if self._totals else self._before
