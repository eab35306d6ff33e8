"""Recipe `clip`: one stage, `clip`, in which both towers learn together."""

from __future__ import annotations

from dataclasses import field, replace

from lineage.clip.clip import CLIP, CLIPConfig
from lineage.clip.image_towers import ViTConfig
from lineage.config import OptimConfig, RunConfig, TextConfig, TrainConfig, configuration
from lineage.text.encoders import EncoderSpec
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


@configuration
class Config(RunConfig):
    """A run of `clip`."""

    text: str = "clip"
    model: CLIPConfig = field(default_factory=CLIPConfig)


PRESETS = {
    # Seconds, for tests: every part is there, at its smallest.
    "smoke": Config(
        size=16,
        encoder=TextConfig(width=16),
        optim=OptimConfig(lr=2e-3, warmup=10),
        train=TrainConfig(
            max_steps=20, batch_size=8, checkpoint_every=10, sample_every=20, log_every=5
        ),
        model=CLIPConfig(
            projection_dim=16, vit=ViTConfig(patch_size=8, width=16, num_layers=2, num_heads=2)
        ),
    ),
    # Minutes on two CPU cores.
    "tiny": Config(
        size=32,
        encoder=TextConfig(width=64, num_layers=2),
        optim=OptimConfig(lr=1.5e-3, beta2=0.98, weight_decay=0.05, ema_decay=0.99),
        train=TrainConfig(minutes=5, batch_size=128, checkpoint_every=500, sample_every=1000),
        model=CLIPConfig(
            projection_dim=64, vit=ViTConfig(patch_size=8, width=64, num_layers=3, num_heads=4)
        ),
    ),
    # One GPU of 8 GB, under an hour.
    "small": Config(
        size=64,
        encoder=TextConfig(tokenizer="bpe", vocab_size=2048, width=256, num_layers=4),
        optim=OptimConfig(lr=5e-4, beta2=0.98, weight_decay=0.2, warmup=500, ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=512, checkpoint_every=1000, sample_every=2000),
        model=CLIPConfig(
            projection_dim=256, vit=ViTConfig(patch_size=8, width=256, num_layers=6, num_heads=4)
        ),
    ),
    # Radford et al. 2021, section 2.5 and tables 18 to 20: ViT-B/32, 400 million pairs, 32 epochs
    # in batches of 32,768; 63 million parameters in the text tower.
    "paper": Config(
        size=224,
        encoder=TextConfig(
            tokenizer="bpe", vocab_size=49_406, max_words=77, width=512, num_layers=12, num_heads=8
        ),
        optim=OptimConfig(
            lr=5e-4, beta2=0.98, weight_decay=0.2, warmup=2000, grad_clip=0.0, ema_decay=0.0
        ),
        train=TrainConfig(
            max_steps=390_625, batch_size=32_768, checkpoint_every=1000, sample_every=2000
        ),
        model=CLIPConfig(spatial_negatives=False, degrade=0.0),
    ),
}


def clip(config: CLIPConfig, encoder: EncoderSpec, size: int) -> CLIP:
    """The untrained model."""
    return CLIP(config, encoder.build(), size)


def clip_stage(
    config: CLIPConfig,
    encoder: TextConfig,
    size: int,
    tokenizer: Tokenizer,
    *,
    optim: OptimConfig,
    train: TrainConfig,
    text: str = "clip",
    optim_setting: str = "optim",
    share: float = 1.0,
) -> Stage:
    """The stage `clip`, for this recipe and those that draw with it.

    Args:
        config: The model.
        encoder: Sizes of the text tower; its sentence becomes as wide as the joint space.
        size: Side of the image tower's input.
        tokenizer: Tokeniser of the run.
        optim, train, optim_setting, share: As for `Stage`.
        text: Name of the text encoder that is the text tower.
    """
    sizes = replace(encoder, projection_dim=config.projection_dim)
    spec = EncoderSpec(text, sizes, tokenizer)
    arguments = {"config": config, "encoder": spec, "size": size}
    return Stage(
        "clip",
        clip,
        arguments,
        optim=optim,
        optim_setting=optim_setting,
        train=train,
        share=share,
    )


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`clip`."""
    return [
        clip_stage(
            config.model,
            config.encoder,
            config.size,
            tokenizer,
            text=config.text,
            optim=config.optim,
            train=config.train,
        )
    ]
