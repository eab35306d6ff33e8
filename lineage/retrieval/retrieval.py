"""`retrieval`: the nearest caption's picture, or a collage (Zhu et al. 2007, AAAI).

The problem: to show a sentence as a picture, before any network could generate one. "A Text-to-
Picture Synthesis System for Augmenting Communication" (Zhu, Goldberg, Eldawy, Dyer and Strock) is
the first answer for general text: find a picture for each object that the sentence names, and lay
the pictures out as it describes. Four years later Im2Text (Ordonez, Kulkarni and Berg 2011,
NIPS) showed that with enough captioned pictures the nearest neighbour alone goes far. This file has
both. Nothing is learnt by gradient: training stores pictures, and an unseen scene can only be
pasted together.

    memory              pictures, token ids and captions fill buffers          `Retrieval.losses`
    keyphrases          caption -> parts (phrase, count, relation)             `parse`
    picture selection   cosine of TF-IDF over any encoder's token ids          `Index.nearest`
    segmentation        what differs from the colour of the corners            `cut_out`
    layout              boxes from "left of", "above", counts; or in a grid    `lay_out`
    composition         objects over the background, shrunk to their boxes     `collage`

A caption is answered by the first rule that fits (`Retrieval.answer`):
    1. a stored caption with an equal `parse` gives its own picture;
    2. a caption that names one object gets the picture of the nearest caption that names one;
    3. the parts are pasted, unless the cosine of the worst part is more than `paste_margin` below
       that of the nearest whole caption: then that caption's picture is the answer. The margin is
       needed because a bag of words cannot tell "a red square left of a blue circle" from "a blue
       square left of a red circle", so that a cosine overrates whole captions.
Ties are broken at random, from each row's own stream; a caption without any match gets a random
picture.

Departures. Zhu et al. learn with logistic regression which phrases can be pictured, find pictures
by web search, choose among them by clustering their segments, and optimise the layout (important
objects large and central, little overlap). Ours splits at connectives and number words, searches
the training set, segments with one mask (the colour of the corners is background) and counts cells.
It has a list of English function words, but of no nouns or colours, so a caption in another
language is one part and gets the picture of the nearest caption. Im2Text compares pictures to
find captions; ours compares captions.

Axes: B captions, N stored pictures, S side, L words, W stored token ids of a caption, T tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lineage.bounds import Dim, Float, PositiveInt
from lineage.config import configuration
from lineage.data.contract import Batch, to_bytes, to_unit
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextEncoder, TextFeatures, caption_list

NUM_SPECIAL = 3  # token ids below this (padding, unknown, null) are no words
MAX_PARTS = 9  # of a caption

# --- keyphrases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One kind of object in a caption.

    Attributes:
        phrase: The object in the singular: `a red star`.
        count: Number of such objects.
        relation: Where the previous part is from this one: `left`, `right`, `above`, `below`, or
            `beside` where the caption states nothing.
    """

    phrase: str
    count: int = 1
    relation: str = "beside"


_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = {word: n for n, name in enumerate(_NAMES, start=2) for word in (name, str(n))}
_ARTICLE = re.compile(rf"(?:an?|the|one|1|another|some|{'|'.join(NUMBERS)})\s+")
_LEAD = re.compile(
    r"^(?:there (?:is|are)\s+"
    r"|(?:(?:an?|the)\s+)?(?:\w+\s+)?(?:picture|photo|image|drawing|painting|emoji) of\s+)+"
)
_CONNECTIVE = re.compile(
    r"\s*\b(?:"
    r"(?P<left>(?:(?:to|on) the )?left of)|(?P<right>(?:(?:to|on) the )?right of)"
    r"|(?P<above>on top of|above|over)|(?P<below>below|under|beneath)"
    r"|(?P<beside>next to|beside)|and)\s+|\s*,\s*(?:and\s+)?"
)


