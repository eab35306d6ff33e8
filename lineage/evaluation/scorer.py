"""Models that say how well a picture fits a caption, for R-precision and CLIP score.

    Scorer             what the metrics need: unit vectors of pictures and of captions
    ContrastiveScorer  the smallest honest CLIP (Radford et al. 2021, section 2.3, figure 3)
    fit_scorer         trains one on any captioned data, in about a minute
    scorer_for         the one of a data set: shipped for `shapes`, else fitted once and kept
    hub_scorer         a published CLIP, through the `transformers` library

For B pairs the logits are t <image_i, text_j>, of unit vectors and a learnt factor t (the inverse
temperature: 1 / 0.07 at first, clipped at 100). The loss is the mean of the cross-entropies along
rows and along columns; the diagonal is true. Departures from CLIP:
    Pairs with the same caption, or of the same picture, are left out of each other's softmax: where
    ten pictures of a batch say "a red circle", it is true of all ten. A mask, not soft targets:
    these ask for equal logits, and so pull together pictures that differ in what is left unsaid.
    Pictures are blurred and made noisy, as generated ones are, not cropped: a crop would make "on
    the left" false. For the same reason the image tower ends in a linear layer over a 4 x 4 grid.
    Weights are rounded to float16 at the end, so what is kept is exactly what was fitted.
Like CLIP it is near to a bag of words (Yuksekgonul et al. 2023), as random wrong captions seldom
differ in order alone: things, colours and counts are told apart, "left of" from "right of" hardly.

Axes: B pictures or captions, S pixels, L words, C channels, D joint width. The shipped weights:
    python -m lineage.evaluation.scorer --out lineage/evaluation/weights/scorer_shapes.safetensors
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from itertools import product
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
from lineage.data import load_dataset
from lineage.data.contract import Batch, CaptionedDataset, Example, to_unit
from lineage.data.shapes import LEVELS
from lineage.errors import UserError
from lineage.evaluation import sections
from lineage.evaluation.judge import resized
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import PAD, Tokenizer, make_tokenizer, tokenizer_from_json
from lineage.training.group import Group
from lineage.training.loader import Loader
from lineage.training.machine import Processes
from lineage.training.store import cache_folder, fingerprint, write_bytes

VERSION = 1  # of network and training; a new one finds no scorer that an old one kept
CHUNK = 64  # rows that a scorer computes at a time, always as many
SIDE = 32  # pixels that the image tower sees
CHANNELS, WIDTH = 24, 64  # C of the image tower (twice as many below 16 x 16), and D
TEXT = TextConfig(vocabulary=1024, words=32, width=48, layers=2, heads=4)
STEPS, BATCH = 800, 96  # of `fit_scorer`
OPTIM = OptimConfig(lr=1.5e-3, beta2=0.98, weight_decay=0.05, average=0.0)
HEAD = ("config", "tokenizer", "scorer", "protocol")  # of a scorer's file
PLACES = (("validation", 16), ("validation", 32), ("validation", 64), ("heldout", 32))


class Scorer(Protocol):
    """What R-precision and CLIP score need."""

    name: str  # what stands beside every score
    kind: str  # `clip` or `damsm`
    width: int  # D
    protocol: dict[str, Any]  # how it was made, as JSON values

    def image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8, any S from 8 up -> (B, D) float32 unit vectors on the CPU."""

    def text(self, captions: list[str]) -> Tensor:
        """B captions -> (B, D) float32 unit vectors on the CPU."""


