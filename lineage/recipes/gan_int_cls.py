"""Recipe `gan_int_cls`: a text encoder that matches pictures, then generator and discriminator."""

from __future__ import annotations

from dataclasses import field, replace

from lineage.bounds import Share
from lineage.cgan.gan_int_cls import GANConfig, GanIntCls
from lineage.cgan.joint_embedding import JointEmbedding
from lineage.config import TextConfig, TrainConfig, configuration
from lineage.recipes.joint_text import DCGAN_OPTIM, JointTextConfig, text_stage
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


@configuration
class Config(JointTextConfig):
    """A run of `gan_int_cls`.

    Attributes:
        text_share: Share of the budget for the text encoder.
        model: Sizes and weights of the GAN.
    """

    text_share: Share = 0.15
    model: GANConfig = field(default_factory=GANConfig)


_PAPER = DCGAN_OPTIM  # Reed et al. 2016, section 5

PRESETS = {
    # Seconds, for tests: every part at its smallest, the penalty too.
    "smoke": Config(
        same="caption",
        size=16,
        text="char_cnn_rnn",
        encoder=TextConfig(width=16, max_chars=100, conv_channels=8),
        optim=replace(_PAPER, ema_decay=0.9),
        train=TrainConfig(
            max_steps=20, batch_size=8, checkpoint_every=10, sample_every=20, log_every=5
        ),
        model=GANConfig(
            z_dim=16, text_dim=16, gen_channels=8, disc_channels=8, r1_weight=0.1, r1_every=4
        ),
    ),
    # Minutes on two CPU cores: half the paper's widths, and a high learning rate, which the
    # gradient penalty makes stable.
    "tiny": Config(
        same="caption",
        size=32,
        text="char_cnn_rnn",
        encoder=TextConfig(width=128, max_chars=120, conv_channels=48),
        optim=replace(_PAPER, lr=1.2e-3, decay="linear", ema_decay=0.99),
        train=TrainConfig(minutes=5, batch_size=64, checkpoint_every=500, sample_every=1000),
        model=GANConfig(
            z_dim=32, text_dim=64, gen_channels=32, disc_channels=32, r1_weight=5.0, r1_every=8
        ),
    ),
    # One GPU of 8 GB, under an hour: the paper's networks at the paper's 64 pixels, and the
    # penalty, without which `tiny` collapses.
    "small": Config(
        same="caption",
        size=64,
        text="char_cnn_rnn",
        encoder=TextConfig(width=512, conv_channels=192),
        optim=replace(_PAPER, decay="linear", ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=128, checkpoint_every=1000, sample_every=2000),
        model=GANConfig(r1_weight=5.0, r1_every=8),
    ),
    # Section 5: 64 pixels, batches of 64, 600 epochs of 8,855 birds; the sentence is 1,024 wide.
    "paper": Config(
        size=64,
        text="char_cnn_rnn",
        encoder=TextConfig(width=1024),
        optim=_PAPER,
        train=TrainConfig(
            max_steps=83_000, batch_size=64, checkpoint_every=2000, sample_every=5000
        ),
        model=GANConfig(),
    ),
}


def gan_int_cls(text: JointEmbedding, config: GANConfig, size: int) -> GanIntCls:
    """The untrained GAN on a trained text encoder."""
    return GanIntCls(config, text.text, size)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`text`, `gan`."""
    text = text_stage(config, tokenizer, config.text_share)
    gan = Stage(
        "gan",
        gan_int_cls,
        {"text": text, "config": config.model, "size": config.size},
        optim=config.optim,
        train=config.train,
        share=1 - config.text_share,
    )
    return [text, gan]
