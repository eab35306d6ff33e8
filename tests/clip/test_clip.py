"""CLIP: its loss by hand, embeddings, classifiers and maps, counts at full size."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.clip.clip import CLIP, CLIPConfig, accuracy, contrastive_loss
from lineage.clip.image_towers import ModifiedResNet, ResNetConfig, ViTConfig
from lineage.config import OptimConfig, TextConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.official.glide import tokenizer_of_size
from lineage.recipes.clip import PRESETS, stages
from lineage.text.clip_text import CLIPTextEncoder
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.opposites import opposite
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

SIZE, P = 8, 6
CONFIG = CLIPConfig(
    projection_dim=P, vit=ViTConfig(patch_size=4, width=12, num_layers=2, num_heads=2)
)
CAPTIONS = [
    "a red circle left of a blue square",
    "a green ring",
    "a red circle left of a blue square",  # that of the first
    "a star above a ring",
    "a small star",
]
IDS = ["0", "1", "2", "3", "1"]  # the last picture is the second one


def make(config: CLIPConfig = CONFIG, text: str = "clip", **sizes: Any) -> CLIP:
    """A model with weights of a trained one's size, in double precision."""
    tokenizer = WordTokenizer.train(CAPTIONS + [f"{opposite(c)}" for c in CAPTIONS], 100)
    encoder = TextConfig(**{"width": 12, "num_heads": 2, "projection_dim": P, **sizes})
    model = CLIP(config, make_encoder(text, encoder, tokenizer), SIZE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.copy_(0.4 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return model.double().eval()


@pytest.fixture
def model() -> CLIP:
    return make()


@pytest.fixture
def batch() -> Batch:
    images = torch.rand(5, 3, SIZE, SIZE, dtype=torch.float64) * 2 - 1
    return Batch(images, list(CAPTIONS), None, list(IDS))


def loss_of(model: CLIP, batch: Batch, seed: int = 0) -> Tensor:
    noise = NoiseStreams(range(seed, seed + len(batch)))
    (turn,) = model.losses(batch, model.text.encode(batch.caption), noise)
    assert turn.group == "clip" and set(turn.terms) == {"contrastive"}
    return turn.terms["contrastive"]


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


# --- the loss -------------------------------------------------------------------------------------


def by_hand(
    images: Tensor, captions: Tensor, scale: float, same: Any, false: dict[int, Tensor]
) -> Tensor:
    """InfoNCE of unit vectors with loops: pictures among captions, captions among pictures.

    Args:
        same: Function that says whether two different rows are no negatives of each other.
        false: One more caption of some pictures.
    """
    count, terms = len(images), []
    for i in range(count):
        others = [k for k in range(count) if k == i or not same(i, k)]
        scores = [scale * images[i] @ captions[k] for k in others]
        scores += [scale * images[i] @ false[i]] if i in false else []
        terms.append(torch.stack(scores).exp().sum().log() - scale * images[i] @ captions[i])
        scores = [scale * images[k] @ captions[i] for k in others]
        terms.append(torch.stack(scores).exp().sum().log() - scale * images[i] @ captions[i])
    return torch.stack(terms).sum() / (2 * count)


@pytest.mark.parametrize("spatial", [True, False])
def test_the_loss_is_infonce_written_out(spatial: bool, batch: Batch) -> None:
    """Same captions and same pictures are no negatives; a false caption is one of its own row."""
    model = make(replace(CONFIG, degrade=0.0, spatial_negatives=spatial))
    images, captions = unit(model.encode_image(batch.image)), unit(model.encode_text(CAPTIONS))
    false: dict[int, Tensor] = {}
    if spatial:
        words = {i: o for i, c in enumerate(CAPTIONS) if (o := opposite(c)) is not None}
        assert set(words) == {0, 2, 3}
        false = {i: unit(model.encode_text([text]))[0] for i, text in words.items()}

    def same(i: int, k: int) -> bool:
        return CAPTIONS[i] == CAPTIONS[k] or IDS[i] == IDS[k]

    expected = by_hand(images, captions, 1 / 0.07, same, false)
    torch.testing.assert_close(loss_of(model, batch), expected)


def test_without_the_departures_it_is_the_paper_s(model: CLIP) -> None:
    """Of different pairs: figure 3, from logits to the mean of two cross-entropies."""
    model.config = replace(CONFIG, degrade=0.0, spatial_negatives=False)
    captions = ["a star above a ring", "a ring", "a star"]
    batch = Batch(torch.randn(3, 3, SIZE, SIZE).double(), captions, None, ["0", "1", "2"])
    image, text = unit(model.encode_image(batch.image)), unit(model.encode_text(captions))
    logits = image @ text.T * model.logit_scale.exp()
    labels = torch.arange(3)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(loss_of(model, batch), expected)


def test_masked_pairs_get_no_gradient() -> None:
    logits = torch.randn(4, 4, requires_grad=True)
    more = torch.cat([logits, torch.randn(4, 1)], 1).detach().requires_grad_()
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    contrastive_loss(logits, same, more).backward()
    assert logits.grad is not None and more.grad is not None
    assert (logits.grad == 0).equal(same) and (more.grad[:, :4] == 0).equal(same)
    assert more.grad[:, 4].all()


def test_a_row_without_a_false_caption_gets_nothing_from_the_column(batch: Batch) -> None:
    """Its logits stay as they were, and no gradient is infinite."""
    model = make(replace(CONFIG, degrade=0.0))
    image, text = unit(model.encode_image(batch.image)), unit(model.encode_text(CAPTIONS))
    logits = image @ text.T
    wide = model._with_opposites(logits, image, batch.caption, torch.tensor(2.0).double())
    assert torch.equal(wide[:, :5], logits)
    assert wide[[1, 4], 5].tolist() == [-math.inf, -math.inf]
    false = unit(model.encode_text(["a red circle right of a blue square"]))[0]
    torch.testing.assert_close(wide[0, 5], 2 * image[0] @ false)
    torch.testing.assert_close(wide[2, 5], 2 * image[2] @ false)
    loss_of(model, batch).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    plain = [c for c in CAPTIONS if opposite(c) is None]
    assert model._with_opposites(logits[:2, :2], image[:2], plain, model.scale()).shape == (2, 2)


def test_accuracy_counts_own_captions_and_leaves_out_equal_ones() -> None:
    logits = torch.tensor([[1.0, 0, 2], [0, 3, 1], [2, 0, 2.5]])
    same = torch.zeros(3, 3, dtype=torch.bool)
    assert float(accuracy(logits, same)) == pytest.approx(2 / 3)
    same[0, 2] = same[2, 0] = True
    assert float(accuracy(logits, same)) == 1.0


# --- the scale ------------------------------------------------------------------------------------


def test_the_scale_begins_at_the_paper_s_and_is_bounded(model: CLIP) -> None:
    assert float(model.scale().detach()) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    assert float(model.scale().detach()) == pytest.approx(100.0)
    other = make(replace(CONFIG, temperature=0.5, max_scale=1.5))
    assert float(other.logit_scale.detach().exp()) == pytest.approx(2.0)
    assert float(other.scale().detach()) == pytest.approx(1.5)


def test_a_scale_at_its_bound_can_fall_again(batch: Batch) -> None:
    """A bound without a gradient would keep it there for good."""
    model = make(replace(CONFIG, degrade=0.0))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100) + 0.2)
    loss_of(model, batch).backward()
    gradient = model.logit_scale.grad
    assert gradient is not None and gradient.abs() > 1e-3
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(100))


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_are_normalised_with_the_paper_s_numbers(model: CLIP) -> None:
    image = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE).double()
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    expected = [(x - m) / s for x, m, s in zip((0.0, 0.5, 1.0), mean, std, strict=True)]
    assert model.normalise(image)[0, :, 3, 5].tolist() == pytest.approx(expected)
    assert "mean" not in model.state_dict()  # published files lack it


