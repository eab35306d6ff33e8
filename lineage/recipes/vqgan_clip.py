"""Recipe `vqgan_clip`: a CLIP and a VQGAN are trained, or taken from other runs; what draws with
them trains nothing.
"""

from __future__ import annotations

from dataclasses import field, replace

from lineage.bounds import DimFromZero, PositiveInt, Share
from lineage.clip.clip import CLIP, CLIPConfig
from lineage.clip.cutouts import Augmentation
from lineage.clip.vqgan_clip import VQGANCLIP, LatentCodec, VQGANCLIPConfig
from lineage.config import OptimConfig, RunConfig, TrainConfig, configuration
from lineage.recipes import clip as clip_recipe
from lineage.recipes import vqgan as codec_recipe
from lineage.recipes.codes_prior import codec_stage
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Assembly, Stage
from lineage.vqvae.vqgan import VQGANConfig


@configuration
class Config(RunConfig):
    """A run of `vqgan_clip`. `text`, `encoder`, `optim` and `train` are those of CLIP.

    Attributes:
        clip: Sizes of CLIP.
        clip_size: Side of CLIP's input in pixels; 0 is `size`.
        codec: Sizes of the codec, and its losses.
        codec_share: Share of the budget that the codec gets.
        codec_optim: Optimiser of the codec.
        codec_batch_size: Number of pictures of a step of the codec.
        model: How a picture is optimised.
    """

    text: str = "clip"
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    clip_size: DimFromZero = 0
    codec: VQGANConfig = field(default_factory=VQGANConfig)
    codec_share: Share = 0.5
    codec_optim: OptimConfig = field(default_factory=OptimConfig)
    codec_batch_size: PositiveInt = 32
    model: VQGANCLIPConfig = field(default_factory=VQGANCLIPConfig)

    def without_files(self) -> Config:
        return replace(super().without_files(), codec=replace(self.codec, lpips=()))


def _preset(name: str, train: TrainConfig, model: VQGANCLIPConfig) -> Config:
    """The CLIP and the codec of the recipes `clip` and `vqgan` at one preset."""
    perceptor, codec = clip_recipe.PRESETS[name], codec_recipe.PRESETS[name]
    return Config(
        size=codec.size,
        encoder=perceptor.encoder,
        optim=perceptor.optim,
        train=train,
        clip=perceptor.model,
        clip_size=0 if perceptor.size == codec.size else perceptor.size,
        codec=codec.codec,
        codec_optim=codec.codec_optim,
        codec_batch_size=codec.codec_batch_size,
        model=model,
    )


WITHOUT_JITTER: tuple[Augmentation, ...] = ("affine", "perspective", "erasing")
_PAPER = _preset("paper", clip_recipe.PRESETS["paper"].train, VQGANCLIPConfig())

PRESETS = {
    # Seconds, for tests: every part is there, at its smallest. The rate is so large that few steps
    # reach other codes.
    "smoke": _preset(
        "smoke",
        clip_recipe.PRESETS["smoke"].train,
        VQGANCLIPConfig(num_steps=4, lr=0.5, cutouts=4),
    ),
    # Minutes on two CPU cores: five for CLIP, as in `clip`, and five for the codec. Captions of
    # `shapes` name colours, and colour jitter turns red to orange; so at `small`.
    "tiny": _preset(
        "tiny",
        replace(clip_recipe.PRESETS["tiny"].train, minutes=10),
        VQGANCLIPConfig(num_steps=100, cutouts=16, augmentations=WITHOUT_JITTER),
    ),
    # One GPU of 8 GB, under an hour.
    "small": _preset(
        "small",
        clip_recipe.PRESETS["small"].train,
        VQGANCLIPConfig(num_steps=200, augmentations=WITHOUT_JITTER),
    ),
    # The public program's defaults: pictures of 512 pixels, ViT-B/32, and the VQGAN of ImageNet
    # with 16,384 codes. Neither was trained at that size: take both from imported weights.
    "paper": replace(
        _PAPER,
        size=512,
        codec=replace(_PAPER.codec, quantiser=replace(_PAPER.codec.quantiser, num_codes=16_384)),
    ),
}


def vqgan_clip(config: VQGANCLIPConfig, clip: CLIP, codec: LatentCodec, size: int) -> VQGANCLIP:
    """The system that draws with a CLIP and a codec."""
    return VQGANCLIP(config, clip, codec, size)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`clip`, `codec`, and what is put together from them."""
    clip = clip_recipe.clip_stage(
        config.clip,
        config.encoder,
        config.clip_size or config.size,
        tokenizer,
        text=config.text,
        optim=config.optim,
        train=config.train,
        share=1 - config.codec_share,
    )
    codec = codec_stage(
        codec_recipe.codec,
        {"config": config.codec, "size": config.size},
        optim=config.codec_optim,
        train=replace(config.train, batch_size=config.codec_batch_size),
        share=config.codec_share,
    )
    arguments = {"config": config.model, "clip": clip, "codec": codec, "size": config.size}
    return [clip, codec, Assembly("drawing", vqgan_clip, arguments, train=config.train)]
