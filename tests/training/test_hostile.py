"""Run folders from strangers and from failing disks: one sentence, or the very same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZE, Answer
from torch import Tensor

from lineage import runs
from lineage.cache import cache_folder
from lineage.data import load_dataset
from lineage.data.tools import export
from lineage.errors import Interrupted, UserError
from lineage.evaluation import cost
from lineage.training.log import read_log
from lineage.training.loop import Trainer
from lineage.training.store import load_state, load_tensors, save_state, save_tensors, write_json

Call = Callable[..., Answer]
Resume = Callable[[], Answer]
State = dict[str, Any]

SETTINGS = {
    "train.batch_size": 2,
    "train.checkpoint_every": 2,
    "train.sample_every": 0,
    "train.log_every": 1,
}
STEPS = 8
STOPPED = 2  # step of the prior
NEEDED = ("config.json", "tokenizer.json", "model.safetensors")  # to draw; two of them to go on
POSIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX files")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing has disturbed."""
    return train_in(tmp_path_factory.mktemp("whole"), None)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped in its last stage."""
    return train_in(tmp_path_factory.mktemp("half"), STOPPED)


def train_in(place: Path, stop: int | None) -> Path:
    """A run of two stages in `place`, with a cache of its own; stopped at a step of the prior."""
    original, folder = Trainer.advance, place / "run"

    def advance(trainer: Trainer, *arguments: Any) -> Any:
        trainer._stop_requested = (trainer.stage, trainer.step + 1) == ("prior", stop)
        return original(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "advance", advance)
        patched.setenv("LINEAGE_CACHE", str(place / "cache"))
        data = place.parent / "hostile"
        if not data.exists():
            export(load_dataset("shapes", "train", SIZE), data, 8)
        options: Any = {"data": str(data), "steps": STEPS, "settings": SETTINGS}
        try:
            runs.train("vqvae", preset="smoke", out=folder, **options)
        except Interrupted:
            assert load_state(folder / "state.pt")["step"] == stop
    return folder


@pytest.fixture
def stopped(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stopped run and of its cache, which a test may damage."""
    shutil.copytree(half.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "run"


@pytest.fixture
def resume(call: Call, stopped: Path) -> Resume:
    """Go on with the stopped run."""
    return lambda: call("train", "vqvae", "--out", stopped, "--resume")


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that waits for a pipe ends."""
    if not hasattr(signal, "alarm"):
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def one_sentence(answer: Answer) -> bool:
    """Whether a command was refused in one sentence, perhaps after other remarks of one line."""
    lines = answer.errors.splitlines()
    return answer.code == 2 and bool(lines) and all(line.startswith("lineage: ") for line in lines)


def assert_refused_or_same(answer: Answer, folder: Path, whole: Path) -> None:
    """A damaged run is refused, or it ends with the weights of one that was never damaged."""
    if not one_sentence(answer):
        assert answer.code == 0, answer
        expected = load_tensors(whole / "model.safetensors")
        for name, tensor in load_tensors(folder / "model.safetensors").items():
            assert torch.equal(tensor, expected[name]), name


def test_the_stopped_run_ends_like_the_whole_one(
    resume: Resume, stopped: Path, whole: Path
) -> None:
    """What the tests below compare with."""
    assert resume().code == 0
    expected = (whole / "model.safetensors").read_bytes()
    assert (stopped / "model.safetensors").read_bytes() == expected


# --- training states of strangers -----------------------------------------------------------------


def moments(state: State) -> dict[str, Any]:
    """What the optimiser holds for its first matrix."""
    (group,) = state["groups"].values()
    return next(m for m in group["optimizer"]["state"].values() if m["exp_avg"].dim() > 1)


def moment(name: str, change: Callable[[Tensor], Any]) -> Callable[[State], None]:
    def apply(state: State) -> None:
        moments(state)[name] = change(moments(state)[name])

    return apply


def weight(change: Callable[[Tensor], Any]) -> Callable[[State], None]:
    def apply(state: State) -> None:
        name = next(n for n, w in state["weights"].items() if w.dim() > 1)
        state["weights"][name] = change(state["weights"][name])

    return apply


def average(change: Callable[[list[Tensor]], Any]) -> Callable[[State], None]:
    def apply(state: State) -> None:
        (group,) = state["groups"].values()
        group["average"] = change(group["average"])

    return apply


def first(change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], Any]:
    """Change the first matrix of a list."""

    def apply(tensors: list[Tensor]) -> list[Any]:
        at = next(i for i, tensor in enumerate(tensors) if tensor.dim() > 1)
        return [*tensors[:at], change(tensors[at]), *tensors[at + 1 :]]

    return apply


def optimizer_option(name: str, value: Any) -> Callable[[State], None]:
    def apply(state: State) -> None:
        (group,) = state["groups"].values()
        for part in group["optimizer"]["param_groups"]:
            part[name] = value

    return apply


def entry(name: str, value: Any) -> Callable[[State], None]:
    return lambda state: state.update({name: value})


def expanded(tensor: Tensor) -> Tensor:
    """Zeros of the same shape that take the memory of one number."""
    return torch.zeros(1).expand(tensor.shape)


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "no dimension": lambda t: torch.tensor(0.0),
    "expanded": expanded,
    "sparse": lambda t: t.to_sparse(),
    "on no device": lambda t: t.to("meta"),
    "whole numbers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "half": lambda t: t.half(),
    "another shape": lambda t: t.flatten(),
    "larger": lambda t: torch.zeros(2, *t.shape),
    "empty": lambda t: torch.zeros(0),
    "none": lambda t: None,
    "a list": lambda t: t.tolist(),
    "text": lambda t: "zeros",
}
CHANGES: dict[str, Callable[[State], None]] = {
    **{f"exp_avg, {name}": moment("exp_avg", change) for name, change in TENSORS.items()},
    "exp_avg_sq, expanded": moment("exp_avg_sq", expanded),
    "step, matrix": moment("step", lambda t: torch.ones(3, 3)),
    "step, number": moment("step", lambda t: 2),
    "moment missing": lambda state: moments(state).pop("exp_avg_sq"),
    "moment too many": lambda state: moments(state).update(max_exp_avg_sq=torch.zeros(1)),
    **{f"weight, {name}": weight(change) for name, change in TENSORS.items()},
    **{
        f"average, {name}": average(lambda a, c=c: [c(a[0]), *a[1:]]) for name, c in TENSORS.items()
    },
    "average, short": average(lambda tensors: tensors[:-1]),
    "average, none": average(lambda tensors: None),
    "betas, none": optimizer_option("betas", None),
    "lr, text": optimizer_option("lr", "fast"),
    "params, text": optimizer_option("params", "all"),
    "params, too many": optimizer_option("params", [0, 1]),
    **{f"step {value!r}": entry("step", value) for value in (-1, True, "2", None, [])},
    **{f"seconds {value!r}": entry("seconds", value) for value in ("x", None, [], {})},
    **{f"stage {value!r}": entry("stage", value) for value in ("codec", "../x", None, [], 3)},
    **{f"groups {value!r}": entry("groups", value) for value in ({}, [], None)},
    **{f"weights {value!r}": entry("weights", value) for value in ({}, [], None, {3: 4})},
    **{f"keys {value!r}": entry("keys", value) for value in ([], {"prior": 3}, {3: "x"}, "x")},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_state_of_a_stranger(name: str, resume: Resume, stopped: Path, whole: Path) -> None:
    """It is data: shapes, kinds and types are checked before use."""
    state = load_state(stopped / "state.pt")
    CHANGES[name](state)
    save_state(stopped / "state.pt", state)
    assert_refused_or_same(resume(), stopped, whole)


@pytest.mark.parametrize(
    "key", ["{outside}", "../../outside", "..", "", "codec", "codec-" + "0" * 24]
)
def test_a_state_names_no_file_outside(
    key: str, resume: Resume, stopped: Path, whole: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "elsewhere" / "outside"
    state = load_state(stopped / "state.pt")
    save_state(stopped / "state.pt", {**state, "keys": {"codec": key.format(outside=outside)}})
    shutil.rmtree(tmp_path / "cache")
    config = json.loads((stopped / "config.json").read_text())
    load_dataset(config["data"], "train", config["size"])  # its pixels are in the cache again
    answer = resume()
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "cache"}
    assert_refused_or_same(answer, stopped, whole)


# --- damage ---------------------------------------------------------------------------------------


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    """`data` with one bit flipped, and with 512 bytes zeroed, at spread places."""
    for part in range(20):
        at = round((len(data) - 1) * part / 19)
        flipped, zeroed = bytearray(data), bytearray(data)
        flipped[at] ^= 1 << part % 8
        zeroed[at : at + 512] = bytes(len(zeroed[at : at + 512]))
        yield f"bit flipped at {at}", bytes(flipped)
        if zeroed != data:
            yield f"zeroed at {at}", bytes(zeroed)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors in them bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "stages/codec/model.safetensors", "state.pt"]
)
def test_a_damaged_file_is_never_read_as_another(name: str, stopped: Path) -> None:
    path = stopped / name
    read: Callable[[Path], Any] = load_state if name == "state.pt" else load_tensors
    data, expected = path.read_bytes(), read(path)
    sentences = []
    for where, content in damaged(data):
        path.write_bytes(content)
        try:
            assert same(read(path), expected), where
        except UserError as error:
            sentences.append(str(error))
    assert len(sentences) > 20
    assert all(name in sentence and "\n" not in sentence for sentence in sentences)


@pytest.mark.parametrize("share", [0.1, 0.5, 1])
def test_a_damaged_model_is_refused(share: float, call: Call, stopped: Path) -> None:
    data = bytearray((stopped / "model.safetensors").read_bytes())
    data[round((len(data) - 1) * share)] ^= 1
    (stopped / "model.safetensors").write_bytes(data)
    answer = call("sample", stopped, "a red circle")
    assert one_sentence(answer) and "model.safetensors" in answer.errors


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
@pytest.mark.parametrize("name", ["cache", "stages", "both"])
def test_a_damaged_finished_stage_is_trained_again(
    name: str, damage: str, resume: Resume, stopped: Path, whole: Path
) -> None:
    (cached,) = cache_folder("stages").glob("codec-*/model.safetensors")
    own = stopped / "stages" / "codec" / "model.safetensors"
    for path in {"cache": [cached], "stages": [own], "both": [cached, own]}[name]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes({"flip": data, "cut": data[:-9], "empty": b""}[damage])
    answer = resume()
    assert answer.code == 0, answer
    assert_refused_or_same(answer, stopped, whole)
    expected = load_tensors(whole / "stages" / "codec" / "model.safetensors")
    assert same(load_tensors(own), expected) and same(load_tensors(cached), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_reported(value: float, call: Call, stopped: Path) -> None:
    tensors = load_tensors(stopped / "model.safetensors")
    filled = {n: t.fill_(value) if t.is_floating_point() else t for n, t in tensors.items()}
    save_tensors(stopped / "model.safetensors", filled)
    answer = call("sample", stopped, "a red circle")
    assert one_sentence(answer) and "model.safetensors" in answer.errors


def test_a_state_that_is_no_numbers_is_reported(resume: Resume, stopped: Path) -> None:
    state = load_state(stopped / "state.pt")
    for tensor in state["weights"].values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    save_state(stopped / "state.pt", state)
    before = (stopped / "model.safetensors").read_bytes()
    answer = resume()
    assert answer.code in (1, 2) and answer.errors.count("lineage: ") == 1, answer
    assert (stopped / "model.safetensors").read_bytes() == before


# --- logs and costs -------------------------------------------------------------------------------

JUNK = {
    "half a line": b'{"stage": "pri',
    "another bracket": b'[{"stage": "prior", "step": 1}',
    "no UTF-8": b"\xff\xfe\x80",
    "a list": b"[1,2]",
    "null": b"null",
    "a number": b"7",
    "no step": b'{"stage": "prior"}',
    "a step in words": b'{"stage": "prior", "step": "one", "seconds": 1}',
    "no stage": b'{"step": 1, "seconds": 1}',
    "a stage that is none": b'{"stage": ["prior"], "step": 1, "seconds": 1}',
    "deep": b"[" * 100_000,
    "long number": b'{"stage": "prior", "step": ' + b"9" * 5000 + b', "seconds": 1}',
    "line separator": '{"stage": "x\u2028y\x85", "step": 1, "seconds": 1}'.encode(),
    "zero bytes": bytes(512),
}


@pytest.mark.parametrize("name", JUNK)
def test_a_damaged_line_of_the_log_costs_no_other(
    name: str, resume: Resume, stopped: Path, whole: Path
) -> None:
    """At the beginning, and between two good ones."""
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    assert len(lines) > 2
    path.write_bytes(b"\n".join([JUNK[name], *lines[:2], JUNK[name], *lines[2:]]) + b"\n")
    answer = resume()
    assert answer.code == 0, answer
    assert [line for line in path.read_bytes().split(b"\n") if line in lines] == lines
    expected = [(line["stage"], line["step"]) for line in read_log(whole / "metrics.jsonl")]
    steps = [(line["stage"], line["step"]) for line in read_log(path)]
    assert [step for step in steps if step in expected] == expected


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"{", b"", b"\xff", b'{"prior": []}'])
def test_a_damaged_cost_is_written_again(
    content: bytes, resume: Resume, stopped: Path, whole: Path
) -> None:
    (stopped / "cost.json").write_bytes(content)
    assert resume().code == 0
    after, expected = (json.loads((run / "cost.json").read_text()) for run in (stopped, whole))
    assert after["prior"]["steps"] == expected["prior"]["steps"]


@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b"{", b"", b"\xff", b'{"measured_on": []}', b'{"measured_on": 3, "cost": 4}'],
)
def test_a_damaged_measurement_is_measured_again(
    content: bytes, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stopped / "evaluation" / "cost.json"
    path.parent.mkdir()
    path.write_bytes(content)
    first, second = ({"parameters": {"all": n}, **dict.fromkeys(cost.NUMBERS, n)} for n in (5, 6))
    monkeypatch.setattr(cost, "measure", lambda *_: first)
    assert cost.cached_cost(stopped, ["a star"]) == first
    monkeypatch.setattr(cost, "measure", lambda *_: second)
    assert cost.cached_cost(stopped, ["a star"]) == first  # it is in the file now
    for junk in ([], {}, {"parameters": 5}, {**first, "model_bytes": "5"}):
        write_json(path, {**json.loads(path.read_text()), "cost": junk})
        assert cost.cached_cost(stopped, ["a star"]) == second


# --- files that are none --------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def lost(path: Path) -> None:
    path.symlink_to("nowhere")


@POSIX
@pytest.mark.parametrize("make", [pipe, endless, Path.mkdir, loop, lost])
@pytest.mark.parametrize("name", [*NEEDED, "state.pt", "metrics.jsonl", "cost.json"])
def test_a_file_that_is_none(
    name: str,
    make: Callable[[Path], None],
    call: Call,
    resume: Resume,
    stopped: Path,
    whole: Path,
) -> None:
    """Nothing waits for a pipe or reads a device, and what a command needs is named."""
    (stopped / name).unlink()
    make(stopped / name)
    if name in NEEDED:
        sampled = call("sample", stopped, "a red circle")
        assert one_sentence(sampled) and name in sampled.errors
    if name == "model.safetensors" or (name, make) == ("cost.json", Path.mkdir):
        return  # training does not read them; a checkpoint finds that they cannot be written
    resumed = resume()
    assert_refused_or_same(resumed, stopped, whole)
    assert name not in NEEDED or (resumed.code == 2 and name in resumed.errors)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures peaks")
def test_a_zip_bomb_is_not_unpacked(resume: Resume, stopped: Path) -> None:
    size = 256 * 1024**2
    with zipfile.ZipFile(stopped / "state.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        bomb.writestr("state/data.pkl", b"\x80\x02}q\x00.")
        bomb.writestr("state/version", b"3\n")
        bomb.writestr("state/data/0", bytes(size))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = memory("VmRSS")
    answer = resume()
    assert one_sentence(answer) and "state.pt" in answer.errors
    assert memory("VmHWM") - before < size / 2


def memory(name: str) -> int:
    """Bytes of this process, as the system counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


@POSIX
def test_an_alarm_ends_a_test_that_hangs() -> None:
    with pytest.raises(TimeoutError):
        signal.raise_signal(signal.SIGALRM)
