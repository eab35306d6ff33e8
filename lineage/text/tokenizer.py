"""Tokenisers: captions to token ids, trained from the captions of the training set and saved with
the run.

    word  One token for each word; a word outside the vocabulary becomes `<unk>`, and `unknown`
          lists it.
    bpe   Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in
          GPT-2). Frequent words are one token, rare ones several; every byte is a token, so that
          no text is unknown.

Both are saved as plain JSON. Tokens 0, 1 and 2 are the same in both: padding, unknown word, no
caption. Runs of imported CLIPs have the tokeniser of `clip_tokenizer.py`.

Chinese has no blanks between words. Both tokenisers take each Chinese character as a word of its
own, as BERT's does (Devlin et al. 2019). Otherwise whole clauses would be words, and whole captions
one token, so that a new combination of known words would have no known part.
"""

from __future__ import annotations

import heapq
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from lineage.characters import well_formed
from lineage.config import TextConfig
from lineage.errors import UserError, nearest

PAD, UNK, NULL = 0, 1, 2
SPECIAL = ("<pad>", "<unk>", "<null>")

_HAN = r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+(?:'[^\W_{_HAN}]+)?|[^\w\s]|_", re.UNICODE)


def split_words(caption: str) -> list[str]:
    """Lower-case words, Chinese characters and punctuation marks, in order.

    `A dog's ball.` -> `a`, `dog's`, `ball`, `.`; `红色的圆` -> `红`, `色`, `的`, `圆`
    """
    return _WORD.findall(well_formed(caption).lower())


class Tokenizer(ABC):
    """Captions to token ids.

    Attributes:
        kind: Name for `make_tokenizer`.
    """

    kind: str

    @abstractmethod
    def encode(self, caption: str) -> list[int]:
        """Token ids of one caption, without padding; `[NULL]` for a caption without words."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of tokens, with the special ones."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything that `tokenizer_from_json` needs, as plain JSON values."""

    def unknown(self, caption: str, length: int | None = None) -> list[str]:
        """Words of `caption` that have no token of their own, before its first `length` tokens end;
        in the whole caption if `length` is None.
        """
        return []

    @abstractmethod
    def rest(self, caption: str, length: int) -> str:
        """Text of `caption` after its first `length` tokens."""


class WordTokenizer(Tokenizer):
    """One token for each word, the most frequent first.

    Args:
        words: The vocabulary, without special tokens.
        drop_unknown: If true, captions are split as in AttnGAN's code: at everything but letters
            and digits, and words outside the vocabulary are left out instead of `<unk>`.
    """

    kind = "word"

    def __init__(self, words: list[str], drop_unknown: bool = False) -> None:
        self.words, self.drop_unknown = words, drop_unknown
        self._id = {word: i for i, word in enumerate(words, start=len(SPECIAL))}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> WordTokenizer:
        """Keep the most frequent words.

        Words of equal count are in alphabetical order, so that the order of the data does not
        matter.
        """
        counts = Counter(word for caption in captions for word in split_words(caption))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[: vocab_size - len(SPECIAL)])

    def encode(self, caption: str) -> list[int]:
        ids = [self._id.get(word, UNK) for word in self._split(caption)]
        return [i for i in ids if i != UNK or not self.drop_unknown] or [NULL]

    def decode(self, ids: Iterable[int]) -> str:
        offset = len(SPECIAL)
        return " ".join(
            self.words[i - offset] if i >= offset else "<unk>" for i in ids if i not in (PAD, NULL)
        )

    def unknown(self, caption: str, length: int | None = None) -> list[str]:
        words = self._split(caption)
        return [word for word in words[: self._end(words, length)] if word not in self._id]

    def rest(self, caption: str, length: int) -> str:
        words = self._split(caption)
        return " ".join(words[self._end(words, length) :])

    def _split(self, caption: str) -> list[str]:
        if self.drop_unknown:
            return re.findall(r"\w+", well_formed(caption).lower())
        return split_words(caption)

    def _end(self, words: list[str], length: int | None) -> int:
        """Number of words that the first `length` tokens stand for."""
        tokens = [i for i, word in enumerate(words) if word in self._id or not self.drop_unknown]
        return len(words) if length is None or len(tokens) <= length else tokens[length]

    def __len__(self) -> int:
        return len(self.words) + len(SPECIAL)

    def to_json(self) -> dict[str, Any]:
        option = {"drop_unknown": True} if self.drop_unknown else {}
        return {"kind": self.kind, "words": self.words, **option}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding.

    A caption is split into words, each with the blank before it, or Chinese characters. A word
    starts as its UTF-8 bytes (three of a Chinese character, two of a Russian letter); the merges
    then join neighbours, in the order of training. Tokens: 3 special ones, 256 bytes, one for each
    merge.

    Args:
        merges: Pairs of token ids; merge k makes token `3 + 256 + k`.
    """

    kind = "bpe"
    _BYTE = len(SPECIAL)
    _MERGED = len(SPECIAL) + 256
    _SPLIT = re.compile(
        rf"\s*[{_HAN}]|\s*[^\W_{_HAN}]{{1,64}}|\s*[^\w\s]{{1,64}}|\s*_{{1,64}}|\s+", re.UNICODE
    )
    _STARTS_WITH_HAN = re.compile(rf"[{_HAN}]")

    def __init__(self, merges: list[tuple[int, int]]) -> None:
        self.merges = merges
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._cache: dict[str, list[int]] = {}
        self._bytes = [b""] * len(SPECIAL) + [bytes([value]) for value in range(256)]
        for left, right in merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])

    @classmethod
    def _split(cls, caption: str) -> list[str]:
        text = " ".join(well_formed(caption).lower().split())
        blank = "" if cls._STARTS_WITH_HAN.match(text) else " "
        return cls._SPLIT.findall(blank + text)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Merge the most frequent pair of neighbours until there are `vocab_size` tokens or no
        pair occurs twice.
        """
        counts = Counter(word for caption in captions for word in cls._split(caption))
        words = {word: [cls._BYTE + value for value in word.encode()] for word in counts}
        pairs: Counter[tuple[int, int]] = Counter()
        holders: dict[tuple[int, int], set[str]] = {}  # words in which a pair occurs
        heap: list[tuple[int, tuple[int, int]]] = []  # (-count, pair), some out of date

        def count(some: Iterable[str], sign: int) -> set[tuple[int, int]]:
            changed = set()
            for word in some:
                for pair in zip(words[word], words[word][1:], strict=False):
                    pairs[pair] += sign * counts[word]
                    holders.setdefault(pair, set()).add(word)
                    changed.add(pair)
            return changed

        merges: list[tuple[int, int]] = []
        changed = count(words, 1)
        while cls._MERGED + len(merges) < vocab_size:
            for pair in changed:
                heapq.heappush(heap, (-pairs[pair], pair))
            while heap and -heap[0][0] != pairs[heap[0][1]]:
                heapq.heappop(heap)
            if not heap or heap[0][0] > -2:
                break
            best = heap[0][1]
            merges.append(best)
            affected = holders.pop(best)  # in other words, no pair changes
            changed = count(affected, -1)
            for word in affected:
                words[word] = _merge(words[word], best, cls._MERGED + len(merges) - 1)
            changed |= count(affected, 1)
        return cls(merges)

    def _encode_word(self, word: str) -> list[int]:
        ids = [self._BYTE + value for value in word.encode()]
        while len(ids) > 1:
            pairs = set(zip(ids, ids[1:], strict=False))
            best = min(pairs, key=lambda pair: self._rank.get(pair, len(self.merges)))
            if best not in self._rank:
                break
            ids = _merge(ids, best, self._MERGED + self._rank[best])
        return ids

    def encode(self, caption: str) -> list[int]:
        ids: list[int] = []
        for word in self._split(caption) if caption.strip() else ():
            if word not in self._cache:
                self._cache[word] = self._encode_word(word)
            ids += self._cache[word]
        return ids or [NULL]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace").strip()

    def rest(self, caption: str, length: int) -> str:
        return self.decode(self.encode(caption)[length:])

    def __len__(self) -> int:
        return self._MERGED + len(self.merges)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "merges": [list(pair) for pair in self.merges]}


