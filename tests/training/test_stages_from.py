"""Stages of other runs (`--from STAGE=RUN`): a prior is trained on the codec of another run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lineage
from lineage import runs
from lineage.cli import main
from lineage.config import to_dict
from lineage.data import load_dataset
from lineage.data.contract import Batch
from lineage.data.tools import export
from lineage.errors import Interrupted, UserError
from lineage.recipes import preset
from lineage.text.tokenizer import WordTokenizer
from lineage.training.log import read_log
from lineage.training.loop import Trainer
from lineage.training.store import load_state, load_tensors, read_json, save_tensors, write_json
from lineage.vqvae.ar_prior import Prior
from lineage.vqvae.vqgan import VQGAN

QUICK = {"train.log_every": 1, "train.batch_size": 4}
SIZES = {  # others than those of preset smoke
    "vqvae": {
        "codec.quantiser.num_codes": 9,
        "codec.quantiser.code_dim": 5,
        "codec.num_downsamples": 3,
        "codec.channels": 6,
    },
    "dalle": {
        "codec.num_codes": 9,
        "codec.hidden_channels": 4,
        "codec.num_groups": 2,
        "codec.init_channels": 5,
    },
    "vqgan": {
        "codec.quantiser.num_codes": 9,
        "codec.quantiser.code_dim": 5,
        "codec.net.channel_mult": "1,2",
        "codec.disc_channels": 3,
    },
}
KEYS = list(SIZES)
CAPTIONS = ["a red circle", "", "two blue squares above a green ring"]
TrainRun = Callable[..., Any]


@pytest.fixture(autouse=True)
def _quick_runs(monkeypatch: pytest.MonkeyPatch, tokenizer: WordTokenizer) -> None:
    """No vocabulary from 20,000 pictures, no sheet of sixteen captions."""
    monkeypatch.setattr(runs, "make_tokenizer", lambda *arguments: tokenizer)
    monkeypatch.setattr(runs, "sample_sheet", lambda *arguments: None)


@pytest.fixture(scope="module")
def first(train_run: TrainRun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """key -> folder of a finished run whose codec is taken. Copy it before changing it."""
    folders: dict[str, Path] = {}

    def get(key: str) -> Path:
        if key not in folders:
            folder = tmp_path_factory.mktemp("first") / key
            folders[key] = train_run(folder, key, {**QUICK, **SIZES[key]}, steps=6).folder
        return folders[key]

    return get


@pytest.fixture
def copied(first: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """key -> a copy of the first run's folder."""

    def copy(key: str) -> Path:
        return Path(shutil.copytree(first(key), tmp_path / f"source_{key}"))

    return copy


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Stages of all steps taken, with a cache of the test's own."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    stages: list[str] = []
    original = Trainer.advance

    def advance(trainer: Trainer, *arguments: Any) -> dict[str, Tensor]:
        stages.append(trainer.stage)
        return original(trainer, *arguments)

    monkeypatch.setattr(Trainer, "advance", advance)
    return stages


def codec_of(run: Path) -> dict[str, Tensor]:
    state = load_tensors(run / "model.safetensors")
    return {name: tensor for name, tensor in state.items() if name.startswith("codec.")}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def change_codes(run: Path) -> None:
    """Replace the codebook in a run's files, as further training would."""
    for path, name in (
        (run / "model.safetensors", "codec.quantiser.embedding"),
        (run / "stages" / "codec" / "model.safetensors", "quantiser.embedding"),
    ):
        state = load_tensors(path)
        state[name] = state[name].roll(1, 0) + 0.1
        save_tensors(path, state)


