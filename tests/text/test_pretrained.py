"""Frozen text models of Hugging Face: tiny random ones, compared with the models themselves."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lineage
from lineage import runs
from lineage.config import TextConfig
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset
from lineage.data.tools import export
from lineage.errors import UserError
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.pretrained import PretrainedEncoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.caption_cache import CaptionCache
from lineage.training.store import load_tensors

WIDTH, MAX_WORDS, MAX_POSITIONS = 16, 8, 10
SHORT, LONG = "a red circle", "a small red circle left of a blue ring of a circle"
CAPTIONS = [SHORT, LONG, "", "a zorp"]
LENGTHS = {"clip": [5, 8, 2, 4], "bert": [5, 8, 2, 4], "t5": [4, 8, 1, 3]}
KINDS = tuple(LENGTHS)
VOCABULARY = ["a", "red", "blue", "circle", "ring", "of", "left", "small"]
SPECIAL = {  # start, end and padding
    "clip": ("<start>", "<end>", "<end>"),
    "bert": ("[CLS]", "[SEP]", "[PAD]"),
    "t5": ("", "</s>", "<pad>"),
    "bare": ("", "", "[PAD]"),
}


def token_ids(kind: str) -> dict[str, int]:
    """Token ids of all words; that of the padding is 0."""
    start, end, pad = SPECIAL[kind]
    return {word: k for k, word in enumerate(dict.fromkeys([pad, "?", start, end, *VOCABULARY]))}


def save_tokenizer(kind: str, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    (start, end, pad), known = SPECIAL[kind], token_ids(kind)
    whole = Tokenizer(models.WordLevel(known, unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        whole.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}".strip(),
            special_tokens=[(token, known[token]) for token in (start, end) if token],
        )
    named = {"pad_token": pad, "unk_token": "?", "eos_token": end or None}
    PreTrainedTokenizerFast(tokenizer_object=whole, **named).save_pretrained(folder)


def untrained(kind: str) -> Any:
    """A tiny model with different vectors, and with dropout that would show."""
    import transformers as library

    known, end = token_ids(kind), token_ids(kind).get(SPECIAL[kind][1])
    sizes = {"vocab_size": len(known), "hidden_size": WIDTH, "intermediate_size": 24}
    sizes |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
    }
    if kind == "clip":
        config = library.CLIPTextConfig(
            **sizes, attention_dropout=0.3, pad_token_id=0, bos_token_id=2, eos_token_id=end
        )
        return library.CLIPTextModel(config)
    if kind == "t5":
        config = library.T5Config(
            vocab_size=len(known), d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            dropout_rate=0.3, pad_token_id=0, eos_token_id=end, decoder_start_token_id=0,
        )  # fmt: skip
        return library.T5Model(config)
    return library.BertModel(library.BertConfig(**sizes, hidden_dropout_prob=0.3, pad_token_id=0))


def save(kind: str, folder: Path, model: Any = None) -> Path:
    torch.manual_seed(4)
    model = untrained(kind) if model is None else model
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(kind, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, as `save_pretrained` leaves it."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    parent = tmp_path_factory.mktemp("models")
    return {kind: save(kind, parent / kind) for kind in KINDS}


def make(folder: Path | str, **sizes: Any) -> PretrainedEncoder:
    config = TextConfig(**{"width": WIDTH, "max_words": MAX_WORDS, **sizes})
    encoder = make_encoder(f"pretrained:{folder}", config, WordTokenizer(["a"]))
    assert isinstance(encoder, PretrainedEncoder)
    return encoder


def by_hand(kind: str, caption: str, max_words: int = MAX_WORDS) -> list[int]:
    """Start, words and end, cut so that the end stays; and padding."""
    start, end, _ = SPECIAL[kind]
    known = token_ids(kind)
    ids = [known.get(word, known["?"]) for word in caption.split()]
    ids = ids[: max_words - bool(start) - bool(end)]
    ids = [*([known[start]] if start else []), *ids, *([known[end]] if end else [])]
    return ids + [0] * (max_words - len(ids))


# --- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_caption_has_all_positions(kind: str, folders: dict[str, Path]) -> None:
    """Ids by hand; the mask is True at words, start and end, which come first."""
    encoder = make(folders[kind])
    text = encoder.encode(CAPTIONS)
    assert encoder.word_dim == encoder.sentence_dim == WIDTH
    assert encoder.vocab_size == 0 and not encoder.causal and encoder.padded
    assert text.words.shape == (4, MAX_WORDS, WIDTH) and text.words.dtype == torch.float32
    assert text.sentence.shape == (4, WIDTH) and text.sentence.dtype == torch.float32
    assert text.mask.dtype == torch.bool and text.ids.dtype == torch.int64
    assert text.mask.tolist() == [[k < n for k in range(MAX_WORDS)] for n in LENGTHS[kind]]
    assert text.ids.tolist() == [by_hand(kind, caption) for caption in CAPTIONS]
    assert make(folders[kind]).encode(["red"]).words.shape == (1, MAX_WORDS, WIDTH)


@torch.no_grad()
def test_words_of_clip_are_its_last_hidden_states(folders: dict[str, Path]) -> None:
    """After the last norm, and at the padding too; the sentence is that at the first end token."""
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(folders["clip"]).eval()
    text = make(folders["clip"]).encode(CAPTIONS)
    output = model(input_ids=torch.tensor([by_hand("clip", caption) for caption in CAPTIONS]))
    torch.testing.assert_close(text.words, output.last_hidden_state)
    ends = [length - 1 for length in LENGTHS["clip"]]
    torch.testing.assert_close(text.sentence, text.words[range(4), ends])
    assert text.words[0, 5:].abs().amax(1).min() > 0.1


@torch.no_grad()
def test_words_of_bert_are_its_last_hidden_states(folders: dict[str, Path]) -> None:
    """One caption at a time and without padding; the sentence is their mean."""
    from transformers import BertModel

    model = BertModel.from_pretrained(folders["bert"]).eval()
    text = make(folders["bert"]).encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        length = LENGTHS["bert"][row]
        ids = torch.tensor([by_hand("bert", caption)[:length]])
        alone = model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(text.words[row, :length], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text.sentence[row], alone.mean(0), atol=1e-5, rtol=1e-5)


def encoder_only(whole: Any) -> Any:
    """The same weights as a model without a decoder, as diffusion models ship it."""
    from transformers import T5EncoderModel

    alone = T5EncoderModel(type(whole.config)(**whole.config.to_dict()))
    alone.shared.load_state_dict(whole.shared.state_dict())
    alone.encoder.load_state_dict(whole.encoder.state_dict())
    return alone


@torch.no_grad()
@pytest.mark.parametrize("alone", [False, True], ids=["with a decoder", "encoder alone"])
def test_words_of_t5_are_those_of_its_encoder(alone: bool, tmp_path: Path) -> None:
    """Whether the folder holds a decoder, which is not needed, or not."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = untrained("t5")
    folder = save("t5", tmp_path / "t5", encoder_only(model) if alone else model)
    from transformers import T5EncoderModel

    reference = T5EncoderModel.from_pretrained(folder).eval()
    text = make(folder).encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        length = LENGTHS["t5"][row]
        ids = torch.tensor([by_hand("t5", caption)[:length]])
        expected = reference(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(text.words[row, :length], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text.sentence[row], expected.mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_null_is_the_empty_caption(kind: str, folders: dict[str, Path]) -> None:
    encoder = make(folders[kind])
    null, empty = encoder.null(3), encoder.encode(["", "", ""])
    for part in ("words", "mask", "sentence", "ids"):
        torch.testing.assert_close(getattr(null, part), getattr(empty, part))
    assert len(encoder.null(0)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_the_batch(kind: str, folders: dict[str, Path]) -> None:
    encoder = make(folders[kind])
    together = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        torch.testing.assert_close(alone.words[0], together.words[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.sentence[0], together.sentence[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("caption", CAPTIONS)
def test_every_word_has_a_token(kind: str, caption: str, folders: dict[str, Path]) -> None:
    """Start and end among them; padding has none."""
    encoder = make(folders[kind])
    tokens = encoder.tokens(caption)
    assert len(tokens) == int(encoder.encode([caption]).mask.sum())
    words = {token_id: word for word, token_id in token_ids(kind).items()}
    assert tokens == [words[token_id] for token_id in by_hand(kind, caption)[: len(tokens)]]
    assert encoder.unknown([caption]) == []


@pytest.mark.parametrize(("kind", "rest"), [("clip", 6), ("bert", 6), ("t5", 7)])
def test_tokens_beyond_the_limit_are_the_overflow(
    kind: str, rest: int, folders: dict[str, Path]
) -> None:
    """Start and end take up room as well."""
    encoder = make(folders[kind])
    overflow = encoder.overflow("a " * 8 + "red circle")
    assert overflow == ("8 tokens", " ".join(["a"] * (8 - rest) + ["red", "circle"]))
    assert encoder.overflow("a " * rest) is None and encoder.overflow("") is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_that_is_no_utf8_is_read(kind: str, folders: dict[str, Path]) -> None:
    encoder = make(folders[kind])
    read, plain = encoder.encode(["a \udcff"]), encoder.encode(["a \ufffd"])
    assert torch.equal(read.ids, plain.ids)
    assert encoder.tokens("a \udcff") == encoder.tokens("a \ufffd")
    assert encoder.overflow("a \udcff") is None


@pytest.mark.parametrize("max_words", [3, MAX_WORDS, MAX_POSITIONS])
def test_captions_have_max_words_positions(max_words: int, folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        text = make(folder, max_words=max_words).encode([SHORT, LONG])
        assert text.ids.tolist() == [by_hand(kind, caption, max_words) for caption in (SHORT, LONG)]


# --- frozen, and no part of the weights -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_frozen_and_no_submodule_of_the_encoder(
    kind: str, folders: dict[str, Path]
) -> None:
    """Before and after it is loaded; no dropout in training; no gradient flows."""
    encoder = make(folders[kind])
    for _ in range(2):
        assert not encoder.state_dict() and not list(encoder.parameters())
        assert not list(encoder.children())
        encoder.train()
        one, other = encoder.encode(CAPTIONS), encoder.encode(CAPTIONS)
        assert torch.equal(one.words, other.words) and not one.words.requires_grad
        assert not one.sentence.requires_grad
    _, model = encoder._load()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_the_model_is_loaded_once_and_at_the_first_use(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is built, and its parameters counted, without it."""
    from lineage.text import pretrained

    original, names = pretrained.load_text_model, []
    monkeypatch.setattr(
        pretrained, "load_text_model", lambda name: names.append(name) or original(name)
    )
    encoder = make(folders["clip"])
    assert names == []
    encoder.encode([SHORT]), encoder.null(2), encoder.tokens(SHORT)
    assert names == [str(folders["clip"])]


def test_the_layout_of_diffusers(folders: dict[str, Path], tmp_path: Path) -> None:
    """The model in `text_encoder`, its tokeniser in `tokenizer`, as in Stable Diffusion."""
    for part, names in (("tokenizer", "tokenizer*"), ("text_encoder", "[cm]o*")):
        (tmp_path / part).mkdir()
        for file in folders["clip"].glob(names):
            shutil.copy(file, tmp_path / part)
    assert (tmp_path / "text_encoder" / "model.safetensors").is_file()
    one, other = make(tmp_path).encode(CAPTIONS), make(folders["clip"]).encode(CAPTIONS)
    assert torch.equal(one.words, other.words) and torch.equal(one.ids, other.ids)


# --- unusual tokenisers -----------------------------------------------------------------------


@torch.no_grad()
def test_a_tokeniser_without_start_and_end(tmp_path: Path) -> None:
    """Its empty caption has no token at all; guidance and caption dropout still need features."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    encoder = make(save("bare", tmp_path / "bare"))
    text = encoder.encode([SHORT, ""])
    assert text.words.isfinite().all() and text.sentence.isfinite().all()
    null = encoder.null(2)
    assert null.sentence.isfinite().all()
    assert null.mask.any(1).all()  # attention always has a key


@torch.no_grad()
def test_padding_is_on_the_right_whatever_the_tokeniser_states(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Captions are truncated at the end, so that padding before the words would cut these off."""
    shutil.copytree(folders["bert"], tmp_path / "left")
    path = tmp_path / "left" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    text = make(tmp_path / "left").encode([SHORT, LONG])
    assert text.mask.tolist() == [[k < n for k in range(MAX_WORDS)] for n in (5, 8)]


# --- errors -----------------------------------------------------------------------------------


def error_of(call: Callable[[], Any]) -> str:
    """The one sentence of a `UserError`."""
    with pytest.raises(UserError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 600
    return sentence


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [8, 17, 768])
def test_another_width_raises_a_sentence(kind: str, width: int, folders: dict[str, Path]) -> None:
    """It names the width to set, and the folder."""
    sentence = error_of(lambda: make(folders[kind], width=width).encode([SHORT]))
    assert f"encoder.width={WIDTH}," in sentence and f"not {width}:" in sentence
    assert f"@{WIDTH} in text=joined:" in sentence
    assert str(folders[kind]) in sentence


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_more_words_than_the_model_reads_raise_a_sentence(
    kind: str, folders: dict[str, Path]
) -> None:
    """T5 has no limit: its positions are relative."""
    sentence = error_of(lambda: make(folders[kind], max_words=MAX_POSITIONS + 1).null(1))
    assert f"encoder.max_words={MAX_POSITIONS}" in sentence and str(MAX_POSITIONS + 1) in sentence
    assert make(folders["t5"], max_words=40).encode([LONG]).mask.sum() == 13


def test_a_folder_without_a_model_raises_a_sentence(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Missing, empty, without weights, without a tokeniser, with a broken file."""
    (tmp_path / "empty").mkdir()
    broken: dict[str, Path] = {"missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    for name in ("config.json", "model.safetensors"):
        for change in ("without", "broken"):
            place = broken[f"{change} {name}"] = tmp_path / f"{change}-{name}"
            shutil.copytree(folders["clip"], place)
            (place / name).unlink() if change == "without" else (place / name).write_text("{")
    for what, folder in broken.items():
        sentence = error_of(lambda folder=folder: make(folder).encode([SHORT]))
        assert str(folder) in sentence and "no text model" in sentence, what


def test_a_tokeniser_without_padding_works_or_raises_a_sentence(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """GPT-2's is one."""
    shutil.copytree(folders["bert"], tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    del saved["pad_token"]
    path.write_text(json.dumps(saved))
    sentence = ""
    try:
        text = make(tmp_path / "model").encode([SHORT, LONG])
    except UserError as error:
        sentence = str(error)
    if sentence:
        assert "pad" in sentence and "\n" not in sentence
    else:
        assert text.mask.tolist() == [[k < n for k in range(MAX_WORDS)] for n in (5, 8)]


def test_a_model_without_a_name_raises_a_sentence() -> None:
    assert "name a folder" in error_of(lambda: make(""))


def test_without_transformers_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And pyproject.toml has it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    sentence = error_of(lambda: make(tmp_path).encode([SHORT]))
    assert "pip install 'lineage-t2i[hub]'" in sentence
    project = (Path(lineage.__file__).parents[1] / "pyproject.toml").read_text()
    assert "\nhub = [" in project and "transformers" in project


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of a few pictures."""
    folder = tmp_path_factory.mktemp("data")
    export(load_dataset("shapes", "train", 16), folder, 12)
    return f"imagefolder:{folder}"


@pytest.mark.parametrize("key", ["ddpm", "ldm"])
def test_a_missing_model_raises_before_anything_is_written(
    key: str, data: str, tmp_path: Path
) -> None:
    """Not after the autoencoder's share of the budget."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    out, settings = tmp_path / "run", {"text": f"pretrained:{tmp_path / 'none'}"}
    error_of(
        lambda: runs.train(key, preset="smoke", data=data, out=out, steps=3, settings=settings)
    )
    assert not out.exists()


# --- in systems -------------------------------------------------------------------------------


def settings_for(folder: Path) -> dict[str, Any]:
    return {
        "text": f"pretrained:{folder}",
        "encoder.width": WIDTH,
        "encoder.max_words": MAX_WORDS,
        "train.precision": "fp32",
    }


@pytest.mark.parametrize(("key", "kind"), [("gan_int_cls", "t5"), ("ldm", "clip"), ("dit", "bert")])
def test_families_run_with_it(
    key: str,
    kind: str,
    folders: dict[str, Path],
    train_run: Callable[..., Any],
    data: str,
    tmp_path: Path,
) -> None:
    """Train, save without the model, load, and generate the same pictures."""
    run = train_run(tmp_path / "run", key, settings_for(folders[kind]), steps=6, data=data)
    saved = load_tensors(run.folder / "model.safetensors")
    assert saved and not any(name.startswith("text.") for name in saved)
    system = lineage.load(run.folder)
    captions = [SHORT, "", "a small blue ring"]
    pictures = system.generate(captions, seed=3)
    assert pictures.shape == (3, 3, 16, 16) and pictures.isfinite().all()
    assert torch.equal(pictures, run.system.generate(captions, seed=3))
    assert not torch.equal(*(system.generate(c, seed=3) for c in (SHORT, "a small blue ring")))


def test_a_run_without_its_model_raises_a_sentence(
    folders: dict[str, Path], train_run: Callable[..., Any], data: str, tmp_path: Path
) -> None:
    """The model's weights are no part of the run."""
    shutil.copytree(folders["clip"], tmp_path / "clip")
    settings = settings_for(tmp_path / "clip")
    run = train_run(tmp_path / "run", "ddpm", settings, steps=2, data=data)
    shutil.rmtree(tmp_path / "clip")
    system = lineage.load(run.folder)
    assert str(tmp_path / "clip") in error_of(lambda: system.generate(SHORT))


def same_bits(one: TextFeatures, other: TextFeatures) -> bool:
    names = ("words", "mask", "sentence", "ids")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_the_caption_cache_returns_the_padding_too(
    kind: str, folders: dict[str, Path], shapes: CaptionedDataset
) -> None:
    """The loop caches features of a frozen encoder. A network that attends to the padding, as
    Stable Diffusion does, needs as much of it in training as in sampling."""
    encoder = make(folders[kind])
    cache = CaptionCache(encoder)
    captions = list(dict.fromkeys(shapes.all_captions(12)))[:3]
    for visit in range(2):
        features, expected = cache.encode(captions), encoder.encode(captions)
        for part in ("words", "mask", "sentence", "ids"):
            torch.testing.assert_close(
                getattr(features, part), getattr(expected, part), msg=f"{part} at visit {visit}"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_cached_features_do_not_depend_on_the_batch(kind: str, folders: dict[str, Path]) -> None:
    """Bit for bit; among captions that fill all positions are some that do not."""
    captions = [*CAPTIONS, "a " * 20, "red " * 9, "blue ring", "a small ring of a red ring", "a"]
    alone = {c: CaptionCache(make(folders[kind])).encode([c]) for c in captions}
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        order = torch.randperm(len(captions), generator=generator).tolist()
        cache = CaptionCache(make(folders[kind]))
        for some in (order[: step + 1], order):
            features = cache.encode([captions[i] for i in some])
            assert same_bits(features, TextFeatures.cat([alone[captions[i]] for i in some]))


def test_a_caption_without_padding_is_encoded_with_such(folders: dict[str, Path]) -> None:
    """`transformers` leaves out the mask of a batch without padding."""
    encoder = make(folders["bert"])
    assert encoder.num_words("a " * 20) == encoder.num_words(LONG) != encoder.num_words(SHORT)
    assert encoder.num_words("a " * 5) == encoder.num_words("")  # seven tokens, start and end


@pytest.mark.parametrize("kind", KINDS)
def test_null_is_computed_once(kind: str, folders: dict[str, Path]) -> None:
    """A step of a diffusion model needs it each time. The first is computed as the captions are."""
    encoder, calls = make(folders[kind]), []
    original = encoder.encode
    encoder.encode = lambda captions: calls.append(captions) or original(captions)  # type: ignore[method-assign]
    CaptionCache(encoder).encode(["a ring"])
    before = encoder.null(2)
    before.words.zero_()
    assert not torch.equal(encoder.null(3)[:2].words, before.words)
    assert [chunk[0] for chunk in calls] == ["", "a ring"]


@pytest.mark.parametrize("kind", KINDS)
def test_features_in_a_folder_are_those_of_the_model(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A model that has moved finds its own, and one with other weights or sizes does not."""

    def encoded(folder: Path, **sizes: Any) -> int:
        encoder, calls = make(folder, **sizes), []
        original = encoder.encode
        encoder.encode = lambda captions: calls.extend(captions) or original(captions)  # type: ignore[method-assign]
        cache = CaptionCache(encoder, str(tmp_path / "features"))
        cache.encode([SHORT, LONG]), cache.save()
        return len({caption for caption in calls if caption})

    shutil.copytree(folders[kind], tmp_path / "moved")
    assert encoded(folders[kind]) == 2 and encoded(tmp_path / "moved") == 0
    assert encoded(folders[kind], max_words=7) == 2
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights = {n: w + 1e-3 if "encoder" in n else w for n, w in weights.items()}
    save_file(weights, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    assert encoded(tmp_path / "moved") == 2 and encoded(folders[kind]) == 0


def test_a_network_attends_to_the_same_padding_in_training_and_sampling(
    folders: dict[str, Path], make_system: Callable[..., Any], shapes: CaptionedDataset
) -> None:
    """A network that attends to the padding receives the same words from the loop, early and
    late."""
    settings = {name.replace(".", "__"): v for name, v in settings_for(folders["clip"]).items()}
    system, _ = make_system("ldm", **settings, model__unet__attend_padding=True)
    with torch.no_grad():
        for parameter in system.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    cache = CaptionCache(system.text)
    caption = min(shapes.all_captions(12), key=len)
    x_t, t = torch.randn(1, *system.space.shape), torch.tensor([500])
    assert isinstance(system.network, nn.Module)
    with torch.no_grad():
        expected = system.network(x_t, t, system.text.encode([caption]))
        for _ in range(2):
            predicted = system.network(x_t, t, cache.encode([caption]))
            torch.testing.assert_close(predicted, expected)
