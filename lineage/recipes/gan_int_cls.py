"""Recipe `gan_int_cls`: text that matches pictures, then generator and discriminator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lineage.cgan.gan_int_cls import GANConfig, GanIntCls
from lineage.config import TextConfig, TrainConfig
from lineage.errors import UserError
from lineage.recipes.joint_text import DCGAN_OPTIM, NAME, JointTextConfig, text_stage, trained_text
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage, content


@dataclass(frozen=True)
class Config(JointTextConfig):
    """A run of `gan_int_cls`.

    Attributes:
        text_share: of the budget, for the text encoder.
    """

    text_share: float = 0.15
    model: GANConfig = field(default_factory=GANConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.text_share < 1:
            raise UserError(f"text_share={self.text_share} must be between 0 and 1.")


_PAPER = DCGAN_OPTIM  # Reed et al. 2016, section 5

PRESETS = {
    # Seconds, for tests: every part is there, at its smallest, the penalty too.
    "smoke": Config(
        key="gan_int_cls",
        preset="smoke",
        same="caption",
        size=16,
        text="char_cnn_rnn",
        encoder=TextConfig(width=16, letters=100, channels=8),
        optim=replace(_PAPER, average=0.9),
        train=TrainConfig(steps=20, batch=8, checkpoint_every=10, sample_every=20, log_every=5),
        model=GANConfig(noise=16, text=16, generator=8, discriminator=8, r1=0.1, r1_every=4),
    ),
    # Minutes on two CPU cores: half the paper's widths, and a high rate, which the gradient penalty
    # makes safe (results/first/trials.md has each alone).
    "tiny": Config(
        key="gan_int_cls",
        preset="tiny",
        same="caption",
        size=32,
        text="char_cnn_rnn",
        encoder=TextConfig(width=128, letters=120, channels=48),
        optim=replace(_PAPER, lr=1.2e-3, decay="linear", average=0.99),
        train=TrainConfig(minutes=5, batch=64, checkpoint_every=500, sample_every=1000),
        model=GANConfig(noise=32, text=64, generator=32, discriminator=32, r1=5.0, r1_every=8),
    ),
    # One GPU of 8 GB, under an hour: the paper's networks at the paper's 64 pixels, and the penalty
    # without which `tiny` collapses.
    "small": Config(
        key="gan_int_cls",
        preset="small",
        same="caption",
        size=64,
        text="char_cnn_rnn",
        encoder=TextConfig(width=512, channels=192),
        optim=replace(_PAPER, decay="linear", average=0.999),
        train=TrainConfig(minutes=55, batch=128, checkpoint_every=1000, sample_every=2000),
        model=GANConfig(r1=5.0, r1_every=8),
    ),
    # Section 5: 64 pixels, batches of 64, 600 epochs of 8,855 birds; the sentence is 1,024 wide.
    "paper": Config(
        key="gan_int_cls",
        preset="paper",
        size=64,
        text="char_cnn_rnn",
        encoder=TextConfig(width=1024),
        optim=_PAPER,
        train=TrainConfig(steps=83_000, batch=64, checkpoint_every=2000, sample_every=5000),
        model=GANConfig(),
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`text`, `gan`."""
    return [
        text_stage(config, tokenizer, config.text_share),
        Stage(
            name="gan",
            build=lambda made: GanIntCls(config.model, trained_text(made), config.size),
            optim=config.optim,
            train=config.train,
            settings=content(config),
            needs=(NAME,),
            share=1 - config.text_share,
        ),
    ]
