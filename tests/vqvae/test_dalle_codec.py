"""`dalle`'s codec: schedules, the bound by hand, draws of its own for each row, bits of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset, to_unit
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.recipes import dalle as recipe
from lineage.system import Turn
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer
from lineage.vqvae import dalle as module
from lineage.vqvae.dalle import DVAE, DVAEConfig, cosine_way, laplace_cdf, uniform_kl

TINY = DVAEConfig(codes=7, width=4, start=5, blocks=1, groups=2, beta=3.0, anneal=90)
BYTES = to_unit(torch.arange(256, dtype=torch.uint8))


def made(**changes: Any) -> DVAE:
    """Of logits large enough that the codes differ."""
    torch.manual_seed(0)
    codec = DVAE(replace(TINY, **changes))
    with torch.no_grad():
        codec.encoder.output.weight.mul_(6.0)
    return codec


def pictures(count: int = 3, side: int = 8) -> Batch:
    stream = torch.Generator().manual_seed(5)
    image = to_unit(torch.randint(0, 256, (count, 3, side, side), generator=stream).byte())
    return Batch(image, [""] * count, None, [str(k) for k in range(count)])


def turns(codec: DVAE, batch: Batch, seeds: range | list[int] | None = None) -> Iterator[Turn]:
    draws = NoiseStreams(seeds or range(len(batch)))
    return codec.losses(batch, codec.text.encode(batch.caption), draws)


def terms_of(codec: DVAE, batch: Batch, seeds: list[int] | None = None) -> dict[str, Tensor]:
    ((name, terms),) = turns(codec, batch, seeds)
    assert name == "codec"
    return terms


def at_step(codec: DVAE, step: int) -> DVAE:
    codec.steps.fill_(step)
    return codec


def trainer_for(codec: DVAE, data: CaptionedDataset, batch: int = 8, **optim: Any) -> Trainer:
    given = {"lr": 3e-3, "warmup": 0, "decay": "none", "weight_decay": 0.0, **optim}
    train = TrainConfig(batch=batch, precision="fp32", prefetch=0)
    return Trainer(codec, data, OptimConfig(**given), train, stage="codec")


def trained(codec: DVAE, data: CaptionedDataset, steps: int, **optim: Any) -> Trainer:
    trainer = trainer_for(codec, data, **optim)
    for number in range(steps):
        trainer.advance(trainer.loader.at(number))
    return trainer


# --- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(1.0, 1 / 16), (0.0, 6.6), (2.0, 2.0)])
def test_half_a_cosine(start: float, end: float) -> None:
    """From the one to the other without a turn back, steepest in the middle, and there it stays."""
    way = [cosine_way(start, end, share / 100) for share in range(201)]
    assert way[0] == pytest.approx(start) and way[50] == pytest.approx((start + end) / 2)
    assert all(value == end for value in way[100:])
    assert way[25] == pytest.approx(start + (end - start) * (1 - 0.5**0.5) / 2)
    steps = [(b - a) * (1 if end >= start else -1) for a, b in zip(way, way[1:], strict=False)]
    assert min(steps) >= 0
    assert start == end or max(steps) == pytest.approx(max(steps[49:51]))


def test_the_schedules_of_the_paper() -> None:
    """Tau from 1 to 1/16 over 150,000 steps, beta from 0 to 6.6 over 5,000."""
    config = DVAEConfig()
    assert (config.temperature, config.anneal, config.beta) == (1 / 16, 150_000, 6.6)
    assert config.anneal / module.SOONER == 5_000


@pytest.mark.parametrize(
    ("step", "tau", "beta"),
    [
        (0, 1.0, 0.0),
        (1, None, 0.75),
        (2, None, 2.25),
        (3, None, 3.0),
        (45, (1 + 1 / 16) / 2, 3.0),
        (90, 1 / 16, 3.0),
        (5000, 1 / 16, 3.0),
    ],
)
def test_tau_and_beta_of_a_step(step: int, tau: float | None, beta: float) -> None:
    """Of 90 steps to anneal, beta needs 3. The KL term is per pixel and channel."""
    codec, batch = at_step(made().eval(), step), pictures()
    terms = terms_of(codec, batch)
    assert codec.facts["tau"].item() == pytest.approx(tau or cosine_way(1, 1 / 16, step / 90))
    logits = codec.encoder(module.map_pixels((batch.image + 1) / 2))
    assert terms["kl"].item() == pytest.approx(
        beta * uniform_kl(logits).item() / (3 * 8 * 8), rel=1e-5, abs=1e-9
    )
    assert int(codec.steps) == step + 1


# --- the bound --------------------------------------------------------------------------------


def test_the_kl_by_loops() -> None:
    """sum q ln(q V), over codes and places, a mean over pictures."""
    logits = 2 * torch.randn(2, 5, 3, 2)
    total = 0.0
    for row in logits.movedim(1, 3).reshape(-1, 5).tolist():
        parts = [math.exp(x) for x in row]
        shares = [part / sum(parts) for part in parts]
        total += sum(q * math.log(q * 5) for q in shares)
    assert uniform_kl(logits).item() == pytest.approx(total / 2, rel=1e-5)


def test_the_kl_of_certainty_and_of_none() -> None:
    """ln V for each place that knows its code, nothing for one that leaves all open, nothing where
    there is one code alone; finite where a code is out of the question."""
    sure = torch.full((4, 6, 2, 3), -1e4)
    sure[:, 2] = 1e4
    assert uniform_kl(sure).item() == pytest.approx(6 * math.log(6))
    assert uniform_kl(torch.full((4, 6, 2, 3), 8.0)).item() == pytest.approx(0, abs=1e-5)
    assert uniform_kl(torch.randn(4, 1, 2, 3)).item() == pytest.approx(0, abs=1e-6)
    sure.requires_grad_()
    uniform_kl(sure).backward()
    assert sure.grad is not None and sure.grad.isfinite().all()


@pytest.mark.parametrize("step", [0, 2, 30, 1000])
@torch.no_grad()
def test_the_bound_by_hand(step: int) -> None:
    """Pixels within [0.1, 0.9]; a softmax of logits and Gumbel noise by tau, with the rows' own
    draws; the density of the logits of pixels; and the KL."""
    codec, batch = at_step(made(), step), pictures()
    mapped = 0.1 + 0.8 * (batch.image + 1) / 2
    logits = codec.encoder(mapped)
    uniform = NoiseStreams(range(3)).rand(7, 4, 4)
    tau = cosine_way(1.0, 1 / 16, step / 90)
    mixture = ((logits.double() - (-uniform.double().log()).log()) / tau).exp()
    mu, log_b = codec.decoder((mixture / mixture.sum(1, keepdim=True)).float())
    gap = (mapped / (1 - mapped)).log() - mu
    density = (-gap.abs() / log_b.exp()).exp() / (2 * log_b.exp() * mapped * (1 - mapped))
    found = terms_of(codec, batch)
    assert found["pixels"].item() == pytest.approx(-density.log().mean().item(), rel=1e-3)
    assert set(found) == {"pixels", "kl"}


def test_facts_of_a_dvae_are_those_of_the_step() -> None:
    """The reconstruction through the mixture, codes as they would be chosen, counted over steps."""
    codec, batch = made(), pictures()
    terms_of(codec, batch)
    assert set(codec.facts) == {"psnr", "usage", "dead", "perplexity", "tau"}
    assert all(f.shape == () and not f.requires_grad for f in codec.facts.values())
    sizes = torch.bincount(codec.encode(batch.image).flatten(), minlength=7).float()
    assert (sizes > 0).sum() > 1
    torch.testing.assert_close(codec.counts, 0.01 * sizes)
    shares = sizes[sizes > 0] / sizes.sum()
    expected = (-(shares * shares.log()).sum()).exp().item()
    assert codec.facts["perplexity"].item() == pytest.approx(expected, rel=1e-4)
    assert codec.facts["usage"].item() == pytest.approx(int((sizes > 48 / 70).sum()) / 7)
    terms_of(codec, batch)
    torch.testing.assert_close(codec.counts, (0.01 + 0.99 * 0.01) * sizes)


def test_one_code_is_a_codebook() -> None:
    codec, batch = made(codes=1), pictures(1)
    terms = terms_of(at_step(codec, 50), batch)
    assert terms["kl"].item() == pytest.approx(0, abs=1e-6) and terms["pixels"].isfinite()
    assert not codec.encode(batch.image).any()
    assert codec.facts["usage"] == 1 and codec.facts["perplexity"] == pytest.approx(1)


def test_both_terms_reach_what_they_should() -> None:
    """The density both networks, the KL the encoder: no gradient is copied past a choice."""
    codec = at_step(made(), 50)
    reached = {"pixels": {"encoder", "decoder"}, "kl": {"encoder"}}
    for name, term in terms_of(codec, pictures()).items():
        codec.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        grads = {n: p.grad for n, p in codec.named_parameters() if p.grad is not None}
        assert {n.split(".")[0] for n, g in grads.items() if g.any()} == reached[name]
        assert all(g.isfinite().all() for g in grads.values())


def test_every_parameter_of_a_dvae_is_trained(shapes: CaptionedDataset) -> None:
    """By the one group that there is."""
    codec = made()
    (modules,) = codec.groups().values()
    mine = {id(p) for part in modules for p in part.parameters()}
    assert mine == {id(p) for p in codec.parameters()}
    before = {name: p.detach().clone() for name, p in codec.named_parameters()}
    trained(codec, shapes, 2)
    assert all(not torch.equal(p, before[name]) for name, p in codec.named_parameters())


# --- draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 40, 500])
def test_a_row_has_its_own_noise(step: int) -> None:
    """The terms of a batch are the means of those of its rows alone, each with its stream, in any
    order."""
    codec, batch = made(), pictures(4)
    whole = {n: t.item() for n, t in terms_of(at_step(codec, step), batch).items()}
    alone: dict[str, float] = {"pixels": 0.0, "kl": 0.0}
    for k, one in enumerate(batch.split(1)):
        for name, term in terms_of(at_step(codec, step), one, [k]).items():
            alone[name] += term.item() / 4
    assert whole == pytest.approx(alone, rel=1e-4)
    turned = Batch(batch.image.flip(0), [""] * 4, None, batch.id[::-1])
    again = terms_of(at_step(codec, step), turned, [3, 2, 1, 0])
    assert {n: t.item() for n, t in again.items()} == pytest.approx(whole, rel=1e-4)


def test_all_noise_comes_from_the_draws() -> None:
    """Other streams give other numbers, the same ones the same, whatever torch's own state is."""
    codec, batch = made(), pictures()
    found = []
    for seeds in ([0, 1, 2], [0, 1, 2], [3, 4, 5]):
        found.append(terms_of(at_step(codec, 9), batch, seeds)["pixels"].item())
        torch.randn(3)
    assert found[0] == found[1] != found[2]


