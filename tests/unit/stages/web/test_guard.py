"""The layer that decides who may talk to the page's server; asked as an ASGI application, without any library."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from cogview2.stages.web.guard import LOOPBACK_NAMES, Guard, Receive, Send, is_loopback

TOKEN = "sEcret-token"
HERE = "127.0.0.1:8080"
MOST_BYTES = 1000


class Application:
    """Counts what gets through and answers 200."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.reached.append(scope.get("path", scope["type"]))
        if scope["type"] == "http":
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
            )
            await send({"type": "http.response.body", "body": b"inside"})
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})


def ask(
    path: str,
    *,
    kind: str = "http",
    method: str = "GET",
    any_address: bool = False,
    names: frozenset[str] = LOOPBACK_NAMES,
    **headers: str,
) -> tuple[int | str, dict[str, str], bytes, list[str]]:
    """Send one request; return status (or the message to a websocket), headers, body, and what got through."""
    given = {"host": HERE} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": kind,
        "path": path,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
    }
    if kind == "http":
        scope["method"] = method
    application, sent = Application(), []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": f"{kind}.connect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    guard = Guard(application, TOKEN, names=names, any_address=any_address, most_bytes=MOST_BYTES)
    asyncio.run(guard(scope, receive, send))
    if kind == "websocket":
        return sent[0]["type"], {}, b"", application.reached
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, sent[1]["body"], application.reached


def test_who_knows_the_token_gets_in_and_every_answer_forbids_other_sources() -> None:
    status, headers, body, _ = ask(f"/{TOKEN}/")
    assert status == 200 and body == b"inside" and headers["content-type"] == "text/plain"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "http:" not in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer" and headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in headers
    assert ask(f"/{TOKEN}")[:2][0] == 307


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "/favicon.ico",
        "/wrong/",
        f"/{TOKEN}x/",
        f"/{TOKEN[:-1]}/",
        f"//{TOKEN}/",
        f"/x/../{TOKEN}/",
        "/\xe9/",
    ],
)
def test_without_the_token_there_is_one_sentence(path: str) -> None:
    status, headers, body, reached = ask(path)
    assert status == 403 and reached == []
    assert b"token" in body and TOKEN.encode() not in body and "content-security-policy" in headers
    assert ask(path, kind="websocket", origin=f"http://{HERE}")[0] == "websocket.close"


@pytest.mark.parametrize(
    ("host", "let_in"),
    [
        ("localhost:9000", True),  # the near end of a tunnel
        ("LOCALHOST", True),
        ("[::1]:8080", True),
        ("127.0.0.1", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:8080", False),
        ("localhost@evil.example", False),
        ("192.168.1.5:8080", False),
        ("[", False),
        ("", False),
    ],
)
def test_names_that_were_made_to_point_here_are_refused(host: str, let_in: bool) -> None:
    assert ask(f"/{TOKEN}/", host=host)[0] == (200 if let_in else 403)


def test_on_another_address_numbers_and_the_own_name_count() -> None:
    names = LOOPBACK_NAMES | {"login7"}
    for host, let_in in (
        ("192.168.1.5:8080", True),
        ("[fe80::1]", True),
        ("login7:8080", True),
        ("evil.example", False),
    ):
        assert ask(f"/{TOKEN}/", host=host, names=names, any_address=True)[0] == (200 if let_in else 403), (
            host
        )


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:9999", "null", "file://127.0.0.1:8080", "http://["]
)
def test_pages_of_other_origins_are_refused_with_the_right_token_too(origin: str) -> None:
    assert ask(f"/{TOKEN}/", origin=origin)[0] == 403
    assert ask(f"/{TOKEN}/", method="POST", origin=origin)[0] == 403
    assert ask(f"/{TOKEN}/ws", kind="websocket", origin=origin)[0] == "websocket.close"


def test_the_own_page_may_send_and_open_websockets() -> None:
    assert ask(f"/{TOKEN}/", method="POST", origin=f"http://{HERE}")[0] == 200
    assert ask(f"/{TOKEN}/ws", kind="websocket", origin=f"http://{HERE}")[0] == "websocket.accept"
    assert ask(f"/{TOKEN}/ws", kind="websocket", host="localhost:9000", origin="http://localhost:9000")[
        0
    ] == ("websocket.accept")


def test_a_websocket_says_where_it_comes_from_and_a_post_must_not_come_from_elsewhere() -> None:
    assert ask(f"/{TOKEN}/ws", kind="websocket")[0] == "websocket.close"
    assert ask(f"/{TOKEN}/", method="POST", sec_fetch_site="cross-site")[0] == 403
    assert ask(f"/{TOKEN}/", method="POST", sec_fetch_site="same-site")[0] == 403
    assert ask(f"/{TOKEN}/", method="POST", sec_fetch_site="same-origin")[0] == 200


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("PUT", {}, 405),
        ("OPTIONS", {}, 405),
        ("POST", {"content_length": str(MOST_BYTES)}, 200),
        ("POST", {"content_length": str(MOST_BYTES + 1)}, 413),
        ("POST", {"content_length": "-1"}, 411),
        ("POST", {"transfer_encoding": "chunked"}, 411),
    ],
)
def test_bodies_say_their_length_and_it_is_limited(method: str, headers: dict[str, str], status: int) -> None:
    answer = ask(f"/{TOKEN}/", method=method, **headers)
    assert answer[0] == status and bool(answer[3]) == (status == 200)


def test_the_start_and_the_end_of_the_server_pass() -> None:
    application = Application()
    guard = Guard(application, TOKEN, names=LOOPBACK_NAMES, any_address=False, most_bytes=1)

    async def nothing(*_: Any) -> Any:
        return {}

    asyncio.run(guard({"type": "lifespan"}, nothing, nothing))
    assert application.reached == ["lifespan"]


def test_loopback_is_known_by_its_address() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.5", "login7"))
