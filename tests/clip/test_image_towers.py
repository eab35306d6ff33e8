"""Image towers of CLIP: a naive computation, places, sizes, and published numbers of parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.clip.image_towers import (
    AttentionPool,
    Bottleneck,
    ModifiedResNet,
    ResNetConfig,
    VisionTransformer,
    ViTConfig,
    conv_stem,
)
from lineage.errors import UserError

VIT = ViTConfig(patch_size=4, width=12, num_layers=2, num_heads=2)
RESNET = ResNetConfig(width=4, num_blocks=(1, 2, 1, 1), num_heads=8)
P = 6


def grown(module: nn.Module) -> Any:
    """In double precision, with weights and statistics of a trained network's size."""
    with torch.no_grad():
        for parameter in module.parameters():
            kernel = parameter.dim() > 1
            fan_in = parameter[0].numel() if parameter.dim() > 2 else parameter.shape[-1]
            scale = fan_in**-0.5 if kernel else 0.2
            parameter.copy_(scale * torch.randn_like(parameter) + (not kernel))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return module.double().eval()


def vit(**sizes: Any) -> VisionTransformer:
    config = ViTConfig(**{**vars(VIT), **sizes})
    tower: VisionTransformer = grown(VisionTransformer(config, 8, P))
    return tower


# --- vision transformer ---------------------------------------------------------------------------


def normed(x: Tensor, norm: Any) -> Tensor:
    x = x - x.mean()
    return norm.weight * x / (x.square().mean() + 1e-5).sqrt() + norm.bias


def attended(attn: Any, tokens: list[Tensor]) -> list[Tensor]:
    """Multi-head attention of all tokens to all, a token and a head at a time."""
    query, key, value = ([f(t) for t in tokens] for f in (attn.to_q, attn.to_k, attn.to_v))
    d = len(query[0]) // attn.num_heads
    results = []
    for q in query:
        heads = []
        for head in range(attn.num_heads):
            part = slice(d * head, d * head + d)
            weights = torch.stack([q[part] @ k[part] / math.sqrt(d) for k in key]).softmax(0)
            heads.append(torch.stack([w * v[part] for w, v in zip(weights, value, strict=True)]))
        results.append(attn.to_out(torch.cat([head.sum(0) for head in heads])))
    return results


def perceptron(mlp: Any, x: Tensor) -> Tensor:
    inner = mlp[0](x)
    return mlp[2](inner / (1 + torch.exp(-1.702 * inner)))  # type: ignore[no-any-return]


def embedded(tower: Any, image: Tensor) -> list[Tensor]:
    """Class token and patches of one picture (3, 8, 8), in reading order."""
    tokens = [tower.class_emb]
    for row in range(2):
        for column in range(2):
            patch = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            tokens.append((tower.patch_emb.weight * patch).sum((1, 2, 3)))
    pairs = zip(tokens, tower.pos_emb, strict=True)
    return [normed(token + place, tower.norm_pre) for token, place in pairs]


def through(block: Any, x: list[Tensor]) -> list[Tensor]:
    out = attended(block.attn, [normed(t, block.norm1) for t in x])
    x = [t + o for t, o in zip(x, out, strict=True)]
    return [t + perceptron(block.mlp, normed(t, block.norm2)) for t in x]


