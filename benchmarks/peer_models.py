"""Two text-to-image models put together from other libraries, for `peers.py`.

    DiffusersUNet   diffusers' UNet2DConditionModel and schedulers, transformers' CLIP text tower
    GPT2OnCodes     a convolutional autoencoder with the quantiser of vector-quantize-pytorch, and
                    transformers' GPT-2 on its codes

Each is what its libraries' own examples and courses build, at sizes like those of preset `tiny`:
their defaults, their optimisers and rates, float32. `recipe="ours"` changes how the UNet is
trained, and nothing of the network: what it predicts, batch, rate and average are those of our
`ddpm`.

A step is given the share of the budget that is used, because rates and stages follow it.

Axes: B batch, L tokens of text, N = 64 codes of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2LMHeadModel
from vector_quantize_pytorch import VectorQuantize

SIZE = 32
TEXT_LEN = 20  # words, start and end; captions of `shapes` have up to 17 words
PAD, START, END = range(3)


class Peer(Protocol):
    """A model that trains on batches and draws captions."""

    batch_size: int

    def step(self, image: Tensor, captions: Sequence[str], share: float) -> float:
        """Update the weights on a batch; returns the loss.

        Args:
            image: (B, 3, 32, 32) in [-1, 1].
            share: Share of the budget that is used, in [0, 1).
        """
        ...

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, 32, 32) in [-1, 1], one for each caption and seed."""
        ...

    def networks(self) -> dict[str, nn.Module]:
        """The trained parts, by name."""
        ...


def word_tokenizer(captions: Sequence[str]) -> Tokenizer:
    """A token for each word of the captions, padded to `TEXT_LEN`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[START]", "[END]"]
    tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.enable_truncation(TEXT_LEN - 2)
    return tokenizer


def token_ids(tokenizer: Tokenizer, captions: Sequence[str]) -> Tensor:
    """(B, L) int64: start, words, end, padding."""
    rows = [[START, *encoded.ids, END] for encoded in tokenizer.encode_batch(list(captions))]
    return torch.tensor([row + [PAD] * (TEXT_LEN - len(row)) for row in rows])


def picture_noise(seeds: Sequence[int]) -> Tensor:
    """(B, 3, 32, 32) normal numbers; a picture's depend on its seed alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(3, SIZE, SIZE, generator=one) for one in generators])


# --- diffusers --------------------------------------------------------------------------------