# --- what is taken ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_only_the_prior_is_trained_on_a_taken_codec(
    key: str,
    first: Callable[[str], Path],
    train_run: TrainRun,
    steps: list[str],
    tmp_path: Path,
) -> None:
    """It gets the whole budget, and the codec of the other run bit for bit."""
    source, run = first(key), tmp_path / "run"
    steps.clear()
    trained = train_run(run, key, QUICK, steps=5, stages_from={"codec": source})
    assert steps == 5 * ["prior"]
    assert set(read_json(run / "cost.json")) == {"prior"}
    assert {line["stage"] for line in read_log(run / "metrics.jsonl")} == {"prior"}
    theirs, ours = codec_of(source), codec_of(run)
    assert len(theirs) > 8 and equal(theirs, ours) and float(ours["codec.running_mse"]) != 1.0
    saved = read_json(run / "config.json")
    assert saved["stages_from"]["codec"]["run"] == str(source)
    assert saved["codec"] == to_dict(preset(key, "smoke"))["codec"]  # of a codec not trained here
    prior: Any = trained.system
    assert isinstance(prior, Prior) and prior.grid_size == 16 // prior.codec.factor
    assert prior.codec.num_codes == 9 == prior.code_emb.num_embeddings
    assert not any(p.requires_grad for p in prior.codec.parameters())
    assert not prior.train().codec.training
    before = load_tensors(source / "model.safetensors")["code_emb.weight"]
    assert not torch.equal(before, load_tensors(run / "model.safetensors")["code_emb.weight"])


def test_a_codec_of_another_system_is_taken(
    first: Callable[[str], Path], train_run: TrainRun, tmp_path: Path
) -> None:
    """Every codec keeps one contract."""
    stages_from = {"codec": first("vqgan")}
    run = train_run(tmp_path / "run", "vqvae", QUICK, steps=2, stages_from=stages_from)
    assert isinstance(run.system.codec, VQGAN)
    assert equal(codec_of(first("vqgan")), codec_of(tmp_path / "run"))
    loaded = lineage.load(tmp_path / "run")
    expected = run.system.generate(CAPTIONS, seed=4)
    torch.testing.assert_close(loaded.generate(CAPTIONS, seed=4), expected)


def test_a_taken_codec_is_taken_again(
    first: Callable[[str], Path], train_run: TrainRun, tmp_path: Path
) -> None:
    """From a run that took it itself."""
    second, third = tmp_path / "second", tmp_path / "third"
    train_run(second, "vqvae", QUICK, steps=2, stages_from={"codec": first("vqvae")})
    train_run(third, "vqvae", QUICK, steps=2, stages_from={"codec": second})
    assert equal(codec_of(first("vqvae")), codec_of(third))


def test_the_key_of_a_taken_codec_is_that_of_its_weights(
    copied: Callable[[str], Path], first: Callable[[str], Path], tokenizer: WordTokenizer
) -> None:
    """Not of its folder; another codec gives the prior another key."""

    def keys(run: Path) -> dict[str, str]:
        config = preset("vqvae", "smoke")
        stages = runs.plan(config, tokenizer, {"codec": runs.source_of(run, "codec")})
        return {stage.name: stage.key({"data": "shapes"}) for stage in stages}

    source = copied("vqvae")
    before = keys(first("vqvae"))
    assert keys(source) == before
    change_codes(source)
    after = keys(source)
    assert after["codec"] != before["codec"] and after["prior"] != before["prior"]


FINITE = {**QUICK, "cache_size": 64, "train.precision": "fp32"}


def export_data(folder: Path, count: int = 24) -> str:
    """A data set that ends, so that all codes are cached."""
    export(load_dataset("shapes", "train", 16), folder, count)
    return f"imagefolder:{folder}"


