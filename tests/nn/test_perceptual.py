"""LPIPS: VGG16 as torchvision lays it out, the distance by loops, and files that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.errors import UserError
from lineage.nn.perceptual import LPIPS, VGG16, load_lpips

PUBLISHED = {  # names and shapes of the kernels in torchvision's vgg16-397923af.pth
    "features.0.weight": (64, 3, 3, 3),
    "features.2.weight": (64, 64, 3, 3),
    "features.5.weight": (128, 64, 3, 3),
    "features.7.weight": (128, 128, 3, 3),
    "features.10.weight": (256, 128, 3, 3),
    "features.12.weight": (256, 256, 3, 3),
    "features.14.weight": (256, 256, 3, 3),
    "features.17.weight": (512, 256, 3, 3),
    "features.19.weight": (512, 512, 3, 3),
    "features.21.weight": (512, 512, 3, 3),
    "features.24.weight": (512, 512, 3, 3),
    "features.26.weight": (512, 512, 3, 3),
    "features.28.weight": (512, 512, 3, 3),
}
POOLED_BEFORE = {5, 10, 17, 24}
LOOKED_AT_AFTER = {2, 7, 14, 21, 28}  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
WIDTHS = (64, 128, 256, 512, 512)

State = dict[str, Tensor]


def kernels(seed: int = 0) -> State:
    """Random weights under the published names, of a scale that keeps the signal alive."""
    stream = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in PUBLISHED.items():
        fan = shape[1] * 9
        state[name] = torch.randn(shape, generator=stream) * (2 / fan) ** 0.5
        state[name.replace("weight", "bias")] = 0.1 * torch.randn(shape[0], generator=stream)
    return state


def channels(seed: int = 1) -> State:
    """Weights of the channels under the names of LPIPS."""
    stream = torch.Generator().manual_seed(seed)
    return {
        f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1, generator=stream)
        for k, width in enumerate(WIDTHS)
    }


@pytest.fixture(scope="module")
def vgg() -> State:
    return kernels()


@pytest.fixture(scope="module")
def folder(vgg: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files; VGG16's with the classifier that torchvision's has."""
    folder = tmp_path_factory.mktemp("networks")
    torch.save({**vgg, "classifier.6.bias": torch.zeros(1000)}, folder / "vgg16.pth")
    torch.save(channels(), folder / "vgg.pth")
    return folder


@pytest.fixture(scope="module")
def judge(folder: Path) -> LPIPS:
    return load_lpips((str(folder / "vgg16.pth"), str(folder / "vgg.pth")))


def images(count: int = 3, side: int = 16, seed: int = 2) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def looks(image: Tensor, state: State) -> Iterator[Tensor]:
    """What VGG16 of `state` sees of a normalised picture, layer by layer."""
    for name in PUBLISHED:
        number = int(name.split(".")[1])
        if number in POOLED_BEFORE:
            image = F.max_pool2d(image, 2)
        bias = state[name.replace("weight", "bias")]
        image = F.conv2d(image, state[name], bias, padding=1).clamp(min=0)
        if number in LOOKED_AT_AFTER:
            yield image


# --- VGG16 ------------------------------------------------------------------------------------