class DiffusersUNet:
    """A text-conditional DDPM in pixels from diffusers.

    Args:
        recipe: `usual`, that of diffusers' example `train_text_to_image`: prediction of the noise,
            batches of 16, AdamW at 1e-4 after a warm-up of 500 steps, moving average. The text
            tower comes with weights there, and is trained along here. `ours`: what our `ddpm` does
            at preset `tiny` instead: prediction of x_0, cosine noise, batches of 32, AdamW at 2e-3
            with decay, an average of 0.995.
    """

    SAMPLING_STEPS, GUIDANCE, DROP = 25, 2.0, 0.1

    def __init__(self, captions: Sequence[str], recipe: str = "usual") -> None:
        self.ours = recipe == "ours"
        self.batch_size = 32 if self.ours else 16
        self.tokenizer = word_tokenizer(captions)
        width = 64
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=self.tokenizer.get_vocab_size(),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=TEXT_LEN,
                pad_token_id=PAD,
                bos_token_id=START,
                eos_token_id=END,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 96),
            layers_per_block=1,
            cross_attention_dim=width,
            attention_head_dim=4,  # the number of heads, despite its name
        )
        noise: dict[str, Any] = {"num_train_timesteps": 1000}
        if self.ours:
            noise |= {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
        self.scheduler = DDPMScheduler(**noise)
        self.sampler = DDIMScheduler(**noise)
        self.both = nn.ModuleList([self.unet, self.text])
        self.lr = 2e-3 if self.ours else 1e-4
        self.optimizer = torch.optim.AdamW(self.both.parameters(), self.lr, weight_decay=1e-2)
        self.ema = EMAModel(self.both.parameters(), decay=0.995 if self.ours else 0.9999)
        self.steps = 0

    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text": self.text}

    def words(self, captions: Sequence[str]) -> Tensor:
        """(B, L, width)."""
        return self.text(token_ids(self.tokenizer, captions)).last_hidden_state

    def step(self, image: Tensor, captions: Sequence[str], share: float) -> float:
        self.both.train()
        warmup = min(1.0, (self.steps + 1) / (100 if self.ours else 500))
        decay = 1 - share if self.ours else 1.0
        set_rate(self.optimizer, self.lr * warmup * decay)
        dropped = torch.rand(len(captions)) < self.DROP
        texts = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
        t, eps = torch.randint(1000, (len(image),)), torch.randn_like(image)
        noised = self.scheduler.add_noise(image, eps, t)
        output = self.unet(noised, t, encoder_hidden_states=self.words(texts)).sample
        loss = F.mse_loss(output, image if self.ours else eps)
        update(self.optimizer, loss, self.both)
        self.ema.step(self.both.parameters())
        self.steps += 1
        return loss.item()

    @torch.no_grad()
    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        self.both.eval()
        self.ema.store(self.both.parameters())
        self.ema.copy_to(self.both.parameters())
        x, words = picture_noise(seeds), self.words([*captions, *[""] * len(captions)])
        self.sampler.set_timesteps(self.SAMPLING_STEPS)
        for t in self.sampler.timesteps:
            output = self.unet(torch.cat([x, x]), t, encoder_hidden_states=words).sample
            cond, uncond = output.chunk(2)
            x = self.sampler.step(uncond + self.GUIDANCE * (cond - uncond), t, x).prev_sample
        self.ema.restore(self.both.parameters())
        return x.clamp(-1, 1)


# --- vector-quantize-pytorch and GPT-2 --------------------------------------------------------


class VQAutoencoder(nn.Module):
    """Pictures as 8 x 8 codes of 256, with the quantiser's defaults and its k-means start."""

    def __init__(self, channels: int = 64, code_dim: int = 32, num_codes: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, channels, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(channels, code_dim, 3, 1, 1),
        )
        self.quantiser = VectorQuantize(
            code_dim, num_codes, decay=0.8, commitment_weight=1.0, accept_image_fmap=True,
            kmeans_init=True,
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, channels, 3, 1, 1),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(channels, 3, 4, 2, 1),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction, and the commitment loss."""
        quantised, _, commitment = self.quantiser(self.encoder(image))
        return self.decoder(quantised), commitment

    def codes(self, image: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, N) int64."""
        return self.quantiser(self.encoder(image))[1].flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, N) -> (B, 3, 32, 32)."""
        indices = rearrange(codes, "b (h w) -> b h w", h=math.isqrt(codes.shape[1]))
        return self.decoder(self.quantiser.get_output_from_indices(indices))


class GPT2OnCodes:
    """GPT-2 that continues a caption with the codes of a picture.

    The first 15 % of the budget train the autoencoder (AdamW at 3e-4, as the quantiser's example
    does), the rest GPT-2 with the recipe of the Hugging Face course (AdamW at 5e-4, weight decay
    0.1, a warm-up, then a cosine), without the loss of the caption's words.
    """

    batch_size = 32
    CODEC_SHARE, WARMUP = 0.15, 200

    def __init__(self, captions: Sequence[str]) -> None:
        self.tokenizer = word_tokenizer(captions)
        self.codec = VQAutoencoder()
        self.num_codes = self.codec.quantiser.codebook_size
        self.gpt2 = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=self.num_codes + self.tokenizer.get_vocab_size(),
                n_positions=TEXT_LEN + 64,
                n_embd=128,
                n_layer=5,
                n_head=4,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.codec_optimizer = torch.optim.AdamW(self.codec.parameters(), 3e-4)
        self.optimizer = torch.optim.AdamW(self.gpt2.parameters(), 5e-4, weight_decay=0.1)
        self.steps = 0

    def networks(self) -> dict[str, nn.Module]:
        return {"codec": self.codec, "gpt2": self.gpt2}

    def text_ids(self, captions: Sequence[str]) -> Tensor:
        """(B, L) tokens of the captions, numbered after the codes."""
        return self.num_codes + token_ids(self.tokenizer, captions)

    def step(self, image: Tensor, captions: Sequence[str], share: float) -> float:
        if share < self.CODEC_SHARE:
            self.codec.train()
            reconstruction, commitment = self.codec(image)
            loss = F.l1_loss(reconstruction, image) + commitment.sum()
            update(self.codec_optimizer, loss, self.codec)
            return loss.item()
        self.codec.eval()
        self.gpt2.train()
        progress = (share - self.CODEC_SHARE) / (1 - self.CODEC_SHARE)
        warmup = min(1.0, (self.steps + 1) / self.WARMUP)
        set_rate(self.optimizer, 5e-4 * warmup * 0.5 * (1 + math.cos(math.pi * progress)))
        with torch.no_grad():
            codes = self.codec.codes(image)
        text = self.text_ids(captions)
        ids = torch.cat([text, codes], 1)  # (B, L + N)
        labels = torch.cat([torch.full_like(text, -100), codes], 1)
        loss = self.gpt2(input_ids=ids, labels=labels).loss
        update(self.optimizer, loss, self.gpt2)
        self.steps += 1
        return loss.item()

    @torch.no_grad()
    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        self.codec.eval()
        self.gpt2.eval()
        torch.manual_seed(seeds[0])  # `generate` of transformers draws from the global stream
        text = self.text_ids(captions)
        ids = self.gpt2.generate(
            text,
            attention_mask=torch.ones_like(text),
            do_sample=True,
            top_k=0,
            max_new_tokens=64,
            suppress_tokens=list(range(self.num_codes, self.gpt2.config.vocab_size)),
            pad_token_id=self.num_codes,
        )
        return self.codec.decode(ids[:, TEXT_LEN:]).clamp(-1, 1)


PEERS: dict[str, Callable[[Sequence[str]], Peer]] = {
    "diffusers": DiffusersUNet,
    "diffusers_our_recipe": lambda captions: DiffusersUNet(captions, "ours"),
    "gpt2_on_codes": GPT2OnCodes,
}


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def update(optimizer: torch.optim.Optimizer, loss: Tensor, module: nn.Module) -> None:
    """A step of the optimiser, with gradients clipped to norm 1 as both examples do."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
