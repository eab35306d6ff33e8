"""The tokeniser of published CLIPs (Radford et al. 2021, section 2.4): byte-pair encoding on
lower-case words, each of which ends in a mark of its own.

    "a photo of cats" -> "a</w>", "photo</w>", "of</w>", "cats</w>"

A file of merges, one pair in a line, gives the vocabulary: 256 characters that stand for bytes, the
same with the mark, then one token for each merge. Start and end tokens follow (`clip_text.py` adds
them).

Departure: OpenAI's code mends broken Unicode first (the `ftfy` library); here text is brought to
composed form (NFC), and well-formed text stays as it is.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from lineage.characters import well_formed
from lineage.errors import UserError
from lineage.text.tokenizer import Tokenizer

END_OF_WORD = "</w>"
_REMARK = "#version"  # in the first line of a file of merges
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""Bytes that stand for visible characters."""


def byte_order() -> list[int]:
    """The bytes in the order of the vocabulary: the visible ones come first."""
    return _VISIBLE + [byte for byte in range(256) if byte not in _VISIBLE]


def byte_characters() -> list[str]:
    """The characters that stand for the bytes of `byte_order`: a visible one for itself, characters
    from 256 on for the others.
    """
    num_others = 256 - len(_VISIBLE)
    return [chr(byte) for byte in _VISIBLE] + [chr(256 + i) for i in range(num_others)]


def _apart(character: str) -> str:
    """A number such as `²` is a word of its own, which `_WORD` would take for a letter."""
    is_number = unicodedata.category(character) in ("No", "Nl")
    return f" {character} " if is_number else character


class CLIPTokenizer(Tokenizer):
    """Byte-pair encoding with a mark at the end of each word.

    Args:
        merges: Pairs of parts that are joined, the most frequent first.
    """

    kind = "clip"

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        self.merges = merges
        characters = byte_characters()
        self._character = dict(zip(byte_order(), characters, strict=True))
        self._byte = {c: byte for byte, c in self._character.items()}
        parts = [*characters, *(c + END_OF_WORD for c in characters), *map("".join, merges)]
        self._parts = parts
        self._id = {part: i for i, part in enumerate(parts)}
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def from_lines(cls, lines: Iterable[str], vocab_size: int) -> CLIPTokenizer:
        """The tokeniser of a file of merges, whose first line is a remark.

        Args:
            lines: Lines of the file. A later line may begin with `#` or `"` like the first.
            vocab_size: Number of tokens without start and end; OpenAI's file has more merges than
                its models use.

        Raises:
            UserError: the file is another, or has too few merges.
        """
        first, *others = [*lines] or [""]
        pairs = [tuple(line.split()) for line in ([] if _REMARK in first else [first]) + others]
        merges = [pair for pair in pairs if len(pair) == 2][: vocab_size - 512]
        if merges and not any(pair[1].endswith(END_OF_WORD) for pair in merges):
            raise UserError(
                f"No merge of the list ends in {END_OF_WORD}, so it is of another tokeniser: name "
                "the merges.txt of a CLIP."
            )
        if len(merges) != vocab_size - 512:
            raise UserError(
                f"The list of merges gives {512 + len(merges):,} tokens, and the checkpoint has "
                f"{vocab_size:,}: name the merges.txt that belongs to it."
            )
        return cls([(first, second) for first, second in merges])

    def encode(self, caption: str) -> list[int]:
        text = html.unescape(html.unescape(well_formed(caption)))
        text = "".join(map(_apart, unicodedata.normalize("NFC", text)))
        ids: list[int] = []
        for word in _WORD.findall(" ".join(text.split()).lower()):
            if word not in self._cache:
                self._cache[word] = self._encode_word(word)
            ids += self._cache[word]
        return ids

    def _encode_word(self, word: str) -> list[int]:
        parts = [self._character[byte] for byte in word.encode()]
        parts[-1] += END_OF_WORD
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: self._rank.get(pair, len(self.merges)))
            if best not in self._rank:
                break
            merged, i = [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append("".join(best))
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return [self._id[part] for part in parts]

    def decode(self, ids: Iterable[int]) -> str:
        text = "".join(self._parts[i] for i in ids if i < len(self._parts))
        words = text.replace(END_OF_WORD, " ")
        data = b"".join(
            b" " if c == " " else bytes([self._byte[c]])
            for c in words
            if c == " " or c in self._byte
        )
        return data.decode(errors="replace").strip()

    def rest(self, caption: str, length: int) -> str:
        return self.decode(self.encode(caption)[length:])

    def __len__(self) -> int:
        return len(self._parts)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "merges": [list(pair) for pair in self.merges]}
