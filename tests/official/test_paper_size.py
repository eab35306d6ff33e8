"""Networks at the papers' sizes: the formula by hand, key maps against their inverses, the official
numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lineage.attngan.attngan import AttnGANConfig, Generator
from lineage.cgan.stackgan import StackGANConfig, StageTwoGenerator
from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.official import paper_size
from lineage.official.attngan import discriminator_key, generator_key, text_encoder, text_key
from lineage.official.dalle import dvae_key
from lineage.official.paper_size import NETWORKS, Formula
from lineage.official.reference import read_reference
from lineage.official.stackgan import stackgan_key
from lineage.official.verify import as_text, verify
from lineage.official.vqgan import autoencoder_key
from lineage.vqvae.dalle import DVAEConfig, DVAEDecoder, DVAEEncoder

OFFICIAL = Path(__file__).resolve().parents[3] / "shared" / "reference" / "paper_size.safetensors"
needs_reference = pytest.mark.skipif(
    not OFFICIAL.is_file(), reason="the reference files are not beside this checkout"
)


def number_by_hand(name: str, index: int, salt: int = 0) -> float:
    """One number of the formula, in Python's integers."""
    x = (index * 2654435761 + (zlib.crc32(name.encode()) + salt)) % 2**32
    for _ in range(2):
        x ^= x >> 16
        x = x * 0x45D9F3B % 2**32
    x ^= x >> 16
    return x / 2**31 - 1


@pytest.mark.parametrize("salt", [0, 7, 2**32 - 1])
def test_formula_against_one_number_at_a_time(salt: int) -> None:
    numbers = Formula(salt, {}).numbers("a.weight", 3, 5, 2)
    assert numbers.shape == (3, 5, 2) and numbers.dtype == torch.float64
    expected = [number_by_hand("a.weight", i, salt) for i in range(30)]
    assert numbers.flatten().tolist() == expected


def test_each_kind_of_weight_has_its_scale() -> None:
    formula = Formula(0, {})
    weight = formula.weight("x.weight", torch.Size([4, 3, 2]), gain=2.0).flatten().tolist()
    u = [number_by_hand("x.weight", i) for i in range(24)]
    assert weight == pytest.approx([2 * value * (3 / 6) ** 0.5 for value in u])
    for key, expected in {
        "n.weight": lambda v: 1 + 0.2 * v,
        "n.bias": lambda v: 0.1 * v,
        "n.running_var": lambda v: 1 + 0.5 * v,
        "n.running_mean": lambda v: 0.1 * v,
    }.items():
        vector = formula.weight(key, torch.Size([4]), gain=2.0).tolist()
        assert vector == pytest.approx([expected(number_by_hand(key, i)) for i in range(4)])
    z = formula.input("z", 2, 2).flatten().tolist()
    assert z == pytest.approx([3**0.5 * number_by_hand("input/z", i) for i in range(4)])


def discriminator(side: int) -> nn.Module:
    return ConditionalDiscriminator(2, 3, side, unconditional=True)


@pytest.mark.parametrize(
    ("network", "to_official", "to_ours"),
    [
        (
            lambda: Generator(AttnGANConfig(gen_channels=2, num_res_blocks=2), 6, 6, 256),
            paper_size.of_generator,
            generator_key,
        ),
        *(
            (
                lambda s=side: discriminator(s),
                lambda key, s=side: paper_size.of_discriminator(key, s),
                discriminator_key,
            )
            for side in (64, 128, 256, 512)
        ),
        (lambda: text_encoder(9, 5, 6, "lstm"), paper_size.of_text, text_key),
        (
            lambda: StageTwoGenerator(StackGANConfig(gen_channels=16, num_res_blocks=2), 6, 256),
            paper_size.of_stackgan,
            stackgan_key,
        ),
        (
            lambda: DVAEEncoder(SMALL_DVAE),
            paper_size.of_dvae,
            dvae_key,
        ),
        (
            lambda: DVAEDecoder(SMALL_DVAE),
            paper_size.of_dvae,
            dvae_key,
        ),
        *(
            (
                network,
                lambda key, p=part: paper_size.of_autoencoder(key, 3, p),
                lambda name, p=part: autoencoder_key(name.removeprefix(f"{p}."), 3),
            )
            for network, part in (
                (lambda: Encoder(SMALL_AUTOENCODER, 4), "encoder"),
                (lambda: Decoder(SMALL_AUTOENCODER), "decoder"),
            )
        ),
    ],
    ids=[
        *("generator", "64", "128", "256", "512", "text", "stackgan"),
        *("dvae encoder", "dvae decoder", "encoder", "decoder"),
    ],
)
def test_the_two_key_maps_undo_each_other(
    network: Callable[[], nn.Module],
    to_official: Callable[[str], str],
    to_ours: Callable[[str], str],
) -> None:
    """`verify` and `import-weights` read by one map; the formula writes by the other."""
    names = list(network().state_dict())
    official = [to_official(name) for name in names]
    assert len(set(official)) == len(names)
    assert [to_ours(name) for name in official] == names


SMALL_DVAE = DVAEConfig(num_codes=8, hidden_channels=4, init_channels=4)
SMALL_AUTOENCODER = AutoencoderConfig(
    channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attn_resolutions=(8,),
    resolution=32,
    z_channels=4,
)


# --- the file ------------------------------------------------------------------------------------


@needs_reference
def test_the_excerpts_in_the_file_are_the_formulas() -> None:
    reference = read_reference(OFFICIAL)
    formula = Formula(reference.config["salt"], {})
    assert reference.checks
    for name, values in reference.checks.items():
        torch.testing.assert_close(formula.numbers(name, 16), values.double(), rtol=0, atol=1e-6)


@needs_reference
def test_the_official_numbers_are_ours() -> None:
    """Every output of a network that we have passes; of the others, the reason says so."""
    (check,) = verify([OFFICIAL])
    ours = [o for o in check.outputs if o.name.rpartition("/")[0] in NETWORKS]
    assert {o.name.rpartition("/")[0] for o in ours} == set(NETWORKS)
    assert all(output.passed for output in ours), as_text(check)
    others = [o for o in check.outputs if o not in ours]
    assert all("is not here yet" in output.reason for output in others)
