"""`lineage import-weights`: a published checkpoint becomes a run that generates the same images;
any other file gives one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
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
from lineage.official.importing import import_weights, importer_of, read_checkpoint
from lineage.recipes import find_recipe
from lineage.text.contract import TextFeatures
from lineage.text.tokenizer import NULL
from lineage.training.store import read_json

WIDTH = 24
SIZES = StackGANConfig(z_dim=10, cond_dim=6, gen_channels=8, num_res_blocks=2)
CAPTIONS = ["a red bird", "a small bird with a long beak", ""]


@pytest.fixture(autouse=True)
def _small_discriminators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discriminators, which no checkpoint holds, of a few kB instead of 300 MB."""
    presets = find_recipe("stackgan").PRESETS
    paper: Any = presets["paper"]
    small = replace(paper, model=replace(paper.model, disc_channels=2))
    monkeypatch.setitem(presets, "paper", small)


class Published:
    """The two generators of a published checkpoint, with random weights."""

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
    def generate(self, sentence: Tensor, noise: NoiseStreams) -> Tensor:
        noise, eps, own = noise.randn(10), noise.randn(6), noise.randn(6)
        return self.two(self.one(sentence, noise, eps).image, sentence, own).image


def official(name: str) -> str:
    return re.sub(r"^upsample\.(\d)\.", lambda m: f"upsample{int(m[1]) + 1}.", name)


@pytest.fixture(scope="module")
def published() -> Published:
    return Published()


def save(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


# --- what fits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["plain", "module", "state_dict", "model", "old pickle", "safetensors"]
)
def test_a_checkpoint_becomes_a_run_with_the_same_images(
    form: str, published: Published, tmp_path: Path
) -> None:
    """However its authors saved it: from several GPUs, in a larger dictionary, by an old torch."""
    path = tmp_path / ("netG.safetensors" if form == "safetensors" else "netG_epoch_600.pth")
    if form == "safetensors":
        save_file(published.state(), path)
    elif form == "old pickle":
        torch.save(published.state(), path, _use_new_zipfile_serialization=False)
    elif form in ("state_dict", "model"):
        save({form: published.state("module."), "epoch": 600}, path)
    else:
        save(published.state("module." if form == "module" else ""), path)
    note = import_weights("stackgan", path, tmp_path / "run")
    assert "text encoder" in note and "\n" not in note

    system = lineage.load(tmp_path / "run")
    assert isinstance(system, StageTwo) and not system.training
    sentence = system.text.encode(CAPTIONS).sentence
    assert sentence.shape == (3, WIDTH)
    image = system.generate(CAPTIONS, seed=5)
    expected = published.generate(sentence, NoiseStreams.for_pictures(5, 3, "cpu"))
    assert image.shape == (3, 3, 256, 256) and image.std() > 0.01
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def test_every_tensor_is_used_and_the_sizes_are_those_of_the_file(
    published: Published, tmp_path: Path
) -> None:
    path = save(published.state("module."), tmp_path / "netG.pth")
    import_weights("stackgan", path, tmp_path / "run")
    system = lineage.load(tmp_path / "run")
    for part, network in (("stage1", published.one), ("generator", published.two)):
        mine = system.get_submodule(part).state_dict()
        for name, tensor in network.state_dict().items():
            assert torch.equal(mine[name], tensor), (part, name)
    config = read_json(tmp_path / "run" / "config.json")
    assert config["made_with"]["imported"] == "netG.pth"
    assert (config["size"], config["model"]["stage1_size"], config["encoder"]["width"]) == (
        256,
        64,
        WIDTH,
    )
    for name in ("z_dim", "cond_dim", "gen_channels", "num_res_blocks"):
        assert config["model"][name] == getattr(SIZES, name)
    assert (config["key"], config["preset"]) == ("stackgan", "paper")


