"""Everything that PyTorch's own tests try, through the service and by plain torch: `make conformance`.

Prints what was refused and why, what came out wrong, and a table. The exit code is 1 if anything is wrong, or refused
though plain torch.export can trace it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from conformance import losses, module_database, optimizers, transformer_families
from conformance.case import Case, Outcome, check
from conformance.plain_export import can_export

import gradwire

GROUPS: dict[str, tuple[Callable[[torch.dtype], Iterator[Any]], Callable[[gradwire.Client, Any, int], Outcome]]] = {
    "modules": (module_database.cases, check),
    "losses": (losses.cases, check),
    "optimizers": (optimizers.cases, optimizers.check),
    "transformers": (transformer_families.cases, check),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float64"), default=["float64", "float32"])
    parser.add_argument("--every", type=int, default=1, help="take each so-many-th case only")
    parser.add_argument("--each", action="store_true", help="print what came of every case")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    table: Counter[tuple[str, str]] = Counter()
    begin = time.monotonic()
    with gradwire.launch(workers=max(options.ranks)) as client:
        for name in options.groups:
            cases_of, checked = GROUPS[name]
            for dtype in options.dtypes:
                for ranks in options.ranks:
                    row = f"{name}, {dtype}, {ranks} rank{'s' if ranks > 1 else ''}"
                    for case in itertools.islice(cases_of(getattr(torch, dtype)), 0, None, options.every):
                        outcome = checked(client, case, ranks)
                        column = _column(outcome)
                        if options.each and outcome.verdict == "passed":
                            print(f"{column}: {outcome.case.name}", flush=True)
                        table[row, column] += 1
    _print_table(table)
    print(f"{time.monotonic() - begin:.0f} s")
    return 1 if any(column in ("wrong", "refused") for _, column in table) else 0


def _column(outcome: Outcome) -> str:
    """Where the outcome counts; prints what needs a word."""
    if outcome.verdict == "passed":
        return f"passed{', ' + outcome.sharding if outcome.sharding else ''}"
    column = outcome.verdict
    is_program = isinstance(outcome.case, Case)
    if column == "refused" and is_program and (outcome.detail.startswith("by torch") or not can_export(outcome.case)):
        column = "refused, as by torch"
    print(f"{column}: {outcome.case.name}: {outcome.detail[:300]}", flush=True)
    return column


def _print_table(table: Counter[tuple[str, str]]) -> None:
    columns = ["passed", "passed, rows", "passed, whole", "refused, as by torch", "refused", "wrong"]
    rows = list(dict.fromkeys(row for row, _ in table))
    width = max(map(len, rows), default=0)
    print(" " * width + "".join(f"  {column:>20}" for column in columns))
    for row in rows:
        print(f"{row:{width}}" + "".join(f"  {table[row, column] or '-':>20}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
