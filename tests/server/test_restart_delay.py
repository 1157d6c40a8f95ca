"""How long the supervisor waits before it starts a dead process again."""

from __future__ import annotations

from gradwire_server.processes.restart_delay import RestartDelay


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pauses_double_with_every_quick_death_up_to_the_bound() -> None:
    clock = Clock()
    delay = RestartDelay(shortest=0.1, longest=1.0, long_life=60, clock=clock)
    pauses = []
    for _ in range(6):
        clock.now += 1
        pauses.append(delay.after_death())
        clock.now += pauses[-1]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_a_long_life_starts_over_and_the_pause_does_not_count_as_life() -> None:
    clock = Clock()
    delay = RestartDelay(shortest=40, longest=1000, long_life=60, clock=clock)
    clock.now += 1
    assert delay.after_death() == 40
    clock.now += 40 + 59
    assert delay.after_death() == 80
    clock.now += 80 + 60
    assert delay.after_death() == 40
