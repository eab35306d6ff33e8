"""What the authors of VQGAN, and after them of latent diffusion, train their autoencoders with."""

from __future__ import annotations

from lineage.config import OptimConfig

# A rate of 4.5e-6 for each picture of a batch of 12.
AUTHORS_OPTIM = OptimConfig(
    "adam",
    lr=4.5e-6 * 12,
    beta1=0.5,
    beta2=0.9,
    weight_decay=0.0,
    warmup=0,
    decay="none",
    clip=0.0,
    average=0.0,
)
