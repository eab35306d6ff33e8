"""What `lineage app` says when it cannot serve; none of it needs gradio."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from conftest import Answer
from refusal import assert_refused

from lineage.comparison import app

Call = Callable[..., Answer]


@pytest.fixture
def gradio_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked before the page is made needs no gradio."""
    monkeypatch.setattr(app, "has_gradio", lambda: True)


def test_without_gradio(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "has_gradio", lambda: False)
    assert_refused(call("app"), "pip install 'lineage-t2i[app]'")


@pytest.mark.usefixtures("gradio_there")
def test_a_port_that_is_taken(call: Call) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert_refused(call("app", "--port", port), f"Port {port} is taken")


@pytest.mark.usefixtures("gradio_there")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere"),
        (["pretrained:zorp"], "zorp"),
        (["pretrained:clip"], "draws no pictures"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--host", "203.0.113.1"], "203.0.113.1"),
        (["--port", "70000"], "--port"),
    ],
)
def test_what_cannot_be_served(arguments: list[str], words: str, call: Call) -> None:
    port = [] if "--port" in arguments else ["--port", "0"]
    assert_refused(call("app", *arguments, *port), words)


@pytest.mark.parametrize(
    ("host", "is_local", "address"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:1"),
        ("localhost", True, "http://localhost:1"),
        ("::1", True, "http://[::1]:1"),
        ("0.0.0.0", False, "http://127.0.0.1:1"),
        ("192.168.0.7", False, "http://192.168.0.7:1"),
    ],
)
def test_addresses(host: str, is_local: bool, address: str) -> None:
    assert app.is_loopback(host) == is_local and app.address_of(host, 1) == address
