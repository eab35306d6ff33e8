"""Models that measure how well a picture fits a caption, for R-precision and CLIP score.

    Scorer             the contract: unit vectors of pictures and of captions
    ContrastiveScorer  a small CLIP (Radford et al. 2021, section 2.3, figure 3)
    fit_scorer         trains one on any captioned data, in about a minute
    scorer_for         the scorer of a data set: shipped for `shapes`, otherwise trained once
    HubScorer          a published CLIP, through the `transformers` library

For B pairs the logits are t <image_i, text_j>, of unit vectors and a learnt scale t (the inverse
temperature: 1 / 0.07 at first, clipped at 100). The loss is the mean of the cross-entropies along
rows and along columns, whose targets are the diagonal. Departures from CLIP:
    Pairs with the same caption, or of the same picture, are no negatives of each other: if ten
    pictures of a batch have the caption "a red circle", it is true of all ten. They are masked.
    Soft targets would require equal logits, and so pull together pictures that differ in what
    the caption leaves out.
    Pictures are blurred and made noisy, as generated ones are, and not cropped: a crop would make
    "on the left" false. For the same reason the image tower ends in a linear layer over a 4 x 4
    grid.
    Weights are rounded to float16 at the end, so a saved scorer is exactly the trained one.
Like CLIP it is close to a bag of words (Yuksekgonul et al. 2023), as random wrong captions seldom
differ in order alone: it separates objects, colours and counts well, "left of" and "right of"
hardly.

Axes: B pictures or captions, S pixels, L words, C channels, D joint width.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lineage.config import OptimConfig, TextConfig, from_dict, to_dict
from lineage.data.contract import Batch, CaptionedDataset, to_unit
from lineage.data.shapes_languages import ENGLISH
from lineage.errors import UserError
from lineage.evaluation import sections
from lineage.evaluation.judge import resized
from lineage.files import write_bytes
from lineage.text.contract import caption_list
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import PAD, Tokenizer, make_tokenizer, tokenizer_from_json
from lineage.threads import ThreadTuner, tuned
from lineage.training.group import Group
from lineage.training.loader import Loader
from lineage.training.machine import Distributed
from lineage.training.store import cache_folder, cached, fingerprint

VERSION = 2  # of network and training; scorers that another version has cached are not used
TEXT = TextConfig(vocab_size=1024, max_words=32, width=48, num_layers=2, num_heads=4)
STEPS, BATCH_SIZE = 800, 96  # of `fit_scorer`
OPTIM = OptimConfig(lr=1.5e-3, beta2=0.98, weight_decay=0.05, ema_decay=0.0)
CHUNK = 64  # rows of one pass, always as many
SIDE = 32  # pixels a side in the image tower
CHANNELS, WIDTH = 24, 64  # C of the image tower (twice as many below 16 x 16), and D
METADATA = ("config", "tokenizer", "scorer", "protocol")  # of a scorer's file


class Scorer(Protocol):
    """Embeddings for R-precision and CLIP score.

    Attributes:
        name: Name that is stated with every score.
        kind: `clip` or `damsm`.
        width: D.
        protocol: How the scorer was made, as JSON values.
    """

    name: str
    kind: str
    width: int
    protocol: dict[str, Any]

    def image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8, any S from 8 up -> (B, D) float32 unit vectors on the CPU."""

    def text(self, captions: list[str]) -> Tensor:
        """B captions -> (B, D) float32 unit vectors on the CPU."""