@pytest.fixture
def codes_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(codes that the prior was trained on, codes of its codec) of each step."""
    pairs: list[tuple[Tensor, Tensor]] = []
    original = Prior.losses

    def losses(prior: Prior, batch: Batch, *arguments: Any) -> Any:
        pairs.append((batch.extra["codes"], prior.encode(batch.image)))
        return original(prior, batch, *arguments)

    monkeypatch.setattr(Prior, "losses", losses)
    return pairs


def test_the_prior_learns_the_codes_of_the_taken_codec(
    first: Callable[[str], Path],
    train_run: TrainRun,
    codes_read: list[tuple[Tensor, Tensor]],
    tmp_path: Path,
) -> None:
    data = export_data(tmp_path / "data")
    stages_from = {"codec": first("vqvae")}
    train_run(tmp_path / "run", "vqvae", FINITE, steps=8, data=data, stages_from=stages_from)
    assert len(codes_read) == 8 and all(torch.equal(*pair) for pair in codes_read)


# --- stopped and resumed ----------------------------------------------------------------------


def stop_at(stage: str, step: int, patch: pytest.MonkeyPatch) -> None:
    """Ask the run to stop after that many steps of a stage."""
    original = Trainer.advance

    def advance(trainer: Trainer, *arguments: Any) -> dict[str, Tensor]:
        values = original(trainer, *arguments)
        if trainer.stage == stage and trainer.step >= step:
            trainer._stop_requested = True
        return values

    patch.setattr(Trainer, "advance", advance)


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """All entries of a training state but its clock."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{at}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{at}.{number}")
    elif at not in (".seconds", ".cpu_seconds"):
        yield at, value


STOPPED = {**QUICK, "cache_size": 200, "train.checkpoint_every": 3}


