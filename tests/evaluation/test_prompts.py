"""The prompts: `include` agrees with the caption, and `heldout` prompts are new to training.

Every composition score rests on both, and an error would go unnoticed. So a small independent
grammar reads the captions here, and scenes of training are searched for each combination.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lineage.data.shapes import LEVELS, Shapes, heldout_pair, heldout_relation, make_scenes
from lineage.data.shapes_draw import COLOURS, SDF
from lineage.errors import UserError
from lineage.evaluation.prompts import TASKS, Prompt, make_prompts, read_prompts, to_lines

FILE = Path(__file__).parents[2] / "data" / "prompts" / "shapes.jsonl"
SHAPES, COLOUR_NAMES = list(SDF), list(COLOURS)
GOOD = (
    '{"tag": "colors", "include": [{"class": "circle", "color": "red"}], "prompt": "a red circle"}'
)

FRAMES = r"(?:a picture of |a drawing of |there is |there are )?"
GROUND = r"(?: on a (?P<ground>white|black|grey) background)?"
PLACE = r"(?: (?P<place>(?:in|at|on) the (?:top|bottom|left|right|middle|(?:top|bottom) \w+)))?"
RELATIONS = {
    "to the left of": "left of",
    "to the right of": "right of",
    "left of": "left of",
    "right of": "right of",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
}
JOINTS = (*RELATIONS, "next to", "and")
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "2": 2, "three": 3, "3": 3, "four": 4, "4": 4}
THING = re.compile(
    rf"(?P<number>{'|'.join(NUMBERS)}) (?:(?P<size>small|large) )?"
    rf"(?:(?P<colour>{'|'.join(COLOUR_NAMES)}) )?(?P<noun>[a-z]+?)"
    rf"(?: that is (?P<late>{'|'.join(COLOUR_NAMES)}))?"
)


@lru_cache
def prompts_of(level: str) -> list[Prompt]:
    return make_prompts(level)


def parsed(text: str) -> dict[str, Any]:
    """The scene of a caption, by a grammar that shares nothing with the one that wrote it."""
    whole = re.fullmatch(FRAMES + r"(?P<what>.+?)" + PLACE + GROUND, text)
    assert whole, text
    joint = next((j for j in JOINTS if f" {j} " in whole["what"]), None)
    objects = []
    for words in whole["what"].split(f" {joint} ") if joint else [whole["what"]]:
        match = THING.fullmatch(words)
        assert match, text
        number = NUMBERS[match["number"]]
        plural = {shape + ("es" if shape == "cross" else "s"): shape for shape in SHAPES}
        shape = match["noun"] if number == 1 else plural[match["noun"]]
        assert shape in SHAPES, text
        if match["number"] in ("a", "an"):
            assert (words.split()[1][0] in "aeiou") == (match["number"] == "an"), text
        objects.append((shape, number, match["colour"] or match["late"], match["size"]))
    relation = RELATIONS.get(joint or "")
    return {
        "objects": objects,
        "relation": relation,
        "place": whole["place"],
        "on": whole["ground"],
    }


def entries(prompt: Prompt) -> tuple[list[tuple[str, int, str | None, str | None]], str | None]:
    """Objects of `include` in the order of the caption, and the relation of the first."""
    objects = [(o.shape, o.count, o.colour, o.size) for o in prompt.include]
    placed = [(i, o.position) for i, o in enumerate(prompt.include) if o.position]
    if not placed:
        return objects, None
    ((number, (relation, to)),) = placed
    assert number != to
    return [objects[number], objects[to]], relation


def test_the_file_is_what_the_program_makes() -> None:
    """The file and the function must give the same prompts."""
    assert FILE.read_text() == "".join(to_lines(prompts_of(level)) for level in LEVELS)


@pytest.mark.parametrize("level", LEVELS)
def test_every_task_has_enough_different_prompts(level: str) -> None:
    """With fewer than 50 pictures a interval is too wide; equal prompts would count twice."""
    groups: dict[tuple[str, str], list[str]] = {}
    for prompt in prompts_of(level):
        assert prompt.level == level
        groups.setdefault((prompt.tag, prompt.split), []).append(prompt.prompt)
    assert set(groups) == {(task, split) for task in TASKS for split in ("test", "heldout")}
    for task in TASKS:
        both = groups[task, "test"] + groups[task, "heldout"]
        assert len(groups[task, "test"]) >= 50, task
        assert len(groups[task, "heldout"]) >= 25, task
        assert len(set(both)) == len(both), task


@pytest.mark.parametrize("level", LEVELS)
def test_include_agrees_with_the_caption(level: str) -> None:
    """A wrong `include` would call right pictures wrong."""
    for prompt in prompts_of(level):
        scene = parsed(prompt.prompt)
        objects, relation = entries(prompt)
        assert scene["objects"] == objects, prompt.prompt
        assert scene["relation"] == relation, prompt.prompt
        assert scene["on"] == prompt.background, prompt.prompt
        assert {scene["place"]} == {o.place for o in prompt.include}, prompt.prompt


@pytest.mark.parametrize("level", LEVELS)
def test_tasks_are_those_of_geneval(level: str) -> None:
    """A task's score can be compared only if its prompts are of the kind of GenEval's task."""
    for prompt in prompts_of(level):
        objects, relation = entries(prompt)
        numbers = [number for _, number, _, _ in objects]
        coloured = [colour is not None for _, _, colour, _ in objects]
        different = len({shape for shape, *_ in objects}) == len(objects)
        expected = {
            "single_object": numbers == [1] and coloured == [prompt.split == "heldout"],
            "two_object": numbers == [1, 1] and different and not relation,
            "counting": len(numbers) == 1 and numbers[0] in (2, 3, 4),
            "colors": numbers == [1] and coloured == [True],
            "position": numbers == [1, 1] and different and relation is not None,
            "color_attr": numbers == [1, 1] and all(coloured) and different and not relation,
        }
        assert expected[prompt.tag], prompt
        if prompt.tag == "color_attr":
            assert objects[0][2] != objects[1][2], prompt  # otherwise nothing could be exchanged
    counts = Counter(p.include[0].count for p in prompts_of(level) if p.tag == "counting")
    assert min(counts[n] for n in (2, 3, 4)) >= 15, counts  # no count dominates


@pytest.mark.parametrize("level", LEVELS)
def test_lines_have_the_format_of_geneval(level: str) -> None:
    """Tools for GenEval's file must be able to read ours."""
    for line in to_lines(prompts_of(level)).splitlines():
        entry = json.loads(line)
        extra = {"level", "split", "background"}
        exclude = {"exclude"} if entry["tag"] == "counting" else set()
        assert set(entry) - extra == {"tag", "include", "prompt"} | exclude
        assert isinstance(entry["prompt"], str) and entry["prompt"]
        for number, item in enumerate(entry["include"]):
            assert set(item) <= {"class", "count", "color", "position", "size", "place"}
            assert isinstance(item["class"], str) and isinstance(item["count"], int)
            if "position" in item:
                relation, to = item["position"]
                assert relation in ("left of", "right of", "above", "below")
                assert 0 <= to < number  # GenEval's checker looks back only
        if exclude:
            (item,), (never,) = entry["include"], entry["exclude"]
            assert never == {"class": item["class"], "count": item["count"] + 1}