def parse(caption: str) -> tuple[Part, ...]:
    """`two stars and a ring above a heart` -> 2 of a star, a ring beside, a heart, ring above it.

    "and" and a comma join objects only before an article or a number ("a flag, in black and white"
    is one object), unless the caption starts without one ("red heart and blue star").
    """
    text = _LEAD.sub("", " ".join(caption.lower().split()).rstrip(" .!"), count=1)
    without_article = _ARTICLE.match(text) is None
    parts: list[Part] = []
    start, relation = 0, "beside"
    for match in _CONNECTIVE.finditer(text):
        joins = match.lastgroup or without_article or _ARTICLE.match(text, match.end())
        if joins and start < match.start() and match.end() < len(text):
            parts.append(_part(text[start : match.start()], relation))
            start, relation = match.end(), match.lastgroup or "beside"
    parts.append(_part(text[start:], relation))
    return tuple(parts[:MAX_PARTS])


def _part(phrase: str, relation: str) -> Part:
    article = _ARTICLE.match(phrase)
    count = NUMBERS.get(article.group().strip(), 1) if article else 1
    noun = phrase[article.end() :] if article else phrase
    noun = _singular(noun) if count > 1 else noun
    return Part(f"{'an' if noun[:1] in tuple('aeiou') else 'a'} {noun}", count, relation)


def _singular(noun: str) -> str:
    """The first plural word in the singular: `red crosses on grass` -> `red cross on grass`."""
    words = noun.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
            long = word.endswith(("sses", "shes", "ches", "xes"))
            words[i] = word[:-3] + "y" if word.endswith("ies") else word[: -2 if long else -1]
            break
    return " ".join(words)


# --- picture selection ----------------------------------------------------------------------------


class Neighbour(NamedTuple):
    """A stored picture, and the cosine between its caption and the query."""

    row: int
    cosine: float


class Index:
    """Search index of N stored captions of W token ids each.

    A caption is the vector of tf * idf over tokens, idf(t) = log((N + 1) / (df(t) + 1/2)): a token
    of every caption weighs almost nothing, a token of no caption weighs most. The vectors are never
    built: the product of a query with caption n is the sum of tf_query * idf^2 over the W positions
    of the caption, looked up by token.

    Args:
        ids: (N, W) int64, 0 on padding.
        captions: N strings.
    """

    def __init__(self, ids: Tensor, captions: list[str]) -> None:
        self.ids, self.count = ids, len(captions)
        is_word = ids >= NUM_SPECIAL  # (N, W)
        tf = torch.stack([(ids == column[:, None]).sum(1) for column in ids.unbind(1)], 1)  # (N, W)
        df = torch.zeros(int(ids.max()) + 1).index_add_(0, ids[is_word], 1.0 / tf[is_word])  # (T,)
        self.idf = torch.log((self.count + 1) / (df + 0.5))  # (T,)
        self.idf_unseen = math.log((self.count + 1) / 0.5)
        self.norm = (tf * self.idf[ids] ** 2 * is_word).sum(1).sqrt().clamp_min(1e-6)  # (N,)
        parses = [parse(caption) for caption in captions]
        self.single = torch.tensor([len(p) == 1 and p[0].count == 1 for p in parses])  # (N,)
        self.rows_of: dict[tuple[Part, ...], list[int]] = {}
        for row, parts in enumerate(parses):
            self.rows_of.setdefault(parts, []).append(row)

    def cosines(self, query: Tensor) -> Tensor:
        """(W,) token ids -> (N,) cosines. Unknown words match nothing but lengthen the query."""
        tokens, tf = query[query != 0].unique(return_counts=True)
        known = (tokens >= NUM_SPECIAL) & (tokens < len(self.idf))
        idf = torch.full(tokens.shape, self.idf_unseen)
        idf[known] = self.idf[tokens[known]]
        product = torch.zeros_like(self.idf)  # (T,)
        product[tokens[known]] = tf[known] * idf[known] ** 2
        return product[self.ids].sum(1) / (self.norm * (tf * idf).norm().clamp_min(1e-6))

    def nearest(self, query: Tensor, u: float, min_cosine: float, single: bool) -> Neighbour:
        """One of the nearest captions; a random one if the best cosine is below `min_cosine`.

        Args:
            query: (W,) token ids.
            u: Uniform number in [0, 1) that breaks ties.
            min_cosine: Smallest cosine that counts as a match.
            single: If true, only captions that name one object are searched, if there are any.
        """
        cosines = self.cosines(query)  # (N,)
        if single and self.single.any():
            cosines = cosines.masked_fill(~self.single, -1.0)
        best = float(cosines.max())
        ties = (cosines >= (best - 1e-5 if best >= min_cosine else 0.0)).nonzero().flatten()
        return Neighbour(_choose(ties.tolist(), u), best)


