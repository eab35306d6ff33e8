"""Every working system with every text encoder: two steps of each stage that reads captions, and
pictures.

A comparison holds the encoder fixed, so each system must take each. Names come from the lists: a
new system, or a new encoder, is tested here without a line.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lineage import runs
from lineage.catalog import working
from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import CaptionedDataset
from lineage.recipes import find_recipe
from lineage.system import System, Trainable
from lineage.text.encoders import ENCODERS
from lineage.text.tokenizer import WordTokenizer
from lineage.threads import use_threads
from lineage.training.loop import Trainer
from lineage.training.stage import Stage

NAMES = [*ENCODERS, "joined:bag+transformer@8", "joined:lstm+t5@6"]
SIZES = {"encoder.num_heads": 2, "encoder.conv_channels": 24}
OPTIM = OptimConfig(warmup=0, decay="none")
TRAIN = TrainConfig(batch_size=6, precision="fp32", prefetch=0)
CAPTIONS = ["a red circle", "a zorp beneath three quuxes", ""]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks of preset smoke are too small for more."""
    with use_threads(1):
        yield


def stages_of(key: str, text: str, tokenizer: WordTokenizer) -> list[Stage]:
    settings = {"text": text, **SIZES}
    config = runs.configure(key, preset_name="smoke", settings=settings)
    torch.manual_seed(1)
    return find_recipe(key).stages(config, tokenizer)


def train(system: Trainable, data: CaptionedDataset) -> bool:
    """Two steps; returns whether the encoder moved."""
    assert system.text is not None
    before = {name: value.clone() for name, value in system.text.state_dict().items()}
    trainer = Trainer(system, data, OPTIM, TRAIN)
    for number in range(2):
        losses = trainer.advance(trainer.loader.at(number))
        assert all(torch.isfinite(value).all() for value in losses.values()), losses
        assert losses or not system.groups()
    return any(not torch.equal(before[n], v) for n, v in system.text.state_dict().items())


@pytest.mark.parametrize("text", NAMES)
@pytest.mark.parametrize("key", working())
def test_every_system_takes_every_encoder(
    key: str, text: str, tokenizer: WordTokenizer, shapes: CaptionedDataset
) -> None:
    """An encoder that no stage trains would stay random. Retrieval alone trains nothing."""
    moved, trainable = False, False
    for stage in stages_of(key, text, tokenizer):
        system = stage.construct()
        # `trains` is false for a stage that only puts earlier ones together
        if system.text is not None and getattr(stage, "trains", True):
            moved |= train(system, shapes)
            trainable |= bool(system.groups())
        system.eval()
    assert moved == trainable
    if isinstance(system, System):
        pictures: Tensor = system.generate(CAPTIONS, seed=3)
        assert pictures.shape == (len(CAPTIONS), 3, system.size, system.size)
        assert pictures.isfinite().all() and pictures.abs().max() <= 1
