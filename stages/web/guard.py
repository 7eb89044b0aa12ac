"""Who may talk to the server: an ASGI layer in front of everything else, with no library behind it.

The address that the server prints holds a random token as first part of the path. There are no cookies, because a
browser sends those of one port of a machine to all its ports, and so to the servers of other users.
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_SAFE_METHODS = frozenset({"GET", "HEAD"})
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # the page's library compiles its templates in the browser
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),  # the token is part of the address
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>CogView2</title>
<body style="font: 16px/1.5 system-ui, sans-serif; margin: 15vh auto; max-width: 34em; padding: 0 1em"><p>{}</p>"""


def is_loopback(host: str) -> bool:
    """Tell whether a host to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_name(netloc: str) -> str:
    """Return the name in a Host header, lower case, without port and brackets; empty if it is malformed."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """Lets through what names this server, knows the token and comes from its own page.

    - Host: a page of another site whose name was made to point here (DNS rebinding) is refused by the name.
    - Token: the first part of the path; compared in constant time.
    - Origin: what a page of another origin sends is refused, and so are websockets without an origin.
    - Size: a request with a body must say its length, and it must be small enough.
    """

    def __init__(
        self,
        application: Application,
        token: str,
        *,
        names: frozenset[str],
        any_address: bool,
        most_bytes: int,
    ) -> None:
        """Stand in front of `application`.

        Args:
            application: sees the path as it is, with the token.
            token: of the path.
            names: host names of this server, lower case.
            any_address: numeric addresses count as names too; they cannot be rebound.
            most_bytes: largest body of a request.
        """
        self._application, self._token = application, token
        self._names, self._any_address, self._most_bytes = names, any_address, most_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] not in ("http", "websocket"):
            return await self._application(scope, receive, send)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            return await _refuse(scope, receive, send, *refusal)
        if scope["path"] == f"/{self._token}":
            return await _answer(send, 307, b"", [(b"location", f"/{self._token}/".encode())])

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        return await self._application(scope, receive, send_with_headers)

    def _refusal(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and sentence, or None if all is well."""
        host = headers.get("host", "")
        name = _host_name(host)
        if name not in self._names and not (self._any_address and _is_address(name)):
            return (
                403,
                "This server does not answer to this host name; open the address that it printed at its start.",
            )
        token = scope["path"].split("/", 2)[1] if scope["path"].startswith("/") else ""
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            return (
                403,
                "The token in this address is missing or wrong; open the address that cogview2 web printed at its start.",
            )
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in _SAFE_METHODS
        if origin is not None and _origin_host(origin) != host.lower():
            return 403, "This request comes from a page of another origin."
        if origin is None and (scope["type"] == "websocket" or (changes and _is_foreign(headers))):
            return 403, "This request does not come from the page of this server."
        if scope["type"] == "http":
            return self._refusal_of_body(scope["method"], headers)
        return None

    def _refusal_of_body(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        if method not in _SAFE_METHODS | {"POST"}:
            return 405, "Only GET, HEAD and POST are answered."
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
            return 411, "A request must say the length of its body."
        if int(length) > self._most_bytes:
            return 413, f"A request may have at most {self._most_bytes} bytes."
        return None


def _origin_host(origin: str) -> str:
    """Return host and port of an Origin header; empty for `null` and for what is no web page."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc.lower() if parts.scheme in ("http", "https") else ""


def _is_foreign(headers: dict[str, str]) -> bool:
    return headers.get("sec-fetch-site", "none") not in ("same-origin", "none")


async def _refuse(
    scope: MutableMapping[str, Any], receive: Receive, send: Send, status: int, sentence: str
) -> None:
    if scope["type"] == "websocket":
        await receive()
        return await send({"type": "websocket.close", "code": 1008, "reason": sentence})
    await _answer(
        send, status, _PAGE.format(sentence).encode(), [(b"content-type", b"text/html; charset=utf-8")]
    )


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length, *_HEADERS]})
    await send({"type": "http.response.body", "body": body})
