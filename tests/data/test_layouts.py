"""The layouts of the public data sets (`cub`, `flowers`, `coco`, `flickr8k`), and their options."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from lineage.data import load_dataset, parse_spec
from lineage.data.cached import CachedDataset
from lineage.data.contract import CaptionedDataset
from lineage.data.pictures import PictureDataset
from lineage.data.tools import check
from lineage.errors import UserError

MINIATURES = Path(__file__).resolve().parents[3] / "shared" / "data" / "layouts"

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


def contents(data: CaptionedDataset) -> list[tuple[str, int | None, str, int]]:
    """Id, label, split and colour of each example."""
    rows = [(e.id, e.label, e.meta["split"], int(e.image[0, 4, 4])) for e in data]
    return [(name, label, split, red // 10) for name, label, split, red in rows]


def test_cub_is_read_by_its_tables(tmp_path: Path) -> None:
    data = load_dataset(str(make_cub(tmp_path)), "all")
    labels, parts = [0, 0, 1, 1, 2, 3], ["test", "train"] * 3
    expected = zip(BIRDS, labels, parts, range(1, 7), strict=True)
    assert contents(data) == list(expected)
    assert data[1].captions == ("bird 2 .", "one bird 2") and data[4].meta["class"] == "9.Auk"
    assert data.skipped == []


def test_flowers_are_read_by_their_tables(tmp_path: Path) -> None:
    data = load_dataset(str(make_flowers(tmp_path)), "all")
    parts = ["test", "validation", "validation", "train", "test", "test"]
    rows = enumerate(zip(FLOWERS, parts, strict=True), start=1)
    expected = [(f"image_{n:05}", label - 1, part, n) for n, (label, part) in rows]
    assert contents(data) == expected
    assert data[2].captions == ("flower 3", "a flower") and data.skipped == []


def test_coco_captions_are_joined_by_the_pictures_number(tmp_path: Path) -> None:
    data = load_dataset(str(make_coco(tmp_path)), "all")
    parts = [(7, "train"), (5, "train"), (6, "validation")]
    assert contents(data) == [(f"{n:012}", None, part, n) for n, part in parts]
    captions = [("One cat.", "a cat"), ("a dog",), ("a cow",)]
    assert [e.captions for e in data] == captions and data.skipped == []


def test_flickr8k_leaves_out_the_broken_name_and_pictures_in_no_list(tmp_path: Path) -> None:
    make_flickr8k(tmp_path)
    save_picture(tmp_path / "Flicker8k_Dataset/8_e.jpg")
    data = load_dataset(str(tmp_path), "all")
    expected = [("3_b", "train"), ("1_a", "validation"), ("5_c", "test")]
    rows = [(name, None, part, n) for n, (name, part) in enumerate(expected)]
    assert contents(data) == rows
    assert data[1].captions == ("dog 0 , a .", "dog 1 , a .")
    assert sorted(reports(data)) == [
        "7_x.jpg.1: the picture is missing (captions in Flickr8k.token.txt)",
        "Flicker8k_Dataset/6_d.jpg: the picture is in none of the lists of splits",
        "Flicker8k_Dataset/8_e.jpg: no line of Flickr8k.token.txt names this picture",
    ]


def test_the_table_of_kaggle_may_have_quoted_commas_and_lists_of_splits(tmp_path: Path) -> None:
    make_kaggle(tmp_path)
    save_text(tmp_path / "Flickr_8k.testImages.txt", *NAMES[:2])
    data = load_dataset(str(tmp_path), "test")
    assert contents(data) == [("3_b", None, "test", 0), ("1_a", None, "test", 1)]
    assert [e.captions for e in data] == [('b, a "dog"',), ('a, a "dog"', "plain")]
    assert data.skipped == []


def test_a_lost_character_of_reeds_captions_becomes_a_blank(tmp_path: Path) -> None:
    make_cub(tmp_path)
    save_text(tmp_path / "text_c10/7.Tern/T_2.txt", "a bird\ufffd\ufffds wing", "\ufffd\ufffd")
    (tmp_path / "text_c10/7.Tern/T_1.txt").write_bytes(b"a bird \xff\xfe is\r\nblue\n")
    data = load_dataset(str(tmp_path), "all")
    captions = [("a bird s wing",), ("a bird is", "blue")]
    assert [e.captions for e in data][:2] == captions and data.skipped == []


def move(root: Path, *pairs: tuple[str, str]) -> None:
    """Rename files or folders of a data set."""
    for old, new in pairs:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("maker", "moves"),
    [
        ("cub", []),
        ("cub", [("text_c10", "CUB_200_2011/text_c10"), ("CUB_200_2011", "birds")]),
        ("cub", [("text_c10", "data/birds/text"), ("CUB_200_2011", "deep/er/CUB_200_2011")]),
        ("flowers", [("jpg", "102flowers/jpg"), ("text_c10", "cvpr2016_flowers/text_c10")]),
        ("coco", [("train2017", "images/train2017"), ("val2017", "images/val2017")]),
        ("coco", [("train2017/000000000007.jpg", "all/7/000000000007.jpg")]),
        ("coco", [(f"annotations/captions_{p}2017.json", f"{p}/captions_{p}2017.json")
                  for p in ("train", "val")]),
        ("flickr8k", [("Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset"),
                      ("Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")]),
        ("kaggle", []),
    ],
)  # fmt: skip
def test_a_bare_path_is_recognised_wherever_the_parts_lie(
    tmp_path: Path, maker: str, moves: list[tuple[str, str]]
) -> None:
    """Also from one folder above."""
    root = MAKERS[maker](tmp_path / "up" / "set")
    expected = contents(load_dataset(str(root), "all"))
    move(root, *moves)
    kind = "flickr8k" if maker == "kaggle" else maker
    for path in (root, tmp_path / "up"):
        assert parse_spec(str(path)) == (kind, str(path))
        assert contents(load_dataset(str(path), "all")) == expected


@pytest.mark.parametrize("beside", ["", "annotations/"])
@pytest.mark.parametrize("folder", ["train2017", "images/train2017", "images"])
def test_a_picture_of_coco_is_first_looked_for_in_the_folder_of_its_set(
    tmp_path: Path, folder: str, beside: str
) -> None:
    root = tmp_path / "set"
    save_coco(root, "train2017", {7: [(1, "a cat")]})
    move(root, ("train2017", "new"), ("new", folder), ("annotations", "x"))
    move(root, ("x/captions_train2017.json", f"{beside}captions_train2017.json"))
    save_picture(tmp_path / f"a/{7:012}.jpg", 20)
    assert contents(load_dataset(str(tmp_path))) == [(f"{7:012}", None, "train", 7)]


def test_flickr8k_is_recognised_by_its_table_or_by_a_list(tmp_path: Path) -> None:
    make_flickr8k(tmp_path)
    for part in ("train", "dev"):
        (tmp_path / f"Flickr_8k.{part}Images.txt").unlink()
    move(tmp_path, (TOKENS, ".gone"))
    assert TOKENS in refusal(str(tmp_path))
    move(tmp_path, (".gone", TOKENS), ("Flickr_8k.testImages.txt", ".gone"))
    assert parse_spec(str(tmp_path))[0] == "flickr8k"
    assert splits(tmp_path).keys() == {"3_b", "1_a", "5_c", "6_d"}


def test_of_two_forms_of_flickr8k_the_original_is_read(tmp_path: Path) -> None:
    make_kaggle(make_flickr8k(tmp_path) / "A")
    data = load_dataset(str(tmp_path), "all")
    assert [len(e.captions) for e in data] == [2, 2, 2] and data[0].captions[0] == "dog 0 , b ."


def test_a_folder_with_both_years_of_coco_needs_the_year(tmp_path: Path) -> None:
    make_coco(tmp_path)
    save_coco(tmp_path, "train2014", {7: [(1, "of 2014")]})
    assert "?year=2017" in refusal(str(tmp_path))
    assert [e.captions for e in load_dataset(f"{tmp_path}?year=2014")] == [("of 2014",)]
    assert len(load_dataset(f"{tmp_path}?year=2017", "all")) == 3


def test_an_unrelated_images_txt_does_not_hide_the_birds(tmp_path: Path) -> None:
    save_text(make_cub(tmp_path) / "A/images.txt", "a list of something else")
    assert len(load_dataset(str(tmp_path), "all")) == 6


def test_a_picture_that_images_txt_does_not_list_is_reported(tmp_path: Path) -> None:
    path = "CUB_200_2011/images/7.Tern/T_3.jpg"
    save_picture(make_cub(tmp_path) / path)
    assert [s.path for s in load_dataset(str(tmp_path), "all").skipped] == [path]


@pytest.mark.parametrize("maker", ["coco", "flickr8k"])
def test_two_pictures_never_share_an_id(tmp_path: Path, maker: str) -> None:
    """Caches of tensors are keyed by the id."""
    if maker == "coco":
        save_coco(tmp_path, "train2017", {7: [(1, "a cat")], 5: [(2, "a dog")]})
        replace(tmp_path / "annotations/captions_train2017.json", f"{5:012}.jpg", f"{7:012}.png")
        save_picture(tmp_path / f"train2017/{7:012}.png", 5)
    else:
        save_text(make_kaggle(tmp_path) / "captions.txt", "image,caption", "1_a.jpg,a", "1_a.png,b")
        save_picture(tmp_path / "Images/1_a.png", 5)
    data = load_dataset(str(tmp_path), "all")
    assert len(data) == 2 and len({e.id for e in data}) == 2


def test_the_miniatures_beside_the_repository_are_read_whole() -> None:
    if not MINIATURES.is_dir():
        pytest.skip("there are no miniatures beside the repository")
    pytest.importorskip("scipy")
    counts = json.loads((MINIATURES / "layouts.json").read_text())
    flickr, coco = counts["flickr8k"], counts["coco"]
    kaggle = flickr.pop("kaggle")
    for name in ("images", "captions"):
        counts["coco"] = {**counts["coco"], name: sum(part[name] for part in coco.values())}
    for part, year in (("train", "train2017"), ("validation", "val2017")):
        counts["coco"][part] = coco[year]["images"]
    for name, own in {**counts, "flickr8k/kaggle": kaggle}.items():
        path = MINIATURES / name
        data = load_dataset(str(path), "all")
        report = check(str(path))
        assert (len(data), report["loaded"]) == (own["images"], own["images"]), name
        assert report["captions"] == own["captions"], name
        lost = ["a picture"] if "captions_without_picture" in own else []
        assert len(report["skipped"]) == len(lost), report["skipped"]
        if "classes" in own:
            assert data.labels is not None and len(data.labels.unique()) == own["classes"], name
        for split in own.keys() & {"train", "validation", "test"}:
            assert len(load_dataset(str(path), split)) == own[split], (name, split)


# --- options --------------------------------------------------------------------------------------


def save_pair(root: Path, name: str, number: int = 0, size: tuple[int, int] = (40, 20)) -> None:
    save_picture(root / f"{name}.png", number, size)
    save_text(root / f"{name}.txt", name)


def test_pad_shows_the_whole_picture_on_white_and_centre_cuts_its_sides(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", 20)
    with Image.open(tmp_path / "a.png") as image:
        image.putpixel((0, 10), (0, 0, 255))
        image.save(tmp_path / "a.png")
    data = load_dataset(f"{tmp_path}?crop=pad", size=40)
    assert data.name == f"folder:{tmp_path}?crop=pad"  # it loads the same again
    image = data[0].image
    assert image[:, 20, 0].tolist() == [0, 0, 255]
    white = (image == 255).all(0).all(1)
    assert white.tolist() == [True] * 10 + [False] * 20 + [True] * 10
    image = load_dataset(f"folder:{tmp_path}?crop=centre", size=20)[0].image
    assert (image == torch.tensor([200, 0, 0])[:, None, None]).all()


def random_crops(root: Path) -> PictureDataset:
    """Two equal pictures of 38 x 38, whose pixels are their column and row, for crops of 32."""
    for name in "ab":
        save_pair(root, name)
        image = Image.new("RGB", (38, 38))
        image.putdata([(x, y, 0) for y in range(38) for x in range(38)])
        image.save(root / f"{name}.png")
    data = load_dataset(f"{root}?crop=random", size=32)
    assert isinstance(data, PictureDataset)
    return data


def corners(images: torch.Tensor) -> list[tuple[int, int]]:
    """Column and row of the first pixel of each picture, in [-1, 1]."""
    first = (images[:, :2, 0, 0] * 127.5 + 127.5).round().int()
    return [(x, y) for x, y in first.tolist()]


def test_random_crops_are_a_function_of_seed_epoch_and_id(tmp_path: Path) -> None:
    data = random_crops(tmp_path)
    epochs = list(range(100))

    def visits(index: int, seed: int) -> list[tuple[int, int]]:
        return corners(data.batch([index] * 100, epochs, seed).image)

    first = visits(0, 0)
    assert data.varies and {x for x, _ in first} == {y for _, y in first} == set(range(7))
    assert len(set(first)) > 30  # of 49: column and row do not depend on each other
    assert first == visits(0, 0) != visits(1, 0) and first != visits(0, 1)
    alone = [corners(data.batch([1, 0], [0, epoch], 0).image)[1] for epoch in epochs[:5]]
    assert alone == first[:5]
    assert data.batch([0], [3], 0).image.shape == (1, 3, 32, 32)
    assert data[0].image.shape == (3, 32, 32) and data[0].image[:2, 0, 0].tolist() == [3, 3]


def test_a_cache_around_random_crops_holds_nothing(tmp_path: Path) -> None:
    data = CachedDataset(random_crops(tmp_path), "mean", lambda images: images.mean((2, 3)), 10)
    batches = [data.batch([0, 1], [epoch] * 2, 0) for epoch in range(4)]
    for batch in batches:
        assert torch.allclose(batch.extra["mean"], batch.image.mean((2, 3)))
    assert data.varies and len(data.cache) == 0


def test_a_seeded_split_stays_when_a_picture_is_added(tmp_path: Path) -> None:
    for number in range(100):
        save_pair(tmp_path, f"p{number}", size=(8, 8))
    before = splits(f"{tmp_path}?splits=seeded")
    counts = [list(before.values()).count(name) for name in ("test", "validation", "train")]
    assert 4 <= counts[0] <= 17 and 4 <= counts[1] <= 17 and counts[2] > 65
    save_pair(tmp_path, "p00", size=(8, 8))
    after = splits(f"{tmp_path}?splits=seeded")
    del after["p00"]
    assert after == before


def test_seeded_splits_replace_the_lists_of_a_layout(tmp_path: Path) -> None:
    """Also pictures that are in none of the lists are read."""
    make_flickr8k(tmp_path / "flickr")
    make_flowers(tmp_path / "flowers")
    sets = mat(trnid=[[4]], valid=[[2]], tstid=[[1]])
    (tmp_path / "flowers/setid.mat").write_bytes(sets)
    for kind, count in (("flickr", 4), ("flowers", 6)):
        seeded = splits(f"{tmp_path / kind}?splits=seeded")
        assert len(seeded) == count
        assert seeded != splits(f"{tmp_path / kind}?splits=list")


def test_splits_by_class_share_no_class(tmp_path: Path) -> None:
    rows = []
    for number in range(16):
        save_picture(tmp_path / f"{number}.png", size=(8, 8))
        row = {"file_name": f"{number}.png", "text": "a", "label": number % 8}
        rows.append(json.dumps(row))
    save_text(tmp_path / "metadata.jsonl", *rows)
    train, test = (load_dataset(f"{tmp_path}?splits=class", part) for part in ("train", "test"))
    labels = [{e.label for e in data} for data in (train, test)]
    assert [len(part) for part in labels] == [6, 2] and labels[0].isdisjoint(labels[1])


@pytest.mark.parametrize("maker", ["cub", "flowers"])
def test_reeds_lists_of_classes_divide_birds_and_flowers(tmp_path: Path, maker: str) -> None:
    root = MAKERS[maker](tmp_path)
    by_list = splits(root)
    by_class = splits(f"{root}?splits=class")  # without lists: a quarter of the four classes
    data = load_dataset(f"{root}?splits=class", "all")
    train, test = (
        sorted({e.meta["class"] for e in data if by_class[e.id] == part})
        for part in ("train", "test")
    )
    assert len(train) == 3 and len(test) == 1 and test[0] not in train
    lists = {"train": [*test, train[0]], "test": train[1:]}
    save_text(root / "text_c10/trainvalclasses.txt", *lists["train"])
    assert splits(root) == by_list  # one list alone divides nothing
    save_text(root / "text_c10/testclasses.txt", *lists["test"])
    expected = {e.id: next(s for s in lists if e.meta["class"] in lists[s]) for e in data}
    assert splits(root) == splits(f"{root}?splits=class") == expected
    assert splits(f"{root}?splits=list") == by_list != expected


def test_a_split_by_class_needs_classes(tmp_path: Path) -> None:
    save_pair(tmp_path, "a")
    assert "needs a class" in refusal(f"{tmp_path}?splits=class")


@pytest.mark.parametrize(
    ("maker", "options", "words"),
    [
        ("cub", "corp=pad", "did you mean 'crop'?"),
        ("cub", "crop=boks", "box, centre, pad, random"),
        ("coco", "crop=box", "it has centre, pad, random"),
        ("coco", "year=2015", "2014, 2017"),
        ("coco", "splits=class&year=2017", "class"),
        ("flickr8k", "year=2014", "'year'"),
        ("flickr8k", "crop=pad&splits=lists", "list, seeded, class"),
    ],
)
def test_an_unknown_option_or_value_names_those_that_there_are(
    tmp_path: Path, maker: str, options: str, words: str
) -> None:
    assert words in refusal(f"{MAKERS[maker](tmp_path)}?{options}")


def test_a_folder_may_have_the_name_of_an_option(tmp_path: Path) -> None:
    root = tmp_path / "a?crop=pad"
    save_pair(root, "a", 20)
    assert not (load_dataset(str(root))[0].image == 255).any()
    assert (load_dataset(f"folder:{root}?crop=pad")[0].image == 255).any()


# --- the box of a bird ----------------------------------------------------------------------------

Range = tuple[int, int]


def bird(root: Path, box: tuple[int, int, int, int], scale: int = 1) -> Path:
    """A bird whose picture is white with its box (x, y, width, height) in red; 200 x 120 pixels or
    `scale` times that, as JPEG.
    """
    make_cub(root)
    x, y, width, height = (scale * side for side in box)
    image = Image.new("RGB", (200 * scale, 120 * scale), "white")
    ImageDraw.Draw(image).rectangle((x, y, x + width - 1, y + height - 1), "red")
    image.save(root / f"CUB_200_2011/images/{BIRDS[0]}.jpg", "JPEG" if scale > 1 else "PNG")
    line = f"1 {x}.0 {y}.0 {width}.0 {height}.0"
    replace(root / "CUB_200_2011/bounding_boxes.txt", "1 4.0 2.0 20.0 9.0", line)
    return root


def red_part(image: torch.Tensor) -> tuple[Range, Range]:
    """First and last column, and row, of what is red."""
    red = image[1] < 128
    columns, rows = red.any(0).nonzero()[:, 0].tolist(), red.any(1).nonzero()[:, 0].tolist()
    return (columns[0], columns[-1]), (rows[0], rows[-1])


@pytest.mark.parametrize(
    ("box", "size", "columns", "rows"),
    [
        ((80, 40, 40, 20), 60, (10, 49), (20, 39)),  # in the middle of its square
        ((90, 10, 10, 40), 60, (25, 34), (10, 49)),
        ((0, 0, 40, 20), 60, (0, 39), (0, 19)),  # the square is moved inside
        ((170, 100, 30, 20), 45, (15, 44), (25, 44)),
        ((10, 10, 160, 100), 120, (0, 119), (10, 109)),  # 240 pixels, made smaller
    ],
)
def test_a_bird_is_cropped_to_its_box_with_a_margin(
    tmp_path: Path, box: tuple[int, int, int, int], size: int, columns: Range, rows: Range
) -> None:
    root = bird(tmp_path, box)
    assert red_part(load_dataset(str(root), "all", size)[0].image) == (columns, rows)


def test_the_box_is_scaled_where_a_large_jpeg_is_decoded_smaller(tmp_path: Path) -> None:
    root = bird(tmp_path, (140, 20, 40, 20), scale=8)
    with Image.open(root / f"CUB_200_2011/images/{BIRDS[0]}.jpg") as image:
        image.draft("RGB", (240, 240))
        assert image.size == (400, 240)
    (left, right), (top, bottom) = red_part(load_dataset(str(root), "all", 60)[0].image)
    assert [left, right, top, bottom] == pytest.approx([10, 49, 20, 39], abs=1)


def test_another_crop_leaves_the_box_of_a_bird_alone(tmp_path: Path) -> None:
    root = bird(tmp_path, (0, 0, 45, 20))
    image = load_dataset(f"{root}?crop=centre", "all", 120)[0].image
    assert red_part(image) == ((0, 4), (0, 19))


# --- faults ---------------------------------------------------------------------------------------

Change = Callable[[bytes], bytes]


def put(text: bytes) -> Change:
    return lambda raw: text


def put_mat(**arrays: Any) -> Change:
    return lambda raw: mat(**arrays)


def add(line: str) -> Change:
    return lambda raw: raw + line.encode() + b"\n"


def swap(old: str, new: str) -> Change:
    def change(raw: bytes) -> bytes:
        assert old.encode() in raw
        return raw.replace(old.encode(), new.encode())

    return change


def cut(raw: bytes) -> bytes:
    return raw[:-5]


JUNK = put(b"\xff\x00\xfe junk\n" * 9)


@pytest.mark.parametrize(
    ("maker", "file"),
    [
        ("cub", f"{CUB}/images.txt"),
        ("cub", SPLIT),
        ("cub", TEXTS),
        ("flowers", "imagelabels.mat"),
        ("flowers", SETS),
        ("flowers", TEXTS),
        ("coco", "annotations"),
        ("flickr8k", TOKENS),
        ("kaggle", "captions.txt"),
    ],
)
def test_the_sentence_about_a_missing_file_names_it(tmp_path: Path, maker: str, file: str) -> None:
    move(MAKERS[maker](tmp_path), (file, ".gone"))
    kind = "flickr8k" if maker == "kaggle" else maker
    assert Path(file).name in refusal(f"{kind}:{tmp_path}")


def test_files_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    move(make_cub(tmp_path / "cub"), (BOXES, ".gone"))
    assert len(load_dataset(str(tmp_path / "cub"), "all", 8)) == 6
    assert "bounding_boxes.txt" in refusal(f"{tmp_path / 'cub'}?crop=box")
    make_kaggle(tmp_path / "kaggle")
    assert "Flickr_8k.trainImages.txt" in refusal(f"{tmp_path / 'kaggle'}?splits=list")
    assert splits(tmp_path / "kaggle") == {"3_b": "validation", "1_a": "train"}
    save_text(tmp_path / "coco/annotations/instances_val2017.json", "{}")
    assert "holds objects, no captions" in refusal(f"coco:{tmp_path / 'coco'}")


def test_the_split_of_cubs_table_needs_the_table(tmp_path: Path) -> None:
    move(make_cub(tmp_path), (SPLIT, ".gone"))
    assert "train_test_split.txt" in refusal(f"{tmp_path}?splits=list")


def test_without_their_table_classes_are_those_of_the_folders_numbers(tmp_path: Path) -> None:
    move(make_cub(tmp_path), (LABELS, ".gone"))
    assert [e.label for e in load_dataset(str(tmp_path), "all")] == [6, 6, 1, 1, 8, 3]


Row = tuple[str, str, Change | None, int, str]
"""Miniature, file, its change (None: it is removed), pictures that are left, part of `path: reason`
or, if none is left, of the sentence."""

CUB_FAULTS: list[Row] = [
    ("cub", f"{CUB}/images.txt", put(b""), 0, "images.txt"),
    ("cub", f"{CUB}/images.txt", JUNK, 0, "images.txt: line 1"),
    ("cub", f"{CUB}/images.txt", cut, 5, "images/4.Jay/J_1: the picture is missing"),
    ("cub", f"{CUB}/images.txt", add("7"), 6, "images.txt: line 7"),
    ("cub", f"{CUB}/images.txt", add("7 ../../../out.jpg"), 6, "out.jpg: the picture is missing"),
    ("cub", f"{CUB}/images.txt", add("7 ."), 6, "images"),
    ("cub", f"{CUB}/images.txt", add("7 7.Tern/T_2.jpg"), 6, "a second"),
    ("cub", f"{CUB}/images/2.Wren/W_2.jpg", None, 5, "W_2.jpg: the picture is missing"),
    ("cub", f"{TEXTS}/2.Wren/W_2.txt", None, 5, "W_2.jpg: a picture without captions"),
    ("cub", f"{TEXTS}/2.Wren/W_2.txt", put(b" \n"), 5, "W_2.txt: the file has no caption"),
    ("cub", f"{TEXTS}/7.Tern/T_9.txt", add("a"), 6, "T_9.txt: captions without a picture"),
    ("cub", LABELS, JUNK, 6, "image_class_labels.txt: line 1"),
    ("cub", LABELS, swap("1 1\n", "1 1 9\n"), 6, "image_class_labels.txt"),
    ("cub", LABELS, swap("1 1\n", "1 0\n"), 6, "image_class_labels.txt"),
    ("cub", SPLIT, JUNK, 0, "train_test_split.txt"),
    ("cub", SPLIT, swap("1 0\n", "1 x\n"), 5, "train_test_split.txt"),
    ("cub", SPLIT, swap("1 0\n", ""), 5, "train_test_split.txt"),
    ("cub", BOXES, swap("1 4.0 ", "1 "), 6, "bounding_boxes.txt: line 1"),
    ("cub", BOXES, swap("1 4.0 ", "1 x "), 6, "bounding_boxes.txt"),
    ("cub", BOXES, swap("1 4.0 ", "1 nan "), 6, "bounding_boxes.txt"),
]
FLOWERS_FAULTS: list[Row] = [
    ("flowers", "imagelabels.mat", put(b""), 0, "imagelabels.mat is no table"),
    ("flowers", "imagelabels.mat", cut, 0, "imagelabels.mat cannot be read"),
    ("flowers", "imagelabels.mat", put_mat(other=[[1]]), 0, "imagelabels.mat is no table"),
    ("flowers", "imagelabels.mat", put_mat(labels=[FLOWERS[:5]]), 5, "6.jpg: imagelabels"),
    ("flowers", "imagelabels.mat", put_mat(labels=[[0, *FLOWERS[1:]]]), 5, "imagelabels.mat"),
    ("flowers", "imagelabels.mat", put_mat(labels=[[1e300, *FLOWERS[1:]]]), 5, "imagelabels.mat"),
    ("flowers", SETS, JUNK, 0, "setid.mat"),
    ("flowers", SETS, put_mat(trnid=[[4]], valid=[[2]]), 0, "setid.mat is no table"),
    ("flowers", SETS, put_mat(trnid=[[4]], valid=[[2]], tstid=[[1]]), 3, "6.jpg: setid.mat"),
    ("flowers", SETS, put_mat(trnid=[[]], valid=[[]], tstid=[[]]), 0, "setid.mat"),
    ("flowers", SETS, put_mat(trnid=[[1, 4]], valid=[[2, 3]], tstid=[[1, 5, 6]]), 6, "setid.mat"),
    ("flowers", "jpg/image_00001.jpg", None, 5, "image_00001.txt: captions without a picture"),
    ("flowers", f"{TEXTS}/class_00077/image_00001.txt", None, 5, "1.jpg: a picture without"),
    ("flowers", f"{TEXTS}/class_00099/image_00001.txt", add("a"), 6, "image_00001.txt"),
]
COCO_FAULTS: list[Row] = [
    ("coco", TRAIN, JUNK, 1, f"{TRAIN}: the captions are not valid JSON"),
    ("coco", TRAIN, put(b"[" * 100_000), 1, "not valid JSON"),
    ("coco", TRAIN, put(b"[1]"), 1, "not an object"),
    ("coco", TRAIN, put(b'{"images": 1}'), 1, "no list 'images'"),
    ("coco", TRAIN, swap('"id": 7, ', ""), 2, "no id or no file_name"),
    ("coco", TRAIN, swap("000000000007.jpg", "../../out.jpg"), 2, "out.jpg: the picture is"),
    ("coco", TRAIN, swap("0000000007.jpg", "0000000005.jpg"), 2, "5.jpg: a second entry"),
    ("coco", TRAIN, swap('"image_id": 5', '"image_id": 9'), 2, "5.jpg: the picture has no caption"),
    ("coco", TRAIN, swap('"image_id": 5', '"image_id": 9'), 2, "that images does not list: 1"),
    ("coco", "train2017/000000000005.jpg", None, 2, "5.jpg: the picture is missing"),
]
FLICKR_FAULTS: list[Row] = [
    ("flickr8k", TOKENS, put(b""), 0, TOKENS),
    ("flickr8k", TOKENS, JUNK, 0, f"{TOKENS}: it is not UTF-8"),
    ("flickr8k", TOKENS, swap("1_a.jpg#1\t", "1_a.j"), 3, f"{TOKENS}: line 4"),
    ("flickr8k", TOKENS, add("3_b.jpg#x\tdog"), 3, f"{TOKENS}: line 11"),
    ("flickr8k", TOKENS, add("../out.jpg#0\tx"), 3, "out.jpg: the picture is missing"),
    ("flickr8k", "Flickr_8k.testImages.txt", add("3_b.jpg"), 3, "3_b.jpg: it is in test too"),
    ("flickr8k", "Flickr_8k.trainImages.txt", JUNK, 2, "trainImages.txt: it is not UTF-8"),
    ("flickr8k", "Flickr_8k.trainImages.txt", None, 2, "3_b.jpg: the picture is in none"),
    ("flickr8k", "Flicker8k_Dataset/3_b.jpg", None, 2, "3_b.jpg: the picture is missing"),
    ("kaggle", "captions.txt", put(b""), 0, "captions.txt"),
    ("kaggle", "captions.txt", swap("image,", "img,"), 0, "captions.txt:2: the row has no image"),
    ("kaggle", "captions.txt", add("3_b.jpg,a,b"), 2, "captions.txt: line 5 has 3 cells"),
]


@pytest.mark.parametrize(
    "row",
    [*CUB_FAULTS, *FLOWERS_FAULTS, *COCO_FAULTS, *FLICKR_FAULTS],
    ids=lambda row: f"{Path(row[1]).name}: {row[4]}",
)
def test_what_is_wrong_is_reported_and_the_rest_is_read(tmp_path: Path, row: Row) -> None:
    maker, file, change, count, words = row
    root = MAKERS[maker](tmp_path / "up" / "set")
    for folder in (tmp_path, tmp_path / "up"):
        save_picture(folder / "out.jpg")
    path = root / file
    if change is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    if count == 0:
        assert words in refusal(str(root))
        return
    data = load_dataset(str(root), "all", 8)
    assert len(data) == count
    assert len(data.batch(range(count), [0] * count, 0)) == count
    assert all(e.label is None or 0 <= e.label < 102 for e in data)
    assert any(words in report for report in reports(data))


METADATA = [
    *[("cub", f"{CUB}/{name}.txt") for name in ("images", "bounding_boxes", "train_test_split")],
    *[("cub", file) for file in (LABELS, f"{TEXTS}/testclasses.txt", f"{TEXTS}/7.Tern/T_1.txt")],
    *[("flowers", file) for file in ("imagelabels.mat", SETS)],
    ("coco", TRAIN),
    *[("flickr8k", file) for file in (TOKENS, "Flickr_8k.testImages.txt")],
    ("kaggle", "captions.txt"),
]
SPECIAL = [b"\n7 .\n", b"../", b"#", b"\t", b'"', b"-1", b"nan", b"9" * 40]
NEW = st.binary(max_size=8) | st.sampled_from(SPECIAL) | st.text(max_size=5).map(str.encode)
SPLICES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30), NEW), min_size=1, max_size=4)
"""Places (0 is the start of the file, 1 its end), numbers of bytes removed, bytes put there."""


@pytest.mark.parametrize(("maker", "file"), METADATA)
def test_metadata_of_any_bytes_are_read_or_refused(tmp_path: Path, maker: str, file: str) -> None:
    """A part of the file is replaced in a few places; nothing but `UserError` is raised."""

    root = MAKERS[maker](tmp_path)
    if maker == "cub" and "classes" in file:
        save_text(root / TEXTS / "trainvalclasses.txt", "7.Tern", "4.Jay")
        save_text(root / TEXTS / "testclasses.txt", "2.Wren", "9.Auk")
    valid = (root / file).read_bytes()

    @settings(max_examples=40, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(SPLICES)
    def splice(splices: Sequence[tuple[float, int, bytes]]) -> None:
        raw = valid
        for place, length, new in splices:
            start = int(place * len(raw))
            raw = raw[:start] + new + raw[start + length :]
        (root / file).write_bytes(raw)
        try:
            data = load_dataset(str(root), "all", 8)
        except UserError:
            return
        data.batch(range(len(data)), [0] * len(data), 0)

    splice()
