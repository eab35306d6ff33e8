"""Miniatures of the public data sets, made for tests: small pictures and invented captions."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError

CUB, TEXTS, TRAIN = "CUB_200_2011", "text_c10", "annotations/captions_train2017.json"
LABELS, SETS, BOXES = f"{CUB}/image_class_labels.txt", "setid.mat", f"{CUB}/bounding_boxes.txt"
SPLIT, TOKENS = f"{CUB}/train_test_split.txt", "Flickr8k.token.txt"


def save_picture(path: Path, number: int = 0, size: tuple[int, int] = (40, 32)) -> None:
    """A picture of one colour, red = 10 * number; a PNG, whatever its suffix, so it is exact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10 * number, 0, 0)).save(path, "PNG")


def save_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def reports(dataset: CaptionedDataset) -> list[str]:
    """What was left out, as `path: reason`."""
    return [f"{s.path}: {s.reason}" for s in dataset.skipped]


def move(root: Path, *pairs: tuple[str, str]) -> None:
    """Rename files or folders of a data set."""
    for old, new in pairs:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


def splits(spec: str | Path) -> dict[str, str]:
    """Split of each example by its id."""
    return {e.id: e.meta["split"] for e in load_dataset(str(spec), "all", 8)}


def refusal(spec: str, split: str = "all") -> str:
    """The sentence with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        load_dataset(spec, split, 8)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mat(**arrays: Any) -> bytes:
    """A file of MATLAB with these arrays."""
    file = io.BytesIO()
    pytest.importorskip("scipy.io").savemat(file, arrays)
    return file.getvalue()


# --- miniatures -----------------------------------------------------------------------------------

BIRDS = ["7.Tern/T_2", "7.Tern/T_1", "2.Wren/W_1", "2.Wren/W_2", "9.Auk/A_1", "4.Jay/J_1"]
"""Pictures in the order of images.txt, which is not that of their names."""
CLASSES = {"7.Tern": 1, "2.Wren": 2, "9.Auk": 3, "4.Jay": 4}


def make_cub(root: Path) -> Path:
    """Birds 1 to 6, of which 2, 4 and 6 are of training; each has two captions."""
    base, rows = root / "CUB_200_2011", list(enumerate(BIRDS, start=1))
    for n, name in rows:
        save_picture(base / f"images/{name}.jpg", n)
        save_text(root / f"text_c10/{name}.txt", f"bird {n} .", f"  one  bird {n}", "")
    save_text(base / "images.txt", *(f"{n} {name}.jpg" for n, name in rows))
    labels = (f"{n} {CLASSES[name.split('/')[0]]}" for n, name in rows)
    save_text(base / "image_class_labels.txt", *labels)
    save_text(base / "train_test_split.txt", *(f"{n} {(n + 1) % 2}" for n, _ in rows))
    save_text(base / "bounding_boxes.txt", *(f"{n} 4.0 2.0 20.0 9.0" for n, _ in rows))
    return root


FLOWERS = [77, 5, 77, 1, 102, 1]
"""Class of each flower."""


def make_flowers(root: Path) -> Path:
    for n, label in enumerate(FLOWERS, start=1):
        save_picture(root / f"jpg/image_{n:05}.jpg", n)
        save_text(root / f"text_c10/class_{label:05}/image_{n:05}.txt", f"flower {n}", "a flower")
    (root / "imagelabels.mat").write_bytes(mat(labels=[FLOWERS]))
    (root / "setid.mat").write_bytes(mat(trnid=[[4]], valid=[[2, 3]], tstid=[[1, 5, 6]]))
    return root


def save_coco(root: Path, part: str, captions: dict[int, list[tuple[int, str]]]) -> None:
    """A set of COCO: pictures with (number, text) of their captions, in reverse order."""
    year = 2000 + int(part[-2:])
    prefix = f"COCO_{part}_" if year == 2014 else ""
    images = [{"id": n, "file_name": f"{prefix}{n:012}.jpg"} for n in captions]
    notes = [
        {"id": number, "image_id": n, "caption": text}
        for n, texts in captions.items()
        for number, text in texts
    ]
    file = root / f"annotations/captions_{part}.json"
    save_text(file, json.dumps({"images": images, "annotations": notes[::-1]}))
    for image in images:
        save_picture(root / part / image["file_name"], image["id"])


def make_coco(root: Path) -> Path:
    first = {7: [(3, "a cat "), (1, "One\ncat."), (10, "a cat")], 5: [(2, "a dog")]}
    save_coco(root, "train2017", first)
    save_coco(root, "val2017", {6: [(1, "a cow")]})
    return root


NAMES = ["3_b.jpg", "1_a.jpg", "5_c.jpg", "6_d.jpg"]


def make_flickr8k(root: Path) -> Path:
    """Four pictures, the last of which is in no list; the table names a fifth that is not there."""
    for n, name in enumerate(NAMES):
        save_picture(root / "Flicker8k_Dataset" / name, n)
    lines = [f"{name}#{k}\tdog {k} , {name[2]} ." for name in [*NAMES, "7_x.jpg.1"] for k in (0, 1)]
    save_text(root / "Flickr8k.token.txt", *lines)
    for part, name in zip(("train", "dev", "test"), NAMES[:3], strict=True):
        save_text(root / f"Flickr_8k.{part}Images.txt", name)
    return root


def make_kaggle(root: Path) -> Path:
    for n, name in enumerate(NAMES[:2]):
        save_picture(root / "Images" / name, n)
    rows = [f'{name},"{name[2]}, a ""dog"""' for name in NAMES[:2]]
    save_text(root / "captions.txt", "image,caption", *rows, "1_a.jpg,plain")
    return root


MAKERS: dict[str, Callable[[Path], Path]] = {
    "cub": make_cub,
    "flowers": make_flowers,
    "coco": make_coco,
    "flickr8k": make_flickr8k,
    "kaggle": make_kaggle,
}
