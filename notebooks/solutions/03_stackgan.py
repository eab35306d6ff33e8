# %% [markdown]
# # 03 · StackGAN: first the shapes, then the detail
#
# **The question.** A generator that learns large pictures at once loses the caption or the detail.
# How can a GAN draw larger pictures?
#
# Zhang et al. (2016, [arXiv:1612.03242](https://arxiv.org/abs/1612.03242)) draw twice. Stage I
# draws a small picture; stage II takes it and the caption again, corrects it and adds detail. Files
# explained here:
# [stackgan.py](../lineage/cgan/stackgan.py),
# [conditional_discriminator.py](../lineage/nn/conditional_discriminator.py).

# %%
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import lineage
from lineage.cgan.stackgan import StackGANStage
from lineage.course import begin, check, show, slider, source, watch
from lineage.nn.noise import NoiseStreams

begin("03_stackgan", minutes=2)

# %% [markdown]
# ## The idea in one figure
#
# Above: stage I, 16 x 16 pixels. Below: stage II from these pictures, 32 x 32.

# %%
system = lineage.load("pretrained:stackgan")
wanted = ["a red circle", "two blue squares", "a green triangle", "a yellow cross"]
small, large = system.generate(wanted, stage=1), system.generate(wanted)
show([*small, *large], ["stage I"] * 4 + wanted, columns=4)

# %% [markdown]
# ## By hand: a condition with noise
#
# Captions are few points in a wide space; between them the generator has learned nothing.
# Conditioning augmentation replaces each point by a Gaussian, and samples:
#
# $$c = \mu(\varphi_t) + \sigma(\varphi_t) \odot \epsilon, \qquad \epsilon \sim N(0, I)$$
#
# Two captions, a condition of two numbers, five samples each.

# %%
torch.manual_seed(0)
mu = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # (B, C)
logvar = torch.tensor([[0.0, -2.0], [1.0, 0.0]])
eps = torch.randn(5, 2, 2)  # five times (B, C)
c = mu + (logvar / 2).exp() * eps
for row in range(2):
    print(f"caption {row}:", *[f"({a:5.2f}, {b:5.2f})" for a, b in c[:, row].tolist()])

# %% [markdown]
# What keeps $\sigma$ from shrinking to 0? A penalty, equation 2, pulls every Gaussian to the
# standard one:
#
# $$D_{KL}(N(\mu, \sigma^2) \,\|\, N(0, 1)) =
#   -\tfrac{1}{2} \left(1 + \log \sigma^2 - \mu^2 - \sigma^2\right)$$
#
# It is 0 for $\mu = 0$, $\sigma = 1$, and larger everywhere else.

# %%
mus, sigmas = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.1, 0.5, 1.0, 2.0]])
print("columns: sigma 0.1, 0.5, 1, 2; rows: mu 0, 1, 2")
print(-0.5 * (1 + 2 * sigmas.log() - mus**2 - sigmas**2))

# %% [markdown]
# PyTorch knows the same divergence. Do both agree?

# %%
kl = -0.5 * (1 + logvar - mu**2 - logvar.exp())
print(kl)
assert torch.allclose(kl, kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)))

# %% [markdown]
# ## The real module
#
# One linear layer returns $\mu$ and $\log \sigma^2$. The authors' ReLU makes both positive:
# $\sigma$ is never below 1.

# %%
source(type(system.generator.ca_net).forward)

# %% [markdown]
# Stage I starts from noise and condition at 4 x 4, and doubles the side.

# %%
source(type(system.stage1).forward)

# %% [markdown]
# Stage II takes no $z$. It encodes the small picture, repeats the condition at every position, and
# doubles the side until the picture is large.

# %%
source(type(system.generator).forward)

# %% [markdown]
# The same lines, one after the other, on four captions.

# %%
config = system.config
noise = NoiseStreams.for_pictures(0, 4, "cpu")
z, eps, eps2 = (noise.randn(n) for n in (config.z_dim, config.cond_dim, config.cond_dim))
with torch.no_grad():
    sentence = system.text.encode(wanted).sentence
    tiny = system.stage1_image(sentence, z, eps)
    features = system.generator.encoder(tiny)
    c, mu, logvar = system.generator.ca_net(sentence, eps2)
    everywhere = c[:, :, None, None].expand(-1, -1, *features.shape[2:])
    joined = system.generator.hr_joint(torch.cat([features, everywhere], 1))
    image = system.generator.img(system.generator.upsample(system.generator.residual(joined)))

