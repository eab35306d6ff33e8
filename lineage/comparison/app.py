"""`lineage app`: a web page on which a caption is drawn by several systems, side by side.

    app_runs       which runs there are, and what each offers
    app_controls   controls of a system's options
    app_drawing    what is drawn; the judge's verdicts
    app_desk       who draws, and who waits
    app_html       the cards
    app_page       the page (gradio)
    here           the server

Nothing on the page comes from another machine, and no request leaves this one.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import ipaddress
import os
import socket
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lineage.errors import UserError, say

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
        application = _application(runs, faults, example_captions(runs), threads)
        address = address_of(host, listener.getsockname()[1])
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if not is_loopback(host):
            say(f"Anybody who reaches {host} in the network can draw on this machine.")
        if opens_browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        _run(application, listener)


def has_gradio() -> bool:
    """Whether gradio is installed; it is imported only when the page is made."""
    return importlib.util.find_spec("gradio") is not None


def _application(runs: Any, faults: Any, examples: Any, threads: int | None) -> Any:
    """The web application of the page."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio
    from fastapi import FastAPI

    from lineage.comparison import app_html
    from lineage.comparison.app_page import THEME, Page

    page = Page(runs, faults, examples, threads)
    return gradio.mount_gradio_app(
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
        css=app_html.CSS,
    )


def _run(application: Any, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=GRACE)
    uvicorn.Server(config).run(sockets=[listener])


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
