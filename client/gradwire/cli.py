"""The command line: `gradwire serve`, `tokens`, `models`, `checkpoints`, `load-test`, `demo`.

Exit codes: 0 done; 1 failed; 2 wrong use; 3 the service cannot be reached; 4 no such thing. What a command prints on
stdout is its result; everything else goes to stderr. Commands import what they need when they run, so that `--help`
is quick.
"""

from __future__ import annotations

import json
import os
import sys
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gradwire.command_connection import connected
from gradwire.exit_codes import FAILED, exit_codes
from gradwire.load_test.command import load_test
from gradwire.token_commands import app as tokens

if TYPE_CHECKING:
    from gradwire.client import Client

_DEMO_ACCURACY = 0.97

app = typer.Typer(
    name="gradwire", help="Train PyTorch models on a service.", no_args_is_help=True, pretty_exceptions_enable=False
)
models = typer.Typer(help="The models of a running service.", no_args_is_help=True)
app.add_typer(models, name="models")
checkpoints = typer.Typer(help="The checkpoints of a running service.", no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoints")
app.add_typer(tokens, name="tokens")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
CheckpointName = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT", help="Its name; MODEL/NUMBER of one that the service took by itself."),
]
ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="The model's id.")]


def main() -> NoReturn:
    """The `gradwire` command. Never returns."""
    app()
    sys.exit(0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 picks one.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="How many ranks models may hold together.")] = None,
    storage: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder that keeps models and log files.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings from a TOML file.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Join this Ray instead of starting one.")
    ] = None,
    insecure_listen_anywhere: Annotated[
        bool, typer.Option("--insecure-listen-anywhere", help="Let other machines in, without TLS or a token.")
    ] = False,
    all_settings: Annotated[bool, typer.Option("--all-settings", help="List every setting and exit.")] = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C, which let running requests end first.

    Prints `gradwire listening on HOST:PORT` when it takes calls. Further --settings are passed on; every setting can
    also be given as GRADWIRE_<SETTING> in the environment or in the file. Exit codes: 0 drained, 1 failed, 2 usage.
    """
    with exit_codes():
        from gradwire.embedded_service import require_server

        require_server()
    given = {"listen": listen, "workers": workers, "storage": storage, "config": config, "ray-address": ray_address}
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    flags += ["--insecure-listen-anywhere"] if insecure_listen_anywhere else []
    arguments = ["--help"] if all_settings else [*flags, *context.args]
    sys.stdout.flush()
    # This process becomes the service, so that signals and exit codes are the service's own.
    os.execv(sys.executable, [sys.executable, "-m", "gradwire_server.supervisor", *arguments])


@models.command("list")
@connected
def list_models(client: Client, as_json: Json = False) -> None:
    """List the models."""
    from gradwire.model_tables import models_table, summary

    infos = client.list_models()
    if as_json:
        _print_json([summary(info) for info in infos])
    else:
        _print_table(models_table(infos))


@models.command()
@connected
def show(client: Client, model: ModelId, as_json: Json = False) -> None:
    """Describe one model."""
    from gradwire.model_tables import model_table, summary

    info = client.get_model(model).info()
    if as_json:
        _print_json(summary(info))
    else:
        _print_table(model_table(info))


@models.command()
@connected
def delete(client: Client, model: ModelId) -> None:
    """Delete a model: its ranks are freed and its weights are gone."""
    client.get_model(model).delete()
    typer.echo(f"deleted {model}", err=True)


@checkpoints.command("list")
@connected
def list_checkpoints(client: Client, as_json: Json = False) -> None:
    """List the checkpoints."""
    from gradwire.checkpoint_tables import checkpoints_table, summary

    found = client.list_checkpoints()
    if as_json:
        _print_json([summary(each) for each in found])
    else:
        _print_table(checkpoints_table(found))


@checkpoints.command("show")
@connected
def show_checkpoint(client: Client, checkpoint: CheckpointName, as_json: Json = False) -> None:
    """Describe one checkpoint."""
    from gradwire.checkpoint_tables import checkpoint_table, summary

    found = client.get_checkpoint(checkpoint)
    if as_json:
        _print_json(summary(found))
    else:
        _print_table(checkpoint_table(found))


@checkpoints.command("delete")
@connected
def delete_checkpoint(client: Client, checkpoint: CheckpointName) -> None:
    """Delete a checkpoint: its files are gone. Models that were made of it live on."""
    client.delete_checkpoint(checkpoint)
    typer.echo(f"deleted {checkpoint}", err=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for what the demo makes.")] = Path("gradwire-demo"),
    workers: Annotated[int, typer.Option(min=1, help="Ranks to train on.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 12,
) -> None:
    """Train a small network on handwritten digits, on a service of its own. Fails below 97% accuracy."""
    with exit_codes():
        from gradwire.demo import run_demo

        accuracy = run_demo(output=output, workers=workers, epochs=epochs)
    if accuracy < _DEMO_ACCURACY:
        raise typer.Exit(FAILED)


@app.command("load-test")
@wraps(load_test)
def _load_test(**options: Any) -> None:
    with exit_codes():
        load_test(**options)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_table(table: object) -> None:
    from rich.console import Console

    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
