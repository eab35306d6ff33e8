"""`lineage import-weights`: a published checkpoint becomes a run that draws what its networks drew;
anything else is one sentence."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lineage
from lineage.attngan.attngan import AttnGAN, AttnGANConfig, Generator
from lineage.attngan.damsm import DAMSMConfig
from lineage.cgan.stackgan import StackGANConfig, StageOneGenerator, StageTwo, StageTwoGenerator
from lineage.cli import main
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.official import cgan
from lineage.official.importing import IMPORTERS, import_weights, read_checkpoint
from lineage.recipes import find_recipe
from lineage.text.contract import TextFeatures
from lineage.text.tokenizer import NULL
from lineage.training.store import read_json

WIDTH = 24
SIZES = StackGANConfig(noise=10, condition=6, generator=8, residual=2)
CAPTIONS = ["a red bird", "a small bird with a long beak", ""]


@pytest.fixture(autouse=True)
def _small_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The discriminators, which no checkpoint holds, are of 300 MB at the paper's width."""
    monkeypatch.setattr(cgan, "StackGANConfig", partial(StackGANConfig, discriminator=2))


class Source:
    """The networks that the checkpoint comes from, as their authors would have trained them."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.one = StageOneGenerator(SIZES, WIDTH).eval()
        self.two = StageTwoGenerator(SIZES, WIDTH, 256).eval()
        with torch.no_grad():
            for network in (self.one, self.two):
                for name, tensor in network.state_dict().items():
                    if name.endswith("running_var"):
                        tensor.uniform_(0.5, 2.0)
                    elif tensor.is_floating_point() and tensor.dim() == 1:
                        tensor.normal_(0.5, 0.3)

    def state(self, prefix: str = "") -> dict[str, Tensor]:
        """By official names: STAGE2_G, and stage I inside it."""
        named = {f"STAGE1_G.{official(n)}": t for n, t in self.one.state_dict().items()}
        named |= {official(n): t for n, t in self.two.state_dict().items()}
        return {prefix + name: tensor for name, tensor in named.items()}

    @torch.no_grad()
    def draw(self, sentence: Tensor, draws: NoiseStreams) -> Tensor:
        noise, eps, own = draws.randn(10), draws.randn(6), draws.randn(6)
        return self.two(self.one(sentence, noise, eps).image, sentence, own).image


def official(name: str) -> str:
    return re.sub(r"^upsample\.(\d)\.", lambda m: f"upsample{int(m[1]) + 1}.", name)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source()


def save(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


# --- what fits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["plain", "module", "state_dict", "model", "old pickle", "safetensors"]
)
def test_a_checkpoint_becomes_a_run_that_draws_the_same(
    form: str, source: Source, tmp_path: Path
) -> None:
    """However its authors saved it: from several GPUs, in a larger dictionary, by an old torch."""
    path = tmp_path / ("netG.safetensors" if form == "safetensors" else "netG_epoch_600.pth")
    if form == "safetensors":
        save_file(source.state(), path)
    elif form == "old pickle":
        torch.save(source.state(), path, _use_new_zipfile_serialization=False)
    elif form in ("state_dict", "model"):
        save({form: source.state("module."), "epoch": 600}, path)
    else:
        save(source.state("module." if form == "module" else ""), path)
    note = import_weights("stackgan", path, tmp_path / "run")
    assert "text encoder" in note and "\n" not in note

    system = lineage.load(tmp_path / "run")
    assert isinstance(system, StageTwo) and not system.training
    sentence = system.text.encode(CAPTIONS).sentence
    assert sentence.shape == (3, WIDTH)
    drawn = system.generate(CAPTIONS, seed=5)
    expected = source.draw(sentence, NoiseStreams.for_pictures(5, 3, "cpu"))
    assert drawn.shape == (3, 3, 256, 256) and drawn.std() > 0.01
    torch.testing.assert_close(drawn, expected, atol=1e-6, rtol=0)


def test_every_tensor_is_used_and_the_sizes_are_those_of_the_file(
    source: Source, tmp_path: Path
) -> None:
    path = save(source.state("module."), tmp_path / "netG.pth")
    import_weights("stackgan", path, tmp_path / "run")
    system = lineage.load(tmp_path / "run")
    for part, network in (("first", source.one), ("generator", source.two)):
        mine = system.get_submodule(part).state_dict()
        for name, tensor in network.state_dict().items():
            assert torch.equal(mine[name], tensor), (part, name)
    config = read_json(tmp_path / "run" / "config.json")
    assert config["made_with"]["imported"] == "netG.pth"
    assert (config["size"], config["model"]["start"], config["encoder"]["width"]) == (
        256,
        64,
        WIDTH,
    )
    for name in ("noise", "condition", "generator", "residual"):
        assert config["model"][name] == getattr(SIZES, name)
    assert find_recipe("stackgan").PRESETS["paper"].key == config["key"]


def test_the_command_draws_with_it(
    source: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder on standard output, what the user must know on standard error; then `sample`."""
    path, run = save(source.state(), tmp_path / "netG.pth"), tmp_path / "run"
    assert main(["import-weights", "stackgan", str(path), "--out", str(run)]) == 0
    out, errors = capfd.readouterr()
    assert out.strip() == str(run)
    assert errors.startswith("lineage: ") and "text encoder" in errors
    sheet = tmp_path / "sheet.png"
    assert main(["sample", str(run), "a red bird", "--out", str(sheet)]) == 0
    assert sheet.is_file()


