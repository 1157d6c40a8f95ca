"""Whether the settings let in more than whoever wrote them may have meant."""

from __future__ import annotations

import ipaddress

from gradwire_server.config import ConfigError, ServerConfig


def check_exposure(config: ServerConfig) -> None:
    """Raises ConfigError where other machines could come in without TLS and tokens, and that was not asked for."""
    if (config.tls_certificate is None) != (config.tls_key is None):
        raise ConfigError("tls_certificate and tls_key: expected both or neither")
    if config.tls_client_ca is not None and config.tls_certificate is None:
        raise ConfigError("tls_client_ca: needs tls_certificate and tls_key")
    if config.insecure_listen_anywhere or is_local(config.listen):
        return
    settings = {"TLS (tls_certificate, tls_key)": config.tls_certificate, "tokens (tokens)": config.tokens}
    if missing := " and ".join(name for name, value in settings.items() if value is None):
        raise ConfigError(
            f"listen: {config.listen} can be reached from other machines, and there is no {missing}. "
            "Set that, listen on 127.0.0.1, or add --insecure-listen-anywhere if the network is trusted"
        )


def is_local(address: str) -> bool:
    """Whether only this machine reaches HOST:PORT."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
