"""Recipe `retrieval`: one stage, `index`, which stores pictures and their captions."""

from __future__ import annotations

from dataclasses import field

from lineage.config import OptimConfig, RunConfig, TextConfig, TrainConfig, configuration
from lineage.retrieval.retrieval import Retrieval, RetrievalConfig
from lineage.text.encoders import EncoderSpec
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


@configuration
class Config(RunConfig):
    """A run of `retrieval`."""

    model: RetrievalConfig = field(default_factory=RetrievalConfig)


def _preset(size: int, memory_size: int) -> Config:
    """One pass that fills the memory: more steps store nothing.

    The encoder only counts words, so that the smallest serves all presets.
    """
    return Config(
        size=size,
        encoder=TextConfig(width=16),
        optim=OptimConfig(ema_decay=0.0),
        train=TrainConfig(
            max_pictures=memory_size,
            batch_size=64,
            checkpoint_every=0,
            sample_every=0,
            log_every=16,
        ),
        model=RetrievalConfig(memory_size=memory_size),
    )


PRESETS = {
    "smoke": _preset(size=16, memory_size=64),
    # As many pictures as fit in 13 MB.
    "tiny": _preset(size=32, memory_size=4096),
    # 200 MB: enough to find most pairs of the hard world.
    "small": _preset(size=64, memory_size=16_384),
}


def stages(config: Config, tokenizer: Tokenizer) -> list[Stage]:
    """`index`."""
    encoder = EncoderSpec(config.text, config.encoder, tokenizer)
    arguments = {"config": config.model, "encoder": encoder, "size": config.size}
    return [Stage("index", retrieval, arguments, optim=config.optim, train=config.train)]


def retrieval(config: RetrievalConfig, encoder: EncoderSpec, size: int) -> Retrieval:
    """An empty memory."""
    return Retrieval(config, encoder.build(), size)
