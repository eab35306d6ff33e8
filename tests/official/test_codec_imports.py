"""Published codecs as runs: the networks that the files come from are written out here as their
authors have them, and are gone when the files are read."""

from __future__ import annotations

import codecs
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
from collections import OrderedDict, defaultdict, deque
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
from safetensors.torch import save_file
from torch import Tensor, nn

import lineage
from lineage.cli import main
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.official.codecs import import_dalle, import_vqgan, vqgan_config
from lineage.official.importing import Given, import_weights, read_checkpoint
from lineage.recipes import find_recipe
from lineage.training.store import load_tensors, read_json
from lineage.vqvae.ar_prior import Prior, PriorConfig
from lineage.vqvae.dalle import DVAE, DVAEConfig
from lineage.vqvae.transformer import TransformerConfig
from lineage.vqvae.vqgan import VQGAN

KEYS_FILE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "paper_keys.json"
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small_priors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior, which no file holds, has 14 million parameters in the preset."""
    for key in ("vqgan", "dalle"):
        presets: Any = find_recipe(key).PRESETS
        small = replace(
            presets["small"],
            kept=16,
            encoder=replace(presets["smoke"].encoder, words=8),
            model=PriorConfig(TransformerConfig(8, 1, 1), places=4),
        )
        monkeypatch.setitem(presets, "small", small)


@contextmanager
def foreign(**classes: type) -> Iterator[None]:
    """Puts classes where pickle looks for them: `foreign(Encoder=E)` of module `dall_e.encoder`
    is written `foreign(dall_e__encoder__Encoder=E)`. After this the modules are gone."""
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


def spread(network: nn.Module, gain: float = 1.0) -> None:
    """Kernels by fan-in, norm scales near one, biases near zero, statistics near those of data."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(std=gain * tensor[0].numel() ** -0.5)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)


# --- taming-transformers' VQModel -------------------------------------------------------------


