"""Recipe `attngan`: a model that matches words and regions, DAMSM, then the GAN that it trains."""

from __future__ import annotations

from dataclasses import field, replace

from lineage.attngan.attngan import AttnGAN, AttnGANConfig
from lineage.attngan.damsm import DAMSM, DAMSMConfig
from lineage.bounds import Share
from lineage.config import OptimConfig, RunConfig, TextConfig, TrainConfig, configuration
from lineage.recipes.joint_text import DCGAN_OPTIM
from lineage.text.encoders import EncoderSpec
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


@configuration
class Config(RunConfig):
    """A run of `attngan`.

    Attributes:
        damsm_share: Share of the budget for the DAMSM.
        damsm: Sizes of the DAMSM.
        damsm_optim: Optimiser of the DAMSM.
        model: Sizes, weights and switches of the GAN.
    """

    damsm_share: Share = 0.12
    damsm: DAMSMConfig = field(default_factory=DAMSMConfig)
    damsm_optim: OptimConfig = field(default_factory=OptimConfig)
    model: AttnGANConfig = field(default_factory=AttnGANConfig)

    def without_files(self) -> Config:
        return replace(super().without_files(), damsm=replace(self.damsm, inception_weights=""))


# The authors' code: Adam, learning rate 0.002, momentum 0.5, gradients clipped at 0.25; its factor
# of 0.98 an epoch, down to a tenth, is a line here.
_DAMSM_OPTIM = replace(DCGAN_OPTIM, lr=2e-3, decay="linear", grad_clip=0.25)
# Section 4, and the authors' code: Adam, learning rate 0.0002, momentum 0.5; the generator's
# average is taken over some thousand steps.
_PAPER = replace(DCGAN_OPTIM, ema_decay=0.999)

# Short and steep. The changes to the GAN are measured in `stackgan`: a penalty on real pictures
# allows a learning rate six times as high, and the KL term must not weigh more than it does here.
_SHORT = OptimConfig(lr=2e-3, warmup=50, ema_decay=0.99, weight_decay=0.0)
_TINY = replace(_PAPER, lr=1.2e-3, decay="linear", ema_decay=0.99)

PRESETS = {
    # Seconds, for tests: every part at its smallest, the penalty too.
    "smoke": Config(
        size=16,
        text="lstm",
        encoder=TextConfig(width=16),
        optim=replace(_TINY, ema_decay=0.9),
        train=TrainConfig(
            max_steps=30, batch_size=8, checkpoint_every=10, sample_every=20, log_every=5
        ),
        damsm_optim=_SHORT,
        damsm=DAMSMConfig(image_encoder="conv", image_channels=8, grid_size=4, same="caption"),
        model=AttnGANConfig(
            num_scales=2,
            z_dim=8,
            cond_dim=8,
            gen_channels=4,
            disc_channels=4,
            num_res_blocks=1,
            damsm_weight=1.0,
            kl_weight=0.02,
            r1_weight=0.1,
            r1_every=4,
        ),
    ),
    # Minutes on two CPU cores: 8, 16 and 32 pixels, a quarter of the paper's widths. A class of
    # `shapes` is the first thing's shape and colour, less than its caption says. The weight of the
    # DAMSM loss is a tenth of the paper's.
    "tiny": Config(
        size=32,
        text="lstm",
        encoder=TextConfig(width=128),
        optim=replace(_TINY, lr=2e-3),
        train=TrainConfig(minutes=5, batch_size=32, checkpoint_every=500, sample_every=1000),
        damsm_optim=_SHORT,
        damsm=DAMSMConfig(image_encoder="conv", image_channels=32, grid_size=8, same="caption"),
        model=AttnGANConfig(
            num_scales=3,
            z_dim=32,
            cond_dim=32,
            gen_channels=16,
            disc_channels=16,
            num_res_blocks=1,
            damsm_weight=0.5,
            kl_weight=0.02,
            r1_weight=1.0,
            r1_every=8,
        ),
    ),
    # One GPU of 8 GB, under an hour: 16, 32 and 64 pixels, the paper's generator.
    "small": Config(
        size=64,
        text="lstm",
        encoder=TextConfig(width=256),
        optim=replace(_TINY, lr=6e-4, ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=128, checkpoint_every=1000, sample_every=2000),
        damsm_optim=_SHORT,
        damsm=DAMSMConfig(image_encoder="conv", image_channels=64, grid_size=8, same="caption"),
        model=AttnGANConfig(
            disc_channels=32, num_res_blocks=2, kl_weight=0.02, r1_weight=1.0, r1_every=16
        ),
    ),
    # Section 4 and the authors' configuration for birds: 64, 128 and 256 pixels, batches of 20,
    # 600 epochs of 8,855 birds; captions of up to 18 words, vectors 300 wide and half dropped.
    "paper": Config(
        size=256,
        text="lstm",
        encoder=TextConfig(vocab_size=5450, max_words=18, width=256, embed_dim=300, dropout=0.5),
        optim=_PAPER,
        train=TrainConfig(
            max_steps=300_000, batch_size=20, checkpoint_every=2000, sample_every=5000
        ),
        damsm_optim=_DAMSM_OPTIM,
    ),
}


def damsm(encoder: EncoderSpec, config: DAMSMConfig, size: int) -> DAMSM:
    """The untrained DAMSM."""
    return DAMSM(config, encoder.build(), size)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`damsm`, `gan`."""
    encoder = EncoderSpec(config.text, config.encoder, tokenizer)
    matching = Stage(
        "damsm",
        damsm,
        {"encoder": encoder, "config": config.damsm, "size": config.size},
        optim=config.damsm_optim,
        optim_setting="damsm_optim",
        train=replace(config.train, sample_every=0),
        share=config.damsm_share,
    )
    gan = Stage(
        "gan",
        AttnGAN,
        {"config": config.model, "damsm": matching, "size": config.size},
        optim=config.optim,
        train=config.train,
        share=1 - config.damsm_share,
    )
    return [matching, gan]