# --- there and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 8, 12])
@torch.no_grad()
def test_codes_are_the_likeliest_and_pictures_those_of_one_code(side: int) -> None:
    """The argmax of the encoder's logits; the decoder's middle of a mixture of one code alone,
    brought back to [-1, 1]."""
    codec, image = made(), pictures(3, side).image
    logits = codec.encoder(0.1 + 0.8 * (image + 1) / 2)
    ids = codec.encode(image)
    assert torch.equal(ids, logits.argmax(1)) and ids.dtype == torch.int64
    assert ids.shape == (3, side // 2, side // 2) and codec.factor == 2 and codec.codes == 7
    single = torch.zeros_like(logits).scatter_(1, ids[:, None], 1.0)
    mu, _ = codec.decoder(single)
    expected = (((mu.sigmoid() - 0.1) / 0.8).clamp(0, 1) * 2) - 1
    decoded = codec.decode(ids)
    assert decoded.shape == image.shape and decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, expected)
    assert decoded.abs().max() <= 1


@torch.no_grad()
def test_the_coldest_mixture_is_decoded_as_its_codes_are() -> None:
    """Where the encoder is certain, training's forward pass and `decode` draw the same picture."""
    codec, batch = made(temperature=1e-3), pictures()
    codec.encoder.output.weight.mul_(1e5)
    terms_of(at_step(codec, 90), batch)
    shown = codec.decode(codec.encode(batch.image))
    error = (shown - batch.image).square().mean()
    assert codec.facts["psnr"].item() == pytest.approx((10 * (4 / error).log10()).item(), abs=0.05)


