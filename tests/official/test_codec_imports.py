"""Published codecs as runs: VQGAN and DALL-E's dVAE, in files as their authors write them."""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official_names import dvae_official, vqgan_official
from safetensors.torch import save_file
from torch import Tensor, nn

import lineage
from lineage.cli import main
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.official import dalle, vqgan
from lineage.official.importing import CheckpointFile, import_weights, read_checkpoint
from lineage.recipes import find_recipe
from lineage.training.store import load_tensors, read_json
from lineage.vqvae.ar_prior import Prior, PriorConfig
from lineage.vqvae.dalle import DVAE, DVAEConfig
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.transformer import TransformerConfig
from lineage.vqvae.vqgan import VQGAN, VQGANConfig

State = dict[str, Tensor]
Refused = Callable[..., None]


@pytest.fixture(autouse=True)
def _small_priors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior, which no file holds, has 14 million parameters in the preset."""
    transformer = TransformerConfig(width=8, num_layers=1, num_heads=1)
    for key in ("vqgan", "dalle"):
        presets: Any = find_recipe(key).PRESETS
        small = replace(
            presets["small"],
            cache_size=16,
            encoder=replace(presets["smoke"].encoder, max_words=8),
            model=PriorConfig(transformer=transformer, text_len=4),
        )
        monkeypatch.setitem(presets, "small", small)


# --- files of the authors ---------------------------------------------------------------------


@contextmanager
def foreign_classes(**classes: type) -> Iterator[None]:
    """Make classes importable for pickle: `dall_e__encoder__Encoder=E` is the class `Encoder` of a
    module `dall_e.encoder`. Afterwards the modules are gone.
    """
    before = dict(sys.modules)
    for path, kind in classes.items():
        *modules, name = path.split("__")
        for end in range(1, len(modules) + 1):
            module = ".".join(modules[:end])
            sys.modules.setdefault(module, ModuleType(module))
        kind.__module__, kind.__name__, kind.__qualname__ = ".".join(modules), name, name
        setattr(sys.modules[kind.__module__], name, kind)
    try:
        yield
    finally:
        for module in set(sys.modules) - set(before):
            if module.split(".")[0] in {path.split("__")[0] for path in classes}:
                del sys.modules[module]


class Foreign(nn.Module):
    """A module with the tensors of a state dict, of a class that we do not have."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.device = torch.device("cpu")  # an attribute, as DALL-E's modules have it
        groups: dict[str, State] = {}
        for name, tensor in state.items():
            first, _, rest = name.partition(".")
            if rest:
                groups.setdefault(first, {})[rest] = tensor
            else:
                self.register_parameter(first, nn.Parameter(tensor, requires_grad=False))
        for name, inner in groups.items():
            self.add_module(name, Foreign(inner))


class Settings:
    """An object of the trainer, in a class of its own, that refers to itself."""

    def __init__(self) -> None:
        self.content = {"lr": 4.5e-6, "device": torch.device("cpu")}
        self.parent = self


class ModelCheckpoint:
    """A callback, whose class is a key in the file."""


def save_foreign(content: Any, path: Path, **options: Any) -> Path:
    """`torch.save`, with foreign classes that nobody can import afterwards."""
    with foreign_classes(
        dall_e__encoder__Encoder=Foreign,
        shelf__Settings=Settings,
        shelf__callbacks__ModelCheckpoint=ModelCheckpoint,
    ):
        torch.save(content, path, **options)
    assert not {"dall_e", "shelf"} & set(sys.modules)
    return path


def lightning_checkpoint(state: State) -> dict[str, Any]:
    """The trainer's file of taming-transformers."""
    return {
        "epoch": 17,
        "global_step": 250_001,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {
            ModelCheckpoint: {
                "best_model_score": torch.tensor(0.5),
                "best_model_path": "logs/last.ckpt",
                "state": ModelCheckpoint(),
            }
        },
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}}],
        "lr_schedulers": [],
        "state_dict": OrderedDict(state),
        "hyper_parameters": Settings(),
    }


