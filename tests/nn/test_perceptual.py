"""LPIPS: the layers of torchvision's VGG16, the distance by loops, files that do not fit."""

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
FEATURE_CONVS = {2, 7, 14, 21, 28}  # before relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
WIDTHS = (64, 128, 256, 512, 512)

State = dict[str, Tensor]


def kernels(seed: int = 0) -> State:
    """Random weights under the published names, with variance 2 / fan-in."""
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
    """The two files; torchvision's VGG16 also has a classifier."""
    folder = tmp_path_factory.mktemp("networks")
    torch.save({**vgg, "classifier.6.bias": torch.zeros(1000)}, folder / "vgg16.pth")
    torch.save(channels(), folder / "vgg.pth")
    return folder


@pytest.fixture(scope="module")
def lpips(folder: Path) -> LPIPS:
    return load_lpips((str(folder / "vgg16.pth"), str(folder / "vgg.pth")))


def images(count: int = 3, side: int = 16, seed: int = 2) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def naive_features(image: Tensor, state: State) -> Iterator[Tensor]:
    """Feature maps of a normalised picture under VGG16 with the weights `state`."""
    for name in PUBLISHED:
        number = int(name.split(".")[1])
        if number in POOLED_BEFORE:
            image = F.max_pool2d(image, 2)
        bias = state[name.replace("weight", "bias")]
        image = F.conv2d(image, state[name], bias, padding=1).clamp(min=0)
        if number in FEATURE_CONVS:
            yield image


# --- VGG16 ------------------------------------------------------------------------------------


def test_vgg16_has_the_published_names_and_shapes() -> None:
    """In the published order; 14,714,688 parameters without the classifier."""
    with torch.device("meta"):
        state = VGG16().state_dict()
    expected = {}
    for name, shape in PUBLISHED.items():
        expected |= {name: shape, name.replace("weight", "bias"): (shape[0],)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert list(state) == list(expected)
    assert sum(tensor.numel() for tensor in state.values()) == 14_714_688


@torch.no_grad()
def test_feature_maps_by_hand(vgg: State) -> None:
    """Five, each after the last activation of its resolution and before the pooling."""
    network = VGG16()
    network.load_state_dict(vgg)
    image = images(2, 20)
    before = image.clone()
    features, expected = network(image), list(naive_features(image, vgg))
    assert [tuple(x.shape[1:]) for x in features] == [
        (64, 20, 20),
        (128, 10, 10),
        (256, 5, 5),
        (512, 2, 2),
        (512, 1, 1),
    ]
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours.min() == 0 and ours.max() > 0.01
    assert torch.equal(image, before)


# --- the distance -----------------------------------------------------------------------------


def naive(image: Tensor, other: Tensor, state: State, weights: list[Tensor]) -> float:
    """Equation 1 of two pictures (3, S, S), one position at a time in double precision."""
    mean = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    std = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    pair = [list(naive_features(((x - mean) / std)[None], state)) for x in (image, other)]
    total = 0.0
    for a, b, weight in zip(*pair, weights, strict=True):
        height, width = a.shape[2:]
        for y in range(height):
            for x in range(width):
                p, q = a[0, :, y, x].double(), b[0, :, y, x].double()
                difference = p / (p.norm() + 1e-10) - q / (q.norm() + 1e-10)
                total += float((weight.double() * difference.square()).sum()) / (height * width)
    return total


@torch.no_grad()
def test_distance_by_loops(lpips: LPIPS, vgg: State) -> None:
    image, other = images(2), images(2, seed=4)
    weights = [weight.flatten() for weight in channels().values()]
    distance = lpips(image, other)
    assert distance.shape == (2,) and distance.dtype == torch.float32
    for k in range(2):
        expected = naive(image[k], other[k], vgg, weights)
        assert distance[k].item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_without_a_second_file_each_channel_has_weight_1_over_their_number(
    folder: Path, vgg: State
) -> None:
    lpips = load_lpips((str(folder / "vgg16.pth"),))
    image, other = images(1), images(1, seed=4)
    expected = naive(image[0], other[0], vgg, [torch.full((w,), 1 / w) for w in WIDTHS])
    assert lpips(image, other).item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_properties_of_a_distance(lpips: LPIPS) -> None:
    """Zero to itself, symmetric, larger for more noise, independent of the other rows."""
    image, noise = images(4), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    near, far = image + 0.02 * noise, image + 0.5 * noise
    assert not lpips(image, image).any()
    torch.testing.assert_close(lpips(image, far), lpips(far, image))
    assert (lpips(image, near) < lpips(image, far)).all() and (lpips(image, near) > 0).all()
    alone = torch.cat([lpips(image[k : k + 1], far[k : k + 1]) for k in range(4)])
    torch.testing.assert_close(lpips(image, far), alone, rtol=1e-4, atol=1e-6)


def test_both_pictures_have_a_gradient(lpips: LPIPS) -> None:
    image, other = images(2).requires_grad_(), images(2, seed=4).requires_grad_()
    lpips.train()(image, other).sum().backward()
    for x in (image, other):
        assert x.grad is not None and x.grad.isfinite().all()
        assert x.grad.flatten(1).any(1).all()


def test_all_tensors_move_with_the_module_and_none_is_saved(folder: Path) -> None:
    """They are buffers: no parameters, no entries of a state dict, and `.to` reaches all."""
    lpips = load_lpips((str(folder / "vgg16.pth"), str(folder / "vgg.pth")))
    assert not list(lpips.parameters()) and not lpips.state_dict()
    buffers = dict(lpips.named_buffers())
    assert len(buffers) == 2 * len(PUBLISHED) + len(WIDTHS) + 2
    assert not any(buffer.requires_grad for buffer in buffers.values())
    lpips.to("meta")
    assert all(buffer.is_meta for buffer in lpips.buffers())
    assert all(weight.is_meta for weight in lpips.channel_weights)


def test_gradient_is_finite_where_all_channels_are_zero(folder: Path) -> None:
    """A zero vector has no direction, and its length has no gradient."""
    lpips = load_lpips((str(folder / "vgg16.pth"),))
    lpips.vgg.features[0].bias.fill_(-0.3)
    for number in (2, 7, 14):
        lpips.vgg.features[number].bias.fill_(-1.0)
    image = images(2, 32)
    image[:, :, :16] = 0.0
    features = lpips.vgg(image)
    assert all((x.sum(1) == 0).any() for x in features[:3]) and features[0].any()
    image.requires_grad_()
    distance = lpips(image, images(2, 32, seed=4))
    distance.sum().backward()
    assert distance.isfinite().all() and image.grad is not None and image.grad.isfinite().all()


def test_autocast_rounds_the_features_alone(lpips: LPIPS) -> None:
    """Lengths, differences and sums are computed in float32."""
    image, other = images(2), images(2, seed=4)
    exact = lpips(image, other)
    expected = torch.zeros(2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = lpips(image, other)
        pair = [lpips.vgg((x - lpips.mean) / lpips.std) for x in (image, other)]
    for a, b, weight in zip(*pair, lpips.channel_weights, strict=True):
        assert a.dtype == torch.bfloat16
        difference = F.normalize(a.double(), dim=1) - F.normalize(b.double(), dim=1)
        expected += (difference.square() * weight[:, None, None]).sum(1).mean((1, 2))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)


def test_pixels_are_normalised_with_the_authors_numbers(lpips: LPIPS) -> None:
    assert lpips.mean.flatten().tolist() == pytest.approx([-0.030, -0.088, -0.188])
    assert lpips.std.flatten().tolist() == pytest.approx([0.458, 0.448, 0.450])


# --- files ------------------------------------------------------------------------------------


def error_of(*files: Path | str) -> str:
    """The sentence with which files are refused."""
    with pytest.raises(UserError) as caught:
        load_lpips(tuple(map(str, files)))
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400 and sentence.endswith(".")
    return sentence


def test_files_are_read_without_the_classifier(lpips: LPIPS, vgg: State) -> None:
    buffers = dict(lpips.vgg.named_buffers())
    assert buffers.keys() == vgg.keys()
    assert all(torch.equal(buffer, vgg[name]) for name, buffer in buffers.items())
    for weight, saved in zip(lpips.channel_weights, channels().values(), strict=True):
        assert torch.equal(weight, saved.flatten())


def test_a_missing_file_is_named(folder: Path) -> None:
    assert "nowhere.pth" in error_of(folder / "nowhere.pth")
    assert "nowhere.pth" in error_of(folder / "vgg16.pth", folder / "nowhere.pth")


def test_three_files_are_too_many(folder: Path) -> None:
    assert "VGG16" in error_of(*[folder / "vgg16.pth"] * 3)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04]"], ids=str)
