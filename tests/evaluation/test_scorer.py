"""Scorers: unit vectors that depend on their row alone, and the scorer of each data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lineage.data import load_dataset
from lineage.data.contract import Example
from lineage.errors import UserError
from lineage.evaluation import scorer as module
from lineage.evaluation.features import find_scorer
from lineage.evaluation.scorer import CLIPScorer, Scorer, hub_scorer, scorer_for
from lineage.pretrained import run_folder
from lineage.runs import fingerprint_of, train
from lineage.training.store import fingerprint

COUNTS = (1, 7, 64, 65)


@pytest.fixture(scope="session")
def shipped() -> CLIPScorer:
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


def test_a_vector_depends_on_its_row_alone(shipped: CLIPScorer, real: list[Example]) -> None:
    check_contract(shipped, [*first_captions(real), "", "an unheard-of word"])


def test_places_matter(shipped: CLIPScorer) -> None:
    """The image tower keeps positions; a mean over the picture would lose them."""
    image = torch.full((1, 3, 32, 32), 242, dtype=torch.uint8)
    image[:, :, 11:21, 3:13] = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
    left, right = shipped.image(torch.cat([image, image.flip(3)]))
    text = shipped.text(["a red square on the left", "a red square on the right"])
    assert (text @ left).argmax() == 0 and (text @ right).argmax() == 1


def test_the_scorer_of_shapes_is_the_package_s_clip(shipped: CLIPScorer) -> None:
    assert shipped.protocol["run"] == "pretrained:clip"
    weights = fingerprint((run_folder("pretrained:clip") / "model.safetensors").read_bytes())
    assert shipped.protocol["weights"] == weights and weights in shipped.name
    assert shipped.protocol["parameters"] == sum(p.numel() for p in shipped.model.parameters())


# --- a scorer of other data -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight captioned pictures."""
    place = tmp_path / "few"
    place.mkdir()
    for i, letter in enumerate("abcdefgh"):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(letter)
    return place


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Folders in which scorers are trained, with an empty cache."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    folders: list[Path] = []

    def counted(key: str, **options: Any) -> Path:
        folders.append(options["out"])
        return train(key, **options)

    monkeypatch.setattr(module, "train", counted)
    return folders


def scorer_of(folder: Path, **options: Any) -> CLIPScorer:
    data = load_dataset(str(folder), size=32)
    return scorer_for(str(folder), data, fingerprint_of(data), **{"steps": 2, **options})


def test_a_scorer_is_trained_once_for_a_data_set(fits: list[Path], folder: Path) -> None:
    one, again = scorer_of(folder), scorer_of(folder)
    assert len(fits) == 1
    assert torch.equal(one.text(["a"]), again.text(["a"])) and one.protocol == again.protocol
    assert one.protocol["data"] == str(folder)
    assert one.protocol["run"] == module.IN_CACHE
    for changed in (scorer_of(folder, seed=1), scorer_of(folder, steps=3)):
        assert not torch.equal(changed.text(["a"]), one.text(["a"]))
    (folder / "0.txt").write_text("z")
    scorer_of(folder)
    assert len(set(fits)) == 4


def test_a_damaged_scorer_in_the_cache_is_replaced(fits: list[Path], folder: Path) -> None:
    before = scorer_of(folder).text(["a"])
    (fits[0] / "model.safetensors").write_bytes(b"damaged")
    assert torch.equal(scorer_of(folder).text(["a"]), before)
    scorer_of(folder)
    assert len(fits) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    fits: list[Path], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "scorers").write_text("a file in the way")
    assert scorer_of(folder).text(["a"]).shape == (1, 64)


@pytest.mark.parametrize("count", [1, 8])
def test_one_caption_for_all_is_an_error(count: int, folder: Path) -> None:
    for path in sorted(folder.glob("*.txt")):
        path.write_text("the same") if int(path.stem) < count else path.unlink()
    with pytest.raises(UserError, match="--scorer none --features judge") as error:
        scorer_of(folder)
    assert "\n" not in str(error.value) and "few" in str(error.value)


def test_scorers_by_name(smoke_run: Callable[[str], Any]) -> None:
    data, cpu = load_dataset("shapes", size=16), torch.device("cpu")
    assert find_scorer("none", data.name, data, cpu) is None
    scorer = find_scorer("auto", data.name, data, cpu)
    assert scorer is not None and scorer.protocol["run"] == "pretrained:clip"
    run = smoke_run("clip").folder
    own = find_scorer(f"clip:{run}", data.name, data, cpu)
    assert own is not None and own.width == 16 and own.protocol["run"] == str(run)
    with pytest.raises(UserError, match="clip:RUN, hub:MODEL"):
        find_scorer("best", data.name, data, cpu)
    with pytest.raises(UserError, match="no run of clip"):
        find_scorer(f"clip:{smoke_run('retrieval').folder}", data.name, data, cpu)


# --- a CLIP of the hub ------------------------------------------------------------------------


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
    scorer = find_scorer(spec, data.name, data, torch.device("cpu"))
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
            find_scorer(f"damsm:{run}", data.name, data, cpu)
        assert "\n" not in str(error.value) and str(run) in str(error.value)