def unseen_pairs(level: str, prompt: Prompt) -> list[bool]:
    """For each object with a named colour, whether training never shows that pair."""
    return [
        bool(
            heldout_pair(
                LEVELS[level],
                np.array(SHAPES.index(o.shape)),
                np.array(COLOUR_NAMES.index(o.colour)),
            )
        )
        for o in prompt.include
        if o.colour
    ]


def unseen_relation(level: str, prompt: Prompt) -> bool:
    objects, relation = entries(prompt)
    if relation is None:
        return False
    first, second = (np.array(SHAPES.index(shape)) for shape, *_ in objects)
    if relation in ("right of", "below"):
        first, second = second, first
    left, above = heldout_relation(LEVELS[level], first, second)
    return bool(left if relation in ("left of", "right of") else above)


@pytest.mark.parametrize("level", LEVELS)
def test_only_held_out_prompts_have_combinations_that_training_never_shows(level: str) -> None:
    """By the rule of `shapes`: exactly one such combination in each."""
    for prompt in prompts_of(level):
        unseen = [*unseen_pairs(level, prompt), unseen_relation(level, prompt)]
        assert sum(unseen) == (prompt.split == "heldout"), prompt


@pytest.mark.parametrize("level", LEVELS)
def test_training_shows_the_combinations_of_test_prompts_and_no_others(level: str) -> None:
    """The same, by scenes of training instead of the rule."""
    scenes = make_scenes(LEVELS[level], 0, "train", np.arange(20_000))
    pairs, relations = set(), set()
    for slot in range(4):
        rows = scenes.count > slot
        pairs |= set(
            zip(scenes.shape[rows, slot].tolist(), scenes.colour[rows, slot].tolist(), strict=True)
        )
    two = scenes.kind == 1
    apart = scenes.centre[two, 0] - scenes.centre[two, 1]  # (B, 2), of the first from the second
    for a, b, (x, y) in zip(
        scenes.shape[two, 0].tolist(), scenes.shape[two, 1].tolist(), apart.tolist(), strict=True
    ):
        across = [("left of", "right of")[x > 0]] if abs(x) > 0.2 else []
        upright = [("above", "below")[y > 0]] if abs(y) > 0.2 else []
        turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        for name in across + upright:
            relations |= {(a, name, b), (b, turned[name], a)}
    for prompt in prompts_of(level):
        pairs_of_prompt = [
            (SHAPES.index(o.shape), COLOUR_NAMES.index(o.colour))
            for o in prompt.include
            if o.colour
        ]
        objects, relation = entries(prompt)
        occurs = [pair in pairs for pair in pairs_of_prompt]
        if relation:
            one, other = (SHAPES.index(shape) for shape, *_ in objects)
            occurs.append((one, relation, other) in relations)
        assert occurs.count(False) == (prompt.split == "heldout"), prompt.prompt