shapes = {"sentence": sentence, "z": z, "stage I": tiny, "features": features, "c": c}
for name, value in {**shapes, "joined": joined, "image": image}.items():
    print(f"{name:10}{tuple(value.shape)}")
assert torch.allclose(image, large, atol=1e-4)

# %% [markdown]
# The discriminator scores three kinds of pairs: a real picture with its own caption, with the next
# row's, and a generated picture. Without the second kind, it could ignore captions.

# %%
source(StackGANStage.losses, "real_features, fake_features", '"fake": 1 / 2')

# %%
data = lineage.load_dataset("shapes", split="train", size=32)
examples = [data[i] for i in (0, 1, 2, 4, 5, 6)]
captions = [example.captions[0] for example in examples]
real = torch.stack([example.image for example in examples]).float() / 127.5 - 1
disc = system.discriminator
with torch.no_grad():
    mu = system.generator.ca_net(system.text.encode(captions).sentence, 0 * eps2[:1])[1]
    real_features, fake_features = disc.features(real), disc.features(system.generate(captions))
    logits = {"real": disc.cond_logits(real_features, mu)}
    logits["wrong"] = disc.cond_logits(real_features[:-1], mu[1:])  # the next row's caption
    logits["fake"] = disc.cond_logits(fake_features, mu)

for name, values in logits.items():
    loss = F.softplus(-values if name == "real" else values).mean()
    print(f"{name:6}{loss:6.2f}  ", *[f"{value:6.1f}" for value in values])

# %% [markdown]
# First the mean loss ($\log 2 \approx 0.69$ is a coin), then the logits. Which kind of pair is the
# hardest?
#
# ## Training it live
#
# Text encoder, stage I, stage II: about a minute. The left half is stage I's.

# %%
shares = {"shares": (0.2, 0.5, 0.3)}
watched = watch(lineage.training_steps("stackgan", steps=800, settings=shares), wanted, looks=5)

# %% [markdown]
# Bright things on white come first; captions hardly show after a minute. Stage II starts from grey
# and soon puts things where stage I has them. **Predict**: can stage II repair a wrong colour?
#
# ## The pretrained run beside it
#
# The same networks, trained for longer ([results/pretrained](../results/pretrained)). Above: live.

# %%
show([*watched.system.generate(wanted), *large], [""] * 4 + wanted, columns=4)

# %% [markdown]
# ## Looking inside: who decides?
#
# Give stage II the small picture of one caption (the row) and the sentence of another (the column).
# Which one does it follow?

# %%
colours = ["a red square", "a green square", "a blue circle", "a yellow circle"]
with torch.no_grad():
    sentence = system.text.encode(colours).sentence
    tiny = system.stage1_image(sentence, z, eps)
    rows = [system.generator(tiny[[i] * 4], sentence, eps2[[0] * 4]) for i in range(4)]
enlarged = F.interpolate(tiny, (32, 32))
images = torch.cat([torch.cat([enlarged[[i]], rows[i].image]) for i in range(4)])
show(images, ["stage I", *colours] * 4, columns=5)

# %% [markdown]
# Colour and place follow the picture, the outline mostly the caption: a wrong colour of stage I
# stays.
#
# Three sources of noise, one at a time, eight pictures of one caption: what does each of them move?

# %%
sentence = system.text.encode(["a red circle"] * 8).sentence
noise = NoiseStreams.for_pictures(1, 8, "cpu")
sources = {"z": config.z_dim, "eps of stage I": config.cond_dim, "eps of stage II": config.cond_dim}
draws = {name: noise.randn(width) for name, width in sources.items()}
images = []
for moved in sources:
    z, eps, eps2 = (x if name == moved else x[[0] * 8] for name, x in draws.items())
    with torch.no_grad():
        images.append(system.generator(system.stage1_image(sentence, z, eps), sentence, eps2).image)
    print(f"{moved:16} deviation of a pixel {images[-1].std(0).mean():.3f}")
show(torch.cat(images), [name for name in sources for _ in range(8)])

# %% [markdown]
# Between two sentences lie conditions that no caption has. Which colours lie there?


# %%
def between(share):
    """The picture between two captions, by the share of the second."""
    other = {"interpolate_to": "a blue square", "interpolate_share": share}
    return system.generate("a red circle", seed=3, **other)[0]


slider(between, "share", [i / 10 for i in range(11)], still=[0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0])

