"""The catalogue: one row for each system, in historical order. `lineage list` prints it.

    CATALOG     key -> `Row`, oldest first
    lookup      the row of a system that works, or an error that says why it does not
    as_table, as_tree, as_json    the three forms in which it is printed

This module imports plain Python only, so that the list appears at once.

A row's year is the one in which the idea was first public for pictures. Where the paper is of
another year, the row says so. Samplers such as DDIM are not systems and have no row. Neither have
early systems that fit no family here, such as alignDRAW (arXiv:1511.02793).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lineage.errors import UserError, nearest

FAMILIES = ("retrieval", "cgan", "attngan", "clip", "vqvae", "diffusion")
PRESETS = ("smoke", "tiny", "small", "paper")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system.

    Attributes:
        key: Name of the system everywhere: module, recipe, test, notebook, command line.
        title: Common name of the system.
        year: Year in which it was first public.
        paper: Authors, title and place of publication.
        idea: The new idea in one sentence.
        family: Name of the subpackage that contains it.
        builds_on: Keys of the systems that it takes something from, the closest first.
        stages: Names of its training stages, in order.
        presets: Names of the presets at which it works.
        status: `works` or `planned`.
        draws: If true, it draws pictures of captions; CLIP only compares the two.
        adapts: If true, it is an adapter: it is trained on a trained run, its base.
    """

    key: str
    title: str
    year: int
    paper: str
    idea: str
    family: str
    builds_on: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    status: str = "planned"
    draws: bool = True
    adapts: bool = False

    @property
    def works(self) -> bool:
        return self.status == "works"


