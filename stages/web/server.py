"""Puts page, pictures and guard together and serves them."""

import socket
import warnings
from typing import Any

import uvicorn
from nicegui import core, ui
from starlette.applications import Starlette
from starlette.formparsers import MultiPartParser
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cogview2.stages.web import guard, page
from cogview2.stages.web.pictures import PictureStore
from cogview2.stages.web.service import UPLOADS, Studio

_FORM_BYTES = 64 * 1024
"""What a form needs around its file."""
_MESSAGE_BYTES = 1024 * 1024
_RECONNECT_SECONDS = 30.0
"""So long a page outlives its connection, for example a tunnel that is opened again."""


def application(studio: Studio, token: str, host: str) -> guard.Guard:
    """Return the whole ASGI application. Once in a process: the page's library has one state for all.

    Args:
        studio: does the work.
        token: first part of every path.
        host: that is listened on.
    """
    store = PictureStore()

    async def picture(request: Request) -> Response:
        data = store.get(request.path_params["name"])
        if data is None:
            return PlainTextResponse("This picture is no longer kept; draw it again.", 404)
        return Response(data, media_type="image/png", headers={"cache-control": "private, max-age=86400"})

    # Uploads stay in memory: their size is limited by the guard, and nothing is written to a temporary folder.
    MultiPartParser.spool_max_size = UPLOADS.max_file_bytes + _FORM_BYTES
    ui.page("/", title=f"{studio.facts.name} - CogView2")(page.build(studio, store))
    app: Any = Starlette(routes=[Route(f"/{token}/pictures/{{name}}", picture)])
    ui.run_with(
        app,  # any application with a router will do
        mount_path=f"/{token}",
        dark=None,
        language="en-US",
        tailwind=False,
        reconnect_timeout=_RECONNECT_SECONDS,
        show_welcome_message=False,
    )
    core.sio.eio.cors_allowed_origins = []  # the guard has looked at the origin already, behind any tunnel
    local = guard.is_loopback(host)
    names = (
        guard.LOOPBACK_NAMES if local else guard.LOOPBACK_NAMES | {host.lower(), socket.gethostname().lower()}
    )
    return guard.Guard(
        app, token, names=names, any_address=not local, most_bytes=UPLOADS.max_file_bytes + _FORM_BYTES
    )


def serve(app: guard.Guard, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    # The page's library looks at every object of the process at its start; some of torch's complain.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"nicegui\.")
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # paths hold the token
        server_header=False,
        proxy_headers=False,
        ws="wsproto",
        ws_max_size=_MESSAGE_BYTES,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])
