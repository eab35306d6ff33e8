"""`joined:` encoders: the words and sentences of several encoders, put together by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lineage
from lineage.config import TextConfig
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError
from lineage.text import pretrained
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.joined import JoinedEncoder, split_names
from lineage.text.tokenizer import make_tokenizer
from lineage.training.caption_cache import CaptionCache

WIDTH, MAX_WORDS = 12, 10
SHORT = "a red circle"
LONG = "two small yellow stars to the left of a large purple ring"
CAPTIONS = [SHORT, LONG, "", "a zorp circle"]
PARTS = ("words", "mask", "sentence", "ids")
JOINS = ("channels", "sequence")
NAMES = (
    "joined:bag+lstm@8",
    "joined:lstm@8+bag",
    "joined:transformer+char_cnn_rnn@20+bag@6",
    "joined:glide+bag@4",
    "joined:lstm@4+bert@8+char_cnn_rnn",
    "joined:bag",
)


def make(name: str, join: str, **sizes: Any) -> JoinedEncoder:
    torch.manual_seed(0)
    defaults = {"width": WIDTH, "max_words": MAX_WORDS, "num_heads": 2, "conv_channels": 12}
    config = TextConfig(**{**defaults, "join": join, **sizes})
    encoder = make_encoder(name, config, make_tokenizer("word", [SHORT, LONG], 300))
    assert isinstance(encoder, JoinedEncoder)
    with torch.no_grad():  # trained weights are larger than initial ones
        for parameter in encoder.parameters():
            parameter.mul_(2.0)
    return encoder.eval()


def parts_of(encoder: JoinedEncoder, captions: list[str]) -> list[TextFeatures]:
    return [part.encode(captions) for part in encoder.encoders]  # type: ignore[operator]


@pytest.fixture(params=JOINS)
def join(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- words and sentence -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_channels_by_hand(name: str) -> None:
    """Word l is the vectors of word l one after the other; zeros where an encoder is shorter."""
    encoder = make(name, "channels")
    text, parts = encoder.encode(CAPTIONS), parts_of(encoder, CAPTIONS)
    assert encoder.word_dim == sum(part.words.shape[2] for part in parts)
    assert text.words.shape[1] == max(part.words.shape[1] for part in parts)
    for row in range(len(CAPTIONS)):
        for place in range(text.words.shape[1]):
            vectors, ids = [], []
            for part in parts:
                inside = place < part.words.shape[1]
                width = part.words.shape[2]
                vectors.append(part.words[row, place] if inside else torch.zeros(width))
                if inside and part.mask[row, place]:
                    ids.append(int(part.ids[row, place]))
            assert torch.equal(text.words[row, place], torch.cat(vectors))
            assert bool(text.mask[row, place]) == bool(ids)
            assert int(text.ids[row, place]) == (ids[0] if ids else 0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sequence_by_hand(name: str) -> None:
    """Words of the first encoder, of the second, ...; then the padding of each in the same order.
    Narrower vectors end with zeros."""
    encoder = make(name, "sequence")
    text, parts = encoder.encode(CAPTIONS), parts_of(encoder, CAPTIONS)
    width = max(part.words.shape[2] for part in parts)
    assert encoder.word_dim == width == text.words.shape[2]
    for row in range(len(CAPTIONS)):
        words: list[tuple[Tensor, int]] = []
        padding: list[tuple[Tensor, int]] = []
        for part in parts:
            for place in range(part.words.shape[1]):
                vector = torch.zeros(width)
                vector[: part.words.shape[2]] = part.words[row, place]
                target = words if part.mask[row, place] else padding
                target.append((vector, int(part.ids[row, place])))
        vectors = torch.stack([vector for vector, _ in words + padding])
        length = len(vectors)
        assert torch.equal(text.words[row, : len(words)], vectors[: len(words)])
        assert text.mask[row].tolist() == [i < len(words) for i in range(text.mask.shape[1])]
        assert text.ids[row, : len(words)].tolist() == [token for _, token in words]
        assert not text.ids[row, len(words) :].any()
        if encoder.padded:  # the padding counts too, and may have been extended by zeros
            rest = text.words[row, len(words) :]
            nonzero = rest[rest.abs().amax(1) > 0]
            expected = vectors[len(words) : length]
            assert torch.equal(nonzero, expected[expected.abs().amax(1) > 0])


@pytest.mark.parametrize("name", NAMES)
def test_the_sentence_is_all_sentences_one_after_the_other(name: str, join: str) -> None:
    encoder = make(name, join)
    text, parts = encoder.encode(CAPTIONS), parts_of(encoder, CAPTIONS)
    assert torch.equal(text.sentence, torch.cat([part.sentence for part in parts], dim=1))
    assert encoder.sentence_dim == text.sentence.shape[1]


# --- the contract -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_one_run_of_true(name: str, join: str) -> None:
    """Whoever truncates features by the number of their words must not lose one."""
    text = make(name, join).encode(CAPTIONS)
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in text.mask)
    assert (text.ids[~text.mask] == 0).all() and (text.ids[text.mask] != 0).all()
    assert text.words.shape[:2] == text.mask.shape == text.ids.shape


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_do_not_depend_on_the_batch(name: str, join: str) -> None:
    encoder = make(name, join)
    together = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        count = int(alone.mask.sum())
        assert count == int(together.mask[row].sum())
        for part in ("words", "ids"):
            torch.testing.assert_close(
                getattr(alone, part)[0, :count], getattr(together, part)[row, :count]
            )
        torch.testing.assert_close(alone.sentence[0], together.sentence[row])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_null_is_the_empty_caption(name: str, join: str) -> None:
    encoder = make(name, join)
    null, empty = encoder.null(2), encoder.encode(["", " "])
    for part in PARTS:
        torch.testing.assert_close(getattr(null, part), getattr(empty, part))
    assert null.mask.any(1).all()


@pytest.mark.parametrize("captions", [CAPTIONS, ["ring"], ["", ""]], ids=str)
@pytest.mark.parametrize("name", ["joined:glide+bag@4", "joined:bag+bert@8"])
def test_with_a_padded_encoder_all_captions_have_one_length(
    name: str, join: str, captions: list[str]
) -> None:
    encoder = make(name, join)
    length = MAX_WORDS if join == "channels" else 2 * MAX_WORDS
    assert encoder.padded
    assert encoder.encode(captions).words.shape == (len(captions), length, encoder.word_dim)


@pytest.mark.parametrize(
    ("name", "vocabulary", "causal"),
    [
        ("joined:bag+transformer", True, True),
        ("joined:bag+lstm", True, False),
        ("joined:lstm+bag", True, False),
        ("joined:bag+char_cnn_rnn", False, False),
        ("joined:char_cnn_rnn+bag", False, False),
    ],
)
def test_vocabulary_and_causality(name: str, vocabulary: bool, causal: bool, join: str) -> None:
    """A vocabulary that all share is theirs; in `sequence` the caption is there twice, so that its
    words are not to be predicted."""
    encoder = make(name, join)
    tokenizer = make_tokenizer("word", [SHORT, LONG], 300)
    assert encoder.vocab_size == (len(tokenizer) if vocabulary else 0)
    assert encoder.causal is (causal and join == "channels")
    assert not encoder.padded


def test_encoders_of_two_vocabularies_have_none_together(join: Any) -> None:
    """An id would be of either."""
    config = TextConfig(width=WIDTH, join=join)
    tokenizers = [make_tokenizer("word", [caption], 300) for caption in (SHORT, LONG)]
    encoders = [make_encoder("bag", config, tokenizer) for tokenizer in tokenizers]
    assert len({encoder.vocab_size for encoder in encoders}) == 2
    assert JoinedEncoder(encoders, config).vocab_size == 0


def test_tokens_by_hand() -> None:
    """One label for each word: of all encoders in turn, or the different ones of one place."""
    both = "joined:bag+lstm+char_cnn_rnn"
    assert make(both, "channels").tokens("Two zorp stars of old") == [
        "two/two zorp stars of",
        "<unk>/old",
        "stars",
        "of",
        "<unk>",
    ]
    words = ["two", "<unk>"]
    assert make(both, "sequence").tokens("two zorp") == [*words, *words, "two zorp"]
    assert make("joined:bag+lstm", "channels").tokens("") == ["<null>"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("caption", [*CAPTIONS, LONG + " red" * 50])
def test_every_word_has_a_token(name: str, join: str, caption: str) -> None:
    encoder = make(name, join)
    assert len(encoder.tokens(caption)) == int(encoder.encode([caption]).mask.sum())


def test_a_word_is_unknown_if_no_encoder_has_a_token_for_it(join: str) -> None:
    assert make("joined:bag+lstm", join).unknown(["a zorp", "quux zorp"]) == ["zorp", "quux"]
    assert make("joined:bag+char_cnn_rnn", join).unknown(["a zorp"]) == []
    assert make("joined:bag+lstm+char_cnn_rnn", join).unknown(["a zorp"]) == []
    assert make("joined:char_cnn_rnn+bag", join).unknown(["a zorp"]) == []


@pytest.mark.parametrize(
    ("name", "overflow"),
    [
        ("joined:bag+lstm", ("10 words", "purple ring")),
        ("joined:char_cnn_rnn+bag", None),
        ("joined:bag+char_cnn_rnn", None),
    ],
)
def test_what_one_encoder_reads_does_not_overflow(
    name: str, overflow: tuple[str, str] | None, join: str
) -> None:
    assert make(name, join).overflow(LONG) == overflow


def test_the_overflow_is_that_of_the_encoder_that_reads_most(join: str) -> None:
    encoder = make("joined:bag+char_cnn_rnn", join, max_chars=100)
    caption = LONG + " red" * 20
    assert encoder.overflow(caption) == ("100 characters", caption[100:])
    assert encoder.overflow("x" * 150 + " red" * 10) == ("10 words", "red")


def test_a_word_that_no_encoder_reads_is_not_unknown(join: str) -> None:
    assert make("joined:bag+lstm", join).unknown([f"{LONG} zorp"]) == []
    assert make("joined:bag+char_cnn_rnn", join).unknown(["a 圆 zorp"]) == ["圆"]


@pytest.mark.parametrize("name", NAMES)
def test_all_encoders_are_trained(name: str, join: str) -> None:
    encoder = make(name, join)
    text = encoder.encode(CAPTIONS)
    (text.words.square().sum() + text.sentence.square().sum()).backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize("name", NAMES)
def test_the_caption_cache_returns_the_same_features(
    name: str, join: str, shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It truncates features of a frozen encoder by the number of their words."""
    encoder = make(name, join).requires_grad_(False)
    captions = list(dict.fromkeys(shapes.all_captions(12)))[:3]
    features = CaptionCache(encoder).encode(captions)
    expected = encoder.encode(captions)
    length = features.words.shape[1]
    assert int(expected.mask.sum()) == int(features.mask.sum())
    for part in ("words", "mask", "ids"):
        torch.testing.assert_close(
            getattr(features, part)[features.mask],
            getattr(expected, part)[:, :length][features.mask],
        )
    torch.testing.assert_close(features.sentence, expected.sentence)