_ROWS = (
    Row(
        key="retrieval",
        title="Cut and paste",
        year=2007,
        paper="Zhu et al., A Text-to-Picture Synthesis System for Augmenting Communication, "
        "AAAI 2007",
        idea="Find pictures whose captions fit the words and paste them together; nothing is "
        "generated.",
        family="retrieval",
        stages=("index",),
        presets=("smoke", "tiny", "small"),
        status="works",
    ),
    Row(
        key="gan_int_cls",
        title="GAN-INT-CLS",
        year=2016,
        paper="Reed et al., Generative Adversarial Text to Image Synthesis, arXiv:1605.05396",
        idea="A GAN whose generator takes the caption and whose discriminator also rejects real "
        "pictures with the wrong caption.",
        family="cgan",
        stages=("text", "gan"),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="stackgan",
        title="StackGAN",
        year=2016,
        paper="Zhang et al., StackGAN: Text to Photo-realistic Image Synthesis with Stacked "
        "Generative Adversarial Networks, arXiv:1612.03242",
        idea="Draw a small sketch first, then let a second GAN refine it at a higher resolution.",
        family="cgan",
        builds_on=("gan_int_cls",),
        stages=("text", "stage1", "stage2"),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="tac_gan",
        title="TAC-GAN",
        year=2017,
        paper="Dash et al., TAC-GAN - Text Conditioned Auxiliary Classifier Generative "
        "Adversarial Network, arXiv:1703.06412",
        idea="The discriminator also predicts the class of the picture, which stabilises training.",
        family="cgan",
        builds_on=("gan_int_cls",),
        stages=("gan",),
    ),
    Row(
        key="vqvae",
        title="VQ-VAE",
        year=2017,
        paper="van den Oord, Vinyals and Kavukcuoglu, Neural Discrete Representation Learning, "
        "arXiv:1711.00937",
        idea="Encode a picture as a grid of codes from a learnt codebook, then model the codes as "
        "a sequence.",
        family="vqvae",
        stages=("codec", "prior"),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="attngan",
        title="AttnGAN",
        year=2017,
        paper="Xu et al., AttnGAN: Fine-Grained Text to Image Generation with Attentional "
        "Generative Adversarial Networks, arXiv:1711.10485",
        idea="Every region of the picture attends to the words it needs, and a matching model "
        "(DAMSM) compares words with regions.",
        family="attngan",
        builds_on=("stackgan",),
        stages=("damsm", "gan"),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="mirrorgan",
        title="MirrorGAN",
        year=2019,
        paper="Qiao et al., MirrorGAN: Learning Text-to-image Generation by Redescription, "
        "arXiv:1903.05854",
        idea="Describe the generated picture in words again and train so that the caption returns.",
        family="attngan",
        builds_on=("attngan",),
        stages=("damsm", "captioner", "gan"),
    ),
    Row(
        key="dmgan",
        title="DM-GAN",
        year=2019,
        paper="Zhu et al., DM-GAN: Dynamic Memory Generative Adversarial Networks for "
        "Text-to-Image Synthesis, arXiv:1904.01310",
        idea="A memory, written with the words that matter for the first sketch, guides each "
        "refinement.",
        family="attngan",
        builds_on=("attngan",),
        stages=("damsm", "gan"),
    ),
    Row(
        key="ddpm",
        title="DDPM",
        year=2020,
        paper="Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, arXiv:2006.11239",
        idea="Learn to remove noise by least squares, then go from pure noise to a picture in "
        "many small steps.",
        family="diffusion",
        stages=("denoiser",),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="vqgan",
        title="VQGAN",
        year=2020,
        paper="Esser, Rombach and Ommer, Taming Transformers for High-Resolution Image "
        "Synthesis, arXiv:2012.09841",
        idea="Train the codec with an adversarial and a perceptual loss, so that fewer codes "
        "suffice for a transformer.",
        family="vqvae",
        builds_on=("vqvae",),
        stages=("codec", "prior"),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="clip",
        title="CLIP",
        year=2021,
        paper="Radford et al., Learning Transferable Visual Models From Natural Language "
        "Supervision, arXiv:2103.00020",
        idea="Train an image and a text encoder together, so that each picture matches its own "
        "caption in the batch.",
        family="clip",
        stages=("clip",),
        presets=PRESETS,
        status="works",
        draws=False,
    ),
    Row(
        key="dalle",
        title="DALL-E",
        year=2021,
        paper="Ramesh et al., Zero-Shot Text-to-Image Generation, arXiv:2102.12092",
        idea="One transformer takes the tokens of the caption and continues with those of the "
        "picture; CLIP selects the best of many.",
        family="vqvae",
        builds_on=("vqvae", "clip"),
        stages=("codec", "prior"),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="vqgan_clip",
        title="VQGAN+CLIP",
        year=2021,
        paper="Crowson et al., VQGAN-CLIP: Open Domain Image Generation and Editing with Natural "
        "Language Guidance, arXiv:2204.08583 (in use since 2021)",
        idea="Train nothing: optimise the codes of a VQGAN for the CLIP score of the caption.",
        family="clip",
        builds_on=("clip", "vqgan"),
        stages=("clip", "codec"),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="adm",
        title="ADM",
        year=2021,
        paper="Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, "
        "arXiv:2105.05233",
        idea="With a better UNet and the gradient of a classifier of noisy pictures, diffusion "
        "surpasses the best GANs.",
        family="diffusion",
        builds_on=("ddpm",),
        stages=("denoiser",),
    ),
    Row(
        key="cogview",
        title="CogView",
        year=2021,
        paper="Ding et al., CogView: Mastering Text-to-Image Generation via Transformers, "
        "arXiv:2105.13290",
        idea="Keep a large transformer stable in half precision, and rank its pictures by how "
        "well it captions them.",
        family="vqvae",
        builds_on=("dalle",),
        stages=("codec", "prior"),
    ),
    Row(
        key="clipdraw",
        title="CLIPDraw",
        year=2021,
        paper="Frans, Soros and Witkowski, CLIPDraw: Exploring Text-to-Drawing Synthesis through "
        "Language-Image Encoders, arXiv:2106.14843",
        idea="Optimise the strokes of a vector drawing, instead of pixels, for the CLIP score of "
        "the caption.",
        family="clip",
        builds_on=("clip",),
        stages=("clip",),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="glide",
        title="GLIDE",
        year=2021,
        paper="Nichol et al., GLIDE: Towards Photorealistic Image Generation and Editing with "
        "Text-Guided Diffusion Models, arXiv:2112.10741",
        idea="Classifier-free guidance by the caption is better than guidance by CLIP.",
        family="diffusion",
        builds_on=("adm", "clip"),
        stages=("denoiser", "upsampler"),
    ),
    Row(
        key="ldm",
        title="Latent Diffusion",
        year=2021,
        paper="Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, "
        "arXiv:2112.10752",
        idea="Diffuse in the small latent space of an autoencoder, with cross-attention to the "
        "text.",
        family="diffusion",
        builds_on=("adm", "vqgan"),
        stages=("autoencoder", "denoiser"),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="unclip",
        title="unCLIP (DALL-E 2)",
        year=2022,
        paper="Ramesh et al., Hierarchical Text-Conditional Image Generation with CLIP Latents, "
        "arXiv:2204.06125",
        idea="A prior predicts a CLIP image embedding from the caption, and a diffusion decoder "
        "makes a picture of it.",
        family="diffusion",
        builds_on=("glide", "clip"),
        stages=("prior", "denoiser", "upsampler"),
    ),
    Row(
        key="imagen",
        title="Imagen",
        year=2022,
        paper="Saharia et al., Photorealistic Text-to-Image Diffusion Models with Deep Language "
        "Understanding, arXiv:2205.11487",
        idea="A frozen large language model as the text encoder, and a cascade of pixel "
        "diffusion models with strong guidance.",
        family="diffusion",
        builds_on=("glide",),
        stages=("denoiser", "upsampler"),
    ),
    Row(
        key="parti",
        title="Parti",
        year=2022,
        paper="Yu et al., Scaling Autoregressive Models for Content-Rich Text-to-Image "
        "Generation, arXiv:2206.10789",
        idea="Text to picture as translation: a text encoder and a decoder of image tokens, "
        "scaled to 20 billion parameters.",
        family="vqvae",
        builds_on=("dalle", "vqgan"),
        stages=("codec", "prior"),
    ),
    Row(
        key="textual_inversion",
        title="Textual Inversion",
        year=2022,
        paper="Gal et al., An Image is Worth One Word: Personalizing Text-to-Image Generation "
        "using Textual Inversion, arXiv:2208.01618",
        idea="Add a new concept to a frozen model by learning one new word vector from a few "
        "pictures.",
        family="diffusion",
        builds_on=("ldm",),
        stages=("word",),
    ),
    Row(
        key="sd1",
        title="Stable Diffusion 1",
        year=2022,
        paper="Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, "
        "arXiv:2112.10752 (released in August 2022)",
        idea="Latent diffusion with CLIP's frozen text encoder, trained at scale, with weights "
        "that anyone may load.",
        family="diffusion",
        builds_on=("ldm", "clip"),
        stages=("autoencoder", "denoiser"),
    ),
    Row(
        key="dreambooth",
        title="DreamBooth",
        year=2022,
        paper="Ruiz et al., DreamBooth: Fine Tuning Text-to-Image Diffusion Models for "
        "Subject-Driven Generation, arXiv:2208.12242",
        idea="Fine-tune the whole model on a few pictures of one subject, while its own samples "
        "prevent a drift of the class.",
        family="diffusion",
        builds_on=("imagen",),
        stages=("autoencoder", "base", "adapter"),
        presets=PRESETS,
        status="works",
        adapts=True,
    ),
    Row(
        key="sd2",
        title="Stable Diffusion 2",
        year=2022,
        paper="Stability AI, release of November 2022 without a paper of its own; the "
        "v prediction is from Salimans and Ho, arXiv:2202.00512",
        idea="The same latent diffusion with a larger text encoder (OpenCLIP) and, at 768 "
        "pixels, the v prediction.",
        family="diffusion",
        builds_on=("sd1",),
        stages=("autoencoder", "denoiser"),
    ),
    Row(
        key="lora",
        title="LoRA",
        year=2022,
        paper="Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685 "
        "(of 2021; used on picture models since December 2022)",
        idea="Fine-tune a model by adding a small product of two thin matrices to its attention "
        "weights.",
        family="diffusion",
        builds_on=("sd1",),
        stages=("autoencoder", "base", "adapter"),
        presets=PRESETS,
        status="works",
        adapts=True,
    ),
    Row(
        key="dit",
        title="DiT",
        year=2022,
        paper="Peebles and Xie, Scalable Diffusion Models with Transformers, arXiv:2212.09748",
        idea="A plain transformer over latent patches, conditioned by adaptive layer norm, in "
        "place of the UNet.",
        family="diffusion",
        builds_on=("ldm",),
        stages=("autoencoder", "denoiser"),
        presets=PRESETS,
        status="works",
    ),
    Row(
        key="muse",
        title="Muse",
        year=2023,
        paper="Chang et al., Muse: Text-To-Image Generation via Masked Generative Transformers, "
        "arXiv:2301.00704",
        idea="Predict many masked image tokens at a time, so that a picture takes few steps.",
        family="vqvae",
        builds_on=("vqgan",),
        stages=("codec", "prior", "upsampler"),
    ),
    Row(
        key="stylegan_t",
        title="StyleGAN-T",
        year=2023,
        paper="Sauer et al., StyleGAN-T: Unlocking the Power of GANs for Fast Large-Scale "
        "Text-to-Image Synthesis, arXiv:2301.09515",
        idea="GANs return: a style-based generator and discriminators on frozen features, guided "
        "by CLIP, in one step.",
        family="cgan",
        builds_on=("gan_int_cls", "clip"),
        stages=("gan",),
    ),
    Row(
        key="controlnet",
        title="ControlNet",
        year=2023,
        paper="Zhang, Rao and Agrawala, Adding Conditional Control to Text-to-Image Diffusion "
        "Models, arXiv:2302.05543",
        idea="A trainable copy of the encoder, joined by convolutions that start at zero, adds "
        "edges, depth or poses to a frozen model.",
        family="diffusion",
        builds_on=("sd1",),
        stages=("adapter",),
    ),
    Row(
        key="gigagan",
        title="GigaGAN",
        year=2023,
        paper="Kang et al., Scaling up GANs for Text-to-Image Synthesis, arXiv:2303.05511",
        idea="Filters chosen from a bank for each sample, with attention, let a GAN grow to a "
        "billion parameters.",
        family="cgan",
        builds_on=("gan_int_cls", "clip"),
        stages=("gan", "upsampler"),
    ),
    Row(
        key="sdxl",
        title="SDXL",
        year=2023,
        paper="Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image "
        "Synthesis, arXiv:2307.01952",
        idea="A UNet three times larger with two text encoders, conditioned on the size and crop "
        "of each training picture.",
        family="diffusion",
        builds_on=("sd1",),
        stages=("autoencoder", "denoiser", "refiner"),
    ),
    Row(
        key="ip_adapter",
        title="IP-Adapter",
        year=2023,
        paper="Ye et al., IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image "
        "Diffusion Models, arXiv:2308.06721",
        idea="With a second cross-attention beside the one to the text, a picture is the prompt.",
        family="diffusion",
        builds_on=("sd1", "clip"),
        stages=("adapter",),
    ),
    Row(
        key="pixart_alpha",
        title="PixArt-alpha",
        year=2023,
        paper="Chen et al., PixArt-alpha: Fast Training of Diffusion Transformer for "
        "Photorealistic Text-to-Image Synthesis, arXiv:2310.00426",
        idea="A diffusion transformer with cross-attention to text, trained in stages at a small "
        "share of the usual cost.",
        family="diffusion",
        builds_on=("dit",),
        stages=("autoencoder", "denoiser"),
    ),
    Row(
        key="sd3",
        title="Stable Diffusion 3",
        year=2024,
        paper="Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image "
        "Synthesis, arXiv:2403.03206",
        idea="Straight paths from noise to picture (rectified flow) and a transformer in which "
        "words and patches attend to each other.",
        family="diffusion",
        builds_on=("dit", "sdxl"),
        stages=("autoencoder", "denoiser"),
    ),
)

