"""What GAN-INT-CLS and StackGAN share: an optimiser, and first a stage of text."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lineage.cgan.joint_embedding import JointEmbedding
from lineage.config import OptimConfig, RunConfig, one_of, to_dict
from lineage.text.contract import TextEncoder
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Made, Stage

NAME = "text"

# Short and steep: the encoder sees each caption a few times only, and is left as it is after that.
_OPTIM = OptimConfig(lr=1e-3, warmup=50, average=0.99)


# Radford et al. 2016, section 4: Adam, rate 0.0002, momentum 0.5; nothing is averaged, clipped or
# decayed.
DCGAN_OPTIM = OptimConfig(
    "adam",
    lr=2e-4,
    beta1=0.5,
    beta2=0.999,
    weight_decay=0.0,
    warmup=0,
    decay="none",
    clip=0.0,
    average=0.0,
)


@dataclass(frozen=True)
class JointTextConfig(RunConfig):
    """A run that begins with a stage of text.

    Attributes:
        same: which pairs are no rivals in it; see `JointEmbedding`.
    """

    same: str = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("same", self.same, ("class", "caption"))


def text_stage(config: JointTextConfig, tokenizer: Tokenizer, share: float) -> Stage:
    """Trains the encoder that `config` names, whichever it is, for `share` of the budget."""
    settings = to_dict(config)
    return Stage(
        name=NAME,
        build=lambda made: JointEmbedding(
            make_encoder(config.text, config.encoder, tokenizer), config.size, config.same
        ),
        optim=_OPTIM,
        train=replace(config.train, sample_every=0),
        settings={name: settings[name] for name in ("text", "encoder", "same")},
        share=share,
    )


def trained_text(made: Made) -> TextEncoder:
    """The finished encoder, which is not trained further."""
    return made[NAME].text.requires_grad_(False)
