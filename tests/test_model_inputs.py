"""What systems receive of a data set, as pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lineage.cli import main
from lineage.data import load_dataset
from lineage.data.contract import to_bytes
from lineage.model_inputs import as_pictures, colours_of, input_columns
from lineage.runs import load_system


def labels(run: str) -> list[str]:
    columns = list(input_columns("shapes", run, 2, "train", 0))
    assert all(len(column) == 2 for column in columns)
    return [column[0][0] for column in columns[1:]]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("attngan", ["8 x 8", "16 x 16", "32 x 32"]),
        ("stackgan", ["16 x 16", "32 x 32"]),
        ("ddpm", ["32 x 32"]),
        ("dalle", ["codes, 8 x 8", "decoded"]),
        ("ldm", ["latents, 16 x 8 x 8", "decoded"]),
    ],
)
def test_columns_of_a_family(key: str, expected: list[str]) -> None:
    assert labels(f"pretrained:{key}") == [f"{key}: {what}" for what in expected]


def test_pictures_and_codes_are_those_of_training() -> None:
    image = torch.stack([load_dataset("shapes")[i].image for i in range(2)])
    pictures, codes, decoded = input_columns("shapes", "pretrained:vqvae", 2, "train", 0)
    assert torch.equal(torch.stack([picture for _, picture in pictures]), image)
    system = load_system("pretrained:vqvae", "cpu")
    with torch.no_grad():
        ids = system.encode(image / 127.5 - 1)
        again = to_bytes(system.reconstruct(image / 127.5 - 1))
    assert torch.equal(torch.stack([code for _, code in codes]), colours_of(ids))
    assert torch.equal(torch.stack([one for _, one in decoded]), again)


def test_values_as_pictures() -> None:
    codes = torch.arange(64).view(1, 8, 8)
    colours = colours_of(codes)[0].flatten(1).T
    assert len(colours.unique(dim=0)) == 64
    assert torch.equal(as_pictures(codes.flatten(1)), colours_of(codes))
    channels = torch.stack([torch.full((2, 2), float(v)) for v in range(6)]).view(2, 3, 2, 2)
    shown = as_pictures(channels)
    assert shown[0].max() == 0 and shown[1].min() == 255
    assert as_pictures(torch.rand(2, 1, 4, 4)).shape == (2, 3, 4, 4)


def test_a_sheet_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "show", "shapes", "--count", "2", "--out", str(tmp_path / "a.png")]
    runs = ["--run", "pretrained:attngan", "--run", "pretrained:vqvae"]
    assert main([*command, *runs]) == 0
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width == 6 * (96 + 10) + 10  # one picture, three sizes, codes, decoded
    assert main([*command, *runs, "--size", "16"]) == 2
    assert "--size has no effect with --run" in capsys.readouterr().err
    assert main([*command, "--run", "pretrained:clip"]) == 2
    assert "clip draws no pictures" in capsys.readouterr().err