def test_half_precision_is_read(source: Source, tmp_path: Path) -> None:
    """A run is in single precision, whatever the checkpoint was saved in."""
    halved = {n: t.half() if t.is_floating_point() else t for n, t in source.state().items()}
    import_weights("stackgan", save(halved, tmp_path / "netG.pth"), tmp_path / "run")
    system = lineage.load(tmp_path / "run")
    assert {p.dtype for p in system.parameters()} == {torch.float32}
    torch.testing.assert_close(
        system.get_submodule("generator.img.0").weight, source.two.img[0].weight, atol=1e-3, rtol=0
    )


# --- what does not ----------------------------------------------------------------------------


class Bomb:
    """A pickle that does something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Import a file and expect one sentence and no run."""

    def refused(path: Path, *words: str) -> None:
        run = tmp_path / "run"
        assert main(["import-weights", "stackgan", str(path), "--out", str(run)]) == 2
        out, errors = capfd.readouterr()
        assert out == "" and "Traceback" not in errors
        (line,) = errors.strip().splitlines()
        assert line.startswith("lineage: ") and str(path) in line
        assert all(word in line for word in words), line
        assert not run.exists()

    return refused


@pytest.mark.parametrize("how", ["torch", "pickle", "inside"])
def test_code_in_a_checkpoint_is_never_run(
    how: str, source: Source, tmp_path: Path, refused: Callable[..., None]
) -> None:
    """A checkpoint from the web is a program until proven otherwise."""
    trace, path = tmp_path / "it_ran", tmp_path / "netG.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    else:
        save({**source.state(), "bomb": Bomb(trace)} if how == "inside" else Bomb(trace), path)
    refused(path, "tensors alone")
    assert not trace.exists()


def test_stage_one_alone_is_told(
    source: Source, tmp_path: Path, refused: Callable[..., None]
) -> None:
    """Both stages are published under the same name, in folders of their own."""
    alone = {official(name): tensor for name, tensor in source.one.state_dict().items()}
    refused(save(alone, tmp_path / "netG_epoch_120.pth"), "stage II")