def _merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`ids` with each occurrence of `pair` replaced by `new`, from left to right."""
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


def default_limits() -> dict[str, Callable[[str], bool]]:
    """Whether a caption is longer than the encoders read unless a run sets their sizes, by limit:
    the words of most encoders, the characters of `char_cnn_rnn`.
    """
    words, chars = TextConfig().max_words, TextConfig().max_chars
    return {
        f"{words} words": lambda caption: len(split_words(caption)) > words,
        f"{chars} characters": lambda caption: len(caption.strip()) > chars,
    }


def make_tokenizer(kind: str, captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokeniser of `kind` (`word` or `bpe`) with at most `vocab_size` tokens.

    Raises:
        UserError: for another kind, or a size that leaves no room beside special tokens and bytes.
    """
    smallest = len(SPECIAL) + (256 if kind == "bpe" else 0)
    if vocab_size <= smallest:
        raise UserError(f"A {kind} tokeniser needs more than {smallest} tokens, not {vocab_size}.")
    if kind == "word":
        return WordTokenizer.train(captions, vocab_size)
    if kind == "bpe":
        return BPETokenizer.train(captions, vocab_size)
    raise UserError(f"There is no tokeniser {kind!r}: {nearest(kind, ('word', 'bpe'))}")


def tokenizer_from_json(saved: Any) -> Tokenizer:
    """The tokeniser that `to_json` described. Raises `UserError` for anything else."""
    try:
        if saved["kind"] == "word":
            words = [str(word) for word in saved["words"]]
            return WordTokenizer(words, drop_unknown=saved.get("drop_unknown", False) is True)
        if saved["kind"] == "clip":
            from lineage.text.clip_tokenizer import CLIPTokenizer

            return CLIPTokenizer([(str(left), str(right)) for left, right in saved["merges"]])
        if saved["kind"] == "bpe":
            return BPETokenizer([(int(left), int(right)) for left, right in saved["merges"]])
    except (TypeError, KeyError, ValueError, IndexError, AttributeError):
        pass
    raise UserError("The saved tokeniser is damaged, or of a kind that this version does not know.")
