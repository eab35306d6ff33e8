"""Pictures of other programs: the run's own pictures have the run's scores, and every fault is one
sentence.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer
from PIL import Image

import lineage
from lineage.data.contract import to_bytes
from lineage.errors import UserError
from lineage.evaluation import real
from lineage.evaluation.prompt_files import read_prompt_file, write_prompts
from lineage.evaluation.prompts import KINDS, make_prompts, read_prompts
from lineage.evaluation.table import score_tables, tables
from lineage.sheets import picture, save_picture

ROOT = Path(lineage.__file__).parent.parent
COUNT = 70  # captions: more than the judge has features
SIZE = 16

Call = Callable[..., Answer]
Lines = list[dict[str, Any]]


def assert_refused(answer: Answer, *words: str) -> None:
    """One sentence on standard error that holds `words`, and nothing else."""
    assert (answer.code, answer.out, answer.errors.count("\n")) == (2, "", 1), answer
    assert answer.errors.startswith("lineage: ")
    assert all(word in answer.errors for word in words), answer.errors


def lines_of(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True, scope="module")
def few_training_pictures() -> Iterator[None]:
    """Enough for a nearest one, and seconds instead of half a minute."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(real, "TRAINING_PICTURES", 200)
        yield


@pytest.fixture(scope="module")
def run(train_run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside") / "gan"
    return Path(train_run(folder, "gan_int_cls", {}, steps=2, seed=3).folder)


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    """All that an evaluation of the run draws."""
    path = run.parent / "prompts.jsonl"
    write_prompts(path, run=run, count=COUNT)
    return path


@pytest.fixture(scope="module")
def drawn(run: Path, file: Path) -> Path:
    """The run's pictures, drawn with `generate` alone."""
    folder, system = run.parent / "drawn", lineage.load(run)
    lines = lines_of(file)
    for kind in KINDS:
        own = [line for line in lines if line["kind"] == kind]
        assert [line["index"] for line in own] == list(range(len(own)))
        (seed,) = {line["seed"] for line in own}
        images = to_bytes(system.generate([line["prompt"] for line in own], seed=seed))
        for line, image in zip(own, images, strict=True):
            save_picture(picture(image), folder / line["file_name"])
    return folder


@pytest.fixture(scope="module")
def document(run: Path, file: Path, drawn: Path) -> dict[str, Any]:
    """The run and the folder in one table."""
    return lineage.evaluate(run, pictures=drawn, prompts=file, out=run.parent / "scores")


@pytest.fixture(scope="module")
def few(file: Path) -> Path:
    """Four prompts in GenEval's own schema, one of each of four tasks."""
    keys = ("tag", "include", "exclude", "prompt")
    lines = [{key: line[key] for key in keys if key in line} for line in lines_of(file)[:360:90]]
    return write(file.parent / "few.jsonl", lines)


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """A folder of four pictures whose names say nothing."""
    for number in (1, 2, 9, 10):
        image = np.full((SIZE, SIZE, 3), 10 * number, np.uint8)
        (tmp_path / "some").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "some" / f"{number}.png")
    return tmp_path / "some"


def composition(pictures: Path, prompts: Path, **options: Any) -> dict[str, Any]:
    """The document of pictures of prompts alone, quickly."""
    return lineage.evaluate(pictures=pictures, prompts=prompts, scorer="none", **options)


# --- the file of prompts --------------------------------------------------------------------------


def test_the_file_has_all_that_an_evaluation_draws(run: Path, file: Path) -> None:
    lines = lines_of(file)
    kinds = [line["kind"] for line in lines]
    prompts = make_prompts("easy")
    assert [kinds.count(kind) for kind in KINDS] == [len(prompts), COUNT, 20]
    assert kinds == sorted(kinds, key=KINDS.index)
    assert len({line["file_name"] for line in lines}) == len(lines)
    for line in lines:
        assert (line["data"], line["data_seed"], line["size"]) == ("shapes:easy", 3, SIZE)
        assert line["seed"] == KINDS.index(line["kind"])
    unseen = lineage.load_dataset("shapes", "validation", SIZE, 3)
    captions = [line["prompt"] for line in lines if line["kind"] == "caption"]
    assert set(captions) <= {unseen[i].captions[0] for i in range(len(unseen))}
    assert read_prompts(file) == prompts  # as `evaluate RUN --prompts` reads it