# --- names ------------------------------------------------------------------------------------


def test_names_and_widths() -> None:
    """A width behind `@`; a hub's name may have an `@` of its own."""
    name = "joined:bag+lstm@64+pretrained:org/model@768+pretrained:org/model@main"
    assert split_names(name, 16) == [
        ("bag", 16),
        ("lstm", 64),
        ("pretrained:org/model", 768),
        ("pretrained:org/model@main", 16),
    ]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("joined:bag+lstn", r"'lstn'.*did you mean 'lstm'"),
        ("joined:bagg", r"'bagg'.*did you mean 'bag'"),
        ("joined:", "no text encoder ''"),
        ("joined:bag+", "no text encoder ''"),
        ("joined:bag+lstm@7", "even width, not encoder.width=7"),
        ("joined:bag@0+lstm", "width=0 must be at least 1"),
        ("joined:bag+pretrained:", "lacks the model"),
        ("joined:@8", "no text encoder '@8'"),
    ],
)
def test_wrong_names_raise_a_sentence(name: str, error: str) -> None:
    with pytest.raises(UserError, match=error) as caught:
        make(name, "channels")
    assert "\n" not in str(caught.value)


# --- pretrained encoders ----------------------------------------------------------------------


class Model(nn.Module):
    """The part of a text model that `pretrained:` uses: one vector for each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="bert", hidden_size=width)
        self.embed = nn.Embedding(40, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.embed(input_ids))


class Inputs(dict[str, Tensor]):
    def to(self, device: torch.device) -> Inputs:
        return self


class WordLengths:
    """A tokeniser: the ids are lengths of words, behind a start token and before an end token. Its
    padding is token 39, as some models' padding is not 0."""

    def _ids(self, caption: str, length: int) -> list[int]:
        return [30, *map(len, caption.split()[: length - 2]), 31]

    def __call__(self, captions: Any, max_length: int, **options: Any) -> Any:
        if isinstance(captions, str):
            return {"input_ids": self._ids(captions, max_length)}
        rows = [self._ids(caption, max_length) for caption in captions]
        padded = [row + [39] * (max_length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (max_length - len(row)) for row in rows]
        return Inputs(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"#{token}" for token in ids]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, Any]]:
    """Two models of different widths, in place of folders."""
    known = {"narrow": (WordLengths(), Model(5)), "wide": (WordLengths(), Model(9))}

    def load(name: str) -> tuple[Any, Any]:
        if name not in known:
            raise UserError(f"{name} holds no text model")
        return known[name]

    monkeypatch.setattr(pretrained, "load_text_model", load)
    return known