def make_pictures(side: int = 32) -> Tensor:
    """(2, 3, S, S) in [-1, 1], smooth enough for some cells to be alike."""
    torch.manual_seed(5)
    coarse = torch.rand(2, 3, 8, 8) * 2 - 1
    noise = 0.1 * torch.randn(2, 3, side, side)
    return (F.interpolate(coarse, size=(side, side), mode="bilinear") + noise).clamp(-1, 1)


@torch.no_grad()
def randomise(network: nn.Module, gain: float = 1.0) -> None:
    """Kernels by fan-in, norm scales near 1, biases near 0."""
    for name, tensor in network.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(std=gain * tensor[0].numel() ** -0.5)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point():
            tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)


class Sizes(NamedTuple):
    """Sizes of a published VQGAN; `attn` are levels, `disc` is (ndf, n_layers) or None."""

    mult: tuple[int, ...] = (1, 1, 2)
    attn: tuple[int, ...] = (2,)
    blocks: int = 1
    disc: tuple[int, int] | None = (3, 2)
    z: int = 6
    dim: int = 5
    codes: int = 11
    ch: int = 32

    def config(self) -> VQGANConfig:
        names = ("disc_channels", "disc_layers")
        disc = {} if self.disc is None else dict(zip(names, self.disc, strict=True))
        return VQGANConfig(
            net=AutoencoderConfig(
                channels=self.ch,
                channel_mult=self.mult,
                num_res_blocks=self.blocks,
                attn_resolutions=tuple(256 // 2**level for level in self.attn),
                z_channels=self.z,
            ),
            quantiser=QuantiserConfig(
                num_codes=self.codes,
                code_dim=self.dim,
                update="loss",
                init="normal",
                restart_threshold=0.0,
            ),
            **disc,
        )


@torch.no_grad()
def published_vqgan(sizes: Sizes = Sizes()) -> tuple[VQGAN, State]:  # noqa: B008
    """A codec, and its weights under the authors' names, with those of an LPIPS."""
    torch.manual_seed(3)
    codec = VQGAN(sizes.config()).eval()
    randomise(codec)
    vectors = codec.encode_latents(make_pictures()).reshape(-1, sizes.dim)
    vectors = vectors[torch.randperm(len(vectors))].repeat(sizes.codes, 1)[: sizes.codes]
    codec.quantiser.embedding.copy_(vectors + 0.1 * torch.randn(vectors.shape))
    state = vqgan_official(codec.state_dict(), len(sizes.mult))
    if sizes.disc is None:
        state = {k: v for k, v in state.items() if not k.startswith("loss.")}
    state["loss.perceptual_loss.scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.rand(1, 64, 1, 1)
    return codec, state


def save_vqgan(folder: Path, sizes: Sizes = Sizes()) -> tuple[VQGAN, Path]:  # noqa: B008
    codec, state = published_vqgan(sizes)
    return codec, save_foreign(lightning_checkpoint(state), folder / "last.ckpt")


class PublishedDVAE(NamedTuple):
    """A codec and its two files, modules that were saved whole."""

    codec: DVAE
    files: list[Path]


def save_dvae(folder: Path, **changes: int) -> PublishedDVAE:
    torch.manual_seed(9)
    sizes = {"num_codes": 12, "hidden_channels": 4, "init_channels": 5, "blocks_per_group": 1}
    codec = DVAE(DVAEConfig(**(sizes | changes))).eval()
    randomise(codec.encoder, 1.5)
    randomise(codec.decoder, 1.5)
    parts = {"encoder": codec.encoder, "decoder": codec.decoder}
    files = [
        save_foreign(Foreign(dvae_official(part.state_dict())), folder / f"{name}.pkl")
        for name, part in parts.items()
    ]
    return PublishedDVAE(codec, files)


def assert_same_codec(ours: Any, theirs: Any) -> None:
    """The same weights, codes and pictures."""
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]) or name.startswith("discriminator"), name
    image = make_pictures()
    with torch.no_grad():
        ids = ours.encode(image)
        assert torch.equal(ids, theirs.encode(image))
        decoded = ours.decode(ids)
        torch.testing.assert_close(decoded, theirs.decode(ids), atol=1e-6, rtol=0)
    assert decoded.shape == image.shape and decoded.std() > 0.01


# --- VQGAN ------------------------------------------------------------------------------------

