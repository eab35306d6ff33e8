"""Tokenisers: captions to numbers, trained from the captions of the training set and saved with the
run.

Two kinds under one contract:
    `word`: one token a word; what training never saw becomes `<unk>` and is reported by `unknown`.
    `bpe`: byte-level byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): frequent
    words are one token,
        rare ones several, and nothing is unknown, since every byte is a token.

Both are saved as plain JSON. Tokens 0, 1 and 2 mean the same everywhere: padding, unknown word, no
caption.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lineage.errors import UserError, nearest

PAD, UNK, NULL = 0, 1, 2
SPECIAL = ("<pad>", "<unk>", "<null>")

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]|_", re.UNICODE)


def split_words(caption: str) -> list[str]:
    """Lower-case words and punctuation marks, in order.

    `A dog's ball.` -> `a`, `dog's`, `ball`, `.`
    """
    return _WORD.findall(caption.lower())


class Tokenizer(ABC):
    """Captions to token numbers.

    Attributes:
        kind: the name that `make_tokenizer` knows it by.
    """

    kind: str

    @abstractmethod
    def encode(self, caption: str) -> list[int]:
        """The token numbers of one caption, without padding; `[NULL]` for one without words."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for, without special tokens."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of tokens, special ones included."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs."""

    def unknown(self, caption: str) -> list[str]:
        """The words of `caption` that have no token of their own."""
        return []


class WordTokenizer(Tokenizer):
    """One token a word, the most frequent first.

    Args:
        words: the vocabulary, without special tokens.
        drop: read captions as AttnGAN's code does: cut at all that is no letter or digit, and
            leave out what is not in the vocabulary instead of calling it unknown.
    """

    kind = "word"

    def __init__(self, words: list[str], drop: bool = False) -> None:
        self.words, self.drop = words, drop
        self._number = {word: number for number, word in enumerate(words, start=len(SPECIAL))}

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> WordTokenizer:
        """The `size` most frequent words.

        Ties go by the alphabet, so that the order of the data does not matter.
        """
        counts = Counter(word for caption in captions for word in split_words(caption))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[: size - len(SPECIAL)])

    def encode(self, caption: str) -> list[int]:
        ids = [self._number.get(word, UNK) for word in self._split(caption)]
        return [i for i in ids if i != UNK or not self.drop] or [NULL]

    def decode(self, ids: Iterable[int]) -> str:
        offset = len(SPECIAL)
        return " ".join(
            self.words[i - offset] if i >= offset else "<unk>" for i in ids if i not in (PAD, NULL)
        )

    def unknown(self, caption: str) -> list[str]:
        return [word for word in self._split(caption) if word not in self._number]

    def _split(self, caption: str) -> list[str]:
        return re.findall(r"\w+", caption.lower()) if self.drop else split_words(caption)

    def __len__(self) -> int:
        return len(self.words) + len(SPECIAL)

    def to_json(self) -> dict[str, Any]:
        drop = {"drop": True} if self.drop else {}
        return {"kind": self.kind, "words": self.words, **drop}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding.

    A caption is cut into words, each with the blank before it; a word starts as its UTF-8 bytes,
    and the merges join neighbours in the order in which training found them. Tokens: 3 special, 256
    bytes, one for each merge.

    Args:
        merges: pairs of token numbers; merge k makes token `3 + 256 + k`.
    """

    kind = "bpe"
    _BYTE = len(SPECIAL)
    _MERGED = len(SPECIAL) + 256
    _PIECE = re.compile(r"\s*[^\W_]+|\s*[^\w\s]+|\s*_+|\s+", re.UNICODE)

    def __init__(self, merges: list[tuple[int, int]]) -> None:
        self.merges = merges
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._known: dict[str, list[int]] = {}
        self._bytes = [b""] * len(SPECIAL) + [bytes([value]) for value in range(256)]
        for left, right in merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])

    @classmethod
    def _pieces(cls, caption: str) -> list[str]:
        return cls._PIECE.findall(" " + " ".join(caption.lower().split()))

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> BPETokenizer:
        """Merge the most frequent pair of neighbours until there are `size` tokens or no pair
        occurs twice.
        """
        counts = Counter(piece for caption in captions for piece in cls._pieces(caption))
        words = {piece: [cls._BYTE + value for value in piece.encode()] for piece in counts}
        merges: list[tuple[int, int]] = []
        while cls._MERGED + len(merges) < size:
            pairs: Counter[tuple[int, int]] = Counter()
            for piece, ids in words.items():
                for pair in zip(ids, ids[1:], strict=False):
                    pairs[pair] += counts[piece]
            if not pairs:
                break
            best = max(pairs, key=lambda pair: (pairs[pair], (-pair[0], -pair[1])))
            if pairs[best] < 2:
                break
            new = cls._MERGED + len(merges)
            merges.append(best)
            words = {piece: _merge(ids, best, new) for piece, ids in words.items()}
        return cls(merges)

    def _encode_piece(self, piece: str) -> list[int]:
        ids = [self._BYTE + value for value in piece.encode()]
        while len(ids) > 1:
            pairs = set(zip(ids, ids[1:], strict=False))
            best = min(pairs, key=lambda pair: self._rank.get(pair, len(self.merges)))
            if best not in self._rank:
                break
            ids = _merge(ids, best, self._MERGED + self._rank[best])
        return ids

    def encode(self, caption: str) -> list[int]:
        ids: list[int] = []
        for piece in self._pieces(caption) if caption.strip() else ():
            if piece not in self._known:
                self._known[piece] = self._encode_piece(piece)
            ids += self._known[piece]
        return ids or [NULL]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace").strip()

    def __len__(self) -> int:
        return self._MERGED + len(self.merges)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "merges": [list(pair) for pair in self.merges]}


def _merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`ids` with every occurrence of the neighbours `pair` replaced by `new`, from left to
    right.
    """
    merged: list[int] = []
    i = 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def make_tokenizer(kind: str, captions: Iterable[str], size: int) -> Tokenizer:
    """Train a tokeniser of `kind` (`word` or `bpe`) with at most `size` tokens from `captions`.

    Raises:
        UserError: for another kind, or a size below the special tokens (and all bytes).
    """
    least = len(SPECIAL) + (256 if kind == "bpe" else 0)
    if size <= least:
        raise UserError(f"A {kind} tokeniser needs more than {least} tokens, not {size}.")
    if kind == "word":
        return WordTokenizer.train(captions, size)
    if kind == "bpe":
        return BPETokenizer.train(captions, size)
    raise UserError(f"There is no tokeniser {kind!r}: {nearest(kind, ('word', 'bpe'))}")


def tokenizer_from_json(saved: Any) -> Tokenizer:
    """The tokeniser that `to_json` described. Raises `UserError` for anything else."""
    try:
        if saved["kind"] == "word":
            words = [str(word) for word in saved["words"]]
            return WordTokenizer(words, drop=saved.get("drop", False) is True)
        if saved["kind"] == "bpe":
            return BPETokenizer([(int(left), int(right)) for left, right in saved["merges"]])
    except (TypeError, KeyError, ValueError, IndexError, AttributeError):
        pass
    raise UserError("The saved tokeniser is damaged, or of a kind that this version does not know.")
