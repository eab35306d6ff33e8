"""The diffusion transformer: its table, its patches, its blocks and its words, each by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage import runs
from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import CaptionedDataset
from lineage.diffusion.networks.dit import (
    SIZES,
    Block,
    DiT,
    DiTConfig,
    DiTSystem,
    modulated,
    places_table,
)
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.recipes import dit as recipe
from lineage.text.contract import TextFeatures
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "reference"
TINY = DiTConfig(width=24, layers=2, heads=3, patch=2, words=5)
TEXT, SHAPE = 7, (3, 8, 4)  # width of the text; latents, higher than wide


def made(config: DiTConfig = TINY, outputs: int = 3, start: bool = False, **changes: Any) -> DiT:
    """With every weight away from zero, unless it is to stand at its start."""
    torch.manual_seed(0)
    net = DiT(replace(config, **changes), TEXT, SHAPE, outputs)
    if not start:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def text_of(*lengths: int, places: int = 0) -> TextFeatures:
    """Rows of so many words, padding behind them that says something too."""
    count = max(*lengths, places)
    stream = torch.Generator().manual_seed(11)
    words = torch.randn(len(lengths), 12, TEXT, generator=stream)[:, :count]
    sentence = torch.randn(len(lengths), TEXT, generator=stream)
    mask = torch.tensor([[k < length for k in range(count)] for length in lengths])
    return TextFeatures(words, mask, sentence, mask.long())


def given(rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, *SHAPE), torch.tensor([3, 700, 41, 999][:rows])


# --- the table of places ----------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height", "across"), [(8, 2, 3), (24, 4, 4), (4, 1, 5)])
def test_the_table_by_loops(width: int, height: int, across: int) -> None:
    """Sines, then cosines, of the column; then of the row; row by row."""
    table = places_table(width, height, across)
    assert table.shape == (height * across, width) and table.dtype == torch.float32
    quarter = width // 4
    for row in range(height):
        for column in range(across):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (k / quarter) for k in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            found = table[row * across + column].tolist()
            assert found == pytest.approx(expected, abs=1e-6)


def test_places_differ_and_are_not_learnt() -> None:
    net = made()
    assert len(net.places.unique(dim=0)) == 4 * 2
    assert "places" not in net.state_dict() and not net.places.requires_grad
    assert net.grid == (4, 2)


# --- patches ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_token_is_a_patch_at_its_place(patch: int) -> None:
    """Row by row, a sum over the patch's pixels and channels."""
    net, (x, _) = made(patch=patch), given()
    tokens, across = net.tokens(x), SHAPE[2] // patch
    assert tokens.shape == (2, SHAPE[1] * SHAPE[2] // patch**2, 24)
    for number in range(tokens.shape[1]):
        row, column = number // across * patch, number % across * patch
        pixels = x[:, :, row : row + patch, column : column + patch].flatten(1)
        expected = pixels @ net.enter.weight.flatten(1).T + net.enter.bias + net.places[number]
        torch.testing.assert_close(tokens[:, number], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_what_leaves_a_token_is_put_in_its_patch(patch: int) -> None:
    """The numbers of a token go by row, column and channel."""
    net = made(patch=patch, outputs=5)
    net.leave.weight.zero_()
    net.leave.bias.copy_(torch.arange(float(patch**2 * 5)))
    drawn = net(*given(), text_of(2, 4))
    assert drawn.shape == (2, 5, 8, 4)
    for channel in range(5):
        for row in range(8):
            for column in range(4):
                number = (row % patch * patch + column % patch) * 5 + channel
                assert (drawn[:, channel, row, column] == number).all()


def test_a_patch_that_nobody_reads_stays_in_its_patch() -> None:
    """Without what goes between places, each pixel is told of by those of its own patch alone."""
    net, (x, t) = made(), given(1)
    for block in net.blocks:
        nn.init.zeros_(block.attn.out.weight)  # type: ignore[union-attr, arg-type]
    x.requires_grad_()
    drawn = net(x, t, text_of(3))
    for row in range(8):
        for column in range(4):
            (grad,) = torch.autograd.grad(drawn[0, :, row, column].sum(), x, retain_graph=True)
            reached = grad[0].abs().amax(0) > 0
            expected = torch.zeros(8, 4, dtype=torch.bool)
            up, left = row // 2 * 2, column // 2 * 2
            expected[up : up + 2, left : left + 2] = True
            assert torch.equal(reached, expected)


def shuffled(x: Tensor, order: list[int]) -> Tensor:
    """Patches of 2 x 2 in another order."""
    rows = F.unfold(x, 2, stride=2)[:, :, order]
    return F.fold(rows, x.shape[2:], 2, stride=2)


@torch.no_grad()
def test_patches_in_another_order_are_drawn_in_that_order() -> None:
    """If all places were alike; the table alone tells them apart."""
    net, (x, t) = made(), given()
    text, order = text_of(2, 4), torch.randperm(8).tolist()
    drawn = net(x, t, text)
    assert (net(shuffled(x, order), t, text) - shuffled(drawn, order)).abs().max() > 1e-2
    net.places.zero_()
    drawn = net(x, t, text)
    found = net(shuffled(x, order), t, text)
    torch.testing.assert_close(found, shuffled(drawn, order), atol=1e-5, rtol=1e-4)


# --- the start --------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_starts_as_zero_and_its_blocks_as_the_identity() -> None:
    """adaLN-Zero: whatever it is given."""
    net, (x, t) = made(start=True), given()
    assert not net(x, t, text_of(2, 4)).any()
    tokens, told = torch.randn(2, 6, 24), torch.randn(2, 24)
    for block in net.blocks:
        assert torch.equal(block(tokens, told), tokens)
    assert not net.modulation.weight.any() and not net.leave.weight.any()


@torch.no_grad()
def test_the_other_weights_start_as_the_authors_have_them() -> None:
    """Xavier's uniform for layers and patches, a deviation of 0.02 for what tells of time, class
    and order; biases at zero."""
    net = DiT(DiTConfig(128, 1, 2, 2, words=64), 100, (4, 4, 4), 4)
    block = net.blocks[0]
    for layer, inputs, outputs in (
        (block.attn.out, 128, 128),  # type: ignore[union-attr]
        (block.mlp[0], 128, 512),  # type: ignore[index]
        (block.mlp[2], 512, 128),  # type: ignore[index]
        (net.enter, 16, 128),
    ):
        weight, limit = layer.weight, math.sqrt(6 / (inputs + outputs))  # type: ignore[union-attr]
        assert 0.95 * limit < weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)
    limit = math.sqrt(6 / (128 + 3 * 128))  # queries, keys and values are one layer there
    for layer in (block.attn.query, block.attn.key_value):  # type: ignore[union-attr]
        assert 0.95 * limit < layer.weight.abs().max() <= limit
    for layer in (net.time[0], net.time[2], net.sentence, net.order):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)  # type: ignore[union-attr]
    for name, parameter in net.named_parameters():
        assert not name.endswith("bias") or not parameter.any(), name


