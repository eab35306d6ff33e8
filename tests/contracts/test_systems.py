"""The contract of a system, tested on every system that the catalogue calls working.

A new system needs no test of its own for any of this: once its row says `works`, it is tested here.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lineage
from lineage import runs
from lineage.catalog import CATALOG, drawing, working
from lineage.cli import main
from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.diffusion.model import DiffusionModel
from lineage.errors import Interrupted, UserError
from lineage.nn.noise import NoiseStreams
from lineage.recipes import find_recipe, preset
from lineage.system import (
    EmbedsImages,
    Reconstructs,
    ScoresStages,
    System,
    Trainable,
    Visualises,
)
from lineage.text.contract import TextFeatures
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Group, Trainer
from lineage.training.stage import Stage
from lineage.training.store import load_state, load_tensors

KEYS = working()
DRAWING = drawing()
STAGES = [(key, stage) for key in KEYS for stage in CATALOG[key].stages]
OF_OTHERS = {("vqgan_clip", "clip"), ("vqgan_clip", "codec"), ("clipdraw", "clip")}
"""Stages that are those of `clip` and `vqgan`, with which their steps are tested."""
OWN_STAGES = [pair for pair in STAGES if pair not in OF_OTHERS]
CAPTIONS = [
    "a red circle",
    "a blue square above a green triangle",
    "a zorp beneath three quuxes",  # words that training never saw
    "",
    "two small yellow stars to the left of a large purple ring",
]
BATCH = 8


def trainer_for(system: Trainable, data: CaptionedDataset, **optim: Any) -> Trainer:
    """A trainer in full precision, without warm-up, so that a single step moves every parameter."""
    config = OptimConfig(**{"warmup": 0, "decay": "none", "lr": 1e-3, **optim})
    train = TrainConfig(batch_size=BATCH, precision="fp32", prefetch=0)
    return Trainer(system, data, config, train)


def text_of(system: Trainable, captions: list[str]) -> Any:
    """Features of the captions; None for a model that reads none."""
    return None if system.text is None else system.text.encode(captions)


def fill(system: Trainable, data: CaptionedDataset) -> Trainable:
    """Take a few large steps, so that retrieval has pictures and no layer is still at zero.

    Trained weights are larger than initial ones, with which a caption hardly changes a GAN's
    picture. A diffusion model takes many steps, in which weights four times as large would make a
    rounding error grow beyond any tolerance.
    """
    trainer = trainer_for(system, data, lr=3e-3)
    larger = 2.0 if isinstance(system, DiffusionModel) else 4.0
    with torch.no_grad():
        for parameter in (p for group in trainer.groups.values() for p in group.parameters):
            parameter.mul_(larger if parameter.dim() > 1 else 1.0)
    for number in range(4):
        trainer.advance(trainer.loader.at(number))
    return system.eval()


def stir(system: Trainable) -> None:
    """Add a little noise to all weights."""
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


# --- recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_recipe_agrees_with_the_catalogue(key: str, tokenizer: WordTokenizer) -> None:
    """A preset or stage that the list promises and the recipe lacks would fail for the user."""
    recipe, row = find_recipe(key), CATALOG[key]
    assert set(recipe.PRESETS) == set(row.presets)
    for name in recipe.PRESETS:
        config = preset(key, name)
        assert isinstance(config, recipe.Config)
        assert (config.key, config.preset) == (key, name)
        stages = recipe.stages(config, tokenizer)
        assert tuple(stage.name for stage in stages if stage.trains) == row.stages
        assert sum(stage.share for stage in stages) == pytest.approx(1)
        for number, stage in enumerate(stages):
            assert all(earlier in stages[:number] for earlier in stage.earlier())
            later = stages[number + 1 :]
            assert not later or any(stage in one.earlier() for one in later)


@pytest.mark.parametrize("key", KEYS)
def test_the_key_of_the_last_stage_depends_on_text_and_model(
    key: str, tokenizer: WordTokenizer
) -> None:
    """A setting that a stage's arguments lack would give one run the weights of another."""
    data = {"data": "shapes", "size": 16, "seed": 0, "lineage": "0"}

    def last(**settings: Any) -> str:
        config = runs.configure(key, preset_name="smoke", settings=settings)
        return find_recipe(key).stages(config, tokenizer)[-1].key(data)

    assert last() == last()
    assert last(**{"encoder.width": 8}) != last()
    assert last(text="lstm") != last(text="transformer")
    model = runs.to_dict(preset(key, "smoke"))["model"]
    name, value = next((n, v) for n, v in model.items() if type(v) is int)
    assert last(**{f"model.{name}": value + 1}) != last()


