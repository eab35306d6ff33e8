"""`dalle`'s codec: schedules, the bound by hand, noise of each row, densities of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from lineage.vqvae.dalle import (
    DVAE,
    KL_SPEED,
    DVAEConfig,
    cosine_schedule,
    kl_to_uniform,
    laplace_cdf,
    logit_laplace_loss,
    map_pixels,
)

TINY = DVAEConfig(
    num_codes=7,
    hidden_channels=4,
    init_channels=5,
    blocks_per_group=1,
    num_groups=2,
    kl_weight=3.0,
    anneal_steps=90,
)
BYTES = to_unit(torch.arange(256, dtype=torch.uint8))


def make_codec(step: int = 0, **changes: Any) -> DVAE:
    """A codec at a step of its schedules, with logits large enough that the codes differ."""
    torch.manual_seed(0)
    codec = DVAE(replace(TINY, **changes))
    with torch.no_grad():
        codec.encoder.output.weight.mul_(6.0)
    return at_step(codec, step)


def at_step(codec: DVAE, step: int) -> DVAE:
    codec.step.fill_(step)
    return codec


def make_batch(count: int = 3, side: int = 8) -> Batch:
    stream = torch.Generator().manual_seed(5)
    image = to_unit(torch.randint(0, 256, (count, 3, side, side), generator=stream).byte())
    return Batch(image, [""] * count, None, [str(k) for k in range(count)])


def turns_of(codec: DVAE, batch: Batch, seeds: Sequence[int] | None = None) -> Iterator[Turn]:
    return codec.losses(batch, None, NoiseStreams(seeds or range(len(batch))))


def turn_of(codec: DVAE, batch: Batch, seeds: Sequence[int] | None = None) -> Turn:
    (turn,) = turns_of(codec, batch, seeds)
    assert turn.group == "codec"
    return turn


def trainer_for(codec: DVAE, data: CaptionedDataset) -> Trainer:
    optim = OptimConfig(lr=3e-3, warmup=0, decay="none", weight_decay=0.0)
    train = TrainConfig(batch_size=8, precision="fp32", prefetch=0)
    return Trainer(codec, data, optim, train, stage="codec")


def train(codec: DVAE, data: CaptionedDataset, steps: int) -> Trainer:
    trainer = trainer_for(codec, data)
    for number in range(steps):
        trainer.advance(trainer.loader.at(number))
    return trainer


# --- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(1.0, 1 / 16), (0.0, 6.6), (2.0, 2.0)])
def test_cosine_schedule(start: float, end: float) -> None:
    """Monotonic, steepest in the middle, constant after its end."""
    values = [cosine_schedule(start, end, progress / 100) for progress in range(201)]
    assert values[0] == pytest.approx(start) and values[50] == pytest.approx((start + end) / 2)
    assert all(value == end for value in values[100:])
    assert values[25] == pytest.approx(start + (end - start) * (1 - 0.5**0.5) / 2)
    sign = 1 if end >= start else -1
    steps = [(b - a) * sign for a, b in zip(values, values[1:], strict=False)]
    assert min(steps) >= 0
    assert start == end or max(steps) == pytest.approx(max(steps[49:51]))


def test_the_schedules_of_the_paper() -> None:
    """Tau from 1 to 1/16 over 150,000 steps, beta from 0 to 6.6 over 5,000."""
    config = DVAEConfig()
    assert (config.final_temperature, config.kl_weight) == (1 / 16, 6.6)
    assert (config.anneal_steps, config.anneal_steps / KL_SPEED) == (150_000, 5_000)


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
    """Of the 90 steps of tau's schedule, beta needs 3. The KL term is per pixel and channel."""
    codec, batch = make_codec(step).eval(), make_batch()
    turn = turn_of(codec, batch)
    expected = tau or cosine_schedule(1, 1 / 16, step / 90)
    assert turn.metrics()["temperature"].item() == pytest.approx(expected)
    logits = codec.encoder(map_pixels((batch.image + 1) / 2))
    expected = beta * kl_to_uniform(logits).item() / (3 * 8 * 8)
    assert turn.terms["kl"].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert int(codec.step) == step + 1


# --- the bound --------------------------------------------------------------------------------


