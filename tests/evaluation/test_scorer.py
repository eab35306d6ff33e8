"""Scorers: unit vectors that depend on their row alone, a loss without false negatives, and weights
that separate captions.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lineage.data import load_dataset
from lineage.data.contract import Batch, CaptionedDataset, Example
from lineage.errors import UserError
from lineage.evaluation import scorer as module
from lineage.evaluation.features import find_scorer
from lineage.evaluation.scorer import (
    ContrastiveScorer,
    Scorer,
    contrastive_loss,
    fit_scorer,
    hub_scorer,
    load_scorer,
    own_r_precision,
    scorer_for,
)
from lineage.training.store import fingerprint, save_tensors

COUNTS = (1, 7, 64, 65)


class Few(CaptionedDataset):
    """Pictures with one caption each; of noise if `images` is None."""

    def __init__(
        self, captions: list[str], images: torch.Tensor | None = None, size: int = 16
    ) -> None:
        self.name, self.split, self.size, self.skipped = "few", "train", size, []
        shape = (len(captions), 3, size, size)
        self.images = torch.randint(256, shape, dtype=torch.uint8) if images is None else images
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Example:
        return Example(str(index), self.images[index], (self.captions[index],))


@pytest.fixture(scope="session")
def shipped() -> ContrastiveScorer:
    return scorer_for("shapes", load_dataset("shapes"), "")


@pytest.fixture(scope="session")
def real() -> list[Example]:
    validation = load_dataset("shapes:easy", "validation")
    return [validation[i] for i in range(200)]


def first_captions(examples: list[Example]) -> list[str]:
    return [example.captions[0] for example in examples]


def pictures(examples: list[Example]) -> torch.Tensor:
    return torch.stack([example.image for example in examples])


def check_contract(scorer: Scorer, captions: list[str]) -> None:
    """Unit vectors for pictures of any size, each a function of its row alone."""
    for size in (8, 16, 32, 50):
        images = torch.randint(256, (65, 3, size, size), dtype=torch.uint8)
        embedded = scorer.image(images)
        assert embedded.shape == (65, scorer.width) and embedded.dtype == torch.float32
        torch.testing.assert_close(embedded.norm(dim=1), torch.ones(65))
        for count in COUNTS:
            assert torch.equal(scorer.image(images[:count]), embedded[:count])
    texts = [captions[i % len(captions)] for i in range(64)] + ["a long one " * 30]
    embedded = scorer.text(texts)
    assert embedded.shape == (65, scorer.width) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(65))
    for count in COUNTS:
        assert torch.equal(scorer.text(texts[:count]), embedded[:count])
    assert not embedded.requires_grad
    assert json.loads(json.dumps(scorer.protocol)) == scorer.protocol
    assert scorer.kind == "clip" and scorer.name


def test_a_vector_depends_on_its_row_alone(shipped: ContrastiveScorer, real: list[Example]) -> None:
    check_contract(shipped, [*first_captions(real), "", "an unheard-of word"])


def test_places_matter(shipped: ContrastiveScorer) -> None:
    """The image tower keeps positions; a mean over the picture would lose them."""
    image = torch.full((1, 3, 32, 32), 242, dtype=torch.uint8)
    image[:, :, 11:21, 3:13] = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
    left, right = shipped.image(torch.cat([image, image.flip(3)]))
    text = shipped.text(["a red square on the left", "a red square on the right"])
    assert (text @ left).argmax() == 0 and (text @ right).argmax() == 1


def test_shipped_weights_find_true_captions(
    shipped: ContrastiveScorer, real: list[Example]
) -> None:
    place = resources.files("lineage.evaluation") / "weights" / "scorer_shapes.safetensors"
    with resources.as_file(place) as path:
        assert path.stat().st_size < 1_000_000
    for size, least in ((16, 0.85), (32, 0.85), (64, 0.85)):
        validation = load_dataset("shapes:easy", "validation", size)
        assert own_r_precision(shipped, validation, 200)["value"] > least
    hard = own_r_precision(shipped, load_dataset("shapes:hard", "validation"), 200)
    assert hard["value"] > 0.9 and hard["pool"] == 100
    captions = first_captions(real)
    shuffled = Few(captions[1:] + captions[:1], pictures(real))
    assert own_r_precision(shipped, shuffled)["value"] < 0.05
    stated = {
        (m["data"], m["split"], m["size"]): m["value"] for m in shipped.protocol["r_precision"]
    }
    assert len(stated) == 12 and stated["shapes:hard", "validation", 32] > 0.9
    assert shipped.protocol["parameters"] == sum(p.numel() for p in shipped.parameters())


def test_a_fit_lowers_the_loss_and_is_the_same_twice(real: list[Example]) -> None:
    data = Few(first_captions(real), pictures(real), size=32)
    batch = data.batch(range(96), [0] * 96, 0)
    before = torch.get_rng_state()
    one, again, other, untrained = (
        fit_scorer(data, steps=steps, batch_size=32, seed=seed, progress=False)
        for steps, seed in ((30, 0), (30, 0), (30, 1), (0, 0))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert one.loss(batch) < untrained.loss(batch) - 0.5
    weights = one.state_dict()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert not torch.equal(other.project.weight, one.project.weight)


def test_pairs_with_the_same_caption_are_no_negatives() -> None:
    """Each caption is true of both pictures; as negatives they would cost log 2."""
    image, scale = F.normalize(torch.randn(2, 8), dim=1), torch.tensor(10.0)
    text = image[:1].expand(2, 8)
    itself = torch.eye(2, dtype=torch.bool)
    assert float(contrastive_loss(image, text, scale, torch.ones_like(itself))) == 0
    assert float(contrastive_loss(image, text, scale, itself)) > math.log(2)


@pytest.mark.parametrize(
    ("captions", "ids", "no_negatives"),
    [(["x"] * 4, "abcd", True), (list("wxyz"), "aaaa", True), (list("wxyz"), "abcd", False)],
)
def test_the_batch_defines_the_negatives(captions: list[str], ids: str, no_negatives: bool) -> None:
    """With equal captions, or one picture, there are none, and the loss is zero."""
    scorer = fit_scorer(Few(list("wxyz")), steps=0, progress=False)
    loss = scorer.loss(Batch(torch.randn(4, 3, 32, 32), captions, None, list(ids)))
    assert (float(loss) == 0) == no_negatives


def test_the_loss_is_that_of_clip() -> None:
    """With different captions: cross-entropy along rows and columns, written out."""
    image, text = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    expected = 0.0
    for i in range(5):
        row = [float(7 * image[i] @ text[j]) for j in range(5)]
        column = [float(7 * image[j] @ text[i]) for j in range(5)]
        for logits in (row, column):
            expected -= float(torch.tensor(logits).log_softmax(0)[i]) / 10
    loss = contrastive_loss(image, text, torch.tensor(7.0), torch.eye(5, dtype=torch.bool))
    assert float(loss) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", [8, 16, 40])
def test_tiny_data(size: int) -> None:
    """Eight pictures with one caption each, at other sizes than the tower's."""
    data = Few(["one thing", "another one"] * 4, size=size)
    scorer = fit_scorer(data, data, steps=3, progress=False)
    assert scorer.protocol["batch"] == 8
    assert scorer.protocol["r_precision"][0]["pool"] == 2
    assert scorer.image(pictures([data[0]])).shape == (1, scorer.width)


