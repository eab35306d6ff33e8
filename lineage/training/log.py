"""The log of a run: `metrics.jsonl`, one JSON object a line, and TensorBoard files where that is
installed.

Each line holds `stage`, `step`, `pictures`, `seconds` and `cpu_seconds` of training,
`pictures_per_second`, `lr`; the mean since the line before of every loss term as `<group>/<term>`
and of every gradient's norm before clipping as `gradient/<group>`; the mean over some of these
steps of every metric as `metric/<name>`; and `diagnosis`, where a metric is unhealthy.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from lineage.errors import UserError
from lineage.files import read_regular, unwritable, write_bytes


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`, without those that are damaged."""
    return [line for _, line in _lines(path) if line is not None]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Every line of a log as bytes and as an object; None for a line that is none of a log's."""
    if not path.exists():
        return []
    try:
        raw = read_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; remove it.") from error
    return [(line, _parsed(line)) for line in raw.split(b"\n") if line]


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    fits = (
        isinstance(line, dict)
        and isinstance(line.get("stage"), str)
        and all(isinstance(line.get(name), (int, float)) for name in ("step", "seconds"))
    )
    return line if fits else None


class Log:
    """Writer of `metrics.jsonl` in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._board = _tensorboard(folder)

    def truncate(self, stage: str, step: int) -> None:
        """Drop the lines of a stage after the checkpoint from which a run continues."""
        lines = _lines(self.path)
        torn = bool(lines) and lines[-1][1] is None  # the last one was cut short by a kill
        remaining = [
            raw
            for raw, line in (lines[:-1] if torn else lines)
            if line is None or line["stage"] != stage or line["step"] <= step
        ]
        write_bytes(self.path, b"".join(raw + b"\n" for raw in remaining))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from error
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{line['stage']}/{name}", value, line["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path) -> Any:
    """A TensorBoard writer, or None where tensorboard is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(folder / "tensorboard"))
    except OSError as error:
        raise UserError(f"Could not write {folder / 'tensorboard'}: {error.strerror}.") from error
