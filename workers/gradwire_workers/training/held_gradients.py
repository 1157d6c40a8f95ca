"""The gradients that a rank holds between backward and update: its part of them, to be summed over ranks when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.training.gradients import add_up


class HeldGradients:
    """One gradient, or None, for each of `parameters`. Made without any."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._parts: list[Tensor | None] | None = None

    def __bool__(self) -> bool:
        """Whether any were added since they were last dropped; the same on every rank."""
        return self._parts is not None

    @property
    def parts(self) -> list[Tensor | None] | None:
        """This rank's part of each, live; None where none were added."""
        return self._parts

    def plus(self, gradients: Mapping[Tensor, Tensor | None]) -> list[Tensor | None]:
        """The parts with these added, in memory of their own where both are there. Changes nothing."""
        before = self._parts or [None] * len(self._parameters)
        return [_sum(old, gradients.get(each)) for each, old in zip(self._parameters, before, strict=True)]

    def hold(self, parts: list[Tensor | None]) -> None:
        """Hold these in place of those that are held."""
        self._parts = parts

    def of_only(self, parameters: Sequence[nn.Parameter]) -> HeldGradients:
        """Those of `parameters`, in that order: none of one that was not among these."""
        chosen = HeldGradients(parameters)
        if self._parts is not None:
            parts = dict(zip(self._parameters, self._parts, strict=True))
            chosen.hold([parts.get(each) for each in parameters])
        return chosen

    def drop(self) -> None:
        """Hold none."""
        self._parts = None

    def put(self, given: Mapping[nn.Parameter, Tensor | None], groups: ProcessGroups | None) -> None:
        """Hold these sums over all ranks in place of the parts of the same parameters. Every rank must get the same."""
        parts = self._parts or [None] * len(self._parameters)
        # In memory of their own; the sum of one rank's part and nothing is that part.
        is_first = groups is None or groups.rank == 0
        new = {each: None if value is None or not is_first else value.clone() for each, value in given.items()}
        self._parts = [
            new.get(each) if each in new else part for each, part in zip(self._parameters, parts, strict=True)
        ]

    def summed(self, groups: ProcessGroups | None) -> list[Tensor | None]:
        """The sums over all ranks; those that are held themselves where there is one rank."""
        parts: list[Tensor | None] = self._parts or [None for _ in self._parameters]
        return parts if groups is None else add_up(parts, self._parameters, groups)


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