TWO = "joined:pretrained:narrow@5+pretrained:wide@9"


@torch.no_grad()
def test_two_pretrained_models_as_in_sdxl(models: dict[str, tuple[Any, Any]]) -> None:
    encoder = make(TWO, "channels")
    assert (encoder.word_dim, encoder.sentence_dim) == (14, 14)
    assert encoder.padded and not encoder.causal and encoder.vocab_size == 0
    text = encoder.encode([SHORT])
    ids = torch.tensor([30, 1, 3, 6, 31, *[39] * (MAX_WORDS - 5)])
    vectors = [model.embed(ids) for _, model in models.values()]
    assert torch.equal(text.words[0], torch.cat(vectors, dim=1))
    assert text.ids[0].tolist() == [30, 1, 3, 6, 31] + [0] * (MAX_WORDS - 5)
    assert encoder.tokens(SHORT) == ["#30", "#1", "#3", "#6", "#31"]


@torch.no_grad()
def test_a_pretrained_model_and_a_trained_encoder(models: dict[str, tuple[Any, Any]]) -> None:
    """As SD3: along the sequence, the narrower ones filled up; the model is no part of the weights
    and is not trained, the other encoder is."""
    encoder = make("joined:pretrained:wide@9+bag@4", "sequence")
    text = encoder.encode([SHORT])
    ids = torch.tensor([30, 1, 3, 6, 31])
    assert torch.equal(text.words[0, :5], models["wide"][1].embed(ids))
    assert not text.words[0, 5:8, 4:].any() and text.words[0, 5:8, :4].any()
    assert text.mask[0].tolist() == [True] * 8 + [False] * (2 * MAX_WORDS - 8)
    bag = encoder.encoders[1].encode([SHORT]).ids[0].tolist()  # type: ignore[operator]
    assert text.ids[0].tolist() == [30, 1, 3, 6, 31, *bag] + [0] * (2 * MAX_WORDS - 8)
    assert list(encoder.state_dict()) == ["encoders.1.token_emb.weight"]
    assert [p.requires_grad for p in encoder.parameters()] == [True]


