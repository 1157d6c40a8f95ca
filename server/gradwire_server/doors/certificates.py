"""The certificates of the service's port, read again when their files change."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from gradwire_proto.errors import FailedPrecondition, GradwireError
from gradwire_server.doors.file_marks import mark_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """PEM files: the service's chain and key; `client_ca`: by whom clients' own certificates must be signed, where they
    must show one.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files. Raises FailedPrecondition CERTIFICATE_INVALID, which names the file."""
        first = self._read()
        last = [self._mark()]

        def changed() -> grpc.ServerCertificateConfiguration | None:
            # Called at each handshake, from a thread of grpc's.
            mark = self._mark()
            if mark == last[0]:
                return None
            last[0] = mark
            try:
                configuration = self._read()
            except GradwireError as error:
                logger.error("%s; the certificate that was read before stays in use", error)
                return None
            logger.info("the certificate was read again from %s", self.certificate)
            return configuration

        return grpc.dynamic_ssl_server_credentials(
            first,
            changed,  # pyright: ignore[reportArgumentType] - None keeps the last one, as its documentation says
            self.client_ca is not None,
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        chain, key = _pem(self.certificate, "tls_certificate"), _pem(self.key, "tls_key")
        authority = None if self.client_ca is None else _pem(self.client_ca, "tls_client_ca")
        # grpc itself only says, at the first handshake, that something is wrong.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except (ssl.SSLError, OSError, ValueError) as error:
            message = f"tls_certificate and tls_key: {self.certificate} and {self.key} are no certificate and its key"
            raise _invalid(f"{message} ({_words(error)})") from None
        try:
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise _invalid(f"tls_client_ca: {self.client_ca} has no certificate ({_words(error)})") from None
        return grpc.ssl_server_certificate_configuration([(key, chain)], authority)

    def _mark(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(mark_of(path) for path in (self.certificate, self.key, self.client_ca) if path is not None)


def _no_password() -> str:
    raise ValueError("the key has a password")


def _pem(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _invalid(f"{setting}: {path} cannot be read: {error.strerror}") from None


def _words(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)


def _invalid(message: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason="CERTIFICATE_INVALID")
