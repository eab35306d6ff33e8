"""Recipe `stackgan`: text that matches pictures, then small pictures, then large ones from those.

Two recipes to compare, at any preset: `--set recipe=paper`, the losses and rates of the paper, and
`--set recipe=modern`, what later work changed, one switch each; results/stackgan holds the effect
of each switch. The preset `paper` is of the first kind, the others of the second.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

from lineage.cgan.stackgan import StackGANConfig, StageOne, StageTwo
from lineage.config import TextConfig, TrainConfig, one_of
from lineage.errors import UserError
from lineage.recipes.joint_text import DCGAN_OPTIM, NAME, JointTextConfig, text_stage, trained_text
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage, content

RECIPES = ("paper", "modern")


@dataclass(frozen=True)
class Config(JointTextConfig):
    """A run of `stackgan`.

    Attributes:
        recipe: which of the two it is; sets the switches and rates below when it is given.
        shares: of the budget, for text, stage I and stage II, whose steps take the longest.
    """

    recipe: str = "modern"
    shares: tuple[float, float, float] = (0.12, 0.28, 0.6)
    model: StackGANConfig = field(default_factory=StackGANConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("recipe", self.recipe, RECIPES)
        if len(self.shares) != 3 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"shares={self.shares} must be three shares above 0 that sum to 1.")

    def with_recipe(self, name: str) -> Config:
        """The same run with the switches and rates of a recipe."""
        one_of("recipe", name, RECIPES)
        if name == self.recipe:
            return self
        optim, switches = (_PAPER, _PAPER_SWITCHES) if name == "paper" else (_MODERN, _SWITCHES)
        model = replace(self.model, **switches)  # type: ignore[arg-type]
        return replace(self, recipe=name, optim=optim, model=model)


# Zhang et al. 2017, section 4.2: Adam, momentum 0.5, rate 0.0002, halved every 100 of 600 epochs,
# for which a line to zero stands; nothing is averaged or clipped.
_PAPER = replace(DCGAN_OPTIM, decay="linear")
_PAPER_SWITCHES = {
    "kl": 2.0,
    "loss": "log",
    "r1": 0.0,
    "norm": "batch",
    "augment": False,
    "reads": "mu",
}

# With the paper's KL weight mu falls to zero within some hundred steps, long before pictures are
# worth a caption; the discriminator, which is told mu, then never learns to read. A hundredth of it
# keeps the Gaussians apart. A penalty on real pictures lets the rate be six times as high.
_MODERN = replace(_PAPER, lr=1.2e-3, average=0.99)
_SWITCHES = {**_PAPER_SWITCHES, "kl": 0.02, "r1": 1.0}

_PAPER_MODEL = StackGANConfig()

PRESETS = {
    # Seconds, for tests: every part is there, at its smallest, the penalty too.
    "smoke": Config(
        key="stackgan",
        preset="smoke",
        same="caption",
        size=16,
        text="char_cnn_rnn",
        encoder=TextConfig(width=16, letters=100, channels=8),
        optim=replace(_MODERN, average=0.9),
        train=TrainConfig(steps=30, batch=8, checkpoint_every=10, sample_every=20, log_every=5),
        shares=(0.2, 0.4, 0.4),
        model=StackGANConfig(8, 8, 8, 8, 4, 1, kl=0.02, r1=0.1, r1_every=4),
    ),
    # Minutes on two CPU cores: 16 then 32 pixels, an eighth of the paper's widths.
    "tiny": Config(
        key="stackgan",
        preset="tiny",
        same="caption",
        size=32,
        text="char_cnn_rnn",
        encoder=TextConfig(width=128, letters=120, channels=48),
        optim=_MODERN,
        train=TrainConfig(minutes=5, batch=64, checkpoint_every=500, sample_every=1000),
        model=StackGANConfig(16, 32, 64, 16, 32, 2, kl=0.02, r1=1.0, r1_every=8),
    ),
    # One GPU of 8 GB, under an hour: 32 then 64 pixels, half of the paper's widths.
    "small": Config(
        key="stackgan",
        preset="small",
        same="caption",
        size=64,
        text="char_cnn_rnn",
        encoder=TextConfig(width=512, channels=192),
        optim=replace(_MODERN, lr=6e-4, average=0.999),
        train=TrainConfig(minutes=55, batch=128, checkpoint_every=1000, sample_every=2000),
        model=StackGANConfig(32, 100, 128, 64, 64, 2, kl=0.02, r1=1.0, r1_every=16),
    ),
    # Section 4.2 and the authors' code: 64 then 256 pixels, batches of 64, 600 epochs of 8,855
    # birds for each stage; the sentence is 1,024 wide.
    "paper": Config(
        key="stackgan",
        preset="paper",
        size=256,
        text="char_cnn_rnn",
        recipe="paper",
        encoder=TextConfig(width=1024),
        optim=_PAPER,
        train=TrainConfig(steps=195_000, batch=64, checkpoint_every=2000, sample_every=5000),
        model=_PAPER_MODEL,
    ),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`text`, `stage1`, `stage2`."""
    text, first, second = config.shares
    settings = content(config)
    return [
        text_stage(config, tokenizer, text),
        Stage(
            name="stage1",
            build=lambda made: StageOne(config.model, trained_text(made)),
            optim=config.optim,
            train=config.train,
            settings=settings,
            needs=(NAME,),
            share=first,
        ),
        Stage(
            name="stage2",
            build=lambda made: StageTwo(config.model, cast(StageOne, made["stage1"]), config.size),
            optim=config.optim,
            train=config.train,
            settings=settings,
            needs=("stage1",),
            share=second,
        ),
    ]
