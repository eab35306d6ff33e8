"""Networks at the papers' sizes: the formula by hand, names turned back, the official numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lineage.attngan.attngan import AttnGANConfig, Generator
from lineage.cgan.stackgan import StackGANConfig, StageTwoGenerator
from lineage.diffusion.networks.dit import DiT, DiTConfig
from lineage.diffusion.networks.unet import UNet, UNetConfig
from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from lineage.nn.conditional_discriminator import Discriminator
from lineage.official import paper_size
from lineage.official.attngan import discriminator_key, generator_key, text_encoder, text_key
from lineage.official.cgan import stackgan_key
from lineage.official.latent import dit_names, dit_rest
from lineage.official.paper_size import NETWORKS, Formula
from lineage.official.unets import unet_names
from lineage.official.verify import as_text, read_reference, verify
from lineage.official.vqvae import autoencoder_key, dvae_key
from lineage.vqvae.dalle import DVAEConfig, DVAEDecoder, DVAEEncoder

REAL = Path(__file__).resolve().parents[3] / "shared" / "reference" / "paper_size.safetensors"
absent = pytest.mark.skipif(
    not REAL.is_file(), reason="the reference files are not beside this checkout"
)


def by_hand(name: str, index: int, salt: int = 0) -> float:
    """One number of the formula, with whole numbers as Python has them."""
    x = (index * 2654435761 + (zlib.crc32(name.encode()) + salt)) % 2**32
    for _ in range(2):
        x ^= x >> 16
        x = x * 0x45D9F3B % 2**32
    x ^= x >> 16
    return x / 2**31 - 1


@pytest.mark.parametrize("salt", [0, 7, 2**32 - 1])
def test_the_formula_by_hand(salt: int) -> None:
    found = Formula(salt, {}).numbers("a.weight", 3, 5, 2)
    assert found.shape == (3, 5, 2) and found.dtype == torch.float64
    assert found.flatten().tolist() == [by_hand("a.weight", i, salt) for i in range(30)]


def test_each_kind_of_weight_has_its_scale() -> None:
    formula = Formula(0, {})
    shape = torch.Size([4, 3, 2])
    u = [by_hand("x.weight", i) for i in range(24)]
    found = formula.weight("x.weight", shape, gain=2.0).flatten().tolist()
    assert found == pytest.approx([2 * value * (3 / 6) ** 0.5 for value in u])
    for key, expected in {
        "n.weight": lambda v: 1 + 0.2 * v,
        "n.bias": lambda v: 0.1 * v,
        "n.running_var": lambda v: 1 + 0.5 * v,
        "n.running_mean": lambda v: 0.1 * v,
    }.items():
        found = formula.weight(key, torch.Size([4]), gain=2.0).tolist()
        assert found == pytest.approx([expected(by_hand(key, i)) for i in range(4)])
    given = formula.given("z", 2, 2).flatten().tolist()
    assert given == pytest.approx([3**0.5 * by_hand("input/z", i) for i in range(4)])


def look(side: int) -> nn.Module:
    return Discriminator(2, 3, side, alone=True)


@pytest.mark.parametrize(
    ("network", "back", "there"),
    [
        (
            lambda: Generator(AttnGANConfig(generator=2, residual=2), 6, 256),
            paper_size.of_generator,
            generator_key,
        ),
        *(
            (lambda s=side: look(s), lambda k, s=side: paper_size.of_discriminator(k, s), None)
            for side in (64, 128, 256, 512)
        ),
        (lambda: text_encoder(9, 5, 6, "lstm"), paper_size.of_text, text_key),
        (
            lambda: StageTwoGenerator(StackGANConfig(generator=16, residual=2), 6, 256),
            paper_size.of_stackgan,
            stackgan_key,
        ),
        (lambda: DVAEEncoder(DVAEConfig(8, 4, 4)), paper_size.of_dvae, dvae_key),
        (lambda: DVAEDecoder(DVAEConfig(8, 4, 4)), paper_size.of_dvae, dvae_key),
        *(
            (
                lambda n=network: n(AutoencoderConfig(32, (1, 2, 2), 1, (8,), 32, 4)),
                lambda key, p=part: paper_size.of_autoencoder(key, 3, p),
                lambda name, p=part: autoencoder_key(name.removeprefix(f"{p}."), 3),
            )
            for network, part in ((lambda c: Encoder(c, 4), "encoder"), (Decoder, "decoder"))
        ),
    ],
    ids=[
        *("generator", "64", "128", "256", "512", "text", "stackgan"),
        *("dvae encoder", "dvae decoder", "encoder", "decoder"),
    ],
)
def test_names_turned_back_are_those_that_are_read(
    network: Callable[[], nn.Module],
    back: Callable[[str], str],
    there: Callable[[str], str] | None,
) -> None:
    """Two maps that were written apart undo each other, key by key."""
    names = list(network().state_dict())
    official = [back(name) for name in names]
    assert len(set(official)) == len(names)
    assert [(there or discriminator_key)(name) for name in official] == names


# --- networks that are filled by a map --------------------------------------------------------


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_each_tensor_is_filled_by_its_official_names(network: str) -> None:
    """As if the official tensors had been made one by one, and read by the map."""
    formula = Formula(3, {"net": 1.5})
    if network == "unet":
        config = UNetConfig(8, (1, 2), 1, (1,), 2, conditioning="transformer", padding=True)
        net: nn.Module = UNet(config, 6, 4)
        names = unet_names(net)  # type: ignore[arg-type]
    else:
        net = DiT(DiTConfig(8, 2, 2, 2, words=0), 5, (3, 4, 4), 6)
        names = dit_names(net)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    paper_size.gathered_by(formula, "net", net, names)
    assert len(names) > 20
    for key, tensor in net.state_dict().items():
        if key not in names:
            assert torch.equal(tensor, before[key]), key
            continue
        shape = torch.Size([len(tensor) // len(names[key]), *tensor.shape[1:]])
        parts = [formula.weight(name, shape, 1.5) for name in names[key]]
        assert torch.equal(tensor, torch.cat(parts).float()), key


def test_two_maps_of_a_dit_leave_nothing_out() -> None:
    """What `dit_names` fills and what `dit_rest` gives are the whole network."""
    net = DiT(DiTConfig(8, 2, 2, 2, words=0), 5, (3, 4, 4), 6)
    rest = {"y_embedder.embedding_table.weight": torch.zeros(5, 8)}
    for number in range(2):
        rest[f"blocks.{number}.attn.qkv.weight"] = torch.zeros(24, 8)
        rest[f"blocks.{number}.attn.qkv.bias"] = torch.zeros(24)
    filled, given = set(dit_names(net)), set(dit_rest(net, rest))
    assert not filled & given and filled | given == set(net.state_dict())


def test_the_largest_dit_has_its_papers_sizes() -> None:
    sizes = paper_size.dit_xl_sizes()
    assert (sizes["depth"], sizes["hidden_size"], sizes["num_heads"]) == (28, 1152, 16)
    assert sizes["patch_size"] == 2 and sizes["input_size"] * 8 == 256 and sizes["learn_sigma"]


@absent
def test_every_network_of_ours_is_asked_for() -> None:
    """Known to the file by its name, with a gain of its own; nothing is built until it is asked
    for."""
    reference = read_reference(REAL)
    asked = {name.rpartition("/")[0] for name in reference.outputs}
    assert set(NETWORKS) <= asked
    outcomes = paper_size.paper_size(reference)
    assert set(outcomes) == set(reference.outputs)
    for name, outcome in outcomes.items():
        ours = name.rpartition("/")[0] in NETWORKS
        assert callable(outcome) if ours else "is not here yet" in str(outcome), name
    assert {"sd_v1_unet", "sd_v1_vae", "DiT-XL/2"} <= set(NETWORKS)
    assert set(NETWORKS) <= set(reference.config["gains"])


@absent
def test_the_excerpts_of_the_file_are_the_formulas() -> None:
    reference = read_reference(REAL)
    formula = Formula(reference.config["salt"], {})
    assert reference.checks
    for name, values in reference.checks.items():
        torch.testing.assert_close(formula.numbers(name, 16), values.double(), rtol=0, atol=1e-6)


@absent
def test_the_official_numbers_are_ours() -> None:
    """Every output of a network that we have; of others it is said that they are missing."""
    (check,) = verify([REAL])
    ours = [o for o in check.outputs if o.name.rpartition("/")[0] in NETWORKS]
    assert {o.name.rpartition("/")[0] for o in ours} == set(NETWORKS)
    assert all(output.passed for output in ours), as_text(check)
    others = [o for o in check.outputs if o not in ours]
    assert all("is not here yet" in output.reason for output in others)
