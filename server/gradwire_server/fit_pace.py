"""How many steps of a fit are one command."""

from __future__ import annotations

SECONDS = 0.1
"""What they should take: other requests of the model wait so long, and so much is lost of what runs when ranks die."""

MOST = 4096
"""Their losses fit into a stored reply."""

_GROWTH = 16
"""Steps of another size may come, and the first ones are slow."""


class Pace:
    """Learns from the steps before. `steps`: how many come next. The first goes alone: it may bring a new variant."""

    def __init__(self) -> None:
        self.steps = 1
        self.is_known = False
        """Whether it has learnt anything yet."""

    def took(self, steps: int, seconds: float) -> None:
        """So many steps took so many seconds on the ranks."""
        self.is_known = True
        fitting = int(SECONDS / max(seconds / max(steps, 1), 1e-6))
        self.steps = max(1, min(fitting, self.steps * _GROWTH, MOST))
