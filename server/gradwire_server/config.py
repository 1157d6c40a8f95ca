"""The service's settings: read once, from flags, the environment and a file, in this order of precedence."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ByteSize, DirectoryPath, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings.exceptions import SettingsError

from gradwire_proto.values import Limits
from gradwire_server.keeping import Keeping

ENVIRONMENT_PREFIX = "GRADWIRE_"
CONFIG_FILE_VARIABLE = "GRADWIRE_CONFIG"

_DEFAULTS = Limits()


class ConfigError(ValueError):
    """A setting is wrong. One line that names the setting, where it came from, and the bound."""


def _checked_address(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("should be HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:50051 or [::]:0")
    return value


Address = Annotated[str, AfterValidator(_checked_address)]
Folder = Annotated[DirectoryPath, AfterValidator(Path.resolve)]


class ServerConfig(BaseSettings):
    """Every setting of the service. In files and here `a_name`, in the environment GRADWIRE_A_NAME, as a flag --a-name.

    Sizes are bytes and take units: 67108864, "64MiB". Times are seconds.
    """

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True)

    listen: Address = Field("127.0.0.1:50051", description="HOST:PORT to serve on; port 0 picks a free one")
    tls_certificate: Path | None = Field(None, description="PEM file of the port's certificate and its chain")
    tls_key: Path | None = Field(None, description="PEM file of its key")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the authority that clients' certificates must be signed by; none: they need none"
    )
    tokens: Path | None = Field(
        None, description="file of `gradwire tokens`, one of which every call must bring; none: everybody may call"
    )
    insecure_listen_anywhere: bool = Field(
        False,
        description="let other machines in without TLS and tokens: whoever reaches the port can use the service and"
        " read its traffic",
    )
    health_listen: Address | None = Field(
        None,
        description="HOST:PORT that answers health checks (grpc.health.v1) and nothing else, in plain text whatever the"
        " other port needs; none: only that one does",
    )
    connection_age_seconds: float | None = Field(
        None,
        ge=1,
        le=86400 * 365,
        description="how old a connection may get before its client is told to make another; none: any age",
    )
    connection_age_grace_seconds: float = Field(
        60.0, ge=1, le=86400, description="how long the calls of a connection of that age may go on before they are cut"
    )
    workers: int = Field(2, ge=1, le=4096, description="ranks that models may hold together")
    storage: Path | None = Field(
        None,
        description="folder that keeps models, checkpoints and log files, and another service finds them in; none: a"
        " temporary one",
    )
    checkpoint_url: str | None = Field(
        None,
        min_length=1,
        description="folder or fsspec URL, which services may share, that keeps checkpoints; none:"
        " checkpoints/ in the storage",
    )
    durability: Literal["none", "process", "disk"] = Field(
        "process", description="what answered commands outlive: nothing, every process, or the machine"
    )
    checkpoint_commands: int = Field(
        1000, ge=1, le=1_000_000, description="commands of a model from one checkpoint to the next, at most"
    )
    checkpoint_bytes: ByteSize = Field(
        ByteSize(256 << 20), ge=1 << 20, description="bytes of journal from one checkpoint to the next, at most"
    )
    checkpoint_seconds: float = Field(
        60.0, gt=0, le=86400, description="how long a change of a model may wait for a checkpoint"
    )
    keep_checkpoints: int = Field(2, ge=1, le=1000, description="automatic checkpoints kept of each model")
    ray_address: Address | None = Field(None, description="HOST:PORT of a running Ray; none: start one")
    ray_namespace: str = Field("gradwire", pattern=r"^[a-z][a-z0-9-]{0,62}$", description="Ray namespace of the ranks")
    spare_ranks: int = Field(2, ge=0, le=256, description="warm rank processes kept for lost ranks and the next model")
    threads_per_rank: int = Field(0, ge=0, le=1024, description="torch threads of each rank; 0: cores / workers")
    runtime_dir: Path | None = Field(None, description="private folder for sockets; none: a temporary one")
    shared_memory_dir: Path | None = Field(
        None, description="private folder in shared memory for large tensors; none: a temporary one in /dev/shm"
    )
    shared_memory: bool = Field(
        True,
        description="whether clients on this machine may share memory and make calls past gRPC; only of a service"
        " that listens on loopback",
    )
    weights_folder: Folder | None = Field(
        None,
        description="folder of safetensors from which architectures may take their first weights; none: they may not",
    )
    drain_seconds: float = Field(30.0, ge=0, le=86400, description="how long a stopping service waits for requests")
    grace_seconds: float | None = Field(
        None,
        ge=1,
        le=86400 * 2,
        description="how long its end may take in all, the wait for requests and a last checkpoint of every model"
        " included; none: drain_seconds and 15 more",
    )
    checkpoint_at_stop: bool = Field(
        True,
        description="whether a stopping service takes a last checkpoint of every model that has changed: the next one"
        " is ready sooner",
    )
    delete_seconds: float = Field(
        3.0, ge=0, le=86400, description="how long a running command of a deleted model may take; then its ranks end"
    )
    stall_seconds: float = Field(
        60.0, gt=0, le=86400, description="how long an upload or download may stand still before it is cut"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is written to stderr")

    message_bytes: ByteSize = Field(
        ByteSize(_DEFAULTS.message_bytes), ge=64 << 10, le=(2 << 30) - 1, description="bytes of one message"
    )
    tensor_bytes: ByteSize = Field(ByteSize(_DEFAULTS.tensor_bytes), ge=1, description="bytes of one tensor")
    graph_nodes: int = Field(_DEFAULTS.graph_nodes, ge=1, description="nodes of one graph, its subgraphs included")
    model_bytes: ByteSize = Field(ByteSize(_DEFAULTS.model_bytes), ge=1, description="bytes of one model's tensors")
    models: int = Field(_DEFAULTS.models, ge=1, description="models at once")
    requests_in_flight: int = Field(_DEFAULTS.requests_in_flight, ge=1, description="requests in flight, all models")
    requests_per_model: int = Field(
        _DEFAULTS.requests_per_model, ge=1, description="requests that wait or run on one model"
    )
    owner_models: int | None = Field(None, ge=1, description="models of one owner at once; none: as many as of all")
    owner_workers: int | None = Field(None, ge=1, description="ranks that one owner's models may hold; none: all")
    owner_requests_in_flight: int | None = Field(
        None, ge=1, description="requests of one owner in flight; none: as many as of all"
    )
    owner_held_bytes: ByteSize | None = Field(
        None, ge=1, description="bytes of uploads, downloads and datasets of one owner; none: as many as of all"
    )
    held_bytes: ByteSize = Field(
        ByteSize(_DEFAULTS.held_bytes), ge=1, description="bytes of uploads, downloads and datasets that are held"
    )
    variants: int = Field(_DEFAULTS.variants, ge=1, description="variants of one model")
    held_seconds: float = Field(
        _DEFAULTS.held_seconds, gt=0, le=86400, description="how long an unused upload or download is kept"
    )
    retained_bytes: ByteSize = Field(
        ByteSize(_DEFAULTS.retained_bytes), ge=1, description="bytes that one model's retained forwards keep, all ranks"
    )
    retained_forwards: int = Field(_DEFAULTS.retained_forwards, ge=1, description="retained forwards of one model")
    retained_seconds: float = Field(
        _DEFAULTS.retained_seconds, gt=0, le=86400, description="how long an unused retained forward is kept"
    )
    stored_replies: int = Field(
        1024, ge=1, le=1_000_000, description="commands of one model whose replies are kept for repeats"
    )

    @property
    def grace(self) -> float:
        """Seconds that the end of the service may take in all."""
        return self.drain_seconds + 15.0 if self.grace_seconds is None else self.grace_seconds

    @property
    def shares_memory(self) -> bool:
        """Whether clients may share memory with the service: those on its own machine, and it serves no others."""
        host = self.listen.rpartition(":")[0]
        return self.shared_memory and (host in ("localhost", "[::1]") or host.startswith("127."))

    @property
    def limits(self) -> Limits:
        """The limits alone, as clients see them."""
        return Limits(
            message_bytes=int(self.message_bytes),
            tensor_bytes=int(self.tensor_bytes),
            graph_nodes=self.graph_nodes,
            model_bytes=int(self.model_bytes),
            models=self.models,
            requests_in_flight=self.requests_in_flight,
            requests_per_model=self.requests_per_model,
            held_bytes=int(self.held_bytes),
            variants=self.variants,
            held_seconds=self.held_seconds,
            retained_bytes=int(self.retained_bytes),
            retained_forwards=self.retained_forwards,
            retained_seconds=self.retained_seconds,
        )

    @property
    def owner_limits(self) -> Limits:
        """The limits of one owner."""
        limits = self.limits
        return replace(
            limits,
            models=_least(limits.models, self.owner_models),
            requests_in_flight=_least(limits.requests_in_flight, self.owner_requests_in_flight),
            held_bytes=_least(limits.held_bytes, self.owner_held_bytes),
        )

    @property
    def keeping(self) -> Keeping:
        """How models are kept where they do not say so themselves."""
        return Keeping(
            durability=self.durability,
            checkpoint_commands=self.checkpoint_commands,
            checkpoint_bytes=int(self.checkpoint_bytes),
            checkpoint_seconds=self.checkpoint_seconds,
            keep_checkpoints=self.keep_checkpoints,
        )

    def flags(self) -> list[str]:
        """The settings that differ from the defaults, as flags that `read_config` takes."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return [f"{_flag(name)}={value}" for name, value in changed.items() if value is not None]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        file = init_settings.init_kwargs.pop("config_file", None)
        sources = (init_settings, env_settings)
        return (*sources, TomlConfigSettingsSource(settings_cls, file)) if file else sources


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` --config and a flag for every setting."""
    parser.add_argument("--config", metavar="FILE", help="a TOML file of settings (also $GRADWIRE_CONFIG)")
    for name, setting in ServerConfig.model_fields.items():
        default = "none" if setting.default is None else setting.default
        # One that is true or false may be named alone.
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if setting.annotation is bool else {}
        parser.add_argument(
            _flag(name), metavar=name.upper(), default=None, help=f"{setting.description} (default: {default})", **alone
        )


def config_from_flags(flags: argparse.Namespace) -> ServerConfig:
    """The settings of parsed flags (see `add_flags`), the environment and the file. Raises ConfigError."""
    given = {name: getattr(flags, name) for name in ServerConfig.model_fields}
    return load_config(flags.config, {name: value for name, value in given.items() if value is not None})


def read_config(arguments: Sequence[str], program: str) -> ServerConfig:
    """The settings of a command line, the environment and the file. Raises ConfigError; --help exits."""
    # allow_abbrev off: an abbreviation that is unique today is another setting's name tomorrow.
    parser = argparse.ArgumentParser(prog=program, description="The gradwire service.", allow_abbrev=False)
    add_flags(parser)
    return config_from_flags(parser.parse_args(arguments))


def load_config(file: str | Path | None, settings: dict[str, Any]) -> ServerConfig:
    """`settings` over the environment over `file` (where None: $GRADWIRE_CONFIG). Raises ConfigError."""
    file = file or os.environ.get(CONFIG_FILE_VARIABLE)
    if file and not Path(file).is_file():
        raise ConfigError(f"config: no such file: {file}")
    try:
        return ServerConfig(**settings, config_file=file)  # pyright: ignore[reportCallIssue]
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(line, settings, file) for line in error.errors())) from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None
    except ValueError as error:
        raise ConfigError(f"config: {file} is not valid TOML: {error}") from None


def _describe(problem: Any, settings: dict[str, Any], file: str | Path | None) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "config"
    variable = ENVIRONMENT_PREFIX + name.upper()
    if name in settings:
        source = _flag(name)
    elif variable in os.environ:
        source = f"${variable}"
    else:
        source = str(file)
    if problem["type"] == "extra_forbidden":
        return f"{name}: no such setting ({source})"
    reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name}: {reason}, got {problem['input']!r} ({source})"


def _least(all_owners: int, one: int | None) -> int:
    return all_owners if one is None else min(all_owners, int(one))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