VQGANS = {
    "two levels": Sizes((1, 2), (1,), 1, None, codes=7),
    "no attention": Sizes((1, 1, 2), (), 2, (2, 3)),
    "wide at first": Sizes((2, 1, 1, 1), (0, 3), 1, (4, 1), z=3, dim=9),
    "three blocks": Sizes((1, 2, 1), (1, 2), 3, (1, 4)),
    "one code": Sizes((1, 1, 1), (2,), 1, None, codes=1),
    "more codes than vectors": Sizes((1, 1, 1, 2), (3,), 2, (5, 5), codes=32, dim=2),
    "other channels": Sizes((1, 1, 3), (2,), 1, None, ch=64),
}


@pytest.mark.parametrize("name", VQGANS)
def test_an_imported_vqgan_is_the_published_one(name: str, tmp_path: Path) -> None:
    """Sizes, codes, pictures; a discriminator, if the file has one, with its statistics."""
    sizes = VQGANS[name]
    theirs, path = save_vqgan(tmp_path, sizes)
    note = import_weights("vqgan", path, tmp_path / "run")
    assert "--from codec=RUN" in note and "\n" not in note
    prior: Any = lineage.load(tmp_path / "run")
    assert isinstance(prior, Prior) and not prior.training
    codec = prior.codec
    assert isinstance(codec, VQGAN) and codec.config == theirs.config
    assert_same_codec(codec, theirs)
    if sizes.disc is not None:
        ours, expected = (c.discriminator.main.state_dict() for c in (codec, theirs))
        assert ours.keys() == expected.keys() and len(ours) > 6
        assert all(torch.equal(ours[n], expected[n]) for n in ours)
    saved = read_json(tmp_path / "run" / "config.json")
    assert (saved["key"], saved["preset"], saved["size"]) == ("vqgan", "paper", 256)
    assert saved["made_with"]["imported"] == "last.ckpt" and saved["codec"]["lpips"] == []


def test_an_imported_codebook_does_not_start_again(tmp_path: Path) -> None:
    """Neither k-means nor restarts move codes that a decoder was trained with."""
    theirs, path = save_vqgan(tmp_path)
    import_weights("vqgan", path, tmp_path / "run")
    codec: Any = lineage.load(tmp_path / "run").codec
    quantiser = codec.quantiser
    assert bool(quantiser.initialised) and quantiser.config.restart_threshold == 0
    quantiser.train()(codec.encode_latents(make_pictures()))
    assert torch.equal(quantiser.embedding.data, theirs.quantiser.embedding.data)


def test_other_forms_of_the_file_are_read(tmp_path: Path) -> None:
    """In half precision, from several GPUs, the state alone, as safetensors."""
    _, state = published_vqgan()
    half = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    parallel = {f"module.{n}": t for n, t in state.items()}
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "v.safetensors")
    paths = [
        save_foreign(lightning_checkpoint(parallel), tmp_path / "module.ckpt"),
        save_foreign(state, tmp_path / "alone.pth"),
        save_foreign(lightning_checkpoint(half), tmp_path / "half.ckpt"),
        tmp_path / "v.safetensors",
    ]
    for path in paths:
        import_weights("vqgan", path, tmp_path / f"run-{path.name}")
        saved = load_tensors(tmp_path / f"run-{path.name}" / "model.safetensors")
        close = {"atol": 2e-3, "rtol": 1e-3} if "half" in path.name else {"atol": 0, "rtol": 0}
        for name in ("encoder.conv_in.weight", "decoder.conv_out.bias", "quant_conv.weight"):
            torch.testing.assert_close(saved[f"codec.{name}"], state[name], **close)
        assert saved["codec.quantiser.embedding"].dtype == torch.float32


def test_a_file_of_the_old_form_is_read(tmp_path: Path) -> None:
    """Before torch 1.6 a checkpoint was no archive."""
    _, state = published_vqgan()
    path = save_foreign(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    tensors = read_checkpoint(path)
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[n], state[n]) for n in state)


