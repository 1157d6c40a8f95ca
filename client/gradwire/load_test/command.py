"""`gradwire load-test`: what it takes on the command line, and what becomes of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradwire.errors import InvalidArgument

if TYPE_CHECKING:
    from gradwire.client import Client
    from gradwire.load_test.options import Options
    from gradwire.load_test.results import Results
    from gradwire.tls import TLS

_DEFAULT_CONCURRENCY = "1,2,4,8"

_WIDTH = 120


def load_test(
    target: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", envvar="GRADWIRE_TARGET", help="The service; without one, an embedded one is launched."
        ),
    ] = None,
    token: Annotated[str | None, typer.Option(envvar="GRADWIRE_TOKEN", help="What proves who calls.")] = None,
    use_tls: Annotated[bool, typer.Option("--tls", help="Encrypt, and trust the system's certificates.")] = False,
    tls_ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Encrypt, and trust these certificates.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate of the tester.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(metavar="N|A,B|FROM:TO:STEP", help="Requests in flight (closed loop). Default: 1,2,4,8."),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(metavar="N|A,B|FROM:TO:STEP", help="Requests due each second, answered or not (open loop)."),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(metavar="constant|poisson", help="How requests of a rate come.")
    ] = "constant",
    models: Annotated[int, typer.Option(metavar="N", help="How many models to create; deleted at the end.")] = 1,
    model: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Use this model instead; repeatable.")] = None,
    workers: Annotated[int, typer.Option(metavar="N", help="Ranks of each model that is created.")] = 2,
    clients: Annotated[int, typer.Option(metavar="N", help="Connections.")] = 1,
    method: Annotated[
        str, typer.Option(metavar="compute_gradients|train_step|forward", help="What to ask for.")
    ] = "compute_gradients",
    shape: Annotated[
        str, typer.Option(metavar="small|medium", help="Of models that are created: 32,64,10 or 784,1024,10.")
    ] = "small",
    layers: Annotated[str | None, typer.Option(metavar="A,B,...", help="Their layers' sizes instead.")] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Rows of each request.")] = 32,
    warm_up: Annotated[float, typer.Option(metavar="SECONDS", help="Of each level, not measured.")] = 1.0,
    window: Annotated[float, typer.Option(metavar="SECONDS", help="How long one measurement is.")] = 2.0,
    max_windows: Annotated[int, typer.Option(metavar="N", help="How many a level has at most.")] = 10,
    stable: Annotated[
        float, typer.Option(metavar="PART", help="A level ends when three windows are as close to their mean.")
    ] = 0.10,
    percentile: Annotated[
        float | None, typer.Option(metavar="P", help="The latency for --stable and --latency-limit. Default: the mean.")
    ] = None,
    latency_limit: Annotated[
        float | None, typer.Option(metavar="MS", help="End the sweep after a level that is slower.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Halve the levels for the highest within --latency-limit.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Of each request; it is not repeated.")] = 30.0,
    floor: Annotated[bool, typer.Option("--floor", help="Measure a bare gRPC echo of the same sizes too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a level is not stable.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a line for each level.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report with plots.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of Poisson arrivals and of batches.")] = 0,
) -> None:
    """Measure how many requests a service takes and how long they wait, level by level.

    At a rate, latencies count from when a request was due: a stall is charged to all who would have come meanwhile.
    Exit codes: 0 done; 1 requests failed, or --strict and a level is not stable; 2 wrong use; 3 no service answers.
    """
    from gradwire.load_test.loads import parse_loads
    from gradwire.load_test.options import SHAPES, Options, check_writable, parse_layers

    files = {"--csv": csv, "--json": json, "--html": html}
    for name, path in files.items():
        check_writable(path, name)
    if concurrency is not None and rate is not None:
        raise InvalidArgument("give --concurrency or --rate", field="--rate", reason="OPTION_INVALID")
    if layers is None and shape not in SHAPES:
        raise InvalidArgument(f"expected one of {', '.join(SHAPES)}", field="--shape", reason="OPTION_INVALID")
    if model and target is None:
        message = "a service that is launched for the test has no models: name its --target"
        raise InvalidArgument(message, field="--model", reason="OPTION_INVALID")
    options = Options(
        loads=parse_loads("rate", rate) if rate else parse_loads("concurrency", concurrency or _DEFAULT_CONCURRENCY),
        arrivals=arrivals,
        models=models,
        model_ids=tuple(model or ()),
        workers=workers,
        clients=clients,
        method=method,
        layers=parse_layers(layers) if layers else SHAPES[shape],
        batch=batch,
        warm_up=warm_up,
        window=window,
        max_windows=max_windows,
        stable=stable,
        percentile=percentile,
        latency_limit=latency_limit,
        search=search,
        timeout=timeout,
        seed=seed,
        floor=floor,
    )
    tls = _tls(use_tls, tls_ca, tls_certificate, tls_key)
    results = _run(options, target, token, tls, files)
    failed = any(level.errors for level in results.levels)
    if failed or (strict and not all(level.stable for level in results.levels)):
        raise typer.Exit(1)


def _tls(use: bool, ca: Path | None, certificate: Path | None, key: Path | None) -> TLS | None:
    from gradwire.tls import TLS

    return TLS(ca=ca, certificate=certificate, key=key) if use or ca or certificate or key else None


def _run(
    options: Options, target: str | None, token: str | None, tls: TLS | None, files: dict[str, Path | None]
) -> Results:
    """Run the test, print its table and write its files, those of a test that Ctrl-C ends too."""
    from rich.console import Console
    from rich.live import Live

    from gradwire.load_test.levels import Level
    from gradwire.load_test.results import Results
    from gradwire.load_test.sweep import run_sweep
    from gradwire.load_test.tables import line

    levels: list[Level] = []
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    # Drawn when there is something new alone: a thread of its own would take the tester's time.
    with ExitStack() as stack:
        stack.enter_context(_sigterm_as_interrupt())
        live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))

        def progress(text: str) -> None:
            if console.is_terminal:
                live.update(text, refresh=True)

        def found(level: Level) -> None:
            levels.append(level)
            console.print(line(level))

        progress("launching a service" if target is None else f"connecting to {target}")
        client = stack.enter_context(_client(options, target, token, tls))
        results = Results(
            target=client.target, options=options, started=time.time(), levels=levels, is_embedded=target is None
        )
        # Before the service ends: Ctrl-C loses nothing of what was measured.
        stack.callback(_show, results, files)
        stack.callback(live.stop)
        run_sweep(
            client, options, token=token, tls=tls, found=found, progress=progress, warn=lambda text: console.print(text)
        )
    return results


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Who ends the test by SIGTERM finds no models left over either."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _client(options: Options, target: str | None, token: str | None, tls: TLS | None) -> Client:
    # Without shared memory: what is measured is one message there, and one back.
    if target is None:
        from gradwire.embedded_service import launch

        return launch(workers=options.models * options.workers, shared_memory=False)
    from gradwire.client import connect

    return connect(target, token=token, tls=tls, shared_memory=False)


def _show(results: Results, files: dict[str, Path | None]) -> None:
    """Print the tables and write the files, where a level was measured."""
    from rich.console import Console

    from gradwire.load_test.html_report import as_html
    from gradwire.load_test.results import as_csv, as_json
    from gradwire.load_test.sweep import is_beyond
    from gradwire.load_test.tables import errors_table, levels_table, split_table

    if not results.levels:
        return
    results = replace(results, levels=sorted(results.levels, key=lambda level: level.load.value))
    # Wide enough for all columns: a figure that is cut off is none.
    console = Console(soft_wrap=True, highlight=False, width=max(_WIDTH, Console().width))
    for table in (levels_table(results.levels), split_table(results.levels), errors_table(results.levels)):
        if table is not None:
            console.print(table, "")
    if results.options.search:
        within = [str(level.load) for level in results.levels if not is_beyond(level, results.options)]
        console.print(f"highest within the limit: {within[-1] if within else 'none'}")
    for name, write in (("--csv", as_csv), ("--json", as_json), ("--html", as_html)):
        path = files[name]
        if path is not None:
            path.write_text(write(results))
            console.print(f"{name.removeprefix('--')}: {path.absolute()}")