@torch.no_grad()
def test_decoded_pictures_are_floats_in_half_precision() -> None:
    """And the codes' density is."""
    codec, image = made(), pictures().image
    ids = codec.encode(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded, nats = codec.decode(ids), codec.nats(image, ids)
        assert codec.encode(image).dtype == torch.int64
    assert decoded.dtype == nats.dtype == torch.float32
    torch.testing.assert_close(decoded, codec.decode(ids), rtol=0, atol=0.1)
    torch.testing.assert_close(nats, codec.nats(image, ids), rtol=0.05, atol=1.0)


def test_half_precision_around_the_step() -> None:
    codec, batch = made(), pictures()
    exact = {n: t.item() for n, t in terms_of(at_step(codec, 45), batch).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = terms_of(at_step(codec, 45), batch)
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert {n: t.item() for n, t in terms.items()} == pytest.approx(exact, rel=0.1, abs=1e-2)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())


# --- bits of bytes ----------------------------------------------------------------------------


def test_the_laplace_distribution() -> None:
    """Half of exp(-|x|) on either side; its slope is the density; the ends are 0 and 1; and what
    is small stays exact."""
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    torch.testing.assert_close(laplace_cdf(x) + laplace_cdf(-x), torch.ones(241).double())
    slope = laplace_cdf(x).diff() / x.diff()
    middle = (x[1:] + x[:-1]) / 2
    torch.testing.assert_close(slope, 0.5 * (-middle.abs()).exp(), rtol=1e-2, atol=0)
    assert laplace_cdf(torch.tensor([-math.inf, 0.0, math.inf])).tolist() == [0, 0.5, 1]
    tail = laplace_cdf(torch.tensor(-50.0, dtype=torch.float64)).item()
    assert tail == pytest.approx(0.5 * math.exp(-50), rel=1e-12, abs=0)


class Fixed(nn.Module):
    """A decoder of one mu and one ln b for all pixels."""

    def __init__(self, mu: float, log_b: float) -> None:
        super().__init__()
        self.input = nn.Conv2d(1, 1, 1)
        self.mu, self.log_b = mu, log_b

    def forward(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        b, _, h, w = mixture.shape
        place = mixture.new_ones(b, 3, 2 * h, 2 * w)
        return self.mu * place, self.log_b * place


def fixed(mu: float, log_b: float) -> DVAE:
    codec = made()
    codec.decoder = Fixed(mu, log_b)  # type: ignore[assignment]
    return codec


SPREADS = [
    (0.0, 0.0),
    (0.7, -1.5),
    (-1.9, -3.0),
    (3.0, -2.0),
    (-6.0, -1.0),
    (0.4, 2.0),
    (1.0, -4.0),
]


@pytest.mark.parametrize(("mu", "log_b"), SPREADS)
def test_a_laplacian_s_shares_of_all_bytes_sum_to_one(mu: float, log_b: float) -> None:
    """Though the density of a pixel reaches beyond what pixels are mapped to: that belongs to
    black and white."""
    image = BYTES.view(256, 1, 1, 1).expand(-1, 3, 2, 2)
    nats = fixed(mu, log_b).nats(image, torch.zeros(256, 1, 1, dtype=torch.int64))
    assert nats.shape == (256,)
    each = (-nats.double() / 12).exp()
    assert each.sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("mu", "log_b"), SPREADS[:-1])
def test_nats_by_loops(mu: float, log_b: float) -> None:
    """The share of a byte: of the Laplace distribution of logits, what lies between its edges,
    summed over pixels, each row by itself."""
    image = pictures(2, 4).image
    image[0, 0, 0, 0], image[0, 1, 0, 0], image[1, 0, 0, 0] = -1.0, 1.0, BYTES[1]

    def below(edge: float) -> float:
        mapped = 0.1 + 0.8 * edge / 255
        x = (math.log(mapped / (1 - mapped)) - mu) / math.exp(log_b)
        return 0.5 * math.exp(x) if x < 0 else 1 - 0.5 * math.exp(-x)

    found = fixed(mu, log_b).nats(image, torch.zeros(2, 2, 2, dtype=torch.int64))
    for row in range(2):
        total = 0.0
        for byte in ((image[row].flatten() + 1) * 127.5).round().int().tolist():
            high = 1.0 if byte == 255 else below(byte + 0.5)
            low = 0.0 if byte == 0 else below(byte - 0.5)
            if high - low < 1e-10:  # far to the right this loop is not exact
                x = 0.1 + 0.8 * (byte + (0 if 0 < byte < 255 else -0.5 * (byte == 255))) / 255
                logit = math.log(x / (1 - x))
                density = math.exp(-abs(logit - mu) / math.exp(log_b)) / (2 * math.exp(log_b))
                total -= math.log(density * 0.8 / 255 / (x * (1 - x)))
            else:
                total -= math.log(high - low)
        assert found[row].item() == pytest.approx(total, rel=2e-2)


@torch.no_grad()
def test_nats_are_about_what_training_minimises() -> None:
    """Where a byte is narrow, its share is the density times its width: of the mapped pixels, 0.8
    of 1/255."""
    codec, batch = made(), pictures()
    image = 0.8 * batch.image  # away from the ends
    image = to_unit(((image + 1) * 127.5).round().to(torch.uint8))
    ids = codec.encode(image)
    mu, log_b = codec.decoder(F.one_hot(ids, 7).movedim(3, 1).float())
    mapped = 0.1 + 0.8 * (image + 1) / 2
    for k in range(3):
        mean = module.logit_laplace_loss(mu[k], log_b[k], mapped[k]).item()
        expected = (mean + math.log(255 / 0.8)) * 3 * 8 * 8
        assert codec.nats(image[k : k + 1], ids[k : k + 1]).item() == pytest.approx(
            expected, rel=1e-3
        )


@pytest.mark.parametrize("floor", [-2.0, -4.0])
def test_b_has_a_floor_in_training_and_in_bits(floor: float) -> None:
    """Far below it the density is that of ln b at the floor; far above, what the network says."""
    batch, ids = pictures(2, 4), torch.zeros(2, 2, 2, dtype=torch.int64)

    def floored(log_b: float, sharpest: float) -> DVAE:
        codec = fixed(0.3, log_b)
        codec.config = replace(codec.config, sharpest=sharpest)
        return codec

    pairs = (
        (floored(floor - 30, floor), fixed(0.3, floor)),
        (floored(9.0, floor), fixed(0.3, 9.0)),
    )
    for ours, plain in pairs:
        terms = [terms_of(codec, batch)["pixels"].item() for codec in (ours, plain)]
        assert terms[0] == pytest.approx(terms[1], rel=1e-4)
        assert torch.allclose(ours.nats(batch.image, ids), plain.nats(batch.image, ids), rtol=1e-4)


# --- learning and keeping ---------------------------------------------------------------------


def test_a_dvae_learns_a_few_pictures() -> None:
    """Four colours under noise, by the bound, and by what its codes alone give back: a code for
    each colour, and little more left over than the noise."""
    torch.manual_seed(2)
    colours = torch.tensor(
        [[0.6, -0.6, -0.6], [-0.6, 0.6, -0.6], [-0.6, -0.6, 0.6], [0.5, 0.5, 0.5]]
    )
    plain = F.interpolate(colours[torch.randint(4, (16, 4, 4))].movedim(3, 1), scale_factor=2)
    noised = (plain + 0.15 * torch.randn(16, 3, 8, 8)).clamp(-1, 1)
    image = to_unit(((noised + 1) * 127.5).round().to(torch.uint8))
    batch = Batch(image, [""] * 16, None, [str(k) for k in range(16)])
    torch.manual_seed(0)
    codec = DVAE(replace(TINY, codes=32, width=16, start=32, beta=0.1, anneal=150))
    optimiser, bounds = torch.optim.Adam(codec.parameters(), lr=5e-3), []
    for step in range(150):
        terms = terms_of(codec, batch, [16 * step + row for row in range(16)])
        optimiser.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimiser.step()
        bounds.append(terms["pixels"].item())
    assert sum(bounds[-5:]) / 5 < sum(bounds[:5]) / 5 - 1
    with torch.no_grad():
        ids = codec.encode(image)
        error = (codec.decode(ids) - image).square().mean().item()
    assert error < 0.2 * image.var().item() and len(ids.unique()) >= 3


def test_a_dvae_that_is_resumed_goes_on_alike(shapes: CaptionedDataset) -> None:
    """Bit for bit, and where it was in its schedules."""
    whole = trained(made(anneal=6), shapes, 5)
    first = trained(made(anneal=6), shapes, 3)
    second = trainer_for(made(anneal=6), shapes)
    second.load_state(first.state())
    assert int(second.system.steps) == 3  # type: ignore[arg-type]
    for number in (3, 4):
        second.advance(second.loader.at(number))
    for key, tensor in whole.system.state_dict().items():
        assert torch.equal(tensor, second.system.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("groups", 0),
        ("anneal", 0),
        ("beta", -1.0),
        ("beta", math.nan),
        ("temperature", 0.0),
        ("temperature", math.nan),
    ],
)
def test_what_cannot_be_trained_is_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"codec.{name}") as caught:
        DVAEConfig(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", recipe.PRESETS)
def test_presets_of_dalle_build_and_fit(name: str, tokenizer: WordTokenizer) -> None:
    """On the meta device, where pictures of the preset's size become codes and pictures again; and
    tau is where it should be by the end of the codec's training, if that is counted in steps."""
    config = recipe.PRESETS[name]
    with torch.device("meta"):
        made: dict[str, Any] = {}
        stages = {stage.name: stage for stage in recipe.stages(config, tokenizer)}
        for stage in stages.values():
            made[stage.name] = stage.build(made)
        codec, side = made["codec"], config.size // made["codec"].factor
        logits = codec.encoder(torch.empty(1, 3, config.size, config.size))
        assert logits.shape == (1, config.codec.codes, side, side)
        mu, log_b = codec.decoder(logits)
        assert mu.shape == log_b.shape == (1, 3, config.size, config.size)
    assert made["prior"].side == made["codes"].side == side
    assert codec.codes <= torch.iinfo(made["codes"].memory.values.dtype).max + 1
    steps = stages["codec"].budgeted().steps
    assert steps is None or steps >= config.codec.anneal


def test_the_preset_paper_of_dalle_is_the_papers() -> None:
    """Appendix A: 32 x 32 codes of 8,192; three million steps of 512; Adam at 0.0001."""
    config = recipe.PRESETS["paper"]
    assert config.size // config.codec.factor == 32 and config.codec.codes == 8192
    assert config.codec == DVAEConfig() and config.codec_batch == 512
    assert (config.codec_optim.name, config.codec_optim.lr) == ("adamw", 1e-4)
    (codec, *_) = [s for s in recipe.stages(config, WordTokenizer(["a"])) if s.name == "codec"]
    assert codec.budgeted().steps == 3_000_000