def _choose(rows: list[int], u: float) -> int:
    """The row at `u` in [0, 1) of the list."""
    return rows[min(int(u * len(rows)), len(rows) - 1)]


# --- segmentation, layout, composition ------------------------------------------------------------


class Box(NamedTuple):
    """A square on the canvas, in pixels: its centre (y downward) and side."""

    x: float
    y: float
    side: float


def background(picture: Tensor) -> Tensor:
    """(3, S, S) -> (3,) median over the four corners, which an object reaches last."""
    c = max(1, picture.shape[-1] // 32)
    ends = torch.cat([picture[..., :c], picture[..., -c:]], 2)  # (3, S, 2c)
    return torch.cat([ends[:, :c], ends[:, -c:]], 1).flatten(1).median(1).values


def cut_out(picture: Tensor, threshold: float) -> Tensor:
    """The object in a picture: (3, S, S) in [-1, 1] -> (4, h, w), colour times alpha, then alpha.

    With d, the largest channel's distance from the background in [0, 2], alpha grows from 0 at 3/4
    of `threshold` to 1 at `threshold`: outlines stay smooth, and a faint texture is background. A
    picture without a foreground is taken whole.
    """
    distance = (picture - background(picture)[:, None, None]).abs().amax(0)  # (S, S)
    alpha = (4 * distance / threshold - 3).clamp(0, 1)
    rows, columns = alpha.amax(1).nonzero().flatten(), alpha.amax(0).nonzero().flatten()
    if not len(rows):
        return torch.cat([picture, torch.ones_like(picture[:1])])
    rgba = torch.cat([picture * alpha, alpha[None]])
    return rgba[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def grid_cells(count: int) -> list[tuple[float, float]]:
    """`count` cells in rows, as square as possible, a short last row centred: 3 -> 2 above 1."""
    columns = math.ceil(math.sqrt(count))
    short = count % columns
    shift = [0.0] * (count - short) + [(columns - short) / 2] * short
    return [(i % columns + shift[i], i // columns) for i in range(count)]


_STEP = {"left": (1, 0), "right": (-1, 0), "above": (0, 1), "below": (0, -1), "beside": (1, 0)}


def relation_cells(parts: tuple[Part, ...]) -> list[tuple[float, float]]:
    """A cell for each part, one step from the previous part's cell; occupied cells are skipped."""
    cells: list[tuple[float, float]] = [(0, 0)]
    for part in parts[1:]:
        (x, y), (right, down) = cells[-1], _STEP[part.relation]
        while (x, y) in cells:
            x, y = x + right, y + down
        cells.append((x, y))
    return cells


def fit(cells: list[tuple[float, float]], box: Box) -> list[Box]:
    """Cells of side 1, scaled together into the middle of `box`."""
    xs, ys = zip(*cells, strict=True)
    side = box.side / (max(max(xs) - min(xs), max(ys) - min(ys)) + 1)
    left = box.x - side * (max(xs) + min(xs)) / 2
    top = box.y - side * (max(ys) + min(ys)) / 2
    return [Box(left + side * x, top + side * y, side) for x, y in cells]


def lay_out(parts: tuple[Part, ...], size: int) -> list[list[Box]]:
    """A box for each object of each part, on a canvas of `size` pixels."""
    beside = all(part.relation == "beside" for part in parts)
    cells = grid_cells(len(parts)) if beside else relation_cells(parts)
    boxes = fit(cells, Box(size / 2, size / 2, size))
    return [fit(grid_cells(part.count), box) for part, box in zip(parts, boxes, strict=True)]


def collage(objects: list[Tensor], boxes: list[list[Box]], canvas: Tensor, fill: float) -> Tensor:
    """Objects (4, h, w) over `canvas` (3, S, S), shrunk to `fill` of a box, never enlarged."""
    canvas, size = canvas.clone(), canvas.shape[-1]
    for rgba, places in zip(objects, boxes, strict=True):
        for box in places:
            shrink = min(1.0, fill * box.side / max(rgba.shape[1:]))
            h, w = (max(1, round(shrink * side)) for side in rgba.shape[1:])
            small = F.interpolate(rgba[None], (h, w), mode="bilinear", antialias=True)[0]
            top = min(max(round(box.y - h / 2), 0), size - h)
            left = min(max(round(box.x - w / 2), 0), size - w)
            under = canvas[:, top : top + h, left : left + w]
            under.copy_(small[:3] + (1 - small[3:]) * under)
    return canvas


# --- the system -----------------------------------------------------------------------------------


@configuration
class RetrievalConfig:
    """Sizes of the memory, and thresholds of its use.

    Attributes:
        memory_size: Largest number of stored pictures; later ones are ignored.
        max_words: W, number of stored token ids of a caption.
        max_bytes: Number of stored bytes of a caption in UTF-8.
        threshold: Distance, of 255, between the colours of an object and of its background.
        fill: Share of its box's side that a pasted object may take.
        min_cosine: Smallest cosine that counts as a match.
        paste_margin: Number by which the worst part's cosine may be below that of the nearest whole
            caption if the parts are to be pasted.
    """

    memory_size: PositiveInt = 4096
    max_words: Dim = 32
    max_bytes: Dim = 192
    threshold: PositiveInt = 40
    fill: Annotated[Float, Field(gt=0, le=1)] = 0.9
    min_cosine: Float = 0.1
    paste_margin: Float = 0.2


class Retrieval(System):
    """A memory of captioned pictures, all in buffers, so that a saved run needs no data."""

    pictures: Tensor  # (memory_size, 3, S, S) uint8
    ids: Tensor  # (memory_size, W) int32
    captions: Tensor  # (memory_size, max_bytes) uint8
    count: Tensor  # () int64

    def __init__(self, config: RetrievalConfig, text: TextEncoder, size: int) -> None:
        super().__init__()
        self.config, self.text, self.size = config, text, size
        n = config.memory_size
        self.register_buffer("pictures", torch.zeros(n, 3, size, size, dtype=torch.uint8))
        self.register_buffer("ids", torch.zeros(n, config.max_words, dtype=torch.int32))
        self.register_buffer("captions", torch.zeros(n, config.max_bytes, dtype=torch.uint8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._index: Index | None = None
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_index", None))

    def extra_repr(self) -> str:
        return f"{int(self.count)} of {self.config.memory_size} pictures stored"

    # --- memory -------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """Store the batch. There is nothing to minimise, so that no turn is yielded."""
        self._store(batch, text.ids)
        yield from ()

    @torch.no_grad()
    def _store(self, batch: Batch, ids: Tensor) -> None:
        first = int(self.count)
        rows = slice(first, min(first + len(batch), self.config.memory_size))
        n = rows.stop - first
        if n == 0:
            return
        if batch.image.shape[1:] != self.pictures.shape[1:]:
            raise UserError(
                f"This memory holds pictures of (3, {self.size}, {self.size}), not "
                f"{tuple(batch.image.shape[1:])}: load the data at size={self.size}."
            )
        self.pictures[rows] = to_bytes(batch.image[:n])
        self.ids[rows] = self._fixed_length(ids[:n]).to(self.ids)
        length = self.config.max_bytes
        utf8 = [c.encode(errors="replace")[:length].ljust(length, b"\0") for c in batch.caption[:n]]
        self.captions[rows] = torch.tensor([list(row) for row in utf8]).to(self.captions)
        self.count += n

    def _fixed_length(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, W), padded or cut."""
        length = self.config.max_words
        return F.pad(ids, (0, max(0, length - ids.shape[1])))[:, :length]

    def index(self) -> Index:
        """Search index, on the CPU; built again when the memory has changed."""
        count = int(self.count)
        if count == 0:
            raise UserError(
                "This retrieval system has stored no picture yet: train it first, if only a step."
            )
        if self._index is None or self._index.count != count:
            rows = [bytes(row) for row in self.captions[:count].cpu().numpy()]
            captions = [row.rstrip(b"\0").decode(errors="ignore") for row in rows]
            self._index = Index(self.ids[:count].cpu().long(), captions)
        return self._index

    # --- answers ------------------------------------------------------------------------------

    def sample(self, captions: list[str], noise: NoiseStreams, paste: bool = True) -> Tensor:
        """Pictures of `captions`, (B, 3, S, S).

        Args:
            paste: If true, unseen scenes are pasted together; if false, the nearest caption's
                picture is the answer.
        """
        captions = caption_list(captions)
        uniform = noise.rand(1 + MAX_PARTS).tolist()  # one for the caption, one for each part
        pictures = [self.answer(c, u, paste) for c, u in zip(captions, uniform, strict=True)]
        return torch.stack(pictures).to(self.device)

    def idle_options(self, captions: list[str], options: Mapping[str, Any]) -> dict[str, str]:
        pasted = any(len(parts) > 1 or parts[0].count > 1 for parts in map(parse, captions))
        if options.get("paste", True) or pasted:
            return {}
        return {"paste": "only several things are pasted together"}

    def answer(self, caption: str, uniform: list[float], paste: bool) -> Tensor:
        """The picture (3, S, S) of one caption, by the rules of the header."""
        index, config, parts = self.index(), self.config, parse(caption)
        u, *part_us = uniform
        if parts in index.rows_of:
            return self._picture(_choose(index.rows_of[parts], u))
        phrases = [part.phrase for part in parts]
        ids, *part_ids = self._fixed_length(self.text.encode([caption, *phrases]).ids.cpu())
        several = len(parts) > 1 or parts[0].count > 1
        whole = index.nearest(ids, u, config.min_cosine, single=not several)
        if not (several and paste):
            return self._picture(whole.row)
        neighbours = [
            self._neighbour(*row) for row in zip(phrases, part_ids, part_us, strict=False)
        ]
        worst = min(neighbour.cosine for neighbour in neighbours)
        if worst < config.min_cosine or worst + config.paste_margin < whole.cosine:
            return self._picture(whole.row)
        return self._collage(parts, [self._picture(neighbour.row) for neighbour in neighbours])

    def _neighbour(self, phrase: str, ids: Tensor, u: float) -> Neighbour:
        """A stored picture of one object."""
        index = self.index()
        if rows := index.rows_of.get((Part(phrase),)):
            return Neighbour(_choose(rows, u), 1.0)
        return index.nearest(ids, u, self.config.min_cosine, single=True)

    def _picture(self, row: int) -> Tensor:
        return to_unit(self.pictures[row].cpu())

    def _collage(self, parts: tuple[Part, ...], pictures: list[Tensor]) -> Tensor:
        """The objects of `pictures` on a canvas of the first one's background colour."""
        objects = [cut_out(picture, self.config.threshold / 127.5) for picture in pictures]
        canvas = background(pictures[0])[:, None, None].expand_as(pictures[0])
        return collage(objects, lay_out(parts, self.size), canvas, self.config.fill)
