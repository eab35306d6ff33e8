"""The log of a run: `metrics.jsonl`, one JSON object a line, and TensorBoard beside it where that
is installed.

Each line holds `stage`, `step`, `pictures`, `seconds` and `cpu_seconds` of training,
`pictures_per_second`, `lr`, the mean of every loss term since the line before as `<group>/<term>`,
and of `gradient/<group>`, the norm before clipping, and, over some of these steps, `health/<fact>`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from lineage.errors import UserError
from lineage.training.store import unwritable, write_bytes


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that was cut short is left out."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


class Log:
    """Appends lines to `metrics.jsonl` in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._board = _tensorboard(folder)

    def forget_after(self, stage: str, step: int) -> None:
        """Drop what was logged beyond the checkpoint from which a run goes on."""
        kept = [
            line for line in read_log(self.path) if line["stage"] != stage or line["step"] <= step
        ]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

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
