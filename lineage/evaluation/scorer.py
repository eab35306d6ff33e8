"""Models that measure how well a picture fits a caption, for R-precision and CLIP score.

    Scorer        the contract: unit vectors of pictures and of captions
    CLIPScorer    a run of CLIP (`lineage/clip`)
    scorer_for    the scorer of a data set: `pretrained:clip` for `shapes`, otherwise a run of CLIP
                  that is trained once, in about a minute
    HubScorer     a published CLIP, through the `transformers` library

Axes: B pictures or captions, S pixels, P width of the joint space.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.cache import cache_folder
from lineage.data.contract import CaptionedDataset, to_unit
from lineage.data.layouts import square_spec
from lineage.errors import CheckFailed, UserError
from lineage.pretrained import run_folder, run_name
from lineage.runs import load_comparer, read_config, train
from lineage.search import Comparer
from lineage.text.contract import caption_list
from lineage.threads import tuned, use_threads
from lineage.training.cost import read_cost
from lineage.training.store import fingerprint

CHUNK = 64  # rows of one pass, always as many
STEPS, BATCH_SIZE = 800, 96  # of a scorer that is trained for a data set
IN_CACHE = "trained once, in $LINEAGE_CACHE/scorers"
"""What a protocol says in place of the path of a scorer that was trained for a data set."""
SETTINGS = {"train.checkpoint_every": 0, "train.sample_every": 0, "size": 32}


class Scorer(Protocol):
    """Embeddings for R-precision and CLIP score.

    Attributes:
        name: Name that is stated with every score.
        kind: `clip` or `damsm`.
        width: P.
        protocol: How the scorer was made, as JSON values.
    """

    name: str
    kind: str
    width: int
    protocol: dict[str, Any]

    def image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8, any S from 8 up -> (B, P) float32 unit vectors on the CPU."""

    def text(self, captions: list[str]) -> Tensor:
        """B captions -> (B, P) float32 unit vectors on the CPU."""


def in_chunks(rows: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, ...) -> (B, P) unit vectors, `encode`d in chunks of `CHUNK` rows.

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


class CLIPScorer:
    """A trained CLIP.

    Args:
        model: The CLIP.
        name, protocol: See `Scorer`.
    """

    kind: str = "clip"

    def __init__(self, model: Comparer, name: str, protocol: dict[str, Any]) -> None:
        self.model, self.name, self.protocol = model, name, protocol
        self.device = next(iter(model.parameters())).device
        self.width = model.embed_dim

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        def encode(part: Tensor) -> Tensor:
            return self.model.encode_image(to_unit(part.to(self.device)))

        return in_chunks(images, encode)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        captions = caption_list(captions)

        def encode(rows: Tensor) -> Tensor:
            # one at a time: a caption's vector must not depend on the longest one beside it, nor,
            # in its last bits, on the number of threads, of which one is enough for a caption
            with use_threads(1):
                return torch.cat([self.model.encode_text([captions[row]]) for row in rows.tolist()])

        return in_chunks(torch.arange(len(captions)), encode)


def clip_scorer(run: str | Path, device: torch.device | str = "cpu") -> CLIPScorer:
    """The scorer of a run of CLIP.

    Raises:
        UserError: there is no such run, or it is of another system.
    """
    folder = run_folder(run, "clip:RUN")
    model = load_comparer(folder, str(device))
    config = read_config(folder)
    weights = fingerprint((folder / "model.safetensors").read_bytes())
    protocol = {
        "model": "clip",
        "run": run_name(folder) if folder.parent != cache_folder("scorers") else IN_CACHE,
        "weights": weights,
        "data": config.data,
        "size": config.size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return CLIPScorer(model, f"CLIP of {config.data} ({weights})", protocol)


def check_captions(dataset: CaptionedDataset) -> list[str]:
    """All captions; raises `UserError` if there are no two to tell apart."""
    captions = list(dataset.all_captions())
    if len(set(captions)) < 2:
        raise UserError(
            f"All captions of {dataset.name} are the same, so no scorer can be fitted: add "
            "--scorer none --features judge, or more captions."
        )
    return captions


def scorer_for(
    dataset_spec: str,
    dataset: CaptionedDataset,
    data_fingerprint: str,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> CLIPScorer:
    """The scorer of a data set: for `shapes` the package's, for other data a CLIP that is trained
    on it once and kept in `$LINEAGE_CACHE` (or `~/.cache/lineage`), in the folder `scorers`.

    Args:
        dataset_spec: Spec of the data set.
        dataset: Its training split.
        data_fingerprint: Hash of its content.
        steps, seed: Number of steps of training, `STEPS` if None, and its seed.

    Raises:
        UserError: all captions are the same, so there is nothing to tell apart.
    """
    if dataset.name == "shapes:easy":
        return clip_scorer("pretrained:clip", device)
    check_captions(dataset)
    steps = STEPS if steps is None else steps
    count = BATCH_SIZE if dataset.endless else min(BATCH_SIZE, len(dataset))
    settings = {**SETTINGS, "train.batch_size": count}
    inputs = [data_fingerprint, dataset.name, steps, seed, settings]
    folder = cache_folder("scorers") / fingerprint(json.dumps(inputs, sort_keys=True).encode())

    def fit(out: Path) -> CLIPScorer:
        options: dict[str, Any] = {"data": square_spec(dataset_spec), "steps": steps, "seed": seed}
        train("clip", **options, device="cpu", out=out, resume=out.exists(), settings=settings)
        return clip_scorer(out, device)

    if read_cost(folder).get("clip", {}).get("finished"):
        try:
            return clip_scorer(folder, device)
        except UserError:  # a file is damaged
            shutil.rmtree(folder, ignore_errors=True)
    try:
        return fit(folder)
    except CheckFailed:
        raise
    except UserError:  # the folder cannot be written, or another process trains there
        with tempfile.TemporaryDirectory() as temporary:
            return fit(Path(temporary) / "scorer")


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
