"""Published code and checkpoints, held against the classes of this package.

    SOURCES     how a reference file of each system is known by the official code it names
    VERIFIERS   which of them our classes can answer; a family adds its line here

A verifier is a function in a module of key maps, named as "module:function" so that only what a
file needs is imported:

    def stackgan(reference: Reference) -> Outputs: ...      # see `verify.py`
    VERIFIERS["stackgan"] = "lineage.official.cgan:stackgan"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from lineage.official.verify import Reference

Outcome: TypeAlias = "Tensor | float | str | Callable[[], Tensor | float]"
"""What a verifier gives for one output: the value; a function that computes it, called only if the
file asks for that output; or, as a string, the reason why it is not computed."""

Outputs: TypeAlias = Mapping[str, Outcome]
"""Outcomes by the output's name, without `output/`. Names that the file lacks are ignored."""

Verifier: TypeAlias = "Callable[[Reference], Outputs]"

SOURCES: dict[str, tuple[str, ...]] = {
    "stackgan": ("hanzhanggit/StackGAN",),
    "attngan": ("taoxugit/AttnGAN",),
    "dmgan": ("MinfengZhu/DM-GAN",),
    "mirrorgan": ("qiaott/MirrorGAN",),
    "clip_openai": ("openai/CLIP",),
    "clip_hf_text": ("huggingface/transformers", "CLIPTextModel"),
    "vq_ema": ("lucidrains/vector-quantize-pytorch",),
    "taming_vqgan": ("CompVis/taming-transformers", "vqgan.py"),
    "taming_mingpt": ("CompVis/taming-transformers", "mingpt.py"),
    "dalle_dvae": ("openai/DALL-E",),
    "gpt2": ("huggingface/transformers", "GPT2LMHeadModel"),
    "guided_diffusion": ("openai/guided-diffusion", "gaussian_diffusion.py"),
    "adm_unet": ("openai/guided-diffusion", "unet.py"),
    "glide_text2im": ("openai/glide-text2im",),
    "ldm_unet": ("CompVis/latent-diffusion", "openaimodel.py"),
    "ldm_vae": ("CompVis/latent-diffusion", "autoencoder.py"),
    "ldm_bert": ("CompVis/latent-diffusion", "x_transformer.py"),
    "dit": ("facebookresearch/DiT",),
    "sd3_mmdit": ("diffusers", "SD3Transformer2DModel"),
    "diffusers_schedulers": ("huggingface/diffusers",),
    "k_diffusion": ("crowsonkb/k-diffusion",),
    "metrics": ("pytorch-fid",),
    "paper_size": ("official repositories",),
}
"""Words that all stand in the `source` of a system's reference files. The longest match wins."""

VERIFIERS: dict[str, str | Verifier] = {
    "metrics": "lineage.official.metrics:verify_metrics",
    "stackgan": "lineage.official.cgan:stackgan",
    "attngan": "lineage.official.attngan:attngan",
    "gpt2": "lineage.official.vqvae:gpt2",
    "taming_mingpt": "lineage.official.vqvae:mingpt",
    "taming_vqgan": "lineage.official.vqvae:taming_vqgan",
    "dalle_dvae": "lineage.official.vqvae:dalle_dvae",
    "vq_ema": "lineage.official.vqvae:vq_ema",
    "guided_diffusion": "lineage.official.diffusion:guided_diffusion",
    "k_diffusion": "lineage.official.diffusion:k_diffusion",
    "diffusers_schedulers": "lineage.official.schedulers:diffusers_schedulers",
    "adm_unet": "lineage.official.unets:adm_unet",
    "glide_text2im": "lineage.official.unets:glide_text2im",
    "ldm_unet": "lineage.official.latent:ldm_unet",
    "ldm_vae": "lineage.official.latent:ldm_vae",
    "ldm_bert": "lineage.official.latent:ldm_bert",
    "dit": "lineage.official.latent:dit",
    "paper_size": "lineage.official.paper_size:paper_size",
}
"""The systems that are covered, each by its verifier or by "module:function"."""
