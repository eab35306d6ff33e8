"""`codec_from`: a run takes the codec of another one as it is, and trains only a prior on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lineage
from lineage import runs
from lineage.cli import main
from lineage.config import from_dict, to_dict
from lineage.data import load_dataset
from lineage.data.contract import Batch
from lineage.data.tools import export
from lineage.errors import Interrupted, UserError
from lineage.recipes import find_recipe, preset
from lineage.runs import configure, read_config
from lineage.text.tokenizer import WordTokenizer
from lineage.training.log import read_log
from lineage.training.loop import Trainer
from lineage.training.store import load_state, load_tensors, read_json, save_tensors, write_json
from lineage.vqvae.ar_prior import Prior
from lineage.vqvae.codec import Codes

QUICK = {"train.log_every": 1, "train.batch": 4}
SIZES = {  # other ones than those of preset smoke
    "vqvae": {
        "codec.quantiser.codes": 9,
        "codec.quantiser.width": 5,
        "codec.halvings": 3,
        "codec.channels": 6,
    },
    "dalle": {"codec.codes": 9, "codec.width": 4, "codec.groups": 2, "codec.start": 5},
    "vqgan": {
        "codec.quantiser.codes": 9,
        "codec.quantiser.width": 5,
        "codec.net.multipliers": "1,2",
        "codec.discriminator": 3,
    },
}
KEYS = list(SIZES)
CAPTIONS = ["a red circle", "", "two blue squares above a green ring"]


@pytest.fixture(autouse=True)
def _quick_runs(monkeypatch: pytest.MonkeyPatch, tokenizer: WordTokenizer) -> None:
    """Every run would begin with counting the words of 20,000 pictures, and end with a drawing of
    sixteen captions."""
    monkeypatch.setattr(runs, "make_tokenizer", lambda *given: tokenizer)
    monkeypatch.setattr(runs, "sample_sheet", lambda *given: None)


@pytest.fixture(scope="module")
def first(
    train_run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """key -> the folder of a finished run whose codec is to be taken. Copy it before changing
    it."""
    done: dict[str, Path] = {}

    def get(key: str) -> Path:
        if key not in done:
            folder = tmp_path_factory.mktemp("first") / key
            done[key] = train_run(folder, key, {**QUICK, **SIZES[key]}, steps=6).folder
        return done[key]

    return get


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The stage of every step that is taken, with a cache of the test's own."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    taken: list[str] = []
    original = Trainer.advance

    def advance(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
        taken.append(trainer.stage)
        return original(trainer, batch)

    monkeypatch.setattr(Trainer, "advance", advance)
    return taken


def codec_of(run: Path) -> dict[str, Tensor]:
    state = load_tensors(run / "model.safetensors")
    return {name: tensor for name, tensor in state.items() if name.startswith("codec.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("key", KEYS)
def test_only_codes_and_prior_are_trained(
    key: str,
    first: Callable[[str], Path],
    train_run: Callable[..., Any],
    steps: list[str],
    tmp_path: Path,
) -> None:
    """The prior gets the whole budget, and the log and the costs know no codec."""
    source, run = first(key), tmp_path / "run"
    steps.clear()
    train_run(run, key, {**QUICK, "codec_from": str(source)}, steps=5)
    assert steps == ["codes"] + 5 * ["prior"]
    assert set(read_json(run / "cost.json")) == {"codes", "prior"}
    assert {line["stage"] for line in read_log(run / "metrics.jsonl")} == {"codes", "prior"}
    assert not (run / "stages" / "codec").exists()


@pytest.mark.parametrize("key", KEYS)
def test_the_codec_is_taken_bit_by_bit_with_its_sizes(
    key: str, first: Callable[[str], Path], train_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Weights, codebook, statistics and what it knows of its own error; the rest is new."""
    source, run = first(key), tmp_path / "run"
    made = train_run(run, key, {**QUICK, "codec_from": str(source)}, steps=3)
    theirs, ours = codec_of(source), codec_of(run)
    assert len(theirs) > 8 and same(theirs, ours)
    assert float(ours["codec.error"]) != 1.0
    saved, known = read_json(run / "config.json"), read_json(source / "config.json")
    assert saved["codec"] == known["codec"] and saved["codec_from"] == str(source)
    assert saved["model"] == to_dict(preset(key, "smoke"))["model"]
    prior: Any = made.system
    assert isinstance(prior, Prior)
    assert prior.codec.codes == 9 == prior.code.num_embeddings == prior.code_head.out_features
    assert prior.side == 16 // prior.codec.factor
    old = load_tensors(source / "model.safetensors")
    new = load_tensors(run / "model.safetensors")
    assert not torch.equal(old["code.weight"], new["code.weight"])