@pytest.mark.parametrize("step", [3, 4])
def test_a_stopped_run_ends_like_an_unbroken_one(
    step: int,
    first: Callable[[str], Path],
    train_run: TrainRun,
    steps: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, and without naming the other run again."""
    whole, run, stages_from = tmp_path / "whole", tmp_path / "run", {"codec": first("vqvae")}
    train_run(whole, "vqvae", STOPPED, steps=7, stages_from=stages_from)
    with monkeypatch.context() as patch:
        stop_at("prior", step, patch)
        with pytest.raises(Interrupted, match="--resume"):
            train_run(run, "vqvae", STOPPED, steps=7, stages_from=stages_from)
    steps.clear()
    assert main(["train", "vqvae", "--out", str(run), "--resume"]) == 0
    assert steps == (7 - step) * ["prior"]
    one, other = (folder / "model.safetensors" for folder in (whole, run))
    assert one.read_bytes() == other.read_bytes()
    states = [dict(leaves(load_state(folder / "state.pt"))) for folder in (whole, run)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        mine = states[1][name]
        assert torch.equal(value, mine) if isinstance(value, Tensor) else value == mine, name


def test_a_longer_budget_trains_the_prior_alone(
    first: Callable[[str], Path], train_run: TrainRun, steps: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_run(run, "vqvae", QUICK, steps=3, stages_from={"codec": first("vqvae")})
    steps.clear()
    assert main(["train", "vqvae", "--out", str(run), "--resume", "--steps", "5"]) == 0
    assert steps == ["prior", "prior"]
    assert equal(codec_of(first("vqvae")), codec_of(run))


def test_a_longer_budget_leaves_the_run_s_own_codec_as_it_is(
    train_run: TrainRun,
    codes_read: list[tuple[Tensor, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prior draws with the codec whose codes it learnt before and learns now."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    data, run = export_data(tmp_path / "data"), tmp_path / "run"
    settings = {**FINITE, "codec_optim.lr": 0.02, "codec_optim.ema_decay": 0.0}
    train_run(run, "vqvae", settings, steps=10, data=data)
    before = codec_of(run)
    train_run(run, "vqvae", {}, steps=30, resume=True)
    assert equal(codec_of(run), before)
    assert all(torch.equal(*pair) for pair in codes_read)
    finished = load_tensors(run / "stages" / "codec" / "model.safetensors")
    assert equal({f"codec.{name}": t for name, t in finished.items()}, before)


def test_a_codec_that_is_trained_on_meanwhile_is_another_one(
    copied: Callable[[str], Path],
    train_run: TrainRun,
    codes_read: list[tuple[Tensor, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resumed run keeps the codec that it took; the next run takes the new one."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    data, run, source = export_data(tmp_path / "data"), tmp_path / "run", copied("vqvae")
    before = codec_of(source)
    options: dict[str, Any] = {"steps": 4, "stages_from": {"codec": source}}
    with monkeypatch.context() as patch:
        stop_at("prior", 2, patch)
        with pytest.raises(Interrupted):
            train_run(run, "vqvae", FINITE, data=data, **options)
    change_codes(source)
    train_run(run, "vqvae", {}, resume=True)
    assert equal(codec_of(run), before) and not equal(codec_of(source), before)
    train_run(tmp_path / "next", "vqvae", FINITE, data=data, **options)
    assert equal(codec_of(source), codec_of(tmp_path / "next"))
    assert all(torch.equal(*pair) for pair in codes_read)


# --- without the other run --------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_the_other_run_is_not_needed_any_more(
    key: str, copied: Callable[[str], Path], train_run: TrainRun, tmp_path: Path
) -> None:
    """Neither to draw nor to train on."""
    source, run = copied(key), tmp_path / "run"
    trained = train_run(run, key, QUICK, steps=2, stages_from={"codec": source})
    before = codec_of(source)
    shutil.rmtree(source)
    expected = trained.system.generate(CAPTIONS, seed=4)
    torch.testing.assert_close(lineage.load(run).generate(CAPTIONS, seed=4), expected)
    sheet = tmp_path / "sheet.png"
    assert main(["sample", str(run), "a red circle", "--out", str(sheet)]) == 0
    assert sheet.is_file()
    assert main(["train", key, "--out", str(run), "--resume", "--steps", "4"]) == 0
    assert equal(codec_of(run), before)


def test_a_taken_vqgan_needs_no_files_of_lpips(
    copied: Callable[[str], Path], train_run: TrainRun, tmp_path: Path
) -> None:
    """They are needed for training alone."""
    source = copied("vqgan")
    saved = read_json(source / "config.json")
    saved["codec"]["lpips"] = ["/absent/vgg16.pth", "/absent/lpips.pth"]
    write_json(source / "config.json", saved)
    run = train_run(tmp_path / "run", "vqgan", QUICK, steps=2, stages_from={"codec": source})
    assert run.system.codec.lpips is None
    assert lineage.load(source).codec.num_codes == 9  # type: ignore[attr-defined]


# --- refused ----------------------------------------------------------------------------------

Refused = Callable[..., None]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Train on the codec of `source`; expect one sentence with all the words, exit code 2 and no
    run folder.
    """

    def refused(
        source: Path | str,
        *words: str,
        key: str = "vqvae",
        stage: str = "codec",
        settings: Any = (),
    ) -> None:
        capfd.readouterr()
        run = tmp_path / "run"
        arguments = ["train", key, "--preset", "smoke", "--out", str(run)]
        arguments += ["--from", f"{stage}={source}"]
        arguments += [part for setting in settings for part in ("--set", setting)]
        assert main(arguments) == 2
        out, errors = capfd.readouterr()
        assert out == "" and "Traceback" not in errors
        (line,) = errors.strip().splitlines()
        assert line.startswith("lineage: ") and all(word in line for word in words), line
        assert not run.exists()

    return refused


def test_a_folder_that_is_no_run_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for name in ("absent", "empty", "file"):
        refused(tmp_path / name, str(tmp_path / name))


def test_unknown_stages_are_refused(first: Callable[[str], Path], refused: Refused) -> None:
    """With the nearest name; and a system without a codec takes none."""
    refused(first("vqvae"), "'codek'", "codec", stage="codek")
    refused(first("vqvae"), "ddpm has no stage 'codec'", key="ddpm")


def test_the_last_stage_is_not_taken(first: Callable[[str], Path], refused: Refused) -> None:
    """It is all that there is to train: a prior of another codec's codes least of all."""
    refused(first("vqvae"), "prior", stage="prior")
    refused(first("vqgan"), "prior", stage="prior")


def test_a_run_without_a_codec_is_refused(
    smoke_run: Callable[[str], Any], refused: Refused
) -> None:
    refused(smoke_run("retrieval").folder, "has no stage 'codec'")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("stages/codec/model.safetensors", None),
        ("stages/codec/model.safetensors", b""),
        ("stages/codec/model.safetensors", b"cut short"),
        ("config.json", None),
        ("config.json", b""),
        ("config.json", b"[1, 2]"),
        ("config.json", b'"vqvae"'),
        ("config.json", b"{}"),
        ("config.json", b'{"key": "vqvae", "codec": 3}'),
        ("config.json", b'{"key": "vqvae", "codec": {"channels": "many"}}'),
        ("config.json", b'{"key": "vqvae", "codec": {"colour": 3}}'),
        ("tokenizer.json", None),
    ],
)
def test_a_run_with_a_broken_file_is_refused(
    name: str, content: bytes | None, copied: Callable[[str], Path], refused: Refused
) -> None:
    source = copied("vqvae")
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    refused(source)


