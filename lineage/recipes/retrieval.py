"""Recipe `retrieval`: one stage, which remembers pictures and their captions."""

from __future__ import annotations

from dataclasses import dataclass, field

from lineage.config import OptimConfig, RunConfig, TextConfig, TrainConfig
from lineage.retrieval.retrieval import Retrieval, RetrievalConfig
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage, content


@dataclass(frozen=True)
class Config(RunConfig):
    """A run of `retrieval`."""

    model: RetrievalConfig = field(default_factory=RetrievalConfig)


def _preset(name: str, size: int, memory: int) -> Config:
    """The budget is a full memory.

    Nothing is learnt by looking longer. The encoder only counts words.
    """
    return Config(
        key="retrieval",
        preset=name,
        size=size,
        encoder=TextConfig(width=16),
        optim=OptimConfig(average=0.0),
        train=TrainConfig(
            pictures=memory, batch=64, checkpoint_every=0, sample_every=0, log_every=16
        ),
        model=RetrievalConfig(memory=memory),
    )


PRESETS = {
    "smoke": _preset("smoke", 16, 64),
    # As many pictures as fit in 13 MB.
    "tiny": _preset("tiny", 32, 4096),
    # 200 MB: enough to find most pairs of the hard world.
    "small": _preset("small", 64, 16_384),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`index`."""
    return [
        Stage(
            name="index",
            build=lambda made: Retrieval(
                config.model, make_encoder(config.text, config.encoder, tokenizer), config.size
            ),
            optim=config.optim,
            train=config.train,
            settings=content(config),
        )
    ]
