"""`vqvae`'s codec: sizes, layers by hand, equation 3 by loops, and what becomes of its codebook."""

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
from lineage.vqvae.codec import Codes
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.vqvae import VQVAE, Residual, VQVAEConfig, VQVAEDecoder, VQVAEEncoder

PLAIN = QuantiserConfig(6, 4, codebook="loss", start="normal", restart=0.0)


def made(quantiser: QuantiserConfig = PLAIN, **changes: Any) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(quantiser, **({"channels": 8, "inner": 6} | changes)))


def pictures(count: int = 3, side: int = 8) -> Batch:
    image = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return Batch(image, [""] * count, None, [str(k) for k in range(count)])


def turns(codec: VQVAE, batch: Batch) -> Iterator[Turn]:
    return codec.losses(batch, codec.text.encode(batch.caption), NoiseStreams(range(len(batch))))


def terms_of(codec: VQVAE, batch: Batch) -> dict[str, Tensor]:
    ((name, terms),) = turns(codec, batch)
    assert name == "codec"
    return terms


def trainer_for(codec: VQVAE, data: CaptionedDataset, batch: int = 8, **optim: Any) -> Trainer:
    given = {"lr": 3e-3, "warmup": 0, "decay": "none", "weight_decay": 0.0, **optim}
    train = TrainConfig(batch=batch, precision="fp32", prefetch=0)
    return Trainer(codec, data, OptimConfig(**given), train, stage="codec")


def trained(codec: VQVAE, data: CaptionedDataset, steps: int, **optim: Any) -> Trainer:
    trainer = trainer_for(codec, data, **optim)
    for number in range(steps):
        trainer.advance(trainer.loader.at(number))
    return trainer


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("halvings", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (8, 24)])
def test_a_code_stands_for_a_square_of_pixels(halvings: int, height: int, width: int) -> None:
    codec, factor = made(halvings=halvings).eval(), 2**halvings
    assert codec.factor == codec.config.factor == factor and codec.codes == 6
    ids = codec.encode(torch.rand(2, 3, height, width))
    assert ids.shape == (2, height // factor, width // factor) and ids.dtype == torch.int64
    assert codec.decode(ids).shape == (2, 3, height, width)


@pytest.mark.parametrize(
    ("channels", "inner", "blocks", "codes", "width"),
    [(2, 1, 0, 1, 1), (5, 3, 1, 7, 3), (7, 9, 3, 2, 5), (3, 2, 2, 300, 2)],
)
@pytest.mark.parametrize("halvings", [1, 3])
def test_odd_sizes_train(
    channels: int, inner: int, blocks: int, codes: int, width: int, halvings: int
) -> None:
    """Odd channels, no residual blocks, one code, more codes than places."""
    quantiser = QuantiserConfig(codes, width)
    codec = made(quantiser, channels=channels, inner=inner, blocks=blocks, halvings=halvings)
    for _ in range(2):
        terms = terms_of(codec.train(), pictures(1, 16))
        torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())
    ids = codec.eval().encode(pictures(1, 16).image)
    assert ids.max() < codes and codec.decode(ids).abs().max() <= 1