@pytest.mark.parametrize(
    ("data", "kinds"),
    [("shapes:easy:ru", KINDS), (str(ROOT / "data" / "example"), KINDS[1:])],
    ids=["russian", "own"],
)
def test_prompts_of_other_data(
    data: str, kinds: tuple[str, ...], call: Call, tmp_path: Path
) -> None:
    """In its language; pictures that no judge reads have captions and samples alone."""
    answer = call("prompts", "--data", data, "--count", 9, "--seed", 5, "--out", "p.jsonl")
    assert answer.code == 0 and answer.errors == ""
    first, second = answer.out.splitlines()
    assert re.fullmatch(r"p\.jsonl: (532 prompts, )?[89] captions, \d+ samples", first)
    assert ("532 prompts" in first) == (kinds == KINDS)
    assert second.endswith("lineage evaluate --pictures FOLDER --prompts p.jsonl")
    lines = lines_of(tmp_path / "p.jsonl")
    assert {line["kind"]: line["seed"] for line in lines} == {
        kind: 5 + KINDS.index(kind) for kind in kinds
    }
    if kinds == KINDS:
        assert lines[0]["prompt"] == make_prompts("easy", ("ru",))[0].prompt
        assert all("а" <= line["prompt"][0] <= "я" for line in lines if line["kind"] != "prompt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--out .", ["Could not write"]),
        ("--data shaps --out p", ["'shaps'"]),
        ("--run nowhere --out p", ["nowhere"]),
        ("--run pretrained:ldm --size 8 --out p", ["--size 8", "--run"]),
        ("--count 0 --out p", ["--count"]),
        ("", ["--out"]),
    ],
)
def test_prompts_that_cannot_be_written(arguments: str, words: list[str], call: Call) -> None:
    assert_refused(call("prompts", *arguments.split()), *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "captions"}, ["line 2", "'captions'", "prompt, caption, sample"]),
        ({"prompt": 3}, ["line 2", "its prompt is 3"]),
        ({"file_name": "../a.png"}, ["line 2", "'../a.png'", "leads out"]),
        ({"file_name": "/a.png"}, ["line 2", "leads out"]),
        ({"file_name": "C:\\a.png"}, ["line 2", "leads out"]),
        ({"file_name": ""}, ["line 2", "not the name of a file"]),
        ({"file_name": "prompts/0000.jpg"}, ["two lines", "prompts/0000.jpg"]),
        ({"seed": -1}, ["line 2", "its seed is -1"]),
        ({"index": "0"}, ["line 2", "its index is '0'"]),
        ({"data": "shapes:hard"}, ["shapes:easy at 16 pixels", "shapes:hard at 16 pixels"]),
        ({"level": 1}, ["line 2", "its level is 1"]),
    ],
)
def test_lines_that_are_none(
    change: dict[str, Any], words: list[str], file: Path, tmp_path: Path
) -> None:
    lines = lines_of(file)[:2]
    path = write(tmp_path / "p.jsonl", [lines[0], lines[1] | change])
    with pytest.raises(UserError) as error:
        read_prompt_file(path)
    assert all(word in str(error.value) for word in ["p.jsonl", *words]), error.value


# --- scores ---------------------------------------------------------------------------------------


