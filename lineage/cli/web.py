"""`lineage app`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lineage.cli.arguments import Flag, Port, RunName, Threads


def app(
    runs: Annotated[list[RunName] | None, Parameter(name="RUN")] = None,
    /,
    *,
    host: str = "127.0.0.1",
    port: Port = 7860,
    threads: Threads | None = None,
    device: str = "auto",
    open: Flag = False,
) -> None:
    """Serve a web page on which systems draw a caption side by side.

    Args:
        runs: Run folders, or pretrained:KEY; all systems that come with the package if left out.
        host: Address to serve at; 0.0.0.0 lets anybody in the network draw.
        port: Port of the page; 0 for any that is free.
        threads: Number of threads on a CPU; as many as are free if left out.
        device: cpu, cuda, mps or auto.
        open: If true, open the page in the browser.
    """
    from lineage.comparison.app import serve

    serve(
        runs or [],
        host=host,
        port=port,
        threads=threads,
        device=device,
        opens_browser=open,
    )