@pytest.mark.parametrize("halvings", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", [0, 2])
def test_layers_are_those_of_section_4(halvings: int, blocks: int) -> None:
    """Strided 4 x 4 convolutions, a 3 x 3, residual blocks; the mirror image of it."""
    config = VQVAEConfig(PLAIN, 10, 6, blocks, halvings)
    encoder, decoder = VQVAEEncoder(config).layers, VQVAEDecoder(config).layers
    strided = [layer for layer in encoder if getattr(layer, "stride", 1) == (2, 2)]
    raised = [layer for layer in decoder if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.out_channels for layer in strided] == [5] + [10] * (halvings - 1)
    assert [layer.out_channels for layer in raised] == [10] * (halvings - 2) + [5] * (
        halvings > 1
    ) + [3]
    for layer in (*strided, *raised):
        assert layer.kernel_size == (4, 4) and layer.padding == (1, 1) and layer.stride == (2, 2)
    for layers in (encoder, decoder):
        found = [layer for layer in layers if isinstance(layer, Residual)]
        assert len(found) == blocks
        assert all(b.conv3.weight.shape == (6, 10, 3, 3) for b in found)
        assert all(b.conv1.weight.shape == (10, 6, 1, 1) for b in found)
    assert encoder[-1].out_channels == decoder[0].in_channels == 4


def test_a_residual_block_by_hand() -> None:
    """ReLU, 3 x 3, ReLU, 1 x 1; the way past it is left as it is."""
    block, x = Residual(3, 5), torch.randn(2, 3, 4, 4)
    kept = x.clone()
    inner = F.conv2d(x.clamp(min=0), block.conv3.weight, block.conv3.bias, padding=1)
    inner = F.conv2d(inner.clamp(min=0), block.conv1.weight, block.conv1.bias)
    torch.testing.assert_close(block(x), x + inner)
    assert torch.equal(x, kept)


def test_the_network_by_hand() -> None:
    """Two halvings, one block: a ReLU after each strided layer but the last of the decoder, whose
    pixels have no bounds of their own."""
    codec = made(blocks=1)
    x = pictures().image
    layers = codec.encoder.layers
    z = F.conv2d(x, layers[0].weight, layers[0].bias, stride=2, padding=1).clamp(min=0)
    z = F.conv2d(z, layers[2].weight, layers[2].bias, stride=2, padding=1).clamp(min=0)
    z = F.conv2d(z, layers[4].weight, layers[4].bias, padding=1)
    z = layers[5](z).clamp(min=0)
    z = F.conv2d(z, layers[7].weight, layers[7].bias)
    torch.testing.assert_close(codec.encoder(x), z)
    assert (z < 0).any() and (z > 0).any()
    layers, grid = codec.decoder.layers, 5 * torch.randn(3, 4, 2, 2)
    y = F.conv2d(grid, layers[0].weight, layers[0].bias, padding=1)
    y = layers[1](y).clamp(min=0)
    y = F.conv_transpose2d(y, layers[3].weight, layers[3].bias, stride=2, padding=1).clamp(min=0)
    y = F.conv_transpose2d(y, layers[5].weight, layers[5].bias, stride=2, padding=1)
    torch.testing.assert_close(codec.decoder(grid), y)
    assert (y < 0).any() and (y > 0).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", 1),
        ("inner", 0),
        ("halvings", 0),
        ("blocks", -1),
        ("variance", 0.0),
        ("variance", float("nan")),
    ],
)
def test_a_vqvae_that_cannot_be_built_is_told(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"codec.{name}") as caught:
        VQVAEConfig(**{name: value})
    assert "\n" not in str(caught.value)


# --- equation 3 -------------------------------------------------------------------------------


def naive(codec: VQVAE, image: Tensor) -> dict[str, float]:
    """A place at a time, each term a mean over all numbers of its kind."""
    config, z = codec.config, codec.encoder(image).double()
    codes = codec.quantiser.codes.double()
    grid, gaps = torch.zeros_like(z), []
    for b in range(z.shape[0]):
        for y in range(z.shape[2]):
            for x in range(z.shape[3]):
                far = [float((code - z[b, :, y, x]).square().sum()) for code in codes]
                gaps.append(min(far) / len(codes[0]))
                grid[b, :, y, x] = codes[far.index(min(far))]
    decoded = codec.decoder(grid.float()).double()
    error = float((decoded - image.double()).square().sum()) / image.numel() / config.variance
    gap = sum(gaps) / len(gaps)
    return {
        "reconstruction": error,
        "codebook": gap,
        "commitment": config.quantiser.beta * gap,
    }