def test_the_pictures_of_a_run_have_its_scores(
    run: Path, file: Path, drawn: Path, document: dict[str, Any]
) -> None:
    """To the last digit, in every section that pictures decide; the run's were drawn without the
    file.
    """
    (own,) = lineage.evaluate(run, pictures=COUNT)["runs"]
    of_run, of_folder = document["runs"]
    assert of_run == own
    sections = ("composition", "failed", "quality", "diversity", "memorisation", "text_fit")
    assert set(of_folder) == {"run", "system", *sections}
    for section in sections:
        assert of_folder[section] == own[section], section
    assert (of_folder["run"], of_folder["system"]) == (str(drawn), "drawn")
    assert document["protocol"]["pictures"][str(drawn)] == {
        "prompts": file.name,
        "assigned": "by file names",
        "pictures": {"prompt": 532, "caption": COUNT, "sample": 20},
    }
    assert str(drawn) not in " ".join(document["warnings"])


def test_a_folder_alone_has_the_same_rows(
    file: Path, drawn: Path, document: dict[str, Any], call: Call
) -> None:
    answer = call("evaluate", "--pictures", drawn, "--prompts", file, "--json")
    assert answer.code == 0
    alone = json.loads(answer.out)
    assert alone["runs"] == document["runs"][1:]
    for row in ("real", "shuffled", "judge", "data", "size"):
        assert alone[row] == document[row]


def test_the_table_has_a_dash_for_the_cost(document: dict[str, Any]) -> None:
    by_title = {table.title: table for table in score_tables(document)}
    cost, quality = by_title["Cost"], by_title["Quality, diversity and memorisation"]
    assert set(cost.rows["drawn"]) == {"–"} and "–" not in cost.rows["gan_int_cls"][:5]
    assert quality.rows["drawn"] == quality.rows["gan_int_cls"]


def test_files_are_written_for_folders_too(run: Path, document: dict[str, Any]) -> None:
    names = {path.name for path in (run.parent / "scores").iterdir()}
    kinds = ("failed", "nearest")
    assert names == {"scores.json", *(f"{n}_{k}.png" for n in ("gan", "drawn") for k in kinds)}


def test_sample_draws_the_same_files(run: Path, file: Path, drawn: Path, call: Call) -> None:
    """Whole files, and lines without the others."""
    lines = lines_of(file)
    path = write(Path("p.jsonl"), [*lines[5:9], *lines[300:302], lines[540], *lines[-2:]])
    answer = call("sample", run, "--prompts", path, "--out", "mine")
    assert (answer.code, answer.out) == (0, "mine: 9 pictures\n")
    names = sorted(str(one.relative_to("mine")) for one in Path("mine").rglob("*.png"))
    assert names == sorted(line["file_name"] for line in lines_of(path))
    for name in names:
        with Image.open(Path("mine", name)) as one, Image.open(drawn / name) as other:
            assert one.tobytes() == other.tobytes(), name


def test_sample_draws_a_file_of_genevals_lines(run: Path, few: Path, call: Call) -> None:
    """Under --seed, since its lines have none."""
    assert call("sample", run, "--prompts", few, "--out", "mine", "--seed", 4).code == 0
    images = to_bytes(lineage.load(run).generate([p.prompt for p in read_prompts(few)], seed=4))
    for number, image in enumerate(images):
        with Image.open(f"mine/prompts/{number:04d}.png") as one:
            assert np.array_equal(np.array(one), image.permute(1, 2, 0).numpy())


def test_composition_alone(some: Path, few: Path) -> None:
    """A file of GenEval's lines; names that say nothing are taken in their order, 2 before 10."""
    document = composition(some, few, data="shapes:easy")
    (row,) = document["runs"]
    assert set(row) == {"run", "system", "composition", "failed"}
    assert document["protocol"]["pictures"][str(some)]["assigned"] == "by the order of file names"
    text = tables(document)
    assert "some" in text and "Quality" not in text and "order of their names, from 1.png" in text
    assert "to 10.png" in text and "few.jsonl lacks captions or samples" in text


