"""Meeting on one host: a port that nobody has, and the interface that nothing leaves the host by."""

from __future__ import annotations

import socket


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free on `host` a moment ago; whoever wants it should bind it soon."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def loopback_interface() -> str | None:
    """Its name, which gloo wants to be told: by itself it takes the address that the host's name resolves to, which may
    be unreachable (a VPN, a container) or open to the network."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
