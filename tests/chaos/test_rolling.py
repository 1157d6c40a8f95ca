"""Half a minute of what `python -m chaos.rolling` does for five."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.rolling import roll


@pytest.mark.timeout(240)
def test_restarts_in_a_row_fail_no_call_and_lose_no_step(tmp_path: Path) -> None:
    outcome = roll(seconds=30.0, every=8.0, storage=tmp_path / "storage", clients=2)
    assert not outcome.wrong
    assert len(outcome.stops) >= 2 and max(outcome.stops) < 20.0
    assert min(len(made) for made in outcome.made) > 100 and len(outcome.calls) > 100