def in_chunks(rows: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, ...) -> (B, D) unit vectors, `encode`d in chunks of `CHUNK` rows.

    The last chunk is filled with copies of a row: kernels round differently for different shapes,
    and the result for a row must not depend on the number of rows.
    """
    parts = []
    for part in rows.split(CHUNK):
        padding = part[-1:].expand(CHUNK - len(part), *part.shape[1:])
        with tuned("scorer", encode.__qualname__, *part.shape[1:]):
            encoded = encode(torch.cat([part, padding])).float()
        parts.append(F.normalize(encoded, dim=-1)[: len(part)].cpu())
    return torch.cat(parts)


class Residual(nn.Sequential):
    """x + layers(x), with the layers norm, SiLU, convolution, twice."""

    def __init__(self, c: int) -> None:
        halves = ((nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1)) for _ in range(2))
        super().__init__(*(layer for half in halves for layer in half))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def image_tower(c: int, width: int) -> nn.Sequential:
    """(B, 3, 32, 32) in [-1, 1] -> (B, D)."""
    return nn.Sequential(
        nn.PixelUnshuffle(2),  # (B, 12, 16, 16)
        nn.Conv2d(12, c, 3, padding=1),
        Residual(c),
        nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),  # (B, 2C, 8, 8)
        Residual(2 * c),
        nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1),  # (B, 2C, 4, 4)
        Residual(2 * c),
        nn.GroupNorm(8, 2 * c),
        nn.SiLU(),
        nn.Flatten(),  # (B, 32C): positions stay apart
        nn.Linear(32 * c, width),
    )


class ContrastiveScorer(nn.Module):
    """Two towers and a temperature.

    Args:
        config, tokenizer: Configuration and tokeniser of the text tower.
        name, protocol: See `Scorer`.
    """

    kind: str = "clip"

    def __init__(
        self, config: TextConfig, tokenizer: Tokenizer, name: str, protocol: dict[str, Any]
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.name, self.protocol, self.width = name, protocol, WIDTH
        self.image_tower = image_tower(CHANNELS, WIDTH)
        self.text_tower = make_encoder("transformer", config, tokenizer)
        self.project = nn.Linear(config.width, WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        def encode(part: Tensor) -> Tensor:
            return self.image_tower(resized(to_unit(part.to(self.log_scale.device)), SIDE))

        return in_chunks(images, encode)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        length = self.config.max_words  # the same for all, whatever the longest caption
        rows = [self.tokenizer.encode(caption)[:length] for caption in caption_list(captions)]
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])  # (B, L)

        def encode(part: Tensor) -> Tensor:
            part = part.to(self.log_scale.device)
            _, sentence = self.text_tower(part, part != PAD)
            return self.project(sentence)

        return in_chunks(ids, encode)

    def loss(self, batch: Batch) -> Tensor:
        """The contrastive loss of B pairs at 32 pixels, a scalar."""
        captions, ids = np.array(batch.caption), np.array(batch.id)
        same = (captions[:, None] == captions) | (ids[:, None] == ids)  # (B, B)
        sentence = self.text_tower.encode(batch.caption).sentence
        return contrastive_loss(
            F.normalize(self.image_tower(batch.image), dim=-1),
            F.normalize(self.project(sentence), dim=-1),
            self.log_scale.clamp(max=math.log(100)).exp(),
            torch.from_numpy(same),
        )

    def save(self, path: str | Path) -> None:
        """Write the file for `load_scorer`. Raises `UserError` if it cannot be written."""
        values = (to_dict(self.config), self.tokenizer.to_json(), self.name, self.protocol)
        metadata = dict(zip(METADATA, map(json.dumps, values), strict=True))
        weights = {name: w.cpu().half().contiguous() for name, w in self.state_dict().items()}
        write_bytes(Path(path), safetensors.torch.save(weights, metadata))


def load_scorer(path: str | Path) -> ContrastiveScorer:
    """The scorer that `ContrastiveScorer.save` wrote, in float32, on the CPU.

    Raises `UserError` if the file is missing, damaged or holds something else.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        config, tokenizer, *rest = (json.loads(metadata[name]) for name in METADATA)
        with torch.device("meta"):  # draws no random numbers
            scorer = ContrastiveScorer(
                from_dict(TextConfig, config), tokenizer_from_json(tokenizer), *rest
            )
        scorer.load_state_dict(weights, assign=True)
    except Exception as error:  # of many kinds, since the file may hold anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is missing, damaged or not a scorer ({first[:120]}).") from error
    return scorer.eval().requires_grad_(False)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """The symmetric cross-entropy of unit vectors (B, D), Radford et al. 2021, figure 3.

    Args:
        scale: Factor of the cosines.
        same: (B, B) True for pairs that are no negatives of each other.
    """
    off_diagonal = ~torch.eye(len(image), dtype=torch.bool)
    logits = (scale * image @ text.T).masked_fill(same & off_diagonal, -torch.inf)  # (B, B)
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# --- training ---------------------------------------------------------------------------------