def wording(text: str) -> str:
    """The wording of a caption: its names are replaced by placeholders."""
    colours, shapes = "|".join(COLOUR_NAMES), "|".join(SHAPES)
    text = re.sub(rf"\b(an? )?({colours})\b", lambda m: ("a " if m[1] else "") + "COLOUR", text)
    text = re.sub(rf"\b({shapes})(e?s)?\b", "SHAPE", text)
    return re.sub(r"\b(white|black|grey)\b", "GROUND", text)


@pytest.mark.parametrize("level", LEVELS)
def test_every_word_and_wording_occurs_in_training(level: str) -> None:
    """A word or phrase that no training caption has would test the text encoder's English, not the
    drawing.
    """
    captions = set(Shapes(level, "train", 16).all_captions())
    words = {word for text in captions for word in text.split()}
    wordings = {wording(text) for text in captions}
    for prompt in prompts_of(level):
        assert set(prompt.prompt.split()) <= words, prompt.prompt
        assert wording(prompt.prompt) in wordings, prompt.prompt


def test_written_prompts_are_read_unchanged(tmp_path: Path) -> None:
    prompts = [prompt for level in LEVELS for prompt in prompts_of(level)]
    assert read_prompts(FILE) == prompts
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n" + to_lines(prompts[::-1]).replace("\n", "\n\n"))
    assert read_prompts(path) == prompts[::-1]
    assert to_lines(read_prompts(path)) == to_lines(prompts[::-1])