@pytest.mark.parametrize("side", [(5, 5), (8, 8), (31, 31), (16, 24)])
def test_pictures_of_any_side_are_encoded(side: tuple[int, int], model: CLIP) -> None:
    """Of the tower's own side as they are; larger ones as their mean colours, without aliasing."""
    images = torch.rand(2, 3, *side).double() * 2 - 1
    assert model.encode_image(images).shape == (2, P)
    plain = torch.full((1, 3, *side), 0.25).double()
    own = torch.full((1, 3, SIZE, SIZE), 0.25).double()
    torch.testing.assert_close(model.encode_image(plain), model.encode_image(own))
    stripes = -torch.ones(1, 3, 4 * SIZE, 4 * SIZE).double()
    stripes[..., 1::4] = stripes[..., 2::4] = 1  # in the middle of what becomes a pixel
    grey = model.normalise(torch.zeros(1, 3, SIZE, SIZE).double())
    torch.testing.assert_close(model.normalise(stripes)[..., 2:-2], grey[..., 2:-2])


def test_a_row_s_degradation_depends_on_its_own_noise(model: CLIP) -> None:
    images = torch.rand(6, 3, SIZE, SIZE) * 2 - 1
    whole = model.degraded(images, NoiseStreams(range(6)))
    alone = model.degraded(images[4:5], NoiseStreams([4]))
    torch.testing.assert_close(whole[4:5], alone)
    same = model.degraded(images[:1].expand(6, -1, -1, -1), NoiseStreams(range(6)))
    assert len({round(float(row.sum()), 4) for row in same}) == 6


