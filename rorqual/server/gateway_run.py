"""Run the gateway until stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from rorqual.errors import ConfigError
from rorqual.server import logs
from rorqual.server.auth import check_exposure, is_loopback
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.listen import LOOPBACK, Certificate, address_of, bind, serve_app


def run_gateway(
    gateway: Gateway,
    *,
    host: str = "127.0.0.1",
    port: int = 8100,
    certificate: Certificate | None = None,
    drain_s: float = 30.0,
    log_style: logs.Style = "off",
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until a signal, as `run.run` does; closes the gateway and its accounts.

    Raises: ConfigError when the address cannot be used, when others reach it and no key is asked for, or when clients
    have to send keys of this gateway and it has none for the upstream.
    """
    gatekeeper = gateway.operations.accounts.gatekeeper
    check_exposure(host, gatekeeper)
    if not gatekeeper.is_open and not gateway.upstream.has_key:
        raise ConfigError(
            "clients have to send a key of this gateway, so theirs cannot be the upstream's, and it has none of its "
            "own. Set RORQUAL_UPSTREAM_KEY, or say --no-auth to pass on what clients send."
        )
    with contextlib.closing(gateway.operations):
        listener = bind(host, port)
        hosts = (*LOOPBACK, host) if is_loopback(host) else None
        serve_app(
            create_gateway(gateway, hosts),
            listener,
            gateway.operations,
            url=address_of(host, listener, certificate),
            certificate=certificate,
            drain_s=drain_s,
            log_style=log_style,
            on_ready=on_ready,
        )