def test_a_line_of_geneval_needs_none_of_our_keys(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(GOOD)
    (prompt,) = read_prompts(path, "medium")
    assert (prompt.level, prompt.split, prompt.background) == ("medium", "test", None)
    assert [(o.shape, o.count, o.colour) for o in prompt.include] == [("circle", 1, "red")]


def line(**changes: Any) -> str:
    return json.dumps({**json.loads(GOOD), **changes})


BROKEN = {
    "class": (line(include=[{"class": "cube"}]), "'cube'"),
    "no class": (line(include=[{"count": 1}]), "class"),
    "color": (line(include=[{"class": "circle", "color": "mauve"}]), "'mauve'"),
    "size": (line(include=[{"class": "circle", "size": "huge"}]), "'huge'"),
    "place": (line(include=[{"class": "circle", "place": "in a corner"}]), "'in a corner'"),
    "background": (line(background="beige"), "'beige'"),
    "level": (line(level="harder"), "'harder'"),
    "relation": (
        line(include=[{"class": "circle"}, {"class": "star", "position": ["near", 0]}]),
        "'near'",
    ),
    "position nowhere": (
        line(include=[{"class": "circle"}, {"class": "star", "position": ["above", 2]}]),
        "points to no other entry",
    ),
    "position before": (
        line(include=[{"class": "circle"}, {"class": "star", "position": ["above", -1]}]),
        "points to no other entry",
    ),
    "half a position": (
        line(include=[{"class": "circle"}, {"class": "star", "position": ["above"]}]),
        "",
    ),
    "five objects": (line(include=[{"class": "circle", "count": 5}]), "5 objects"),
    "five in two": (
        line(include=[{"class": "circle", "count": 3}, {"class": "star", "count": 2}]),
        "5 objects",
    ),
    "nothing": (line(include=[]), "0 objects"),
    "no include": ('{"tag": "colors", "prompt": "a red circle"}', "include"),
    "no prompt": ('{"tag": "colors", "include": [{"class": "circle"}]}', "prompt"),
    "no tag": ('{"prompt": "a circle", "include": [{"class": "circle"}]}', "tag"),
    "count": (line(include=[{"class": "circle", "count": "some"}]), "'some'"),
    "include is a number": (line(include=7), ""),
    "include is one entry": (line(include={"class": "circle"}), ""),
    "a list": ("[1, 2]", ""),
    "a number": ("3", ""),
    "not JSON": ("a red circle", ""),
    "half a line": (GOOD[:40], ""),
}


def error_of(path: Path) -> str:
    """The one sentence of the error that reading `path` raises."""
    with pytest.raises(UserError) as raised:
        read_prompts(path)
    sentence = str(raised.value)
    assert sentence.endswith(".") and "\n" not in sentence and "Traceback" not in sentence
    assert str(path) in sentence
    return sentence


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_one_sentence_that_names_it(name: str, tmp_path: Path) -> None:
    """Prompts are written by hand, and the writer must know which line to correct."""
    text, clue = BROKEN[name]
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n\n{text}\n{GOOD}\n")
    sentence = error_of(path)
    assert "line 3" in sentence and clue in sentence


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.rstrip("\n").encode(),
    ],
    ids=["BOM", "UTF-16 LE", "UTF-16 BE", "CRLF", "CR", "no end of line"],
)
def test_a_file_is_read_as_editors_save_it(encode: Callable[[str], bytes], tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(encode(f"{GOOD}\n\n{line(prompt='ein grüner Kreis')}\n"))
    assert [p.prompt for p in read_prompts(path)] == ["a red circle", "ein grüner Kreis"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x7f", "\u00a0"])
def test_a_separator_inside_a_string_ends_no_line(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    prompt = f"a red{separator}circle"
    text = json.dumps({**json.loads(GOOD), "prompt": prompt}, ensure_ascii=False)
    path.write_text(f"{text}\n{GOOD}\n", encoding="utf-8")
    assert [p.prompt for p in read_prompts(path)] == [prompt, "a red circle"]


def test_a_line_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(f"{GOOD}\n{GOOD}\n".encode() + b'{"prompt": "caf\xe9"}\n')
    assert "line 3" in error_of(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX files")
def test_a_pipe_or_a_device_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in error_of(tmp_path / "pipe")
    assert "device" in error_of(Path("/dev/zero"))
    assert "folder" in error_of(tmp_path)
    monkeypatch.setattr("lineage.evaluation.prompts.MAX_BYTES", 10)
    (tmp_path / "large").write_text(GOOD)
    assert "MB" in error_of(tmp_path / "large")


@pytest.mark.parametrize("data", [b"", b"\n \n", bytes(range(256)), b"\x89PNG\r\n\x1a\n\x00\xff"])
def test_a_file_without_prompts_is_one_sentence(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(data)
    error_of(path)


def test_a_missing_file_or_a_folder_is_one_sentence(tmp_path: Path) -> None:
    error_of(tmp_path / "none.jsonl")
    error_of(tmp_path)
