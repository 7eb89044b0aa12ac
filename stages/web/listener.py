"""Where the server listens, and the address that is printed; needs nothing of the extra."""

import secrets
import socket

from cogview2.pipeline.errors import ConfigError

FIRST_PORT = 8080
_PORTS = 20


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens; without `port` on the first free one from FIRST_PORT on.

    Raises:
        ConfigError: the host does not belong to this machine, or no port is free.
    """
    problem: OSError | None = None
    for candidate in range(FIRST_PORT, FIRST_PORT + _PORTS) if port is None else (port,):
        try:
            family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, candidate), family=family)
        except OSError as error:
            problem = error
    ports = f"{FIRST_PORT} to {FIRST_PORT + _PORTS - 1}" if port is None else str(port)
    raise ConfigError(f"cannot listen on {host}, port {ports} ({problem}); choose another --port or --host")


def address(host: str, port: int, token: str) -> str:
    """Return what to open in a browser."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/{token}/"


def new_token() -> str:
    """Return 128 random bits for an address."""
    return secrets.token_urlsafe(16)
