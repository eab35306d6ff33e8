"""Recipe `attngan`: a model that matches words and regions, then the generator it teaches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

from lineage.attngan.attngan import AttnGAN, AttnGANConfig
from lineage.attngan.damsm import DAMSM, DAMSMConfig
from lineage.config import OptimConfig, RunConfig, TextConfig, TrainConfig, to_dict
from lineage.errors import UserError
from lineage.recipes.joint_text import DCGAN_OPTIM
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage, content

NAME = "damsm"


@dataclass(frozen=True)
class Config(RunConfig):
    """A run of `attngan`.

    Attributes:
        damsm_share: of the budget, for the matching model.
        damsm: the matching model.
        matching: how it is minimised.
    """

    damsm_share: float = 0.12
    damsm: DAMSMConfig = field(default_factory=DAMSMConfig)
    matching: OptimConfig = field(default_factory=OptimConfig)
    model: AttnGANConfig = field(default_factory=AttnGANConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damsm_share < 1:
            raise UserError(f"damsm_share={self.damsm_share} must be between 0 and 1.")
        self.model.sides(self.size)

    def without_files(self) -> Config:
        return replace(self, damsm=replace(self.damsm, weights=""))


# The authors' code: Adam, rate 0.002, momentum 0.5, gradients clipped at 0.25; its factor of 0.98
# an epoch, down to a tenth, is a line here.
_MATCHING = replace(DCGAN_OPTIM, lr=2e-3, decay="linear", clip=0.25)
# Section 4, and the authors' code: Adam, rate 0.0002, momentum 0.5; the generator's average is
# taken over some thousand steps.
_PAPER = replace(DCGAN_OPTIM, average=0.999)

# Short and steep. What follows `stackgan` is measured there: a penalty on real pictures lets the
# rate be six times as high, and the KL term must not weigh more than it.
_SHORT = OptimConfig(lr=2e-3, warmup=50, average=0.99, weight_decay=0.0)
_TINY = replace(_PAPER, lr=1.2e-3, decay="linear", average=0.99)

PRESETS = {
    # Seconds, for tests: every part is there, at its smallest, the penalty too.
    "smoke": Config(
        key="attngan",
        preset="smoke",
        size=16,
        text="lstm",
        encoder=TextConfig(width=16),
        optim=replace(_TINY, average=0.9),
        train=TrainConfig(steps=30, batch=8, checkpoint_every=10, sample_every=20, log_every=5),
        matching=_SHORT,
        damsm=DAMSMConfig(regions="conv", channels=8, grid=4, same="caption"),
        model=AttnGANConfig(2, 8, 8, 4, 4, 1, damsm=1.0, kl=0.02, r1=0.1, r1_every=4),
    ),
    # Minutes on two CPU cores: 8, 16 and 32 pixels, a quarter of the paper's widths. A class of
    # `shapes` is the first thing's shape and colour, less than its caption says. The DAMSM's weight
    # is a tenth of the paper's: what each weight did is in results/attngan.
    "tiny": Config(
        key="attngan",
        preset="tiny",
        size=32,
        text="lstm",
        encoder=TextConfig(width=128),
        optim=replace(_TINY, lr=2e-3),
        train=TrainConfig(minutes=5, batch=32, checkpoint_every=500, sample_every=1000),
        matching=_SHORT,
        damsm=DAMSMConfig(regions="conv", channels=32, grid=8, same="caption"),
        model=AttnGANConfig(3, 32, 32, 16, 16, 1, damsm=0.5, kl=0.02, r1=1.0, r1_every=8),
    ),
    # One GPU of 8 GB, under an hour: 16, 32 and 64 pixels, the paper's generator.
    "small": Config(
        key="attngan",
        preset="small",
        size=64,
        text="lstm",
        encoder=TextConfig(width=256),
        optim=replace(_TINY, lr=6e-4, average=0.999),
        train=TrainConfig(minutes=55, batch=128, checkpoint_every=1000, sample_every=2000),
        matching=_SHORT,
        damsm=DAMSMConfig(regions="conv", channels=64, grid=8, same="caption"),
        model=AttnGANConfig(3, 100, 100, 32, 32, 2, damsm=5.0, kl=0.02, r1=1.0, r1_every=16),
    ),
    # Section 4 and the authors' configuration for birds: 64, 128 and 256 pixels, batches of 20,
    # 600 epochs of 8,855 birds; captions of up to 18 words, vectors 300 wide and half dropped.
    "paper": Config(
        key="attngan",
        preset="paper",
        size=256,
        text="lstm",
        encoder=TextConfig(vocabulary=5450, words=18, width=256, inputs=300, dropout=0.5),
        optim=_PAPER,
        train=TrainConfig(steps=300_000, batch=20, checkpoint_every=2000, sample_every=5000),
        matching=_MATCHING,
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`damsm`, `gan`."""
    settings = to_dict(config)
    return [
        Stage(
            name=NAME,
            build=lambda made: DAMSM(
                config.damsm, make_encoder(config.text, config.encoder, tokenizer), config.size
            ),
            optim=config.matching,
            train=replace(config.train, sample_every=0),
            settings={name: settings[name] for name in ("text", "encoder", "damsm")},
            share=config.damsm_share,
        ),
        Stage(
            name="gan",
            build=lambda made: AttnGAN(config.model, cast(DAMSM, made[NAME]), config.size),
            optim=config.optim,
            train=config.train,
            settings=content(config),
            needs=(NAME,),
            share=1 - config.damsm_share,
        ),
    ]
