"""`retrieval`: the nearest caption's picture, or a collage (Zhu et al. 2007, AAAI).

The problem: to show a sentence as a picture, before any network could draw one. "A Text-to-Picture
Synthesis System for Augmenting Communication" (Zhu, Goldberg, Eldawy, Dyer and Strock) is the first
answer for general text: find a picture for each thing that the sentence names, and lay the pictures
out as the sentence says. Four years later Im2Text (Ordonez, Kulkarni and Berg 2011, NIPS) showed
that with enough captioned pictures the nearest neighbour alone goes far. Here are both. Nothing is
learnt by gradient: to train is to remember, and what was never seen can only be pasted together.

    memory              `Retrieval.losses`: pictures, token ids and captions fill buffers
    keyphrases          `parse`: caption -> parts (phrase, count, relation)
    picture selection   `Index.nearest`: cosine of TF-IDF over the token ids of any text encoder
    segmentation        `cut_out`: what differs from the colour of the corners
    layout              `lay_out`: places that follow "left of", "above", a count, or side by side
    composition         `collage`

Which of the two answers a caption (`Retrieval.draw`):
    1. a remembered caption that says the same (equal `parse`) gives its own picture;
    2. else, if the caption names one thing, the nearest caption that names one thing does;
    3. else the parts are pasted, unless the worst-served part has a cosine that is more than
       `favour` below that of the nearest whole caption, which then gives its picture. The handicap
       is there because a bag of words cannot tell "a red square left of a blue circle" from "a blue
       square left of a red circle", so a cosine flatters whole captions.
Pictures that tie are drawn by lot, each row from its own stream; so is one for a caption of which
nothing is known.

Departures. Zhu et al. learn with logistic regression which phrases can be pictured, find pictures
by web search, choose among them by clustering their segments, and optimise the layout (important
things large and central, little overlap). Ours splits at connectives and number words, searches the
training set, cuts by one mask (the colour of the corners is background) and counts cells; it knows
English function words but not one noun or colour. Im2Text compares pictures to find captions; ours
compares captions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.data.contract import Batch, to_bytes, to_unit
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextEncoder, TextFeatures

SPECIAL = 3  # token ids below this (padding, unknown, null) stand for no word
MOST = 9  # parts of a caption, and things that a number word can count

# --------------------------------------------------------------------------------------- keyphrases


@dataclass(frozen=True)
class Part:
    """One sort of thing in a caption.

    Attributes:
        phrase: what it is, in the singular: `a red star`.
        count: how many of it.
        relation: how the part before stands to this one: `left`, `right`, `above`, `below`, or
            `beside` where nothing is said.
    """

    phrase: str
    count: int = 1
    relation: str = "beside"


_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = {word: n for n, name in enumerate(_NAMES, start=2) for word in (name, str(n))}
_FIRST = re.compile(rf"(?:an?|the|one|1|another|some|{'|'.join(NUMBERS)})\s+")
_LEAD = re.compile(
    r"^(?:there (?:is|are)\s+"
    r"|(?:(?:an?|the)\s+)?(?:\w+\s+)?(?:picture|photo|image|drawing|painting|emoji) of\s+)+"
)
_JOINT = re.compile(
    r"\s*\b(?:"
    r"(?P<left>(?:(?:to|on) the )?left of)|(?P<right>(?:(?:to|on) the )?right of)"
    r"|(?P<above>on top of|above|over)|(?P<below>below|under|beneath)"
    r"|(?P<beside>next to|beside)|and)\s+|\s*,\s*(?:and\s+)?"
)


def parse(caption: str) -> tuple[Part, ...]:
    """`two stars and a ring above a heart` -> 2 of a star, a ring beside, a heart, ring above it.

    "and" and a comma join things only before an article or a number ("a flag, in black and white"
    is one thing), unless the caption goes without from its start ("red heart and blue star").
    """
    text = _LEAD.sub("", " ".join(caption.lower().split()).rstrip(" .!"), count=1)
    bare = _FIRST.match(text) is None
    parts: list[Part] = []
    start, relation = 0, "beside"
    for joint in _JOINT.finditer(text):
        joins = joint.lastgroup or bare or _FIRST.match(text, joint.end())
        if joins and start < joint.start() and joint.end() < len(text):
            parts.append(_part(text[start : joint.start()], relation))
            start, relation = joint.end(), joint.lastgroup or "beside"
    parts.append(_part(text[start:], relation))
    return tuple(parts[:MOST])


def _part(phrase: str, relation: str) -> Part:
    first = _FIRST.match(phrase)
    count = NUMBERS.get(first.group().strip(), 1) if first else 1
    noun = phrase[first.end() :] if first else phrase
    noun = _singular(noun) if count > 1 else noun
    return Part(f"{'an' if noun[:1] in tuple('aeiou') else 'a'} {noun}", count, relation)


def _singular(noun: str) -> str:
    """The first plural word made singular: `red crosses on grass` -> `red cross on grass`."""
    words = noun.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
            long = word.endswith(("sses", "shes", "ches", "xes"))
            words[i] = word[:-3] + "y" if word.endswith("ies") else word[: -2 if long else -1]
            break
    return " ".join(words)


# -------------------------------------------------------------------------------- picture selection


class Found(NamedTuple):
    """A remembered picture, and the cosine of its caption with what was asked for."""

    row: int
    cosine: float


class Index:
    """What is searched: N remembered captions of W token ids each.

    A caption is the vector of tf * idf over tokens, idf(t) = log((N + 1) / (df(t) + 1/2)): a token
    in every caption weighs almost nothing, one that no caption has weighs most. Vectors are never
    written out: the product of a query with caption n is the sum over its W places of
    tf_query * idf^2, looked up by token.

    Args:
        ids: (N, W) int64, 0 on padding.
        captions: N strings.
    """

    def __init__(self, ids: Tensor, captions: list[str]) -> None:
        self.ids, self.count = ids, len(captions)
        word = ids >= SPECIAL  # (N, W)
        tf = torch.stack([(ids == column[:, None]).sum(1) for column in ids.unbind(1)], 1)  # (N, W)
        df = torch.zeros(int(ids.max()) + 1).index_add_(0, ids[word], 1.0 / tf[word])  # (T,)
        self.unseen = math.log((self.count + 1) / 0.5)
        self.idf = torch.log((self.count + 1) / (df + 0.5))  # (T,)
        self.norm = (tf * self.idf[ids] ** 2 * word).sum(1).sqrt().clamp_min(1e-6)  # (N,)
        parses = [parse(caption) for caption in captions]
        self.single = torch.tensor([len(p) == 1 and p[0].count == 1 for p in parses])  # (N,)
        self.said: dict[tuple[Part, ...], list[int]] = {}
        for row, parts in enumerate(parses):
            self.said.setdefault(parts, []).append(row)

    def cosines(self, query: Tensor) -> Tensor:
        """(W,) token ids -> (N,) cosines. Unknown words match nothing but lengthen the query."""
        tokens, tf = query[query != 0].unique(return_counts=True)
        known = (tokens >= SPECIAL) & (tokens < len(self.idf))
        idf = torch.full(tokens.shape, self.unseen)
        idf[known] = self.idf[tokens[known]]
        product = torch.zeros_like(self.idf)  # (T,)
        product[tokens[known]] = tf[known] * idf[known] ** 2
        return product[self.ids].sum(1) / (self.norm * (tf * idf).norm().clamp_min(1e-6))

    def nearest(self, query: Tensor, chance: float, least: float, single: bool) -> Found:
        """One of the nearest captions, by lot; any caption where the best cosine is below `least`.

        Args:
            query: (W,) token ids.
            chance: the lot, in [0, 1).
            least: cosines below this mean that nothing was found.
            single: search only captions that name one thing, if there are any.
        """
        cosines = self.cosines(query)  # (N,)
        if single and self.single.any():
            cosines = cosines.masked_fill(~self.single, -1.0)
        best = float(cosines.max())
        ties = (cosines >= (best - 1e-5 if best >= least else 0.0)).nonzero().flatten().tolist()
        return Found(_lot(ties, chance), best)


def _lot(rows: list[int], chance: float) -> int:
    return rows[min(int(chance * len(rows)), len(rows) - 1)]


# ---------------------------------------------------------------- segmentation, layout, composition


class Box(NamedTuple):
    """A square on the canvas, in pixels: its centre (y downward) and side."""

    x: float
    y: float
    side: float


def background(picture: Tensor) -> Tensor:
    """(3, S, S) -> (3,) median over the four corners, which a thing reaches last."""
    c = max(1, picture.shape[-1] // 32)
    ends = torch.cat([picture[..., :c], picture[..., -c:]], 2)  # (3, S, 2c)
    return torch.cat([ends[:, :c], ends[:, -c:]], 1).flatten(1).median(1).values


def cut_out(picture: Tensor, threshold: float) -> Tensor:
    """The thing in a picture: (3, S, S) in [-1, 1] -> (4, h, w), colour times alpha, then alpha.

    By d, the largest channel's distance from the background in [0, 2], alpha grows from 0 at 3/4
    of `threshold` to 1 at `threshold`, so outlines stay smooth and a faint texture stays behind. A
    picture in which nothing stands out is taken whole.
    """
    distance = (picture - background(picture)[:, None, None]).abs().amax(0)  # (S, S)
    alpha = (4 * distance / threshold - 3).clamp(0, 1)
    rows, columns = alpha.amax(1).nonzero().flatten(), alpha.amax(0).nonzero().flatten()
    if not len(rows):
        return torch.cat([picture, torch.ones_like(picture[:1])])
    thing = torch.cat([picture * alpha, alpha[None]])
    return thing[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def grid(count: int) -> list[tuple[float, float]]:
    """`count` cells in rows, as square as can be, a short last row centred: 3 -> 2 above 1."""
    columns = math.ceil(math.sqrt(count))
    short = count % columns
    shift = [0.0] * (count - short) + [(columns - short) / 2] * short
    return [(i % columns + shift[i], i // columns) for i in range(count)]


_STEP = {"left": (1, 0), "right": (-1, 0), "above": (0, 1), "below": (0, -1), "beside": (1, 0)}


def walk(parts: tuple[Part, ...]) -> list[tuple[float, float]]:
    """A cell for each part, by steps from the part before as relations say, over cells in use."""
    cells: list[tuple[float, float]] = [(0, 0)]
    for part in parts[1:]:
        (x, y), (right, down) = cells[-1], _STEP[part.relation]
        while (x, y) in cells:
            x, y = x + right, y + down
        cells.append((x, y))
    return cells


def fit(cells: list[tuple[float, float]], box: Box) -> list[Box]:
    """Cells of side 1 scaled together into the middle of `box`."""
    xs, ys = zip(*cells, strict=True)
    side = box.side / (max(max(xs) - min(xs), max(ys) - min(ys)) + 1)
    left = box.x - side * (max(xs) + min(xs)) / 2
    top = box.y - side * (max(ys) + min(ys)) / 2
    return [Box(left + side * x, top + side * y, side) for x, y in cells]


def lay_out(parts: tuple[Part, ...], size: int) -> list[list[Box]]:
    """For each part, a box for each of its things, on a canvas of `size` pixels."""
    beside = all(part.relation == "beside" for part in parts)
    cells = grid(len(parts)) if beside else walk(parts)
    boxes = fit(cells, Box(size / 2, size / 2, size))
    return [fit(grid(part.count), box) for part, box in zip(parts, boxes, strict=True)]


def collage(things: list[Tensor], places: list[list[Box]], canvas: Tensor, fill: float) -> Tensor:
    """Things (4, h, w) pasted on `canvas` (3, S, S), shrunk to `fill` of a box, never enlarged."""
    canvas, size = canvas.clone(), canvas.shape[-1]
    for thing, boxes in zip(things, places, strict=True):
        for box in boxes:
            shrink = min(1.0, fill * box.side / max(thing.shape[1:]))
            h, w = (max(1, round(shrink * side)) for side in thing.shape[1:])
            piece = F.interpolate(thing[None], (h, w), mode="bilinear", antialias=True)[0]
            top = min(max(round(box.y - h / 2), 0), size - h)
            left = min(max(round(box.x - w / 2), 0), size - w)
            under = canvas[:, top : top + h, left : left + w]
            under.copy_(piece[:3] + (1 - piece[3:]) * under)
    return canvas


# --------------------------------------------------------------------------------------- the system


@dataclass(frozen=True)
class RetrievalConfig:
    """A memory and its use.

    Attributes:
        memory: the most pictures that are remembered; later ones are ignored.
        words: tokens of a caption that count, from its start.
        letters: bytes of a caption that are kept, in UTF-8.
        threshold: how far, of 255, a thing's colour is from its background's.
        fill: share of its cell that a pasted thing may take.
        least: a cosine below this means that nothing was found.
        favour: how far the worst part's cosine may lie below the nearest whole caption's for the
            parts still to be pasted.
    """

    memory: int = 4096
    words: int = 32
    letters: int = 192
    threshold: int = 40
    fill: float = 0.9
    least: float = 0.1
    favour: float = 0.2

    def __post_init__(self) -> None:
        for name in ("memory", "words", "letters", "threshold"):
            if getattr(self, name) < 1:
                raise UserError(f"retrieval needs {name} of 1 or more, not {getattr(self, name)}.")
        if not 0 < self.fill <= 1:
            raise UserError(f"retrieval needs fill above 0 and up to 1, not {self.fill}.")


class Retrieval(System):
    """A memory of captioned pictures, all in buffers, so that a saved run needs no data."""

    pictures: Tensor  # (memory, 3, S, S) uint8
    ids: Tensor  # (memory, W) int32
    letters: Tensor  # (memory, letters) uint8
    count: Tensor  # () int64

    def __init__(self, config: RetrievalConfig, text: TextEncoder, size: int) -> None:
        super().__init__()
        self.config, self.text, self.size = config, text, size
        n = config.memory
        self.register_buffer("pictures", torch.zeros(n, 3, size, size, dtype=torch.uint8))
        self.register_buffer("ids", torch.zeros(n, config.words, dtype=torch.int32))
        self.register_buffer("letters", torch.zeros(n, config.letters, dtype=torch.uint8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._index: Index | None = None
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_index", None))

    def extra_repr(self) -> str:
        return f"{int(self.count)} of {self.config.memory} pictures remembered"

    def groups(self) -> dict[str, list[nn.Module]]:
        return {}

    @torch.no_grad()
    def _remember(self, batch: Batch, ids: Tensor) -> None:
        first = int(self.count)
        rows = slice(first, min(first + len(batch), self.config.memory))
        n = rows.stop - first
        if n == 0:
            return
        if batch.image.shape[1:] != self.pictures.shape[1:]:
            raise UserError(
                f"This memory holds pictures of (3, {self.size}, {self.size}), not "
                f"{tuple(batch.image.shape[1:])}: load the data at size={self.size}."
            )
        self.pictures[rows] = to_bytes(batch.image[:n])
        self.ids[rows] = self._cut(ids[:n]).to(self.ids)
        width = self.config.letters
        kept = [c.encode(errors="replace")[:width].ljust(width, b"\0") for c in batch.caption[:n]]
        self.letters[rows] = torch.tensor([list(row) for row in kept]).to(self.letters)
        self.count += n

    def _cut(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, W): padded or cut to the width of the memory."""
        return F.pad(ids, (0, max(0, self.config.words - ids.shape[1])))[:, : self.config.words]

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """Remember the batch. There is nothing to minimise, so nothing is yielded."""
        self._remember(batch, text.ids)
        yield from ()

    def index(self) -> Index:
        """What is searched, built again when the memory has changed. It stays on the CPU."""
        count = int(self.count)
        if count == 0:
            raise UserError(
                "This retrieval system remembers no picture yet: train it first, if only a step."
            )
        if self._index is None or self._index.count != count:
            rows = [bytes(row) for row in self.letters[:count].cpu().numpy()]
            captions = [row.rstrip(b"\0").decode(errors="ignore") for row in rows]
            self._index = Index(self.ids[:count].cpu().long(), captions)
        return self._index

    def draw(self, captions: list[str], draws: NoiseStreams, paste: bool = True) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            paste: cut and paste as the header says; False gives the nearest caption's picture.
        """
        chances = draws.rand(1 + MOST).tolist()  # lots: one for the caption, one for each part
        made = [self._answer(c, row, paste) for c, row in zip(captions, chances, strict=True)]
        return torch.stack(made).to(self.device)

    def _answer(self, caption: str, chances: list[float], paste: bool) -> Tensor:
        """(3, S, S) by the three rules of the header."""
        index, least, parts = self.index(), self.config.least, parse(caption)
        if parts in index.said:
            return self._picture(_lot(index.said[parts], chances[0]))
        asked = [caption, *(part.phrase for part in parts)]
        query, *phrases = self._cut(self.text.encode(asked).ids.cpu())  # (W,) each
        several = len(parts) > 1 or parts[0].count > 1
        whole = index.nearest(query, chances[0], least, single=not several)
        if not (several and paste):
            return self._picture(whole.row)
        found = [
            Found(_lot(same, chance), 1.0)
            if (same := index.said.get((Part(part.phrase),)))
            else index.nearest(phrase, chance, least, single=True)
            for part, phrase, chance in zip(parts, phrases, chances[1:], strict=False)
        ]
        worst = min(f.cosine for f in found)
        if worst < least or worst + self.config.favour < whole.cosine:
            return self._picture(whole.row)
        return self._collage(parts, [self._picture(f.row) for f in found])

    def _picture(self, row: int) -> Tensor:
        return to_unit(self.pictures[row].cpu())

    def _collage(self, parts: tuple[Part, ...], pictures: list[Tensor]) -> Tensor:
        """The things in `pictures` on a canvas of the first one's background colour."""
        things = [cut_out(picture, self.config.threshold / 127.5) for picture in pictures]
        canvas = background(pictures[0])[:, None, None].expand_as(pictures[0])
        return collage(things, lay_out(parts, self.size), canvas, self.config.fill)
