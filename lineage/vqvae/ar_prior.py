"""The autoregressive prior of `vqvae`, `dalle` and `vqgan`: a transformer that predicts the codes
of a picture from its caption (Ramesh et al. 2021, arXiv:2102.12092, section 2.2).

The problem: a codec turns codes into a picture, but which codes belong to a caption? What is new:
the tokens y of the text and the codes z of the picture are one sequence, and a decoder-only
transformer models it like a sentence:

    p(y, z) = prod_i p(y_i | y_<i) prod_j p(z_j | y, z_<j)
    L = 1/8 L_text + 7/8 L_image
    L_text = -mean log p(y_i | y_<i),   L_image = -mean log p(z_j | y, z_<j)

    section 2.2        the sequence: a start token, T positions of text, then the codes row by row
                                                               `embed_text`, `embed_codes`
                       a learnt embedding for each empty position of the text, `pad_emb`;
                       row and column embeddings for the codes, `grid_pos_emb`
                       L                                                `losses`
    section 2.6        sampling code by code, with a temperature        `sample_codes`
                       (the best of several samples: `lineage sample --best-of`)
    later papers       top-k (Fan et al. 2018), top-p (Holtzman et al. 2020)   `SamplingConfig`
                       classifier-free guidance on logits (Gafni et al. 2022, arXiv:2203.13131,
                       section 3.4): l = l_uncond + guidance (l_cond - l_uncond)

Departures: text comes from any encoder of `lineage/text` and a linear layer; `bag`, one learnt
vector for each token, is DALL-E's. The text of an encoder that is not causal is not predicted,
because its vectors depend on the next word: then L = L_image. Empty positions are never predicted.
Captions are dropped in training, for guidance. There is no BPE dropout. Attention is dense: at
these lengths a sparse one saves nothing.

Axes: B rows, T positions of text, N = H W codes, D width, K entries of the
codebook, V text tokens, S side of the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from lineage.bounds import Dim, Float, Fraction, NonNegativeFloat, NonNegativeInt
from lineage.config import configuration
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.nn.vqgan_losses import psnr
from lineage.system import LabelledImage, System, Turn
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.vqvae.codec import Codec
from lineage.vqvae.transformer import KVCache, Transformer, TransformerConfig

TopP = Annotated[Float, Field(gt=0, le=1)]
KeptShare = Annotated[Float, Field(ge=0, le=1, allow_inf_nan=False)]

MIN_TEMPERATURE = 1e-6
"""Lowest temperature that logits are divided by; the quotient must not overflow."""
MAX_UNIFORM = 1 - 2**-22
"""Largest u of the inverse CDF: u times the total must round to less than the total in float32."""


@configuration
class SamplingConfig:
    """How a code is drawn from its logits.

    Attributes:
        temperature: Temperature of the softmax; below 1 it favours likely codes, 0 takes the
            likeliest.
        top_k: Number of likeliest codes that are kept; 0 keeps all.
        top_p: Nucleus sampling: the smallest set of codes is kept whose probabilities sum to this.
        guidance: Weight of classifier-free guidance; 1 is none.
    """

    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: TopP = 1.0
    guidance: NonNegativeFloat = 1.0

    def probs(self, logits: Tensor) -> Tensor:
        """Logits (B, K) -> probabilities (B, K), 0 for codes that top-k or top-p leaves out."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)
        if 0 < self.top_k < logits.shape[1]:
            smallest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probs = (logits / max(self.temperature, MIN_TEMPERATURE)).softmax(1)
        if self.top_p < 1:
            ordered, order = probs.sort(1, descending=True)
            likelier = ordered.cumsum(1) - ordered  # probability of all codes before each
            ordered = ordered.masked_fill(likelier >= self.top_p, 0)
            probs = torch.zeros_like(probs).scatter(1, order, ordered)
        return probs

    def sample(self, logits: Tensor, u: Tensor) -> Tensor:
        """Logits (B, K) and uniform numbers (B,) in [0, 1) -> codes (B,), by the inverse CDF.

        Each row has its own random numbers, so that a picture does not depend on its batch.
        """
        cdf = self.probs(logits).cumsum(1)
        total = cdf[:, -1:]  # 1 up to rounding, less under top-p
        return torch.searchsorted(cdf, u.clamp(max=MAX_UNIFORM)[:, None] * total, right=True)[:, 0]