def test_a_file_that_is_no_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    path.write_bytes(content)
    assert "odd.pth" in error_of(path)


def test_a_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in error_of(tmp_path)


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    torch.save(channels(), tmp_path / "whole.pth")
    (tmp_path / "part.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-500])
    assert "part.pth" in error_of(tmp_path / "part.pth")


@pytest.mark.parametrize(
    "saved",
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
def test_a_checkpoint_of_another_kind_is_named(saved: Any, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "other.pth")
    assert "other.pth" in error_of(tmp_path / "other.pth")


def test_vgg16_of_another_shape_is_named(vgg: State, tmp_path: Path) -> None:
    """With batch norms, or with one channel fewer."""
    wrong: State = {**vgg, "features.28.weight": torch.zeros(512, 511, 3, 3)}
    torch.save(wrong, tmp_path / "narrow.pth")
    assert "narrow.pth" in error_of(tmp_path / "narrow.pth")
    torch.save({**vgg, "features.1.running_mean": torch.zeros(64)}, tmp_path / "bn.pth")
    assert "bn.pth" in error_of(tmp_path / "bn.pth")


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
def test_channel_weights_of_another_network_are_named(
    change: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """AlexNet's, for example, which have other widths."""
    saved = {n: t for n, t in {**channels(), **change}.items() if t is not None}
    torch.save(saved, tmp_path / "alex.pth")
    assert "alex.pth" in error_of(folder / "vgg16.pth", tmp_path / "alex.pth")


def test_files_in_the_wrong_order_are_refused(folder: Path) -> None:
    assert "vgg.pth" in error_of(folder / "vgg.pth", folder / "vgg16.pth")