def test_truncated_weights_are_refused(copied: Callable[[str], Path], refused: Refused) -> None:
    source = copied("vqvae")
    path = source / "stages" / "codec" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(source, "model.safetensors")


def test_weights_of_other_sizes_are_refused(
    copied: Callable[[str], Path], refused: Refused
) -> None:
    source = copied("vqvae")
    path = source / "stages" / "codec" / "model.safetensors"
    state = load_tensors(path)
    state["quantiser.embedding"] = state["quantiser.embedding"][:-1]
    save_tensors(path, state)
    refused(source, str(path))


@pytest.mark.parametrize(
    "setting", ["codec.quantiser.num_codes=10", "codec.channels=12", "codec_optim.lr=0.5"]
)
def test_settings_of_the_stage_that_is_taken_are_refused(
    setting: str, first: Callable[[str], Path], refused: Refused
) -> None:
    """They would have no effect."""
    refused(first("vqvae"), setting.split("=")[0], "no effect", settings=[setting])


def test_other_settings_are_not(
    first: Callable[[str], Path], train_run: TrainRun, tmp_path: Path
) -> None:
    """Neither those of the prior nor those on which no weights depend."""
    settings = {**QUICK, "cache_size": 64, "model.text_len": 5, "optim.lr": 0.01, "seed": 3}
    stages_from = {"codec": first("vqvae")}
    train_run(tmp_path / "run", "vqvae", settings, steps=2, stages_from=stages_from)


def test_a_size_that_the_taken_codec_does_not_fit_is_refused(
    first: Callable[[str], Path], refused: Refused
) -> None:
    refused(first("vqvae"), "size=20 is not divisible by 8", settings=["size=20"])


def test_another_size_that_fits_is_not(
    first: Callable[[str], Path], train_run: TrainRun, tmp_path: Path
) -> None:
    """The codec was trained on pictures of 16 pixels, each code covers 8."""
    stages_from = {"codec": first("vqvae")}
    run = train_run(
        tmp_path / "run", "vqvae", {**QUICK, "size": 24}, steps=2, stages_from=stages_from
    )
    assert run.system.grid_size == 3


def test_a_codec_whose_training_was_interrupted_is_refused(
    train_run: TrainRun, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    with monkeypatch.context() as patch:
        stop_at("codec", 1, patch)
        with pytest.raises(Interrupted):
            train_run(source, "vqvae", QUICK, steps=10)
    refused(source, "codec", "not finished", "--resume")


def test_a_resumed_run_cannot_take_another_codec(
    first: Callable[[str], Path], train_run: TrainRun, tmp_path: Path
) -> None:
    """Its prior has learnt the codes of the codec that it has."""
    run, own = tmp_path / "run", tmp_path / "own"
    train_run(run, "vqvae", QUICK, steps=2, stages_from={"codec": first("vqvae")})
    train_run(own, "vqvae", QUICK, steps=2)
    before = codec_of(run)
    for folder in (run, own):
        with pytest.raises(UserError, match="cannot be changed"):
            train_run(
                folder, "vqvae", {}, resume=True, steps=4, stages_from={"codec": first("vqgan")}
            )
    assert equal(codec_of(run), before)