def test_kl_by_loops() -> None:
    """sum q ln(q K) over codes and cells, a mean over pictures."""
    logits = 2 * torch.randn(2, 5, 3, 2)
    total = 0.0
    for cell in logits.movedim(1, 3).reshape(-1, 5).tolist():
        weights = [math.exp(x) for x in cell]
        total += sum(w / sum(weights) * math.log(w / sum(weights) * 5) for w in weights)
    assert kl_to_uniform(logits).item() == pytest.approx(total / 2, rel=1e-5)


def test_kl_of_extreme_distributions() -> None:
    """ln K for a cell with one possible code, 0 for a uniform one and for a single code; finite
    where a code has probability 0."""
    certain = torch.full((4, 6, 2, 3), -1e4)
    certain[:, 2] = 1e4
    assert kl_to_uniform(certain).item() == pytest.approx(6 * math.log(6))
    assert kl_to_uniform(torch.full((4, 6, 2, 3), 8.0)).item() == pytest.approx(0, abs=1e-5)
    assert kl_to_uniform(torch.randn(4, 1, 2, 3)).item() == pytest.approx(0, abs=1e-6)
    certain.requires_grad_()
    kl_to_uniform(certain).backward()
    assert certain.grad is not None and certain.grad.isfinite().all()


@pytest.mark.parametrize("step", [0, 2, 30, 1000])
@torch.no_grad()
def test_the_density_of_pixels_by_hand(step: int) -> None:
    """Pixels within [0.1, 0.9]; a softmax of logits and Gumbel noise over tau, with the noise of
    each row; the logit-Laplace density."""
    codec, batch = make_codec(step), make_batch()
    mapped = 0.1 + 0.8 * (batch.image + 1) / 2
    logits, u = codec.encoder(mapped), NoiseStreams(range(3)).rand(7, 4, 4)
    tau = cosine_schedule(1.0, 1 / 16, step / 90)
    weights = ((logits.double() - (-u.double().log()).log()) / tau).exp()
    mu, log_b = codec.decoder((weights / weights.sum(1, keepdim=True)).float())
    distance = ((mapped / (1 - mapped)).log() - mu).abs()
    density = (-distance / log_b.exp()).exp() / (2 * log_b.exp() * mapped * (1 - mapped))
    terms = turn_of(codec, batch).terms
    assert terms["pixels"].item() == pytest.approx(-density.log().mean().item(), rel=1e-3)
    assert set(terms) == {"pixels", "kl"}


def test_metrics_of_a_step() -> None:
    """Codes are counted as `encode` chooses them, over steps."""
    codec, batch = make_codec(), make_batch()
    metrics = turn_of(codec, batch).metrics()
    usage = {"codebook_usage", "unused_codes", "perplexity"}
    assert set(metrics) == {"psnr", "temperature"} | usage
    assert all(m.shape == () and not m.requires_grad for m in metrics.values())
    counts = torch.bincount(codec.encode(batch.image).flatten(), minlength=7).float()
    assert (counts > 0).sum() > 1
    torch.testing.assert_close(codec.code_counts, 0.01 * counts)
    shares = counts[counts > 0] / counts.sum()
    expected = (-(shares * shares.log()).sum()).exp().item()
    assert metrics["perplexity"].item() == pytest.approx(expected, rel=1e-4)
    in_use = int((counts > 0.03 * counts.sum() / 7).sum())
    assert metrics["codebook_usage"].item() == pytest.approx(in_use / 7)
    turn_of(codec, batch)
    torch.testing.assert_close(codec.code_counts, (0.01 + 0.99 * 0.01) * counts)


def test_a_codebook_of_one_code() -> None:
    codec, batch = make_codec(50, num_codes=1), make_batch(1)
    turn = turn_of(codec, batch)
    assert turn.terms["kl"].item() == pytest.approx(0, abs=1e-6)
    assert turn.terms["pixels"].isfinite() and not codec.encode(batch.image).any()
    metrics = turn.metrics()
    assert metrics["codebook_usage"] == 1 and metrics["perplexity"] == pytest.approx(1)


def test_parts_in_which_each_term_has_a_gradient() -> None:
    """No gradient is copied past a choice."""
    codec = make_codec(50)
    expected = {"pixels": {"encoder", "decoder"}, "kl": {"encoder"}}
    for name, term in turn_of(codec, make_batch()).terms.items():
        codec.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        gradients = {n: p.grad for n, p in codec.named_parameters() if p.grad is not None}
        assert {n.split(".")[0] for n, g in gradients.items() if g.any()} == expected[name]
        assert all(g.isfinite().all() for g in gradients.values())


