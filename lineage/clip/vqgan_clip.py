"""`vqgan_clip`: VQGAN+CLIP (Crowson et al. 2022, arXiv:2204.08583; in use since spring 2021).

The problem: in 2021 nobody outside a few companies could train a model that draws any caption. What
is new: nothing is trained. A frozen VQGAN can draw, a frozen CLIP can compare a picture with a
caption, and the latents of one picture are optimised until CLIP is content.

    picture        x = decode(VQ(z)), VQ with a straight-through gradient   `VQGANCLIP.synthesise`
    cutouts        N random views of x, in CLIP's size                      `cutouts.py`
    loss           sum over prompts p of |w_p| mean over cutouts of sign(w_p) distance, where
                   distance is half the squared angle between CLIP's features
                                                                            `prompts.py`
    regulariser    weight / (4 i + 2) * mean(z^2) at step i                 `VQGANCLIP.step`
    update         a step of Adam on z; then each channel of z is clamped to the range that the
                   codebook has in it                                       `VQGANCLIP.step`

A caption may hold several prompts with weights, `a castle:2 | in fog | people:-0.5`; pictures may
be prompts too (`reference`), and so may random features (`noise_seeds`).

Departures. A picture's start comes from its seed, as all its draws do; the public program draws it
before it sets the seed. One run draws one picture of each caption: there are no stories of several
captions in turn. A picture that is a prompt has the size of the drawing.

Axes: B pictures, N cutouts, P prompts of all pictures, F width of CLIP's features, K codes, D width
of a code, H W grid of codes, S side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.bounds import (
    Dim,
    Float,
    Floats,
    IntsFromZero,
    Listed,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from lineage.clip.clip import CLIP
from lineage.clip.cutouts import (
    Augmentation,
    clamp_with_grad,
    draw_crops,
    latest_cutouts,
    original_cutouts,
)
from lineage.clip.guided import CLIPGuided
from lineage.clip.prompts import (
    PromptFeatures,
    noise_prompt,
    prompt_losses,
    split_prompts,
)
from lineage.config import configuration
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.nn.vqgan_losses import psnr
from lineage.system import LabelledImage, System

Optimiser = Literal["adam", "adamw", "adamax", "adagrad", "rmsprop"]
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
"""With PyTorch's defaults for all but the rate, as in the public code: AdamW decays z by 0.01."""
MAX_CUTOUT_VALUES = 2**20
"""Largest number of pixel values of the cutouts of a step; they need most of the memory."""
NUM_FRAMES = 8
"""Number of pictures in a row of the film."""


@configuration
class VQGANCLIPConfig:
    """How a picture is optimised; the defaults are those of the public program.

    Attributes:
        num_steps: Number of steps.
        lr: Learning rate of z.
        optimiser: Kind of optimiser.
        method: Kind of cutouts: `latest` or `original`.
        cutouts: N, number of cutouts of each step.
        cut_pow: Power of the uniform number that sets a crop's side; above 1, crops are smaller.
        augmentations: Augmentations of the cutouts of `latest`.
        init: How z starts: from random `codes`, or from a random colour `gradient` picture.
        init_weight: Weight of the pull of z towards 0; it fades with the steps.
        noise_seeds: Seeds of noise prompts.
        noise_weights: Weights of the noise prompts, as many as there are seeds.
    """

    num_steps: PositiveInt = 500
    lr: PositiveFloat = 0.1
    optimiser: Optimiser = "adam"
    method: Literal["latest", "original"] = "latest"
    cutouts: Dim = 32
    cut_pow: PositiveFloat = 1.0
    augmentations: Annotated[tuple[Augmentation, ...], Listed] = get_args(Augmentation)
    init: Literal["codes", "gradient"] = "codes"
    init_weight: NonNegativeFloat = 0.0
    noise_seeds: IntsFromZero = ()
    noise_weights: Floats = ()

    def __post_init__(self) -> None:
        if len(self.noise_seeds) != len(self.noise_weights):
            raise UserError(
                f"model.noise_seeds={self.noise_seeds} and model.noise_weights="
                f"{self.noise_weights} must have as many entries."
            )


