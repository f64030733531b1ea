"""What a server is told when it starts: addresses, limits, keys.

For `app.py`, `limits.py` and `serving.py`, and for the command line, which fills it in. Apart
because all of them need it and none of them the others.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitnet_rs.model import Model

# Names by which a browser reaches this machine's own server.
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How to serve.

    Attributes:
        host: Address to listen at.
        port: Port; 0: any that is free.
        api_key: What requests must carry as `Authorization: Bearer KEY`; None: nothing.
        aliases: Further names of the model; `*`: any name.
        cors_origins: Origins whose pages may use the server, such as `https://example.com`.
        allowed_hosts: Names, beside the usual ones, that the Host header may have where only this
            machine can connect.
        max_queue: Sequences that may wait for their turn; further requests are refused.
        max_tokens: Most tokens that a request may ask for in one choice; None: what fits.
        max_body: Most bytes of a request's body.
        drain_timeout: Seconds that running requests have to finish when the server is to end.
        keep_alive: Seconds without a token after which a stream gets a comment, so that nobody
            between takes it for dead.
        log_requests: Print a line for each request.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    aliases: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_queue: int = 64
    max_tokens: int | None = None
    max_body: int = 8_000_000
    drain_timeout: float = 30.0
    keep_alive: float = 10.0
    log_requests: bool = False

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise ValueError("the API key is empty; wanted one of some length, or none at all")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError(
                "the API key has characters that an HTTP header cannot carry; wanted printable ASCII"
            )
        for origin in self.cors_origins:
            scheme, found, rest = origin.partition("://")
            if origin != "*" and not (scheme and found and rest and "/" not in rest):
                raise ValueError(
                    f"the CORS origin is {origin!r}; wanted a scheme and a host, such as "
                    "https://example.com, or *"
                )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def host_names(self) -> frozenset[str] | None:
        """What the Host header may name, in lower case; None: anything."""
        more = {name.lower() for name in self.allowed_hosts}
        if "*" in more or not (self.loopback or more):
            return None
        own = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset({*_LOOPBACK_NAMES, own.lower(), *more})


def served_name(model: Model) -> str:
    """What clients call the model: a hub id, `demo`, or the last part of a path.

    Where it lies on this machine is nobody's business.
    """
    path = Path(model.name).expanduser()
    return path.resolve().name if path.exists() else model.name
