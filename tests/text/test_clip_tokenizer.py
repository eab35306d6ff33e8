"""The tokeniser of published CLIPs: by hand, on every kind of text, and beside transformers'."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from lineage.errors import UserError
from lineage.text.clip_tokenizer import CLIPTokenizer, byte_characters, byte_order
from lineage.text.tokenizer import tokenizer_from_json

MERGES = [
    *(("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>")),
    *(("#", "#"), ("##", "#</w>"), ('"', '"</w>'), ("a", "t</w>")),
]
LINES = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
STRANGE = [
    "A photo of a CAT",
    "don't 'quote' \"this\" (or that)!?... I'LL we've 's's",
    "naïve café — œuvre, e\u0301",
    "一个红色的圆圈 and हिन्दी ३४",
    "👩‍👩‍👧 waves 🇩🇪",
    "snake_case __init__ x_1",
    "10 m² and ½x, Ⅷ5",
    '1,234.5 % of $7 ### "" #cat',
    "tab\there\nnew a\u00a0b zero\u200bwidth",
    "ß ﬁ \x00\x07",
    "!",
    "!!!",
    "</w> cat</w>",
]


@pytest.fixture
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_lines(LINES, 512 + len(MERGES))


def parts(tokenizer: CLIPTokenizer, caption: str) -> list[str]:
    """The tokens' own text, marks among it."""
    return [tokenizer._parts[i] for i in tokenizer.encode(caption)]


# --- the vocabulary -------------------------------------------------------------------------------


def test_every_byte_has_a_character_that_can_be_seen() -> None:
    """In the published order: `!` is token 0, the blank is among the last, and no two are one."""
    characters, order = byte_characters(), byte_order()
    assert len(set(characters)) == 256 and sorted(order) == list(range(256))
    table = dict(zip(order, characters, strict=True))
    assert all(table[byte] == chr(byte) for byte in [*range(33, 127), 0xA1, 0xFF])
    assert table[0] == chr(256) and table[ord(" ")] == "Ġ" and table[0xAD] == chr(256 + 67)
    assert all(not c.isspace() and c.isprintable() for c in characters)
    assert characters[0] == "!" and characters[93] == "~" and characters[94] == "¡"
    assert order[188:190] == [0, 1]


def test_ids_are_bytes_then_bytes_with_the_mark_then_merges(tokenizer: CLIPTokenizer) -> None:
    assert len(tokenizer) == 512 + len(MERGES)
    assert tokenizer.encode("!") == [256] and tokenizer.encode("!!") == [0, 256]
    assert tokenizer.encode("red") == [512 + 1] and tokenizer.encode("cat") == [512 + 3]
    assert tokenizer.encode("~") == [256 + 93]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("the red cat", ["the</w>", "red</w>", "cat</w>"]),
        ("  THE\tRed \n", ["the</w>", "red</w>"]),
        ("reds", ["re", "d", "s</w>"]),
        ("at", ["at</w>"]),
        ("cab", ["ca", "b</w>"]),  # the merge of lower rank first
        ("red's", ["red</w>", "'", "s</w>"]),
        ("red'x", ["red</w>", "'</w>", "x</w>"]),
        ("##", ["#", "#</w>"]),
        ("### red#", ["###</w>", "red</w>", "#</w>"]),
        ('""', ['""</w>']),
        ("x_red", ["x</w>", "_</w>", "red</w>"]),
        ("12", ["1</w>", "2</w>"]),
        ("a²½b", ["a</w>", "Â", "²</w>", "Â", "½</w>", "b</w>"]),  # no letters, so apart
        ("é", ["Ã", "©</w>"]),
        ("e\u0301", ["Ã", "©</w>"]),  # composed first
        ("red &amp;amp; cat", ["red</w>", "&</w>", "cat</w>"]),  # entities, twice
        ("", []),
        (" \n", []),
    ],
)
def test_words_by_hand(caption: str, expected: list[str], tokenizer: CLIPTokenizer) -> None:
    assert parts(tokenizer, caption) == expected


