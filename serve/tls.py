"""Encryption of both ports: the server's certificate, and whose clients it takes where they need one, too."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dlops.errors import UsageError, from_os_error
from dlops.serve.settings import variable


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files. certificate: the server's, with those that signed it. client_ca: of the authority that signs clients'
    certificates, without one of which nobody is answered; None where anybody is."""

    certificate: Path
    key: Path
    client_ca: Path | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """As `Settings` reads them there; None where nothing is encrypted. Whether the files are right says `check`."""
        certificate, key, client_ca = (
            environment.get(variable(name), "") for name in ("tls_cert", "tls_key", "tls_client_ca")
        )
        if not (certificate and key):
            return None
        return cls(certificate=Path(certificate), key=Path(key), client_ca=Path(client_ca) if client_ca else None)

    def check(self) -> None:
        """Raise UsageError where a file is not there, is none of its kind, or the key is another certificate's."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            for path in (self.certificate, self.key, self.client_ca):
                if path is not None:
                    path.read_bytes()
        except OSError as error:
            raise UsageError(str(from_os_error(error, doing=f"reading {path}"))) from None
        try:
            # Asked for a password, it would wait for one on the terminal.
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except ssl.SSLError as error:
            raise UsageError(
                f"{self.certificate} and {self.key}: {error.reason or error}", hint="a certificate and its key, as PEM"
            ) from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError as error:
                raise UsageError(f"{self.client_ca}: {error.reason or error}", hint="certificates, as PEM") from None

    def for_bentoml(self) -> dict[str, Any]:
        """As the service's `ssl` has it."""
        config: dict[str, Any] = {"enabled": True, "certfile": str(self.certificate), "keyfile": str(self.key)}
        if self.client_ca is not None:
            config |= {"ca_certs": str(self.client_ca), "cert_reqs": int(ssl.CERT_REQUIRED)}
        return config

    def for_grpc(self) -> Any:
        """The server's credentials."""
        from dlops.grpc_messages import grpc

        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=None if self.client_ca is None else self.client_ca.read_bytes(),
            require_client_auth=self.client_ca is not None,
        )

    def for_asking_itself(self) -> ssl.SSLContext:
        """Of a client that asks the server that it has just started on this machine whether it is ready."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # The certificate is for the name by which others know the server, and this client knows whom it has started.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.load_cert_chain(self.certificate, self.key, password=_no_password)
        return context


def _no_password() -> str:
    raise UsageError("the key is encrypted", hint="decrypt it: openssl pkey -in KEY -out PLAIN")