def test_check_reaches_every_encoder(models: dict[str, tuple[Any, Any]]) -> None:
    """A missing model, or one of another width, is an error before anything is trained."""
    make(TWO, "channels").check()
    for name, error in (
        ("joined:bag+pretrained:none", "none holds no text model"),
        ("joined:pretrained:narrow@5+pretrained:wide@8", "NAME@9 in text=joined:"),
        ("joined:pretrained:narrow+pretrained:wide@9", "NAME@5 in text=joined:"),
    ):
        encoder: TextEncoder = make(name, "channels")
        with pytest.raises(UserError, match=error):
            encoder.check()


# --- in systems -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "name", "join"),
    [
        ("ddpm", "joined:bag+lstm@8", "channels"),
        ("dit", "joined:transformer+bag@8", "sequence"),
        ("dalle", "joined:bag+transformer@8", "channels"),
    ],
)
def test_families_run_with_it(
    key: str, name: str, join: str, train_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Train, save, load, and generate the same pictures."""
    run = train_run(tmp_path / "run", key, {"text": name, "encoder.join": join}, steps=3)
    system = lineage.load(run.folder, device="cpu")
    assert isinstance(system.text, JoinedEncoder)
    assert (system.text.word_dim == system.text.sentence_dim) is (join == "channels")
    captions = [SHORT, "", "a small blue ring"]
    pictures = system.generate(captions, seed=3)
    assert pictures.shape == (3, 3, 16, 16) and pictures.isfinite().all()
    assert torch.equal(pictures, run.system.generate(captions, seed=3))