def test_half_of_the_pictures_are_blurred_and_all_get_noise() -> None:
    """A quarter by way of three quarters of the pixels, a quarter of half of them; the noise has a
    deviation of up to `degrade`."""
    model = make(replace(CONFIG, degrade=1e-6)).float()
    total, side = 400, 16
    stripes = torch.ones(total, 3, side, side)
    stripes[..., 2::4] = stripes[..., 3::4] = -1  # of two pixels, which a blur makes grey
    kept = (model.degraded(stripes, NoiseStreams(range(total))) * stripes).mean((1, 2, 3))
    shares = Counter(round(float(share), 2) for share in kept)
    sharp, less, least = sorted(shares, reverse=True)
    assert sharp == 1 and less > least + 0.1
    assert [shares[one] for one in (sharp, less, least)] == pytest.approx([200, 100, 100], abs=40)
    model.config = replace(CONFIG, degrade=0.2)
    grey = torch.zeros(total, 3, side, side)
    sigma = model.degraded(grey, NoiseStreams(range(total))).std((1, 2, 3))
    assert sigma.max() < 0.21 and sigma.min() < 0.02 and abs(float(sigma.mean()) - 0.1) < 0.01


def test_degraded_pictures_are_what_is_trained_on(batch: Batch) -> None:
    model = make()
    assert loss_of(model, batch) != loss_of(model, batch, seed=9)
    model.config = replace(CONFIG, degrade=0.0)
    assert torch.equal(loss_of(model, batch), loss_of(model, batch, seed=9))


# --- the text tower -------------------------------------------------------------------------------


class Sentences(TextEncoder):
    """Two numbers for each caption."""

    word_dim = sentence_dim = 2

    def encode(self, captions: list[str]) -> TextFeatures:
        rows = torch.tensor([[float(len(c)), 1.0] for c in captions]).double()
        ids = torch.ones(len(rows), 1, dtype=torch.int64)
        return TextFeatures(rows[:, None], ids > 0, rows, ids)


def test_a_sentence_of_another_width_is_projected() -> None:
    model = CLIP(CONFIG, Sentences(), SIZE).double()
    assert isinstance(model.sentence_proj, nn.Linear) and model.sentence_proj.bias is None
    expected = model.sentence_proj.weight @ torch.tensor([3.0, 1.0]).double()
    torch.testing.assert_close(model.encode_text(["red"])[0], expected)
    assert isinstance(make().sentence_proj, nn.Identity)  # as in published files
    assert make(text="bag", width=P).encode_text(["red"]).shape == (1, P)


def test_both_towers_and_the_scale_are_trained(batch: Batch) -> None:
    """Every parameter of a model with either image tower."""
    resnet = ResNetConfig(width=4, num_blocks=(1, 1, 1, 1), num_heads=8)
    for config, side in ((CONFIG, SIZE), (replace(CONFIG, image="resnet", resnet=resnet), 32)):
        text = make().text.float()
        model = CLIP(config, text, side)
        (own,) = model.groups().values()
        assert own == [model]
        images = torch.randn(5, 3, side, side)
        (turn,) = model.losses(
            replace(batch, image=images), text.encode(CAPTIONS), NoiseStreams(range(5))
        )
        turn.terms["contrastive"].backward()
        for name, parameter in model.named_parameters():
            without_effect = name.endswith("to_k.bias")
            assert without_effect or (parameter.grad is not None and parameter.grad.any()), name
        values = turn.metrics()
        assert 0 <= float(values["accuracy"]) <= 1
        assert float(values["scale"].detach()) == pytest.approx(1 / 0.07, rel=1e-4)
    assert isinstance(model.image_tower, ModifiedResNet)


# --- what it is for -------------------------------------------------------------------------------


def test_similarity_is_the_cosine(model: CLIP, batch: Batch) -> None:
    cosines = model.similarity(batch.image, CAPTIONS[:2])
    expected = unit(model.encode_image(batch.image)) @ unit(model.encode_text(CAPTIONS[:2])).T
    torch.testing.assert_close(cosines, expected)
    assert cosines.shape == (5, 2) and not cosines.requires_grad