@pytest.mark.parametrize("caption", STRANGE)
def test_text_comes_back(caption: str, tokenizer: CLIPTokenizer) -> None:
    """In lower case and composed form, without blanks: those between words are not kept."""
    bare = "".join(unicodedata.normalize("NFC", caption).lower().split())
    ids = tokenizer.encode(caption)
    assert "".join(tokenizer.decode(ids).split()) == bare
    assert all(0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.unknown(caption) == []


def test_start_and_end_are_no_text(tokenizer: CLIPTokenizer) -> None:
    """Their ids follow; half a character becomes a mark, not an error."""
    ids = tokenizer.encode("red cat")
    assert tokenizer.decode([len(tokenizer), *ids, len(tokenizer) + 1]) == "red cat"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode([]) == ""


def test_the_rest_follows_the_first_tokens(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.rest("the red cat", 2) == "cat" and tokenizer.rest("the red cat", 3) == ""


def test_a_saved_tokeniser_stays_the_same(tokenizer: CLIPTokenizer) -> None:
    other = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert isinstance(other, CLIPTokenizer) and other.to_json() == tokenizer.to_json()
    assert len(other) == len(tokenizer)
    for caption in STRANGE:
        assert other.encode(caption) == tokenizer.encode(caption)
    with pytest.raises(UserError, match="damaged"):
        tokenizer_from_json({"kind": "clip", "merges": [["a"]]})


# --- files of merges ------------------------------------------------------------------------------


def test_only_the_first_line_is_a_remark(tokenizer: CLIPTokenizer) -> None:
    """29 merges of OpenAI's begin with `\"` or `#`: without them all later ids would be others."""
    openai = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *LINES[1:], "s caret</w>", ""]
    for lines in (openai, LINES[1:], [*LINES, ""]):
        other = CLIPTokenizer.from_lines(iter(lines), 512 + len(MERGES))
        assert other.merges == MERGES


def test_merges_that_the_model_does_not_use_are_left_out() -> None:
    assert CLIPTokenizer.from_lines(LINES, 512 + 4).merges == MERGES[:4]
    assert CLIPTokenizer.from_lines(LINES, 512).merges == []


@pytest.mark.parametrize(
    ("lines", "size", "reason"),
    [
        (LINES, 523, "gives 522 tokens.* has 523"),
        ([], 514, "gives 512 tokens"),
        (["red", "cat"], 514, "gives 512 tokens"),
        (LINES, 50, "has 50"),
        (["#version: 0.2", "Ġ t", "Ġ a", "h e"], 515, "of another tokeniser"),  # of GPT-2
    ],
)
def test_another_list_is_refused_in_a_sentence(lines: list[str], size: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        CLIPTokenizer.from_lines(lines, size)
    assert "\n" not in str(caught.value)


# --- transformers ---------------------------------------------------------------------------------


def learnt_merges(count: int) -> list[tuple[str, str]]:
    """Merges of random neighbours, so that every rule of the order is met."""
    rng = random.Random(0)
    known = list("aeinorst") + [c + "</w>" for c in "aeinorst"]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pair = rng.choice(known), rng.choice(known)
        if not pair[0].endswith("</w>") and "".join(pair) not in known:
            merges.append(pair)
            known.append("".join(pair))
    return merges


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    """On strange text and on random words, whose merges meet in every order."""
    library: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = CLIPTokenizer([*MERGES, *learnt_merges(300)])
    vocabulary = {part: i for i, part in enumerate(ours._parts)}
    special = {"<|startoftext|>": len(ours), "<|endoftext|>": len(ours) + 1}
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, **special}), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in ours.merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    theirs = library.CLIPTokenizer.from_pretrained(tmp_path)
    rng = random.Random(1)
    words = ["".join(rng.choices("aeinorst", k=rng.randint(1, 9))) for _ in range(400)]
    characters = [chr(i) for i in [*range(33, 127), *range(0xA1, 0x250), *range(0x2460, 0x2500)]]
    noise = ["".join(rng.choices([*characters, " "], k=20)).replace("&", "") for _ in range(100)]
    for caption in [*STRANGE, *words, *noise]:
        assert ours.encode(caption) == theirs(caption, add_special_tokens=False)["input_ids"]