# --- noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 40, 500])
def test_each_row_uses_its_own_stream(step: int) -> None:
    """The terms of a batch are the means of those of its rows alone, in any order."""
    codec, batch = make_codec(), make_batch(4)
    terms = turn_of(at_step(codec, step), batch).terms
    whole = {name: term.item() for name, term in terms.items()}
    means = {"pixels": 0.0, "kl": 0.0}
    for k, row in enumerate(batch.split(1)):
        for name, term in turn_of(at_step(codec, step), row, [k]).terms.items():
            means[name] += term.item() / 4
    assert whole == pytest.approx(means, rel=1e-4)
    reversed_batch = Batch(batch.image.flip(0), [""] * 4, None, batch.id[::-1])
    terms = turn_of(at_step(codec, step), reversed_batch, [3, 2, 1, 0]).terms
    assert {n: t.item() for n, t in terms.items()} == pytest.approx(whole, rel=1e-4)


def test_all_noise_comes_from_the_streams() -> None:
    """Not from torch's own state."""
    codec, batch = make_codec(), make_batch()
    losses = []
    for seeds in ([0, 1, 2], [0, 1, 2], [3, 4, 5]):
        losses.append(turn_of(at_step(codec, 9), batch, seeds).terms["pixels"].item())
        torch.randn(3)
    assert losses[0] == losses[1] != losses[2]


# --- encode and decode ------------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 8, 12])
@torch.no_grad()
def test_encode_and_decode_by_hand(side: int) -> None:
    """The argmax of the logits; the decoder's mu of a single code, mapped back to [-1, 1]."""
    codec, image = make_codec(), make_batch(3, side).image
    logits = codec.encoder(0.1 + 0.8 * (image + 1) / 2)
    ids = codec.encode(image)
    assert torch.equal(ids, logits.argmax(1)) and ids.dtype == torch.int64
    assert ids.shape == (3, side // 2, side // 2) and codec.factor == 2 and codec.num_codes == 7
    one_hot = torch.zeros_like(logits).scatter_(1, ids[:, None], 1.0)
    mu, _ = codec.decoder(one_hot)
    expected = (((mu.sigmoid() - 0.1) / 0.8).clamp(0, 1) * 2) - 1
    decoded = codec.decode(ids)
    assert decoded.shape == image.shape and decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, expected)
    assert decoded.abs().max() <= 1


@torch.no_grad()
def test_a_mixture_of_one_code_is_decoded_as_that_code() -> None:
    """With a certain encoder and a low temperature, training and `decode` give one picture."""
    codec, batch = make_codec(90, final_temperature=1e-3), make_batch()
    codec.encoder.output.weight.mul_(1e5)
    metrics = turn_of(codec, batch).metrics()
    mse = (codec.decode(codec.encode(batch.image)) - batch.image).square().mean()
    assert metrics["psnr"].item() == pytest.approx((10 * (4 / mse).log10()).item(), abs=0.05)