CATALOG: dict[str, Row] = {row.key: row for row in _ROWS}


def working() -> list[str]:
    """Keys of the systems that work, oldest first."""
    return [key for key, row in CATALOG.items() if row.works]


def drawing() -> list[str]:
    """Keys of the working systems that draw pictures, oldest first."""
    return [key for key in working() if CATALOG[key].draws]


def lookup(key: str) -> Row:
    """The row of a system that works.

    Raises:
        UserError: The key is unknown (the nearest names are suggested), or the system is planned.
    """
    if key not in CATALOG:
        close = nearest(key, CATALOG)
        hint = close if close.startswith("did") else "`lineage list` shows every system."
        raise UserError(f"There is no system {key!r}: {hint}")
    row = CATALOG[key]
    if not row.works:
        raise UserError(
            f"{key!r} ({row.title}, {row.year}) is planned and does not work yet; "
            f"these work: {', '.join(working())}."
        )
    return row


def as_table() -> str:
    """The catalogue in lines of at most 80 columns: year, key, title, family, presets."""
    head = ("year", "key", "title", "family", "works at")
    cells = [
        (str(row.year), row.key, row.title, row.family, " ".join(row.presets) or row.status)
        for row in CATALOG.values()
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [head, tuple("-" * width for width in widths), *cells]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*table, "", _tally()])