@pytest.fixture
def paper_state(reference_file: Callable[[str], Path]) -> Callable[[str], State]:
    """Name of a network at the paper's size -> its state on the meta device."""
    keys = json.loads(reference_file("paper_keys.json").read_text())
    return lambda name: {n: torch.empty(s, device="meta") for n, s in keys[name].items()}


def assert_complete(codec: nn.Module, weights: State, absent: tuple[str, ...]) -> None:
    """Every tensor has a place of its shape, and every place that is left was announced."""
    ours = {f"codec.{n}": tuple(t.shape) for n, t in codec.state_dict().items()}
    assert all(ours[name] == tuple(tensor.shape) for name, tensor in weights.items())
    left = ours.keys() - weights.keys()
    assert all(name.startswith(absent) for name in left), left


def test_the_published_vqgan_at_its_size(paper_state: Callable[[str], State]) -> None:
    """f = 16 with 1,024 codes: all tensors of the public file, in the preset `paper`."""
    state = paper_state("taming_vqgan_imagenet_f16_1024")
    imported = vqgan.import_weights([CheckpointFile(Path("last.ckpt"), state)])
    config: Any = imported.config
    paper: Any = find_recipe("vqgan").PRESETS["paper"]
    assert config.codec.net == paper.codec.net == AutoencoderConfig()
    assert config.codec.quantiser == paper.codec.quantiser and config.size == paper.size == 256
    with torch.device("meta"):
        codec = VQGAN(config.codec)
    assert_complete(codec, imported.weights, imported.absent)
    parts = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    assert len(imported.weights) == sum(n.startswith(parts) for n in state) + 2


def test_the_published_dvae_at_its_size(paper_state: Callable[[str], State]) -> None:
    files = [
        CheckpointFile(Path(f"{part}.pkl"), paper_state(f"dalle_dvae/{part}"))
        for part in ("Encoder", "Decoder")
    ]
    for order in (files, files[::-1]):
        imported = dalle.import_weights(order)
        config: Any = imported.config
        assert config.codec == DVAEConfig() and config.size == 256
        with torch.device("meta"):
            codec = DVAE(config.codec)
        assert_complete(codec, imported.weights, imported.absent)
        assert len(imported.weights) == sum(len(file.tensors) for file in files)


def test_sizes_are_read_from_shapes_alone() -> None:
    """The widest level does not decide the others."""
    sizes = Sizes((1, 3, 2), (0, 2), 2, (6, 2))
    _, state = published_vqgan(sizes)
    assert vqgan.vqgan_config({n: t.to("meta") for n, t in state.items()}) == sizes.config()


def test_the_untrained_prior_of_an_import_draws(tmp_path: Path) -> None:
    """The folder is a run like any other."""
    _, path = save_vqgan(tmp_path, Sizes((1, 1, 1, 1, 1, 1), (5,), 1))
    run, sheet = tmp_path / "run", tmp_path / "sheet.png"
    assert main(["import-weights", "vqgan", str(path), "--out", str(run)]) == 0
    prior: Any = lineage.load(run)
    assert prior.grid_size == 8 and prior.code_emb.num_embeddings == 11
    assert main(["sample", str(run), "a red circle", "--out", str(sheet)]) == 0
    assert sheet.is_file()


# --- DALL-E's dVAE ----------------------------------------------------------------------------

DVAES: dict[str, dict[str, int]] = {
    "one block": {},
    "two blocks": {
        "hidden_channels": 8,
        "init_channels": 3,
        "blocks_per_group": 2,
        "num_codes": 40,
    },
    "three groups": {"num_groups": 3, "blocks_per_group": 2, "hidden_channels": 8},
    "no shortcut in the decoder's first block": {"init_channels": 32},
}


@pytest.mark.parametrize("name", DVAES)
def test_an_imported_dvae_is_the_published_one(name: str, tmp_path: Path) -> None:
    """In any order of its two files."""
    published = save_dvae(tmp_path, **DVAES[name])
    is_reversed = name == "two blocks"
    files = published.files[::-1] if is_reversed else published.files
    note = import_weights("dalle", files, tmp_path / "run")
    assert "--from codec=RUN" in note and "\n" not in note
    codec: Any = lineage.load(tmp_path / "run").codec
    assert isinstance(codec, DVAE) and codec.config == published.codec.config
    assert_same_codec(codec, published.codec)
    saved = read_json(tmp_path / "run" / "config.json")
    assert (saved["key"], saved["preset"], saved["size"]) == ("dalle", "paper", 256)
    names = "decoder.pkl, encoder.pkl" if is_reversed else "encoder.pkl, decoder.pkl"
    assert saved["made_with"]["imported"] == names


