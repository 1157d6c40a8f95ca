"""Everything that is timed, as one table: `make bench`, and on a GPU `make bench-gpu`.

Each benchmark runs in a process of its own, as `python -m benchmarks.NAME` does, beside what it is compared with.
Bars that are missed are said, and are no failure; the exit code is 1 where a benchmark could not be measured.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from benchmarks import (
    by_k6,
    compiled,
    ddp,
    fit,
    gradients,
    idle,
    journal,
    load,
    load_tester,
    overhead,
    recovery,
    startup,
    steps,
    weights,
)
from benchmarks.benchmark import Benchmark, arguments, check_device
from benchmarks.report import Report, busyness, here, load_average, write
from benchmarks.rows import Row

BENCHMARKS: dict[str, Benchmark] = {
    "steps": steps.BENCHMARK,
    "fit": fit.BENCHMARK,
    "gradients": gradients.BENCHMARK,
    "compiled": compiled.BENCHMARK,
    "weights": weights.BENCHMARK,
    "ddp": ddp.BENCHMARK,
    "load": load.BENCHMARK,
    "startup": startup.BENCHMARK,
    "overhead": overhead.BENCHMARK,
    "journal": journal.BENCHMARK,
    "recovery": recovery.BENCHMARK,
    "idle": idle.BENCHMARK,
    "load_tester": load_tester.BENCHMARK,
    "by_k6": by_k6.BENCHMARK,
}
TARGETS = {"cpu": "make bench", "cuda": "make bench-gpu"}


def main() -> int:
    parser = arguments(__doc__, tuple(TARGETS))
    parser.prog = "benchmarks"
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument("--write", action="store_true", help="put the table into README.md and RESULTS.md")
    options = parser.parse_args()
    check_device(options.device)
    if options.write and options.only:
        parser.error("--write takes a whole run, whose figures have one date and commit: leave --only out")
    where, before, start = here(), load_average(), time.monotonic()
    names = options.only or [name for name, each in BENCHMARKS.items() if options.device in each.devices]
    if unfit := [name for name in names if options.device not in BENCHMARKS[name].devices]:
        parser.error(f"not measured on {options.device}: {', '.join(unfit)}")
    rows: list[Row] = []
    failed: list[str] = []
    for name in names:
        print(f"--- {name}, after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        # A process of its own: what one leaves in memory is not measured by the next.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                rows += process.submit(BENCHMARKS[name].run, options.rounds, options.device).result()
            except Exception as error:
                failed.append(f"{name} could not be measured: {type(error).__name__}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
    report = Report(where=f"{where}, {busyness(before, load_average())}", rows=rows, failed=failed)
    print(report.as_text())
    print(f"{time.monotonic() - start:.0f} s")
    if options.write:
        write(report, TARGETS[options.device])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
