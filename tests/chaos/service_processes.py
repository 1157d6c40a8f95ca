"""The processes of an embedded service, by what they do."""

from __future__ import annotations

import psutil

RANK = "ray::RankActor"


def processes() -> list[psutil.Process]:
    """Every process of the services that this process has launched."""
    return psutil.Process().children(recursive=True)


def frontends() -> list[psutil.Process]:
    """The frontend: one process, or none while it is started again."""
    return [each for each in processes() if any(word.startswith("gradwire_server.main") for word in _words(each))]


def raylets() -> list[psutil.Process]:
    """Ray's daemon of the node."""
    return [each for each in processes() if _words(each)[:1] and _words(each)[0].endswith("/raylet/raylet")]


def ranks() -> list[psutil.Process]:
    """Every rank, those that wait for a model included."""
    return [each for each in processes() if _words(each)[:1] == [RANK]]


def serving_ranks() -> list[psutil.Process]:
    """The ranks that have joined others, as those of a model of several ranks have."""
    ports: dict[int, set[int]] = {}
    far: dict[int, set[int]] = {}
    found = ranks()
    for each in found:
        try:
            open_ones = [one for one in each.net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]
        except psutil.Error:
            continue
        ports[each.pid] = {one.laddr.port for one in open_ones}
        far[each.pid] = {one.raddr.port for one in open_ones}
    joined = {pid for pid in ports for other in ports if pid != other and ports[pid] & far[other]}
    return [each for each in found if each.pid in joined]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
