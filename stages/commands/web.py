"""`cogview2 web RUN`: a page to draw, edit and caption with what a run has trained."""

import argparse
import contextlib
import importlib.util
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cogview2.pipeline.command_line import Parser, run_command
from cogview2.pipeline.errors import ConfigError, ExitCode
from cogview2.stages.web.guard import is_loopback
from cogview2.stages.web.listener import address, listen, new_token

_REMEDY = "the page needs the optional extra web; install it: pip install 'cogview2[web]'"


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no port; give a number up to 65535, 0 for any free one"
        )
    return int(text)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="cogview2 web", description="Draw, edit and caption in a browser.")
    parser.add_argument("run", metavar="RUN", type=Path, help="path of a run or of a weights folder")
    parser.add_argument(
        "--port", type=_port, metavar="N", help="default: the first free one from 8080 on; 0: any free one"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; the default, 127.0.0.1, can be reached from this machine alone",
    )
    return parser.parse_args(argv)


def _serve(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("nicegui") is None:
        raise ConfigError(_REMEDY)
    with listen(arguments.host, arguments.port) as listener:  # before the models, whose loading takes a while
        port = listener.getsockname()[1]
        if not is_loopback(arguments.host):
            print(
                f"cogview2 web: warning: {arguments.host} can be reached from other machines, and the connection is "
                "not encrypted; who learns the address can use this page",
                file=sys.stderr,
            )
        # Late: the libraries of the extra, which this installation may lack, and torch.
        from cogview2.stages.web import server
        from cogview2.stages.web.run_engine import load
        from cogview2.stages.web.service import Studio

        studio = Studio(load(arguments.run))
        token = new_token()
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # both signals end it in the same orderly way
        try:
            print(f"open {address(arguments.host, port, token)}", flush=True)
            print("The address holds the key; give it to nobody else. Ctrl-C ends the server.", flush=True)
            server.serve(server.application(studio, token, arguments.host), listener)
        finally:
            studio.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Load the models, print the address of the page and serve it; return the exit code (errors.ExitCode)."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    arguments = _parse(argv)
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # both signals end the server in the same orderly way

    def work() -> ExitCode:
        with contextlib.suppress(KeyboardInterrupt):
            _serve(arguments)
        return ExitCode.DONE

    return run_command("web", work)


if __name__ == "__main__":
    sys.exit(main())
