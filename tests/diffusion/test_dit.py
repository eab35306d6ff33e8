"""The diffusion transformer: positions, patches, blocks and words, each checked by hand."""

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
from lineage.diffusion.ldm import LatentDiffusionModel
from lineage.diffusion.networks.dit import (
    SIZES,
    Block,
    DiT,
    DiTConfig,
    modulate,
    sincos_pos_emb,
)
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.recipes import dit as recipe
from lineage.text.contract import TextFeatures
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "reference"
TINY = DiTConfig(width=24, depth=2, num_heads=3, patch_size=2, max_words=5)
TEXT, SHAPE = 7, (3, 8, 4)  # width of words and sentence; latents, higher than wide


def new_dit(out_channels: int = 3, **changes: Any) -> DiT:
    """A network with its initial weights."""
    torch.manual_seed(0)
    return DiT(replace(TINY, **changes), TEXT, TEXT, SHAPE, out_channels).eval()


def moved_dit(out_channels: int = 3, **changes: Any) -> DiT:
    """A network whose weights have all moved away from zero."""
    net = new_dit(out_channels, **changes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def features(*lengths: int, length: int = 0) -> TextFeatures:
    """Text with so many words per caption, and random vectors on the padding."""
    longest = max(*lengths, length)
    generator = torch.Generator().manual_seed(11)
    words = torch.randn(len(lengths), 12, TEXT, generator=generator)[:, :longest]
    sentence = torch.randn(len(lengths), TEXT, generator=generator)
    mask = torch.tensor([[k < one for k in range(longest)] for one in lengths])
    return TextFeatures(words, mask, sentence, mask.long())


def inputs(rows: int = 2) -> tuple[Tensor, Tensor]:
    """z_t and t."""
    return torch.randn(rows, *SHAPE), torch.tensor([3, 700, 41, 999][:rows])


# --- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "rows", "columns"), [(8, 2, 3), (24, 4, 4), (4, 1, 5)])
def test_the_position_table_by_loops(width: int, rows: int, columns: int) -> None:
    """Sines, then cosines, of the column; then of the row; row by row."""
    table = sincos_pos_emb(width, rows, columns)
    assert table.shape == (rows * columns, width) and table.dtype == torch.float32
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            expected = []
            for position in (column, row):
                angles = [position / 10_000 ** (k / quarter) for k in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            actual = table[row * columns + column].tolist()
            assert actual == pytest.approx(expected, abs=1e-6)


def test_positions_differ_and_are_not_learned() -> None:
    net = moved_dit()
    assert len(net.grid_pos_emb.unique(dim=0)) == 4 * 2
    assert "grid_pos_emb" not in net.state_dict() and not net.grid_pos_emb.requires_grad
    assert net.grid == (4, 2)


# --- patches ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_token_is_a_patch_with_its_position(patch_size: int) -> None:
    """Row by row, a sum over the patch's pixels and channels."""
    net, (x, _) = moved_dit(patch_size=patch_size), inputs()
    tokens, across = net.tokens(x), SHAPE[2] // patch_size
    assert tokens.shape == (2, SHAPE[1] * SHAPE[2] // patch_size**2, 24)
    weight, bias = net.patch_embed.weight.flatten(1), net.patch_embed.bias
    for number in range(tokens.shape[1]):
        row, column = number // across * patch_size, number % across * patch_size
        pixels = x[:, :, row : row + patch_size, column : column + patch_size].flatten(1)
        expected = pixels @ weight.T + bias + net.grid_pos_emb[number]
        torch.testing.assert_close(tokens[:, number], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_output_of_a_token_is_its_patch(patch_size: int) -> None:
    """The numbers of a token go by row, column and channel."""
    net = moved_dit(patch_size=patch_size, out_channels=5)
    net.proj_out.weight.zero_()
    net.proj_out.bias.copy_(torch.arange(float(patch_size**2 * 5)))
    out = net(*inputs(), features(2, 4))
    assert out.shape == (2, 5, 8, 4)
    for channel in range(5):
        for row in range(8):
            for column in range(4):
                number = (row % patch_size * patch_size + column % patch_size) * 5 + channel
                assert (out[:, channel, row, column] == number).all()


def test_without_attention_a_patch_depends_on_no_other() -> None:
    """Without attention between tokens, each pixel depends on those of its own patch alone."""
    net, (x, t) = moved_dit(), inputs(1)
    for block in net.blocks:
        nn.init.zeros_(block.attn.to_out.weight)  # type: ignore[union-attr, arg-type]
    x.requires_grad_()
    out = net(x, t, features(3))
    for row in range(8):
        for column in range(4):
            (grad,) = torch.autograd.grad(out[0, :, row, column].sum(), x, retain_graph=True)
            reached = grad[0].abs().amax(0) > 0
            expected = torch.zeros(8, 4, dtype=torch.bool)
            top, left = row // 2 * 2, column // 2 * 2
            expected[top : top + 2, left : left + 2] = True
            assert torch.equal(reached, expected)


def permute_patches(x: Tensor, order: list[int]) -> Tensor:
    """Patches of 2 x 2 in another order."""
    rows = F.unfold(x, 2, stride=2)[:, :, order]
    return F.fold(rows, x.shape[2:], 2, stride=2)


@torch.no_grad()
def test_only_the_position_table_orders_the_patches() -> None:
    """With a table of zeros, permuted patches give the permuted output."""
    net, (x, t) = moved_dit(), inputs()
    text, order = features(2, 4), torch.randperm(8).tolist()
    permuted = net(permute_patches(x, order), t, text)
    assert (permuted - permute_patches(net(x, t, text), order)).abs().max() > 1e-2
    net.grid_pos_emb.zero_()
    permuted, expected = net(permute_patches(x, order), t, text), net(x, t, text)
    torch.testing.assert_close(permuted, permute_patches(expected, order), atol=1e-5, rtol=1e-4)


# --- initial weights --------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity() -> None:
    """adaLN-Zero, for any input."""
    net, (x, t) = new_dit(), inputs()
    assert not net(x, t, features(2, 4)).any()
    tokens, c = torch.randn(2, 6, 24), torch.randn(2, 24)
    for block in net.blocks:
        assert torch.equal(block(tokens, c), tokens)
    assert not net.modulation.weight.any() and not net.proj_out.weight.any()


@torch.no_grad()
def test_the_other_initial_weights_are_the_authors() -> None:
    """Xavier's uniform for layers and patches, a standard deviation of 0.02 for time, class and
    positions of words; biases at zero."""
    config = DiTConfig(width=128, depth=1, num_heads=2, patch_size=2, max_words=64)
    net = DiT(config, 100, 100, (4, 4, 4), 4)
    block: Any = net.blocks[0]
    for layer, fan_in, fan_out in (
        (block.attn.to_out, 128, 128),
        (block.mlp[0], 128, 512),
        (block.mlp[2], 512, 128),
        (net.patch_embed, 16, 128),
    ):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    bound = math.sqrt(6 / (128 + 3 * 128))  # queries, keys and values are one layer there
    for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    for layer in (net.time_embed[0], net.time_embed[2], net.sentence_proj, net.word_pos_emb):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, parameter in net.named_parameters():
        assert not name.endswith("bias") or not parameter.any(), name


def test_a_few_steps_move_every_weight() -> None:
    """The gates open, then everything behind them learns."""
    net, (x, t) = new_dit(), inputs()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        (net(x, t, features(5, 4)) - x).square().mean().backward()
        optimizer.step()
    still = [name for name, p in net.named_parameters() if torch.equal(p, start[name])]
    assert not [name for name in still if not name.endswith("to_k.bias")]  # it has no gradient


# --- the whole network, written out -----------------------------------------------------------


def layer_norm(x: Tensor) -> Tensor:
    """A layer norm without parameters."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.double().T + layer.bias.double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor, kind: str) -> Tensor:
    if kind == "tanh":
        return x / 2 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())
    return x / 2 * (1 + (x / 2**0.5).erf())


def by_hand(net: DiT, x: Tensor, t: int, words: Tensor, sentence: Tensor) -> Tensor:
    """One picture (C, H, W) and its L words without padding, in double precision."""
    config, patch = net.config, net.config.patch_size
    rates = [10_000 ** (-k / 128) for k in range(128)]
    time = torch.tensor([math.cos(t * r) for r in rates] + [math.sin(t * r) for r in rates])
    c = linear(net.time_embed[2], silu(linear(net.time_embed[0], time.double())))
    c = silu(c + linear(net.sentence_proj, sentence.double()))
    patches = F.unfold(x[None].double(), patch, stride=patch)[0].T  # (N, C P P)
    weight, bias = net.patch_embed.weight.flatten(1).double(), net.patch_embed.bias
    tokens = patches @ weight.T + bias.double()  # type: ignore[union-attr]
    tokens, first = tokens + net.grid_pos_emb.double(), 0
    if config.max_words:
        words = words[: config.max_words].double()
        first = len(words)
        positions = net.word_pos_emb.weight[:first].double()  # type: ignore[union-attr]
        tokens = torch.cat([linear(net.word_proj, words) + positions, tokens])
    head_dim = config.width // config.num_heads
    block: Any
    for block in net.blocks:
        six = linear(block.modulation, c).view(6, config.width)
        x = layer_norm(tokens) * (1 + six[1]) + six[0]
        query, key, value = (linear(getattr(block.attn, f"to_{p}"), x) for p in "qkv")
        heads = []
        for head in range(config.num_heads):
            at = slice(head * head_dim, (head + 1) * head_dim)
            scores = query[:, at] @ key[:, at].T / head_dim**0.5
            heads.append(scores.softmax(1) @ value[:, at])
        tokens = tokens + six[2] * linear(block.attn.to_out, torch.cat(heads, 1))
        x = layer_norm(tokens) * (1 + six[4]) + six[3]
        hidden = gelu(linear(block.mlp[0], x), config.gelu)
        tokens = tokens + six[5] * linear(block.mlp[2], hidden)
    shift, scale = linear(net.modulation, c).view(2, config.width)
    out = linear(net.proj_out, layer_norm(tokens[first:]) * (1 + scale) + shift)  # (N, P P C)
    rows, across = net.grid
    image = torch.zeros(out.shape[1] // patch**2, rows * patch, across * patch).double()
    for number, values in enumerate(out):
        row, column = number // across * patch, number % across * patch
        square = values.view(patch, patch, -1).permute(2, 0, 1)
        image[:, row : row + patch, column : column + patch] = square
    return image


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_words": 0},
        {"gelu": "exact"},
        {"patch_size": 4, "num_heads": 1},
        {"patch_size": 1, "depth": 3},
    ],
    ids=str,
)
def test_the_network_by_hand(changes: dict[str, Any]) -> None:
    """Each row with its own words; without words in context, with the sentence alone. At early
    timesteps, whose angles are exact enough in single precision."""
    net, (x, _), text = moved_dit(out_channels=4, **changes), inputs(3), features(2, 5, 9)
    t = torch.tensor([3, 0, 17])
    out = net(x, t, text)
    for row, length in enumerate((2, 5, 9)):
        words = text.words[row, :length]
        expected = by_hand(net, x[row], int(t[row]), words, text.sentence[row])
        error = (out[row] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, row


@torch.no_grad()
def test_the_two_kinds_of_gelu_differ_a_little() -> None:
    """With the same weights."""
    one, other = moved_dit(gelu="tanh"), moved_dit(gelu="exact")
    other.load_state_dict(one.state_dict())
    x, t = inputs()
    difference = (one(x, t, features(2, 4)) - other(x, t, features(2, 4))).abs().max()
    assert 1e-6 < difference < 1e-1
    for kind, net in (("tanh", one), ("exact", other)):
        values = torch.linspace(-4, 4, 33)
        activation = net.blocks[0].mlp[1](values)  # type: ignore[index, operator, union-attr]
        torch.testing.assert_close(activation, gelu(values.double(), kind).float())


@torch.no_grad()
def test_modulation_by_hand() -> None:
    """Each row by its own vectors; zeros change nothing."""
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    out = modulate(x, shift, scale)
    for row in range(2):
        torch.testing.assert_close(out[row], x[row] + x[row] * scale[row] + shift[row])
    assert torch.equal(modulate(x, 0 * shift, 0 * scale), x)


@torch.no_grad()
def test_the_gates_of_a_block_close_its_halves() -> None:
    """Shift, scale and gate of the attention come first, then those of the MLP."""
    torch.manual_seed(0)
    block = Block(TINY)
    x, c = torch.randn(2, 6, 24), torch.randn(2, 24)
    sixth = block.modulation.bias.view(6, 24)
    for gate, layer in ((5, block.mlp[2]), (2, block.attn.to_out)):
        nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(block.modulation.bias)
        sixth[gate] = 1.0
        layer.weight.zero_(), layer.bias.fill_(3.0)
        torch.testing.assert_close(block(x, c), x + 3)
        sixth[gate] = 0.0
        assert torch.equal(block(x, c), x)


# --- words in context -------------------------------------------------------------------------


def with_words(text: TextFeatures, words: Tensor) -> TextFeatures:
    return TextFeatures(words, text.mask, text.sentence, text.ids)


@torch.no_grad()
def test_the_order_of_words_matters() -> None:
    net, (x, t), text = moved_dit(), inputs(), features(4, 4)
    difference = net(x, t, text) - net(x, t, with_words(text, text.words.flip(1)))
    assert difference.abs().flatten(1).amax(1).min() > 1e-3


@torch.no_grad()
def test_padding_does_not_matter() -> None:
    """Neither its values nor its length, as beside a longer caption."""
    net, (x, t) = moved_dit(max_words=9), inputs()
    text = features(2, 4)
    out = net(x, t, text)
    other = text.words.clone()
    other[0, 2:] = 50.0
    torch.testing.assert_close(net(x, t, with_words(text, other)), out)
    for length in (5, 9, 12):
        longer = net(x, t, features(2, 4, length=length))
        torch.testing.assert_close(longer, out, atol=1e-5, rtol=1e-4)
    alone = net(x[:1], t[:1], features(2, 4)[torch.tensor([0])].truncated(2))
    torch.testing.assert_close(alone, out[:1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("max_words", [1, 3, 5])
def test_words_after_max_words_are_cut(max_words: int) -> None:
    net, (x, t), text = moved_dit(max_words=max_words), inputs(), features(8, 7)
    out = net(x, t, text)
    for word in range(8):
        other = text.words.clone()
        other[:, word] += torch.randn(TEXT)
        moved = (net(x, t, with_words(text, other)) - out).abs().max()
        assert (moved > 1e-4) == (word < max_words), word


@torch.no_grad()
def test_without_words_in_context_only_the_sentence_matters() -> None:
    """It matters with them too."""
    net, (x, t), text = moved_dit(max_words=0), inputs(), features(4, 4)
    assert net.word_proj is None and net.word_pos_emb is None
    assert not any(name.startswith("word") for name in net.state_dict())
    out = net(x, t, text)
    assert torch.equal(net(x, t, with_words(text, torch.randn(2, 4, TEXT))), out)
    for one in (net, moved_dit()):
        other = TextFeatures(text.words, text.mask, text.sentence.flip(0), text.ids)
        assert (one(x, t, other) - one(x, t, text)).abs().flatten(1).amax(1).min() > 1e-3


@torch.no_grad()
def test_fractional_timesteps_have_their_own_output() -> None:
    net, (x, _), text = moved_dit(), inputs(), features(2, 4)
    one, other = (net(x, torch.full((2,), t), text) for t in (12.0, 12.5))
    assert (one - other).abs().max() > 1e-4
    assert torch.equal(net(x, torch.full((2,), 12), text), one)


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 25}, "net.width=25"),
        ({"width": 26, "num_heads": 2}, "net.width=26"),
        ({"num_heads": 5}, "net.num_heads=5"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"depth": 0}, "depth=0"),
        ({"width": 0}, "width=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"max_words": -1}, "max_words=-1"),
        ({"gelu": "relu"}, "gelu='relu'"),
        ({"patch_size": 3}, "net.patch_size=3"),
        ({"patch_size": 8}, "net.patch_size=8"),  # of 8 x 4
    ],
    ids=str,
)
def test_impossible_sizes_are_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        new_dit(**change)
    assert "\n" not in str(caught.value)


def num_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("letter", list(SIZES))
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_the_number_of_parameters_by_hand(letter: str, patch_size: int) -> None:
    """18 D^2 a block, a third of it modulation."""
    config = DiTConfig(**SIZES[letter], patch_size=patch_size, max_words=64)
    with torch.device("meta"):
        net = DiT(config, 512, 512, (4, 32, 32), 8)
    width = config.width
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 6 * width**2 + 6 * width
    patch_embed, proj_out = (4 * patch_size**2 + 1) * width, (width + 1) * 8 * patch_size**2
    time, words = 257 * width + width**2 + width, 2 * 513 * width + 64 * width
    modulation = 2 * width**2 + 2 * width
    expected = config.depth * block + patch_embed + proj_out + time + words + modulation
    assert num_parameters(net) == expected
    assert net.grid == (32 // patch_size, 32 // patch_size)


def test_the_published_numbers_of_parameters() -> None:
    """Of the authors' networks with 1,000 classes and none, as rows of one-hot sentences; they
    count the position table too, and their classes have no bias."""
    path = BESIDE / "paper_sizes.json"
    if not path.is_file():
        pytest.skip("the reference files are not beside this checkout")
    saved = json.loads(path.read_text())
    (published,) = (value for name, value in saved.items() if name.startswith("dit "))
    assert len(published) == 5
    for name, expected in published.items():
        letter, patch_size = name.removeprefix("DiT-").split("/")
        config = DiTConfig(**SIZES[letter], patch_size=int(patch_size), max_words=0)
        with torch.device("meta"):
            net = DiT(config, 1001, 1001, (4, 32, 32), 8)
        own = num_parameters(net) + net.grid_pos_emb.numel() - net.sentence_proj.bias.numel()
        assert own == expected, name


# --- the system -------------------------------------------------------------------------------


def test_the_paper_preset_is_dit_xl_2(tokenizer: WordTokenizer) -> None:
    """On 32 x 32 latents of Stable Diffusion's autoencoder, with learned variances; words are our
    addition."""
    with torch.device("meta"):
        model: Any = runs.build(recipe.stages(recipe.PRESETS["paper"], tokenizer))
    assert isinstance(model, LatentDiffusionModel) and model.space.shape == (4, 32, 32)
    net: Any = model.network
    assert net.grid == (16, 16) and net.proj_out.out_features == 4 * 8
    assert {name: getattr(net.config, name) for name in SIZES["XL"]} == SIZES["XL"]
    assert net.config.gelu == "tanh"
    text = num_parameters(net.word_proj) + num_parameters(net.word_pos_emb)
    text += num_parameters(net.sentence_proj)
    assert num_parameters(net) - text + 1001 * 1152 + 256 * 1152 == 675_129_632


@pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
def test_a_system_has_channels_for_its_variances(
    variance: str, make_system: Callable[..., Any], shapes: CaptionedDataset
) -> None:
    settings = {"model.process.variance": variance, "model.process.prediction": "noise"}
    model, _ = make_system("dit", **settings)
    out_channels = (1 if variance == "fixed_small" else 2) * model.space.shape[0]
    assert model.network.proj_out.out_features == 4 * out_channels
    batch = shapes.batch(range(4), [0] * 4, 0)
    (turn,) = model.losses(batch, model.text.encode(batch.caption), NoiseStreams(range(4)))
    assert ("vlb" in turn.terms) == (variance != "fixed_small")
    images = model.generate(["a red circle", ""], sampler="ddpm")
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


def test_latents_that_do_not_divide_into_patches_are_refused(
    make_system: Callable[..., Any],
) -> None:
    """8 x 8 latents at preset smoke."""
    with pytest.raises(UserError, match=r"8 x 8.*net\.patch_size=3"):
        make_system("dit", model__net__patch_size=3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_transformer_learns_a_few_pictures(
    optimizer: Any, make_system: Callable[..., Any], shapes: CaptionedDataset
) -> None:
    """From initial weights at zero, whose gates have no gradient at first."""
    model, _ = make_system("dit", model__net__width=32)
    optim = OptimConfig(name=optimizer, lr=5e-3, warmup=0, decay="none", weight_decay=0.0)
    train = TrainConfig(batch_size=4, precision="fp32", prefetch=0)
    trainer = Trainer(model, shapes, optim, train)
    batch, layer = trainer.loader.at(0), model.space.autoencoder.quant_conv
    channels = model.space.shape[0]
    with torch.no_grad():  # an untrained autoencoder's samples would be mostly noise
        layer.weight[channels:] = 0
        layer.bias[channels:] = -30
        model.space.scale.copy_(1 / model.space.encode_image(batch.image).std())
    errors = [trainer.advance(batch)["denoiser/mse_x0"].item() for _ in range(80)]
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10])


@pytest.mark.parametrize("max_words", [0, 1, 8])
def test_a_caption_matters_with_any_number_of_words(
    max_words: int, make_system: Callable[..., Any]
) -> None:
    """Through the sentence alone if there are none."""
    model, _ = make_system("dit", model__net__max_words=max_words)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    one, other = (model.generate(c, seed=1) for c in ("a red circle", "three blue rings"))
    assert (one - other).abs().max() > 1e-3
