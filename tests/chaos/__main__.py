"""Training while processes are killed, stopped and cut off: `make chaos`.

Half of the time on two ranks a model, half on three. Prints faults by kind, what they cost, and every promise that was
broken; the exit code is 1 if there is any. The same seed strikes in the same order.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter

import torch
from chaos.faults import Fault
from chaos.report import hit_by, lost_share, quantile, stall, stalls
from chaos.run import Outcome, run

LEAST_OF_EACH = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of all phases together")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", action="store_true", help="print every fault, too")
    parser.add_argument("--pause", nargs=2, type=float, default=[5.0, 15.0], help="least and most seconds between two")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    outcomes = []
    for index, ranks in enumerate(options.ranks):
        seconds = options.seconds / len(options.ranks)
        outcome = run(ranks_each=ranks, seconds=seconds, seed=options.seed + index, pause=tuple(options.pause))
        _print(outcome)
        if options.each:
            _print_each(outcome)
        outcomes.append(outcome)
    wrong = [each for outcome in outcomes for each in outcome.wrong] + _too_few(outcomes)
    for each in wrong:
        print(f"WRONG: {each}")
    print("all promises were kept" if not wrong else f"{len(wrong)} promises were broken")
    return 1 if wrong else 0


def _print(outcome: Outcome) -> None:
    taken = stalls(outcome.faults, outcome.made)
    steps = ", ".join(str(len(made)) for made in outcome.made)
    print(f"{outcome.ranks} ranks a model, {outcome.seconds:.0f} s: {len(outcome.faults)} faults, steps {steps}")
    for kind, seconds in sorted(taken.items()):
        in_flight = sum(fault.in_flight for fault in outcome.faults if fault.kind == kind)
        half, most = quantile(seconds, 0.5), quantile(seconds, 0.99)
        print(f"  {kind:18} {len(seconds):3} ({in_flight} in a command)  stall p50 {half:6.2f} s  p99 {most:6.2f} s")
    shares = ", ".join(f"{lost_share(made):.1%}" for made in outcome.made if made)
    print(f"  share of time lost: {shares}")
    if outcome.refused:
        print(f"  refused, not applied, and asked again: {dict(outcome.refused)}")
    if outcome.missed:
        print(f"  nobody to strike: {dict(Counter(outcome.missed))}", flush=True)


def _print_each(outcome: Outcome) -> None:
    begin = min(made[0].begin for made in outcome.made if made)
    for fault in outcome.faults:
        taken = "  ".join(f"{stall(fault, made):6.2f}" for made in outcome.made)
        print(f"    at {fault.at - begin:6.1f} s  {fault.kind:18}  stalls {taken}")
        print(f"                of that the service's recovery  {_recoveries(fault, outcome)}", flush=True)


def _recoveries(fault: Fault, outcome: Outcome) -> str:
    hit = [max((each.recovery for each in hit_by(fault, made)), default=0.0) for made in outcome.made]
    return "  ".join(f"{recovery:6.2f}" for recovery in hit)


def _too_few(outcomes: list[Outcome]) -> list[str]:
    """What keeps the run from saying anything."""
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    counted = Counter(fault.kind for fault in faults)
    few = [f"only {count} faults of the kind {kind!r}" for kind, count in counted.items() if count < LEAST_OF_EACH]
    if len(counted) < 7:
        few.append(f"only the kinds {', '.join(counted)}")
    if 2 * sum(fault.in_flight for fault in faults) < len(faults):
        few.append("fewer than half of the faults came while a command was in flight")
    return few


if __name__ == "__main__":
    sys.exit(main())
