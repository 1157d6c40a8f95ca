"""A minute of what `make chaos` does for ten."""

from __future__ import annotations

import pytest
from chaos.run import run


@pytest.mark.timeout(300)
def test_a_minute_of_faults_changes_no_bit_and_loses_no_step() -> None:
    outcome = run(ranks_each=2, seconds=60.0, seed=11, pause=(3.0, 6.0))
    assert not outcome.wrong
    assert len({fault.kind for fault in outcome.faults}) == 7
    assert 2 * sum(fault.in_flight for fault in outcome.faults) >= len(outcome.faults)