def test_stage_two_without_stage_one_is_told(
    source: Source, tmp_path: Path, refused: Callable[..., None]
) -> None:
    alone = {official(name): tensor for name, tensor in source.two.state_dict().items()}
    refused(save(alone, tmp_path / "netG.pth"), "STAGE1_G")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight": torch.zeros(3)},
        nn.Linear(2, 2).state_dict(),
        [torch.zeros(2)],
        torch.zeros(2),
        {"epoch": 3},
        "text",
        {"state_dict": {"weight": torch.zeros(2)}},
    ],
    ids=lambda content: type(content).__name__,
)
def test_a_file_of_something_else_is_told(
    content: Any, tmp_path: Path, refused: Callable[..., None]
) -> None:
    refused(save(content, tmp_path / "other.pth"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_a_file_that_cannot_be_read_is_told(
    content: bytes, ending: str, tmp_path: Path, refused: Callable[..., None]
) -> None:
    path = tmp_path / f"broken.{ending}"
    path.write_bytes(content)
    refused(path)


def test_a_file_that_is_not_there_is_told(tmp_path: Path, refused: Callable[..., None]) -> None:
    refused(tmp_path / "absent.pth", "There is no file")
    folder = tmp_path / "folder.pth"
    folder.mkdir()
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hr_joint.0.weight": torch.zeros(32, 40, 3, 3)},
        {"STAGE1_G.upsample2.1.weight": torch.zeros(8, 16, 3, 3)},
        {"img.0.weight": torch.zeros(3, 8, 3, 3)},
        {"upsample9.1.weight": torch.zeros(1)},
        {"STAGE1_G.extra": torch.zeros(1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_of_other_networks_are_told(
    change: dict[str, Tensor], source: Source, tmp_path: Path, refused: Callable[..., None]
) -> None:
    """A variant of the network, or of another size than its own first layers say."""
    refused(save({**source.state(), **change}, tmp_path / "netG.pth"), "does not fit stackgan")


def test_a_run_is_not_overwritten(source: Source, tmp_path: Path) -> None:
    path = save(source.state(), tmp_path / "netG.pth")
    import_weights("stackgan", path, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds a run already.*--out"):
        import_weights("stackgan", path, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_file_in_the_way_of_the_run_folder_is_told(source: Source, tmp_path: Path) -> None:
    path, taken = save(source.state(), tmp_path / "netG.pth"), tmp_path / "taken"
    taken.write_text("mine")
    for run in (taken, taken / "run"):
        with pytest.raises(UserError, match="taken") as caught:
            import_weights("stackgan", path, run)
        assert "\n" not in str(caught.value)
    assert taken.read_text() == "mine"


def test_systems_without_an_importer_are_told(tmp_path: Path) -> None:
    for key, hint in (("stackgam", "'stackgan'"), ("ddpm", "stackgan"), ("", "stackgan")):
        with pytest.raises(UserError, match=f"(?s){key!r}.*{hint}") as caught:
            import_weights(key, tmp_path / "absent.pth", tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert all(find_recipe(key) for key in IMPORTERS)


def test_reading_leaves_names_and_values_alone(tmp_path: Path) -> None:
    """But for `module.`, which DataParallel puts in front, and once."""
    state = {"module.a.module.b": torch.ones(2), "c": torch.zeros(1)}
    read = read_checkpoint(save(state, tmp_path / "x.pth"))
    assert list(read) == ["a.module.b", "c"] and torch.equal(read["c"], torch.zeros(1))


# --- attngan: three files ---------------------------------------------------------------------

ATTN = AttnGANConfig(scales=2, noise=7, condition=5, generator=3, residual=1)
WORDS = ["the", "bird", "red", "a", "small", "has", "beak", "long"]  # in the order of their numbers
EIGHT, INPUTS = 8, 6  # width of sentences, and of word vectors


@pytest.fixture
def _small_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matcher and the discriminators, which no file holds, are of 500 MB in the preset."""
    presets = find_recipe("attngan").PRESETS
    paper: Any = presets["paper"]
    small = replace(
        paper,
        damsm=DAMSMConfig(regions="conv", channels=2, grid=32),
        model=replace(paper.model, discriminator=2),
    )
    monkeypatch.setitem(presets, "paper", small)


class Painter:
    """The networks that the three files come from."""

    def __init__(self, cell: str = "lstm") -> None:
        torch.manual_seed(7)
        self.generator = Generator(ATTN, EIGHT, 128).eval()
        self.table = torch.randn(len(WORDS) + 1, INPUTS)  # row 0 is <end>
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        self.recurrent = kind(INPUTS, EIGHT // 2, bidirectional=True, batch_first=True)
        with torch.no_grad():
            for name, tensor in self.generator.state_dict().items():
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 2.0)
                elif tensor.is_floating_point():
                    tensor.normal_(0.5, 0.3) if tensor.dim() == 1 else tensor.mul_(3.0)
            for parameter in self.recurrent.parameters():
                parameter.mul_(3.0)

    def drawing(self) -> dict[str, Tensor]:
        """`bird_AttnGAN2.pth`."""
        state = self.generator.state_dict()
        return {
            attn_official(n): t[:, :, None, None] if "attention" in n else t
            for n, t in state.items()
        }

    def reading(self) -> dict[str, Tensor]:
        """`text_encoder200.pth`."""
        states = {f"rnn.{name}": t for name, t in self.recurrent.state_dict().items()}
        return {"encoder.weight": self.table, **states}

    def read(self, caption: list[str]) -> TextFeatures:
        """Words by their official numbers, without padding."""
        ids = torch.tensor([[WORDS.index(word) + 1 for word in caption]])
        words, _ = self.recurrent(self.table[ids])
        half = EIGHT // 2
        sentence = torch.cat([words[:, -1, :half], words[:, 0, half:]], dim=1)
        return TextFeatures(words, torch.ones_like(ids, dtype=torch.bool), sentence, ids)

    @torch.no_grad()
    def draw(self, captions: list[list[str]], draws: NoiseStreams) -> Tensor:
        noise, eps = draws.randn(ATTN.noise), draws.randn(ATTN.condition)
        rows = range(len(captions))
        parts = [(self.read(captions[i]), noise[i : i + 1], eps[i : i + 1]) for i in rows]
        return torch.cat([self.generator(*part).images[-1] for part in parts])

    def files(self, folder: Path, words: list[str] = WORDS) -> list[Path]:
        listed = folder / "words.txt"
        listed.write_text("\n".join(words) + "\n", encoding="utf-8")
        drawing = save(self.drawing(), folder / "bird_AttnGAN2.pth")
        return [drawing, save(self.reading(), folder / "text_encoder200.pth"), listed]


def attn_official(name: str) -> str:
    name = re.sub(r"^first\.upsample\.(\d)\.", lambda m: f"h_net1.upsample{int(m[1]) + 1}.", name)
    name = re.sub(r"^first\.", "h_net1.", name)
    name = re.sub(r"^next\.(\d)\.", lambda m: f"h_net{int(m[1]) + 2}.", name)
    name = name.replace("attention.project", "att.conv_context")
    return re.sub(r"^pictures\.(\d)\.", lambda m: f"img_net{int(m[1]) + 1}.img.", name)


ASKED = [
    ("a red bird", ["a", "red", "bird"]),
    ("The small, RED bird has a zorp beak!", ["the", "small", "red", "bird", "has", "a", "beak"]),
    ("bird", ["bird"]),
]
"""Captions, and what is left of them: words that the list lacks are dropped, and punctuation."""


@pytest.mark.usefixtures("_small_paper")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_three_files_become_a_run_that_draws_the_same(cell: str, tmp_path: Path) -> None:
    """In any order; long captions beside short ones, each as if it were alone."""
    painter = Painter(cell)
    files = painter.files(tmp_path, ["<end>", *WORDS] if cell == "gru" else WORDS)
    note = import_weights("attngan", files[::-1], tmp_path / "run")
    assert "image encoder" in note and "\n" not in note
    system = lineage.load(tmp_path / "run")
    assert isinstance(system, AttnGAN) and not system.training
    drawn = system.generate([caption for caption, _ in ASKED], seed=5)
    draws = NoiseStreams.for_pictures(5, len(ASKED), "cpu")
    expected = painter.draw([left for _, left in ASKED], draws)
    assert drawn.shape == (3, 3, 128, 128) and drawn.std() > 0.01
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    config = read_json(tmp_path / "run" / "config.json")
    assert config["made_with"]["imported"] == "words.txt, text_encoder200.pth, bird_AttnGAN2.pth"
    assert (config["size"], config["encoder"]["width"], config["encoder"]["inputs"]) == (
        128,
        EIGHT,
        INPUTS,
    )
    assert config["encoder"]["cell"] == cell
    for name in ("scales", "noise", "condition", "generator", "residual"):
        assert config["model"][name] == getattr(ATTN, name)


@pytest.mark.usefixtures("_small_paper")
def test_words_have_the_rows_that_they_were_trained_with(tmp_path: Path) -> None:
    """Number n of the list is row n of the table, where row 0 is the end of a caption."""
    painter = Painter()
    import_weights("attngan", painter.files(tmp_path), tmp_path / "run")
    text: Any = lineage.load(tmp_path / "run").text
    for number, word in enumerate(WORDS, start=1):
        (row,) = text.tokenizer.encode(word)
        assert torch.equal(text.table.weight[row], painter.table[number]), word
    for caption, left in ASKED:
        assert text.pieces(caption) == left
    assert text.unknown([ASKED[1][0]]) == ["zorp"]
    assert text.tokenizer.encode("zorp, quux!") == [NULL] == text.tokenizer.encode("")
    assert torch.isfinite(text.encode(["zorp", "a red bird"]).sentence).all()


@pytest.mark.usefixtures("_small_paper")
def test_the_command_takes_several_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files, run = Painter().files(tmp_path), tmp_path / "run"
    assert main(["import-weights", "attngan", *map(str, files), "--out", str(run)]) == 0
    out, errors = capfd.readouterr()
    assert out.strip() == str(run) and errors.startswith("lineage: ")
    sheet = tmp_path / "sheet.png"
    assert main(["sample", str(run), "a red bird", "--inside", "--out", str(sheet)]) == 0
    assert sheet.is_file()


Files = list[Path]
Spoil = Callable[[Painter, Files, Path], Files]


def without(number: int) -> Spoil:
    return lambda painter, files, folder: [f for i, f in enumerate(files) if i != number]


def with_another(number: int) -> Spoil:
    def spoil(painter: Painter, files: Files, folder: Path) -> Files:
        again = folder / f"again{files[number].suffix}"
        again.write_bytes(files[number].read_bytes())
        return [*files, again]

    return spoil


def with_words(words: list[str]) -> Spoil:
    return lambda painter, files, folder: painter.files(folder, words)


def with_text(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Spoil:
    def spoil(painter: Painter, files: Files, folder: Path) -> Files:
        return [files[0], save(change(painter.reading()), files[1]), files[2]]

    return spoil


def with_generator(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Spoil:
    def spoil(painter: Painter, files: Files, folder: Path) -> Files:
        return [save(change(painter.drawing()), files[0]), *files[1:]]

    return spoil


def wider(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder that the generator was not trained with."""
    other = nn.LSTM(INPUTS, EIGHT, bidirectional=True, batch_first=True).state_dict()
    return {"encoder.weight": state["encoder.weight"], **{f"rnn.{n}": t for n, t in other.items()}}


def lacking(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {n: t for n, t in state.items() if n != name}


@pytest.mark.usefixtures("_small_paper")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without(0), ["generator"]),
        (without(1), ["text encoder"]),
        (without(2), ["list of words"]),
        (with_another(0), ["generator"]),
        (with_another(1), ["text encoder"]),
        (with_another(2), ["list of words"]),
        (with_words(WORDS[:-1]), ["words.txt", "7 words", "knows 8"]),
        (with_words([*WORDS, "more"]), ["words.txt", "9 words", "knows 8"]),
        (with_words(["<end>", *WORDS, "more"]), ["words.txt", "9 words", "knows 8"]),
        (with_words([]), ["words.txt"]),
        (with_text(wider), ["bird_AttnGAN2.pth", "does not fit attngan"]),
        (with_text(lacking("encoder.weight")), ["encoder.weight"]),
        (with_text(lacking("rnn.bias_hh_l0_reverse")), ["bias_hh_l0_reverse"]),
        (with_generator(lacking("img_net1.img.0.weight")), ["does not fit attngan"]),
        (with_generator(lacking("h_net1.fc.0.weight")), ["h_net1.fc.0.weight"]),
        (with_generator(lacking("h_net2.upsample.1.weight")), ["next.0.upsample.1.weight"]),
        (with_generator(lambda state: {**state, "more": torch.zeros(1)}), ["more"]),
        (lambda painter, files, folder: [*files[:2], folder / "absent.txt"], ["absent.txt"]),
        (lambda painter, files, folder: [*files[:2], folder / "absent.pth"], ["absent.pth"]),
    ],
    ids=[
        *("no generator", "no encoder", "no words"),
        *("two generators", "two encoders", "two lists"),
        *("a word less", "a word more", "a word more after the end", "an empty list"),
        *("another width", "no table", "half a direction"),
        *("no first picture", "no first layer", "no upsampling", "a tensor more"),
        *("a list that is absent", "an encoder that is absent"),
    ],
)
def test_files_that_do_not_belong_together_are_told(
    spoil: Spoil, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one sentence, and no run is written."""
    painter, run = Painter(), tmp_path / "run"
    files = spoil(painter, painter.files(tmp_path), tmp_path)
    assert main(["import-weights", "attngan", *map(str, files), "--out", str(run)]) == 2
    out, errors = capfd.readouterr()
    assert out == "" and "Traceback" not in errors
    (line,) = errors.strip().splitlines()
    assert line.startswith("lineage: ") and all(word in line for word in words), line
    assert not run.exists()


def test_a_list_that_is_no_text_is_told(tmp_path: Path) -> None:
    files = Painter().files(tmp_path)
    files[2].write_bytes(b"\xff\xfe\x00the\n")
    with pytest.raises(UserError, match=r"words\.txt cannot be read") as caught:
        import_weights("attngan", files, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_stackgan_takes_one_file(source: Source, tmp_path: Path) -> None:
    """What else was given is named."""
    paths = [save(source.state(), tmp_path / name) for name in ("netG.pth", "other.pth")]
    with pytest.raises(UserError, match=r"one file.*other\.pth") as caught:
        import_weights("stackgan", paths, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