def test_the_files_may_have_other_names_and_be_states_alone(tmp_path: Path) -> None:
    """Their tensors tell which is which."""
    published = save_dvae(tmp_path)
    encoder, decoder = (
        dvae_official(part.state_dict())
        for part in (published.codec.encoder, published.codec.decoder)
    )
    paths = [
        save_foreign(decoder, tmp_path / "a.pt"),
        save_foreign({"state_dict": encoder}, tmp_path / "b.ckpt"),
    ]
    import_weights("dalle", paths, tmp_path / "states")
    import_weights("dalle", published.files, tmp_path / "modules")
    states, modules = (
        load_tensors(tmp_path / name / "model.safetensors") for name in ("states", "modules")
    )
    codec = [name for name in states if name.startswith("codec.")]
    assert len(codec) > 50 and all(torch.equal(states[n], modules[n]) for n in codec)


# --- modules that were saved whole ------------------------------------------------------------


def test_a_module_is_read_by_the_names_of_its_state(tmp_path: Path) -> None:
    """Parameters, buffers, nested layers, one that is used twice, and None."""
    shared = nn.Linear(3, 2, bias=False)
    inner = nn.Sequential(shared, nn.BatchNorm2d(2), shared, nn.LSTM(2, 2), nn.Identity())
    module = nn.ModuleDict({"a": inner, "b": nn.ParameterList([torch.ones(2), torch.zeros(1)])})
    module.register_parameter("none", None)
    module.register_buffer("count", torch.tensor(7))
    tensors, state = read_checkpoint(save_foreign(module, tmp_path / "m.pkl")), module.state_dict()
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[n], state[n]) for n in state)
    tensors = read_checkpoint(save_foreign(nn.DataParallel(inner), tmp_path / "parallel.pkl"))
    assert tensors.keys() == inner.state_dict().keys()


def test_buffers_that_a_module_does_not_save_are_left_out(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.ones(2), persistent=False)
    assert read_checkpoint(save_foreign(module, tmp_path / "m.pkl")).keys() == {"weight", "bias"}


class Kind(Enum):
    ONE = 1


class Slots:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, torch.ones(2)


class Stateful:
    """An object whose state is no dictionary."""

    def __getstate__(self) -> Any:
        return ("version", 2, [torch.ones(1)])

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("this was executed")


