"""What codecs share: the bits of bytes against sums over all 256 of them, the memory of codes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset, to_unit
from lineage.nn.noise import NoiseStreams
from lineage.training.loop import Trainer
from lineage.vqvae.codec import Codec, Codes, interval, normal_cdf, psnr

BYTES = to_unit(torch.arange(256, dtype=torch.uint8))


class Grey(Codec):
    """K levels of grey from black to white: a place's code is the level nearest to its mean."""

    def __init__(self, codes: int = 5, factor: int = 2) -> None:
        super().__init__()
        self.codes, self.factor = codes, factor
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = 0

    def encode(self, image: Tensor) -> Tensor:
        self.calls += 1
        side = self.factor
        rows = image.mean(1).unfold(1, side, side).unfold(2, side, side).mean((-1, -2))
        return ((rows + 1) / 2 * (self.codes - 1)).round().clamp(0, self.codes - 1).long()

    def decode(self, ids: Tensor) -> Tensor:
        grey = self.scale * (ids / max(1, self.codes - 1) * 2 - 1)
        grey = grey.repeat_interleave(self.factor, 1).repeat_interleave(self.factor, 2)
        return grey[:, None].expand(-1, 3, -1, -1)


def left_of(x: float) -> float:
    """Of the standard normal distribution, exact far out too."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def share_of(byte: int, mean: float, deviation: float) -> float:
    """Of a Gaussian, what falls to one of 256 bytes, in the end ones with all beyond them."""
    low = -math.inf if byte == 0 else ((2 * byte - 1) / 255 - 1 - mean) / deviation
    high = math.inf if byte == 255 else ((2 * byte + 1) / 255 - 1 - mean) / deviation
    if low + high > 0:
        low, high = -high, -low
    return left_of(high) - left_of(low)


def with_error(codec: Codec, error: float) -> Codec:
    codec.error.fill_(error)
    return codec


# --- bits of bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [4.0, 0.3, 0.01, 1e-4, 0.0])
@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_a_gaussian_s_shares_of_all_bytes_sum_to_one(code: int, error: float) -> None:
    """Of a pixel, whatever was decoded: the ends of the scale take what lies beyond them."""
    codec = with_error(Grey(factor=1), error)
    image = BYTES.view(256, 1, 1, 1).expand(-1, 3, 1, 1)
    nats = codec.nats(image, torch.full((256, 1, 1), code))
    assert nats.shape == (256,) and nats.dtype == torch.float32
    each = (-nats.double() / 3).exp()  # three channels that are alike
    assert each.sum().item() == pytest.approx(1, abs=1e-4)
    nearest = BYTES[each.argmax()].item()
    assert error > 0.1 or abs(nearest - (code / 2 - 1)) <= 1.01 / 255


@pytest.mark.parametrize("error", [1.0, 0.02, 1e-3])
def test_nats_are_those_of_a_gaussian_by_loops(error: float) -> None:
    """Summed over pixels and channels, each row by itself; near the decoded pixel and at the ends
    of the scale."""
    codec, deviation = with_error(Grey(), error), error**0.5
    ids = torch.tensor([[[0, 1], [2, 4]], [[3, 3], [4, 0]]])
    shift = torch.randn(2, 3, 4, 4) * deviation
    pixels = ((codec.decode(ids) + shift + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels[0, :, 0, 0] = torch.tensor([0, 1, 255])
    found = codec.nats(to_unit(pixels), ids)
    decoded = codec.decode(ids)
    for row in range(2):
        pairs = zip(pixels[row].flatten().tolist(), decoded[row].flatten().tolist(), strict=True)
        naive = -sum(math.log(max(1e-30, share_of(*pair, deviation))) for pair in pairs)
        assert found[row].item() == pytest.approx(naive, rel=1e-3)


@pytest.mark.parametrize("deviations", [3, 6, 7, 8, 9, 10, 11])
@pytest.mark.parametrize("code", [0, 4])
def test_what_is_far_from_the_decoded_pixel_has_its_own_share(code: int, deviations: int) -> None:
    """Small shares are not lost beside 1, on neither side of the mean: a pixel nine deviations off
    costs 43 nats."""
    byte = 200 if code == 0 else 55
    deviation = abs(BYTES[byte].item() - (code / 2 - 1)) / deviations
    codec = with_error(Grey(factor=1), deviation**2)
    image = BYTES[byte].expand(1, 3, 1, 1)
    found = codec.nats(image, torch.tensor([[[code]]])).item() / 3
    assert found == pytest.approx(-math.log(share_of(byte, code / 2 - 1, deviation)), rel=1e-3)


def test_a_row_costs_the_same_beside_any_other() -> None:
    codec, image = with_error(Grey(), 0.05), to_unit(torch.randint(0, 256, (5, 3, 6, 6)).byte())
    ids = codec.encode(image)
    alone = torch.cat([codec.nats(image[k : k + 1], ids[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(codec.nats(image, ids), alone)


def test_the_best_variance_is_that_of_the_error() -> None:
    """Bits are fewest where the deviation is what the decoded pixels really lack."""
    image = to_unit(torch.randint(90, 166, (8, 3, 8, 8)).byte())
    codec = Grey()
    ids = torch.full((8, 4, 4), 2)
    error = (codec.decode(ids) - image).square().mean().item()
    costs = [
        with_error(codec, error * factor).nats(image, ids).sum().item() for factor in (0.5, 1, 2)
    ]
    assert costs[1] == min(costs)


def test_intervals_by_hand() -> None:
    """ln(cdf(b) - cdf(a)), summed over all but the rows; the open ends are infinite."""
    below = torch.tensor([[-1.0, -math.inf, 0.5], [2.0, -0.1, -math.inf]])
    above = torch.tensor([[0.3, -2.0, math.inf], [2.5, 0.1, math.inf]])
    found = interval(normal_cdf, below, above)
    for row in range(2):
        pairs = zip(below[row].tolist(), above[row].tolist(), strict=True)
        naive = sum(math.log(left_of(b) - left_of(a)) for a, b in pairs)
        assert found[row].item() == pytest.approx(naive, rel=1e-5)
    arranged = interval(normal_cdf, below.view(2, 3, 1, 1), above.view(2, 3, 1, 1))
    assert torch.equal(arranged, found) and found.shape == (2,)


def test_intervals_are_as_long_on_either_side() -> None:
    """A symmetric distribution has no preferred side, near or far."""
    below = torch.linspace(-9, 9, 37)[:, None]
    above = below + 0.25
    torch.testing.assert_close(
        interval(normal_cdf, below, above), interval(normal_cdf, -above, -below)
    )


def test_an_interval_of_nothing_is_finite() -> None:
    """Neither a pixel far out of reach nor an empty interval makes a picture impossible."""
    edges = torch.tensor([[500.0], [-500.0], [0.2]])
    found = interval(normal_cdf, edges, edges + torch.tensor([[1.0], [1.0], [0.0]]))
    assert found.isfinite().all() and (found < -60).all()


# --- the error that training leaves -----------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"), [(4.0, 0.0), (0.04, 20.0), (4e-6, 60.0), (1.0, 6.0206)]
)
def test_psnr_by_hand(error: float, expected: float) -> None:
    """Of pixels that go from -1 to 1: 10 log10(2^2 / error)."""
    assert psnr(torch.tensor(error)).item() == pytest.approx(expected, abs=1e-3)


def test_psnr_is_that_of_bytes() -> None:
    """10 log10(255^2 / error), as everyone else counts it; and of rows apart."""
    one, other = (torch.randint(0, 256, (3, 3, 4, 4)).byte() for _ in range(2))
    of_bytes = (one.float() - other.float()).square().flatten(1).mean(1)
    found = psnr((to_unit(one) - to_unit(other)).square().flatten(1).mean(1))
    torch.testing.assert_close(found, 10 * (255**2 / of_bytes).log10())
    assert psnr(torch.tensor([0.0, 1.0])).isfinite().all()


def test_a_note_is_of_the_picture_as_it_will_be_shown() -> None:
    """Clamped to what a pixel may be; in half precision too; and no gradient flows from it."""
    codec, image = Grey(), torch.rand(2, 3, 4, 4) * 2 - 1
    decoded = (image + torch.randn_like(image)).requires_grad_()
    error = (decoded.detach().clamp(-1, 1) - image).square().mean()
    before = codec.error.clone()
    noted = codec.note(image, decoded)
    assert set(noted) == {"psnr"} and not noted["psnr"].requires_grad
    torch.testing.assert_close(noted["psnr"], psnr(error))
    assert not codec.error.requires_grad
    assert min(before, error) <= codec.error <= max(before, error)
    half = Grey().note(image, decoded.to(torch.bfloat16))["psnr"]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(noted["psnr"].item(), abs=0.1)


def test_the_error_is_followed_and_kept() -> None:
    """It forgets where it started, and is part of what is saved."""
    codec, image = Grey(), torch.zeros(1, 3, 2, 2)
    for _ in range(1500):
        codec.note(image, image + 0.1)
    assert codec.error.item() == pytest.approx(0.01, rel=1e-3)
    for _ in range(1500):
        codec.note(image, image + 0.2)
    assert codec.error.item() == pytest.approx(0.04, rel=1e-3)
    other = Grey()
    other.load_state_dict(codec.state_dict())
    assert torch.equal(other.error, codec.error)


@pytest.mark.parametrize("steps", [1, 10, 300])
def test_the_variance_is_the_one_that_training_left(steps: int) -> None:
    """However short it was: what the average starts from is no part of it. After 300 steps, which
    is a short run's all, 1 would still weigh five times as much as an error of 20 dB or more."""
    codec, image = Grey(), torch.zeros(1, 3, 2, 2)
    for _ in range(steps):
        codec.note(image, image + 0.1)
    assert codec.error.item() == pytest.approx(0.01, rel=0.1)