@torch.no_grad()
def test_the_vit_equals_a_naive_computation() -> None:
    tower, images = vit(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    ours = tower(images)
    assert ours.shape == (2, P)
    for image, vector in zip(images, ours, strict=True):
        x = embedded(tower, image)
        for block in tower.blocks:
            x = through(block, x)
        torch.testing.assert_close(vector, normed(x[0], tower.norm_post) @ tower.proj)


@torch.no_grad()
def test_places_of_a_vit_leave_out_the_last_attention() -> None:
    """Each place keeps its own value there; what the last queries and keys are does not matter."""
    tower, image = vit(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    places = tower.places(image)
    assert places.shape == (1, P, 2, 2)
    first, last = tower.blocks
    x = through(first, embedded(tower, image[0]))[1:]
    for number, token in enumerate(x):
        attn: Any = last.attn
        token = token + attn.to_out(attn.to_v(normed(token, last.norm1)))
        token = token + perceptron(last.mlp, normed(token, last.norm2))
        expected = normed(token, tower.norm_post) @ tower.proj
        torch.testing.assert_close(places[0, :, number // 2, number % 2], expected)
    last.attn.to_q.weight.normal_()  # type: ignore[union-attr]
    assert torch.equal(tower.places(image), places)


@torch.no_grad()
def test_with_one_block_a_place_depends_on_its_own_patch() -> None:
    tower, image = vit(num_layers=1), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    other = image.clone()
    other[..., :4, 4:] = 0  # first row, second column
    changed = (tower.places(image) - tower.places(other)).abs().amax(1)[0] > 1e-9
    assert changed.tolist() == [[False, True], [False, False]]
    assert (tower(image) - tower(other)).abs().max() > 1e-3


def test_gradients_reach_every_parameter_of_a_vit() -> None:
    for stem in (False, True):
        tower = vit(conv_stem=stem, width=16)
        tower(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
        for name, parameter in tower.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


# --- the stem of convolutions ---------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_a_stem_of_convolutions_has_the_patches_shape(patch_size: int) -> None:
    """And channels that double; a convolution of 1 pixel ends it."""
    stem = conv_stem(patch_size, 16)
    assert stem(torch.randn(2, 3, 16, 16)).shape == (2, 16, 16 // patch_size, 16 // patch_size)
    convs = [layer for layer in stem if isinstance(layer, nn.Conv2d)]
    halvings = int(math.log2(patch_size))
    channels = [16 // 2**n for n in reversed(range(halvings))] + [16]
    assert [conv.out_channels for conv in convs] == channels
    assert [conv.kernel_size[0] for conv in convs] == halvings * [3] + [1]
    tower = VisionTransformer(ViTConfig(patch_size=patch_size, conv_stem=True, width=16,
                                        num_layers=1, num_heads=2), 16, P)  # fmt: skip
    assert tower(torch.randn(2, 3, 16, 16)).shape == (2, P)
    assert tower.places(torch.randn(1, 3, 16, 16)).shape == (1, P, *2 * (16 // patch_size,))


@pytest.mark.parametrize(("patch_size", "width"), [(1, 16), (6, 16), (3, 16), (8, 12), (0, 16)])
def test_a_stem_that_cannot_be_is_refused(patch_size: int, width: int) -> None:
    with pytest.raises(UserError, match=f"patches of {patch_size} and a width of {width}"):
        conv_stem(patch_size, width)


# --- ResNet ---------------------------------------------------------------------------------------


def bn(x: Tensor, norm: Any) -> Tensor:
    mean, var, weight, bias = (
        t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def blocks_of_two(x: Tensor) -> Tensor:
    """Means of 2 x 2 pixels."""
    return (
        x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
    ) / 4  # fmt: skip


def bottleneck(block: Any, x: Tensor, halves: bool) -> Tensor:
    y = bn(F.conv2d(x, block.conv1.weight), block.bn1).relu()
    y = bn(F.conv2d(y, block.conv2.weight, padding=1), block.bn2).relu()
    y = blocks_of_two(y) if halves else y  # behind the convolution, not a stride of it
    y = bn(F.conv2d(y, block.conv3.weight), block.bn3)
    if not isinstance(block.shortcut, nn.Identity):
        x = blocks_of_two(x) if halves else x
        x = bn(F.conv2d(x, block.shortcut[1].weight), block.shortcut[2])
    return (y + x).relu()


def naive_features(tower: Any, images: Tensor) -> Tensor:
    s = tower.stem
    x = bn(F.conv2d(images, s[0].weight, stride=2, padding=1), s[1]).relu()
    x = bn(F.conv2d(x, s[3].weight, padding=1), s[4]).relu()
    x = blocks_of_two(bn(F.conv2d(x, s[6].weight, padding=1), s[7]).relu())
    for number, group in enumerate(tower.groups):
        for place, block in enumerate(group):
            x = bottleneck(block, x, halves=number > 0 and place == 0)
    return x


@torch.no_grad()
def test_the_resnet_equals_a_naive_computation() -> None:
    """And its places: values of each place alone, without the mean."""
    tower = grown(ModifiedResNet(RESNET, 64, P))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features, pool = naive_features(tower, images), tower.pool
    assert features.shape == (2, 128, 2, 2)
    ours, places = tower(images), tower.places(images)
    assert ours.shape == (2, P) and places.shape == (2, P, 2, 2)
    for row in range(2):
        points = [features[row, :, y, x] for y in range(2) for x in range(2)]
        tokens = [torch.stack(points).mean(0), *points]
        tokens = [token + place for token, place in zip(tokens, pool.pos_emb, strict=True)]
        torch.testing.assert_close(ours[row], attended(pool.attn, tokens)[0])
        for number, token in enumerate(tokens[1:]):
            value = pool.attn.to_out(pool.attn.to_v(token))
            torch.testing.assert_close(places[row, :, number // 2, number % 2], value)


def test_the_first_group_alone_keeps_the_side() -> None:
    assert isinstance(Bottleneck(8, 2, 1).shortcut, nn.Identity)
    assert not isinstance(Bottleneck(4, 2, 1).shortcut, nn.Identity)  # other channels
    assert not isinstance(Bottleneck(8, 2, 2).shortcut, nn.Identity)  # another side
    tower = ModifiedResNet(RESNET, 64, P)
    assert [len(group) for group in tower.groups] == [1, 2, 1, 1]
    assert tower.stem(torch.randn(1, 3, 64, 64)).shape == (1, 4, 16, 16)
    assert tower.groups[0](torch.randn(1, 4, 16, 16)).shape == (1, 16, 16, 16)


def test_gradients_reach_every_parameter_of_a_resnet() -> None:
    tower = grown(ModifiedResNet(RESNET, 64, P)).train()
    tower(torch.randn(3, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    for name, parameter in tower.named_parameters():
        without_effect = name.endswith("to_k.bias")  # softmax ignores it
        assert without_effect or (parameter.grad is not None and parameter.grad.any()), name


# --- sizes ----------------------------------------------------------------------------------------


def test_the_pool_attends_from_the_mean_alone() -> None:
    pool = AttentionPool(2, 8, 2, P)
    tokens = pool.embed(torch.arange(32.0).view(1, 8, 2, 2)) - pool.pos_emb
    torch.testing.assert_close(tokens[0, 0], tokens[0, 1:].mean(0))
    assert pool.pos_emb.shape == (5, 8) and pool(torch.randn(3, 8, 2, 2)).shape == (3, P)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: VisionTransformer(VIT, 10, P), "10 pixels cannot be cut into patches of 4"),
        (lambda: ModifiedResNet(RESNET, 48, P), "48 is no multiple"),
        (lambda: VisionTransformer(ViTConfig(patch_size=4, width=10, num_heads=3), 8, P), "heads"),
        (lambda: ModifiedResNet(ResNetConfig(width=4, num_heads=7), 32, P), "heads"),
        (lambda: ModifiedResNet(ResNetConfig(width=1, num_heads=1), 32, P), "1 is odd"),
        (lambda: ResNetConfig(num_blocks=(1, 2, 3)), "num_blocks"),
        (lambda: ResNetConfig(num_blocks=(1, 2, 3, 0)), "num_blocks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_a_sentence(build: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_published_numbers_of_parameters() -> None:
    """Of the image towers alone; `test_clip.py` counts whole models."""
    with torch.device("meta"):
        towers = {
            "ViT-B/32": (VisionTransformer(ViTConfig(), 224, 512), 87_849_216),
            "RN50": (ModifiedResNet(ResNetConfig(), 224, 1024), 38_316_896),
        }
    for name, (tower, count) in towers.items():
        assert sum(p.numel() for p in tower.parameters()) == count, name