def as_tree() -> str:
    """The catalogue as a tree: each system is below the first one that it builds on.

    `*` marks those that work; the other systems that it builds on follow a plus sign.
    """
    lines: list[str] = []
    for row in CATALOG.values():
        if not row.builds_on:
            lines += _branch(row, "", "")
    return "\n".join([*lines, "", "* works now. " + _tally()])


def _branch(row: Row, own: str, below: str) -> list[str]:
    """Lines of `row` and its descendants; `own` is the prefix of its line, `below` of theirs."""
    mark = " *" if row.works else ""
    others = "".join(f" + {key}" for key in row.builds_on[1:])
    lines = [f"{own}{row.year} {row.title} ({row.key}){mark}{others}"]
    children = [child for child in CATALOG.values() if child.builds_on[:1] == (row.key,)]
    for child in children:
        last = child is children[-1]
        lines += _branch(
            child, below + ("`-- " if last else "|-- "), below + ("    " if last else "|   ")
        )
    return lines


def _tally() -> str:
    return f"{len(working())} of {len(CATALOG)} systems work; the others are planned."


def as_json() -> list[dict[str, Any]]:
    """The catalogue as plain lists and dictionaries, oldest first."""
    return [
        {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(row).items()}
        for row in CATALOG.values()
    ]
