"""What tests of journals put in, and find in their folder."""

from __future__ import annotations

from pathlib import Path

from gradwire_server.storage.journal import Journal


def fill(journal: Journal, entry, numbers) -> list:
    written = [entry(number) for number in numbers]
    for one in written:
        journal.reserve(len(one.request) + len(one.reply))
        assert journal.append(one) is None
    return written


def segments(model: Path) -> list[str]:
    return sorted(path.name for path in (model / "journal").iterdir())
