"""Optimiser with which the authors of VQGAN, and of latent diffusion, train their autoencoders."""

from __future__ import annotations

from lineage.config import OptimConfig

# A learning rate of 4.5e-6 for each picture of a batch of 12.
AUTHORS_OPTIM = OptimConfig(
    name="adam",
    lr=4.5e-6 * 12,
    beta1=0.5,
    beta2=0.9,
    weight_decay=0.0,
    warmup=0,
    decay="none",
    grad_clip=0.0,
    ema_decay=0.0,
)
