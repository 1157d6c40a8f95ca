"""Which parameters belong to which group of an optimizer: told by names and globs, each parameter in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import ParameterGroupSpec
from gradwire_workers.training.tensor_names import matches


def group_parameters(
    groups: Sequence[ParameterGroupSpec],
    parameters: Mapping[str, nn.Parameter],
    aliases: Mapping[str, nn.Parameter],
    *,
    field: str,
) -> dict[int | None, list[str]]:
    """Names of parameters by the index of their group: first None, for those that no group matches, if there are any.

    `parameters`: those to be spread, each under one name. `aliases`: all parameters under every name that they have;
    tied ones are matched by any of theirs, and are one.

    Raises InvalidArgument: NO_MATCH, PARAMETER_FROZEN where all that a pattern matches is frozen, GROUPS_OVERLAP.
    """
    name_of = {parameter: name for name, parameter in parameters.items()}
    group_of: dict[str, int] = {}
    for index, group in enumerate(groups):
        where = f"{field}.groups[{index}].pattern"
        matched = dict.fromkeys(aliases[name] for name in matches(group.pattern, aliases, where))
        names = [name_of[parameter] for parameter in matched if parameter in name_of]
        if not names:
            raise InvalidArgument(
                f"{group.pattern[:200]!r} matches no parameter that requires a gradient",
                field=where,
                reason="PARAMETER_FROZEN",
            )
        for name in names:
            if name in group_of:
                raise InvalidArgument(
                    f"{name!r} is in groups[{group_of[name]}] already, by"
                    f" {groups[group_of[name]].pattern[:200]!r}; a parameter can be in one group only",
                    field=where,
                    reason="GROUPS_OVERLAP",
                )
            group_of[name] = index
    members: dict[int | None, list[str]] = {None: [name for name in parameters if name not in group_of]}
    for index in range(len(groups)):
        members[index] = [name for name in parameters if group_of.get(name) == index]
    return {index: names for index, names in members.items() if names}