@pytest.mark.parametrize("variance", [1.0, 0.06])
@pytest.mark.parametrize("beta", [0.25, 2.0, 0.0])
@pytest.mark.parametrize("codebook", ["loss", "average"])
@torch.no_grad()
def test_equation_3_by_loops(codebook: str, beta: float, variance: float) -> None:
    codec = made(replace(PLAIN, codebook=codebook, beta=beta), variance=variance)
    batch = pictures()
    expected = naive(codec, batch.image)
    if codebook == "average":
        del expected["codebook"]
    found = {name: term.item() for name, term in terms_of(codec.train(), batch).items()}
    assert found == pytest.approx(expected, rel=1e-4)


def test_facts_of_a_vqvae_are_those_of_the_step() -> None:
    """The reconstruction of this step as it would be shown, and the use of the codes."""
    codec, batch = made().eval(), pictures()
    with torch.no_grad():
        codec.decoder.layers[-1].weight.mul_(200)  # beyond black and white
    terms_of(codec, batch)
    shown = codec.decode(codec.encode(batch.image))
    assert (shown.abs() == 1).any()
    error = (shown - batch.image).square().mean().item()
    assert codec.facts["psnr"].item() == pytest.approx(
        10 * torch.tensor(4 / error).log10().item(), rel=1e-4
    )
    assert set(codec.facts) == {"psnr", "usage", "dead", "perplexity"}
    assert not any(fact.requires_grad for fact in codec.facts.values())


