"""The stage that GAN-INT-CLS and StackGAN begin with: text that matches pictures."""

from __future__ import annotations

from dataclasses import replace

from lineage.cgan.joint_embedding import JointEmbedding
from lineage.config import OptimConfig, RunConfig, to_dict
from lineage.text.contract import TextEncoder
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import Tokenizer
from lineage.train.stage import Made, Stage

NAME = "text"

# Short and steep: the encoder sees each caption a few times only, and is left as it is after that.
_OPTIM = OptimConfig(lr=1e-3, warmup=50, average=0.99)


def text_stage(config: RunConfig, tokenizer: Tokenizer, share: float) -> Stage:
    """Trains the encoder that `config` names, whichever it is, for `share` of the budget."""
    settings = to_dict(config)
    return Stage(
        name=NAME,
        build=lambda made: JointEmbedding(
            make_encoder(config.text, config.encoder, tokenizer), config.size
        ),
        optim=_OPTIM,
        train=replace(config.train, sample_every=0),
        settings={name: settings[name] for name in ("text", "encoder")},
        share=share,
    )


def trained_text(made: Made) -> TextEncoder:
    """The finished encoder, which is not trained further."""
    return made[NAME].text.requires_grad_(False)