EXTRAS: dict[str, Callable[[], Any]] = {
    "dtype": lambda: torch.float16,
    "class": lambda: ModelCheckpoint,
    "function": lambda: torch.nn.functional.relu,
    "object": Settings,
    "partial": lambda: partial(nn.Conv2d, 3, device=torch.device("cpu")),
    "numpy array": lambda: np.arange(3),
    "path": lambda: Path("logs/last.ckpt"),
    "enumeration": lambda: Kind.ONE,
    "slots": Slots,
    "state that is no dictionary": Stateful,
    "module": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("attribute", [False, True])
def test_objects_beside_the_tensors_are_skipped(attribute: bool, name: str, tmp_path: Path) -> None:
    """Settings, callbacks and attributes of foreign classes; a module's tensors are its own."""
    path, module = tmp_path / "x.ckpt", nn.Linear(2, 2)
    classes = (Kind, Slots, Stateful, ModelCheckpoint, Settings)
    with foreign_classes(**{f"shelf__{kind.__name__}": kind for kind in classes}):
        content: Any = {"hyper_parameters": EXTRAS[name](), "state_dict": module.state_dict()}
        if attribute:
            module.extra = EXTRAS[name]()
            content = module
        torch.save(content, path)
    assert "shelf" not in sys.modules
    expected = {"weight", "bias"}
    if attribute and name == "module":
        expected |= {"extra.weight", "extra.bias"}
    tensors = read_checkpoint(path)
    assert tensors.keys() == expected and torch.equal(tensors["weight"], module.weight)


def test_reading_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a module of the right name that Python would find."""
    trace = tmp_path / "executed"
    trap = f"open({str(trace)!r}, 'w').close()\nclass Settings: pass\n"
    (tmp_path / "trap_of_this_test.py").write_text(trap)
    with foreign_classes(trap_of_this_test__Settings=Settings):
        torch.save({"state_dict": {"weight": torch.ones(2)}, "more": Settings()}, tmp_path / "a")
        torch.save(Settings(), tmp_path / "b")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_checkpoint(tmp_path / "a").keys() == {"weight"}
    with suppress(UserError):
        assert read_checkpoint(tmp_path / "b") == {}
    assert not trace.exists() and "trap_of_this_test" not in sys.modules


class Call:
    """A pickle of a call: `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("form", ["archive", "old form"])
def test_an_import_executes_nothing_and_writes_no_run(
    form: str, tmp_path: Path, refused: Refused
) -> None:
    """A call in place of a module's layer is no call when it is read."""
    trace = tmp_path / "executed"
    module = nn.Sequential(nn.Linear(2, 2))
    module._modules["1"] = Call(os.system, f"touch {trace}")  # type: ignore[assignment]
    path = tmp_path / "encoder.pkl"
    torch.save(module, path, _use_new_zipfile_serialization=form == "archive")
    refused("dalle", [path, path])
    refused("vqgan", [path])
    assert not trace.exists()


# --- files that do not fit --------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Import files; expect one sentence that has all the words, and no run."""

    def refused(key: str, paths: Sequence[Path], *words: str) -> None:
        run = tmp_path / "no_run"
        capfd.readouterr()
        assert main(["import-weights", key, *map(str, paths), "--out", str(run)]) == 2
        out, errors = capfd.readouterr()
        assert out == "" and "Traceback" not in errors
        (line,) = errors.strip().splitlines()
        assert line.startswith("lineage: ") and line.endswith("."), line
        assert all(word in line for word in words), line
        assert not any(odd in line for odd in ("unpack", "index out of range", "object has no"))
        assert not run.exists()

    return refused


CONTENTS: dict[str, Any] = {
    "nothing": {},
    "a list": [torch.zeros(2)],
    "a tensor": torch.zeros(2),
    "other tensors": {"weight": torch.zeros(2)},
    "a state of numbers": {"state_dict": {"encoder.conv_in.weight": 3}},
    "a foreign object": Settings,
    "a module": lambda: nn.Conv2d(3, 3, 3),
}


@pytest.mark.parametrize("key", ["vqgan", "dalle"])
@pytest.mark.parametrize("name", CONTENTS)
def test_files_of_something_else_are_refused(
    name: str, key: str, tmp_path: Path, refused: Refused
) -> None:
    content = CONTENTS[name]
    path = save_foreign(content() if callable(content) else content, tmp_path / "x.ckpt")
    refused(key, [path] if key == "vqgan" else [path, path], str(path))


@pytest.mark.parametrize("ending", ["ckpt", "pkl", "safetensors", "txt"])
@pytest.mark.parametrize("content", [b"", b"a list of\nwords\n", b"PK\x03\x04 cut", b"\x80\x02}q."])
def test_files_without_tensors_are_refused(
    content: bytes, ending: str, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    refused("vqgan", [path], path.name)
    refused("dalle", [path, path], path.name)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files_are_refused(share: float, tmp_path: Path, refused: Refused) -> None:
    _, ckpt = save_vqgan(tmp_path)
    published = save_dvae(tmp_path)
    for path in (ckpt, published.files[0]):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
    refused("vqgan", [ckpt], "last.ckpt")
    refused("dalle", published.files, "encoder.pkl")


def test_a_damaged_file_is_refused(tmp_path: Path, refused: Refused) -> None:
    """Of the right length, with zeros in the middle."""
    files = save_dvae(tmp_path).files
    data = bytearray(files[0].read_bytes())
    data[100:4000] = bytes(3900)
    files[0].write_bytes(data)
    refused("dalle", files, "encoder.pkl")


def test_missing_files_are_named(tmp_path: Path, refused: Refused) -> None:
    files, absent = save_dvae(tmp_path).files, tmp_path / "absent.pkl"
    refused("vqgan", [absent], "There is no file")
    refused("dalle", [files[0], absent], "There is no file", "absent.pkl")
    refused("vqgan", [tmp_path], "is a folder")


def test_files_of_another_system_are_refused(tmp_path: Path, refused: Refused) -> None:
    _, ckpt = save_vqgan(tmp_path)
    files = save_dvae(tmp_path).files
    refused("vqgan", files[:1], "encoder.pkl", "VQGAN")
    refused("dalle", [ckpt], "last.ckpt")
    refused("dalle", [files[0], ckpt], "last.ckpt", "neither")


def test_a_dvae_needs_both_files(tmp_path: Path, refused: Refused) -> None:
    encoder, decoder = save_dvae(tmp_path).files
    for paths in (
        [encoder],
        [decoder],
        [encoder, encoder],
        [decoder, decoder],
        [encoder, decoder, encoder],
    ):
        refused("dalle", paths, "two files", "encoder.pkl and decoder.pkl")


def test_a_vqgan_needs_one_file(tmp_path: Path, refused: Refused) -> None:
    _, path = save_vqgan(tmp_path)
    other = tmp_path / "other.ckpt"
    other.write_bytes(path.read_bytes())
    refused("vqgan", [path, other], "one file", "other.ckpt")


@pytest.mark.parametrize(
    "changes",
    [{"hidden_channels": 8}, {"blocks_per_group": 2}, {"num_codes": 13}, {"num_groups": 3}],
    ids=str,
)
def test_halves_of_two_dvaes_are_refused(
    changes: dict[str, int], tmp_path: Path, refused: Refused
) -> None:
    files = save_dvae(tmp_path).files
    (tmp_path / "other").mkdir()
    other = save_dvae(tmp_path / "other", **changes).files
    refused("dalle", [files[0], other[1]], "does not fit dalle")
    refused("dalle", [other[0], files[1]], "does not fit dalle")


def without(name: str) -> Callable[[State], State]:
    return lambda state: {n: t for n, t in state.items() if n != name}


def with_zeros(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (without("quantize.embedding.weight"), "quantize.embedding.weight"),
        (without("encoder.conv_in.weight"), "VQGAN"),
        (without("encoder.conv_in.bias"), "encoder.conv_in.bias"),
        (without("quant_conv.weight"), "quant_conv.weight"),
        (without("post_quant_conv.bias"), "post_quant_conv.bias"),
        (without("encoder.down.1.block.0.conv2.weight"), "encoder.down.1.block.0.conv2.weight"),
        (without("decoder.up.2.upsample.conv.bias"), "decoder.up.0.resample.conv.bias"),
        (without("decoder.mid.attn_1.q.weight"), "decoder.mid.attn_1.q.weight"),
        (with_zeros("encoder.more.weight", 1), "encoder.more.weight"),
        (with_zeros("decoder.conv_out.weight", 3, 3, 3, 3), "decoder.conv_out.weight"),
        (with_zeros("quantize.embedding.weight", 11, 7), "quant_conv"),
        pytest.param(with_zeros("quantize.embedding.weight", 11), "", id="a row of codes"),
        pytest.param(with_zeros("quantize.embedding.weight"), "", id="a number as codes"),
        pytest.param(with_zeros("encoder.conv_in.weight"), "", id="a number as kernel"),
        pytest.param(with_zeros("encoder.conv_in.weight", 0, 3, 3, 3), "", id="no channels"),
        (with_zeros("loss.discriminator.main.0.weight", 7, 3, 4, 4), "discriminator"),
        (with_zeros("loss.discriminator.main.3.loc", 1), "discriminator.main.3.loc"),
    ],
)
def test_a_vqgan_with_other_tensors_is_refused(
    change: Callable[[State], State], word: str, tmp_path: Path, refused: Refused
) -> None:
    _, state = published_vqgan()
    path = save_foreign(lightning_checkpoint(change(state)), tmp_path / "last.ckpt")
    refused("vqgan", [path], "last.ckpt", word)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (without("blocks.input.w"), "encoder.pkl"),
        (without("blocks.output.conv.w"), "blocks.output.conv.w"),
        (without("blocks.group_2.block_1.id_path.b"), "groups.1.0.id_path.bias"),
        (without("blocks.group_4.block_1.res_path.conv_3.w"), "groups.3.0.res_path.5.weight"),
        (with_zeros("blocks.group_1.block_1.more.w", 2), "more"),
        (with_zeros("blocks.group_1.block_1.res_path.conv_1.w", 1, 4, 5, 5), "res_path.1.weight"),
        pytest.param(with_zeros("blocks.input.w", 4), "", id="a row as kernel"),
        pytest.param(with_zeros("blocks.input.w"), "", id="a number as kernel"),
        pytest.param(with_zeros("blocks.output.conv.w"), "", id="a number as last kernel"),
    ],
)
def test_a_dvae_with_other_tensors_is_refused(
    change: Callable[[State], State], word: str, tmp_path: Path, refused: Refused
) -> None:
    published = save_dvae(tmp_path)
    state = change(dvae_official(published.codec.encoder.state_dict()))
    path = save_foreign(state, tmp_path / "encoder.pkl")
    refused("dalle", [path, published.files[1]], word)


def test_a_codebook_of_another_kind_is_refused(tmp_path: Path, refused: Refused) -> None:
    """The Gumbel VQGAN of the same authors has a projection for its codebook."""
    _, state = published_vqgan()
    del state["quantize.embedding.weight"]
    state |= {"quantize.embed.weight": torch.ones(3, 5), "quantize.proj.weight": torch.ones(3, 6)}
    path = save_foreign(lightning_checkpoint(state), tmp_path / "gumbel.ckpt")
    refused("vqgan", [path], "gumbel.ckpt", "quantize.embedding.weight")


class Odd:
    """An object with the attributes of a module that is none."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


@pytest.mark.parametrize(
    "attributes",
    [
        {"_parameters": ["weight"]},
        {"_parameters": {"weight": 3}},
        {"_buffers": 3},
        {"_modules": ["a"]},
        {"_modules": {3: Odd(_parameters={"a": torch.ones(1)})}},
    ],
    ids=["a list", "a number for a tensor", "a number", "a list of layers", "a number for a name"],
)
def test_objects_that_look_like_modules_are_refused(
    attributes: dict[str, Any], tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "x.pkl"
    with foreign_classes(shelf__Odd=Odd):
        torch.save(Odd(**attributes), path)
    refused("vqgan", [path], "x.pkl")


def test_a_module_that_contains_itself_is_refused(tmp_path: Path, refused: Refused) -> None:
    path, module = tmp_path / "x.pkl", nn.Linear(2, 2)
    module._modules["again"] = module
    torch.save(module, path)
    refused("vqgan", [path], "x.pkl")


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    files = save_dvae(tmp_path).files
    import_weights("dalle", files, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds a run already.*--out"):
        import_weights("dalle", files[:1], tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


# --- a prior on an imported codec -------------------------------------------------------------


@pytest.mark.parametrize("key", ["vqgan", "dalle"])
def test_a_prior_is_trained_on_a_published_codec(
    key: str, tmp_path: Path, train_run: Callable[..., Any]
) -> None:
    """As the note says, and on pictures of another size than the codec's own."""
    files = [save_vqgan(tmp_path)[1]] if key == "vqgan" else save_dvae(tmp_path).files
    import_weights(key, files, tmp_path / "codec")
    stages_from = {"codec": str(tmp_path / "codec")}
    run = train_run(tmp_path / "run", key, {}, steps=2, stages_from=stages_from)
    theirs = load_tensors(tmp_path / "codec" / "model.safetensors")
    ours = load_tensors(tmp_path / "run" / "model.safetensors")
    codec = [name for name in theirs if name.startswith("codec.")]
    assert len(codec) > 20 and all(torch.equal(theirs[n], ours[n]) for n in codec)
    assert read_json(tmp_path / "run" / "config.json")["size"] == 16
    image = run.system.generate(["a red circle"], seed=1)
    loaded = lineage.load(tmp_path / "run").generate(["a red circle"], seed=1)
    torch.testing.assert_close(loaded, image)