def test_the_network_has_the_published_names_and_shapes() -> None:
    """In the published order, and nothing else; 14,714,688 parameters without the classifier."""
    with torch.device("meta"):
        state = VGG16().state_dict()
    expected = {}
    for name, shape in PUBLISHED.items():
        expected |= {name: shape, name.replace("weight", "bias"): (shape[0],)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert list(state) == list(expected)
    assert sum(tensor.numel() for tensor in state.values()) == 14_714_688


@torch.no_grad()
def test_it_sees_what_the_layers_by_hand_see(vgg: State) -> None:
    """Five looks, behind the last activation of each side, before it is halved."""
    network = VGG16()
    network.load_state_dict(vgg)
    image = images(2, 20)
    kept = image.clone()
    found, expected = network(image), list(looks(image, vgg))
    assert [tuple(seen.shape[1:]) for seen in found] == [
        (64, 20, 20),
        (128, 10, 10),
        (256, 5, 5),
        (512, 2, 2),
        (512, 1, 1),
    ]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours.min() == 0 and ours.max() > 0.01
    assert torch.equal(image, kept)


# --- the distance -----------------------------------------------------------------------------


def naive(one: Tensor, other: Tensor, state: State, weights: list[Tensor]) -> float:
    """Equation 1 of two pictures (3, S, S), a place at a time in double precision."""
    mean = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    deviation = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    pair = [list(looks(((x - mean) / deviation)[None], state)) for x in (one, other)]
    total = 0.0
    for a, b, weight in zip(*pair, weights, strict=True):
        height, width = a.shape[2:]
        for y in range(height):
            for x in range(width):
                p, q = a[0, :, y, x].double(), b[0, :, y, x].double()
                gap = p / (p.norm() + 1e-10) - q / (q.norm() + 1e-10)
                total += float((weight.double() * gap.square()).sum()) / (height * width)
    return total


@torch.no_grad()
def test_the_distance_by_loops(judge: LPIPS, vgg: State) -> None:
    """Each row by itself."""
    one, other = images(2), images(2, seed=4)
    given = [weight.flatten() for weight in channels().values()]
    found = judge(one, other)
    assert found.shape == (2,) and found.dtype == torch.float32
    for k in range(2):
        assert found[k].item() == pytest.approx(naive(one[k], other[k], vgg, given), rel=1e-4)


@torch.no_grad()
def test_without_weights_all_channels_of_a_layer_weigh_the_same(folder: Path, vgg: State) -> None:
    """Divided by their number."""
    plain = load_lpips((str(folder / "vgg16.pth"),))
    one, other = images(1), images(1, seed=4)
    even = [torch.full((width,), 1 / width) for width in WIDTHS]
    assert plain(one, other).item() == pytest.approx(naive(one[0], other[0], vgg, even), rel=1e-4)


@torch.no_grad()
def test_a_distance(judge: LPIPS) -> None:
    """Nothing from a picture to itself, the same there and back, more for more noise; and a row
    does not depend on its neighbours."""
    one, noise = images(4), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    near, far = one + 0.02 * noise, one + 0.5 * noise
    assert not judge(one, one).any()
    torch.testing.assert_close(judge(one, far), judge(far, one))
    assert (judge(one, near) < judge(one, far)).all() and (judge(one, near) > 0).all()
    alone = torch.cat([judge(one[k : k + 1], far[k : k + 1]) for k in range(4)])
    torch.testing.assert_close(judge(one, far), alone, rtol=1e-4, atol=1e-6)


def test_the_gradient_flows_to_both_pictures_and_no_weight(judge: LPIPS) -> None:
    one, other = images(2).requires_grad_(), images(2, seed=4).requires_grad_()
    judge.train()(one, other).sum().backward()
    for image in (one, other):
        assert image.grad is not None and image.grad.isfinite().all()
        assert image.grad.flatten(1).any(1).all()
    assert not any(p.requires_grad for p in judge.parameters())
    assert all(p.grad is None for p in judge.parameters())


def test_where_no_channel_answers_the_gradient_is_finite(folder: Path) -> None:
    """A vector of nothing has no direction, and its length no slope: the distance is that of the
    other's, and nothing becomes infinite."""
    quiet = load_lpips((str(folder / "vgg16.pth"),))
    with torch.no_grad():
        quiet.vgg.features[0].bias.fill_(-0.3)
        for number in (2, 7, 14):
            quiet.vgg.features[number].bias.fill_(-1.0)
    one = images(2, 32)
    one[:, :, :16] = 0.0
    seen = quiet.vgg(one)
    assert all((layer.sum(1) == 0).any() for layer in seen[:3]) and seen[0].any()
    one.requires_grad_()
    distance = quiet(one, images(2, 32, seed=4))
    distance.sum().backward()
    assert distance.isfinite().all() and one.grad is not None and one.grad.isfinite().all()


def test_half_precision_around_the_distance(judge: LPIPS) -> None:
    """Only what VGG16 sees is rounded; lengths, differences and sums are single precision."""
    one, other = images(2), images(2, seed=4)
    exact = judge(one, other)
    expected = torch.zeros(2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = judge(one, other)
        pair = [judge.vgg((image - judge.mean) / judge.deviation) for image in (one, other)]
    for a, b, weight in zip(*pair, judge.weights, strict=True):
        assert a.dtype == torch.bfloat16
        gap = F.normalize(a.double(), dim=1) - F.normalize(b.double(), dim=1)
        expected += (gap.square() * weight[:, None, None]).sum(1).mean((1, 2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)


def test_pixels_are_normalised_as_lpips_has_them(judge: LPIPS) -> None:
    """Its own numbers, of pixels from -1 to 1."""
    assert judge.mean.flatten().tolist() == pytest.approx([-0.030, -0.088, -0.188])
    assert judge.deviation.flatten().tolist() == pytest.approx([0.458, 0.448, 0.450])


# --- files ------------------------------------------------------------------------------------


def told(*files: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_lpips(tuple(map(str, files)))
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400 and sentence.endswith(".")
    return sentence


def test_the_files_are_read(judge: LPIPS, vgg: State) -> None:
    """The classifier is left aside."""
    for name, tensor in judge.vgg.state_dict().items():
        assert torch.equal(tensor, vgg[name])
    for weight, given in zip(judge.weights, channels().values(), strict=True):
        assert torch.equal(weight, given.flatten())


def test_a_missing_file_is_named(folder: Path) -> None:
    assert "nowhere.pth" in told(folder / "nowhere.pth")
    assert "nowhere.pth" in told(folder / "vgg16.pth", folder / "nowhere.pth")


def test_three_files_are_too_many(folder: Path) -> None:
    assert "VGG16" in told(*[folder / "vgg16.pth"] * 3)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04]"], ids=str)
def test_what_is_no_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    path.write_bytes(content)
    assert "odd.pth" in told(path)


def test_a_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in told(tmp_path)


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    torch.save(channels(), tmp_path / "whole.pth")
    (tmp_path / "part.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-500])
    assert "part.pth" in told(tmp_path / "part.pth")


@pytest.mark.parametrize(
    "held",
    [
        [torch.zeros(3)],
        torch.zeros(3),
        {},
        {"state_dict": {"features.0.weight": torch.zeros(64, 3, 3, 3)}},
        {0: torch.zeros(3), 1: torch.zeros(4)},
        {"features.0.weight": torch.zeros(64, 3, 3, 3)},
        {"features.0.weight": 3.0},
    ],
    ids=["list", "tensor", "empty", "wrapped", "numbers", "part", "float"],
)
def test_what_is_not_vgg16_is_named(held: Any, tmp_path: Path) -> None:
    """Whatever else a checkpoint may hold."""
    torch.save(held, tmp_path / "other.pth")
    assert "other.pth" in told(tmp_path / "other.pth")


def test_vgg16_of_another_shape_is_named(vgg: State, tmp_path: Path) -> None:
    """With batch norms, or with one channel less somewhere."""
    wrong: State = {**vgg, "features.28.weight": torch.zeros(512, 511, 3, 3)}
    torch.save(wrong, tmp_path / "narrow.pth")
    assert "narrow.pth" in told(tmp_path / "narrow.pth")
    torch.save({**vgg, "features.1.running_mean": torch.zeros(64)}, tmp_path / "bn.pth")
    assert "bn.pth" in told(tmp_path / "bn.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"lin4.model.1.weight": None},
        {"lin0.model.1.weight": torch.ones(1, 63, 1, 1)},
        {"lin2.model.1.weight": [1.0] * 256},
        {"lin3.model.1.weight": 1.0},
    ],
    ids=["missing", "narrow", "list", "float"],
)
def test_weights_of_other_channels_are_named(
    change: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """AlexNet's, say, which have other widths, or a file that is no file of weights."""
    held = {n: t for n, t in {**channels(), **change}.items() if t is not None}
    torch.save(held, tmp_path / "alex.pth")
    assert "alex.pth" in told(folder / "vgg16.pth", tmp_path / "alex.pth")


def test_files_in_the_wrong_order_are_told(folder: Path) -> None:
    assert "vgg.pth" in told(folder / "vgg.pth", folder / "vgg16.pth")