def test_a_few_steps_move_every_weight() -> None:
    """The gates open, then all that is behind them learns."""
    net, (x, t) = made(start=True), given()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(4):
        optimiser.zero_grad()
        (net(x, t, text_of(5, 4)) - x).square().mean().backward()
        optimiser.step()
    assert not [name for name, p in net.named_parameters() if torch.equal(p, start[name])]


# --- the whole, written out -------------------------------------------------------------------


def centred(x: Tensor) -> Tensor:
    """A layer norm that learns nothing."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.double().T + layer.bias.double()


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor, kind: str) -> Tensor:
    if kind == "tanh":
        return x / 2 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())
    return x / 2 * (1 + (x / 2**0.5).erf())


def by_hand(net: DiT, x: Tensor, t: int, words: Tensor, sentence: Tensor) -> Tensor:
    """One picture (C, H, W), its L words and no padding, in double precision."""
    config, patch = net.config, net.config.patch
    rates = [10_000 ** (-k / 128) for k in range(128)]
    time = torch.tensor([math.cos(t * r) for r in rates] + [math.sin(t * r) for r in rates])
    told = linear(net.time[2], swish(linear(net.time[0], time.double())))
    told = swish(told + linear(net.sentence, sentence.double()))
    patches = F.unfold(x[None].double(), patch, stride=patch)[0].T  # (N, C P P)
    tokens = patches @ net.enter.weight.flatten(1).double().T + net.enter.bias.double()  # type: ignore[union-attr]
    tokens, first = tokens + net.places.double(), 0
    if config.words:
        kept = words[: config.words].double()
        first = len(kept)
        order = net.order.weight[:first].double()  # type: ignore[union-attr]
        tokens = torch.cat([linear(net.words, kept) + order, tokens])
    each = config.width // config.heads
    for block in net.blocks:
        six = linear(block.modulation, told).view(6, config.width)
        seen = centred(tokens) * (1 + six[1]) + six[0]
        query = linear(block.attn.query, seen)  # type: ignore[union-attr]
        key, value = linear(block.attn.key_value, seen).chunk(2, 1)  # type: ignore[union-attr]
        read = []
        for head in range(config.heads):
            at = slice(head * each, (head + 1) * each)
            scores = query[:, at] @ key[:, at].T / each**0.5
            read.append(scores.softmax(1) @ value[:, at])
        tokens = tokens + six[2] * linear(block.attn.out, torch.cat(read, 1))  # type: ignore[union-attr]
        seen = centred(tokens) * (1 + six[4]) + six[3]
        inner = gelu(linear(block.mlp[0], seen), config.gelu)  # type: ignore[index]
        tokens = tokens + six[5] * linear(block.mlp[2], inner)  # type: ignore[index]
    shift, scale = linear(net.modulation, told).view(2, config.width)
    out = linear(net.leave, centred(tokens[first:]) * (1 + scale) + shift)  # (N, P P C)
    rows, across = net.grid
    drawn = torch.zeros(out.shape[1] // patch**2, rows * patch, across * patch).double()
    for number, values in enumerate(out):
        row, column = number // across * patch, number % across * patch
        square = values.view(patch, patch, -1).permute(2, 0, 1)
        drawn[:, row : row + patch, column : column + patch] = square
    return drawn


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"words": 0}, {"gelu": "exact"}, {"patch": 4, "heads": 1}, {"patch": 1, "layers": 3}],
    ids=str,
)
def test_the_network_by_hand(changes: dict[str, Any]) -> None:
    """Each row with its own words; where there are none in context, by the sentence alone. At early
    steps, whose angles are exact enough in single precision."""
    net, (x, _), text = made(outputs=4, **changes), given(3), text_of(2, 5, 9)
    t = torch.tensor([3, 0, 17])
    found = net(x, t, text)
    for row, length in enumerate((2, 5, 9)):
        words = text.words[row, :length]
        expected = by_hand(net, x[row], int(t[row]), words, text.sentence[row])
        error = (found[row] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, row


@torch.no_grad()
def test_the_two_kinds_of_gelu_are_not_one() -> None:
    """At the same weights they differ a little."""
    one, other = made(gelu="tanh"), made(gelu="exact")
    other.load_state_dict(one.state_dict())
    x, t = given()
    apart = (one(x, t, text_of(2, 4)) - other(x, t, text_of(2, 4))).abs().max()
    assert 1e-6 < apart < 1e-1
    for kind, net in (("tanh", one), ("exact", other)):
        values = torch.linspace(-4, 4, 33)
        found = net.blocks[0].mlp[1](values)  # type: ignore[index]
        torch.testing.assert_close(found, gelu(values.double(), kind).float())


@torch.no_grad()
def test_modulation_by_hand() -> None:
    """Each row by its own vectors; 0 and 0 change nothing."""
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    found = modulated(x, shift, scale)
    for row in range(2):
        torch.testing.assert_close(found[row], x[row] + x[row] * scale[row] + shift[row])
    assert torch.equal(modulated(x, 0 * shift, 0 * scale), x)


@torch.no_grad()
def test_a_block_s_gates_shut_its_halves() -> None:
    """Scale, shift and gate of attention come first, then those of the perceptron."""
    torch.manual_seed(0)
    block = Block(TINY)
    x, told = torch.randn(2, 6, 24), torch.randn(2, 24)
    sixth = block.modulation.bias.view(6, 24)
    for gates, layer in ((5, block.mlp[2]), (2, block.attn.out)):
        nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(block.modulation.bias)
        sixth[gates] = 1.0
        layer.weight.zero_(), layer.bias.fill_(3.0)
        torch.testing.assert_close(block(x, told), x + 3)
        sixth[gates] = 0.0
        assert torch.equal(block(x, told), x)


# --- words in context -------------------------------------------------------------------------


def words_of(text: TextFeatures, words: Tensor) -> TextFeatures:
    return TextFeatures(words, text.mask, text.sentence, text.ids)


@torch.no_grad()
def test_the_order_of_words_matters() -> None:
    net, (x, t), text = made(), given(), text_of(4, 4)
    drawn = net(x, t, text)
    turned = net(x, t, words_of(text, text.words.flip(1)))
    assert (drawn - turned).abs().flatten(1).amax(1).min() > 1e-3


@torch.no_grad()
def test_padding_does_not_matter() -> None:
    """Neither what stands there nor how much of it, as beside a longer caption."""
    net, (x, t) = made(words=9), given()
    text = text_of(2, 4)
    drawn = net(x, t, text)
    other = text.words.clone()
    other[0, 2:] = 50.0
    torch.testing.assert_close(net(x, t, words_of(text, other)), drawn)
    for places in (5, 9, 12):
        more = net(x, t, text_of(2, 4, places=places))
        torch.testing.assert_close(more, drawn, atol=1e-5, rtol=1e-4)
    alone = net(x[:1], t[:1], text_of(2, 4)[torch.tensor([0])].shortened(2))
    torch.testing.assert_close(alone, drawn[:1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("words", [1, 3, 5])
def test_words_beyond_the_places_are_cut(words: int) -> None:
    net, (x, t), text = made(words=words), given(), text_of(8, 7)
    drawn = net(x, t, text)
    for place in range(8):
        other = text.words.clone()
        other[:, place] += torch.randn(TEXT)
        moved = (net(x, t, words_of(text, other)) - drawn).abs().max()
        assert (moved > 1e-4) == (place < words), place


@torch.no_grad()
def test_without_places_for_words_only_the_sentence_is_heard() -> None:
    """Which is heard with them too."""
    net, (x, t), text = made(words=0), given(), text_of(4, 4)
    assert net.words is None and net.order is None
    assert not any(name.startswith(("words", "order")) for name in net.state_dict())
    drawn = net(x, t, text)
    assert torch.equal(net(x, t, words_of(text, torch.randn(2, 4, TEXT))), drawn)
    for one in (net, made()):
        told = TextFeatures(text.words, text.mask, text.sentence.flip(0), text.ids)
        assert (one(x, t, told) - one(x, t, text)).abs().flatten(1).amax(1).min() > 1e-3


@torch.no_grad()
def test_time_matters_between_steps_too() -> None:
    net, (x, _), text = made(), given(), text_of(2, 4)
    one, other = (net(x, torch.full((2,), t), text) for t in (12.0, 12.5))
    assert (one - other).abs().max() > 1e-4
    assert torch.equal(net(x, torch.full((2,), 12), text), one)


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 25}, "net.width=25"),
        ({"width": 26, "heads": 2}, "net.width=26"),
        ({"heads": 5}, "net.heads=5"),
        ({"heads": 0}, "net.heads=0"),
        ({"layers": 0}, "net.layers=0"),
        ({"width": 0}, "net.width=0"),
        ({"patch": 0}, "net.patch=0"),
        ({"words": -1}, "net.words=-1"),
        ({"gelu": "relu"}, "net.gelu='relu'"),
        ({"patch": 3}, "net.patch=3"),
        ({"patch": 8}, "net.patch=8"),  # of 8 x 4
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_told(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        made(**change)
    assert "\n" not in str(caught.value)


def size_of(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("letter", list(SIZES))
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_sizes_by_hand(letter: str, patch: int) -> None:
    """18 D^2 a block, of which the modulation is a third."""
    config = DiTConfig(**SIZES[letter], patch=patch, words=64)
    with torch.device("meta"):
        net = DiT(config, 512, (4, 32, 32), 8)
    width = config.width
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 6 * width**2 + 6 * width
    enter, leave = (4 * patch**2 + 1) * width, (width + 1) * 8 * patch**2
    time, words = 257 * width + width**2 + width, 2 * 513 * width + 64 * width
    whole = config.layers * block + enter + leave + time + words + 2 * width**2 + 2 * width
    assert size_of(net) == whole
    assert net.grid == (32 // patch, 32 // patch)


def test_the_published_sizes() -> None:
    """Of the authors' networks, told 1,000 classes and none, as rows of one-hot sentences; they
    count the fixed table of places too, and have no bias beside the classes."""
    path = BESIDE / "paper_sizes.json"
    if not path.is_file():
        pytest.skip("the reference files are not beside this checkout")
    saved = json.loads(path.read_text())
    (published,) = (value for name, value in saved.items() if name.startswith("dit "))
    assert len(published) == 5
    for name, expected in published.items():
        letter, patch = name.removeprefix("DiT-").split("/")
        with torch.device("meta"):
            net = DiT(DiTConfig(**SIZES[letter], patch=int(patch), words=0), 1001, (4, 32, 32), 8)
        assert net.sentence.bias is not None
        found = size_of(net) + net.places.numel() - net.sentence.bias.numel()
        assert found == expected, name


# --- the system -------------------------------------------------------------------------------


def test_the_paper_preset_is_dit_xl_2(tokenizer: WordTokenizer) -> None:
    """On 32 x 32 latents of Stable Diffusion's autoencoder, with learnt variances; words are
    ours."""
    with torch.device("meta"):
        system: Any = runs.build(recipe.stages(recipe.PRESETS["paper"], tokenizer))
    assert isinstance(system, DiTSystem) and system.shape == (4, 32, 32)
    net = system.network
    assert net.grid == (16, 16) and net.leave.out_features == 4 * 8
    sizes = {"layers": net.config.layers, "width": net.config.width, "heads": net.config.heads}
    assert sizes == SIZES["XL"] and net.config.gelu == "tanh"
    told = (net.words, net.order, net.sentence)
    own = size_of(net) - sum(map(size_of, told)) + 1001 * 1152 + 256 * 1152
    assert own == 675_129_632


@pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
def test_a_system_has_channels_for_its_variances(
    variance: str, make_system: Callable[..., Any], shapes: CaptionedDataset
) -> None:
    settings = {"model.process.variance": variance, "model.process.prediction": "noise"}
    system, _ = make_system("dit", **settings)
    outputs = (1 if variance == "fixed_small" else 2) * system.shape[0]
    assert system.network.leave.out_features == 4 * outputs
    batch = shapes.batch(range(4), [0] * 4, 0)
    ((_, terms),) = system.losses(batch, system.text.encode(batch.caption), NoiseStreams(range(4)))
    assert ("bound" in terms) == (variance != "fixed_small")
    pictures = system.generate(["a red circle", ""], sampler="ddpm")
    assert pictures.shape == (2, 3, 16, 16) and pictures.isfinite().all()


def test_a_system_whose_latents_do_not_divide_is_told(make_system: Callable[..., Any]) -> None:
    """8 x 8 latents at preset smoke."""
    with pytest.raises(UserError, match=r"8 x 8.*net\.patch=3"):
        make_system("dit", model__net__patch=3)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_transformer_learns_a_few_pictures(
    optimiser: str, make_system: Callable[..., Any], shapes: CaptionedDataset
) -> None:
    """From its start at zero, whose gates have no gradient at first."""
    system, _ = make_system("dit", model__net__width=32)
    optim = OptimConfig(optimiser, lr=5e-3, warmup=0, decay="none", weight_decay=0.0)
    trainer = Trainer(system, shapes, optim, TrainConfig(batch=4, precision="fp32", prefetch=0))
    batch, sure = trainer.loader.at(0), system.autoencoder.quant_conv
    with (
        torch.no_grad()
    ):  # else a sample of its latents is mostly noise, as long as it is untrained
        sure.weight[system.shape[0] :] = 0
        sure.bias[system.shape[0] :] = -30
        system.scale.copy_(1 / system.from_pictures(batch.image).std())
    errors = [trainer.advance(batch)["denoiser/mse_x0"].item() for _ in range(80)]
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10])


@pytest.mark.parametrize("words", [0, 1, 8])
def test_a_caption_is_heard_whatever_words_there_are_places_for(
    words: int, make_system: Callable[..., Any]
) -> None:
    """By the sentence alone if there are none."""
    system, _ = make_system("dit", model__net__words=words)
    with torch.no_grad():
        for parameter in system.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    one, other = (system.generate(c, seed=1) for c in ("a red circle", "three blue rings"))
    assert (one - other).abs().max() > 1e-3
