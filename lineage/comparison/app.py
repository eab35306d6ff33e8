"""`lineage app`: a web page on which a caption is drawn by several systems, side by side.

    app_runs       which runs there are, and what each offers
    app_controls   controls of a system's options
    app_drawing    what is drawn; the judge's verdicts
    app_queue      who draws, and who waits
    app_sessions   what each has drawn last
    app_html       the cards
    app_page       the page, of gradio; app_parts: its theme, the components of the controls
    here           the server

Nothing on the page comes from another machine, and no request leaves this one.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from lineage.errors import Interrupted, UserError, say

if TYPE_CHECKING:
    from lineage.comparison.app_page import Page
    from lineage.comparison.app_runs import AppRun

MAX_UPLOAD = "10mb"
GRACE = 1  # seconds that open connections have to end
INSTALL = "The page needs gradio: install it with pip install 'lineage-t2i[app]'."


def serve(
    folders: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    threads: int | None = None,
    device: str = "auto",
    opens_browser: bool = False,
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        folders: Run folders; none for all systems that come with the package.
        host: Address that the page is served at.
        port: Port; 0 for any that is free.
        threads: Number of threads on a CPU; None for as many as are free.
        device: `cpu`, `cuda`, `mps` or `auto`.
        opens_browser: If true, the page is opened in the browser.

    Raises:
        UserError: gradio is not installed, the port is taken, or no run can be used.
    """
    if not has_gradio():
        raise UserError(INSTALL)
    with _listening(host, port) as listener:
        from lineage.comparison.app_runs import example_captions, open_runs, packaged_runs

        runs, faults = open_runs(list(folders) or packaged_runs(), device)
        for sentence in faults:
            say(sentence)
        page = _page(runs, faults, example_captions(runs), threads)
        address = address_of(host, listener.getsockname()[1])
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if not is_loopback(host):
            say(f"Anybody who reaches {host} in the network can draw on this machine.")
        if opens_browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        _run(page, listener)


def has_gradio() -> bool:
    """Whether gradio is installed; it is imported only when the page is made."""
    return importlib.util.find_spec("gradio") is not None


def _page(
    runs: Sequence[AppRun], faults: Sequence[str], examples: Sequence[str], threads: int | None
) -> Page:
    """The page, made by a gradio that sends nothing to anybody."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from lineage.comparison.app_page import Page

    return Page(runs, faults, examples, threads)


def _run(page: Page, listener: socket.socket) -> None:
    """Serve a page until a signal comes."""
    import gradio
    import uvicorn
    from fastapi import FastAPI

    from lineage.comparison.app_html import CSS
    from lineage.comparison.app_parts import THEME

    application = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        page.blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=THEME,
        css=CSS,
    )

    class Server(uvicorn.Server):
        """A server that ends in silence: every page that is open then would be an error."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            if page.queue.is_busy:
                _give_up()

    config = uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=GRACE)
    Server(config).run(sockets=[listener])


def _give_up() -> NoReturn:
    """End the process although something is being drawn: its thread cannot be stopped, and Python
    would wait for it. No file is being written.
    """
    say("interrupted; the drawing is given up.")
    sys.stdout.flush()
    os._exit(Interrupted.exit_code)


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound to the address.

    Raises:
        UserError: the port is taken, or the machine has no such address.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise UserError(f"There is no address {host!r}: leave --host out.") from None
    with socket.socket(family, kind, protocol) as listener:
        if os.name == "posix":  # elsewhere it would let two programs have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
            listener.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"Port {port} is taken: add --port {port + 1}.") from None
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{host}, port {port}, cannot be used: {reason}.") from None
        yield listener


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_of(host: str, port: int) -> str:
    """The address to type into a browser on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