@pytest.mark.parametrize(
    ("key", "name"), [(key, name) for key in KEYS for name in CATALOG[key].presets]
)
def test_every_preset_builds(key: str, name: str, tokenizer: WordTokenizer) -> None:
    """On the meta device, where the largest network costs no memory."""
    with torch.device("meta"):
        system = runs.build(find_recipe(key).stages(preset(key, name), tokenizer))
    groups = system.groups()
    assert isinstance(system, System) == CATALOG[key].draws
    trained = {id(p) for modules in groups.values() for m in modules for p in m.parameters()}
    if groups:  # no parameter may be left out of training by oversight
        assert trained == {id(p) for p in system.parameters() if p.requires_grad}


def test_every_system_has_a_budget_at_every_preset() -> None:
    """Without one, training never ends."""
    for key in KEYS:
        for config in find_recipe(key).PRESETS.values():
            train = config.train
            assert train.minutes or train.max_steps or train.max_pictures, (key, config)


# --- one training step ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_stage(tokenizer: WordTokenizer) -> Callable[[str, str], dict[str, Trainable]]:
    """(key, stage) -> untrained systems of that stage and the ones before it, at preset smoke."""

    def make(key: str, name: str) -> dict[str, Trainable]:
        config = runs.configure(key, preset_name="smoke")
        torch.manual_seed(1)
        systems: dict[str, Trainable] = {}
        for stage in find_recipe(key).stages(config, tokenizer):
            systems[stage.name] = stage.construct()
            if stage.name == name:
                return systems
            if CATALOG[key].adapts:  # zero layers of an untrained base would let no gradient pass
                stir(systems[stage.name])
        raise AssertionError(name)

    return make