# %% [markdown]
# ## Which change mattered?
#
# The preset `tiny` departs from the paper's recipe. In
# [results/stackgan/switches.md](../results/stackgan/switches.md) each change was taken back alone,
# one run of six minutes each. Share of right colours (shuffled captions: 0.20):
#
# | recipe | colour |
# |---|---|
# | modern | 0.60 |
# | average of weights off | 0.53 |
# | weight of the KL term 2, not 0.02 | 0.27 |
# | learning rate 0.0002, not 0.0012 | 0.18 |
# | R1 penalty off | 0.13 |
# | all as in the paper | 0.10 |
#
# Penalty, learning rate and KL weight all matter; small differences are chance. Hinge loss,
# spectral norm and augmentation gained nothing.
#
# Why the KL weight? Watch $\mu$, the condition of the discriminator.


# %%
def deviation_of_mu(kl_weight):
    """Deviation of mu over captions, every 60 steps of stage I."""
    settings = {"model.kl_weight": kl_weight, "shares": (0.3, 0.6, 0.1)}
    values = []
    for step in lineage.training_steps("stackgan", steps=400, settings=settings):
        if step.stage == "stage1" and step.number % 60 == 0:
            sentence = step.system.text.encode(captions).sentence
            mu = step.system.generator.ca_net(sentence, torch.tensor(0.0))[1]
            values.append(round(mu.std(0).mean().item(), 4))
    return values


for kl_weight in (0.02, 2.0):
    print(f"kl_weight = {kl_weight}: deviation of mu {deviation_of_mu(kl_weight)}")

# %% [markdown]
# With the paper's weight, all captions soon have the same $\mu$: the penalty wins before captions
# show in the pictures. The paper trains for 600 epochs.
#
# ## Where it fails, and what came next
#
# Two things with a relation, eight tries.

# %%
hard = "a red cross left of a blue circle"
show(system.generate([hard] * 8), [hard] + [""] * 7)

# %% [markdown]
# Both colours arrive; which thing has which, and who stands left, is often wrong. Every position
# gets the same vector of the sentence. The next notebook lets each attend to the words.
#
# ## Exercises
#
# Each has a check in the next cell. Tensors: `mu`, `logvar`, `eps` are (B, C), logits are (B,).
#
# **1. Build** (1 point). Conditioning augmentation.


# %%
def augment_condition(mu, logvar, eps):
    """c (B, C), a sample of N(mu, sigma^2); logvar is log sigma^2."""
    ### BEGIN SOLUTION
    return mu + (logvar / 2).exp() * eps
    ### END SOLUTION


# %%
check.augment_condition(augment_condition)

# %% [markdown]
# **2. Build** (2 points). Equation 2 as in the paper: for each caption, the sum over C.


# %%
def condition_kl(mu, logvar):
    """KL divergence (B,) of N(mu, sigma^2) from N(0, I)."""
    ### BEGIN SOLUTION
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
    ### END SOLUTION


# %%
check.condition_kl(condition_kl)

# %% [markdown]
# **3. Build** (2 points). Stage I's discriminator loss: real pairs weigh 1, both other kinds 1/2.
# `wrong_logits` and `mismatched` are (B - 1,); where `mismatched` is 0, captions are the same and
# the pair does not count.


# %%
def stage1_disc_loss(real_logits, wrong_logits, fake_logits, mismatched):
    """The loss, one number; D = sigmoid(logit)."""
    ### BEGIN SOLUTION
    wrong = (F.softplus(wrong_logits) * mismatched).sum() / mismatched.sum().clamp(min=1)
    return F.softplus(-real_logits).mean() + (wrong + F.softplus(fake_logits).mean()) / 2
    ### END SOLUTION


# %%
check.stage1_disc_loss(stage1_disc_loss)

# %% [markdown]
# **4. Predict, then measure** (1 point). Which sides have the features in stage II? The encoder
# halves the side twice, then every block doubles it. 16 to 32 pixels: `[16, 8, 4, 8, 16, 32]`.


# %%
def stage2_sides(stage1_size, size):
    """List of sides, from the small picture to the large one."""
    ### BEGIN SOLUTION
    sides = [stage1_size, stage1_size // 2, stage1_size // 4]
    while sides[-1] < size:
        sides.append(2 * sides[-1])
    return sides
    ### END SOLUTION


# %%
check.stage2_sides(stage2_sides)

# %% [markdown]
# **5. Extend** (2 points). A path from noise `start` to noise `end`: halfway, `(start + end) / 2`
# has only variance 1/2. Blend both so that the variance stays 1.


# %%
def blend_noise(start, end, share):
    """(B, Z): `start` for share 0, `end` for 1, of variance 1 if both are standard normal."""
    ### BEGIN SOLUTION
    return (1 - share) ** 0.5 * start + share**0.5 * end
    ### END SOLUTION


# %%
check.blend_noise(blend_noise)