@pytest.mark.parametrize("count", [1, 8])
def test_one_caption_for_all_is_an_error(count: int) -> None:
    with pytest.raises(UserError, match="--scorer none --features judge") as error:
        fit_scorer(Few(["the same"] * count), steps=1)
    assert "\n" not in str(error.value) and "few" in str(error.value)


def test_a_saved_scorer_is_loaded_unchanged(tmp_path: Path, real: list[Example]) -> None:
    scorer = fit_scorer(Few(first_captions(real)[:40]), steps=2, progress=False)
    scorer.save(tmp_path / "in" / "scorer.safetensors")
    before = torch.get_rng_state()
    back = load_scorer(tmp_path / "in" / "scorer.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert back.name == scorer.name and back.protocol == scorer.protocol
    assert torch.equal(back.image(pictures(real)), scorer.image(pictures(real)))
    captions = first_captions(real)
    assert torch.equal(back.text(captions), scorer.text(captions))


def damages(whole: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "short": whole[: len(whole) // 2],
        "text": b"<html></html>",
        "head": whole.replace(b"tokenizer", b"tokenisor"),
        "field": whole.replace(b"max_words", b"max_birds"),
        "sizes": whole.replace(b'width\\": 48', b'width\\": 40'),
        "lost": whole.replace(b"log_scale", b"log_scald"),
    }


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    fit_scorer(Few(list("abcd")), steps=0, progress=False).save(path)
    whole = path.read_bytes()
    for content in damages(whole).values():
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"scorer\.safetensors") as error:
            load_scorer(path)
        assert "\n" not in str(error.value)
    save_tensors(path, {"a": torch.zeros(2)})
    with pytest.raises(UserError, match="not a scorer"):
        load_scorer(path)
    path.unlink()
    with pytest.raises(UserError, match=r"scorer\.safetensors"):
        load_scorer(path)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the data sets that scorers are fitted to, with an empty cache."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path))
    names: list[str] = []

    def counted(dataset: CaptionedDataset, *rest: object, **options: object) -> object:
        names.append(dataset.name)
        return fit_scorer(dataset, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fit_scorer", counted)
    return names


def test_a_fitted_scorer_is_cached(fits: list[str], tmp_path: Path) -> None:
    data = Few(list("abcdefgh"))

    def get(fingerprint: str, **more: int) -> ContrastiveScorer:
        options = {"steps": 2, "progress": False, **more}
        return scorer_for("folder:few", data, fingerprint, **options)  # type: ignore[arg-type]

    one, again = get("1"), get("1")
    assert fits == ["few"] and len(list((tmp_path / "scorers").iterdir())) == 1
    assert torch.equal(one.text(["a"]), again.text(["a"])) and one.protocol == again.protocol
    for changed in (get("2"), get("1", seed=1), get("1", steps=3)):
        assert changed.protocol["data"] == "few"
    data.size = 24
    get("1")
    assert len(fits) == 5


def test_a_damaged_scorer_in_the_cache_is_replaced(fits: list[str], tmp_path: Path) -> None:
    data = Few(list("abcd"))
    for _ in range(2):
        scorer_for("few", data, "1", steps=0, progress=False)
    (path,) = (tmp_path / "scorers").iterdir()
    path.write_bytes(b"damaged")
    scorer_for("few", data, "1", steps=0, progress=False)
    scorer_for("few", data, "1", steps=0, progress=False)
    assert len(fits) == 2


def test_a_cache_that_cannot_be_written_is_no_error(fits: list[str], tmp_path: Path) -> None:
    (tmp_path / "scorers").write_text("a file in the way")
    scorer_for("few", Few(list("abcd")), "1", steps=0, progress=False)
    assert fits == ["few"]


def test_scorers_by_name(fits: list[str]) -> None:
    data, cpu = load_dataset("shapes:hard", size=16), torch.device("cpu")
    assert find_scorer("none", data.name, data, data, cpu) is None
    scorer = find_scorer("auto", data.name, data, data, cpu)
    assert scorer is not None and scorer.name == "contrastive scorer of shapes (all levels)"
    assert not fits
    with pytest.raises(UserError, match="hub:MODEL"):
        find_scorer("best", data.name, data, data, cpu)


def test_all_levels_in_turn() -> None:
    """The data set that the shipped scorer is trained on."""
    path = Path(__file__).parents[2] / "benchmarks" / "train_scorer.py"
    data = run_path(str(path))["AllLevels"]()
    levels = [load_dataset(f"shapes:{level}") for level in ("easy", "medium", "hard")]
    batch = data.batch([7, 0, 5], [0, 0, 0], 0)
    for row, index in enumerate((7, 0, 5)):
        alone = levels[index % 3].batch([index // 3], [0], 0)
        assert torch.equal(batch.image[row], alone.image[0])
        assert batch.caption[row] == alone.caption[0]
        assert torch.equal(data[index].image, levels[index % 3][index // 3].image)
    assert len(set(batch.id)) == 3 and len(data) == 60_000


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP as `transformers` saves it; its tokens are letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    words = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    last = len(tokens) - 1
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    config = transformers.CLIPConfig(
        text_config={**tower, **ends, "vocab_size": len(tokens), "max_position_embeddings": 77},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    pixels = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    transformers.CLIPProcessor(pixels, words).save_pretrained(folder)
    return folder


def test_a_clip_of_the_hub(tiny_clip: Path) -> None:
    transformers = pytest.importorskip("transformers")
    scorer = hub_scorer(tiny_clip)
    check_contract(scorer, ["a cat", "", "red dog"])
    assert str(tiny_clip) in scorer.name and scorer.width == 12
    model = transformers.CLIPModel.from_pretrained(tiny_clip)
    processor = transformers.CLIPProcessor.from_pretrained(tiny_clip)
    images = torch.randint(256, (3, 3, 20, 20), dtype=torch.uint8)
    captions = ["a cat", "a", "red dog"]
    inputs = processor(text=captions, images=list(images), padding=True, return_tensors="pt")
    theirs = model(**inputs)
    torch.testing.assert_close(scorer.image(images), theirs.image_embeds.detach())
    torch.testing.assert_close(scorer.text(captions), theirs.text_embeds.detach())


def test_errors_without_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "transformers", None)
        with pytest.raises(UserError, match=r"pip install 'lineage-t2i\[hub\]'"):
            hub_scorer(tmp_path)
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="No CLIP model") as error:
            hub_scorer(place)
        assert "\n" not in str(error.value)


# --- the matching model of a run --------------------------------------------------------------


@pytest.fixture(scope="module")
def matching(smoke_run: Callable[[str], Any]) -> Scorer:
    """The DAMSM of a finished run, as `--scorer damsm:RUN` names it."""
    data, spec = load_dataset("shapes", size=16), f"damsm:{smoke_run('attngan').folder}"
    scorer = find_scorer(spec, data.name, data, data, torch.device("cpu"))
    assert scorer is not None
    return scorer


def test_a_matching_model_gives_unit_vectors_of_any_picture(
    matching: Scorer, real: list[Example]
) -> None:
    for size in (8, 16, 32, 50):
        embedded = matching.image(torch.randint(256, (5, 3, size, size), dtype=torch.uint8))
        assert embedded.shape == (5, matching.width) and embedded.dtype == torch.float32
        torch.testing.assert_close(embedded.norm(dim=1), torch.ones(5))
    embedded = matching.text([*first_captions(real)[:4], ""])
    assert embedded.shape == (5, matching.width) and not embedded.requires_grad
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(5))


def test_a_vector_of_a_matching_model_depends_on_its_row_alone(
    matching: Scorer, real: list[Example]
) -> None:
    """Whatever the number of rows, and whatever the length of the other captions."""
    images = pictures(real)[:65]
    captions = [*first_captions(real)[:63], "", "a long one " * 30]
    image, text = matching.image(images), matching.text(captions)
    for count in COUNTS:
        assert torch.equal(matching.image(images[:count]), image[:count])
        torch.testing.assert_close(matching.text(captions[:count]), text[:count])
    torch.testing.assert_close(matching.text(captions[::-1]), text.flip(0))


def test_a_matching_model_is_that_of_its_run(
    matching: Scorer, smoke_run: Callable[[str], Any], real: list[Example]
) -> None:
    """Whole pictures at the run's side, and sentences; the name has the weights' fingerprint."""
    folder, system = smoke_run("attngan")
    small = pictures(real)[:3].view(3, 3, 16, 2, 16, 2).float().mean((3, 5)).round()
    expected = system.image_encoder(small / 127.5 - 1).global_vector
    image = matching.image(small.to(torch.uint8))
    torch.testing.assert_close(image, F.normalize(expected, dim=1), atol=1e-5, rtol=0)
    sentence = system.text.encode(first_captions(real)[:3]).sentence
    text = matching.text(first_captions(real)[:3])
    torch.testing.assert_close(text, F.normalize(sentence, dim=1), atol=1e-5, rtol=0)
    weights = fingerprint((folder / "model.safetensors").read_bytes())
    assert matching.kind == "damsm" and matching.name == f"DAMSM of attngan ({weights})"
    assert json.loads(json.dumps(matching.protocol)) == matching.protocol
    assert matching.protocol["weights"] == weights


def test_a_run_without_a_matching_model_is_an_error(
    smoke_run: Callable[[str], Any], tmp_path: Path
) -> None:
    data, cpu = load_dataset("shapes", size=16), torch.device("cpu")
    folder = smoke_run("retrieval").folder
    for run, word in ((folder, "without a DAMSM"), (tmp_path / "none", "no run folder")):
        with pytest.raises(UserError, match=word) as error:
            find_scorer(f"damsm:{run}", data.name, data, data, cpu)
        assert "\n" not in str(error.value) and str(run) in str(error.value)
