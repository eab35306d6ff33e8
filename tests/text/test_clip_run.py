"""`text=clip:RUN`: the frozen text tower of a run of CLIP in other systems."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lineage
from lineage import runs
from lineage.cli import main
from lineage.config import RunConfig, from_dict, to_dict
from lineage.data.contract import CaptionedDataset
from lineage.errors import Interrupted, UserError
from lineage.plan import read_config, use_own_weights
from lineage.recipes import find_recipe
from lineage.text.clip_text import CLIPTextEncoder
from lineage.text.encoders import EncoderSpec
from lineage.text.joined import JoinedEncoder
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer
from lineage.training.store import load_tensors, read_json, save_tensors, write_json

CAPTIONS = ["a red circle", "", "two blue squares above a green zorp"]
QUICK = {"train.log_every": 1, "train.batch_size": 4, "train.checkpoint_every": 2}
DATA = {"data": "shapes", "size": 16, "seed": 0}
TrainRun = Callable[..., Any]


@pytest.fixture(autouse=True)
def _quick_runs(monkeypatch: pytest.MonkeyPatch, tokenizer: WordTokenizer) -> None:
    """No vocabulary from 20,000 pictures, no sheet of sixteen captions."""
    monkeypatch.setattr(runs, "make_tokenizer", lambda *arguments: tokenizer)
    monkeypatch.setattr(runs, "sample_sheet", lambda *arguments: None)


@pytest.fixture(scope="module")
def clip(smoke_run: Callable[[str], Any]) -> Path:
    """A finished run of clip. Copy it before changing it."""
    return Path(smoke_run("clip").folder)


@pytest.fixture
def copied(clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip, tmp_path / "clip"))


def tower_of(run: Path) -> dict[str, Tensor]:
    """Text tower in a run's weights, under names of an encoder of its own."""
    tensors = load_tensors(run / "model.safetensors")
    return {n.removeprefix("text."): t for n, t in tensors.items() if n.startswith("text.")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def configured(key: str, text: str, **settings: Any) -> RunConfig:
    return runs.configure(key, preset_name="smoke", settings={"text": text, **settings})


def spec_of(text: str, tokenizer: WordTokenizer, **settings: Any) -> EncoderSpec:
    config = configured("ddpm", text, **settings)
    return EncoderSpec(config.text, config.encoder, tokenizer)


# --- weights and features -------------------------------------------------------------------------


def test_it_is_the_run_s_tower(clip: Path, tokenizer: WordTokenizer) -> None:
    """Weights, sizes, tokeniser and vectors, with no parameter to train."""
    encoder = spec_of(f"clip:{clip}", WordTokenizer(["other"])).build()
    model = lineage.load(clip, device="cpu")
    assert isinstance(encoder, CLIPTextEncoder)
    assert same(encoder.state_dict(), tower_of(clip)) and same(
        tower_of(clip), model.text.state_dict()
    )
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.tokenizer.to_json() == model.text.tokenizer.to_json()
    ours, theirs = encoder.encode(CAPTIONS), model.text.encode(CAPTIONS)
    for part in ("words", "mask", "sentence", "ids"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part))
    assert torch.equal(model.encode_text(CAPTIONS), ours.sentence)


@pytest.mark.parametrize("layer", ["penultimate", "penultimate_raw"])
@torch.no_grad()
def test_another_layer_of_the_run_may_be_used(layer: str, clip: Path, tokenizer: Any) -> None:
    encoder = spec_of(f"clip:{clip}", tokenizer, **{"encoder.layer": layer}).build()
    tower = lineage.load(clip, device="cpu").text.tower
    ids = encoder.encode(["a red circle"]).ids
    expected = tower.words(tower.hidden_states(ids), layer)
    assert torch.equal(encoder.encode(["a red circle"]).words, expected)


def test_two_encoders_together(clip: Path, tokenizer: WordTokenizer) -> None:
    """As SDXL has them; the run's part alone is frozen, and its width is its own."""
    encoder = spec_of(f"joined:clip:{clip}+bag@6", tokenizer).build()
    assert isinstance(encoder, JoinedEncoder) and encoder.word_dim == 16 + 6
    first, second = encoder.encoders
    assert same(first.state_dict(), tower_of(clip))
    assert [p.requires_grad for p in second.parameters()] == [True]
    assert not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("key", ["ddpm", "gan_int_cls", "attngan", "clip"])
