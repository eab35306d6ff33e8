"""Tables of the public layouts whose names have accents written in another way than the files'."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from miniatures import CUB, MAKERS, TOKENS, TRAIN, move, replace, reports

from lineage.data import load_dataset

FORMS = tuple(unicodedata.normalize(form, "è") for form in ("NFC", "NFD"))
DEV, BIRD = "Flickr_8k.devImages.txt", f"{CUB}/images/7.Tern/T_1.jpg"
CASES = {
    "cub": ([BIRD, "text_c10/7.Tern/T_1.txt"], [f"{CUB}/images.txt"], []),
    "coco": (["train2017/000000000007.jpg"], [TRAIN], []),
    "flickr8k": (["Flicker8k_Dataset/1_a.jpg"], [TOKENS, DEV], []),
    "flickr8k: its list": (["Flicker8k_Dataset/1_a.jpg"], [DEV], [TOKENS]),
    "kaggle": (["Images/1_a.jpg"], ["captions.txt"], []),
}
"""Files whose names get one form of an accent, and tables that get the other and the same form."""


@pytest.mark.parametrize(("one", "other"), [FORMS, FORMS[::-1]])
@pytest.mark.parametrize("case", CASES)
def test_accents_in_tables_may_be_written_in_two_ways(
    tmp_path: Path, case: str, one: str, other: str
) -> None:
    maker = case.partition(":")[0]
    files, others, same = CASES[case]
    root, stem = MAKERS[maker](tmp_path), Path(files[0]).stem
    before = load_dataset(f"{root}", "all", 8)
    splits, told = sorted(e.meta["split"] for e in before), len(before.skipped)
    for table, mark in [(t, other) for t in others] + [(t, one) for t in same]:
        replace(root / table, f"{stem}.", f"{mark}{stem}.")
    for file in files:
        move(root, (file, file.replace(stem, one + stem)))
    data = load_dataset(f"{root}", "all", 8)
    assert len(data.skipped) == told, reports(data)
    assert len(data) == len(before)
    if maker != "kaggle":  # its splits depend on the names
        assert sorted(e.meta["split"] for e in data) == splits