class Turns:
    """Records of `Group.update`: parameters that moved, by group, and those with a gradient."""

    def __init__(
        self, system: Trainable, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.order: list[str] = []
        self.moved: dict[str, set[str]] = {}
        self.gradients: dict[str, set[str]] = {}
        names = {id(p): name for name, p in system.named_parameters()}
        by_group = {id(group): name for name, group in trainer.groups.items()}
        original = Group.update

        def update(group: Group, *args: Any, **kwargs: Any) -> Tensor:
            turn = by_group[id(group)]
            before = {name: p.detach().clone() for name, p in system.named_parameters()}
            assert self.outside is None or all(
                torch.equal(before[name], value) for name, value in self.outside.items()
            ), "parameters moved between two turns"
            norm = original(group, *args, **kwargs)
            after = dict(system.named_parameters())
            self.order.append(turn)
            self.moved.setdefault(turn, set()).update(
                name for name, value in before.items() if not torch.equal(value, after[name])
            )
            self.gradients.setdefault(turn, set()).update(
                names[id(p)] for p in group.parameters if p.grad is not None and p.grad.any()
            )
            self.outside = {name: p.detach().clone() for name, p in after.items()}
            return norm

        self.outside: dict[str, Tensor] | None = None
        monkeypatch.setattr(Group, "update", update)


@pytest.mark.parametrize(("key", "stage"), OWN_STAGES)
def test_each_turn_moves_its_own_parameters_and_no_others(
    key: str,
    stage: str,
    make_stage: Any,
    shapes: CaptionedDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A generator that moves in the discriminator's turn, or a part that never learns, is a bug.

    Networks with zero initial layers pass gradients on only after these have moved, so a few steps
    are taken; without weight decay, since decay moves parameters that no gradient reaches.
    """
    system = make_stage(key, stage)[stage]
    trainer = trainer_for(system, shapes, weight_decay=0.0)
    turns = Turns(system, trainer, monkeypatch)
    values: dict[str, Tensor] = {}
    for number in range(5):
        values = trainer.advance(trainer.loader.at(number))
        assert all(torch.isfinite(value).all() for value in values.values()), (number, values)
    groups = system.groups()
    assert set(turns.order) == set(groups)
    assert turns.order == turns.order[: len(turns.order) // 5] * 5
    for name, modules in groups.items():
        own = {id(p) for module in modules for p in module.parameters()}
        expected = {n for n, p in system.named_parameters() if id(p) in own}
        # a key's bias adds a constant to all scores of a query, which softmax ignores
        without_effect = {n for n in expected if n.endswith("to_k.bias")}
        for names in (turns.moved[name], turns.gradients[name]):
            assert names - without_effect == expected - without_effect
            assert names <= expected
        assert f"gradient/{name}" in values
        assert any(term.startswith(f"{name}/") for term in values)
    if not groups:
        assert not values


@pytest.mark.parametrize(("key", "stage"), OWN_STAGES)
def test_metrics_do_not_change_training(
    key: str, stage: str, make_stage: Any, shapes: CaptionedDataset
) -> None:
    """Metrics that updated a batch statistic or drew a random number would make training depend on
    how often it is logged; and a system with a diagnosis must have metrics."""
    measured, plain = (make_stage(key, stage)[stage] for _ in range(2))
    with_metrics, without = (trainer_for(system, shapes) for system in (measured, plain))
    for number in range(2):
        values = with_metrics.advance(with_metrics.loader.at(number))
        losses = without.advance(without.loader.at(number), collect_metrics=False)
        metrics = {name for name in values if name.startswith("metric/")}
        assert metrics or type(measured).diagnose is Trainable.diagnose
        assert all(values[name].shape == () for name in metrics)
        assert values.keys() - metrics == losses.keys()
        assert all(torch.equal(values[name], value) for name, value in losses.items())
    for name, value in measured.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


@pytest.mark.parametrize(
    ("key", "stage"), [(key, stage) for key, stage in STAGES if stage != CATALOG[key].stages[0]]
)
def test_a_stage_leaves_the_earlier_ones_as_they_are(
    key: str, stage: str, make_stage: Any, shapes: CaptionedDataset
) -> None:
    """Bit for bit, batch statistics too: otherwise a stage from the cache would give another result
    than one trained here."""
    systems = make_stage(key, stage)
    earlier = {name: system for name, system in systems.items() if name != stage}
    before = {n: {k: v.clone() for k, v in s.state_dict().items()} for n, s in earlier.items()}
    trainer = trainer_for(systems[stage], shapes, lr=1e-2)
    for number in range(3):
        trainer.advance(trainer.loader.at(number))
    for name, system in earlier.items():
        for part, value in system.state_dict().items():
            assert torch.equal(value, before[name][part]), (name, part)


@pytest.mark.parametrize(("key", "stage"), OWN_STAGES)
def test_losses_yield_the_groups_in_order(
    key: str, stage: str, make_stage: Any, shapes: CaptionedDataset
) -> None:
    """A turn that names no group, or a term that is no scalar, stops training at its first step."""
    system = make_stage(key, stage)[stage]
    batch = shapes.batch(range(BATCH), [0] * BATCH, 0)
    text = text_of(system, batch.caption)
    turns = list(system.losses(batch, text, NoiseStreams(range(BATCH))))
    assert [turn.group for turn in turns] == list(system.groups())
    for turn in turns:
        assert turn.terms
        assert all(t.shape == () and t.requires_grad for t in turn.terms.values())


def test_retrieval_stores_its_batch(make_system: Any, shapes: CaptionedDataset) -> None:
    """It has nothing to train, so a step that stores nothing would look like success."""
    system, _ = make_system("retrieval")
    before = int(system.count)
    batch = shapes.batch(range(BATCH), [0] * BATCH, 0)
    text, noise = system.text.encode(batch.caption), NoiseStreams(range(BATCH))
    assert list(system.losses(batch, text, noise)) == []
    assert int(system.count) == before + BATCH
    picture = system.generate(batch.caption[0])
    assert (picture - batch.image).abs().flatten(1).amax(1).min() < 1e-2


@pytest.mark.parametrize(("key", "stage"), OWN_STAGES)
def test_a_batch_of_one_trains_or_is_refused(
    key: str, stage: str, make_stage: Any, shapes: CaptionedDataset
) -> None:
    """The last resort on a small machine is --set train.batch_size=1.

    A batch of one has no statistics and no mismatched caption, so a system may refuse it; but in a
    sentence.
    """
    system = make_stage(key, stage)[stage]
    trainer = Trainer(system, shapes, OptimConfig(), TrainConfig(batch_size=1, precision="fp32"))
    with contextlib.suppress(UserError):
        values = trainer.advance(trainer.loader.at(0))
        assert all(torch.isfinite(value).all() for value in values.values()), values


# --- generation -------------------------------------------------------------------------------


def prepared(stage: Stage, data: CaptionedDataset) -> CaptionedDataset:
    """The data set that a stage trains on."""
    return data if stage.prepare is None else stage.prepare(data, stage.system)


@pytest.fixture(scope="module")
def trained(tokenizer: WordTokenizer, shapes: CaptionedDataset) -> Callable[[str], System]:
    """key -> a system after a few steps of each of its stages."""
    done: dict[str, System] = {}

    def get(key: str) -> System:
        if key not in done:
            config = runs.configure(key, preset_name="smoke")
            torch.manual_seed(1)
            for stage in find_recipe(key).stages(config, tokenizer):
                system = fill(stage.construct(), prepared(stage, shapes))
            assert isinstance(system, System)
            done[key] = system
        return done[key]

    return get


@pytest.mark.parametrize("key", DRAWING)
def test_pictures_have_the_shape_and_range_of_the_contract(
    key: str, trained: Callable[[str], System]
) -> None:
    system = trained(key)
    pictures = system.generate(CAPTIONS, seed=1)
    assert pictures.shape == (len(CAPTIONS), 3, 16, 16)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= -1 and pictures.max() <= 1
    assert pictures.flatten(1).std(1).max() > 0.01  # not a blank picture
    assert not pictures.requires_grad


@pytest.mark.parametrize("key", DRAWING)
def test_a_seed_is_a_picture(key: str, trained: Callable[[str], System]) -> None:
    """The same seed gives the same pictures, whatever came before; another seed, others."""
    system = trained(key)
    first = system.generate(CAPTIONS, seed=1)
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(first, system.generate(CAPTIONS, seed=1))
    other = system.generate(CAPTIONS, seed=2)
    if system.groups():
        assert all((first - other).abs().flatten(1).amax(1) > 1e-3)
    else:  # retrieval draws lots only among pictures that tie, as all do for the empty caption
        seeds = [system.generate("", seed=seed) for seed in range(8)]
        assert any(not torch.equal(seeds[0], picture) for picture in seeds[1:])


@pytest.mark.parametrize("key", DRAWING)
def test_pictures_of_one_batch_differ_by_their_place(
    key: str, trained: Callable[[str], System]
) -> None:
    """The same caption eight times should be eight pictures, not one."""
    system = trained(key)
    caption = "a red circle" if system.groups() else ""
    pictures = system.generate([caption] * 8, seed=1)
    assert any((pictures[0] - other).abs().max() > 1e-3 for other in pictures[1:])


@pytest.mark.parametrize("key", DRAWING)
def test_a_picture_does_not_depend_on_its_batch(key: str, trained: Callable[[str], System]) -> None:
    """Normalisation over the batch, padding to the longest caption, or shared noise would show."""
    system = trained(key)
    together = system.generate(CAPTIONS, seed=5)
    for i in range(len(CAPTIONS)):
        others = [CAPTIONS[(j * 3 + 1) % len(CAPTIONS)] for j in range(len(CAPTIONS) + 2)]
        others[i] = CAPTIONS[i]
        torch.testing.assert_close(
            system.generate(others, seed=5)[i], together[i], atol=1e-4, rtol=0
        )
        shorter = system.generate([CAPTIONS[0]] * i + [CAPTIONS[i]], seed=5)
        torch.testing.assert_close(shorter[i], together[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", DRAWING)
def test_a_picture_does_not_depend_on_how_many_are_made_at_once(
    key: str, trained: Callable[[str], System], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long list is drawn in batches; the second must count on where the first stopped."""
    system = trained(key)
    together = system.generate(CAPTIONS, seed=5)
    monkeypatch.setattr(system, "sample_batch_size", 2)
    torch.testing.assert_close(system.generate(CAPTIONS, seed=5), together, atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", DRAWING)
def test_the_caption_matters(key: str, trained: Callable[[str], System]) -> None:
    """The easiest way to pass every other test is to ignore the text.

    Several pictures are compared, since pictures that are drawn code by code change by leaps.
    """
    system = trained(key)
    pair = ("a red circle", CAPTIONS[4])
    red, blue = (system.generate([caption] * 16, seed=1) for caption in pair)
    assert (red - blue).abs().max() > 1e-3


@pytest.mark.parametrize("key", DRAWING)
def test_one_string_is_one_caption(key: str, trained: Callable[[str], System]) -> None:
    """Read as a sequence, it would be drawn letter by letter."""
    system = trained(key)
    one = system.generate("a red circle", seed=1)
    assert torch.equal(one, system.generate(["a red circle"], seed=1))
    assert one.shape[0] == 1
    assert torch.equal(one, system.generate(("a red circle",), seed=1))


@pytest.mark.parametrize("key", DRAWING)
def test_wrong_requests_are_refused(key: str, trained: Callable[[str], System]) -> None:
    system = trained(key)
    with pytest.raises(UserError, match="at least one caption"):
        system.generate([])
    with pytest.raises(UserError, match="'gidance'"):
        system.generate("a red circle", gidance=3)


@pytest.mark.parametrize("key", DRAWING)
def test_generating_leaves_the_system_as_it_was(key: str, trained: Callable[[str], System]) -> None:
    """Sheets are drawn in the middle of training: weights, statistics and mode must survive."""
    system = trained(key)
    system.train()
    before = {name: value.clone() for name, value in system.state_dict().items()}
    system.generate(CAPTIONS, seed=1)
    assert system.training
    assert all(torch.equal(before[name], value) for name, value in system.state_dict().items())
    system.eval()


@pytest.mark.parametrize("key", DRAWING)
def test_options_are_listed_with_type_default_and_sentence(
    key: str, trained: Callable[[str], System]
) -> None:
    """Each option set to its default changes nothing."""
    system = trained(key)
    options = system.options()
    for name, option in options.items():
        assert option.name == name and option.sentence.endswith("."), option
    plain = system.generate(CAPTIONS[:2], seed=1)
    defaults = {name: option.default for name, option in options.items()}
    assert torch.equal(plain, system.generate(CAPTIONS[:2], seed=1, **defaults))


@pytest.mark.parametrize("key", DRAWING)
def test_variants_of_a_sheet_are_options(key: str, trained: Callable[[str], System]) -> None:
    """Sheets are drawn in the middle of training, where an unknown option would stop the run."""
    system = trained(key)
    variants = system.variants()
    pictures = [system.generate(CAPTIONS[:2], seed=1, **options) for options in variants.values()]
    plain = system.generate(CAPTIONS[:2], seed=1)
    assert all(picture.shape == plain.shape for picture in pictures)
    assert any(torch.equal(picture, plain) for picture in pictures)
    assert len({tuple(picture.flatten().tolist()) for picture in pictures}) == len(variants)


@pytest.mark.parametrize("key", DRAWING)
def test_picture_options_are_checked(key: str, trained: Callable[[str], System]) -> None:
    """A picture of another size, or a mask of numbers, is refused in a sentence."""
    system = trained(key)
    size = system.size
    for name in system.options().keys() & {"image", "mask"}:
        with pytest.raises(UserError, match=rf"{name} must be"):
            system.generate(CAPTIONS[:2], **{name: torch.zeros(2, 3, size, size + 1)})
        with pytest.raises(UserError, match=rf"{name} must be a tensor"):
            system.generate(CAPTIONS[:2], **{name: "picture.png"})
    if "mask" in system.options():
        numbers = torch.zeros(2, 1, size, size)
        with pytest.raises(UserError, match="bool"):
            system.generate(CAPTIONS[:2], image=torch.zeros(2, 3, size, size), mask=numbers)


@pytest.mark.parametrize("key", [key for key in KEYS if key in ("ddpm", "vqvae", "ldm")])
def test_one_picture_serves_all_captions(key: str, trained: Callable[[str], System]) -> None:
    """And each caption may have a picture of its own, whatever the batch size."""
    system = trained(key)
    image = torch.linspace(-1, 1, 3 * system.size**2).view(1, 3, system.size, system.size)
    one = system.generate(CAPTIONS[:3], seed=1, image=image)
    each = system.generate(CAPTIONS[:3], seed=1, image=image.expand(3, -1, -1, -1))
    assert torch.equal(one, each)
    assert not torch.equal(one, system.generate(CAPTIONS[:3], seed=1))


@pytest.mark.parametrize("key", DRAWING)
def test_optional_methods_return_pictures(key: str, trained: Callable[[str], System]) -> None:
    """What a Protocol promises is there, and of the right shape."""
    system = trained(key)
    image = torch.zeros(2, 3, system.size, system.size)
    if isinstance(system, Visualises):
        rows = system.visualise(CAPTIONS[4], seed=1)
        again = system.visualise(CAPTIONS[4], seed=1)
        assert rows and all(rows)
        for one, other in zip(chain(*rows), chain(*again), strict=True):
            assert one.label == other.label and torch.equal(one.image, other.image)
            assert one.image.shape[0] == 3 and one.image.abs().max() <= 1
    with torch.no_grad():
        if isinstance(system, Reconstructs):
            assert system.reconstruct(image).shape == image.shape
        if isinstance(system, EmbedsImages):
            assert system.image_embedding(image).shape == (2, system.text.sentence_dim)
        if isinstance(system, ScoresStages):
            batch = Batch(image, CAPTIONS[:2], None, ["0", "1"])
            scores = system.stage_scores(batch)
            assert scores and all(value.shape == (2,) for value in scores.values())


# --- runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", DRAWING)
def test_a_loaded_run_draws_what_the_trained_system_draws(
    key: str, smoke_run: Callable[[str], Any]
) -> None:
    folder, system = smoke_run(key)
    loaded = lineage.load(folder)
    assert not loaded.training
    assert torch.equal(loaded.generate(CAPTIONS, seed=4), system.generate(CAPTIONS, seed=4))


@pytest.mark.parametrize("key", KEYS)
def test_a_run_folder_holds_what_the_design_says(key: str, smoke_run: Callable[[str], Any]) -> None:
    folder, _ = smoke_run(key)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "cost.json"):
        assert (folder / name).is_file(), name
    assert (last_state(key, folder) / "state.pt").is_file()
    assert (folder / "metrics.jsonl").read_text().strip()
    assert list((folder / "samples").glob("*.png"))
    assert not list(folder.glob("**/*.partial"))
    assert runs.read_config(folder) == preset(key, "smoke")


class StopAfter:
    """Stops a run after a number of steps of one stage, as Ctrl-C does."""

    def __init__(self, stage: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Trainer.advance

        def advance(trainer: Trainer, *arguments: Any) -> dict[str, Tensor]:
            values = original(trainer, *arguments)
            if (trainer.stage, trainer.step) == (stage, steps):
                signal.raise_signal(signal.SIGINT)
            return values

        monkeypatch.setattr(Trainer, "advance", advance)


def steps_of(key: str, steps: int) -> dict[str, int]:
    """Number of steps of each stage, of a budget of `steps`."""
    config = runs.configure(key, preset_name="smoke", steps=steps)
    stages = find_recipe(key).stages(config, WordTokenizer(["a"]))
    return {stage.name: stage.budgeted().max_steps or 0 for stage in stages if stage.trains}


def last_state(key: str, folder: Path) -> Path:
    """Folder of the state of the last stage that is trained."""
    *_, last = find_recipe(key).stages(preset(key, "smoke"), WordTokenizer(["a"]))
    return folder if last.trains else folder / "stages" / CATALOG[key].stages[-1]


def budget_for(key: str, last: int) -> int:
    """Budget of which the last stage gets `last` steps."""
    return next(n for n in range(last, 99) if list(steps_of(key, n).values())[-1] == last)


def assert_same_run(key: str, one: Path, other: Path) -> None:
    """The saved model byte for byte, and everything in the training state but the clock."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    first, second = (load_state(last_state(key, run) / "state.pt") for run in (one, other))
    pairs = list(zip(_leaves(first), _leaves(second), strict=True))
    assert len(pairs) > 3
    for (name, a), (other_name, b) in pairs:
        assert name == other_name
        if name in (".seconds", ".cpu_seconds"):
            continue
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{at}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{at}.{number}")
    else:
        yield at, value


RESUME = {"train.batch_size": 8, "train.checkpoint_every": 3, "train.log_every": 2}


@pytest.fixture(scope="module")
def whole(
    train_run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """key -> the folder of a run that was never stopped, in a cache of its own."""
    done: dict[str, Path] = {}

    def get(key: str) -> Path:
        if key not in done:
            place = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patched:
                patched.setenv("LINEAGE_CACHE", str(place / "cache"))
                run = train_run(place / key, key, RESUME, steps=budget_for(key, 7))
            done[key] = run.folder
        return done[key]

    return get


@pytest.mark.parametrize(
    ("key", "stage", "stop"),
    [
        (key, stage, stop)
        for key, stage in STAGES
        for stop in ((3, 4) if stage == CATALOG[key].stages[-1] else (1,))
    ],
)
def test_a_stopped_run_ends_like_one_that_was_never_stopped(
    key: str,
    stage: str,
    stop: int,
    whole: Callable[[str], Path],
    train_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in an earlier stage, at a checkpoint of the last one and between two; a value that is
    not saved would change a bit."""
    expected = whole(key)
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    parts, steps = tmp_path / "parts", budget_for(key, 7)
    is_last = stage == CATALOG[key].stages[-1]
    place = last_state(key, parts) if is_last else parts / "stages" / stage
    with monkeypatch.context() as patched:
        StopAfter(stage, stop, patched)
        with pytest.raises(Interrupted, match="--resume"):
            train_run(parts, key, RESUME, steps=steps)
    assert load_state(place / "state.pt")["step"] == stop
    train_run(parts, key, {}, resume=True)
    assert_same_run(key, expected, parts)
    for name in CATALOG[key].stages:
        logged = [line["step"] for line in runs_log(parts) if line["stage"] == name]
        assert logged == sorted(set(logged)) and logged
    assert logged[-1] == load_state(last_state(key, parts) / "state.pt")["step"] == 7


def runs_log(folder: Path) -> list[dict[str, Any]]:
    from lineage.training.log import read_log

    return read_log(folder / "metrics.jsonl")


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.002)


LONG = {"train.checkpoint_every": 7, "train.sample_every": 0}
FLAGS = ["--preset", "smoke", "--set", "train.checkpoint_every=7", "--set", "train.sample_every=0"]


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in ("ddpm", "gan_int_cls") if key in KEYS])
def test_a_killed_run_ends_like_one_that_was_never_killed(
    key: str,
    train_run: Callable[..., Any],
    command: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL leaves no time to tidy up: the last checkpoint must be whole, and be enough."""
    whole = train_run(tmp_path / "whole", key, LONG, steps=60).folder
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    killed, budgets = tmp_path / "killed", steps_of(key, 60)
    process = command("train", key, *FLAGS, "--steps", 60, "--out", killed)
    wait_for(killed / "state.pt", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = load_state(killed / "state.pt")["step"]
    assert reached % 7 == 0 and 0 < reached < list(budgets.values())[-1]
    assert main(["train", key, "--out", str(killed), "--resume"]) == 0
    assert_same_run(key, whole, killed)
    for stage, budget in budgets.items():
        steps = [line["step"] for line in runs_log(killed) if line["stage"] == stage]
        assert steps == sorted({*range(5, budget, 5), budget})
    assert not list(killed.glob("**/*.partial"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(
    number: signal.Signals, command: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = command("train", "ddpm", *FLAGS, "--steps", 100_000, "--out", folder)
    wait_for(folder / "state.pt", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors and str(folder) in errors
    assert "Traceback" not in errors
    assert load_state(folder / "state.pt")["step"] > 0
    assert load_tensors(folder / "model.safetensors")


def test_text_features_reach_the_loop_with_gradient(
    make_stage: Any, shapes: CaptionedDataset
) -> None:
    """Encoders that are trained along must get their gradient through `losses`."""
    with_gradient: list[bool] = []
    for key, stage in STAGES:
        system = make_stage(key, stage)[stage]
        if any(system.text in modules for modules in system.groups().values()):
            original = system.losses

            def losses(
                batch: Batch, text: TextFeatures, noise: NoiseStreams, call: Any = original
            ) -> Iterator[Any]:
                with_gradient.append(text.sentence.requires_grad)
                return call(batch, text, noise)

            system.losses = losses  # type: ignore[method-assign]
            trainer = trainer_for(system, shapes)
            trainer.advance(trainer.loader.at(0))
    assert with_gradient and all(with_gradient)


def test_groups_share_no_parameters(make_stage: Any) -> None:
    """Two optimisers on one parameter would each undo half of what the other did."""
    for key, stage in STAGES:
        system = make_stage(key, stage)[stage]
        owners = [
            {id(p) for module in modules for p in nn.Module.parameters(module)}
            for modules in system.groups().values()
        ]
        assert sum(map(len, owners)) == len(set().union(*owners)) if owners else True
