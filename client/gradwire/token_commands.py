"""`gradwire tokens`: makes, lists and revokes the tokens of a service, in the file that its setting `tokens` names."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from gradwire.errors import InvalidArgument
from gradwire.exit_codes import exit_codes
from gradwire_proto.token_file import SCOPES, TokenFile, TokenRecord

app = typer.Typer(help="The tokens of a service, in its file of them.", no_args_is_help=True)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

File = Annotated[
    Path,
    typer.Option(
        "--file", metavar="FILE", envvar="GRADWIRE_TOKENS", show_envvar=True, help="The file; made if missing."
    ),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What to call it: by this it is listed and revoked.")],
    file: File,
    owner: Annotated[str | None, typer.Option(help="Whose models it reaches. Default: its name.")] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(SCOPES), help="What it allows; each holds those before it. Default: train."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="90d", help="From now on: seconds, or with s, m, h, d, w. Default: never.")
    ] = None,
) -> None:
    """Make a token and print it: it is shown this once, and never kept. The service knows it within a second."""
    with exit_codes():
        lifetime = None if expires is None else _seconds(expires)
        token, record = TokenFile(file).create(name, owner or name, scope or ["train"], lifetime)
    typer.echo(token)
    typer.echo(f"{record.name}: {_scopes(record)}, owner {record.owner}, {_until(record)}", err=True)


@app.command("list")
def list_tokens(file: File, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the tokens: never themselves, only what is known of them."""
    with exit_codes():
        records = TokenFile(file).read()
    now = time.time()
    if as_json:
        typer.echo(json.dumps([_described(each, now) for each in records], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "id", "owner", "scopes", "state", "made", "expires")
    for each in records:
        expires = "never" if each.expires_at is None else _day(each.expires_at)
        table.add_row(each.name, each.id, each.owner, _scopes(each), each.state(now), _day(each.created_at), expires)
    Console(soft_wrap=True).print(table)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="Its name or id.")], file: File) -> None:
    """End a token for good. The service, which need not be restarted, refuses it within a second."""
    with exit_codes():
        ended = TokenFile(file).revoke(name)
    typer.echo(f"revoked {name}" if ended else f"{name} was revoked before", err=True)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text)
    if match is None:
        raise InvalidArgument(f"expected a time such as 90d or 3600, got {text!r:.40}", field="--expires")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _described(record: TokenRecord, now: float) -> dict[str, Any]:
    times = {name: getattr(record, name) for name in ("created_at", "expires_at", "revoked_at")}
    return {
        "name": record.name,
        "id": record.id,
        "owner": record.owner,
        "scopes": [scope for scope in SCOPES if scope in record.scopes],
        "state": record.state(now),
        **{name: None if value is None else _time(value).isoformat() for name, value in times.items()},
    }


def _scopes(record: TokenRecord) -> str:
    return ", ".join(scope for scope in SCOPES if scope in record.scopes)


def _until(record: TokenRecord) -> str:
    return "does not expire" if record.expires_at is None else f"expires {_day(record.expires_at)}"


def _day(seconds: float) -> str:
    return f"{_time(seconds):%Y-%m-%d %H:%M} UTC"


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(round(seconds), UTC)
