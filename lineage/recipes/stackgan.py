"""Recipe `stackgan`: a text encoder that matches pictures, then stage I, then stage II.

Two recipes can be compared at any preset: `--set recipe=paper`, the losses and learning rates of
the paper, and `--set recipe=modern`, the changes of later work, one switch each; results/stackgan
holds the effect of each switch. The preset `paper` is of the first kind, the others of the second.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Any, Literal

from lineage.bounds import Floats
from lineage.cgan.joint_embedding import JointEmbedding
from lineage.cgan.stackgan import StackGANConfig, StageOne, StageTwo
from lineage.config import TextConfig, TrainConfig, configuration, typed
from lineage.errors import UserError
from lineage.recipes.joint_text import DCGAN_OPTIM, JointTextConfig, text_stage
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage

RecipeName = Literal["paper", "modern"]


@configuration
class Config(JointTextConfig):
    """A run of `stackgan`.

    Attributes:
        recipe: Name of the recipe; setting it sets the switches and learning rates below.
        shares: Shares of the budget for text, stage I and stage II, whose steps take the longest.
        model: Sizes, weights and switches of the GAN.
    """

    recipe: RecipeName = "modern"
    shares: Floats = (0.12, 0.28, 0.6)
    model: StackGANConfig = field(default_factory=StackGANConfig)

    def __post_init__(self) -> None:
        if len(self.shares) != 3 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"shares={self.shares} must be three shares above 0 that sum to 1.")

    def with_recipe(self, name: str) -> Config:
        """The same run with the switches and learning rates of a recipe."""
        name = typed(RecipeName, name, "recipe")
        if name == self.recipe:
            return self
        optim, switches = (_PAPER, _PAPER_SWITCHES) if name == "paper" else (_MODERN, _SWITCHES)
        return replace(self, recipe=name, optim=optim, model=replace(self.model, **switches))


# Zhang et al. 2017, section 4.2: Adam, momentum 0.5, learning rate 0.0002, halved every 100 of 600
# epochs, which is a line to zero here; no average and no clipping.
_PAPER = replace(DCGAN_OPTIM, decay="linear")
_PAPER_SWITCHES: dict[str, Any] = {
    "kl_weight": 2.0,
    "loss": "log",
    "r1_weight": 0.0,
    "norm": "batch",
    "augment": False,
    "disc_condition": "mu",
}

# With the paper's KL weight mu falls to zero within some hundred steps, long before the captions
# show in the pictures; the discriminator, whose condition is mu, then never learns to compare. A
# hundredth of the weight keeps the Gaussians apart. A penalty on real pictures allows a learning
# rate six times as high.
_MODERN = replace(_PAPER, lr=1.2e-3, ema_decay=0.99)
_SWITCHES: dict[str, Any] = {**_PAPER_SWITCHES, "kl_weight": 0.02, "r1_weight": 1.0}

PRESETS = {
    # Seconds, for tests: every part at its smallest, the penalty too.
    "smoke": Config(
        same="caption",
        size=16,
        text="char_cnn_rnn",
        encoder=TextConfig(width=16, max_chars=100, conv_channels=8),
        optim=replace(_MODERN, ema_decay=0.9),
        train=TrainConfig(
            max_steps=30, batch_size=8, checkpoint_every=10, sample_every=20, log_every=5
        ),
        shares=(0.2, 0.4, 0.4),
        model=StackGANConfig(
            stage1_size=8,
            z_dim=8,
            cond_dim=8,
            gen_channels=8,
            disc_channels=4,
            num_res_blocks=1,
            kl_weight=0.02,
            r1_weight=0.1,
            r1_every=4,
        ),
    ),
    # Minutes on two CPU cores: 16 then 32 pixels, an eighth of the paper's widths.
    "tiny": Config(
        same="caption",
        size=32,
        text="char_cnn_rnn",
        encoder=TextConfig(width=128, max_chars=120, conv_channels=48),
        optim=_MODERN,
        train=TrainConfig(minutes=5, batch_size=64, checkpoint_every=500, sample_every=1000),
        model=StackGANConfig(
            stage1_size=16,
            z_dim=32,
            cond_dim=64,
            gen_channels=16,
            disc_channels=32,
            num_res_blocks=2,
            kl_weight=0.02,
            r1_weight=1.0,
            r1_every=8,
        ),
    ),
    # One GPU of 8 GB, under an hour: 32 then 64 pixels, half of the paper's widths.
    "small": Config(
        same="caption",
        size=64,
        text="char_cnn_rnn",
        encoder=TextConfig(width=512, conv_channels=192),
        optim=replace(_MODERN, lr=6e-4, ema_decay=0.999),
        train=TrainConfig(minutes=55, batch_size=128, checkpoint_every=1000, sample_every=2000),
        model=StackGANConfig(
            stage1_size=32,
            gen_channels=64,
            disc_channels=64,
            num_res_blocks=2,
            kl_weight=0.02,
            r1_weight=1.0,
            r1_every=16,
        ),
    ),
    # Section 4.2 and the authors' code: 64 then 256 pixels, batches of 64, 600 epochs of 8,855
    # birds for each stage; the sentence is 1,024 wide.
    "paper": Config(
        size=256,
        text="char_cnn_rnn",
        recipe="paper",
        encoder=TextConfig(width=1024),
        optim=_PAPER,
        train=TrainConfig(
            max_steps=195_000, batch_size=64, checkpoint_every=2000, sample_every=5000
        ),
        model=StackGANConfig(),
    ),
}


def stage_one(text: JointEmbedding, config: StackGANConfig) -> StageOne:
    """The untrained stage I on a trained text encoder."""
    return StageOne(config, text.text)


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`text`, `stage1`, `stage2`."""
    text_share, stage1_share, stage2_share = config.shares
    text = text_stage(config, tokenizer, text_share)
    stage1 = Stage(
        "stage1",
        stage_one,
        {"text": text, "config": config.model},
        optim=config.optim,
        train=config.train,
        share=stage1_share,
    )
    stage2 = Stage(
        "stage2",
        StageTwo,
        {"config": config.model, "stage1": stage1, "size": config.size},
        optim=config.optim,
        train=config.train,
        share=stage2_share,
    )
    return [text, stage1, stage2]