def test_pictures_of_other_sizes_are_resized(
    few: Path, file: Path, drawn: Path, tmp_path: Path
) -> None:
    """And the document says so; a picture enlarged by a whole factor shows the same."""
    lines = [line for line in lines_of(file) if line["prompt"] in few.read_text()][:4]
    path = write(tmp_path / "p.jsonl", lines)
    for line in lines:
        with Image.open(drawn / line["file_name"]) as image:
            large = image.resize((64, 64), Image.Resampling.NEAREST)
            (tmp_path / "large" / line["file_name"]).parent.mkdir(parents=True, exist_ok=True)
            large.save(tmp_path / "large" / line["file_name"])
    document = composition(tmp_path / "large", path)
    assert document["size"] == SIZE
    protocol = document["protocol"]["pictures"][str(tmp_path / "large")]
    assert protocol["resized"] == "from 64 x 64"
    assert "large were resized from 64 x 64 to 16 x 16" in tables(document)
    large.resize((64, 48)).save(tmp_path / "large" / lines[0]["file_name"])
    protocol = composition(tmp_path / "large", path)["protocol"]["pictures"]
    (one,) = protocol.values()
    assert one["resized"] == "from 64 x 64 and 64 x 48, the centred square of each"


@pytest.mark.parametrize("as_list", [False, True])
def test_pictures_are_found_by_a_list(as_list: bool, some: Path, few: Path) -> None:
    """Whatever their names; what it does not list is named as left out."""
    texts = [prompt.prompt for prompt in read_prompts(few)]
    order = ["10.png", "1.png", "9.png", "2.png"]
    pairs: Any = dict(zip(order, texts, strict=True))
    shutil.copy(some / "1.png", some / "grid.png")
    if as_list:
        pairs = [{"file_name": name, "prompt": text} for name, text in pairs.items()]
    (some / "pictures.json").write_text(json.dumps(pairs))
    assigned = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lineage.evaluation.outsiders._read", spy(assigned))
        document = composition(some, few, data="shapes:easy")
    assert assigned == order
    assert document["protocol"]["pictures"][str(some)]["assigned"] == "by pictures.json"
    assert "1 of the pictures of" in tables(document) and "grid.png" in tables(document)


def spy(assigned: list[str]) -> Callable[..., Any]:
    """`_read`, which also tells the files that it reads."""
    from lineage.evaluation.outsiders import _read

    def read(folder: Path, files: list[str], size: int) -> Any:
        assigned.extend(files)
        return _read(folder, files, size)

    return read