def degraded(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> (B, 3, 32, 32), as a weak generator might draw them.

    Half of the batches are blurred by way of 24 or 16 pixels; each picture has noise of its own
    strength, with a deviation of at most 0.15.
    """
    side = (SIDE, SIDE, 24, 16)[int(torch.randint(4, (), generator=generator))]
    small = resized(resized(resized(images, SIDE), side), SIDE)
    sigma = 0.15 * torch.rand(len(small), 1, 1, 1, generator=generator)
    return small + sigma * torch.randn(small.shape, generator=generator)


def check_captions(dataset: CaptionedDataset) -> list[str]:
    """All captions; raises `UserError` if there are no two to tell apart."""
    captions = list(dataset.all_captions())
    if len(set(captions)) < 2:
        raise UserError(
            f"All captions of {dataset.name} are the same, so no scorer can be fitted: add "
            "--scorer none --features judge, or more captions."
        )
    return captions


def fit_scorer(
    dataset: CaptionedDataset,
    validation: CaptionedDataset | None = None,
    *,
    steps: int | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> ContrastiveScorer:
    """Train a scorer on the CPU; the same arguments give the same scorer.

    Args:
        dataset: Data set to train on.
        validation: Unseen pictures, on which its own R-precision is then measured.
        steps: Number of steps of AdamW, with a warm-up over the first twentieth and a cosine;
            `STEPS` if None.
        batch_size: Number of pairs of a step; at most the number of pictures.
        seed: Seed of weights, order, captions and noise.
        progress: If true, show a bar on standard error if that is a terminal.

    Raises:
        UserError: all captions are the same, so there is nothing to tell apart.
    """
    captions = check_captions(dataset)
    steps = STEPS if steps is None else steps
    batch_size = batch_size if dataset.endless else min(batch_size, len(dataset))
    with torch.random.fork_rng(devices=[]):  # the global random state is restored
        torch.default_generator.manual_seed(seed)
        tokenizer = make_tokenizer(TEXT.tokenizer, captions, TEXT.vocab_size)
        scorer = ContrastiveScorer(TEXT, tokenizer, f"contrastive scorer of {dataset.name}", {})
    group, generator = Group("scorer", [scorer], OPTIM), torch.Generator().manual_seed(seed)
    batches, threads = Loader(dataset, batch_size, seed).batches(), ThreadTuner()
    disable = None if progress else True  # None: only on a terminal
    with tqdm(total=steps, desc="fitting a scorer", unit=" steps", disable=disable) as bar:
        for step in range(steps):
            warmup = min(1.0, 20 * (step + 1) / steps)
            lr_factor = warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            batch = next(batches)
            batch.image = degraded(batch.image, generator)
            with threads.unit():
                loss = scorer.loss(batch)
                group.update(loss, lr_factor, step, Distributed())
            if step % 10 == 0:
                lr = OPTIM.lr * lr_factor
                bar.set_postfix_str(f"loss {loss.item():.3f}, rate {lr:.1e}", refresh=False)
            bar.update()
    with torch.no_grad():
        for parameter in group.parameters:
            parameter.copy_(parameter.half())
    scorer.protocol |= {"data": dataset.name, "split": dataset.split, "size": dataset.size}
    scorer.protocol |= {"steps": steps, "batch": batch_size, "seed": seed, "version": VERSION}
    scorer.protocol |= {"parameters": sum(map(Tensor.numel, group.parameters)), "r_precision": []}
    if validation is not None:
        scorer.protocol["r_precision"].append(own_r_precision(scorer, validation))
    return scorer.eval().requires_grad_(False)


def own_r_precision(
    scorer: Scorer, dataset: CaptionedDataset, max_pictures: int = 1000
) -> dict[str, Any]:
    """R-precision of real pictures; its value is None if all captions are the same."""
    examples = [dataset[i] for i in range(min(max_pictures, len(dataset)))]
    captions = [example.captions[0] for example in examples]
    image = scorer.image(torch.stack([example.image for example in examples]))
    section = sections.text_fit(image, scorer.text(captions), captions, scorer.kind)
    return {
        "data": dataset.name,
        "split": dataset.split,
        "size": dataset.size,
        "n": len(examples),
        "pool": section.get("pool"),
        "value": section.get("r_precision", {}).get("value"),
    }


def scorer_for(
    dataset_spec: str,
    train: CaptionedDataset,
    data_fingerprint: str,
    validation: CaptionedDataset | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ContrastiveScorer:
    """The scorer of a data set: for `shapes` in English the shipped one, for other data and other
    languages one fitted to `train`.

    A fitted one is cached in `$LINEAGE_CACHE` (or `~/.cache/lineage`), in the folder `scorers`,
    under a hash of `data_fingerprint` and the arguments of `fit_scorer`. A damaged file is
    replaced; if the folder cannot be written, nothing is cached.
    """
    is_english = getattr(train, "languages", ENGLISH) == ENGLISH
    if re.split("[:?]", dataset_spec)[0] == "shapes" and is_english:
        shipped = resources.files("lineage.evaluation") / "weights" / "scorer_shapes.safetensors"
        with resources.as_file(shipped) as path:
            return load_scorer(path)
    inputs = [data_fingerprint, train.size, steps or STEPS, seed, VERSION, validation is not None]
    if train.endless:  # the seed of the world
        inputs.append(getattr(train, "seed", 0))
    path = cache_folder("scorers") / f"{fingerprint(json.dumps(inputs).encode())}.safetensors"

    def fit() -> ContrastiveScorer:
        return fit_scorer(train, validation, steps=steps, seed=seed, progress=progress)

    return cached(path, load_scorer, fit, lambda path, scorer: scorer.save(path))


# --- published models -------------------------------------------------------------------------


class HubScorer:
    """A `CLIPModel` of `transformers`; its processor resizes and normalises the pictures."""

    kind: str = "clip"

    def __init__(self, model: Any, processor: Any, source: str) -> None:
        self.model, self.processor = model.float().eval(), processor
        self.name, self.width = f"CLIP ({source})", int(model.config.projection_dim)
        revision = getattr(model.config, "_commit_hash", None)
        self.protocol: dict[str, Any] = {"model": source, "revision": revision}

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        def encode(part: Tensor) -> Tensor:
            options = {"input_data_format": "channels_first", "return_tensors": "pt"}
            pixels = self.processor.image_processor(list(part.cpu().numpy()), **options)
            return _pooled(self.model.get_image_features(**pixels.to(self.model.device)))

        return in_chunks(images, encode)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        length = {"max_length": self.model.config.text_config.max_position_embeddings}
        words = self.processor.tokenizer(
            caption_list(captions), padding="max_length", truncation=True, **length
        )
        ids = torch.tensor(words["input_ids"]).to(self.model.device)  # (B, L)
        return in_chunks(ids, lambda part: _pooled(self.model.get_text_features(part)))


def _pooled(output: Any) -> Any:
    """Features as `transformers` 4 (a tensor) and 5 (an object) return them."""
    return getattr(output, "pooler_output", output)


def hub_scorer(path_or_id: str | Path, device: torch.device | str = "cpu") -> HubScorer:
    """A CLIP from a local folder or the Hugging Face hub.

    Raises `UserError` if `transformers` is not installed, or the source holds no CLIP.
    """
    source = str(path_or_id)
    try:
        from transformers import AutoConfig, CLIPModel, CLIPProcessor
    except ImportError:
        raise UserError("A CLIP needs transformers: pip install 'lineage-t2i[hub]'.") from None
    try:
        if (kind := AutoConfig.from_pretrained(source).model_type) != "clip":
            raise ValueError(f"it holds a model of kind {kind}")
        parts: tuple[Any, Any] = (CLIPModel, CLIPProcessor)
        model, processor = (part.from_pretrained(source) for part in parts)
    except Exception as error:  # of many kinds: no folder, no network, no such model, broken files
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UserError(f"No CLIP model can be loaded from {source!r} ({first[:200]}).") from error
    return HubScorer(model.to(device), processor, source)