@configuration
class PriorConfig:
    """The transformer, its losses and its sampling.

    Attributes:
        transformer: Sizes of the transformer.
        text_len: T, number of positions for text; longer captions are cut.
        text_weight: Weight of L_text; that of L_image is 1 - text_weight.
        cond_drop_prob: Probability that a training caption is dropped.
        sampling: How codes are drawn by default.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    text_len: Dim = 256
    text_weight: Fraction = 1 / 8
    cond_drop_prob: Fraction = 0.1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


class Prior(System):
    """System that predicts the codes of captions, and decodes them to pictures.

    Args:
        config: Sizes, losses, sampling.
        codec: Trained codec; it is frozen.
        text: Encoder of the captions; trained with the prior.
        size: S, side of the pictures.
    """

    def __init__(self, config: PriorConfig, codec: Codec, text: TextEncoder, size: int) -> None:
        super().__init__()
        if size % codec.factor:
            raise UserError(
                f"size={size} is not divisible by {codec.factor}, the number of pixels on a side "
                "of one code."
            )
        self.config, self.text, self.size = config, text, size
        self.text_len = config.text_len
        self.codec = codec.requires_grad_(False)
        self.grid_size, width = size // codec.factor, config.transformer.width
        self.transformer = Transformer(config.transformer)
        self.text_proj = nn.Linear(text.word_dim, width)
        self.start_emb = nn.Embedding(1, width)
        self.pos_emb = nn.Embedding(config.text_len, width)
        self.pad_emb = nn.Embedding(config.text_len, width)
        self.code_emb = nn.Embedding(codec.num_codes, width)
        self.row_emb, self.column_emb = (nn.Embedding(self.grid_size, width) for _ in range(2))
        self.code_head = nn.Linear(width, codec.num_codes)
        predicts_text = text.causal and text.vocab_size > 0 and config.text_weight > 0
        self.text_head = nn.Linear(width, text.vocab_size) if predicts_text else None
        for embedding in self._embeddings():  # the deviation of GPT-2
            nn.init.normal_(embedding.weight, std=0.02)
        for linear in (self.text_proj, self.code_head, self.text_head):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def _embeddings(self) -> list[nn.Embedding]:
        text = [self.start_emb, self.pos_emb, self.pad_emb]
        return [*text, self.code_emb, self.row_emb, self.column_emb]

    def train(self, mode: bool = True) -> Prior:
        """Set the mode of everything but the codec, which stays in evaluation mode."""
        super().train(mode)
        self.codec.eval()
        return self

    def groups(self) -> dict[str, list[nn.Module]]:
        modules = [self.transformer, self.text_proj, *self._embeddings(), self.code_head]
        if self.text_head is not None:
            modules.append(self.text_head)
        return {"prior": [*modules, self.text]}

    # --- section 2.2: one sequence ----------------------------------------------------------------

    def embed_text(self, text: TextFeatures) -> Tensor:
        """Start token and T positions of text, (B, 1 + T, D)."""
        text = text.truncated(self.config.text_len).padded(self.config.text_len)
        words = self.text_proj(text.words).to(self.pad_emb.weight.dtype)
        words = torch.where(text.mask[..., None], words, self.pad_emb.weight)
        start = self.start_emb.weight.expand(len(text), 1, -1)
        return torch.cat([start, words + self.pos_emb.weight], dim=1)

    def grid_pos_emb(self) -> Tensor:
        """Sum of row and column embedding of each code, row by row, (N, D)."""
        return rearrange(self.row_emb.weight[:, None] + self.column_emb.weight, "h w d -> (h w) d")

    def embed_codes(self, ids: Tensor) -> Tensor:
        """The first n codes (B, n), row by row -> (B, n, D)."""
        return self.code_emb(ids) + self.grid_pos_emb()[: ids.shape[1]]

    def logits(self, text: TextFeatures, ids: Tensor) -> tuple[Tensor | None, Tensor]:
        """Logits of each token, given all tokens before it.

        Args:
            text: Encoded captions.
            ids: Codes (B, N).

        Returns:
            Logits of the text (B, T, V), or None if it is not predicted, and of the codes
            (B, N, K).
        """
        x = torch.cat([self.embed_text(text), self.embed_codes(ids[:, :-1])], dim=1)
        x = self.transformer(x)  # (B, T + N, D); position i predicts token i + 1
        text_len = self.config.text_len
        text_logits = None if self.text_head is None else self.text_head(x[:, :text_len])
        return text_logits, self.code_head(x[:, text_len:])

    def encode(self, image: Tensor) -> Tensor:
        """Codes (B, H, W) of pictures, in full precision: rounding would change some of them."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return self.codec.encode(image)

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """L = text_weight L_text + (1 - text_weight) L_image, or L_image without a text head."""
        config = self.config
        cached = batch.extra.get("codes")
        ids = (self.encode(batch.image) if cached is None else cached).flatten(1)  # (B, N)
        has_caption = noise.rand() >= config.cond_drop_prob  # (B,)
        cond = text.where(has_caption, self.text.null(len(batch)))
        text_logits, code_logits = self.logits(cond, ids)

        image_loss = F.cross_entropy(code_logits.flatten(0, 1).float(), ids.flatten())
        metrics = {"image_nats": image_loss.detach()}
        terms = {"image": image_loss}
        if text_logits is not None:
            text = text.truncated(config.text_len).padded(config.text_len)
            has_word = (text.mask & has_caption[:, None]).flatten()  # (B T,)
            nats = F.cross_entropy(
                text_logits.flatten(0, 1).float(), text.ids.flatten(), reduction="none"
            )
            text_loss = (nats * has_word).sum() / has_word.sum().clamp(min=1)
            metrics["text_nats"] = text_loss.detach()
            weight = config.text_weight
            terms = {"text": weight * text_loss, "image": (1 - weight) * image_loss}

        def accuracy() -> Tensor:
            return (code_logits.detach().argmax(-1) == ids).float().mean()

        yield Turn("prior", terms, lambda: {**metrics, "image_accuracy": accuracy()})

    # --- section 2.6: sampling --------------------------------------------------------------------

    def sample_codes(
        self,
        text: TextFeatures,
        noise: NoiseStreams,
        sampling: SamplingConfig,
        prompt: Tensor | None = None,
        cached: bool = True,
    ) -> Tensor:
        """Codes (B, H, W), drawn one after the other.

        Args:
            text: Encoded captions.
            noise: Random numbers of each row.
            sampling: How a code is drawn.
            prompt: The first codes (B, m), which are kept; None for none.
            cached: If true, keys and values are cached; the codes are the same without.
        """
        batch_size, num_codes, guidance = len(text), self.grid_size**2, sampling.guidance
        u = noise.rand(num_codes)  # (B, N)
        ids = u.new_zeros(batch_size, 0, dtype=torch.int64) if prompt is None else prompt
        num_branches = 1 if guidance == 1 else 2  # conditional rows, then unconditional ones
        if num_branches == 2:
            text = TextFeatures.cat([text, self.text.null(batch_size)])

        prefix = self.embed_text(text)
        x = torch.cat([prefix, self.embed_codes(ids.repeat(num_branches, 1))], dim=1)
        config, length = self.config.transformer, prefix.shape[1] + num_codes - 1
        cache = KVCache(config, len(prefix), length, like=prefix) if cached else None
        pos_emb = self.grid_pos_emb()
        for position in range(ids.shape[1], num_codes):
            logits = self.code_head(self.transformer(x, cache)[:, -1]).float()
            if num_branches == 2:
                cond, uncond = logits.chunk(2)
                logits = uncond + guidance * (cond - uncond)
            new_ids = sampling.sample(logits, u[:, position])[:, None]  # (B, 1)
            ids = torch.cat([ids, new_ids], dim=1)
            new_emb = self.code_emb(new_ids.repeat(num_branches, 1)) + pos_emb[position]
            x = new_emb if cached else torch.cat([x, new_emb], dim=1)
        return ids.unflatten(1, (self.grid_size, self.grid_size))

    def sample(
        self,
        captions: list[str],
        noise: NoiseStreams,
        temperature: NonNegativeFloat | None = None,
        top_k: NonNegativeInt | None = None,
        top_p: TopP | None = None,
        guidance: NonNegativeFloat | None = None,
        image: Tensor | None = None,
        keep: KeptShare | None = None,
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            temperature: Temperature of the softmax; below 1 it favours likely codes.
            top_k: Number of likeliest codes that are kept; 0 keeps all.
            top_p: Probability that the kept codes reach together.
            guidance: Weight of classifier-free guidance; 1 is none.
            image: Picture whose upper part is kept.
            keep: Share of `image` that is kept, from above; 0.5 by default.
        """
        if keep is not None and image is None:
            raise UserError("keep has no effect without image: give the picture too.")
        options: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "guidance": guidance,
        }
        sampling = self._sampling(options)
        prompt = None
        if image is not None:
            prompt = self.encode(image)[:, : self._kept_rows(keep)].flatten(1)
        ids = self.sample_codes(self.text.encode(captions), noise, sampling, prompt)
        return self.codec.decode(ids)

    def _sampling(self, options: Mapping[str, Any]) -> SamplingConfig:
        """The configured sampling, changed by the options that are not None."""
        names = [one.name for one in fields(SamplingConfig)]
        changes = {n: options[n] for n in names if options.get(n) is not None}
        return replace(self.config.sampling, **changes)

    def _kept_rows(self, keep: float | None) -> int:
        """Number of rows of codes that are kept of a picture."""
        return round((0.5 if keep is None else keep) * self.grid_size)

    def idle_options(self, captions: list[str], options: Mapping[str, Any]) -> dict[str, str]:
        sampling, num_codes = self._sampling(options), self.codec.num_codes
        kept_rows = self._kept_rows(options.get("keep")) if "image" in options else 0
        idle: dict[str, str] = {}
        if sampling.temperature == 0:
            idle = dict.fromkeys(("top_k", "top_p"), "temperature=0 takes the likeliest code")
        elif sampling.top_k == 1:
            idle = dict.fromkeys(("temperature", "top_p"), "top_k=1 takes the likeliest code")
        elif sampling.top_k >= num_codes:
            idle = {"top_k": f"there are {num_codes} codes"}
        if kept_rows == self.grid_size:
            names = [one.name for one in fields(SamplingConfig)]
            idle = dict.fromkeys(names, "the whole picture is kept")
        default = self.config.sampling
        changed = [n for n in idle if n in options and options[n] != getattr(default, n)]
        named = {name: idle[name] for name in changed}
        if "image" in options and kept_rows == 0:
            named |= {"image": "no row of its codes is kept"}
        return named

    # --- inspection and metrics ------------------------------------------------------------------

    def frames(self, caption: str, *, seed: int = 0) -> list[list[LabelledImage]]:
        """The finished picture, revealed in 64 steps, or code by code if it has fewer."""
        frames = {one.label: [one] for one in self._revealed(caption, seed, 64)}
        return list(frames.values())

    def visualise(self, caption: str, *, seed: int = 0) -> list[list[LabelledImage]]:
        """The finished picture, revealed an eighth of its codes at a time."""
        return [self._revealed(caption, seed, 8)]

    def _revealed(self, caption: str, seed: int, num_steps: int) -> list[LabelledImage]:
        """The picture with only the first of its codes, in steps of about equally many."""
        with self.inference():
            noise = NoiseStreams.for_pictures(seed, 1, self.device)
            ids = self.sample_codes(self.text.encode([caption]), noise, self.config.sampling)
            image = self.codec.decode(ids)[0].float().clamp(-1, 1)
        total, row = ids.numel(), []
        order = torch.arange(total, device=ids.device).view(1, *ids.shape)  # (1, 1, H, W)
        for step in range(1, num_steps + 1):
            count = -(-total * step // num_steps)  # rounded up
            revealed = F.interpolate((order < count).float(), image.shape[-2:], mode="nearest")[0]
            row.append(LabelledImage(f"{count} of {total} codes", image * revealed))
        return row

    def reconstruct(self, images: Tensor) -> Tensor:
        """The codec's reconstructions of pictures (B, 3, S, S) in [-1, 1]."""
        return self.codec.decode(self.codec.encode(images))

    def stage_scores(self, batch: Batch) -> dict[str, Tensor]:
        """Per-image metrics of codec and prior, (B,) each.

        Returns:
            `psnr` of the reconstruction in dB; `nats_per_code` and `accuracy` of the prior, given
            the true codes before each; `bits_per_dim` of the pixels: the bits of the codes, and
            those of the picture given its codes.
        """
        image = batch.image
        grid = self.codec.encode(image)
        ids = grid.flatten(1)  # (B, N)
        _, logits = self.logits(self.text.encode(batch.caption), ids)
        nats = F.cross_entropy(rearrange(logits.float(), "b n k -> b k n"), ids, reduction="none")
        mse = (self.codec.decode(grid) - image).square().flatten(1).mean(1)
        total_nats = nats.sum(1) + self.codec.nll(image, grid)
        return {
            "psnr": psnr(mse),
            "nats_per_code": nats.mean(1),
            "accuracy": (logits.argmax(-1) == ids).float().mean(1),
            "bits_per_dim": total_nats / math.log(2) / image[0].numel(),
        }