def normalise(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class ResnetBlock(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = normalise(a), nn.Conv2d(a, b, 3, 1, 1)
        self.norm2, self.dropout = normalise(b), nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1)
        if a != b:
            self.nin_shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = normalise(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h).flatten(2), self.k(h).flatten(2), self.v(h).flatten(2)
        w = torch.bmm(q.permute(0, 2, 1), k) * x.shape[1] ** -0.5
        h = torch.bmm(v, w.softmax(2).permute(0, 2, 1)).reshape(x.shape)
        return x + self.proj_out(h)


class Sides(nn.Module):
    """Encoder or decoder: `down` from the largest side, or `up`, which is numbered likewise and
    gone through from its end."""

    def __init__(self, sizes: Sizes, up: bool) -> None:
        super().__init__()
        widths, levels = [sizes.ch * m for m in sizes.mult], range(len(sizes.mult))
        self.is_up, deep = up, widths[-1]
        width = deep if up else sizes.ch
        self.conv_in = nn.Conv2d(sizes.z if up else 3, width, 3, 1, 1)
        made: dict[int, nn.Module] = {}
        for level in reversed(levels) if up else levels:
            side = nn.Module()
            side.block, side.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(sizes.blocks + up):
                side.block.append(ResnetBlock(width, widths[level]))
                width = widths[level]
                if level in sizes.attn:
                    side.attn.append(AttnBlock(width))
            last = level == (0 if up else levels[-1])
            if not last:
                resample = nn.Module()
                resample.conv = nn.Conv2d(width, width, 3, 1 if up else 2, 1 if up else 0)
                setattr(side, "upsample" if up else "downsample", resample)
            made[level] = side
        sides = nn.ModuleList([made[level] for level in levels])
        setattr(self, "up" if up else "down", sides)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1 = ResnetBlock(deep, deep), AttnBlock(deep)
        self.mid.block_2 = ResnetBlock(deep, deep)
        self.norm_out = normalise(width)
        self.conv_out = nn.Conv2d(width, 3 if up else sizes.z, 3, 1, 1)

    def middle(self, x: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = self.middle(x) if self.is_up else x
        for side in reversed(self.up) if self.is_up else self.down:
            for number, block in enumerate(side.block):
                x = block(x)
                if len(side.attn):
                    x = side.attn[number](x)
            if hasattr(side, "downsample"):
                x = side.downsample.conv(F.pad(x, (0, 1, 0, 1)))
            if hasattr(side, "upsample"):
                x = side.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = x if self.is_up else self.middle(x)
        return self.conv_out(swish(self.norm_out(x)))


class Sizes(NamedTuple):
    """Of a published VQGAN; `judge` is (ndf, n_layers), `attn` levels."""

    mult: tuple[int, ...]
    attn: tuple[int, ...]
    blocks: int
    judge: tuple[int, int] | None = None
    z: int = 6
    width: int = 5
    codes: int = 11
    ch: int = 32


def judge_of(ndf: int, layers: int) -> nn.Sequential:
    """NLayerDiscriminator."""
    made: list[nn.Module] = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    before = 1
    for n in range(1, layers + 1):
        now = min(2**n, 8)
        stride = 2 if n < layers else 1
        made += [nn.Conv2d(ndf * before, ndf * now, 4, stride, 1, bias=False)]
        made += [nn.BatchNorm2d(ndf * now), nn.LeakyReLU(0.2, True)]
        before = now
    return nn.Sequential(*made, nn.Conv2d(ndf * before, 1, 4, 1, 1))


class VQModel(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder = Sides(sizes, up=False), Sides(sizes, up=True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(sizes.codes, sizes.width)
        self.quant_conv = nn.Conv2d(sizes.z, sizes.width, 1)
        self.post_quant_conv = nn.Conv2d(sizes.width, sizes.z, 1)
        self.loss = nn.Module()
        self.loss.perceptual_loss = nn.Module()
        lpips = self.loss.perceptual_loss
        lpips.scaling_layer = nn.Module()
        lpips.scaling_layer.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        lpips.net = nn.Module()
        lpips.net.slice1 = nn.Sequential(nn.Conv2d(3, 2, 3))
        lpips.lin0 = nn.Sequential(OrderedDict(model=nn.Sequential(nn.Conv2d(2, 1, 1))))
        if sizes.judge is not None:
            self.loss.discriminator = nn.Module()
            self.loss.discriminator.main = judge_of(*sizes.judge)
        spread(self)
        self.eval()
        with torch.no_grad():  # codes among the vectors that there are, so that all are in use
            z = self.vectors(pictures())
            chosen = z.reshape(-1, sizes.width)[torch.randperm(z.numel() // sizes.width)]
            table = self.quantize.embedding.weight
            chosen = chosen.repeat(sizes.codes, 1)[: sizes.codes]
            table.copy_(chosen + 0.1 * torch.randn(table.shape))

    def vectors(self, image: Tensor) -> Tensor:
        """(B, H, W, D)."""
        return self.quant_conv(self.encoder(image)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def read(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, H, W), and by how much each is nearer than the next one."""
        z, codes = self.vectors(image), self.quantize.embedding.weight
        apart = (z[..., None, :] - codes).square().sum(-1)
        two = apart.sort(-1).values[..., :2]
        return apart.argmin(-1), two[..., -1] - two[..., 0]

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        values = self.quantize.embedding.weight[ids].permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(values)).clamp(-1, 1)


def pictures(side: int = 32) -> Tensor:
    """(2, 3, S, S) in [-1, 1], smooth enough for places to be alike and different."""
    torch.manual_seed(5)
    coarse = torch.rand(2, 3, 8, 8) * 2 - 1
    noise = 0.1 * torch.randn(2, 3, side, side)
    return (F.interpolate(coarse, size=(side, side), mode="bilinear") + noise).clamp(-1, 1)


class ModelCheckpoint:
    """Stands for a callback, whose class is a name in the file."""


class Wrapped:
    """Stands for settings in a class of the trainer's."""

    def __init__(self) -> None:
        self.content = {"lr": 4.5e-6, "device": torch.device("cpu")}
        self.parent = self


def last_ckpt(state: Any) -> dict[str, Any]:
    """What the trainer of taming-transformers writes."""
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
        "hyper_parameters": Wrapped(),
    }


def save_ckpt(content: Any, path: Path, **options: Any) -> Path:
    with foreign(shelf_trainer__callbacks__ModelCheckpoint=ModelCheckpoint, shelf__Wrapped=Wrapped):
        torch.save(content, path, **options)
    assert "shelf_trainer" not in sys.modules
    return path


def taming(folder: Path, sizes: Sizes, name: str = "last.ckpt") -> tuple[VQModel, Path]:
    model = VQModel(sizes)
    return model, save_ckpt(last_ckpt(model.state_dict()), folder / name)


SMALL = Sizes((1, 1, 2), (2,), 1, (3, 2))
SHAPES = {
    "two sides": Sizes((1, 2), (1,), 1, None, codes=7),
    "no attention": Sizes((1, 1, 2), (), 2, (2, 3)),
    "wide at first": Sizes((2, 1, 1, 1), (0, 3), 1, (4, 1), z=3, width=9),
    "three blocks": Sizes((1, 2, 1), (1, 2), 3, (1, 4)),
    "attention everywhere": Sizes((1, 1, 1), (0, 1, 2), 1, (3, 2)),
    "one code": Sizes((1, 1, 1), (2,), 1, None, codes=1),
    "more codes than vectors": Sizes((1, 1, 1, 2), (3,), 2, (5, 5), codes=32, width=2),
    "channels not 32": Sizes((1, 1, 3), (2,), 1, None, ch=64),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_vqgan_gives_the_codes_and_pictures_of_its_authors(name: str, tmp_path: Path) -> None:
    sizes = SHAPES[name]
    model, path = taming(tmp_path, sizes)
    note = import_weights("vqgan", path, tmp_path / "run")
    assert "codec_from" in note and "\n" not in note
    system = lineage.load(tmp_path / "run")
    assert isinstance(system, Prior) and not system.training
    codec, image = system.codec, pictures()
    assert isinstance(codec, VQGAN)
    assert (codec.codes, codec.factor) == (sizes.codes, 2 ** (len(sizes.mult) - 1))

    expected, margin = model.read(image)
    ids = codec.encode(image)
    clear = margin > 1e-3
    assert ids.shape == expected.shape and ids.dtype == torch.int64
    if sizes.codes > 1:
        assert clear.float().mean() > 0.9 and len(expected.unique()) > min(4, sizes.codes - 1)
        assert torch.equal(ids[clear], expected[clear])
    else:
        assert torch.equal(ids, expected)
    with torch.no_grad():
        drawn, wanted = codec.decode(expected), model.decode(expected)
    assert drawn.shape == image.shape and wanted.std() > 0.01
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(system.reconstruct(image)[:1], model.decode(ids)[:1], **CLOSE)


CLOSE: Any = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize("name", ["two sides", "wide at first", "three blocks", "no attention"])
def test_the_sizes_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    """Of codec, codebook and discriminator; and the run knows what it was made from."""
    sizes = SHAPES[name]
    _, path = taming(tmp_path, sizes)
    import_weights("vqgan", path, tmp_path / "run")
    saved = read_json(tmp_path / "run" / "config.json")
    assert (saved["key"], saved["size"], saved["codec_from"]) == ("vqgan", 256, "")
    assert saved["made_with"]["imported"] == "last.ckpt"
    net, codec = saved["codec"]["net"], saved["codec"]
    assert net["multipliers"] == list(sizes.mult) and net["channels"] == sizes.ch
    assert (net["blocks"], net["latent"]) == (sizes.blocks, sizes.z)
    assert sorted(net["attention"]) == sorted(256 // 2**k for k in sizes.attn)
    assert (codec["quantiser"]["codes"], codec["quantiser"]["width"]) == (sizes.codes, sizes.width)
    assert codec["quantiser"]["codebook"] == "loss" and codec["lpips"] == []
    if sizes.judge is not None:
        assert (codec["discriminator"], codec["layers"]) == sizes.judge


@pytest.mark.parametrize("name", ["no attention", "wide at first", "more codes than vectors"])
def test_the_discriminator_is_taken_too(name: str, tmp_path: Path) -> None:
    """With the statistics of its norms: training can go on with it."""
    model, path = taming(tmp_path, SHAPES[name])
    import_weights("vqgan", path, tmp_path / "run")
    codec: Any = lineage.load(tmp_path / "run").codec
    theirs, image = model.loss.discriminator.main.state_dict(), pictures(128)
    ours = codec.discriminator.main.state_dict()
    assert ours.keys() == theirs.keys() and len(ours) > 6
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    with torch.no_grad():
        wanted = model.loss.discriminator.main(image)
        torch.testing.assert_close(codec.discriminator(image), wanted)


def test_an_imported_codebook_does_not_start_again(tmp_path: Path) -> None:
    """Neither k-means nor restart may move codes that decoders were trained with."""
    model, path = taming(tmp_path, SMALL)
    import_weights("vqgan", path, tmp_path / "run")
    codec: Any = lineage.load(tmp_path / "run").codec
    assert bool(codec.quantiser.begun) and codec.config.quantiser.restart == 0
    codec.train()
    codec.quantiser(codec._vectors(pictures()))
    assert torch.equal(codec.quantiser.codes.data, model.quantize.embedding.weight.data)


def test_other_forms_of_the_file_are_read(tmp_path: Path) -> None:
    """Halved, from several GPUs, the state alone, as safetensors: always the same weights."""
    model = VQModel(SMALL)
    state = model.state_dict()
    halved = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    files = {
        "module.ckpt": save_ckpt(
            last_ckpt({f"module.{n}": t for n, t in state.items()}), tmp_path / "module.ckpt"
        ),
        "alone.pth": save_ckpt(state, tmp_path / "alone.pth"),
        "half.ckpt": save_ckpt(last_ckpt(halved), tmp_path / "half.ckpt"),
    }
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "v.safetensors")
    files["v.safetensors"] = tmp_path / "v.safetensors"
    for name, path in files.items():
        import_weights("vqgan", path, tmp_path / f"run-{name}")
        kept = load_tensors(tmp_path / f"run-{name}" / "model.safetensors")
        close = {"atol": 2e-3, "rtol": 1e-3} if "half" in name else {"atol": 0, "rtol": 0}
        for part in ("encoder.conv_in.weight", "decoder.conv_out.bias", "quant_conv.weight"):
            torch.testing.assert_close(kept[f"codec.{part}"], state[part], **close)
        assert kept["codec.quantiser.codes"].dtype == torch.float32


def test_a_file_of_the_old_form_is_read(tmp_path: Path) -> None:
    """Before torch 1.6 a checkpoint was no archive."""
    state = VQModel(SMALL).state_dict()
    path = save_ckpt(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    read = read_checkpoint(path)
    assert read.keys() == state.keys() and all(torch.equal(read[n], state[n]) for n in state)


def of_paper(name: str) -> State:
    if not KEYS_FILE.is_file():
        pytest.skip("the reference files are not beside this checkout")
    keys = json.loads(KEYS_FILE.read_text())[name]
    return {n: torch.empty(shape, device="meta") for n, shape in keys.items()}


def fits(codec: nn.Module, weights: State, absent: tuple[str, ...]) -> None:
    """Every tensor has its place, with its shape; what is left over was announced."""
    own = {f"codec.{n}": tuple(t.shape) for n, t in codec.state_dict().items()}
    assert all(own[name] == tuple(tensor.shape) for name, tensor in weights.items())
    left = own.keys() - weights.keys()
    assert all(name.startswith(absent) for name in left), left


def test_the_published_vqgan_at_its_size() -> None:
    """f16 of 1,024 codes: every tensor that the public file has, in the preset `paper`."""
    state = of_paper("taming_vqgan_imagenet_f16_1024")
    found = import_vqgan([Given(Path("last.ckpt"), state)])
    config: Any = found.config
    paper: Any = find_recipe("vqgan").PRESETS["paper"]
    assert config.codec.net == paper.codec.net == AutoencoderConfig()
    assert (config.codec.quantiser.codes, config.codec.quantiser.width) == (1024, 256)
    assert config.preset == "paper" and config.size == paper.size == 256
    with torch.device("meta"):
        codec = VQGAN(config.codec)
    fits(codec, found.weights, found.absent)
    wanted = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    assert len(found.weights) == sum(n.startswith(wanted) for n in state) + 2


def test_the_published_dvae_at_its_size() -> None:
    files = [Given(Path(f"{p}.pkl"), of_paper(f"dalle_dvae/{p}")) for p in ("Encoder", "Decoder")]
    for order in (files, files[::-1]):
        found = import_dalle(order)
        config: Any = found.config
        assert config.codec == DVAEConfig() and config.size == 256
        with torch.device("meta"):
            codec = DVAE(config.codec)
        fits(codec, found.weights, found.absent)
        assert len(found.weights) == sum(len(file.tensors) for file in files)


def test_the_prior_of_an_import_is_of_the_codec(tmp_path: Path) -> None:
    """It is untrained, yet it draws: the folder is a run like any other."""
    _, path = taming(tmp_path, Sizes((1, 1, 1, 1, 1, 1), (5,), 1))
    run, sheet = tmp_path / "run", tmp_path / "sheet.png"
    assert main(["import-weights", "vqgan", str(path), "--out", str(run)]) == 0
    system: Any = lineage.load(run)
    assert system.side == 8 and system.code.num_embeddings == 11
    assert main(["sample", str(run), "a red circle", "--out", str(sheet)]) == 0
    assert sheet.is_file()


# --- DALL-E's dVAE ----------------------------------------------------------------------------


class Conv2d(nn.Module):
    def __init__(self, a: int, b: int, kw: int, **more: Any) -> None:
        self.n_in, self.n_out, self.kw = a, b, kw  # fields are set before the module is begun
        self.use_float16, self.device = more.get("use_float16", True), torch.device("cpu")
        self.requires_grad = False
        super().__init__()
        self.w = nn.Parameter(torch.randn(b, a, kw, kw) * 1.5 / (a * kw**2) ** 0.5, False)
        self.b = nn.Parameter(0.2 * torch.randn(b), False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)


class Block(nn.Module):
    """`kernels` of the four convolutions."""

    def __init__(self, a: int, b: int, kernels: Sequence[int], n_layers: int) -> None:
        self.n_in, self.n_out, self.n_layers, self.device = a, b, n_layers, torch.device("cpu")
        super().__init__()
        self.n_hid, self.post_gain = b // 4, 1 / n_layers**2
        self.id_path = Conv2d(a, b, 1) if a != b else nn.Identity()
        widths = (a, b // 4, b // 4, b // 4, b)
        layers: list[tuple[str, nn.Module]] = []
        for k in range(4):
            layers.append((f"relu_{k + 1}", nn.ReLU()))
            layers.append((f"conv_{k + 1}", Conv2d(widths[k], widths[k + 1], kernels[k])))
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


class EncoderBlock(Block):
    pass


class DecoderBlock(Block):
    pass


def blocks_of(
    kind: type[Block], first: nn.Module, widths: list[int], blocks: int, between: nn.Module
) -> list[tuple[str, nn.Module]]:
    kernels = (3, 3, 3, 1) if kind is EncoderBlock else (1, 3, 3, 3)
    made: list[tuple[str, nn.Module]] = [("input", first)]
    width: int = first.n_out
    for group, outputs in enumerate(widths, start=1):
        inner: list[tuple[str, nn.Module]] = []
        for number in range(1, blocks + 1):
            block = kind(width, outputs, kernels, len(widths) * blocks)
            inner.append((f"block_{number}", block))
            width = outputs
        if group < len(widths):
            inner.append(("pool" if kind is EncoderBlock else "upsample", between))
        made.append((f"group_{group}", nn.Sequential(OrderedDict(inner))))
    return made


def output(a: int, b: int) -> tuple[str, nn.Module]:
    last = [("relu", nn.ReLU()), ("conv", Conv2d(a, b, 1, use_float16=False))]
    return "output", nn.Sequential(OrderedDict(last))


class Encoder(nn.Module):
    def __init__(self, hid: int, blocks: int, words: int, groups: int = 4) -> None:
        self.n_hid, self.vocab_size, self.device = hid, words, torch.device("cpu")
        super().__init__()
        widths = [hid * 2**k for k in range(groups)]
        made = blocks_of(EncoderBlock, Conv2d(3, hid, 7), widths, blocks, nn.MaxPool2d(2))
        self.blocks = nn.Sequential(OrderedDict([*made, output(widths[-1], words)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    def __init__(self, hid: int, init: int, blocks: int, words: int, groups: int = 4) -> None:
        self.n_init, self.n_hid, self.device = init, hid, torch.device("cpu")
        super().__init__()
        widths = [hid * 2**k for k in reversed(range(groups))]
        between = nn.Upsample(scale_factor=2, mode="nearest")
        made = blocks_of(DecoderBlock, Conv2d(words, init, 1), widths, blocks, between)
        self.blocks = nn.Sequential(OrderedDict([*made, output(hid, 6)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


DALL_E = {
    "dall_e__utils__Conv2d": Conv2d,
    "dall_e__encoder__EncoderBlock": EncoderBlock,
    "dall_e__decoder__DecoderBlock": DecoderBlock,
    "dall_e__encoder__Encoder": Encoder,
    "dall_e__decoder__Decoder": Decoder,
    "dall_e__utils__Wrapped": Wrapped,
}


def save_module(module: Any, path: Path, **options: Any) -> Path:
    with foreign(**DALL_E):
        torch.save(module, path, **options)
    assert not [name for name in sys.modules if name.startswith("dall_e")]
    return path


class Pair(NamedTuple):
    """The two networks of a dVAE, and their files."""

    encoder: Encoder
    decoder: Decoder
    files: list[Path]


def published(
    folder: Path, hid: int = 4, init: int = 5, blocks: int = 1, words: int = 12, groups: int = 4
) -> Pair:
    torch.manual_seed(9)
    encoder = Encoder(hid, blocks, words, groups).eval()
    decoder = Decoder(hid, init, blocks, words, groups).eval()
    paths = [save_module(n, folder / f"{type(n).__name__.lower()}.pkl") for n in (encoder, decoder)]
    return Pair(encoder, decoder, paths)


DVAES = {
    "one block": {},
    "two blocks": {"hid": 8, "init": 3, "blocks": 2, "words": 40},
    "three blocks": {"hid": 12, "init": 16, "blocks": 3, "words": 5},
    "three groups": {"groups": 3, "blocks": 2, "hid": 8, "words": 20},
    "as wide in as out": {"hid": 4, "init": 32},  # the decoder's first block has no id_path
}


@pytest.mark.parametrize("name", DVAES)
def test_a_dvae_gives_the_codes_and_pictures_of_its_authors(name: str, tmp_path: Path) -> None:
    """Whichever of its two files is named first."""
    pair = published(tmp_path, **DVAES[name])
    turned = name == "two blocks"
    note = import_weights("dalle", pair.files[::-1] if turned else pair.files, tmp_path / "run")
    assert "codec_from" in note and "\n" not in note
    system: Any = lineage.load(tmp_path / "run")
    codec, image = system.codec, pictures()
    assert isinstance(codec, DVAE)
    mapped = 0.1 + 0.8 * (image + 1) / 2
    with torch.no_grad():
        logits = pair.encoder(mapped)
        ids, two = logits.argmax(1), logits.topk(2, dim=1).values
        mixture = F.one_hot(ids, logits.shape[1]).permute(0, 3, 1, 2).float()
        painted = pair.decoder(mixture)[:, :3].sigmoid()
        expected = ((painted - 0.1) / 0.8).clamp(0, 1) * 2 - 1
        found, drawn = codec.encode(image), codec.decode(ids)
    clear = two[:, 0] - two[:, 1] > 1e-3
    assert clear.float().mean() > 0.9 and len(ids.unique()) > 2
    assert torch.equal(found[clear], ids[clear])
    assert drawn.shape == image.shape and drawn.std() > 0.01
    torch.testing.assert_close(drawn, expected, **CLOSE)
    saved = read_json(tmp_path / "run" / "config.json")
    assert (saved["key"], saved["size"]) == ("dalle", 256)
    sizes = {"hid": 4, "init": 5, "blocks": 1, "words": 12, "groups": 4, **DVAES[name]}
    ours = {"hid": "width", "init": "start", "words": "codes"}
    assert all(saved["codec"][ours.get(n, n)] == value for n, value in sizes.items())
    names = "decoder.pkl, encoder.pkl" if turned else "encoder.pkl, decoder.pkl"
    assert saved["made_with"]["imported"] == names


def test_the_files_may_have_other_names_and_be_states_alone(tmp_path: Path) -> None:
    """Which is which is told by what they hold."""
    pair = published(tmp_path)
    paths = [
        save_module(pair.decoder.state_dict(), tmp_path / "a.pt"),
        save_module({"state_dict": pair.encoder.state_dict()}, tmp_path / "b.ckpt"),
    ]
    import_weights("dalle", paths, tmp_path / "one")
    import_weights("dalle", pair.files, tmp_path / "two")
    one, two = (load_tensors(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    codec = [name for name in one if name.startswith("codec.")]
    assert len(codec) > 50 and all(torch.equal(one[n], two[n]) for n in codec)


def test_a_module_is_read_by_the_names_of_its_state(tmp_path: Path) -> None:
    """Parameters, buffers, layers inside layers, one used twice, and what is None."""
    twice = nn.Linear(3, 2, bias=False)
    inner = nn.Sequential(twice, nn.BatchNorm2d(2), twice, nn.LSTM(2, 2), nn.Identity())
    whole = nn.ModuleDict({"a": inner, "b": nn.ParameterList([torch.ones(2), torch.zeros(1)])})
    whole.register_parameter("none", None)
    whole.register_buffer("count", torch.tensor(7))
    read = read_checkpoint(save_module(whole, tmp_path / "m.pkl"))
    state = whole.state_dict()
    assert read.keys() == state.keys() and all(torch.equal(read[n], state[n]) for n in state)
    read = read_checkpoint(save_module(nn.DataParallel(inner), tmp_path / "parallel.pkl"))
    assert read.keys() == inner.state_dict().keys()


def test_buffers_that_a_module_does_not_save_are_left_out(tmp_path: Path) -> None:
    """As from its state: they would be tensors too many."""
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.ones(2), persistent=False)
    read = read_checkpoint(save_module(module, tmp_path / "m.pkl"))
    assert read.keys() == {"weight", "bias"}


# --- what is no tensor ------------------------------------------------------------------------


class Attributes(dict):  # type: ignore[type-arg]
    """A dictionary whose entries are attributes, in which trainers keep settings."""


class Many(list):  # type: ignore[type-arg]
    """A list of a class of its own."""


class Kind(Enum):
    ONE = 1


class Point(NamedTuple):
    x: int
    y: int


class Slots:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, torch.ones(2)


class Stateful:
    """Has a state of its own making."""

    def __getstate__(self) -> Any:
        return ("version", 2, [torch.ones(1)])

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("this was executed")


CLASSES = (Kind, Point, Slots, Stateful)

EXTRAS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float16,
    "class": lambda: ModelCheckpoint,
    "function": lambda: torch.nn.functional.relu,
    "object": Wrapped,
    "partial": lambda: partial(nn.Conv2d, 3, device=torch.device("cpu")),
    "numpy scalar": lambda: np.float64(0.5),
    "numpy array": lambda: np.arange(3),
    "path": lambda: Path("logs/last.ckpt"),
    "enumeration": lambda: Kind.ONE,
    "named tuple": lambda: Point(1, 2),
    "slots": Slots,
    "state that is no dictionary": Stateful,
    "bytes": lambda: b"\x00\xff",
    "set": lambda: {1, 2},
    "range": lambda: range(3),
    "module": lambda: nn.Linear(2, 2),
    "exception": lambda: ValueError("x"),
}


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("where", ["beside the state", "attribute of a module"])
def test_what_is_no_tensor_does_not_stand_in_the_way(name: str, where: str, tmp_path: Path) -> None:
    """Settings, callbacks and attributes of foreign classes lie beside the tensors."""
    path, module = tmp_path / "x.ckpt", nn.Linear(2, 2)
    named = {f"shelf__{kind.__name__}": kind for kind in (*CLASSES, ModelCheckpoint, Wrapped)}
    with foreign(**named):
        extra = EXTRAS[name]()
        if where == "beside the state":
            content: Any = {"hyper_parameters": {"a": extra}, "state_dict": module.state_dict()}
        else:
            module.extra = extra
            content = module
        torch.save(content, path)
    assert "shelf" not in sys.modules
    read = read_checkpoint(path)
    expected = {f"extra.{n}" for n in ("weight", "bias")} if hasattr(module, "extra") else set()
    expected = {"weight", "bias"} | (expected if name == "module" else set())
    assert read.keys() == expected and torch.equal(read["weight"], module.weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attributes(lr=1e-3),
        lambda: Many([1, 2]),
        lambda: defaultdict(list, a=[1]),
        lambda: deque([1, 2]),
    ],
    ids=["dictionary", "list", "defaultdict", "deque"],
)
def test_containers_of_their_own_class_are_read_or_told(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    """Entries that a class of its own would put where it likes may be too much to ask for."""
    path, said = tmp_path / "x.ckpt", ""
    with foreign(shelf__Attributes=Attributes, shelf__Many=Many):
        torch.save({"hyper_parameters": make(), "state_dict": {"weight": torch.ones(2)}}, path)
    try:
        assert read_checkpoint(path).keys() == {"weight"}
    except UserError as refused:
        said = str(refused)
    assert not said or (str(path) in said and "\n" not in said)


# --- nothing is executed ----------------------------------------------------------------------


def touch(path: str) -> None:
    Path(path).touch()


class Calls:
    """A pickle of a call: `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.how = (function, arguments)

    def __reduce__(self) -> Any:
        return self.how


class Born:
    """Does something when it is made."""

    def __new__(cls, path: str = "") -> Born:
        if path:
            touch(path)
        return super().__new__(cls)

    def __init__(self, path: str = "") -> None:
        self.path = path

    def __getnewargs__(self) -> tuple[str]:
        return (self.path,)


class Awakes:
    """Does something when its state is put back."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, str]) -> None:
        touch(state["path"])


class Holds(dict):  # type: ignore[type-arg]
    """Does something when an entry is put back."""

    def __setitem__(self, key: Any, value: Any) -> None:
        touch(value)


class Gathers(list):  # type: ignore[type-arg]
    """Does something when its items are put back."""

    def append(self, item: Any) -> None:
        touch(item)

    def extend(self, items: Any) -> None:
        for item in items:
            touch(item)


class Counted:
    """Does something when it becomes the key of a dictionary."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Counted, (self.path,)

    def __hash__(self) -> int:
        touch(self.path)
        return 1


class Setter:
    """Has its state put back by a function."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Born, (), self.path, None, None, put_back


def put_back(made: Any, state: str) -> None:
    touch(state)


def code(path: str) -> str:
    return f"open({path!r}, 'w').close()"


def bomb(path: str) -> bytes:
    return pickle.dumps(Calls(touch, path))


PAYLOADS: dict[str, Callable[[str], Any]] = {
    "os.system": lambda path: Calls(os.system, f"touch {path}"),
    "eval": lambda path: Calls(eval, code(path)),
    "exec": lambda path: Calls(exec, code(path)),
    "open": lambda path: Calls(open, path, "w"),
    "process": lambda path: Calls(subprocess.check_call, ["touch", path]),
    "method": lambda path: Calls(pathlib.Path.touch, pathlib.Path(path)),
    "function of a module that is there": lambda path: Calls(touch, path),
    "partial": lambda path: Calls(partial(touch, path)),
    "pickle in a pickle": lambda path: Calls(pickle.loads, bomb(path)),
    "codecs": lambda path: Calls(codecs.open, path, "w"),
    "__new__": Born,
    "__setstate__": Awakes,
    "__setitem__": lambda path: holding(path),
    "append": lambda path: gathering(path),
    "__hash__": lambda path: keyed(path),
    "state setter": Setter,
}


def holding(path: str) -> Holds:
    made = Holds()
    dict.__setitem__(made, "a", path)
    return made


def gathering(path: str) -> Gathers:
    made = Gathers()
    list.append(made, path)
    return made


def keyed(path: str) -> dict[Any, int]:
    made = {Counted(path): 1}
    Path(path).unlink(missing_ok=True)
    return made


def with_attribute(payload: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    module.extra = payload
    return module


def with_layer(payload: Any) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module._modules["1"] = payload
    return module


def with_parameter(payload: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    module._parameters["bias"] = payload
    return module


PLACES: dict[str, Callable[[Any], Any]] = {
    "alone": lambda payload: payload,
    "in the state": lambda payload: {"weight": torch.ones(2), "more": payload},
    "beside the state": lambda payload: last_ckpt({"weight": torch.ones(2)}) | {"more": payload},
    "attribute": with_attribute,
    "layer": with_layer,
    "parameter": with_parameter,
}

FORMS: dict[str, Callable[[Any, Path], None]] = {
    "archive": torch.save,
    "old form": partial(torch.save, _use_new_zipfile_serialization=False),
    "protocol 4": partial(torch.save, pickle_protocol=4),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "pickle 2": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
    "pickle 0": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=0)),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_payloads_would_do_their_harm(name: str, tmp_path: Path) -> None:
    """Or else the next test would prove nothing."""
    trace = tmp_path / "it_ran"
    data = pickle.dumps(PAYLOADS[name](str(trace)), protocol=2)
    trace.unlink(missing_ok=True)
    with suppress(Exception):
        pickle.loads(data)
    assert trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PAYLOADS)
def test_reading_executes_nothing(name: str, place: str, tmp_path: Path) -> None:
    """However it was written; and nothing but the sentence may be raised."""
    trace = tmp_path / "it_ran"
    allowed = set(torch.serialization.get_safe_globals())
    for form, save in FORMS.items():
        path = tmp_path / f"{form}.pkl"
        with foreign(shelf_trainer__ModelCheckpoint=ModelCheckpoint, shelf__Wrapped=Wrapped):
            content = PLACES[place](PAYLOADS[name](str(trace)))
            save(content, path)
        trace.unlink(missing_ok=True)
        with suppress(UserError):
            read = read_checkpoint(path)
            assert all(type(v) in (Tensor, nn.Parameter) for v in read.values())
        assert not trace.exists(), form
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_reading_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that lies where Python would find it is not even looked at."""
    trace = tmp_path / "it_ran"
    (tmp_path / "trap_of_this_test.py").write_text(f"{code(str(trace))}\nclass Wrapped: pass\n")
    with foreign(trap_of_this_test__Wrapped=Wrapped, shelf_trainer__M=ModelCheckpoint):
        torch.save(last_ckpt({"weight": torch.ones(2)}), tmp_path / "a.ckpt")
        torch.save(Wrapped(), tmp_path / "b.pkl")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_checkpoint(tmp_path / "a.ckpt").keys() == {"weight"}
    with suppress(UserError):
        assert read_checkpoint(tmp_path / "b.pkl") == {}
    assert not trace.exists() and "trap_of_this_test" not in sys.modules


def test_the_switch_for_trusted_files_does_not_open_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a variable by which users tell torch to trust every file."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace = tmp_path / "it_ran"
    for number, old in enumerate((True, False)):
        path = tmp_path / f"{number}.ckpt"
        torch.save(Calls(touch, str(trace)), path, _use_new_zipfile_serialization=old)
        with suppress(UserError):
            read_checkpoint(path)
    assert not trace.exists()


def test_archives_of_other_kinds_are_not_executed(tmp_path: Path) -> None:
    """A program of torch's own, and the tar files of its first versions."""
    script, tar, trace = tmp_path / "script.pt", tmp_path / "old.pth", tmp_path / "it_ran"
    torch.jit.script(nn.Linear(2, 2)).save(str(script))
    for name in ("storages", "tensors", "pickle"):
        (tmp_path / name).write_bytes(bomb(str(trace)))
    with tarfile.open(tar, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(tmp_path / name, name)
    for path in (script, tar):
        with pytest.raises(UserError, match=path.name):
            read_checkpoint(path)
    assert not trace.exists()


def test_an_import_of_a_trap_writes_no_run(tmp_path: Path, told: Told) -> None:
    trace, paths = tmp_path / "it_ran", []
    for name in ("encoder.pkl", "decoder.pkl"):
        paths.append(tmp_path / name)
        torch.save(Calls(os.system, f"touch {trace}"), paths[-1])
    told("dalle", paths)
    told("vqgan", paths[:1])
    assert not trace.exists()


# --- what does not fit ------------------------------------------------------------------------

Told = Callable[..., None]


@pytest.fixture
def told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Told:
    """Import files and expect one sentence that has all the words, and no run."""

    def told(key: str, paths: Sequence[Path], *words: str) -> None:
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

    return told


CONTENTS: dict[str, Any] = {
    "nothing": {},
    "a list": [torch.zeros(2)],
    "a number": 3,
    "a tensor": torch.zeros(2),
    "other tensors": {"weight": torch.zeros(2)},
    "an empty state": {"state_dict": {}},
    "a state of numbers": {"state_dict": {"encoder.conv_in.weight": 3}},
    "a foreign object": Wrapped,
    "a module": lambda: nn.Conv2d(3, 3, 3),
    "a class": lambda: Wrapped,
}


@pytest.mark.parametrize("key", ["vqgan", "dalle"])
@pytest.mark.parametrize("name", CONTENTS)
def test_files_of_something_else_are_told(name: str, key: str, tmp_path: Path, told: Told) -> None:
    path = tmp_path / "x.ckpt"
    content = CONTENTS[name]
    with foreign(shelf__Wrapped=Wrapped):
        torch.save(content() if callable(content) else content, path)
    told(key, [path] if key == "vqgan" else [path, path], str(path))


@pytest.mark.parametrize("key", ["vqgan", "dalle"])
@pytest.mark.parametrize("ending", ["ckpt", "pkl", "safetensors", "txt"])
@pytest.mark.parametrize("content", [b"", b"a list of\nwords\n", b"PK\x03\x04 cut", b"\x80\x02}q."])
def test_files_that_hold_no_tensors_are_told(
    content: bytes, ending: str, key: str, tmp_path: Path, told: Told
) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    told(key, [path] * (1 if key == "vqgan" else 2), path.name)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_files_that_were_cut_short_are_told(share: float, tmp_path: Path, told: Told) -> None:
    _, whole = taming(tmp_path, SMALL)
    pair = published(tmp_path)
    for path in (whole, pair.files[0]):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
    told("vqgan", [whole], "last.ckpt")
    told("dalle", pair.files, "encoder.pkl")


def test_a_file_with_damage_inside_is_told(tmp_path: Path, told: Told) -> None:
    """Its length is right, its middle is zeros."""
    pair = published(tmp_path)
    data = bytearray(pair.files[0].read_bytes())
    data[100:4000] = bytes(3900)
    pair.files[0].write_bytes(data)
    told("dalle", pair.files, "encoder.pkl")


def test_files_that_are_absent_are_told(tmp_path: Path, told: Told) -> None:
    pair, absent = published(tmp_path), tmp_path / "absent.pkl"
    told("vqgan", [absent], "There is no file")
    told("dalle", [pair.files[0], absent], "There is no file", "absent.pkl")
    told("vqgan", [tmp_path], "There is no file")


def test_files_of_the_other_system_are_told(tmp_path: Path, told: Told) -> None:
    _, ckpt = taming(tmp_path, SMALL)
    pair = published(tmp_path)
    told("vqgan", pair.files[:1], "encoder.pkl", "VQGAN")
    told("dalle", [ckpt], "last.ckpt")
    told("dalle", [pair.files[0], ckpt], "last.ckpt", "neither")
    told("stackgan", [ckpt], "last.ckpt")
    told("attngan", pair.files, "generator")


def test_a_dvae_has_two_files(tmp_path: Path, told: Told) -> None:
    pair = published(tmp_path)
    again = [tmp_path / f"again_{path.name}" for path in pair.files]
    for path, copy in zip(pair.files, again, strict=True):
        copy.write_bytes(path.read_bytes())
    encoder, decoder = pair.files
    for paths in (
        [encoder],
        [decoder],
        [encoder, again[0]],
        [decoder, again[1]],
        [encoder, encoder],
        [encoder, decoder, again[0]],
        [encoder, decoder, again[1]],
    ):
        told("dalle", paths, "two files", "encoder.pkl and decoder.pkl")


def test_a_vqgan_has_one_file(tmp_path: Path, told: Told) -> None:
    _, path = taming(tmp_path, SMALL)
    other = tmp_path / "other.ckpt"
    other.write_bytes(path.read_bytes())
    told("vqgan", [path, other], "one file", "other.ckpt")


def test_halves_of_two_dvaes_are_told(tmp_path: Path, told: Told) -> None:
    """Of other widths, depths or codes."""
    pair = published(tmp_path)
    for number, sizes in enumerate([{"hid": 8}, {"blocks": 2}, {"words": 13}, {"groups": 3}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        other = published(folder, **sizes)
        told("dalle", [pair.files[0], other.files[1]], "does not fit dalle")
        told("dalle", [other.files[0], pair.files[1]], "does not fit dalle")


def lacking(name: str) -> Callable[[State], State]:
    return lambda state: {n: t for n, t in state.items() if n != name}


def having(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lacking("quantize.embedding.weight"), "quantize.embedding.weight"),
        (lacking("encoder.conv_in.weight"), "VQGAN"),
        (lacking("encoder.conv_in.bias"), "encoder.conv_in.bias"),
        (lacking("quant_conv.weight"), "quant_conv.weight"),
        (lacking("post_quant_conv.bias"), "post_quant_conv.bias"),
        (lacking("encoder.down.1.block.0.conv2.weight"), "encoder.down.1.block.0.conv2.weight"),
        (lacking("decoder.up.2.upsample.conv.bias"), "decoder.up.0.resample.conv.bias"),
        (lacking("decoder.mid.attn_1.q.weight"), "decoder.mid.attn_1.q.weight"),
        (having("encoder.more.weight", 1), "encoder.more.weight"),
        (having("decoder.conv_out.weight", 3, 3, 3, 3), "decoder.conv_out.weight"),
        (having("quantize.embedding.weight", 11, 7), "quant_conv"),
        pytest.param(having("quantize.embedding.weight", 11), "", id="a row of codes"),
        pytest.param(having("quantize.embedding.weight"), "", id="a number as codes"),
        pytest.param(having("encoder.conv_in.weight"), "", id="a number as kernel"),
        pytest.param(having("encoder.conv_in.weight", 0, 3, 3, 3), "", id="no channels"),
        (having("loss.discriminator.main.0.weight", 7, 3, 4, 4), "discriminator"),
        (having("loss.discriminator.main.3.loc", 1), "discriminator.main.3.loc"),
    ],
)
def test_vqgans_with_tensors_missing_or_other_are_told(
    change: Callable[[State], State], word: str, tmp_path: Path, told: Told
) -> None:
    state = change(dict(VQModel(SMALL).state_dict()))
    path = save_ckpt(last_ckpt(state), tmp_path / "last.ckpt")
    told("vqgan", [path], "last.ckpt", word)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lacking("blocks.input.w"), "encoder.pkl"),
        (lacking("blocks.output.conv.w"), "blocks.output.conv.w"),
        (lacking("blocks.group_2.block_1.id_path.b"), "groups.1.0.identity.bias"),
        (lacking("blocks.group_4.block_1.res_path.conv_3.w"), "groups.3.0.path.5.weight"),
        (having("blocks.group_1.block_1.more.w", 2), "more"),
        (having("blocks.group_1.block_1.res_path.conv_1.w", 1, 4, 5, 5), "path.1.weight"),
        pytest.param(having("blocks.input.w", 4), "", id="a row as kernel"),
        pytest.param(having("blocks.input.w"), "", id="a number as kernel"),
        pytest.param(having("blocks.output.conv.w"), "", id="a number as last kernel"),
    ],
)
def test_dvaes_with_tensors_missing_or_other_are_told(
    change: Callable[[State], State], word: str, tmp_path: Path, told: Told
) -> None:
    pair = published(tmp_path)
    path = save_module(change(dict(pair.encoder.state_dict())), tmp_path / "encoder.pkl")
    told("dalle", [path, pair.files[1]], word)


def test_a_codebook_of_another_kind_is_told(tmp_path: Path, told: Told) -> None:
    """The Gumbel VQGAN of the same authors has a projection for its codebook."""
    state = dict(VQModel(SMALL).state_dict())
    del state["quantize.embedding.weight"]
    state |= {"quantize.embed.weight": torch.ones(3, 5), "quantize.proj.weight": torch.ones(3, 6)}
    path = save_ckpt(last_ckpt(state), tmp_path / "gumbel.ckpt")
    told("vqgan", [path], "gumbel.ckpt", "quantize.embedding.weight")


class Odd:
    """Looks like a module and is none."""

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
def test_objects_that_look_like_modules_are_told(
    attributes: dict[str, Any], tmp_path: Path, told: Told
) -> None:
    path = tmp_path / "x.pkl"
    with foreign(shelf__Odd=Odd):
        torch.save(Odd(**attributes), path)
    told("vqgan", [path], "x.pkl")


def test_a_module_that_holds_itself_is_told(tmp_path: Path, told: Told) -> None:
    path, module = tmp_path / "x.pkl", nn.Linear(2, 2)
    module._modules["again"] = module
    torch.save(module, path)
    told("vqgan", [path], "x.pkl")


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    pair = published(tmp_path)
    import_weights("dalle", pair.files, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds a run already.*--out"):
        import_weights("dalle", pair.files[:1], tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


# --- what imports are for ---------------------------------------------------------------------


@pytest.mark.parametrize("key", ["vqgan", "dalle"])
def test_a_prior_is_trained_on_a_published_codec(
    key: str, tmp_path: Path, train_run: Callable[..., Any]
) -> None:
    """As the note says: by codec_from, with pictures of another side than the codec's own."""
    files = [taming(tmp_path, SMALL)[1]] if key == "vqgan" else published(tmp_path).files
    import_weights(key, files, tmp_path / "codec")
    settings = {"codec_from": str(tmp_path / "codec")}
    run = train_run(tmp_path / "run", key, settings, steps=2)
    theirs = load_tensors(tmp_path / "codec" / "model.safetensors")
    ours = load_tensors(tmp_path / "run" / "model.safetensors")
    codec = [name for name in theirs if name.startswith("codec.")]
    assert len(codec) > 20 and all(torch.equal(theirs[n], ours[n]) for n in codec)
    assert read_json(tmp_path / "run" / "config.json")["size"] == 16
    drawn = run.system.generate(["a red circle"], seed=1)
    torch.testing.assert_close(
        lineage.load(tmp_path / "run").generate(["a red circle"], seed=1), drawn
    )


def test_sizes_are_read_without_the_weights() -> None:
    """From shapes alone; the widest level decides nothing but itself."""
    state = VQModel(Sizes((1, 3, 2), (0, 2), 2, (6, 2))).state_dict()
    config = vqgan_config({n: t.to("meta") for n, t in state.items()})
    assert config.net == AutoencoderConfig(32, (1, 3, 2), 2, (256, 64), 256, 6)
    assert (config.discriminator, config.layers) == (6, 2)