def test_a_list_names_several_pictures_of_one_prompt(
    file: Path, drawn: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    """Samples of a caption in the list's order, and those that have a line's name by it."""
    folder = tmp_path / "flat"
    shutil.copytree(drawn, folder)
    listed = {}
    for number, line in enumerate(lines_of(file)):
        name = f"{number}.png"
        (folder / line["file_name"]).rename(folder / name)
        listed[name] = line["prompt"]
    (folder / "pictures.json").write_text(json.dumps(listed))
    alone = lineage.evaluate(pictures=str(folder), prompts=file)
    for section in ("composition", "quality", "diversity", "memorisation", "text_fit"):
        assert alone["runs"][0][section] == document["runs"][1][section]


def test_pictures_of_other_data_have_no_composition(
    run: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders of the captions of pictures that no judge reads."""
    data = str(ROOT / "data" / "example")
    assert call("prompts", "--data", data, "--size", SIZE, "--out", "p.jsonl").code == 0
    folders = []
    for seed in ("a", "b"):
        folders.append(tmp_path / seed / "same")
        lines = [line | {"seed": ord(seed)} for line in lines_of(Path("p.jsonl"))]
        path = write(tmp_path / "seeded.jsonl", lines)
        assert call("sample", run, "--prompts", path, "--out", folders[-1]).code == 0
    settings = {"scorer": "none", "features": "judge"}
    document = lineage.evaluate(pictures=folders, prompts="p.jsonl", **settings)
    assert document["data"] == f"folder:{data}" and "judge" not in document
    one, other = document["runs"]
    assert set(one) == {"run", "system", "quality", "diversity", "memorisation"}
    assert one["diversity"]["spread"] != other["diversity"]["spread"]
    assert [row["run"] for row in (one, other)] == list(map(str, folders))
    assert all(str(folder) in tables(document) for folder in folders)  # `same` would be both


# --- faults ---------------------------------------------------------------------------------------


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (
        lambda d: [(d / f"samples/0000_{n}.png").unlink() for n in (1, 2)],
        ["lacks 2 of the 622", "samples/0000_1.png", "draw them"],
    ),
    "broken": (
        lambda d: (d / "captions/0003.png").write_bytes(b"\x89PNG\r\n\x1a\n broken"),
        ["captions/0003.png", "copy"],
    ),
    "empty": (lambda d: (d / "captions/0003.png").write_bytes(b""), ["0003.png", "is empty"]),
    "several": (
        lambda d: shutil.copy(d / "prompts/0004.png", d / "prompts/0004.jpg"),
        ["prompts/0004.jpg and prompts/0004.png", "two pictures for prompts/0004.png"],
    ),
    "no list": (lambda d: (d / "pictures.json").write_text("[1]"), ["pictures.json", "should be"]),
    "no JSON": (lambda d: (d / "pictures.json").write_text("{"), ["pictures.json", "should be"]),
    "unknown file": (
        lambda d: (d / "pictures.json").write_text('{"x.png": "a cross"}'),
        ["x.png", "no picture of"],
    ),
    "unknown prompt": (
        lambda d: (d / "pictures.json").write_text('{"prompts/0000.png": "a zorp"}'),
        ["'a zorp'", "prompts.jsonl does not have"],
    ),
    "listed twice": (
        lambda d: (d / "pictures.json").write_text(
            json.dumps([{"file_name": "prompts/0000.png", "prompt": "a cross"}] * 2)
        ),
        ["prompts/0000.png twice"],
    ),
    "not all listed": (
        lambda d: (d / "pictures.json").write_text('{"prompts/0000.png": "a cross"}'),
        ["lacks 621 of the 622", "prompts/0001.png"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_one_sentence(
    fault: str, file: Path, drawn: Path, call: Call, tmp_path: Path
) -> None:
    change, words = FAULTS[fault]
    shutil.copytree(drawn, tmp_path / "faulty")
    change(tmp_path / "faulty")
    answer = call("evaluate", "--pictures", "faulty", "--prompts", file)
    assert_refused(answer, *words)


def test_too_many_listed_pictures_of_a_prompt(some: Path, few: Path) -> None:
    text = read_prompts(few)[0].prompt
    (some / "pictures.json").write_text(json.dumps({"1.png": text, "2.png": text}))
    with pytest.raises(UserError, match=r"names 2 pictures of .*few\.jsonl has 1: keep as many"):
        composition(some, few)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--pictures some", ["some", "--prompts FILE", "lineage prompts"]),
        ("--pictures nowhere --prompts FEW", ["no folder nowhere", "number of pictures"]),
        ("--pictures FEW --prompts FEW", ["is a file"]),
        ("--pictures void --prompts FEW", ["void holds no pictures"]),
        ("--pictures some --prompts nowhere", ["nowhere cannot be read"]),
        ("--pictures some --prompts FILE", ["4 pictures of some", "622", "prompts/0000.png"]),
        ("--pictures 3 --prompts FEW", ["RUN", "--pictures"]),
        ("--pictures 3 --pictures 4", ["two numbers, 3 and 4"]),
        ("--pictures 3 --pictures some --prompts FEW", ["--pictures 3", "some", "./3"]),
        ("--pictures 2.5 --prompts FEW", ["--pictures='2.5' should be a whole number"]),
        ("--pictures 0", ["--pictures=0 must be at least 1"]),
        ("--pictures ~nosuchuser/x", ["~nosuchuser/x", "whole path"]),
        ("--pictures", ["--pictures needs a value"]),
        ("--pictures ./3 --prompts FEW", ["no folder 3"]),
        ("--pictures some --pictures ./some --prompts FEW", ["the same folder"]),
        ("--pictures some --prompts FEW --data EXAMPLE", ["--prompts", "other data"]),
        ("--pictures drawn --prompts FILE --seed 2", ["of seed 0, not 2", "--seed 0"]),
        (
            "--pictures drawn --prompts FILE --data shapes:easy:ru",
            ["kind caption", "shapes:easy:ru"],
        ),
        ("--pictures drawn --prompts FILE --data shapes:hard", ["level hard"]),
        ("pretrained:clip --pictures drawn --prompts FILE", ["draws no pictures"]),
        (
            "pretrained:ldm --pictures drawn --prompts FILE",
            ["kind caption", "with seed 0", "--run"],
        ),
    ],
)
def test_a_fault_is_one_sentence(
    arguments: str, words: list[str], some: Path, few: Path, file: Path, drawn: Path, call: Call
) -> None:
    Path("void").mkdir()
    places = {"FEW": few, "FILE": file, "drawn": drawn, "EXAMPLE": ROOT / "data" / "example"}
    listed = [places.get(word, word) for word in arguments.split()]
    assert_refused(call("evaluate", *listed), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("circle --prompts FILE --out new", ["leave out CAPTIONS"]),
        ("--prompts FILE --out new --count 2", ["leave out --count"]),
        ("--prompts FILE --out new --single", ["leave out --single"]),
        ("--prompts FILE --out new --best-of 2", ["leave out --best-of"]),
        ("--prompts FILE --out new --visualise", ["leave out --visualise"]),
        ("--prompts FILE --out new --seed 1", ["leave out --seed"]),
        ("--prompts FILE --out drawn", ["prompts/0000.png exists", "another --out"]),
        ("--prompts FILE", ["sample.png", "--out FOLDER"]),
        ("--prompts nowhere --out new", ["nowhere cannot be read"]),
        ("--prompts FILE --out taken", ["Could not write taken"]),
        ("--prompts FILE --out new --set guidance=big", ["'guidance'"]),
        ("", ["CAPTIONS", "--prompts"]),
    ],
)
def test_sample_refuses_in_one_sentence(
    arguments: str, words: list[str], run: Path, file: Path, drawn: Path, call: Call
) -> None:
    Path("taken").write_text("mine")
    places = {"FILE": file, "drawn": drawn}
    listed = [places.get(one, one) for one in arguments.split()]
    assert_refused(call("sample", run, *listed), *words)


def test_prompts_of_several_levels_need_data(few: Path, some: Path, tmp_path: Path) -> None:
    levels = ("easy", "hard", "easy", "hard")
    lines = [line | {"level": level} for line, level in zip(lines_of(few), levels, strict=True)]
    path = write(tmp_path / "p.jsonl", lines)
    with pytest.raises(UserError, match="levels easy, hard: add --data shapes:easy"):
        composition(some, path)
    for name in ("1.png", "2.png"):
        (some / name).unlink()
    document = composition(some, path, data="shapes:hard")  # the two prompts of its level
    assert document["protocol"]["pictures"][str(some)]["pictures"]["prompt"] == 2


# --- the page -------------------------------------------------------------------------------------


def test_the_program_of_the_page_draws_a_folder(
    few: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the pipeline, which a test has no weights for."""
    page = (ROOT / "data" / "outsiders.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    states = []

    class Pipeline:
        @classmethod
        def from_pretrained(cls, path: str, torch_dtype: torch.dtype) -> Pipeline:
            return cls()

        def to(self, device: str) -> Pipeline:
            return self

        def __call__(self, prompt: str, generator: torch.Generator) -> Any:
            states.append(generator.initial_seed())
            return SimpleNamespace(images=[Image.new("RGB", (64, 64), "white")])

    stand_in = SimpleNamespace(StableDiffusionPipeline=Pipeline)
    monkeypatch.setitem(sys.modules, "diffusers", stand_in)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    lines = [*lines_of(file)[:2], lines_of(file)[-1]]
    write(tmp_path / "prompts.jsonl", lines)
    exec(compile(program, "outsiders.md", "exec"), {})
    assert len(set(states)) == 3
    assert all((tmp_path / "pictures" / line["file_name"]).exists() for line in lines)