@torch.no_grad()
def test_pictures_and_densities_are_float32_in_half_precision() -> None:
    codec, image = make_codec(), make_batch().image
    ids = codec.encode(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded, nll = codec.decode(ids), codec.nll(image, ids)
        assert codec.encode(image).dtype == torch.int64
    assert decoded.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(decoded, codec.decode(ids), rtol=0, atol=0.1)
    torch.testing.assert_close(nll, codec.nll(image, ids), rtol=0.05, atol=1.0)


def test_losses_in_half_precision() -> None:
    codec, batch = make_codec(), make_batch()
    exact = {n: t.item() for n, t in turn_of(at_step(codec, 45), batch).terms.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = turn_of(at_step(codec, 45), batch).terms
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert {n: t.item() for n, t in terms.items()} == pytest.approx(exact, rel=0.1, abs=1e-2)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())


# --- density of bytes -------------------------------------------------------------------------


def test_laplace_cdf() -> None:
    """Symmetric; its slope is exp(-|x|) / 2; accurate far out on the left."""
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    torch.testing.assert_close(laplace_cdf(x) + laplace_cdf(-x), torch.ones(241).double())
    slope = laplace_cdf(x).diff() / x.diff()
    middle = (x[1:] + x[:-1]) / 2
    torch.testing.assert_close(slope, 0.5 * (-middle.abs()).exp(), rtol=1e-2, atol=0)
    assert laplace_cdf(torch.tensor([-math.inf, 0.0, math.inf])).tolist() == [0, 0.5, 1]
    tail = laplace_cdf(torch.tensor(-50.0, dtype=torch.float64)).item()
    assert tail == pytest.approx(0.5 * math.exp(-50), rel=1e-12, abs=0)


class ConstantDecoder(nn.Module):
    """A decoder with one mu and one ln b for all pixels."""

    def __init__(self, mu: float, log_b: float) -> None:
        super().__init__()
        self.input = nn.Conv2d(1, 1, 1)
        self.mu, self.log_b = mu, log_b

    def forward(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        b, _, h, w = mixture.shape
        ones = mixture.new_ones(b, 3, 2 * h, 2 * w)
        return self.mu * ones, self.log_b * ones


def constant_codec(mu: float, log_b: float, **changes: Any) -> DVAE:
    codec = make_codec(**changes)
    codec.decoder = ConstantDecoder(mu, log_b)  # type: ignore[assignment]
    return codec


DENSITIES = [
    (0.0, 0.0),
    (0.7, -1.5),
    (-1.9, -3.0),
    (3.0, -2.0),
    (-6.0, -1.0),
    (0.4, 2.0),
    (1.0, -4.0),
]


@pytest.mark.parametrize(("mu", "log_b"), DENSITIES)
def test_probabilities_of_all_bytes_sum_to_one(mu: float, log_b: float) -> None:
    """Black and white get the density beyond the mapped pixels."""
    image = BYTES.view(256, 1, 1, 1).expand(-1, 3, 2, 2)
    nll = constant_codec(mu, log_b).nll(image, torch.zeros(256, 1, 1, dtype=torch.int64))
    assert nll.shape == (256,)
    probs = (-nll.double() / 12).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("mu", "log_b"), DENSITIES[:-1])
def test_nll_by_loops(mu: float, log_b: float) -> None:
    """The Laplace distribution of the logits between the edges of each byte, summed over pixels."""
    image = make_batch(2, 4).image
    image[0, 0, 0, 0], image[0, 1, 0, 0], image[1, 0, 0, 0] = -1.0, 1.0, BYTES[1]

    def cdf(edge: float) -> float:
        mapped = 0.1 + 0.8 * edge / 255
        x = (math.log(mapped / (1 - mapped)) - mu) / math.exp(log_b)
        return 0.5 * math.exp(x) if x < 0 else 1 - 0.5 * math.exp(-x)

    nll = constant_codec(mu, log_b).nll(image, torch.zeros(2, 2, 2, dtype=torch.int64))
    for row in range(2):
        total = 0.0
        for byte in ((image[row].flatten() + 1) * 127.5).round().int().tolist():
            high = 1.0 if byte == 255 else cdf(byte + 0.5)
            low = 0.0 if byte == 0 else cdf(byte - 0.5)
            if high - low < 1e-10:  # far on the right the difference is not accurate
                x = 0.1 + 0.8 * (byte + (0 if 0 < byte < 255 else -0.5 * (byte == 255))) / 255
                logit = math.log(x / (1 - x))
                density = math.exp(-abs(logit - mu) / math.exp(log_b)) / (2 * math.exp(log_b))
                total -= math.log(density * 0.8 / 255 / (x * (1 - x)))
            else:
                total -= math.log(high - low)
        assert nll[row].item() == pytest.approx(total, rel=2e-2)


@torch.no_grad()
def test_nll_is_close_to_what_training_minimises() -> None:
    """Where a byte is narrow, its probability is the density times its width, 0.8 / 255 of the
    mapped pixels."""
    codec, batch = make_codec(), make_batch()
    image = 0.8 * batch.image  # away from the ends
    image = to_unit(((image + 1) * 127.5).round().to(torch.uint8))
    ids = codec.encode(image)
    mu, log_b = codec.decoder(F.one_hot(ids, 7).movedim(3, 1).float())
    mapped = 0.1 + 0.8 * (image + 1) / 2
    nll = codec.nll(image, ids)
    for k in range(3):
        loss = logit_laplace_loss(mu[k], log_b[k], mapped[k]).item()
        expected = (loss + math.log(255 / 0.8)) * 3 * 8 * 8
        assert nll[k].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bound", [-2.0, -4.0])
def test_ln_b_has_a_lower_bound(bound: float) -> None:
    """In training and in `nll`: far below it ln b is the bound, far above the network's output.

    Not at a larger ln b than 2, where float32 has few digits left for the probability of a byte.
    """
    batch, ids = make_batch(2, 4), torch.zeros(2, 2, 2, dtype=torch.int64)
    pairs = (
        (constant_codec(0.3, bound - 30, min_log_b=bound), constant_codec(0.3, bound)),
        (constant_codec(0.3, 2.0, min_log_b=bound - 8), constant_codec(0.3, 2.0)),
    )
    for codec, expected in pairs:
        losses = [turn_of(one, batch).terms["pixels"].item() for one in (codec, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        torch.testing.assert_close(
            codec.nll(batch.image, ids), expected.nll(batch.image, ids), rtol=1e-4, atol=1e-5
        )


# --- learning, resuming -----------------------------------------------------------------------


def test_a_few_pictures_are_learnt() -> None:
    """Four colours under noise: several codes, which decode to little more error than the noise."""
    torch.manual_seed(2)
    colours = torch.tensor(
        [[0.6, -0.6, -0.6], [-0.6, 0.6, -0.6], [-0.6, -0.6, 0.6], [0.5, 0.5, 0.5]]
    )
    plain = F.interpolate(colours[torch.randint(4, (16, 4, 4))].movedim(3, 1), scale_factor=2)
    noisy = (plain + 0.15 * torch.randn(16, 3, 8, 8)).clamp(-1, 1)
    image = to_unit(((noisy + 1) * 127.5).round().to(torch.uint8))
    batch = Batch(image, [""] * 16, None, [str(k) for k in range(16)])
    torch.manual_seed(0)
    config = replace(
        TINY, num_codes=32, hidden_channels=16, init_channels=32, kl_weight=0.1, anneal_steps=150
    )
    codec = DVAE(config)
    optimizer, losses = torch.optim.Adam(codec.parameters(), lr=5e-3), []
    for step in range(150):
        terms = turn_of(codec, batch, [16 * step + row for row in range(16)]).terms
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        losses.append(terms["pixels"].item())
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 1
    with torch.no_grad():
        ids = codec.encode(image)
        mse = (codec.decode(ids) - image).square().mean().item()
    assert mse < 0.2 * image.var().item() and len(ids.unique()) >= 3


def test_a_resumed_codec_continues_alike(shapes: CaptionedDataset) -> None:
    """Bit for bit, at the same step of its schedules."""
    whole = train(make_codec(anneal_steps=6), shapes, 5)
    first = train(make_codec(anneal_steps=6), shapes, 3)
    codec = make_codec(anneal_steps=6)
    second = trainer_for(codec, shapes)
    second.load_state(first.state())
    assert int(codec.step) == 3
    for number in (3, 4):
        second.advance(second.loader.at(number))
    for key, tensor in whole.system.state_dict().items():
        assert torch.equal(tensor, codec.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_groups", 0),
        ("anneal_steps", 0),
        ("kl_weight", -0.1),
        ("kl_weight", float("nan")),
        ("final_temperature", 0.0),
        ("final_temperature", float("nan")),
        ("final_temperature", -1.0),
    ],
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name) as caught:
        DVAEConfig(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", recipe.PRESETS)
def test_presets_encode_and_decode_pictures_of_their_size(
    name: str, tokenizer: WordTokenizer
) -> None:
    """On the meta device; the codec's stage is long enough for its schedules."""
    config = recipe.PRESETS[name]
    stages = recipe.stages(config, tokenizer)
    with torch.device("meta"):
        codec, prior = (stage.construct() for stage in stages)
        side = config.size // codec.factor
        logits = codec.encoder(torch.empty(1, 3, config.size, config.size))
        assert logits.shape == (1, config.codec.num_codes, side, side)
        mu, log_b = codec.decoder(logits)
        assert mu.shape == log_b.shape == (1, 3, config.size, config.size)
    assert prior.grid_size == side
    steps = stages[0].budgeted().max_steps
    assert steps is None or steps >= config.codec.anneal_steps


def test_preset_paper_is_the_papers() -> None:
    """Appendix A: 32 x 32 codes of 8,192; three million steps of 512; Adam at 0.0001."""
    config = recipe.PRESETS["paper"]
    assert config.size // config.codec.factor == 32 and config.codec.num_codes == 8192
    assert config.codec == DVAEConfig() and config.codec_batch_size == 512
    assert (config.codec_optim.name, config.codec_optim.lr) == ("adamw", 1e-4)
    codec, _ = recipe.stages(config, WordTokenizer(["a"]))
    assert codec.budgeted().max_steps == 3_000_000