@pytest.mark.parametrize("key", KEYS)
def test_the_codec_is_not_trained_along(
    key: str, first: Callable[[str], Path], train_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Neither by gradient nor by what a module does on its own in training mode."""
    made = train_run(
        tmp_path / "run", key, {**QUICK, "codec_from": str(first(key)), "optim.lr": 0.5}, steps=3
    )
    prior: Any = made.system
    assert not any(p.requires_grad for p in prior.codec.parameters())
    assert not prior.train().codec.training
    trained = {
        id(p) for modules in prior.groups().values() for m in modules for p in m.parameters()
    }
    assert not trained & {id(p) for p in prior.codec.parameters()}
    assert same(codec_of(first(key)), codec_of(tmp_path / "run"))


def test_every_way_of_asking_gives_the_same_configuration(
    first: Callable[[str], Path], tmp_path: Path
) -> None:
    """As text, as a path, before or after other settings; an empty text takes it back."""
    source = first("vqvae")
    one = configure("vqvae", preset_name="smoke", settings={"codec_from": str(source)})
    assert one == configure("vqvae", preset_name="smoke", settings={"codec_from": source})
    settings = {"optim.lr": 0.1, "codec_from": source, "seed": 3}
    backwards = dict(reversed(settings.items()))
    two = configure("vqvae", preset_name="smoke", settings=settings)
    assert two == configure("vqvae", preset_name="smoke", settings=backwards)
    config: Any = two
    assert (config.codec.quantiser.codes, config.seed, config.optim.lr) == (9, 3, 0.1)
    assert from_dict(type(two), to_dict(two)) == two
    none: Any = configure("vqvae", preset_name="smoke", settings={"codec_from": ""})
    assert none == preset("vqvae", "smoke") and none.codec_from == ""


def test_a_size_that_fits_the_codec_may_be_asked_for_in_any_order(
    first: Callable[[str], Path], tmp_path: Path
) -> None:
    """Places of 8 pixels do not fit pictures of 20, and the pictures are asked to be of 24."""
    small = replace(preset("vqvae", "smoke"), size=20)
    folder = tmp_path / "run"
    shutil.copytree(first("vqvae"), folder)
    settings = {"codec_from": str(folder), "size": 24}
    for given in (settings, dict(reversed(settings.items()))):
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(find_recipe("vqvae").PRESETS, "smoke", small)
            config: Any = configure("vqvae", preset_name="smoke", settings=given)
        assert (config.size, config.codec.factor) == (24, 8)


# --- what is found again ----------------------------------------------------------------------


def test_the_codes_are_found_again_by_the_codec_and_not_by_its_place(
    first: Callable[[str], Path], train_run: Callable[..., Any], steps: list[str], tmp_path: Path
) -> None:
    """A second prior on the same codec pays for the prior alone; another codec is another one."""
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(first("vqvae"), moved)
    steps.clear()
    train_run(tmp_path / "a", "vqvae", {**QUICK, "codec_from": first("vqvae")}, steps=2)
    train_run(tmp_path / "b", "vqvae", {**QUICK, "codec_from": moved, "optim.lr": 0.1}, steps=3)
    assert steps == ["codes", "prior", "prior", "prior", "prior", "prior"]
    assert same(codec_of(tmp_path / "a"), codec_of(tmp_path / "b"))

    shutil.copytree(first("vqvae"), other)
    state = load_tensors(other / "model.safetensors")
    state["codec.quantiser.codes"] += 1.0
    save_tensors(other / "model.safetensors", state)
    steps.clear()
    train_run(tmp_path / "c", "vqvae", {**QUICK, "codec_from": other}, steps=2)
    assert steps == ["codes", "prior", "prior"]
    assert same(codec_of(other), codec_of(tmp_path / "c"))


def test_what_the_prior_learns_from_are_the_codes_of_that_codec(
    first: Callable[[str], Path], train_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Of a data set that ends, so that all its codes are kept."""
    data = exported(tmp_path / "data")
    settings = {**FINITE, "codec_from": first("vqvae")}
    made: Any = train_run(tmp_path / "run", "vqvae", settings, steps=2, data=data).system
    assert_codes_are_the_codecs(made, data)


FINITE = {**QUICK, "kept": 64, "train.precision": "fp32"}  # a narrow encoder may choose otherwise


def exported(folder: Path, count: int = 24) -> str:
    export(load_dataset("shapes", "train", 16), folder, count)
    return f"imagefolder:{folder}"


def assert_codes_are_the_codecs(prior: Any, data: str) -> None:
    """What the prior learns from, against what its codec says to the same pictures."""
    known: Codes = prior.known[0]
    dataset = load_dataset(data, "train", 16)
    batch = Trainer(
        prior, dataset, preset("vqvae", "smoke").optim, preset("vqvae", "smoke").train
    ).loader.at(0)
    assert int(known.memory.count) == len(dataset)
    assert torch.equal(known.of(batch), prior.codec.encode(batch.image))


# --- going on ---------------------------------------------------------------------------------


def stopping(stage: str, step: int, patched: pytest.MonkeyPatch) -> None:
    """The run is asked to stop in that stage, after that many steps of it."""
    original = Trainer.advance

    def advance(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
        seen = original(trainer, batch)
        if trainer.stage == stage and trainer.step >= step:
            trainer._asked_to_stop = True
        return seen

    patched.setattr(Trainer, "advance", advance)


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{at}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{at}.{number}")
    elif at not in (".seconds", ".cpu_seconds"):
        yield at, value


STOPPED = {**QUICK, "kept": 200, "train.checkpoint_every": 3}


@pytest.fixture(scope="module")
def whole(
    first: Callable[[str], Path],
    train_run: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], Path]:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"

    def get() -> Path:
        if not folder.exists():
            train_run(folder, "vqvae", {**STOPPED, "codec_from": first("vqvae")}, steps=7)
        return folder

    return get


@pytest.mark.parametrize(("stage", "step"), [("codes", 2), ("prior", 3), ("prior", 4)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    stage: str,
    step: int,
    first: Callable[[str], Path],
    whole: Callable[[], Path],
    train_run: Callable[..., Any],
    steps: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, and without being told again whose codec it is."""
    run, settings = tmp_path / "run", {**STOPPED, "codec_from": first("vqvae")}
    with monkeypatch.context() as patched:
        stopping(stage, step, patched)
        with pytest.raises(Interrupted, match="--resume"):
            train_run(run, "vqvae", settings, steps=7)
    steps.clear()
    assert main(["train", "vqvae", "--out", str(run), "--resume"]) == 0
    done = {"codes": 2, "prior": 0} if stage == "codes" else {"codes": 4, "prior": step}
    assert steps == (4 - done["codes"]) * ["codes"] + (7 - done["prior"]) * ["prior"]
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "another"))
    both = (whole(), run)
    one, other = (folder / "model.safetensors" for folder in both)
    assert one.read_bytes() == other.read_bytes()
    states = [dict(leaves(load_state(folder / "state.pt"))) for folder in both]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        mine = states[1][name]
        assert torch.equal(value, mine) if isinstance(value, Tensor) else value == mine, name


def test_a_finished_run_is_given_a_longer_budget(
    first: Callable[[str], Path], train_run: Callable[..., Any], steps: list[str], tmp_path: Path
) -> None:
    """Only the prior goes on."""
    run = tmp_path / "run"
    train_run(run, "vqvae", {**QUICK, "codec_from": first("vqvae")}, steps=3)
    steps.clear()
    assert main(["train", "vqvae", "--out", str(run), "--resume", "--steps", "5"]) == 0
    assert steps == ["prior", "prior"]
    assert same(codec_of(first("vqvae")), codec_of(run))


def test_a_longer_budget_does_not_part_codes_and_codec(
    train_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run with a codec of its own the codec gets its share of the new budget too: the prior
    must draw with the codec that came of it, and be taught that one's codes. (It may also be left
    as it was; but no other run may then find it under the name of a longer budget.)"""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    data, run = exported(tmp_path / "data"), tmp_path / "run"
    settings = {**FINITE, "codec_optim.lr": 0.02, "codec_optim.average": 0.0}
    train_run(run, "vqvae", settings, steps=10, data=data)
    assert same(codec_of(run), trained_codec(run))
    made: Any = train_run(run, "vqvae", {}, steps=30, resume=True).system
    assert_codes_are_the_codecs(made, data)
    assert same(codec_of(run), trained_codec(run))


def trained_codec(run: Path) -> dict[str, Tensor]:
    """What the stage `codec` ended with, where no average is kept."""
    state = load_state(run / "stages" / "codec" / "state.pt")
    return {f"codec.{name}": tensor for name, tensor in state["weights"].items()}


def test_a_codec_that_changed_meanwhile_does_not_part_codes_and_codec(
    first: Callable[[str], Path],
    train_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run that it was taken from went on training before this one was resumed. The next run on
    the codec gets it as it is now."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    data, run, source = exported(tmp_path / "data"), tmp_path / "run", tmp_path / "source"
    shutil.copytree(first("vqvae"), source)
    settings = {**FINITE, "codec_from": source}
    with monkeypatch.context() as patched:
        stopping("prior", 2, patched)
        with pytest.raises(Interrupted):
            train_run(run, "vqvae", settings, steps=4, data=data)
    state = load_tensors(source / "model.safetensors")
    codes = state["codec.quantiser.codes"]
    state["codec.quantiser.codes"] = codes.roll(1, 0) + 0.1 * torch.randn(codes.shape)
    save_tensors(source / "model.safetensors", state)
    with suppress(UserError):  # to refuse is as good
        made: Any = train_run(run, "vqvae", {}, resume=True).system
        assert_codes_are_the_codecs(made, data)
    train_run(tmp_path / "next", "vqvae", settings, steps=4, data=data)
    assert same(codec_of(source), codec_of(tmp_path / "next"))


# --- without the first run --------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_a_run_needs_the_other_no_more_once_it_is_trained(
    key: str, first: Callable[[str], Path], train_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Its folder holds all that drawing needs."""
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(first(key), source)
    made = train_run(run, key, {**QUICK, "codec_from": str(source)}, steps=2)
    shutil.rmtree(source)
    system = lineage.load(run)
    assert same(codec_of(run), {f"codec.{n}": t for n, t in system.codec.state_dict().items()})
    expected = made.system.generate(CAPTIONS, seed=4)
    torch.testing.assert_close(system.generate(CAPTIONS, seed=4), expected)
    sheet = tmp_path / "sheet.png"
    assert main(["sample", str(run), "a red circle", "--out", str(sheet)]) == 0
    assert sheet.is_file()


def test_going_on_without_the_first_run_is_one_sentence(
    first: Callable[[str], Path], train_run: Callable[..., Any], told: Told, tmp_path: Path
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(first("vqvae"), source)
    train_run(run, "vqvae", {**QUICK, "codec_from": str(source)}, steps=2)
    before = (run / "model.safetensors").read_bytes()
    shutil.rmtree(source)
    told(["train", "vqvae", "--out", str(run), "--resume", "--steps", "4"], str(source))
    assert (run / "model.safetensors").read_bytes() == before
    assert lineage.load(run) is not None


def test_a_codec_is_handed_on(
    first: Callable[[str], Path], train_run: Callable[..., Any], tmp_path: Path
) -> None:
    """From a run that took it itself."""
    second, third = tmp_path / "second", tmp_path / "third"
    train_run(second, "vqvae", {**QUICK, "codec_from": first("vqvae")}, steps=2)
    train_run(third, "vqvae", {**QUICK, "codec_from": second}, steps=2)
    assert same(codec_of(first("vqvae")), codec_of(third))
    assert read_config(third).codec_from == str(second)  # type: ignore[attr-defined]


# --- what cannot be ---------------------------------------------------------------------------

Told = Callable[..., None]


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Told:
    """One sentence with all the words, and exit code 2."""

    def told(arguments: list[str], *words: str) -> None:
        capfd.readouterr()
        assert main(arguments) == 2
        out, errors = capfd.readouterr()
        assert out == "" and "Traceback" not in errors
        (line,) = errors.strip().splitlines()
        assert line.startswith("lineage: ") and all(word in line for word in words), line

    return told


def asked(source: Path | str, run: Path, *more: str) -> list[str]:
    settings = [part for one in more for part in ("--set", one)]
    words = ["train", "vqvae", "--preset", "smoke", "--out", str(run)]
    return [*words, "--set", f"codec_from={source}", *settings]


def test_a_folder_that_is_no_run_is_told(told: Told, tmp_path: Path) -> None:
    """And nothing is written, so that the next attempt needs no other folder."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("absent", "empty", "file"):
        told(asked(tmp_path / name, tmp_path / "run"), str(tmp_path / name))
        assert not (tmp_path / "run").exists()


def test_a_run_of_another_system_is_told(
    first: Callable[[str], Path], told: Told, tmp_path: Path
) -> None:
    for key in ("dalle", "vqgan"):
        source = first(key)
        told(asked(source, tmp_path / "run"), str(source), "no run of vqvae")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"cut short"),
        ("config.json", None),
        ("config.json", b""),
        ("config.json", b"[1, 2]"),
        ("config.json", b'"vqvae"'),
        ("config.json", b"{}"),
        ("config.json", b'{"key": "vqvae"}'),
        ("config.json", b'{"key": "vqvae", "codec": 3}'),
        ("config.json", b'{"key": "vqvae", "codec": {"inner": "many"}}'),
        ("config.json", b'{"key": "vqvae", "codec": {"colour": 3}}'),
    ],
)
def test_a_run_with_a_file_missing_or_broken_is_told(
    name: str,
    content: bytes | None,
    first: Callable[[str], Path],
    told: Told,
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first("vqvae"), source)
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    told(asked(source, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_cut_short_is_told(
    first: Callable[[str], Path], told: Told, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first("vqvae"), source)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    told(asked(source, tmp_path / "run"), "model.safetensors")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting", ["codec.quantiser.codes=10", "codec.channels=8", "codec.halvings=2"]
)
def test_a_codec_of_other_sizes_than_asked_for_is_told_before_anything_is_written(
    setting: str, first: Callable[[str], Path], told: Told, tmp_path: Path
) -> None:
    """`codec` may be set after `codec_from`; a folder that was begun would be in the way of the
    next attempt."""
    told(asked(first("vqvae"), tmp_path / "run", setting), "codec")
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_codec_is_told_before_anything_is_written(
    first: Callable[[str], Path], told: Told, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first("vqvae"), source)
    state = load_tensors(source / "model.safetensors")
    rest = {name: t for name, t in state.items() if not name.startswith("codec.")}
    save_tensors(source / "model.safetensors", rest)
    told(asked(source, tmp_path / "run"), str(source))
    assert not (tmp_path / "run").exists()


def test_places_that_do_not_fit_the_pictures_are_told(
    first: Callable[[str], Path], told: Told, tmp_path: Path
) -> None:
    """The codec that is taken has places of 8 pixels."""
    told(asked(first("vqvae"), tmp_path / "run", "size=20"), "size=20", "8 pixels")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_still_at_its_codec_is_told(
    train_run: Callable[..., Any],
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has a configuration, and no model yet."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    with monkeypatch.context() as patched:
        stopping("codec", 1, patched)
        with pytest.raises(Interrupted):
            train_run(source, "vqvae", QUICK, steps=10)
    told(asked(source, tmp_path / "run"), "model.safetensors")
    assert not (tmp_path / "run").exists()


def test_systems_without_a_codec_do_not_know_the_setting(told: Told, tmp_path: Path) -> None:
    arguments = asked(tmp_path, tmp_path / "run")
    arguments[1] = "ddpm"
    told(arguments, "codec_from")


def test_vqgan_takes_no_networks_of_lpips_along(
    first: Callable[[str], Path], tmp_path: Path
) -> None:
    """They only teach, and may not lie where they lay."""
    source = tmp_path / "source"
    shutil.copytree(first("vqgan"), source)
    saved = read_json(source / "config.json")
    saved["codec"]["lpips"] = ["/absent/vgg16.pth", "/absent/lpips.pth"]
    write_json(source / "config.json", saved)
    config: Any = configure("vqgan", preset_name="smoke", settings={"codec_from": str(source)})
    assert config.codec.lpips == () and config.codec.quantiser.codes == 9
    assert json.loads(json.dumps(to_dict(config)))["codec"]["lpips"] == []
    assert lineage.load(source).codec.codes == 9