def test_commands_import_and_sample(
    published: Published, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder on standard output, what the user must know on standard error; then `sample`."""
    path, run = save(published.state(), tmp_path / "netG.pth"), tmp_path / "run"
    assert main(["import-weights", "stackgan", str(path), "--out", str(run)]) == 0
    out, errors = capfd.readouterr()
    assert out.strip() == str(run)
    assert errors.startswith("lineage: ") and "text encoder" in errors
    sheet = tmp_path / "sheet.png"
    assert main(["sample", str(run), "a red bird", "--out", str(sheet)]) == 0
    assert sheet.is_file()


def test_half_precision_is_read(published: Published, tmp_path: Path) -> None:
    """A run is in single precision, whatever the checkpoint was saved in."""
    halved = {n: t.half() if t.is_floating_point() else t for n, t in published.state().items()}
    import_weights("stackgan", save(halved, tmp_path / "netG.pth"), tmp_path / "run")
    system = lineage.load(tmp_path / "run")
    assert {p.dtype for p in system.parameters()} == {torch.float32}
    torch.testing.assert_close(
        system.get_submodule("generator.img.0").weight,
        published.two.img[0].weight,
        atol=1e-3,
        rtol=0,
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


def test_code_in_a_checkpoint_is_never_run(
    published: Published, tmp_path: Path, refused: Callable[..., None]
) -> None:
    trace = tmp_path / "it_ran"
    refused(
        save({**published.state(), "bomb": Bomb(trace)}, tmp_path / "netG.pth"), "tensors alone"
    )
    assert not trace.exists()


def test_stage_one_alone_gives_one_sentence(
    published: Published, tmp_path: Path, refused: Callable[..., None]
) -> None:
    """Both stages are published under the same name, in folders of their own."""
    alone = {official(name): tensor for name, tensor in published.one.state_dict().items()}
    refused(save(alone, tmp_path / "netG_epoch_120.pth"), "stage II")


def test_stage_two_without_stage_one_gives_one_sentence(
    published: Published, tmp_path: Path, refused: Callable[..., None]
) -> None:
    alone = {official(name): tensor for name, tensor in published.two.state_dict().items()}
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
def test_a_file_of_something_else_gives_one_sentence(
    content: Any, tmp_path: Path, refused: Callable[..., None]
) -> None:
    refused(save(content, tmp_path / "other.pth"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_a_file_that_cannot_be_read_gives_one_sentence(
    content: bytes, ending: str, tmp_path: Path, refused: Callable[..., None]
) -> None:
    path = tmp_path / f"broken.{ending}"
    path.write_bytes(content)
    refused(path)


def test_a_missing_file_gives_one_sentence(tmp_path: Path, refused: Callable[..., None]) -> None:
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
def test_tensors_of_other_networks_give_one_sentence(
    change: dict[str, Tensor], published: Published, tmp_path: Path, refused: Callable[..., None]
) -> None:
    """A variant of the network, or of another size than its own first layers say."""
    refused(save({**published.state(), **change}, tmp_path / "netG.pth"), "does not fit stackgan")


def test_a_run_is_not_overwritten(published: Published, tmp_path: Path) -> None:
    path = save(published.state(), tmp_path / "netG.pth")
    import_weights("stackgan", path, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds a run already.*--out"):
        import_weights("stackgan", path, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_file_in_place_of_the_run_folder_gives_one_sentence(
    published: Published, tmp_path: Path
) -> None:
    path, taken = save(published.state(), tmp_path / "netG.pth"), tmp_path / "taken"
    taken.write_text("mine")
    for run in (taken, taken / "run"):
        with pytest.raises(UserError, match="taken") as caught:
            import_weights("stackgan", path, run)
        assert "\n" not in str(caught.value)
    assert taken.read_text() == "mine"


def test_systems_without_an_importer_give_one_sentence(tmp_path: Path) -> None:
    for key, hint in (("stackgam", "'stackgan'"), ("ddpm", "stackgan"), ("", "stackgan")):
        with pytest.raises(UserError, match=f"(?s){key!r}.*{hint}") as caught:
            import_weights(key, tmp_path / "absent.pth", tmp_path / "run")
        assert "\n" not in str(caught.value)
    for key in ("stackgan", "attngan", "vqgan", "dalle", "ldm"):
        assert importer_of(key).__name__ == f"lineage.official.{key}"


def test_reading_leaves_names_and_values_alone(tmp_path: Path) -> None:
    """But for `module.`, which DataParallel puts in front, and once."""
    state = {"module.a.module.b": torch.ones(2), "c": torch.zeros(1)}
    tensors = read_checkpoint(save(state, tmp_path / "x.pth"))
    assert list(tensors) == ["a.module.b", "c"] and torch.equal(tensors["c"], torch.zeros(1))


# --- attngan: three files ---------------------------------------------------------------------

ATTN = AttnGANConfig(num_scales=2, z_dim=7, cond_dim=5, gen_channels=3, num_res_blocks=1)
WORDS = ["the", "bird", "red", "a", "small", "has", "beak", "long"]  # in the order of their numbers
EIGHT, INPUTS = 8, 6  # width of sentences, and of word vectors


@pytest.fixture
def _small_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image encoder and discriminators, which no file holds, of a few kB instead of 500 MB."""
    presets = find_recipe("attngan").PRESETS
    paper: Any = presets["paper"]
    small = replace(
        paper,
        damsm=DAMSMConfig(image_encoder="conv", image_channels=2, grid_size=32),
        model=replace(paper.model, disc_channels=2),
    )
    monkeypatch.setitem(presets, "paper", small)


class PublishedAttnGAN:
    """The networks that the three files come from."""

    def __init__(self, cell: str = "lstm") -> None:
        torch.manual_seed(7)
        self.generator = Generator(ATTN, EIGHT, EIGHT, 128).eval()
        self.token_emb = torch.randn(len(WORDS) + 1, INPUTS)  # row 0 is <end>
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

    def generator_state(self) -> dict[str, Tensor]:
        """`bird_AttnGAN2.pth`."""
        state = self.generator.state_dict()
        return {
            attn_official(n): t[:, :, None, None] if "attention" in n else t
            for n, t in state.items()
        }

    def text_state(self) -> dict[str, Tensor]:
        """`text_encoder200.pth`."""
        states = {f"rnn.{name}": t for name, t in self.recurrent.state_dict().items()}
        return {"encoder.weight": self.token_emb, **states}

    def encode(self, caption: list[str]) -> TextFeatures:
        """Words by their official numbers, without padding."""
        ids = torch.tensor([[WORDS.index(word) + 1 for word in caption]])
        words, _ = self.recurrent(self.token_emb[ids])
        half = EIGHT // 2
        sentence = torch.cat([words[:, -1, :half], words[:, 0, half:]], dim=1)
        return TextFeatures(words, torch.ones_like(ids, dtype=torch.bool), sentence, ids)

    @torch.no_grad()
    def generate(self, captions: list[list[str]], noise: NoiseStreams) -> Tensor:
        noise, eps = noise.randn(ATTN.z_dim), noise.randn(ATTN.cond_dim)
        rows = range(len(captions))
        parts = [(self.encode(captions[i]), noise[i : i + 1], eps[i : i + 1]) for i in rows]
        return torch.cat([self.generator(*part).images[-1] for part in parts])

    def files(self, folder: Path, words: list[str] = WORDS) -> list[Path]:
        words_file = folder / "words.txt"
        words_file.write_text("\n".join(words) + "\n", encoding="utf-8")
        generator = save(self.generator_state(), folder / "bird_AttnGAN2.pth")
        return [generator, save(self.text_state(), folder / "text_encoder200.pth"), words_file]


def attn_official(name: str) -> str:
    """The authors' name of a generator's tensor."""
    stage = r"^first_stage\.upsample\.(\d)\."
    name = re.sub(stage, lambda m: f"h_net1.upsample{int(m[1]) + 1}.", name)
    name = re.sub(r"^first_stage\.", "h_net1.", name)
    name = re.sub(r"^next_stages\.(\d)\.", lambda m: f"h_net{int(m[1]) + 2}.", name)
    name = name.replace("attention.project_words", "att.conv_context")
    return re.sub(r"^image_heads\.(\d)\.", lambda m: f"img_net{int(m[1]) + 1}.img.", name)


CAPTION_WORDS = [
    ("a red bird", ["a", "red", "bird"]),
    ("The small, RED bird has a zorp beak!", ["the", "small", "red", "bird", "has", "a", "beak"]),
    ("bird", ["bird"]),
]
"""Captions, and their words: punctuation and words that the list lacks are dropped."""


@pytest.mark.usefixtures("_small_paper")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_three_files_become_a_run_with_the_same_images(cell: str, tmp_path: Path) -> None:
    """In any order; long captions beside short ones, each as if it were alone."""
    published = PublishedAttnGAN(cell)
    files = published.files(tmp_path, ["<end>", *WORDS] if cell == "gru" else WORDS)
    note = import_weights("attngan", files[::-1], tmp_path / "run")
    assert "image encoder" in note and "\n" not in note
    system = lineage.load(tmp_path / "run")
    assert isinstance(system, AttnGAN) and not system.training
    image = system.generate([caption for caption, _ in CAPTION_WORDS], seed=5)
    noise = NoiseStreams.for_pictures(5, len(CAPTION_WORDS), "cpu")
    expected = published.generate([words for _, words in CAPTION_WORDS], noise)
    assert image.shape == (3, 3, 128, 128) and image.std() > 0.01
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
    config = read_json(tmp_path / "run" / "config.json")
    assert config["made_with"]["imported"] == "words.txt, text_encoder200.pth, bird_AttnGAN2.pth"
    assert (config["size"], config["encoder"]["width"], config["encoder"]["embed_dim"]) == (
        128,
        EIGHT,
        INPUTS,
    )
    assert config["encoder"]["cell"] == cell
    for name in ("num_scales", "z_dim", "cond_dim", "gen_channels", "num_res_blocks"):
        assert config["model"][name] == getattr(ATTN, name)


@pytest.mark.usefixtures("_small_paper")
def test_words_have_the_rows_that_they_were_trained_with(tmp_path: Path) -> None:
    """Number n of the list is row n of the table, where row 0 is the end of a caption."""
    published = PublishedAttnGAN()
    import_weights("attngan", published.files(tmp_path), tmp_path / "run")
    text: Any = lineage.load(tmp_path / "run").text
    for number, word in enumerate(WORDS, start=1):
        (row,) = text.tokenizer.encode(word)
        assert torch.equal(text.token_emb.weight[row], published.token_emb[number]), word
    for caption, words in CAPTION_WORDS:
        assert text.tokens(caption) == words
    assert text.unknown([CAPTION_WORDS[1][0]]) == ["zorp"]
    assert text.tokenizer.encode("zorp, quux!") == [NULL] == text.tokenizer.encode("")
    assert torch.isfinite(text.encode(["zorp", "a red bird"]).sentence).all()


@pytest.mark.usefixtures("_small_paper")
def test_the_command_takes_several_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files, run = PublishedAttnGAN().files(tmp_path), tmp_path / "run"
    assert main(["import-weights", "attngan", *map(str, files), "--out", str(run)]) == 0
    out, errors = capfd.readouterr()
    assert out.strip() == str(run) and errors.startswith("lineage: ")
    sheet = tmp_path / "sheet.png"
    assert main(["sample", str(run), "a red bird", "--visualise", "--out", str(sheet)]) == 0
    assert sheet.is_file()


Files = list[Path]
Change = Callable[[PublishedAttnGAN, Files, Path], Files]


def without(number: int) -> Change:
    return lambda published, files, folder: [f for i, f in enumerate(files) if i != number]


def with_another(number: int) -> Change:
    def spoil(published: PublishedAttnGAN, files: Files, folder: Path) -> Files:
        again = folder / f"again{files[number].suffix}"
        again.write_bytes(files[number].read_bytes())
        return [*files, again]

    return spoil


def with_words(words: list[str]) -> Change:
    return lambda published, files, folder: published.files(folder, words)


def with_text(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    def spoil(published: PublishedAttnGAN, files: Files, folder: Path) -> Files:
        return [files[0], save(change(published.text_state()), files[1]), files[2]]

    return spoil


def with_generator(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    def spoil(published: PublishedAttnGAN, files: Files, folder: Path) -> Files:
        return [save(change(published.generator_state()), files[0]), *files[1:]]

    return spoil


def wider(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder that the generator was not trained with."""
    other = nn.LSTM(INPUTS, EIGHT, bidirectional=True, batch_first=True).state_dict()
    return {"encoder.weight": state["encoder.weight"], **{f"rnn.{n}": t for n, t in other.items()}}


def lacking(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {n: t for n, t in state.items() if n != name}


@pytest.mark.usefixtures("_small_paper")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(0), ["generator"]),
        (without(1), ["text encoder"]),
        (without(2), ["list of words"]),
        (with_another(0), ["generator"]),
        (with_another(1), ["text encoder"]),
        (with_another(2), ["list of words"]),
        (with_words(WORDS[:-1]), ["words.txt", "7 words", "trained with 8"]),
        (with_words([*WORDS, "more"]), ["words.txt", "9 words", "trained with 8"]),
        (with_words(["<end>", *WORDS, "more"]), ["words.txt", "9 words", "trained with 8"]),
        (with_words([]), ["words.txt"]),
        (with_text(wider), ["bird_AttnGAN2.pth", "does not fit attngan"]),
        (with_text(lacking("encoder.weight")), ["encoder.weight"]),
        (with_text(lacking("rnn.bias_hh_l0_reverse")), ["bias_hh_l0_reverse"]),
        (with_generator(lacking("img_net1.img.0.weight")), ["does not fit attngan"]),
        (with_generator(lacking("h_net1.fc.0.weight")), ["h_net1.fc.0.weight"]),
        (with_generator(lacking("h_net2.upsample.1.weight")), ["next_stages.0.upsample.1.weight"]),
        (with_generator(lambda state: {**state, "more": torch.zeros(1)}), ["more"]),
        (lambda published, files, folder: [*files[:2], folder / "absent.txt"], ["absent.txt"]),
        (lambda published, files, folder: [*files[:2], folder / "absent.pth"], ["absent.pth"]),
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
def test_files_that_do_not_belong_together_give_one_sentence(
    change: Change, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one sentence, and no run is written."""
    published, run = PublishedAttnGAN(), tmp_path / "run"
    files = change(published, published.files(tmp_path), tmp_path)
    assert main(["import-weights", "attngan", *map(str, files), "--out", str(run)]) == 2
    out, errors = capfd.readouterr()
    assert out == "" and "Traceback" not in errors
    (line,) = errors.strip().splitlines()
    assert line.startswith("lineage: ") and all(word in line for word in words), line
    assert not run.exists()


def test_a_list_that_is_no_text_gives_one_sentence(tmp_path: Path) -> None:
    files = PublishedAttnGAN().files(tmp_path)
    files[2].write_bytes(b"\xff\xfe\x00the\n")
    with pytest.raises(UserError, match=r"words\.txt cannot be read") as caught:
        import_weights("attngan", files, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_stackgan_takes_one_file(published: Published, tmp_path: Path) -> None:
    """The error names the file that is too much."""
    paths = [save(published.state(), tmp_path / name) for name in ("netG.pth", "other.pth")]
    with pytest.raises(UserError, match=r"one file.*other\.pth") as caught:
        import_weights("stackgan", paths, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