def test_training_leaves_the_tower_as_it_is(
    key: str, clip: Path, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """In every stage that reads captions, with weight decay and all; what else there is moves."""
    config = configured(key, f"clip:{clip}")
    moved = False
    for stage in find_recipe(key).stages(config, tokenizer):
        system = stage.construct()
        trainer = Trainer(system, shapes, config.optim, config.train)
        before = {name: value.clone() for name, value in system.state_dict().items()}
        for number in range(2):
            trainer.advance(trainer.loader.at(number))
        assert system.text is not None and same(system.text.state_dict(), tower_of(clip))
        moved |= not same(system.state_dict(), before)
        system.eval()
    assert moved


# --- runs -----------------------------------------------------------------------------------------


def test_a_trained_run_needs_the_other_folder_no_more(
    copied: Path, train_run: TrainRun, tmp_path: Path
) -> None:
    """To draw, to be taken as a stage's source, and to be trained on: all is in its own folder."""
    run, tower = tmp_path / "run", tower_of(copied)
    trained = train_run(run, "ddpm", {**QUICK, "text": f"clip:{copied}"}, steps=3)
    assert same(trained.system.text.state_dict(), tower)
    expected = trained.system.generate(CAPTIONS, seed=3)
    shutil.rmtree(copied)
    system = lineage.load(run, device="cpu")
    assert same(system.text.state_dict(), tower)
    assert torch.equal(system.generate(CAPTIONS, seed=3), expected)
    assert main(["sample", str(run), "a red circle", "--out", str(tmp_path / "s.png")]) == 0
    assert main(["train", "ddpm", "--out", str(run), "--resume", "--steps", "5"]) == 0
    assert same(lineage.load(run, device="cpu").text.state_dict(), tower)


class StopAfter:
    """Ask to stop after some steps."""

    def __init__(self, number: int, patch: pytest.MonkeyPatch) -> None:
        original = Trainer.advance

        def advance(trainer: Trainer, *arguments: Any) -> dict[str, Tensor]:
            values = original(trainer, *arguments)
            trainer._stop_requested |= trainer.step == number
            return values

        patch.setattr(Trainer, "advance", advance)


@pytest.mark.parametrize(("text", "deleted"), [("clip:{}", True), ("joined:clip:{}+bag", False)])
def test_a_stopped_run_ends_like_an_unbroken_one(
    text: str,
    deleted: bool,
    copied: Path,
    train_run: TrainRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, although the other run was trained on, or deleted, meanwhile."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = {**QUICK, "text": text.format(copied)}
    train_run(whole, "ddpm", settings, steps=5)
    with monkeypatch.context() as patch:
        StopAfter(3, patch)
        with pytest.raises(Interrupted):
            train_run(run, "ddpm", settings, steps=5)
    if deleted:
        shutil.rmtree(copied)
    else:
        change(copied)
    train_run(run, "ddpm", {}, resume=True)
    names = [(folder / "model.safetensors").read_bytes() for folder in (whole, run)]
    assert names[0] == names[1]


def change(run: Path) -> None:
    """Other weights in a run's folder, as further training would write."""
    path = run / "model.safetensors"
    tensors = load_tensors(path)
    tensors["text.tower.pos_emb"] = tensors["text.tower.pos_emb"] + 1
    save_tensors(path, tensors)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_stage_that_has_not_begun_needs_the_run_as_it_was(
    deleted: bool, copied: Path, tokenizer: WordTokenizer, tmp_path: Path
) -> None:
    """Else it would be built from other weights than its cache key says."""
    config = configured("ddpm", f"clip:{copied}")
    stages = find_recipe("ddpm").stages(config, tokenizer)
    use_own_weights(stages, tmp_path / "run")
    assert same(stages[0].construct().text.state_dict(), tower_of(copied))  # type: ignore[union-attr]
    shutil.rmtree(copied) if deleted else change(copied)
    with pytest.raises(UserError, match=r"is no longer what the run in .*run began with") as caught:
        use_own_weights(stages, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_run_of_a_run_of_a_run(clip: Path, train_run: TrainRun, tmp_path: Path) -> None:
    """A CLIP whose text tower is that of another CLIP is taken in turn, and stands alone."""
    settings = {**QUICK, "train.sample_every": 0}
    second, third = tmp_path / "second", tmp_path / "third"
    train_run(second, "clip", {**settings, "text": f"clip:{clip}"}, steps=2)
    assert same(tower_of(second), tower_of(clip))
    trained = train_run(third, "ddpm", {**settings, "text": f"clip:{second}"}, steps=2)
    shutil.rmtree(second)
    assert same(lineage.load(third, device="cpu").text.state_dict(), tower_of(clip))
    assert same(trained.system.text.state_dict(), tower_of(clip))


def test_a_stage_with_it_is_taken_by_another_run(
    copied: Path, train_run: TrainRun, tmp_path: Path
) -> None:
    """`--from text=RUN`: the taken stage is built without the CLIP's folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    train_run(first, "gan_int_cls", {**QUICK, "text": f"clip:{copied}"}, steps=4)
    tower = tower_of(copied)
    shutil.rmtree(copied)
    source = runs.source_of(first, "text")
    stages = runs.plan(configured("gan_int_cls", "bag"), WordTokenizer([]), {"text": source})
    use_own_weights(stages, second)  # of a run that was killed before it had written them
    run = train_run(second, "gan_int_cls", QUICK, steps=2, stages_from={"text": first})
    assert same(run.system.text.state_dict(), tower)
    assert same(lineage.load(second, device="cpu").text.state_dict(), tower)


# --- configuration and cache keys -----------------------------------------------------------------


def keys_of(text: str, tokenizer: WordTokenizer, **settings: Any) -> list[str]:
    config = configured("gan_int_cls", text, **settings)
    return [stage.key(DATA) for stage in find_recipe("gan_int_cls").stages(config, tokenizer)]


@pytest.mark.parametrize("text", ["clip:{}", "joined:clip:{}+bag@6", "joined:bag@6+clip:{}"])
def test_the_key_depends_on_weights_and_not_on_places(
    text: str, clip: Path, copied: Path, tokenizer: WordTokenizer, tmp_path: Path
) -> None:
    before = keys_of(text.format(clip), tokenizer)
    assert keys_of(text.format(copied), tokenizer) == before
    longer = Path(shutil.copytree(clip, f"{copied}+".rstrip("+") + "per"))  # a name begins alike
    assert keys_of(text.format(longer), tokenizer) == before
    layer = keys_of(text.format(clip), tokenizer, **{"encoder.layer": "penultimate"})
    assert all(a != b for a, b in zip(layer, before, strict=True))
    change(copied)
    after = keys_of(text.format(copied), tokenizer)
    assert all(a != b for a, b in zip(after, before, strict=True))


def test_two_runs_keep_their_places(clip: Path, copied: Path, tokenizer: WordTokenizer) -> None:
    """Of two runs with names that begin alike, each is replaced by its own hash, in order."""
    other = Path(shutil.copytree(clip, f"{copied}2"))
    change(other)
    names = [
        spec_of(f"joined:clip:{a}+clip:{b}", tokenizer).to_json()["name"]
        for a, b in ((copied, other), (other, copied), (copied, copied))
    ]
    hashes = [read_json_hash(run) for run in (copied, other)]
    one, two = (f"clip:{value}" for value in hashes)
    assert names == [f"joined:{one}+{two}", f"joined:{two}+{one}", f"joined:{one}+{one}"]


def read_json_hash(run: Path) -> str:
    config = configured("ddpm", f"clip:{run}")
    return str(config.encoder.runs[str(run)]["hash"])


def test_the_configuration_holds_what_is_needed(clip: Path, train_run: Any, tmp_path: Path) -> None:
    """Name, sizes and tokeniser of the tower; `without_files` forgets the file alone."""
    run = tmp_path / "run"
    train_run(run, "ddpm", {**QUICK, "text": f"clip:{clip}"}, steps=1)
    source = read_json(run / "config.json")["encoder"]["runs"][str(clip)]
    assert source["text"] == "clip" and source["weights"] == str(clip / "model.safetensors")
    assert source["tokenizer"] == read_json(clip / "tokenizer.json")
    assert source["encoder"]["projection_dim"] == 16  # of the joint space
    config = read_config(run)
    bare = config.without_files()
    assert set(bare.encoder.runs[str(clip)]) == set(source) - {"weights"}
    assert from_dict(type(config), to_dict(config)) == config
    changed = configured("ddpm", f"clip:{clip}", **{"encoder.layer": "penultimate"})
    assert changed.encoder.layer == "penultimate"


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("clip:absent", {}, "absent"),
        ("clip:", {}, "is empty"),
        ("clip:pretrained:zorp", {}, "no trained run 'zorp'"),
        ("clip:pretrained:dit", {}, "names a run of dit: name one of clip"),
        ("joined:bag+clip:absent", {}, "absent"),
        ("clip:{clip}", {"encoder.width": 8}, "encoder.width has no effect"),
        ("clip:{clip}", {"encoder.tokenizer": "bpe"}, "encoder.tokenizer has no effect"),
        ("joined:clip:{clip}+clip:{clip}", {"encoder.num_layers": 2}, "num_layers has no effect"),
        ("joined:clip:{clip}@999+bag", {}, "leave out its @"),
        ("clip:{clip}", {"encoder.layer": "first"}, "encoder.layer"),
        ("clyp", {}, "did you mean 'clip'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    text: str, settings: dict[str, Any], reason: str, clip: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        runs.train(
            "ddpm",
            preset="smoke",
            steps=1,
            out=tmp_path / "run",
            settings={"text": text.format(clip=clip), **settings},
        )
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_sizes_of_the_other_encoder_may_be_set(clip: Path, tokenizer: WordTokenizer) -> None:
    spec = spec_of(f"joined:clip:{clip}+bag", tokenizer, **{"encoder.width": 5})
    assert spec.build().word_dim == 16 + 5


def test_a_run_without_weights_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights yet"):
        configured("ddpm", f"clip:{copied}")


def test_a_run_that_is_not_finished_is_refused(copied: Path) -> None:
    cost = json.loads((copied / "cost.json").read_text())
    cost["clip"]["finished"] = False
    (copied / "cost.json").write_text(json.dumps(cost))
    with pytest.raises(UserError, match="is not finished, and its tower would change"):
        configured("ddpm", f"clip:{copied}")
    (copied / "state.pt").unlink()  # whoever copies a run without its checkpoint wants it as it is
    configured("ddpm", f"clip:{copied}")


def test_a_tower_of_another_kind_is_taken(train_run: TrainRun, tmp_path: Path) -> None:
    """Any encoder may be a CLIP's text tower; only CLIP's own has other layers."""
    run = tmp_path / "clip"
    train_run(run, "clip", {**QUICK, "train.sample_every": 0, "text": "lstm"}, steps=1)
    encoder = spec_of(f"clip:{run}", WordTokenizer([])).build()
    assert same(encoder.state_dict(), tower_of(run))
    with pytest.raises(UserError, match=r"needs a CLIP with CLIP's own text tower.*is lstm"):
        spec_of(f"clip:{run}", WordTokenizer([]), **{"encoder.layer": "penultimate"}).build()


def test_an_encoder_of_a_damaged_configuration_is_refused(
    clip: Path, train_run: TrainRun, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_run(run, "ddpm", {**QUICK, "text": f"clip:{clip}"}, steps=1)
    saved = read_json(run / "config.json")
    whole = saved["encoder"]["runs"][str(clip)]
    lost = [{k: v for k, v in whole.items() if k != key} for key in whole if key != "weights"]
    for damage in ({}, *({str(clip): one} for one in [*lost, {**whole, "encoder": 3}])):
        saved["encoder"]["runs"] = damage
        write_json(run / "config.json", saved)
        with pytest.raises(UserError) as caught:
            lineage.load(run, device="cpu")
        assert "\n" not in str(caught.value)
