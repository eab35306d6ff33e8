"""The layouts of the public data sets (`cub`, `flowers`, `coco`, `flickr8k`), and their options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from miniatures import (
    BIRDS,
    FLOWERS,
    MAKERS,
    NAMES,
    TOKENS,
    make_coco,
    make_cub,
    make_flickr8k,
    make_flowers,
    make_kaggle,
    mat,
    move,
    refusal,
    replace,
    reports,
    save_coco,
    save_picture,
    save_text,
    splits,
)
from PIL import Image, ImageDraw

from lineage.data import load_dataset, parse_spec
from lineage.data.cached import CachedDataset
from lineage.data.contract import CaptionedDataset
from lineage.data.pictures import PictureDataset
from lineage.data.splits import class_split
from lineage.data.tools import check

MINIATURES = Path(__file__).resolve().parents[3] / "shared" / "data" / "layouts"


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
    twice = data.batch([0, 0], [1, 2], 0)
    assert torch.equal(twice.extra["mean"], twice.image.mean((2, 3)))


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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("crop=pad&crop=centre", "the option 'crop' twice"),
        ("crop", "no crop="),
        ("=pad", "no option ''"),
    ],
)
def test_options_that_cannot_be_read(tmp_path: Path, options: str, sentence: str) -> None:
    save_pair(tmp_path, "a")
    assert sentence in refusal(f"{tmp_path}?{options}")


def test_a_split_by_class_leaves_a_class_for_training() -> None:
    assert class_split(["a"]) == {"a": "train"}
    assert sorted(class_split("ab").values()) == ["test", "train"]
    assert sorted(class_split("abcdefgh").values()).count("test") == 2