def test_the_gradient_goes_straight_through_to_the_encoder() -> None:
    """As if the decoder had read the vectors themselves: the gradient at the codes, pushed on from
    the encoder's output."""
    codec, batch = made(replace(PLAIN, beta=0.0)).train(), pictures()
    terms = terms_of(codec, batch)
    parameters = list(codec.encoder.parameters())
    found = torch.autograd.grad(terms["reconstruction"], parameters)
    z = codec.encoder(batch.image)
    ids = codec.quantiser.nearest(z.detach().movedim(1, 3))
    values = codec.quantiser.codes.detach()[ids].movedim(3, 1).requires_grad_()
    error = F.mse_loss(codec.decoder(values), batch.image)
    (at_codes,) = torch.autograd.grad(error, values)
    for ours, theirs in zip(found, torch.autograd.grad(z, parameters, at_codes), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


@pytest.mark.parametrize("codebook", ["loss", "average"])
def test_what_each_term_reaches(codebook: str) -> None:
    """Reconstruction encoder and decoder, commitment the encoder, `codebook` the codes."""
    codec = made(replace(PLAIN, codebook=codebook)).train()
    reached = {
        "reconstruction": {"encoder", "decoder"},
        "commitment": {"encoder"},
        "codebook": {"quantiser"},
    }
    for name, term in terms_of(codec, pictures()).items():
        codec.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        named = codec.named_parameters()
        parts = {n.split(".")[0] for n, p in named if p.grad is not None and p.grad.any()}
        assert parts == reached[name]


def test_every_parameter_of_a_vqvae_is_trained(shapes: CaptionedDataset) -> None:
    """By the one group that there is."""
    codec = made()
    (modules,) = codec.groups().values()
    mine = {id(p) for module in modules for p in module.parameters()}
    assert mine == {id(p) for p in codec.parameters()}
    before = {name: p.detach().clone() for name, p in codec.named_parameters()}
    trained(codec, shapes, 2)
    assert all(not torch.equal(p, before[name]) for name, p in codec.named_parameters())


# --- there and back ---------------------------------------------------------------------------

CODEBOOKS = {
    "averages": QuantiserConfig(6, 4, start="normal", decay=0.8),
    "k-means": QuantiserConfig(6, 4),
    "loss": PLAIN,
    "cosine averages": QuantiserConfig(6, 4, decay=0.8, cosine=True),
    "cosine loss": QuantiserConfig(6, 4, codebook="loss", cosine=True),
}


def seen_by_training(codec: VQVAE, image: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and pictures of the forward pass of `losses`, in evaluation mode."""
    z = codec.encoder(image).movedim(1, 3)
    found = codec.eval().quantiser(z)
    return found.ids, codec.decoder(found.values.movedim(3, 1)).clamp(-1, 1)


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("steps", [0, 30])
@torch.no_grad()
def test_a_vqvae_s_codes_are_those_of_training(
    name: str, steps: int, shapes: CaptionedDataset
) -> None:
    """`encode` and `decode` do what the forward pass did, on whatever codebook."""
    codec = made(CODEBOOKS[name])
    with torch.enable_grad():
        trained(codec, shapes, steps, lr=2e-2)
    image = torch.cat([shapes.batch(range(8), [0] * 8, 0).image, pictures(8, 16).image])
    ids, decoded = seen_by_training(codec, image)
    assert torch.equal(codec.encode(image), ids)
    torch.testing.assert_close(codec.decode(ids), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CODEBOOKS)
@torch.no_grad()
def test_so_are_those_of_the_averaged_weights(name: str, shapes: CaptionedDataset) -> None:
    """Which are what is saved, and what the prior learns from."""
    codec = made(CODEBOOKS[name])
    with torch.enable_grad():
        trainer = trained(codec, shapes, 30, lr=2e-2, average=0.95)
    image = torch.cat([shapes.batch(range(8), [0] * 8, 0).image, pictures(8, 16).image])
    with trainer.averaged():
        ids, decoded = seen_by_training(codec, image)
        assert torch.equal(codec.encode(image), ids)
        torch.testing.assert_close(codec.decode(ids), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cosine averages", "cosine loss"])
@pytest.mark.parametrize("averaged", [False, True])
@torch.no_grad()
def test_codes_of_cosine_have_length_one_when_they_are_read(
    averaged: bool, name: str, shapes: CaptionedDataset
) -> None:
    """Neither an optimiser's step nor a mean of weights leaves it at that; and by directions alone
    the choice is that of the largest cosine, whatever the length of the encoder's vectors."""
    codec = made(CODEBOOKS[name])
    with torch.enable_grad():
        trainer = trained(codec, shapes, 30, lr=2e-2, average=0.95)
    image = torch.cat([shapes.batch(range(8), [0] * 8, 0).image, pictures(8, 16).image])
    with trainer.averaged() if averaged else nullcontext():
        codec.eval()
        lengths = codec.quantiser.values(torch.arange(6)).norm(dim=1)
        z, ids = codec.encoder(image).movedim(1, 3), codec.encode(image)
        fit = F.cosine_similarity(z[..., None, :], codec.quantiser.codes, dim=-1)
    assert len(ids.unique()) > 1 and torch.equal(ids, fit.argmax(-1))
    torch.testing.assert_close(lengths, torch.ones(6))


@torch.no_grad()
def test_decoded_pictures_are_clamped_floats() -> None:
    codec = made().eval()
    codec.decoder.layers[-1].weight.mul_(20)
    ids = torch.randint(6, (2, 3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = codec.decode(ids)
    assert decoded.shape == (2, 3, 12, 20) and decoded.dtype == torch.float32
    assert decoded.min() == -1 and decoded.max() == 1


@torch.no_grad()
def test_rows_of_a_vqvae_do_not_depend_on_their_neighbours() -> None:
    codec, image = made().eval(), pictures(5).image
    ids = codec.encode(image)
    for k in range(5):
        assert torch.equal(codec.encode(image[k : k + 1]), ids[k : k + 1])
        torch.testing.assert_close(codec.decode(ids[k : k + 1]), codec.decode(ids)[k : k + 1])


def test_half_precision_around_a_vqvae() -> None:
    """Terms are single precision, of numbers near those without it."""
    codec, batch = made().eval(), pictures()
    exact = {name: term.item() for name, term in terms_of(codec, batch).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = terms_of(codec, batch)
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert {n: t.item() for n, t in terms.items()} == pytest.approx(exact, rel=0.05, abs=1e-2)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())


@torch.no_grad()
def test_codes_are_found_in_full_precision() -> None:
    """In whatever precision the loop trains: a code that is kept, one that is found when it is
    asked for, and one of evaluation must be the same."""
    codec, batch = made(replace(PLAIN, codes=300)).eval(), pictures(16, 16)
    exact = codec.encode(batch.image)
    codes, text = Codes(codec, 16, 8), codec.text.encode(batch.caption)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(codec.encode(batch.image), exact)
        asked = codes.of(batch)
        list(codes.losses(batch, text, NoiseStreams(range(16))))
    assert torch.equal(asked, exact)
    known = Batch(batch.image[:8], [""] * 8, None, batch.id[:8])
    assert torch.equal(codes.of(known), exact[:8]) and int(codes.memory.count) == 8


@pytest.mark.parametrize("name", ["k-means", "loss"])
def test_a_vqvae_that_is_resumed_goes_on_alike(name: str, shapes: CaptionedDataset) -> None:
    """Bit for bit: weights, codebook, the error that it follows."""
    whole = trained(made(CODEBOOKS[name]), shapes, 5)
    first = trained(made(CODEBOOKS[name]), shapes, 3)
    second = trainer_for(made(CODEBOOKS[name]), shapes)
    second.load_state(first.state())
    for number in (3, 4):
        second.advance(second.loader.at(number))
    for key, tensor in whole.system.state_dict().items():
        assert torch.equal(tensor, second.system.state_dict()[key]), key


# --- learning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_vqvae_learns_a_few_pictures(name: str, shapes: CaptionedDataset) -> None:
    """Better than one grey for all could be, by much, with codes that differ."""
    codec = made(replace(CODEBOOKS[name], codes=16, width=8), channels=16, halvings=1)
    trainer = trainer_for(codec, shapes, lr=5e-3)
    batch = trainer.loader.at(0)
    errors = [trainer.advance(batch)["codec/reconstruction"].item() for _ in range(120)]
    plain = (batch.image - batch.image.mean((0, 2, 3), keepdim=True)).square().mean().item()
    assert errors[-1] < 0.4 * plain and errors[-1] < 0.5 * errors[3]
    ids = codec.eval().encode(batch.image)
    assert len(ids.unique()) > 3
    with torch.no_grad():
        error = (codec.decode(ids) - batch.image).square().mean().item()
    assert error == pytest.approx(errors[-1], rel=0.5)


def fares(config: recipe.Config, data: CaptionedDataset, steps: int = 160) -> tuple[VQVAE, str]:
    """The codec of a run after so many steps, and what the log would remark of the last of them."""
    torch.manual_seed(config.seed)
    codec, seen = VQVAE(config.codec), []
    trainer = Trainer(
        codec,
        data,
        replace(config.codec_optim, decay="none"),
        replace(config.train, batch=config.codec_batch, precision="fp32", prefetch=0),
        stage="codec",
    )
    for number in range(steps):
        seen.append(trainer.advance(trainer.loader.at(number))["health/usage"].item())
    return codec, codec.remark({"usage": sum(seen[-20:]) / 20})


def test_the_recipe_collapse_leads_to_it(shapes: CaptionedDataset) -> None:
    """At the sizes of preset smoke; without the recipe nothing is said. The codes' counts forget
    ten times as fast as the preset's, so that a tenth of the steps will do."""
    config = with_field(recipe.PRESETS["smoke"], "codec.quantiser.decay", 0.9)
    lost, remark = fares(with_field(config, "recipe", "collapse"), shapes)
    assert remark.startswith("codebook collapse")
    whole, silence = fares(config, shapes)
    assert silence == ""
    image = shapes.batch(range(64), [0] * 64, 0).image
    used = [len(codec.eval().encode(image).unique()) for codec in (lost, whole)]
    assert used[0] < 8 <= used[1]


def test_the_recipe_changes_the_codebook_alone() -> None:
    """On every preset, and where other settings stand beside it, whatever their order."""
    for preset in recipe.PRESETS.values():
        changed = preset.with_recipe("collapse")
        lost = changed.codec.quantiser
        assert (lost.codebook, lost.start, lost.restart) == ("loss", "normal", 0.0)
        before = preset.codec.quantiser
        assert lost.codes == 8 * before.codes
        back = replace(lost, codes=before.codes, codebook=before.codebook)
        back = replace(back, start=before.start, restart=before.restart)
        assert replace(changed, codec=replace(changed.codec, quantiser=back)) == preset
    config: Any = runs.configure(
        "vqvae",
        preset_name="smoke",
        settings={"codec.quantiser.codes": 9, "recipe": "collapse", "codec.quantiser.beta": 0.5},
    )
    assert (config.codec.quantiser.codes, config.codec.quantiser.beta) == (9, 0.5)
    assert config.codec.quantiser.codebook == "loss"
    with pytest.raises(UserError, match=r"collaps'.*collapse"):
        runs.configure("vqvae", preset_name="smoke", settings={"recipe": "collaps"})


# --- presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.PRESETS)
def test_presets_of_vqvae_build_and_fit(name: str, tokenizer: WordTokenizer) -> None:
    """On the meta device, where pictures of the preset's size become codes and pictures again."""
    config = recipe.PRESETS[name]
    with torch.device("meta"):
        made: dict[str, Any] = {}
        for stage in recipe.stages(config, tokenizer):
            made[stage.name] = stage.build(made)
        codec, codes = made["codec"], made["codes"]
        assert isinstance(codec, VQVAE) and isinstance(codes, Codes)
        grid = codec.encoder(torch.empty(2, 3, config.size, config.size))
        side = config.size // codec.factor
        assert grid.shape == (2, config.codec.quantiser.width, side, side)
        assert codec.decoder(grid).shape == (2, 3, config.size, config.size)
    assert codes.side == made["prior"].side == side
    assert codes.memory.kept == config.kept and codes.memory.values.shape[1:] == (side**2,)
    assert codec.codes <= torch.iinfo(codes.memory.values.dtype).max + 1


def test_the_preset_paper_of_vqvae_is_the_papers() -> None:
    """Section 4.1 and 4.2: 128 pixels, 32 x 32 codes of 512, two halvings, two blocks of 256; beta
    of 0.25; Adam at 0.0002, 250,000 steps of 128 pictures; no helper of later work."""
    config = recipe.PRESETS["paper"]
    codec = config.codec
    assert (config.size, codec.factor, codec.quantiser.codes) == (128, 4, 512)
    assert (codec.halvings, codec.blocks, codec.channels, codec.inner) == (2, 2, 256, 256)
    assert codec.quantiser.beta == 0.25 and codec.quantiser.codebook == "loss"
    assert (codec.quantiser.restart, codec.quantiser.start) == (0.0, "normal")
    assert not codec.quantiser.cosine
    optim = config.codec_optim
    assert (optim.name, optim.lr, optim.decay, optim.average) == ("adam", 2e-4, "none", 0.0)
    assert config.codec_batch == 128
    assert config.train.steps is not None
    assert config.train.steps * config.codec_share == 250_000


@pytest.mark.parametrize("size", [6, 17, 30])
def test_pictures_that_do_not_divide_into_places_are_told(
    size: int, tokenizer: WordTokenizer
) -> None:
    """Before anything is built."""
    config = recipe.PRESETS["smoke"]
    config = replace(config, codec=replace(config.codec, halvings=2), size=size)
    with pytest.raises(UserError, match=rf"size={size} .* 4 pixels"):
        recipe.stages(config, tokenizer)
