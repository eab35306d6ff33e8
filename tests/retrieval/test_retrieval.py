"""Retrieval: its memory, its parse of a caption, and where it pastes objects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.config import TextConfig
from lineage.data.contract import Batch, to_bytes, to_unit
from lineage.data.shapes import Shapes
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.retrieval.retrieval import (
    Index,
    Part,
    Retrieval,
    RetrievalConfig,
    cut_out,
    grid_cells,
    lay_out,
    parse,
)
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import make_tokenizer

SIZE = 32
WHITE = (240, 240, 240)
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 80, 220)}


def block(colour: str, left: int = 10, side: int = 12, on: tuple[int, int, int] = WHITE) -> Tensor:
    """(3, S, S) uint8: one square on a plain background."""
    picture = torch.tensor(on, dtype=torch.uint8)[:, None, None].repeat(1, SIZE, SIZE)
    rgb = torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None]
    picture[:, 8 : 8 + side, left : left + side] = rgb
    return picture


def make(
    captions: list[str], memory_size: int = 64, encoder: str = "bag", tokenizer: str = "word"
) -> Retrieval:
    config = TextConfig(width=8, num_heads=2)
    text = make_encoder(encoder, config, make_tokenizer(tokenizer, captions, 512))
    return Retrieval(RetrievalConfig(memory_size=memory_size), text, SIZE)


def store(system: Retrieval, pictures: list[Tensor], captions: list[str]) -> list[object]:
    """One training step; returns its turns."""
    batch = Batch(to_unit(torch.stack(pictures)), captions, None, list(captions))
    noise = NoiseStreams(range(len(captions)))
    return list(system.losses(batch, system.text.encode(captions), noise))


def of_blocks(encoder: str = "bag", tokenizer: str = "word") -> Retrieval:
    """A memory of one red, one green and one blue square."""
    captions = [f"a {colour} square" for colour in COLOURS]
    vocabulary = [*captions, "two three four left of right above below next to and zorp over"]
    system = make(vocabulary, encoder=encoder, tokenizer=tokenizer)
    store(system, [block(colour) for colour in COLOURS], captions)
    return system


def covered(picture: Tensor, colour: str) -> Tensor:
    """(S, S) bool, True where a picture in [-1, 1] has `colour`."""
    rgb = to_unit(torch.tensor(COLOURS[colour]))[:, None, None]
    return (picture - rgb).abs().amax(0) < 0.2


def centre(picture: Tensor, colour: str) -> tuple[float, float]:
    rows, columns = covered(picture, colour).nonzero(as_tuple=True)
    assert len(rows) > 20, f"no {colour} in the picture"
    return columns.float().mean().item(), rows.float().mean().item()


def blobs(mask: Tensor) -> int:
    """Number of connected regions."""
    rest, count = set(map(tuple, mask.nonzero().tolist())), 0
    while rest:
        count, queue = count + 1, [rest.pop()]
        while queue:
            y, x = queue.pop()
            for neighbour in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if neighbour in rest:
                    rest.remove(neighbour)
                    queue.append(neighbour)
    return count


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("a red circle", (Part("a red circle"),)),
        ("One red circle.", (Part("a red circle"),)),
        ("there is an orange star", (Part("an orange star"),)),
        ("a picture of two red crosses", (Part("a red cross", 2),)),
        ("4 boxes", (Part("a box", 4),)),
        ("three smiling faces on grass", (Part("a smiling face on grass", 3),)),
        ("a heart and a face", (Part("a heart"), Part("a face"))),
        ("a heart next to two faces", (Part("a heart"), Part("a face", 2))),
        ("a cup left of a hat", (Part("a cup"), Part("a hat", 1, "left"))),
        ("a cup to the right of a hat", (Part("a cup"), Part("a hat", 1, "right"))),
        ("a cup on top of a hat", (Part("a cup"), Part("a hat", 1, "above"))),
        ("a cup over a hat", (Part("a cup"), Part("a hat", 1, "above"))),
        ("a cup under a hat", (Part("a cup"), Part("a hat", 1, "below"))),
        ("a cup, a hat, and a key", (Part("a cup"), Part("a hat"), Part("a key"))),
        ("a flag, in black and white", (Part("a flag, in black and white"),)),
        ("red cup and blue hat", (Part("a red cup"), Part("a blue hat"))),
        (
            "two cups and a hat below a key",
            (Part("a cup", 2), Part("a hat"), Part("a key", 1, "below")),
        ),
    ],
)
def test_parse(caption: str, parts: tuple[Part, ...]) -> None:
    assert parse(caption) == parts


@pytest.mark.parametrize(
    "caption", ["", " ", ",", "and", "a", "two", "left of", "a cat and", "、", "a " * 500]
)
def test_any_caption_gives_a_picture(caption: str) -> None:
    picture = of_blocks().generate(caption)
    assert picture.shape == (1, 3, SIZE, SIZE) and picture.isfinite().all()


@pytest.mark.parametrize(
    "encoder", ["bag", "lstm", "transformer", "joined:bag+lstm", "joined:char_cnn_rnn+bag"]
)
@pytest.mark.parametrize("tokenizer", ["word", "bpe"])
def test_a_stored_caption_gives_its_own_picture(encoder: str, tokenizer: str) -> None:
    system = of_blocks(encoder, tokenizer)
    pictures = system.generate([f"a {colour} square" for colour in COLOURS])
    assert pictures.dtype == torch.float32
    for picture, colour in zip(pictures, COLOURS, strict=True):
        assert torch.equal(to_bytes(picture), block(colour))


def test_a_stored_caption_gives_its_own_picture_among_many() -> None:
    data = Shapes(size=SIZE)
    system = make(list(data.all_captions(200)), memory_size=200)
    batch = data.batch(range(150), [0] * 150, 0)
    turns = system.losses(batch, system.text.encode(batch.caption), NoiseStreams(range(150)))
    assert list(turns) == []
    pictures = to_bytes(system.generate(batch.caption))
    for picture, caption in zip(pictures, batch.caption, strict=True):
        same = [i for i, other in enumerate(batch.caption) if parse(other) == parse(caption)]
        assert any(torch.equal(picture, to_bytes(batch.image[i])) for i in same)


@pytest.mark.parametrize("tokenizer", ["word", "bpe"])
def test_a_caption_in_another_language_gets_the_nearest_one(tokenizer: str) -> None:
    """Its parse is English, so that a Chinese or Russian caption is never pasted from parts."""
    captions = ["一个红色的方块", "一个绿色的方块", "красный круг слева от синего круга"]
    system = make(captions, tokenizer=tokenizer)
    store(system, [block(colour) for colour in COLOURS], captions)
    for caption, colour in (
        ("绿色的方块", "green"),
        ("图片里有一个红色的方块", "red"),
        ("на картинке синий круг", "blue"),
    ):
        assert torch.equal(to_bytes(system.generate(caption))[0], block(colour)), caption


def test_losses_yield_nothing_and_the_memory_fills_up() -> None:
    captions = [f"a thing {i}" for i in range(5)]
    system = make(captions, memory_size=4)
    assert system.groups() == {}
    assert store(system, [block("red", left=i) for i in range(3)], captions[:3]) == []
    assert int(system.count) == 3
    store(system, [block("blue", left=i) for i in range(2)], captions[3:])
    store(system, [block("green")], ["a thing 0"])
    assert int(system.count) == 4
    assert torch.equal(to_bytes(system.generate("a thing 3"))[0], block("blue", left=0))
    assert torch.equal(to_bytes(system.generate("a thing 0"))[0], block("red", left=0))


def test_a_picture_stored_after_sampling_is_found() -> None:
    system = of_blocks()
    system.generate("a red square")
    store(system, [block("green", left=2)], ["a zorp"])
    assert torch.equal(to_bytes(system.generate("a zorp"))[0], block("green", left=2))


def test_ties_are_broken_by_the_seed() -> None:
    captions = ["a red square"] * 8
    system = make(captions)
    store(system, [block("red", left=i) for i in range(8)], captions)
    pictures = [system.generate("a red square", seed=seed) for seed in range(12)]
    assert len({bytes(to_bytes(picture).numpy().tobytes()) for picture in pictures}) > 3
    assert torch.equal(pictures[5], system.generate("a red square", seed=5))


def test_a_picture_does_not_depend_on_its_batch() -> None:
    data = Shapes(size=SIZE)
    system = make(list(data.all_captions(100)), memory_size=100)
    batch = data.batch(range(100), [0] * 100, 0)
    list(system.losses(batch, system.text.encode(batch.caption), NoiseStreams(range(100))))
    captions = [
        "a red circle",
        "two blue stars and a zorp",
        "four red circles above a green cross",
        "what",
    ]
    together = system.generate(captions, seed=3)
    others = system.generate(["x", captions[1], "a b c d e f g and a h", captions[3]], seed=3)
    assert torch.equal(together[1], others[1]) and torch.equal(together[3], others[3])
    system.sample_batch_size = 1
    assert torch.equal(together, system.generate(captions, seed=3))


def test_unknown_words_give_any_picture() -> None:
    system = of_blocks()
    pictures = {system.generate("blarg", seed=seed).numpy().tobytes() for seed in range(20)}
    assert len(pictures) == 3


@pytest.mark.parametrize(
    ("relation", "axis", "first_is_less"),
    [("left of", 0, True), ("to the right of", 0, False), ("above", 1, True), ("under", 1, False)],
)
def test_pasted_objects_stand_in_their_relation(
    relation: str, axis: int, first_is_less: bool
) -> None:
    picture = of_blocks().generate(f"a red square {relation} a blue square")[0]
    red, blue = centre(picture, "red"), centre(picture, "blue")
    assert (red[axis] < blue[axis] - 8) == first_is_less
    assert (red[axis] > blue[axis] + 8) != first_is_less
    assert abs(red[1 - axis] - blue[1 - axis]) < 2
    assert not covered(picture, "green").any()
    assert torch.allclose(picture[:, 0, 0], to_unit(torch.tensor(WHITE)))


def test_the_same_words_in_another_order_are_not_used() -> None:
    caption = "a red square left of a blue square"
    system = of_blocks()
    store(system, [block("green")], ["a blue square left of a red square"])
    picture = system.generate(caption)[0]
    assert centre(picture, "red")[0] < centre(picture, "blue")[0]
    whole = system.generate(caption, paste=False)[0]
    assert torch.equal(to_bytes(whole), block("green"))


@pytest.mark.parametrize(("number", "count"), [("two", 2), ("3", 3), ("four", 4)])
def test_counts(number: str, count: int) -> None:
    picture = of_blocks().generate(f"{number} green squares and a red square")[0]
    assert blobs(covered(picture, "green")) == count
    assert blobs(covered(picture, "red")) == 1


def test_an_unknown_object_is_not_pasted() -> None:
    picture = of_blocks().generate("a red square and a blarg")[0]
    assert torch.equal(to_bytes(picture), block("red"))


def test_the_canvas_has_the_first_pictures_background() -> None:
    captions = ["a red square", "a blue square"]
    system = make([*captions, "and"])
    store(system, [block("red", on=(20, 20, 20)), block("blue")], captions)
    picture = system.generate("a red square and a blue square")[0]
    dark = to_unit(torch.tensor((20.0, 20.0, 20.0)))
    assert ((picture - dark[:, None, None]).abs().amax(0) < 0.02).sum() > SIZE * SIZE / 2
    assert centre(picture, "red")[0] < centre(picture, "blue")[0]


def test_cut_out_is_the_object_alone() -> None:
    rgba = cut_out(to_unit(block("red", left=17, side=9)), 40 / 127.5)
    assert rgba.shape == (4, 9, 9) and (rgba[3] == 1).all()
    assert cut_out(torch.zeros(3, SIZE, SIZE), 0.3).shape == (4, SIZE, SIZE)


def test_boxes_are_inside_the_canvas_and_do_not_overlap() -> None:
    assert grid_cells(3) == [(0, 0), (1, 0), (0.5, 1)]
    parts = parse("a cup left of a hat above three keys next to a jar")
    boxes = [box for boxes in lay_out(parts, SIZE) for box in boxes]
    assert len(boxes) == 6
    for i, a in enumerate(boxes):
        assert a.side / 2 - 1e-6 <= min(a.x, a.y) and max(a.x, a.y) <= SIZE - a.side / 2 + 1e-6
        for b in boxes[:i]:
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.side + b.side) / 2 - 1e-6


def test_cosines_equal_those_of_explicit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (30, 6), generator=generator)
    ids[torch.rand(30, 6, generator=generator) < 0.3] = 0
    index = Index(ids, ["a thing"] * 30)
    tf = torch.nn.functional.one_hot(ids, 20).sum(1).float()[:, 3:]  # (30, 17)
    vectors = tf * torch.log(31 / ((tf > 0).sum(0) + 0.5))
    expected = torch.nn.functional.cosine_similarity(vectors[4], vectors, dim=1)
    torch.testing.assert_close(index.cosines(ids[4]), expected, rtol=1e-5, atol=1e-6)


def test_the_state_dict_holds_the_whole_memory() -> None:
    system, fresh = of_blocks(), of_blocks()
    store(system, [block("red", left=1)], ["a zörp"])
    store(fresh, [block("blue", left=1)], ["a square"])
    fresh.generate("a red square")  # builds the index of the old memory, which is as full
    fresh.load_state_dict(system.state_dict(), strict=True)
    for name, value in system.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])
    captions = ["a zörp", "a red square above two green squares", "a blue square", "blarg"]
    assert torch.equal(system.generate(captions, seed=2), fresh.generate(captions, seed=2))


def test_an_empty_memory_raises_a_sentence() -> None:
    with pytest.raises(UserError, match="train it first"):
        make(["a cat"]).generate("a cat")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"memory_size": 0}, "memory_size=0 must be at least 1"),
        ({"max_words": 0}, "max_words=0 must be at least 1"),
        ({"max_bytes": 0}, "max_bytes=0 must be at least 1"),
        ({"threshold": 0}, "threshold=0 must be at least 1"),
        ({"fill": 0.0}, "fill=0.0 must be above 0"),
        ({"fill": 1.5}, "fill=1.5 must be at most 1"),
    ],
    ids=str,
)
def test_impossible_settings_raise_a_sentence(change: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        RetrievalConfig(**change)


def test_pictures_of_another_size_raise_a_sentence() -> None:
    with pytest.raises(UserError, match="size=32"):
        store(make(["a cat"]), [torch.zeros(3, 16, 16, dtype=torch.uint8)], ["a cat"])


def test_its_option_is_read_from_the_signature() -> None:
    system = of_blocks()
    assert list(system.options()) == ["paste"]
    assert system.options()["paste"].default is True and system.options()["paste"].sentence
    with pytest.raises(UserError, match="paste"):
        system.generate("a red square", paste="perhaps")