# --- the memory of codes ----------------------------------------------------------------------

SIDE = 8


def batch_of(names: list[str]) -> Batch:
    """Pictures that their names decide, as in a data set."""
    rows = []
    for name in names:
        stream = torch.Generator().manual_seed(sum(map(ord, name)))
        shade = torch.rand(1, SIDE // 2, SIDE // 2, generator=stream)
        shade = shade.repeat_interleave(2, 1).repeat_interleave(2, 2)
        rows.append((shade * 255).to(torch.uint8).expand(3, -1, -1))
    return Batch(to_unit(torch.stack(rows)), [""] * len(names), None, names)


def look_at(codes: Codes, *batches: Batch) -> Codes:
    for batch in batches:
        codes.train()
        turns = codes.losses(
            batch, codes.text.encode(batch.caption), NoiseStreams(range(len(batch)))
        )
        assert list(turns) == []  # there is nothing to minimise
    return codes


def made(kept: int = 6, **codec: int) -> Codes:
    return Codes(Grey(**codec), SIDE, kept)


def asked(codes: Codes) -> Callable[[Batch], tuple[Tensor, int]]:
    """What a batch's codes are, and how often the codec had to be asked for them."""

    def ask(batch: Batch) -> tuple[Tensor, int]:
        codec = codes.codec
        assert isinstance(codec, Grey)
        before = codec.calls
        found = codes.of(batch)
        return found, codec.calls - before

    return ask


@pytest.mark.parametrize("codes_of", [2, 5, 300])
def test_codes_from_memory_are_those_of_the_encoder(codes_of: int) -> None:
    """In any order and any part of them, and the encoder is not asked again."""
    codes = look_at(made(codes=codes_of), batch_of(["a", "b", "c", "d"]))
    ask = asked(codes)
    for names in (["a", "b", "c", "d"], ["d", "b"], ["c"], ["c", "c", "a"]):
        batch = batch_of(names)
        found, calls = ask(batch)
        assert calls == 0 and found.dtype == torch.int64
        assert torch.equal(found, codes.codec.encode(batch.image))
        assert found.shape == (len(names), 4, 4)
    assert len(codes.of(batch_of(["a", "b"])).unique()) > 1


def test_the_memory_does_not_look_at_the_picture() -> None:
    """It goes by names alone."""
    batch = batch_of(["a", "b"])
    codes = look_at(made(), batch)
    other = Batch(-batch.image, batch.caption, None, batch.id)
    assert torch.equal(codes.of(other), codes.codec.encode(batch.image))


@pytest.mark.parametrize("names", [["a", "x"], ["x", "a"], ["x", "y"]], ids=str)
def test_a_batch_that_is_partly_known_is_encoded(names: list[str]) -> None:
    codes = look_at(made(), batch_of(["a", "b"]))
    batch = batch_of(names)
    found, calls = asked(codes)(batch)
    assert calls == 1 and torch.equal(found, codes.codec.encode(batch.image))
    assert int(codes.memory.count) == 2  # asking does not keep


@pytest.mark.parametrize("kept", [1, 3, 4, 9])
def test_the_first_pictures_are_kept_up_to_the_limit(kept: int) -> None:
    """Within a batch and over several."""
    names = [["a", "b"], ["c", "d", "e"], ["f"]]
    codes = look_at(made(kept), *map(batch_of, names))
    flat = [name for batch in names for name in batch]
    assert int(codes.memory.count) == min(kept, len(flat))
    ask = asked(codes)
    assert [ask(batch_of([name]))[1] for name in flat] == [int(k >= kept) for k in range(6)]


def test_a_picture_seen_again_is_kept_once_and_counted_twice() -> None:
    codes = look_at(made(), batch_of(["a", "a", "b"]), batch_of(["b", "a"]))
    assert int(codes.memory.count) == 2
    assert codes.memory.names[:2].unique().numel() == 2 and not codes.memory.names[2:].any()
    assert codes.uses.sum().item() == 5 * 16


def test_names_are_told_apart() -> None:
    """63 bits of each; thousands of them do not meet."""
    names = [str(k) for k in range(3000)]
    codes = Codes(Grey(factor=1), 1, 3000)
    image = torch.zeros(3000, 3, 1, 1)
    look_at(codes, Batch(image, [""] * 3000, None, names))
    assert int(codes.memory.count) == 3000 and len(codes.memory.names.unique()) == 3000
    assert (codes.memory.names >= 0).all()


def test_large_numbers_of_codes_are_kept() -> None:
    """A codebook has as many codes as its configuration says; none may come back as another."""
    codes = Codes(Grey(codes=70_000, factor=4), SIDE, 4)
    image = torch.tensor([-1.0, 0.1, 1.0]).view(3, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    batch = Batch(image, [""] * 3, None, ["a", "b", "c"])
    look_at(codes, batch)
    expected = codes.codec.encode(batch.image)
    assert expected.max() == 69_999
    assert torch.equal(codes.of(batch), expected)


def test_what_is_kept_is_in_the_state() -> None:
    """Another process finds the same codes by the same names, without the encoder."""
    one = look_at(made(), batch_of(["a", "b", "c"]))
    two = made()
    two.load_state_dict(one.state_dict())
    found, calls = asked(two)(batch_of(["c", "a"]))
    assert calls == 0 and torch.equal(found, one.of(batch_of(["c", "a"])))
    assert torch.equal(two.uses, one.uses)


def test_a_state_that_is_loaded_replaces_what_was_known() -> None:
    """Rows of before must not be found under names whose rows were written over."""
    one = look_at(made(), batch_of(["a", "b"]))
    two = look_at(made(), batch_of(["x", "y", "z"]))
    two.load_state_dict(one.state_dict())
    batch = batch_of(["y"])
    found, calls = asked(two)(batch)
    assert calls == 1 and torch.equal(found, two.codec.encode(batch.image))


def test_the_loader_of_a_whole_finds_the_memory_of_its_part() -> None:
    """A module that holds it loads it too."""
    one = nn.ModuleDict({"codes": look_at(made(), batch_of(["a", "b"]))})
    codes = made()
    nn.ModuleDict({"codes": codes}).load_state_dict(one.state_dict())
    assert asked(codes)(batch_of(["b"]))[1] == 0


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resuming_keeps_what_an_unbroken_run_keeps(stop: int) -> None:
    batches = [batch_of(names) for names in (["a", "b"], ["c", "a"], ["d", "e"], ["f", "g", "h"])]
    whole = look_at(made(), *batches)
    first = look_at(made(), *batches[:stop])
    second = made()
    second.load_state_dict(first.state_dict())
    look_at(second, *batches[stop:])
    assert second.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert second.memory._rows == whole.memory._rows


# --- the audit --------------------------------------------------------------------------------


def test_facts_by_hand() -> None:
    """Of all pictures so far: codes, their shares; of this batch: the error."""
    grey = {"black": -1.0, "white": 1.0, "dark": -0.45}
    codes = made(codes=5)
    uses = [0] * 5
    for names in (["black", "white"], ["black", "dark"]):
        image = torch.stack([torch.full((3, SIDE, SIDE), grey[name]) for name in names])
        look_at(codes, Batch(image, [""] * 2, None, names))
        for name in names:
            uses[round((grey[name] + 1) * 2)] += 16
    facts = {name: value.item() for name, value in codes.facts.items()}
    assert codes.uses.tolist() == uses == [32, 16, 0, 0, 16]
    assert facts["usage"] == pytest.approx(3 / 5) and facts["dead"] == 2
    assert facts["perplexity"] == pytest.approx(2**1.5, rel=1e-5)
    assert facts["psnr"] == pytest.approx(10 * math.log10(4 / (0.05**2 / 2)), abs=1e-2)


def test_a_collapsed_codebook_is_remarked() -> None:
    """On codes and in the codec's own training; nothing is said of a healthy one."""
    codes = made(codes=5)
    look_at(codes, Batch(torch.ones(2, 3, SIDE, SIDE), [""] * 2, None, ["a", "b"]))
    told = {name: value.item() for name, value in codes.facts.items()}
    assert told["dead"] == 4 and told["perplexity"] == pytest.approx(1)
    for one in (codes, codes.codec):
        assert one.remark(told) == "codebook collapse: only 20% of the codes are in use"
        assert one.remark({"usage": 0.7}) == one.remark({}) == ""


def test_nothing_is_trained() -> None:
    """The codec is frozen and stays in evaluation mode, whatever is trained around it."""
    codes = made().train()
    assert codes.groups() == {} and not codes.codec.training and codes.training
    assert not any(parameter.requires_grad for parameter in codes.parameters())
    before = {name: tensor.clone() for name, tensor in codes.codec.state_dict().items()}
    look_at(codes, batch_of(["a", "b"]))
    for name, tensor in codes.codec.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_loop_fills_the_memory(shapes: CaptionedDataset) -> None:
    """A stage of as many pictures as are kept; a later one of other batches finds them all, and
    one of captions anew."""
    codes = Codes(Grey(), 16, 24)
    optim = OptimConfig(average=0.0)
    train = TrainConfig(pictures=24, batch=10, precision="fp32", prefetch=0)
    trainer = Trainer(codes, shapes, optim, train, stage="codes")
    trainer.run()
    assert trainer.step == 3 and int(codes.memory.count) == 24
    trainer.system.load_state_dict({n: t.clone() for n, t in codes.state_dict().items()})
    later = Trainer(
        Codes(Grey(), 16, 1), shapes, optim, TrainConfig(batch=4, prefetch=0), stage="prior"
    )
    ask = asked(codes)
    for number in range(6):
        batch = later.loader.at(number)
        found, calls = ask(batch)
        assert calls == 0 and torch.equal(found, codes.codec.encode(batch.image))
    again = shapes.batch(range(4), [3] * 4, 0)
    assert asked(codes)(again)[1] == 0
    assert torch.equal(codes.of(again), codes.codec.encode(again.image))
    assert ask(later.loader.at(7))[1] == 1
