"""Which commands a rank has applied to its model, and whether the model is whole: what decides who may be a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gradwire_proto.errors import GradwireError

Fields = Mapping[str, Any]

T = TypeVar("T")

NUMBER = "number"
"""The field of a command that changes the model: the how many-th of its group it is, from 1."""


@dataclass(slots=True, kw_only=True)
class RankStanding:
    """applied: the number of the last changing command that was carried out. torn: one failed halfway on this rank."""

    applied: int = 0
    torn: bool = False

    def carry_out(self, command: Callable[[Fields], T], fields: Fields) -> T:
        """The command's answer. Once it is there, the command is applied, whatever becomes of its answer."""
        number = fields.get(NUMBER)
        try:
            answer = command(fields)
        except BaseException as error:
            # What refuses a command has put everything back. Of any other failure nobody knows.
            is_refusal = isinstance(error, GradwireError) and error.outcome == "not_applied"
            self.torn |= number is not None and not is_refusal
            raise
        if number is not None:
            self.applied = number
        return answer
