"""Reference files, and copies of them with changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lineage.official.verify import FileCheck, verify

FOLDERS = (
    Path(__file__).resolve().parents[1] / "parity",
    Path(__file__).resolve().parents[3] / "shared" / "reference",
)


@pytest.fixture(scope="session")
def reference_file() -> Callable[[str], Path]:
    """Name -> path of a reference file; the test is skipped where there is none."""

    def find(name: str) -> Path:
        for folder in FOLDERS:
            if (folder / name).is_file():
                return folder / name
        pytest.skip(f"there is no {name} beside this checkout")

    return find


@pytest.fixture
def changed(reference_file: Callable[[str], Path], tmp_path: Path) -> Callable[..., FileCheck]:
    """Verify a copy of a reference file in which some tensors or settings are changed.

    `change` takes a tensor's full name and its value, and returns the new value, or None to leave
    the tensor out; further keywords are settings of the file's config.
    """

    def check(
        name: str,
        change: Callable[[str, Tensor], Tensor | None] = lambda _, tensor: tensor,
        **settings: Any,
    ) -> FileCheck:
        with safe_open(reference_file(f"{name}.safetensors"), framework="pt") as file:
            metadata = dict(file.metadata())
            tensors = {key: change(key, file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **settings})
        present = {key: t.contiguous() for key, t in tensors.items() if t is not None}
        save_file(present, tmp_path / "changed.safetensors", metadata)
        (checked,) = verify([tmp_path / "changed.safetensors"])
        assert checked.system == name
        return checked

    return check
