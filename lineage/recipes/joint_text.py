"""Shared parts of the recipes `gan_int_cls` and `stackgan`: their optimiser and their first stage,
which trains the text encoder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lineage.cgan.joint_embedding import JointEmbedding
from lineage.config import OptimConfig, RunConfig, configuration
from lineage.text.encoders import EncoderSpec
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage

# Short and steep: the encoder takes each caption a few times only, and is frozen after that.
_TEXT_OPTIM = OptimConfig(lr=1e-3, warmup=50, ema_decay=0.99)

# Radford et al. 2016, section 4: Adam, learning rate 0.0002, momentum 0.5; no average, no clipping
# and no decay.
DCGAN_OPTIM = OptimConfig(
    name="adam",
    lr=2e-4,
    beta1=0.5,
    beta2=0.999,
    weight_decay=0.0,
    warmup=0,
    decay="none",
    grad_clip=0.0,
    ema_decay=0.0,
)


@configuration
class JointTextConfig(RunConfig):
    """A run that begins with a stage of text.

    Attributes:
        same: Pairs of picture and caption that are no rivals in it; see `JointEmbedding`.
    """

    same: Literal["class", "caption"] = "class"


def joint_embedding(encoder: EncoderSpec, size: int, same: str) -> JointEmbedding:
    """The untrained system of the stage `text`."""
    return JointEmbedding(encoder.build(), size, same)


def text_stage(config: JointTextConfig, tokenizer: Tokenizer, share: float) -> Stage:
    """The stage `text`, with `share` of the budget."""
    encoder = EncoderSpec(config.text, config.encoder, tokenizer)
    return Stage(
        "text",
        joint_embedding,
        {"encoder": encoder, "size": config.size, "same": config.same},
        optim=_TEXT_OPTIM,
        optim_setting="",
        train=replace(config.train, sample_every=0),
        share=share,
    )
