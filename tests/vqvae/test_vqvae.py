"""`vqvae`'s codec: sizes, layers by hand, equation 3 by loops, a collapse of its codebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage import runs
from lineage.config import OptimConfig, TrainConfig, with_field
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.recipes import vqvae as recipe
from lineage.system import Turn
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.vqvae import VQVAE, ResidualBlock, VQVAEConfig, VQVAEDecoder, VQVAEEncoder

PLAIN = QuantiserConfig(
    num_codes=6, code_dim=4, update="loss", init="normal", restart_threshold=0.0
)


def make_codec(quantiser: QuantiserConfig = PLAIN, **changes: Any) -> VQVAE:
    torch.manual_seed(0)
    sizes = {"channels": 8, "res_channels": 6} | changes
    return VQVAE(VQVAEConfig(quantiser=quantiser, **sizes))


def make_batch(count: int = 3, side: int = 8) -> Batch:
    image = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return Batch(image, [""] * count, None, [str(k) for k in range(count)])


def turns_of(codec: VQVAE, batch: Batch) -> Iterator[Turn]:
    return codec.losses(batch, None, NoiseStreams(range(len(batch))))


def terms_of(codec: VQVAE, batch: Batch) -> Any:
    (turn,) = turns_of(codec, batch)
    assert turn.group == "codec"
    return turn.terms


def trainer_for(codec: VQVAE, data: CaptionedDataset, batch_size: int = 8, **optim: Any) -> Trainer:
    fields = {"lr": 3e-3, "warmup": 0, "decay": "none", "weight_decay": 0.0, **optim}
    train = TrainConfig(batch_size=batch_size, precision="fp32", prefetch=0)
    return Trainer(codec, data, OptimConfig(**fields), train, stage="codec")


def train(codec: VQVAE, data: CaptionedDataset, steps: int, **optim: Any) -> Trainer:
    trainer = trainer_for(codec, data, **optim)
    for number in range(steps):
        trainer.advance(trainer.loader.at(number))
    return trainer


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("downsamples", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (8, 24)])
def test_a_code_covers_a_square_of_pixels(downsamples: int, height: int, width: int) -> None:
    codec, factor = make_codec(num_downsamples=downsamples).eval(), 2**downsamples
    assert codec.factor == codec.config.factor == factor and codec.num_codes == 6
    ids = codec.encode(torch.rand(2, 3, height, width))
    assert ids.shape == (2, height // factor, width // factor) and ids.dtype == torch.int64
    assert codec.decode(ids).shape == (2, 3, height, width)


@pytest.mark.parametrize(
    ("channels", "res_channels", "blocks", "num_codes", "code_dim"),
    [(2, 1, 0, 1, 1), (5, 3, 1, 7, 3), (7, 9, 3, 2, 5), (3, 2, 2, 300, 2)],
)
@pytest.mark.parametrize("downsamples", [1, 3])
def test_odd_sizes_train(
    channels: int, res_channels: int, blocks: int, num_codes: int, code_dim: int, downsamples: int
) -> None:
    """Odd channels, no residual blocks, one code, more codes than grid cells."""
    codec = make_codec(
        QuantiserConfig(num_codes=num_codes, code_dim=code_dim),
        channels=channels,
        res_channels=res_channels,
        num_res_blocks=blocks,
        num_downsamples=downsamples,
    )
    for _ in range(2):
        terms = terms_of(codec.train(), make_batch(1, 16))
        torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())
    ids = codec.eval().encode(make_batch(1, 16).image)
    assert ids.max() < num_codes and codec.decode(ids).abs().max() <= 1


@pytest.mark.parametrize("downsamples", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", [0, 2])
def test_layers_are_those_of_section_4(downsamples: int, blocks: int) -> None:
    """Strided 4 x 4 convolutions, a 3 x 3, residual blocks; and the mirror image."""
    config = VQVAEConfig(
        quantiser=PLAIN,
        channels=10,
        res_channels=6,
        num_res_blocks=blocks,
        num_downsamples=downsamples,
    )
    encoder, decoder = VQVAEEncoder(config).layers, VQVAEDecoder(config).layers
    strided = [layer for layer in encoder if getattr(layer, "stride", 1) == (2, 2)]
    transposed = [layer for layer in decoder if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.out_channels for layer in strided] == [5] + [10] * (downsamples - 1)
    expected = [10] * (downsamples - 2) + [5] * (downsamples > 1) + [3]
    assert [layer.out_channels for layer in transposed] == expected
    for layer in (*strided, *transposed):
        assert layer.kernel_size == (4, 4) and layer.padding == (1, 1) and layer.stride == (2, 2)
    for layers in (encoder, decoder):
        residual = [layer for layer in layers if isinstance(layer, ResidualBlock)]
        assert len(residual) == blocks
        assert all(b.conv3.weight.shape == (6, 10, 3, 3) for b in residual)
        assert all(b.conv1.weight.shape == (10, 6, 1, 1) for b in residual)
    assert encoder[-1].out_channels == decoder[0].in_channels == 4


def test_residual_block_by_hand() -> None:
    """ReLU, 3 x 3, ReLU, 1 x 1; the input is not changed in place."""
    block, x = ResidualBlock(3, 5), torch.randn(2, 3, 4, 4)
    before = x.clone()
    h = F.conv2d(x.clamp(min=0), block.conv3.weight, block.conv3.bias, padding=1)
    h = F.conv2d(h.clamp(min=0), block.conv1.weight, block.conv1.bias)
    torch.testing.assert_close(block(x), x + h)
    assert torch.equal(x, before)


def test_the_network_by_hand() -> None:
    """Two strided layers, one block: a ReLU after each strided layer but the decoder's last, whose
    pixels are not bounded."""
    codec = make_codec(num_res_blocks=1)
    x = make_batch().image
    layers = codec.encoder.layers
    z = F.conv2d(x, layers[0].weight, layers[0].bias, stride=2, padding=1).clamp(min=0)
    z = F.conv2d(z, layers[2].weight, layers[2].bias, stride=2, padding=1).clamp(min=0)
    z = F.conv2d(z, layers[4].weight, layers[4].bias, padding=1)
    z = layers[5](z).clamp(min=0)
    z = F.conv2d(z, layers[7].weight, layers[7].bias)
    torch.testing.assert_close(codec.encoder(x), z)
    assert (z < 0).any() and (z > 0).any()
    layers, z_q = codec.decoder.layers, 5 * torch.randn(3, 4, 2, 2)
    y = F.conv2d(z_q, layers[0].weight, layers[0].bias, padding=1)
    y = layers[1](y).clamp(min=0)
    y = F.conv_transpose2d(y, layers[3].weight, layers[3].bias, stride=2, padding=1).clamp(min=0)
    y = F.conv_transpose2d(y, layers[5].weight, layers[5].bias, stride=2, padding=1)
    torch.testing.assert_close(codec.decoder(z_q), y)
    assert (y < 0).any() and (y > 0).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", 1),
        ("res_channels", 0),
        ("num_downsamples", 0),
        ("num_res_blocks", -1),
        ("data_variance", 0.0),
        ("data_variance", float("nan")),
    ],
)
def test_impossible_sizes_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name) as caught:
        VQVAEConfig(**{name: value})
    assert "\n" not in str(caught.value)


# --- equation 3 -------------------------------------------------------------------------------


def naive_terms(codec: VQVAE, image: Tensor) -> dict[str, float]:
    """Equation 3, one grid cell at a time; each term is a mean over all its numbers."""
    config, z_e = codec.config, codec.encoder(image).double()
    codes = codec.quantiser.codebook.double()
    z_q, gaps = torch.zeros_like(z_e), []
    for b in range(z_e.shape[0]):
        for y in range(z_e.shape[2]):
            for x in range(z_e.shape[3]):
                distances = [float((code - z_e[b, :, y, x]).square().sum()) for code in codes]
                gaps.append(min(distances) / len(codes[0]))
                z_q[b, :, y, x] = codes[distances.index(min(distances))]
    decoded = codec.decoder(z_q.float()).double()
    mse = float((decoded - image.double()).square().sum()) / image.numel()
    gap = sum(gaps) / len(gaps)
    return {
        "reconstruction": mse / config.data_variance,
        "codebook": gap,
        "commitment": config.quantiser.beta * gap,
    }


@pytest.mark.parametrize("variance", [1.0, 0.06])
@pytest.mark.parametrize("beta", [0.25, 2.0, 0.0])
@pytest.mark.parametrize("update", ["loss", "ema"])
@torch.no_grad()
def test_equation_3_by_loops(update: str, beta: float, variance: float) -> None:
    codec = make_codec(replace(PLAIN, update=update, beta=beta), data_variance=variance)
    batch = make_batch()
    expected = naive_terms(codec, batch.image)
    if update == "ema":
        del expected["codebook"]
    terms = {name: term.item() for name, term in terms_of(codec.train(), batch).items()}
    assert terms == pytest.approx(expected, rel=1e-4)


def test_metrics_of_a_step() -> None:
    """PSNR of the clamped reconstruction, and the usage of the codebook."""
    codec, batch = make_codec().eval(), make_batch()
    with torch.no_grad():
        codec.decoder.layers[-1].weight.mul_(200)  # beyond black and white
    (turn,) = turns_of(codec, batch)
    metrics = turn.metrics()
    decoded = codec.decode(codec.encode(batch.image))
    assert (decoded.abs() == 1).any()
    mse = (decoded - batch.image).square().mean().item()
    expected = 10 * torch.tensor(4 / mse).log10().item()
    assert metrics["psnr"].item() == pytest.approx(expected, rel=1e-4)
    assert set(metrics) == {"psnr", "codebook_usage", "unused_codes", "perplexity"}
    assert not any(metric.requires_grad for metric in metrics.values())


def test_the_straight_through_gradient_of_the_encoder() -> None:
    """The gradient at z_q is passed on from z_e."""
    codec, batch = make_codec(replace(PLAIN, beta=0.0)).train(), make_batch()
    terms = terms_of(codec, batch)
    parameters = list(codec.encoder.parameters())
    gradients = torch.autograd.grad(terms["reconstruction"], parameters)
    z_e = codec.encoder(batch.image)
    ids = codec.quantiser.nearest(z_e.detach().movedim(1, 3))
    z_q = codec.quantiser.codebook.detach()[ids].movedim(3, 1).requires_grad_()
    (at_z_q,) = torch.autograd.grad(F.mse_loss(codec.decoder(z_q), batch.image), z_q)
    expected = torch.autograd.grad(z_e, parameters, at_z_q)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


@pytest.mark.parametrize("update", ["loss", "ema"])
def test_parts_in_which_each_term_has_a_gradient(update: str) -> None:
    codec = make_codec(replace(PLAIN, update=update)).train()
    expected = {
        "reconstruction": {"encoder", "decoder"},
        "commitment": {"encoder"},
        "codebook": {"quantiser"},
    }
    for name, term in terms_of(codec, make_batch()).items():
        codec.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        named = codec.named_parameters()
        parts = {n.split(".")[0] for n, p in named if p.grad is not None and p.grad.any()}
        assert parts == expected[name]


# --- encode and decode ------------------------------------------------------------------------

CODEBOOKS = {
    "averages": QuantiserConfig(num_codes=6, code_dim=4, init="normal", ema_decay=0.8),
    "k-means": QuantiserConfig(num_codes=6, code_dim=4),
    "loss": PLAIN,
    "cosine averages": QuantiserConfig(num_codes=6, code_dim=4, ema_decay=0.8, cosine=True),
    "cosine loss": QuantiserConfig(num_codes=6, code_dim=4, update="loss", cosine=True),
}


def forward_pass(codec: VQVAE, image: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and pictures of the forward pass of `losses`, in evaluation mode."""
    quantised = codec.eval().quantiser(codec.encoder(image).movedim(1, 3))
    return quantised.ids, codec.decoder(quantised.z_q.movedim(3, 1)).clamp(-1, 1)


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("steps", [0, 30])
@torch.no_grad()
def test_encode_and_decode_do_what_training_does(
    steps: int, averaged: bool, name: str, shapes: CaptionedDataset
) -> None:
    """With any codebook; also with averaged weights, which are saved and which the prior reads."""
    codec = make_codec(CODEBOOKS[name])
    with torch.enable_grad():
        trainer = train(codec, shapes, steps, lr=2e-2, ema_decay=0.95 if averaged else 0.0)
    image = torch.cat([shapes.batch(range(8), [0] * 8, 0).image, make_batch(8, 16).image])
    with trainer.averaged() if averaged else nullcontext():
        ids, decoded = forward_pass(codec, image)
        assert torch.equal(codec.encode(image), ids)
        torch.testing.assert_close(codec.decode(ids), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cosine averages", "cosine loss"])
@pytest.mark.parametrize("averaged", [False, True])
@torch.no_grad()
def test_cosine_codes_have_length_one_when_they_are_read(
    averaged: bool, name: str, shapes: CaptionedDataset
) -> None:
    """After an optimiser's step and in an average of weights; the choice is that of the largest
    cosine, whatever the length of the encoder's vectors."""
    codec = make_codec(CODEBOOKS[name])
    with torch.enable_grad():
        trainer = train(codec, shapes, 30, lr=2e-2, ema_decay=0.95)
    image = torch.cat([shapes.batch(range(8), [0] * 8, 0).image, make_batch(8, 16).image])
    with trainer.averaged() if averaged else nullcontext():
        codec.eval()
        lengths = codec.quantiser.lookup(torch.arange(6)).norm(dim=1)
        z_e, ids = codec.encoder(image).movedim(1, 3), codec.encode(image)
        similarity = F.cosine_similarity(z_e[..., None, :], codec.quantiser.embedding, dim=-1)
    assert len(ids.unique()) > 1 and torch.equal(ids, similarity.argmax(-1))
    torch.testing.assert_close(lengths, torch.ones(6))


@torch.no_grad()
def test_decoded_pictures_are_clamped_floats() -> None:
    codec = make_codec().eval()
    codec.decoder.layers[-1].weight.mul_(20)
    ids = torch.randint(6, (2, 3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = codec.decode(ids)
    assert decoded.shape == (2, 3, 12, 20) and decoded.dtype == torch.float32
    assert decoded.min() == -1 and decoded.max() == 1


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others() -> None:
    codec, image = make_codec().eval(), make_batch(5).image
    ids = codec.encode(image)
    for k in range(5):
        assert torch.equal(codec.encode(image[k : k + 1]), ids[k : k + 1])
        torch.testing.assert_close(codec.decode(ids[k : k + 1]), codec.decode(ids)[k : k + 1])


def test_losses_in_half_precision() -> None:
    """Terms are float32, close to those in full precision."""
    codec, batch = make_codec().eval(), make_batch()
    exact = {name: term.item() for name, term in terms_of(codec, batch).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = terms_of(codec, batch)
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert {n: t.item() for n, t in terms.items()} == pytest.approx(exact, rel=0.05, abs=1e-2)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())


@pytest.mark.parametrize("name", ["k-means", "loss"])
def test_a_resumed_codec_continues_alike(name: str, shapes: CaptionedDataset) -> None:
    """Bit for bit: weights, codebook, running error."""
    whole = train(make_codec(CODEBOOKS[name]), shapes, 5)
    first = train(make_codec(CODEBOOKS[name]), shapes, 3)
    second = trainer_for(make_codec(CODEBOOKS[name]), shapes)
    second.load_state(first.state())
    for number in (3, 4):
        second.advance(second.loader.at(number))
    for key, tensor in whole.system.state_dict().items():
        assert torch.equal(tensor, second.system.state_dict()[key]), key


# --- learning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_few_pictures_are_learnt(name: str, shapes: CaptionedDataset) -> None:
    """Much better than by one grey for all, with several codes."""
    quantiser = replace(CODEBOOKS[name], num_codes=16, code_dim=8)
    codec = make_codec(quantiser, channels=16, num_downsamples=1)
    trainer = trainer_for(codec, shapes, lr=5e-3)
    batch = trainer.loader.at(0)
    errors = [trainer.advance(batch)["codec/reconstruction"].item() for _ in range(120)]
    plain = (batch.image - batch.image.mean((0, 2, 3), keepdim=True)).square().mean().item()
    assert errors[-1] < 0.4 * plain and errors[-1] < 0.5 * errors[3]
    ids = codec.eval().encode(batch.image)
    assert len(ids.unique()) > 3
    with torch.no_grad():
        mse = (codec.decode(ids) - batch.image).square().mean().item()
    assert mse == pytest.approx(errors[-1], rel=0.5)


def train_recipe(
    config: recipe.Config, data: CaptionedDataset, steps: int = 160
) -> tuple[VQVAE, str]:
    """The codec of a run after some steps, and the diagnosis of the last 20 of them."""
    torch.manual_seed(config.seed)
    codec, usage = VQVAE(config.codec), []
    trainer = Trainer(
        codec,
        data,
        replace(config.codec_optim, decay="none"),
        replace(config.train, batch_size=config.codec_batch_size, precision="fp32", prefetch=0),
        stage="codec",
    )
    for number in range(steps):
        usage.append(trainer.advance(trainer.loader.at(number))["metric/codebook_usage"].item())
    return codec, codec.diagnose({"codebook_usage": sum(usage[-20:]) / 20})


def test_the_recipe_collapse_collapses(shapes: CaptionedDataset) -> None:
    """At the sizes of preset smoke, which does not collapse without it.

    The averages forget ten times as fast as the preset's, so that a tenth of the steps is enough.
    """
    config = with_field(recipe.PRESETS["smoke"], "codec.quantiser.ema_decay", 0.9)
    collapsed, diagnosis = train_recipe(with_field(config, "recipe", "collapse"), shapes)
    assert diagnosis.startswith("codebook collapse")
    healthy, diagnosis = train_recipe(config, shapes)
    assert diagnosis == ""
    image = shapes.batch(range(64), [0] * 64, 0).image
    counts = [len(codec.eval().encode(image).unique()) for codec in (collapsed, healthy)]
    assert counts[0] < 8 <= counts[1]


def test_the_recipe_collapse_changes_the_codebook_alone() -> None:
    """At every preset, and beside other settings in any order."""
    for preset in recipe.PRESETS.values():
        changed = preset.with_recipe("collapse")
        after, before = changed.codec.quantiser, preset.codec.quantiser
        assert (after.update, after.init, after.restart_threshold) == ("loss", "normal", 0.0)
        assert after.num_codes == 8 * before.num_codes
        restored = replace(
            after,
            num_codes=before.num_codes,
            update=before.update,
            init=before.init,
            restart_threshold=before.restart_threshold,
        )
        assert replace(changed, codec=replace(changed.codec, quantiser=restored)) == preset
    settings = {
        "codec.quantiser.num_codes": 9,
        "recipe": "collapse",
        "codec.quantiser.beta": 0.5,
    }
    config: Any = runs.configure("vqvae", preset_name="smoke", settings=settings)
    assert (config.codec.quantiser.num_codes, config.codec.quantiser.beta) == (9, 0.5)
    assert config.codec.quantiser.update == "loss"
    with pytest.raises(UserError, match=r"collaps'.*collapse"):
        runs.configure("vqvae", preset_name="smoke", settings={"recipe": "collaps"})


# --- presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.PRESETS)
def test_presets_encode_and_decode_pictures_of_their_size(
    name: str, tokenizer: WordTokenizer
) -> None:
    """On the meta device."""
    config = recipe.PRESETS[name]
    with torch.device("meta"):
        codec, prior = (stage.construct() for stage in recipe.stages(config, tokenizer))
        assert isinstance(codec, VQVAE)
        grid = codec.encoder(torch.empty(2, 3, config.size, config.size))
        side = config.size // codec.factor
        assert grid.shape == (2, config.codec.quantiser.code_dim, side, side)
        assert codec.decoder(grid).shape == (2, 3, config.size, config.size)
    assert prior.grid_size == side


def test_preset_paper_is_the_papers() -> None:
    """Sections 4.1 and 4.2: 128 pixels, 32 x 32 codes of 512, two strided layers, two blocks of 256
    channels; beta 0.25; Adam at 0.0002 for 250,000 steps of 128 pictures; no later remedies."""
    config = recipe.PRESETS["paper"]
    codec, quantiser = config.codec, config.codec.quantiser
    assert (config.size, codec.factor, quantiser.num_codes) == (128, 4, 512)
    assert (codec.num_downsamples, codec.num_res_blocks) == (2, 2)
    assert (codec.channels, codec.res_channels) == (256, 256)
    assert (quantiser.beta, quantiser.update, quantiser.init) == (0.25, "loss", "normal")
    assert quantiser.restart_threshold == 0.0 and not quantiser.cosine
    optim = config.codec_optim
    assert (optim.name, optim.lr, optim.decay, optim.ema_decay) == ("adam", 2e-4, "none", 0.0)
    assert config.codec_batch_size == 128
    assert config.train.max_steps is not None
    assert config.train.max_steps * config.codec_share == 250_000


@pytest.mark.parametrize("size", [6, 17, 30])
def test_a_size_that_the_factor_does_not_divide_is_refused(
    size: int, tokenizer: WordTokenizer
) -> None:
    config = recipe.PRESETS["smoke"]
    config = replace(config, codec=replace(config.codec, num_downsamples=2), size=size)
    with pytest.raises(UserError, match=rf"size={size} is not divisible by 4"):
        runs.build(recipe.stages(config, tokenizer))
