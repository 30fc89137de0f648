"""Addresses to listen on: names become numbers, a taken port is said before anything starts."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dlops.errors import MachineError, UsageError, from_os_error

# Closed by the end of the process.
_HELD: list[socket.socket] = []


def hold_port(host: str, port: int) -> int:
    """Keep a port, or a free one for 0, for processes that this one starts and that share it; returns its number.

    It is held for as long as this process lives, and nothing listens on it here: so no other server can take it, not
    even between now and when the first of them does. Raises MachineError where it is taken.
    """
    address = numeric_host(host)
    number = usable_port(address, port, option="--grpc-port")
    holder = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        holder.bind((address, number))
    except OSError as error:
        holder.close()
        raise from_os_error(error, doing=f"listening on {authority(address, number)}") from None
    _HELD.append(holder)
    return number


def claim_port(address: str, port: int) -> None:
    """Let no other dlops server begin on a port that this process is about to serve on, for as long as it lives.

    That nobody listens there yet is true for two that are started together, and the second then fails where the port is
    opened, with a traceback. Raises MachineError. By a name that the kernel forgets with the process, which Linux has.
    """
    if sys.platform != "linux":
        return
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0dlops-serve-{authority(address, port)}")
    except OSError:
        claim.close()
        raise _taken(address, port, "--port") from None
    _HELD.append(claim)


def keep_port(address: str, port: int, *, option: str = "--port") -> socket.socket | None:
    """Keep a port that is free until whoever is to serve on it opens it; closing what is returned gives it up.

    Nothing listens on it here, so a server may that takes ports whose connections are in TIME_WAIT, as all do. Nobody
    is given it as a free one, for which the seconds that a server takes to start are long enough. None where the system
    does not tell these two apart. Raises MachineError where it was taken since it was looked for.
    """
    if sys.platform != "linux":
        return None
    keeper = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    # The one for servers that take it alone, the other for those that share it.
    for allowed in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        keeper.setsockopt(socket.SOL_SOCKET, allowed, 1)
    try:
        keeper.bind((address, port))
    except OSError:
        keeper.close()
        raise _taken(address, port, option) from None
    return keeper


@contextmanager
def kept_free_port() -> Iterator[int]:
    """A free port on loopback that nobody else is given for as long as this process lives, after the block too."""
    port = usable_port("127.0.0.1", 0)
    keeper = keep_port("127.0.0.1", port)
    if keeper is not None:
        _HELD.append(keeper)
    yield port


def numeric_host(host: str) -> str:
    """An IP address: BentoML takes no names."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UsageError(f"host {host!r}: {error}", hint="127.0.0.1 for this machine, 0.0.0.0 for all") from None


def usable_port(address: str, port: int, *, option: str = "--port") -> int:
    """That port, or a free one for 0; option: by which it is chosen. Raises MachineError where it is taken or not
    allowed."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server does: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _taken(address, port, option) from None
            raise from_os_error(error, doing=f"listening on {authority(address, port)}") from None
        return int(probe.getsockname()[1])


def _taken(address: str, port: int, option: str) -> MachineError:
    return MachineError(f"port {port} on {address} is in use", hint=f"pass another {option}, or 0 for a free one")


def authority(address: str, port: int) -> str:
    """Both as they stand in a URL."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def reachable(address: str) -> str:
    """Where this machine asks what listens there."""
    # One that listens on all addresses is asked on this machine's own.
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104
