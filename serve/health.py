"""Whether the server of this machine is ready: `python -m dlops.serve.health PORT`, for an image's HEALTHCHECK.

Exit status 0, or 1 with the reason on standard error. It is run every few seconds beside the server: only what Python
brings along is imported.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

_TIMEOUT_S = 4.0


def why_not(port: int, environment: Mapping[str, str]) -> str | None:
    """Why the server at this port of 127.0.0.1 is not ready, None where it is. environment: the server's own, which
    says whether its port is encrypted."""
    certificate, key = environment.get("DLOPS_TLS_CERT"), environment.get("DLOPS_TLS_KEY")
    context = None
    if certificate and key:
        # Its certificate names the host that clients ask for, and none that is asked over the loopback.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if environment.get("DLOPS_TLS_CLIENT_CA"):
            try:
                context.load_cert_chain(certificate, key)
            except OSError as error:
                return f"{certificate} and {key}: {error}"
    url = f"http{'' if context is None else 's'}://127.0.0.1:{port}/v2/health/ready"
    # What a variable names as a proxy has no way to this machine's loopback.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), *([] if context is None else [urllib.request.HTTPSHandler(context=context)])
    )
    try:
        with opener.open(url, timeout=_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return f"{url}: {error.code} {error.read(300).decode('utf-8', 'replace')}"
    except OSError as error:
        return f"{url}: {error}"


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not arguments[0].isdigit():
        sys.stderr.write("python -m dlops.serve.health PORT\n")
        return 2
    reason = why_not(int(arguments[0]), os.environ)
    if reason is None:
        return 0
    sys.stderr.write(reason + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
