"""Recipe `clipdraw`: a CLIP, which is trained, and the drawing, which trains nothing."""

from __future__ import annotations

from dataclasses import field

from lineage.clip.clip import CLIP, CLIPConfig
from lineage.clip.clipdraw import CLIPDraw, CLIPDrawConfig
from lineage.config import RunConfig, configuration
from lineage.recipes import clip as clip_recipe
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Assembly, Stage


@configuration
class Config(RunConfig):
    """A run of `clipdraw`.

    Attributes:
        clip: The CLIP.
        model: The drawing.
    """

    text: str = "clip"
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    model: CLIPDrawConfig = field(default_factory=CLIPDrawConfig)


def _preset(name: str, model: CLIPDrawConfig) -> Config:
    """Preset `name` with the CLIP of the recipe `clip`, so that a run of that can be taken."""
    clip = clip_recipe.PRESETS[name]
    return Config(
        size=clip.size,
        text=clip.text,
        encoder=clip.encoder,
        optim=clip.optim,
        train=clip.train,
        clip=clip.model,
        model=model,
    )


PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": _preset(
        "smoke", CLIPDrawConfig(num_paths=4, max_segments=2, num_steps=4, num_views=2)
    ),
    # A picture in seconds on two CPU cores. Few strokes, since the canvas is small; each spreads
    # wider, since a twentieth of 32 pixels is nothing. Points move by pixels, and so more slowly;
    # colours faster, since there are fewer steps.
    "tiny": _preset(
        "tiny",
        CLIPDrawConfig(num_paths=16, num_steps=150, point_spread=0.3, points_lr=0.3, color_lr=0.03),
    ),
    # One GPU of 8 GB; between the two in all of these.
    "small": _preset(
        "small",
        CLIPDrawConfig(num_paths=96, num_steps=400, point_spread=0.2, points_lr=0.5, color_lr=0.02),
    ),
    # Frans et al. 2021: 256 strokes, 1,000 steps on a canvas of 224 pixels, with ViT-B/32.
    "paper": _preset("paper", CLIPDrawConfig()),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`clip`, and `drawing`, which trains nothing."""
    first = clip_recipe.clip_stage(
        config.clip,
        config.encoder,
        config.size,
        tokenizer,
        text=config.text,
        optim=config.optim,
        train=config.train,
    )
    arguments = {"clip": first, "config": config.model, "size": config.size}
    return [first, Assembly("drawing", clipdraw, arguments, train=config.train)]


def clipdraw(clip: CLIP, config: CLIPDrawConfig, size: int) -> CLIPDraw:
    """A system that draws with a trained CLIP."""
    return CLIPDraw(config, clip, size)