def test_a_classifier_is_the_mean_of_unit_vectors(model: CLIP) -> None:
    names, templates = ["ring", "star", "blue square"], ["a {}", "a small {} above a circle"]
    weights = model.classifier(names, templates)
    for name, row in zip(names, weights, strict=True):
        vectors = [unit(model.encode_text([t.format(name)]))[0] for t in templates]
        torch.testing.assert_close(row, unit(torch.stack(vectors).mean(0)))
    torch.testing.assert_close(
        model.classifier(["ring"]), unit(model.encode_text(["a photo of a ring."]))
    )


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_similarity_map_is_the_cosine_of_each_place(kind: Any) -> None:
    resnet = ResNetConfig(width=4, num_blocks=(1, 1, 1, 1), num_heads=8)
    side, (height, width) = (64, (2, 2)) if kind == "resnet" else (SIZE, (2, 2))
    text = make().text.float()
    model = CLIP(replace(CONFIG, image=kind, resnet=resnet), text, side).eval()
    images = torch.rand(2, 3, 50, 50) * 2 - 1
    maps = model.similarity_map(images, CAPTIONS[:2])
    assert maps.shape == (2, height, width)
    places = model.image_tower.places(model.normalise(images))
    captions = unit(model.encode_text(CAPTIONS[:2]))
    for row in range(2):
        for y in range(height):
            for x in range(width):
                expected = unit(places[row, :, y, x]) @ captions[row]
                torch.testing.assert_close(maps[row, y, x], expected, atol=1e-5, rtol=1e-5)


# --- sizes ----------------------------------------------------------------------------------------


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("image", "text", "projection_dim", "expected"),
    [
        ({}, {}, 512, 151_277_313),
        (
            {"patch_size": 14, "width": 1024, "num_layers": 24, "num_heads": 16},
            {"width": 768, "num_heads": 12},
            768,
            427_616_513,
        ),
        ("resnet", {}, 1024, 102_007_137),
    ],
    ids=["ViT-B/32", "ViT-L/14", "RN50"],
)
def test_published_numbers_of_parameters(
    image: Any, text: dict[str, int], projection_dim: int, expected: int
) -> None:
    """The defaults of the configurations are ViT-B/32 and RN50."""
    tower: dict[str, Any] = (
        {"image": "resnet"} if image == "resnet" else {"vit": ViTConfig(**image)}
    )
    sizes: dict[str, Any] = {"width": 512, "num_heads": 8, "num_layers": 12, "max_words": 77}
    sizes = {**sizes, **text, "projection_dim": projection_dim}
    with torch.device("meta"):
        encoder = CLIPTextEncoder(TextConfig(**sizes), tokenizer_of_size(49_406))
        model = CLIP(CLIPConfig(projection_dim=projection_dim, **tower), encoder, 224)
    assert count(model) == expected


def test_the_preset_paper_is_the_paper_s() -> None:
    """ViT-B/32, without our departures."""
    (stage,) = stages(PRESETS["paper"], tokenizer_of_size(49_406))
    with torch.device("meta"):
        model = stage.construct()
    assert isinstance(model, CLIP) and count(model) == 151_277_313
    assert not model.config.spatial_negatives and model.config.degrade == 0


@pytest.mark.parametrize(
    "change",
    [
        {"image": "vgg"},
        {"projection_dim": 0},
        {"temperature": 0.0},
        {"max_scale": -1.0},
        {"degrade": -0.1},
        {"degrade": float("nan")},
    ],
    ids=str,
)
def test_impossible_settings_raise_a_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))) as caught:
        CLIPConfig(**change)
    assert "\n" not in str(caught.value)


# --- training -------------------------------------------------------------------------------------


def test_eight_pairs_are_learnt_by_heart(
    shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """In a few steps each picture finds its caption, and each true caption beats its false one."""
    with_places = [i for i in range(200) if opposite(shapes[i].captions[0])][:4]
    batch = shapes.batch([*with_places, *range(200, 204)], [0] * 8, 0)
    batch.caption = [shapes[i].captions[0] for i in (*with_places, *range(200, 204))]
    torch.manual_seed(3)
    (stage,) = stages(PRESETS["smoke"], tokenizer)
    model = stage.construct()
    assert isinstance(model, CLIP)
    optim = OptimConfig(lr=3e-3, warmup=0, decay="none", weight_decay=0.0)
    train = TrainConfig(batch_size=8, precision="fp32", prefetch=0)
    trainer = Trainer(model, shapes, optim, train)
    for _ in range(80):
        values = trainer.advance(batch)
    model.eval()
    assert float(values["clip/contrastive"]) < 0.6
    cosines = model.similarity(batch.image, batch.caption)
    own = cosines.diagonal()
    assert (own >= cosines.amax(1) - 1e-6).float().mean() > 0.8
    false = [f"{opposite(caption)}" for caption in batch.caption[:4]]
    assert (own[:4] > model.similarity(batch.image[:4], false).diagonal()).all()
