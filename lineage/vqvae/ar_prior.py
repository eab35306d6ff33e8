"""The prior of `vqvae`, `dalle` and `vqgan`: one transformer reads the caption and writes the
picture (Ramesh et al. 2021, arXiv:2102.12092, section 2.2).

The problem: a grid of codes is not yet a picture of anything; p(codes | caption) is to be learnt.
What is new: caption and codes are one sequence, and a decoder-only transformer predicts each token
from all before it, as a language model does.

    section 2.2   `Prior.embed`: start, T places of text (a learnt vector of its own for each place
                  that the caption leaves empty), then the codes row by row, each with a vector for
                  its row and one for its column
                  `Prior.losses`: cross-entropy of text and of picture tokens apart, 1/8 and 7/8
    section 2.3   sampling: `Prior.sample`, temperature; the best of several by a model that matches
                  pictures and captions is `lineage sample --best-of`
    and after it  top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), and guidance without a
                  classifier on logits, as in Make-A-Scene (Gafni et al. 2022, arXiv:2203.13131,
                  section 3.4): l = l(null) + guidance (l(text) - l(null))

Departures: text comes through any of the shared encoders and a linear layer (through `bag`, which
is a table of tokens, that is DALL-E's); one whose words know later words cannot be predicted, and
then the text's loss is left out; empty places of the text are not predicted; some captions are
dropped, for guidance; attention is dense, which at these lengths costs nothing.

Axes: B rows, T places of text, N = H W codes, D width, K codes, V text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.config import at_least
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.nn.vqgan_losses import psnr
from lineage.system import Named, System, Turn
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.vqvae.codec import Codec, Codes
from lineage.vqvae.transformer import Cache, Transformer, TransformerConfig

COLDEST = 1e-6  # temperature; logits divided by less might overflow
HIGHEST = 1 - 2**-22


@dataclass(frozen=True)
class PriorConfig:
    """The transformer, its losses, and what `generate` does unless told otherwise.

    Attributes:
        transformer: its sizes.
        places: T; longer captions are cut.
        text_weight: of the text's loss; the picture's has the rest of 1.
        drop_text: share of training rows whose caption is dropped.
        temperature, top_k, top_p, guidance: see `Prior.draw`.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    places: int = 256
    text_weight: float = 1 / 8
    drop_text: float = 0.1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        at_least("model.places", self.places, 1)
        for name in ("text_weight", "drop_text"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be from 0 to below 1.")
        Choice(self.temperature, self.top_k, self.top_p, self.guidance)


@dataclass(frozen=True)
class Choice:
    """How the next code is chosen from its logits; see `Prior.draw`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "guidance"):
            value = getattr(self, name)
            if not value >= 0 or math.isinf(value):
                raise UserError(f"{name}={value} must be a number from 0 up.")
        at_least("top_k", self.top_k, 0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1.")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) logits -> (B, K), 0 for codes that are out of the question."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)
        if 0 < self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        shares = (logits / max(self.temperature, COLDEST)).softmax(1)
        if self.top_p < 1:
            ordered, order = shares.sort(1, descending=True)
            before = ordered.cumsum(1) - ordered  # what is likelier than each, together
            ordered = ordered.masked_fill(before >= self.top_p, 0)
            shares = torch.zeros_like(shares).scatter(1, order, ordered)
        return shares

    def take(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """(B, K) logits, (B,) in [0, 1) -> (B,) codes: where cumulated shares pass `uniform`."""
        heap = self.probabilities(logits).cumsum(1)
        place = uniform.clamp(max=HIGHEST)[:, None] * heap[:, -1:]  # rounds to less than the whole
        return torch.searchsorted(heap, place, right=True)[:, 0]


class Prior(System):
    """Captions to codes, codes to pictures.

    Args:
        codes: of the data, with the trained codec that is left as it is.
        text: encoder of the captions; trained along.
        size: S, side of the pictures.
    """

    def __init__(self, config: PriorConfig, codes: Codes, text: TextEncoder, size: int) -> None:
        super().__init__()
        self.config, self.text = config, text
        self.codec: Codec = codes.codec.requires_grad_(False)
        self.known = [codes]  # in a list, so that what it keeps is not part of the prior's weights
        self.side, width = size // self.codec.factor, config.transformer.width
        self.transformer = Transformer(config.transformer)
        self.read = nn.Linear(text.width, width)
        self.start = nn.Embedding(1, width)
        self.place, self.empty = (nn.Embedding(config.places, width) for _ in range(2))
        self.code = nn.Embedding(self.codec.codes, width)
        self.row, self.column = (nn.Embedding(self.side, width) for _ in range(2))
        self.code_head = nn.Linear(width, self.codec.codes)
        self.text_head = nn.Linear(width, text.tokens) if self.writes_text else None
        for table in (self.start, self.place, self.empty, self.code, self.row, self.column):
            nn.init.normal_(table.weight, std=0.02)
        for layer in (self.read, self.code_head, self.text_head):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    @property
    def writes_text(self) -> bool:
        """Whether it learns to predict captions as well as pictures."""
        return self.text.tokens > 0 and self.config.text_weight > 0

    def train(self, mode: bool = True) -> Prior:
        """The codec stays in evaluation mode."""
        super().train(mode)
        self.codec.eval()
        return self

    def groups(self) -> dict[str, list[nn.Module]]:
        own = [self.transformer, self.read, self.start, self.place, self.empty, self.code]
        own += [self.row, self.column, self.code_head]
        heads = [self.text_head] if self.text_head is not None else []
        return {"prior": [*own, *heads, self.text]}

    # --- section 2.2: one sequence ----------------------------------------------------------

    def embed_text(self, text: TextFeatures) -> Tensor:
        """The start and T places of text, (B, 1 + T, D)."""
        count, places = len(text), self.config.places
        text = text.shortened(places)
        text = text.padded(places)
        words = self.read(text.words).to(self.empty.weight.dtype)
        words = torch.where(text.mask[..., None], words, self.empty.weight) + self.place.weight
        return torch.cat([self.start.weight.expand(count, 1, -1), words], dim=1)

    def embed_codes(self, ids: Tensor) -> Tensor:
        """(B, n) the first codes, row by row -> (B, n, D)."""
        return self.code(ids) + self.where()[: ids.shape[1]]

    def where(self) -> Tensor:
        """What is added to a code for its row and column, (N, D)."""
        return rearrange(self.row.weight[:, None] + self.column.weight, "h w d -> (h w) d")

    def logits(self, text: TextFeatures, ids: Tensor) -> tuple[Tensor | None, Tensor]:
        """Of each token given all before it.

        Args:
            ids: (B, N) codes.

        Returns:
            (B, T, V), or None where captions are not predicted, and (B, N, K).
        """
        x = torch.cat([self.embed_text(text), self.embed_codes(ids[:, :-1])], dim=1)
        x = self.transformer(x)  # (B, T + N, D): what stands before each token
        places = self.config.places
        words = self.text_head(x[:, :places]) if self.text_head is not None else None
        return words, self.code_head(x[:, places:])

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """Cross-entropy of text and codes, with some captions dropped."""
        config, ids = self.config, self.known[0].of(batch).flatten(1)
        keep = draws.rand() >= config.drop_text  # (B,)
        words, codes = self.logits(text.where(keep, self.text.null(len(batch))), ids)
        picture = F.cross_entropy(codes.flatten(0, 1).float(), ids.flatten())
        right = (codes.detach().argmax(-1) == ids).float().mean()
        self.facts = {"picture_nats": picture.detach(), "picture_accuracy": right}
        if words is None:
            yield "prior", {"picture": picture}
            return
        text = text.shortened(config.places).padded(config.places)
        told = (text.mask & keep[:, None]).flatten()
        each = F.cross_entropy(words.flatten(0, 1).float(), text.ids.flatten(), reduction="none")
        caption = (each * told).sum() / told.sum().clamp(min=1)
        self.facts["text_nats"] = caption.detach()
        share = config.text_weight
        yield "prior", {"text": share * caption, "picture": (1 - share) * picture}

    # --- section 2.3: sampling ----------------------------------------------------------------

    def sample(
        self,
        text: TextFeatures,
        draws: NoiseStreams,
        choice: Choice,
        given: Tensor | None = None,
        cached: bool = True,
    ) -> Tensor:
        """Codes (B, H, W), one after the other.

        Args:
            given: (B, m) the first codes, which are kept.
            cached: keep keys and values, so that each code costs one place; the result is the same.
        """
        count, total = len(text), self.side**2
        uniform = draws.rand(total)  # (B, N)
        ids = uniform.new_zeros(count, 0, dtype=torch.int64) if given is None else given
        where = self.where()
        guided = choice.guidance != 1
        start = self.embed_text(TextFeatures.cat([text, self.text.null(count)]) if guided else text)
        twice = (lambda codes: codes.repeat(2, 1)) if guided else (lambda codes: codes)
        length = start.shape[1] + total - 1
        config = self.config.transformer
        cache = Cache(config, len(start), length, start) if cached else None
        new = torch.cat([start, self.embed_codes(twice(ids))], dim=1)
        for place in range(ids.shape[1], total):
            logits = self.code_head(self.transformer(new, cache)[:, -1]).float()
            if guided:
                towards, without = logits.chunk(2)
                logits = without + choice.guidance * (towards - without)
            ids = torch.cat([ids, choice.take(logits, uniform[:, place])[:, None]], dim=1)
            last = self.code(twice(ids[:, -1:])) + where[place]
            new = last if cached else torch.cat([new, last], dim=1)
        return ids.unflatten(1, (self.side, self.side))

    def _choice(self, **given: Any) -> Choice:
        """The knobs that are given, and the configuration's for those that are None."""
        return Choice(**{n: getattr(self.config, n) if v is None else v for n, v in given.items()})

    def draw(
        self,
        captions: list[str],
        draws: NoiseStreams,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            temperature: below 1 likely codes become likelier; 0 takes the likeliest.
            top_k: only the k likeliest codes; 0 for all.
            top_p: only the likeliest codes that together have this share.
            guidance: 1 follows the caption as training did, more follows it more closely.
        """
        choice = self._choice(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
        return self.codec.decode(self.sample(self.text.encode(captions), draws, choice))

    def complete(
        self,
        captions: str | Sequence[str],
        images: Tensor,
        *,
        keep: float = 0.5,
        seed: int = 0,
        **knobs: Any,
    ) -> Tensor:
        """Pictures (B, 3, S, S) whose upper part is that of `images`, as the codec sees it.

        Args:
            images: (B, 3, S, S) in [-1, 1].
            keep: share of the rows that are given.
            **knobs: those of `generate`.
        """
        if not 0 <= keep <= 1:
            raise UserError(f"keep={keep} must be from 0 to 1.")
        size = self.side * self.codec.factor
        if images.shape != (len(captions), 3, size, size):
            raise UserError(
                f"{len(captions)} captions need as many pictures of {size} x {size} pixels, not "
                f"{tuple(images.shape)}."
            )
        choice = self._choice(**dict.fromkeys(self.knobs()) | self.typed_knobs(knobs))
        captions = [captions] if isinstance(captions, str) else captions
        rows = round(keep * self.side)
        parts = iter(images.to(self.device).split(self.at_once))

        def part(chunk: list[str], draws: NoiseStreams) -> Tensor:
            ids = self.codec.encode(next(parts))[:, :rows].flatten(1)
            return self.codec.decode(self.sample(self.text.encode(chunk), draws, choice, ids))

        return torch.cat(list(self.in_parts(captions, seed, part))).float().clamp(-1, 1)

    # --- what a reader wants to see -------------------------------------------------------------

    def inside(self, caption: str, *, seed: int = 0) -> list[list[Named]]:
        """The picture as it is written, an eighth more each time; what is not yet there is grey."""

        def film(chunk: list[str], draws: NoiseStreams) -> list[list[Named]]:
            choice = self._choice(**dict.fromkeys(self.knobs()))
            ids = self.sample(self.text.encode(chunk), draws, choice)
            image = self.codec.decode(ids)[0].float().clamp(-1, 1)
            total, row = ids.numel(), []
            for eighth in range(1, 9):
                written = -(-total * eighth // 8)
                seen = torch.arange(total, device=ids.device).view(1, *ids.shape[1:]) < written
                mask = F.interpolate(seen[None].float(), image.shape[-2:], mode="nearest")[0]
                row.append((f"{written} of {total} codes", image * mask))
            return [row]

        return next(iter(self.in_parts([caption], seed, film)))

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> the codec's reconstructions."""
        return self.codec.decode(self.codec.encode(images))

    def stage_scores(self, batch: Batch) -> dict[str, Tensor]:
        """What each stage does on a batch, (B,) each: the reconstruction's `psnr` in dB; the
        prior's `nats_per_code` and `accuracy` with the true codes before each; and
        `bits_per_dim` of pixels, those of the codes and of what these leave open together.
        """
        image = batch.image
        grid = self.codec.encode(image)
        _, logits = self.logits(self.text.encode(batch.caption), grid.flatten(1))
        ids = grid.flatten(1)
        nats = F.cross_entropy(rearrange(logits.float(), "b n k -> b k n"), ids, reduction="none")
        decoded = self.codec.decode(grid)
        whole = nats.sum(1) + self.codec.nats(image, grid)
        return {
            "psnr": psnr((decoded - image).square().flatten(1).mean(1)),
            "nats_per_code": nats.mean(1),
            "accuracy": (logits.argmax(-1) == ids).float().mean(1),
            "bits_per_dim": whole / math.log(2) / image[0].numel(),
        }