def in_chunks(rows: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, ...) -> (B, D) unit vectors, `encode`d in chunks of `CHUNK` rows.

    The last chunk is filled by repeating a row: kernels round differently for different shapes, and
    the answer for a row must not depend on how many are asked for at once.
    """
    parts = []
    for part in rows.split(CHUNK):
        rest = part[-1:].expand(CHUNK - len(part), *part.shape[1:])
        encoded = encode(torch.cat([part, rest])).float()
        parts.append(F.normalize(encoded, dim=-1)[: len(part)].cpu())
    return torch.cat(parts)


class Residual(nn.Sequential):
    """x + the layers of x."""

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
        nn.Flatten(),  # (B, 32C), which knows where things are
        nn.Linear(32 * c, width),
    )


class ContrastiveScorer(nn.Module):
    """Two towers and a temperature. `config` and `tokenizer` are those of the text tower."""

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

    def _ids(self, captions: list[str], length: int = 0) -> Tensor:
        """B captions -> (B, L) int64, padded to `length` words or to the longest caption."""
        rows = [self.tokenizer.encode(caption)[: self.config.words] for caption in captions]
        length = max(length, *map(len, rows))
        return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])

    def _captions(self, ids: Tensor) -> Tensor:
        _, sentence = self.text_tower(ids, ids != PAD)
        return self.project(sentence)  # (B, D)

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        device = self.log_scale.device
        return in_chunks(
            images, lambda part: self.image_tower(resized(to_unit(part.to(device)), SIDE))
        )

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        ids = self._ids(captions, self.config.words)  # all alike, whatever the longest of them is
        return in_chunks(ids, lambda part: self._captions(part.to(self.log_scale.device)))

    def loss(self, batch: Batch) -> Tensor:
        """The contrastive loss of B pairs at 32 pixels, a scalar."""
        captions, ids = np.array(batch.caption), np.array(batch.id)
        same = (captions[:, None] == captions) | (ids[:, None] == ids)  # (B, B)
        return contrastive_loss(
            F.normalize(self.image_tower(batch.image), dim=-1),
            F.normalize(self._captions(self._ids(batch.caption)), dim=-1),
            self.log_scale.clamp(max=math.log(100)).exp(),
            torch.from_numpy(same),
        )

    def save(self, path: str | Path) -> None:
        """Write what `load_scorer` reads. Raises `UserError` if the file cannot be written."""
        facts = (to_dict(self.config), self.tokenizer.to_json(), self.name, self.protocol)
        head = dict(zip(HEAD, map(json.dumps, facts), strict=True))
        weights = {name: w.cpu().half().contiguous() for name, w in self.state_dict().items()}
        write_bytes(Path(path), safetensors.torch.save(weights, head))


def load_scorer(path: str | Path) -> ContrastiveScorer:
    """The scorer that `ContrastiveScorer.save` wrote, in float32, on the CPU.

    Raises `UserError` if the file is missing, damaged or holds something else.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            head = file.metadata() or {}
        sizes, words, *rest = (json.loads(head[name]) for name in HEAD)
        config, tokenizer = from_dict(TextConfig, sizes), tokenizer_from_json(words)
        with torch.device("meta"):  # no random numbers are drawn
            scorer = ContrastiveScorer(config, tokenizer, *rest)
        scorer.load_state_dict(weights, assign=True)
    except Exception as error:  # of many kinds, since the file may hold anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is missing, damaged or not a scorer ({first[:120]}).") from error
    return scorer.eval().requires_grad_(False)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """The symmetric cross-entropy of unit vectors (B, D), Radford et al. 2021, figure 3.

    `scale` multiplies the cosines. Where `same` (B, B) is True off the diagonal, the pairs are no
    negatives of each other.
    """
    others = ~torch.eye(len(image), dtype=torch.bool)
    logits = (scale * image @ text.T).masked_fill(same & others, -torch.inf)  # (B, B)
    truth = torch.arange(len(image))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> (B, 3, 32, 32), as a weak generator might draw them.

    Half of the batches are blurred by way of 24 or 16 pixels; each picture gets noise of its own
    strength, with a deviation of at most 0.15.
    """
    side = (SIDE, SIDE, 24, 16)[int(torch.randint(4, (), generator=generator))]
    small = resized(resized(resized(images, SIDE), side), SIDE)
    strength = 0.15 * torch.rand(len(small), 1, 1, 1, generator=generator)
    return small + strength * torch.randn(small.shape, generator=generator)


def fit_scorer(
    dataset: CaptionedDataset,
    validation: CaptionedDataset | None = None,
    *,
    steps: int | None = None,
    batch: int = BATCH,
    seed: int = 0,
    progress: bool = True,
) -> ContrastiveScorer:
    """Train a scorer on the CPU; the same arguments give the same scorer.

    Args:
        dataset: what to train on.
        validation: pictures that it never saw, on which its own R-precision is then measured.
        steps: of AdamW, with a warm-up over the first twentieth and a cosine; `STEPS` if None.
        batch: pairs a step; at most the number of pictures.
        seed: of weights, order, captions and noise.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        UserError: the captions are all the same, so there is nothing to tell apart.
    """
    captions = list(dataset.all_captions())
    if len(set(captions)) < 2:
        raise UserError(
            f"All captions of {dataset.name} are the same: a scorer needs at least 2 to tell apart."
        )
    steps = STEPS if steps is None else steps
    batch = batch if dataset.endless else min(batch, len(dataset))
    with torch.random.fork_rng(devices=[]):  # the global random state stays as it was
        torch.default_generator.manual_seed(seed)
        tokenizer = make_tokenizer(TEXT.tokenizer, captions, TEXT.vocabulary)
        scorer = ContrastiveScorer(TEXT, tokenizer, f"contrastive scorer of {dataset.name}", {})
    group, processes = Group("scorer", [scorer], OPTIM), Processes()
    noise = torch.Generator().manual_seed(seed)
    batches = Loader(dataset, batch, seed).batches()
    hidden = None if progress else True  # None: only on a terminal
    with tqdm(total=steps, desc="fitting a scorer", unit=" steps", disable=hidden) as bar:
        for step in range(steps):
            warm = min(1.0, 20 * (step + 1) / steps)
            rate = warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            pairs = next(batches)
            pairs.image = disturbed(pairs.image, noise)
            loss = scorer.loss(pairs)
            group.update(loss, rate, step, processes)
            if step % 10 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}, rate {OPTIM.lr * rate:.1e}", False)
            bar.update()
    with torch.no_grad():
        for parameter in group.parameters:
            parameter.copy_(parameter.half())
    scorer.protocol |= {"data": dataset.name, "split": dataset.split, "size": dataset.size}
    scorer.protocol |= {"steps": steps, "batch": batch, "seed": seed, "version": VERSION}
    scorer.protocol |= {"parameters": sum(map(Tensor.numel, group.parameters)), "r_precision": []}
    if validation is not None:
        scorer.protocol["r_precision"].append(own_r_precision(scorer, validation))
    return scorer.eval().requires_grad_(False)


def own_r_precision(scorer: Scorer, dataset: CaptionedDataset, most: int = 1000) -> dict[str, Any]:
    """R-precision of at most `most` real pictures; None where all captions are the same."""
    examples = [dataset[i] for i in range(min(most, len(dataset)))]
    captions = [example.captions[0] for example in examples]
    image = scorer.image(torch.stack([example.image for example in examples]))
    found = sections.text_fit(image, scorer.text(captions), captions, scorer.kind)
    facts = {"data": dataset.name, "split": dataset.split, "size": dataset.size}
    value = found.get("r_precision", {}).get("value")
    return {**facts, "n": len(examples), "pool": found.get("pool"), "value": value}


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
    """The scorer of a data set: for `shapes` the shipped one, for other data one fitted to `train`.

    That is kept in `$LINEAGE_CACHE` (or `~/.cache/lineage`), in the folder `scorers`, and found
    again by `data_fingerprint`. A kept file that is damaged is replaced; a folder that cannot be
    written keeps nothing. The other arguments are those of `fit_scorer`.
    """
    if dataset_spec.partition(":")[0] == "shapes":
        shipped = resources.files("lineage.evaluation") / "weights" / "scorer_shapes.safetensors"
        with resources.as_file(shipped) as path:
            return load_scorer(path)
    content = [data_fingerprint, train.size, steps or STEPS, seed, VERSION, validation is not None]
    path = cache_folder("scorers") / f"{fingerprint(json.dumps(content).encode())}.safetensors"
    if path.exists():
        with contextlib.suppress(UserError):
            return load_scorer(path)
    scorer = fit_scorer(train, validation, steps=steps, seed=seed, progress=progress)
    with contextlib.suppress(UserError):
        scorer.save(path)
    return scorer


class HubScorer:
    """A `CLIPModel` of `transformers`; its processor resizes and normalises pictures."""

    kind: str = "clip"

    def __init__(self, model: Any, processor: Any, source: str) -> None:
        self.model, self.processor = model.float().eval(), processor
        self.name, self.width = f"CLIP ({source})", int(model.config.projection_dim)
        revision = getattr(model.config, "_commit_hash", None)
        self.protocol: dict[str, Any] = {"model": source, "revision": revision}

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        def encode(part: Tensor) -> Tensor:
            kinds = {"input_data_format": "channels_first", "return_tensors": "pt"}
            pixels = self.processor.image_processor(list(part.cpu().numpy()), **kinds)
            return _pooled(self.model.get_image_features(**pixels.to(self.model.device)))

        return in_chunks(images, encode)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        length = {"max_length": self.model.config.text_config.max_position_embeddings}
        words = self.processor.tokenizer(captions, padding="max_length", truncation=True, **length)
        ids = torch.tensor(words["input_ids"]).to(self.model.device)  # (B, L)
        return in_chunks(ids, lambda part: _pooled(self.model.get_text_features(part)))


def _pooled(output: Any) -> Any:
    """Features as `transformers` 4 (a tensor) and 5 (an object) return them."""
    return getattr(output, "pooler_output", output)


def hub_scorer(path_or_id: str | Path, device: torch.device | str = "cpu") -> HubScorer:
    """A CLIP from a local folder or the Hugging Face hub.

    Raises `UserError` if `transformers` is not installed, or no CLIP is found there.
    """
    source = str(path_or_id)
    try:
        from transformers import AutoConfig, CLIPModel, CLIPProcessor
    except ImportError:
        raise UserError("A CLIP needs transformers: pip install 'lineage-t2i[hub]'.") from None
    try:
        if (found := AutoConfig.from_pretrained(source).model_type) != "clip":
            raise ValueError(f"it holds a model of kind {found}")
        parts: tuple[Any, Any] = (CLIPModel, CLIPProcessor)
        model, processor = (part.from_pretrained(source) for part in parts)
    except Exception as error:  # of many kinds: no folder, no network, no such model, broken files
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UserError(f"No CLIP model can be loaded from {source!r} ({first[:200]}).") from error
    return HubScorer(model.to(device), processor, source)


class AllLevels(CaptionedDataset):
    """The three levels of `shapes` in turn: example i is example i // 3 of level i % 3."""

    endless = True

    def __init__(self) -> None:
        self.levels = [load_dataset(f"shapes:{level}", "train", SIDE) for level in LEVELS]
        self.name, self.split, self.size, self.skipped = "shapes (all levels)", "train", SIDE, []

    def __len__(self) -> int:
        return sum(map(len, self.levels))

    def __getitem__(self, index: int) -> Example:
        return replace(self.levels[index % 3][index // 3], id=str(index))

    def batch(self, indices: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        parts = [level.batch([i // 3 for i in indices], epochs, seed) for level in self.levels]
        chosen = [(i % 3, row) for row, i in enumerate(indices)]
        image = torch.stack([parts[k].image[row] for k, row in chosen])
        caption = [parts[k].caption[row] for k, row in chosen]
        return Batch(image, caption, None, [str(i) for i in indices])

    def all_captions(self, limit: int = 20_000) -> Iterator[str]:
        for level in self.levels:
            yield from level.all_captions(limit)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the shipped weights, and measure them on every level and at three sizes."""
    parser = argparse.ArgumentParser(prog="python -m lineage.evaluation.scorer")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    scorer = fit_scorer(AllLevels(), steps=options.steps, seed=options.seed)
    for level, (split, size) in product(LEVELS, PLACES):
        measured = own_r_precision(scorer, load_dataset(f"shapes:{level}", split, size))
        scorer.protocol["r_precision"].append(measured)
        print(measured)
    scorer.save(options.out)


if __name__ == "__main__":
    main()