# --- latents --------------------------------------------------------------------------------------


@runtime_checkable
class LatentCodec(Protocol):
    """A codec whose codes are vectors, as `vqgan` and `vqvae` have.

    Attributes:
        factor: Number of pixels on a side of one grid cell.
    """

    factor: int

    @property
    def codebook(self) -> Tensor:
        """(K, D) the code vectors."""

    def encode_latents(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> vectors (B, H, W, D) before quantisation."""

    def decode_latents(self, z_q: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, 3, S, S), about [-1, 1]."""


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """(..., D) and (K, D) -> (...) int64, the code at the smallest distance."""
    distance = z.square().sum(-1, keepdim=True) - 2 * z @ codebook.T + codebook.square().sum(1)
    return distance.argmin(-1)


def vector_quantise(z: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codes (..., D) of vectors (..., D); the gradient passes unchanged."""
    z_q = F.embedding(nearest_codes(z.detach(), codebook), codebook)
    return z + (z_q - z).detach()


def gradient_picture(draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: red grows from left to right, green and blue from top to bottom.

    Args:
        draws: Four bytes: where blue starts, and where red, green and blue end.
    """
    blue_start, *stops = draws.tolist()
    red = np.broadcast_to(np.linspace(0, stops[0], width), (height, width))
    green, blue = (
        np.broadcast_to(np.linspace(start, stop, height)[:, None], (height, width))
        for start, stop in ((0, stops[1]), (blue_start, stops[2]))
    )
    return np.stack([red, green, blue], -1).astype(np.uint8)


# --- the system -----------------------------------------------------------------------------------

Cut = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] -> cutouts (B, N, 3, S, S)."""


@dataclass(frozen=True)
class Step:
    """One step of the optimisation.

    Attributes:
        image: (B, 3, S, S) in [0, 1] at the start of the step.
        cutouts: (B, N, 3, S, S) of that picture.
        init_loss: (B,) pull towards 0.
        prompt_losses: (P,).
        grad: (B, H, W, D) gradient of the sum with respect to z.
        z: (B, H, W, D) after the step.
    """

    image: Tensor
    cutouts: Tensor
    init_loss: Tensor
    prompt_losses: Tensor
    grad: Tensor
    z: Tensor


class VQGANCLIP(CLIPGuided):
    """A frozen CLIP and a frozen codec.

    Args:
        config: Defaults of the optimisation.
        clip: Gives features of cutouts and prompts.
        codec: Decodes latents to pictures.
        size: S, side of the pictures in pixels, a multiple of `codec.factor`.
    """

    def __init__(self, config: VQGANCLIPConfig, clip: CLIP, codec: LatentCodec, size: int) -> None:
        super().__init__(clip, size)
        if size % codec.factor:
            raise UserError(
                f"size={size} must be a multiple of {codec.factor}, the side in pixels of one code."
            )
        assert isinstance(codec, nn.Module)
        self.config, self.codec = config, codec.requires_grad_(False)
        self.grid_size = size // codec.factor
        max_pictures = MAX_CUTOUT_VALUES // (3 * clip.size**2 * config.cutouts)
        self.sample_batch_size = max(1, min(System.sample_batch_size, max_pictures))

    # --- sampling -------------------------------------------------------------------------------

    def sample(
        self,
        captions: list[str],
        noise: NoiseStreams,
        steps: PositiveInt | None = None,
        cutouts: Dim | None = None,
        lr: PositiveFloat | None = None,
        negative: str = "",
        image: Tensor | None = None,
        reference: Tensor | None = None,
        reference_weight: Float = 1.0,
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions. Options that are None are those of the configuration.

        Args:
            steps: Number of steps.
            cutouts: Number of cutouts of each step.
            lr: Learning rate of the latents.
            negative: Caption that is moved away from, with weights below 0 in place of its own.
            image: Pictures to start from.
            reference: Pictures that the drawing should resemble, as prompts beside the caption.
            reference_weight: Weight of the prompt of `reference`; below 0 moves away from it.
        """
        z = self.initial_latents(noise, image)
        cut = self.cutter(noise, cutouts)
        prompts = self.encode_prompts(captions, negative, cut, reference, reference_weight)
        for step in self.optimise(z, prompts, cut, steps, lr):
            z = step.z
        return 2 * self.synthesise(z) - 1

    def texts(self, captions: list[str]) -> list[str]:
        """The texts of all prompts, without their weights."""
        return [prompt.text for caption in captions for prompt in split_prompts(caption)]

    def idle_options(self, captions: list[str], options: Mapping[str, Any]) -> dict[str, str]:
        if "reference" in options or options.get("reference_weight", 1.0) == 1.0:
            return {}
        return {"reference_weight": "there is no reference picture"}

    def initial_latents(self, noise: NoiseStreams, image: Tensor | None = None) -> Tensor:
        """z of the first step, (B, H, W, D): the codes of `image`, of a gradient, or random."""
        codebook, size = self.codec.codebook, self.size
        if image is None and self.config.init == "codes":
            grid = (self.grid_size, self.grid_size)
            return F.embedding(noise.randint(len(codebook), *grid), codebook)
        if image is None:
            low, high = np.array([0, 1, 2, 3]), np.array([255, 255, 255, 128])
            draws = low + np.floor(noise.rand(4).cpu().double().numpy() * (high - low))
            pictures = np.stack([gradient_picture(row, size, size) for row in draws])
            image = torch.from_numpy(pictures).to(codebook).permute(0, 3, 1, 2) / 127.5 - 1
        return vector_quantise(self.codec.encode_latents(image), codebook)

    def cutter(self, noise: NoiseStreams, count: int | None = None) -> Cut:
        """The function that takes `count` cutouts, other ones at each call."""
        config, side = self.config, self.clip.size
        count = config.cutouts if count is None else count

        def cut(image: Tensor) -> Tensor:
            if config.method == "latest":
                return latest_cutouts(image, noise, count, side, config.augmentations)
            height, width = image.shape[2:]
            crops = draw_crops(noise, count, height, width, side, config.cut_pow)
            return original_cutouts(image, crops, side)

        return cut

    def encode_prompts(
        self,
        captions: list[str],
        negative: str = "",
        cut: Cut | None = None,
        reference: Tensor | None = None,
        reference_weight: float = 1.0,
    ) -> PromptFeatures:
        """Features of all prompts: those of each caption, of `negative`, of noise, of pictures."""
        negatives = (
            [p._replace(weight=-p.weight) for p in split_prompts(negative)] if negative else []
        )
        texts = [(row, p) for row, caption in enumerate(captions) for p in split_prompts(caption)]
        texts += [(row, p) for row in range(len(captions)) for p in negatives]
        features = [self.clip.encode_text([prompt.text for _, prompt in texts])]
        rows = [row for row, _ in texts]
        weights, stops = [p.weight for _, p in texts], [p.stop for _, p in texts]
        for seed, weight in zip(self.config.noise_seeds, self.config.noise_weights, strict=True):
            random = noise_prompt(seed, self.clip.embed_dim).to(features[0])
            features.append(random.expand(len(captions), -1))
            rows += range(len(captions))
            weights += [weight] * len(captions)
        if reference is not None and cut is not None:
            views = self.encode_cutouts(cut((reference + 1) / 2))  # (B, N, F), a prompt each
            features.append(views.flatten(0, 1))
            rows += [row for row in range(len(captions)) for _ in views[row]]
            weights += [reference_weight / views.shape[1]] * (len(rows) - len(weights))
        stops += [-torch.inf] * (len(rows) - len(stops))
        joined = torch.cat(features).float()
        numbers = (torch.tensor(values, device=joined.device) for values in (weights, stops, rows))
        return PromptFeatures(joined, *numbers)

    # --- optimisation ---------------------------------------------------------------------------

    def synthesise(self, z: Tensor) -> Tensor:
        """z (B, H, W, D) -> pictures (B, 3, S, S) in [0, 1], with gradient."""
        decoded = self.codec.decode_latents(vector_quantise(z, self.codec.codebook))
        return clamp_with_grad((decoded.float() + 1) / 2)

    def encode_cutouts(self, cutouts: Tensor) -> Tensor:
        """Cutouts (B, N, 3, S, S) in [0, 1] -> CLIP's features (B, N, F), not normalised."""
        features = self.clip.encode_image(2 * cutouts.flatten(0, 1) - 1)
        return features.float().unflatten(0, cutouts.shape[:2])

    def optimise(
        self,
        z: Tensor,
        prompts: PromptFeatures,
        cut: Cut,
        steps: int | None = None,
        lr: float | None = None,
    ) -> Iterator[Step]:
        """The steps of the optimisation, from latents z (B, H, W, D), which are not changed.

        Pictures do not influence each other: the loss is a sum over pictures, each z has its own
        gradient, and the optimiser treats every entry alone.
        """
        config, codebook = self.config, self.codec.codebook
        low, high = codebook.amin(0), codebook.amax(0)  # (D,)
        z = z.clone().requires_grad_()
        optimiser = OPTIMISERS[config.optimiser]([z], lr=lr or config.lr)
        for i in range(steps or config.num_steps):
            with torch.enable_grad():
                image = self.synthesise(z)
                cutouts = cut(image)
                losses = prompt_losses(self.encode_cutouts(cutouts), prompts)  # (P,)
                pull = config.init_weight / (4 * i + 2)
                init_loss = pull * z.square().flatten(1).mean(1)  # (B,)
                (z.grad,) = torch.autograd.grad(losses.sum() + init_loss.sum(), z)
            optimiser.step()
            with torch.no_grad():
                z.copy_(torch.maximum(torch.minimum(z, high), low))
            yield Step(
                image.detach(),
                cutouts.detach(),
                init_loss.detach(),
                losses.detach(),
                z.grad.clone(),
                z.detach().clone(),
            )

    # --- what it shows --------------------------------------------------------------------------

    def visualise(self, caption: str, *, seed: int = 0) -> list[list[LabelledImage]]:
        """A film of the optimisation, and cutouts of its last step."""
        noise, steps = NoiseStreams.for_pictures(seed, 1, self.device), self.config.num_steps
        frame_steps = set(np.linspace(0, steps - 1, NUM_FRAMES - 1).round().astype(int).tolist())
        film = []
        with self.inference():
            z, cut = self.initial_latents(noise), self.cutter(noise)
            for i, step in enumerate(self.optimise(z, self.encode_prompts([caption]), cut)):
                z = step.z
                if i in frame_steps:
                    loss = float(step.prompt_losses.sum())
                    film.append(LabelledImage(f"step {i}, loss {loss:.3f}", 2 * step.image[0] - 1))
            film.append(LabelledImage(f"step {steps}", 2 * self.synthesise(z)[0] - 1))
        last = (2 * step.cutouts[0, :NUM_FRAMES] - 1).clamp(-1, 1)
        return [film, [LabelledImage(f"cutout {n + 1}", view) for n, view in enumerate(last)]]

    def reconstruct(self, images: Tensor) -> Tensor:
        """The codec's reconstructions of pictures (B, 3, S, S) in [-1, 1]."""
        return 2 * self.synthesise(self.codec.encode_latents(images)) - 1

    def stage_scores(self, batch: Batch) -> dict[str, Tensor]:
        """Per-image metrics of codec and CLIP, (B,) each.

        Returns:
            `psnr` of the codec's reconstruction in dB; `cosine` of CLIP's features of the picture
            and its caption.
        """
        image = batch.image
        mse = (self.reconstruct(image) - image).square().flatten(1).mean(1)
        features = self.clip.encode_image(image), self.clip.encode_text(batch.caption)
        return {"psnr": psnr(mse), "cosine": F.cosine_similarity(*features)}
