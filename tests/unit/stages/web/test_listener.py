"""Where the server listens, and what it prints."""

import re
import socket

import pytest

from cogview2.pipeline.errors import ConfigError
from cogview2.stages.web.listener import FIRST_PORT, address, listen, new_token


def test_without_a_port_the_next_free_one_is_taken() -> None:
    with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
        ports = [listener.getsockname()[1] for listener in (first, second)]
        assert FIRST_PORT <= ports[0] < ports[1] < FIRST_PORT + 20
        assert first.getsockname()[0] == "127.0.0.1"
        with socket.create_connection(first.getsockname(), timeout=5):
            pass


def test_a_named_port_that_is_taken_is_refused() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .*choose another --port"):
            listen("127.0.0.1", port)


def test_a_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="no-such-host.invalid"):
        listen("no-such-host.invalid", 0)


def test_addresses_can_be_opened() -> None:
    assert address("127.0.0.1", 8080, "t") == "http://127.0.0.1:8080/t/"
    assert address("::1", 8080, "t") == "http://[::1]:8080/t/"
    assert address("0.0.0.0", 80, "t") == f"http://{socket.gethostname()}:80/t/"


def test_tokens_are_long_and_fit_into_a_path() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100 and all(re.fullmatch(r"[\w-]{22}", token) for token in tokens)
