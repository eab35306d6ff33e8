# %% [markdown]
# # 02 · Cut and paste, and the first GAN
#
# **The question.** How were captions drawn before networks could draw? And how did the first
# network that drew from captions learn to follow them?
#
# Two answers: a collage of stored pictures (Zhu et al. 2007, AAAI), and GAN-INT-CLS (Reed et al.
# 2016, [arXiv:1605.05396](https://arxiv.org/abs/1605.05396)). Files explained here:
# [retrieval.py](../lineage/retrieval/retrieval.py),
# [gan_int_cls.py](../lineage/cgan/gan_int_cls.py) and
# [joint_embedding.py](../lineage/cgan/joint_embedding.py).

# %%
import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import lineage
from lineage.cgan.gan_int_cls import Discriminator, Generator
from lineage.course import begin, check, show, slider, source, watch
from lineage.data.contract import to_unit
from lineage.nn.gan import is_mismatched, masked_mean
from lineage.retrieval.retrieval import Index, background, collage, cut_out, lay_out, parse
from lineage.text import make_tokenizer

begin("02_first_gans", minutes=2)

# %% [markdown]
# ## The idea in one figure
#
# Above: pictures that were found, or cut out and pasted together. Below: pictures that a network
# made up.

# %%
memory = lineage.load("pretrained:retrieval")
system = lineage.load("pretrained:gan_int_cls")
captions = [
    "a red circle",
    "a yellow square",
    "a green cross",
    "two blue circles",
    "three red squares",
    "a red square and a blue circle",
    "a green cross left of a yellow square",
    "a blue triangle above a red cross",
]
show([*memory.generate(captions), *system.generate(captions)], [""] * 8 + captions)

# %% [markdown]
# The first row is sharp, but can hold only what was stored. The second is rougher, and everything
# in it is new.
#
# ## By hand
#
# **Finding.** Which stored caption is nearest? A word of every caption says almost nothing, a rare
# one says much. With $N$ captions, $\mathrm{df}(t)$ of them with word $t$, and $\mathrm{tf}(t)$ the
# count of $t$ in a caption:
#
# $$\mathrm{idf}(t) = \log\frac{N + 1}{\mathrm{df}(t) + 1/2}, \qquad
#   v(t) = \mathrm{tf}(t)\,\mathrm{idf}(t)$$

# %%
library = ["a red circle", "a blue circle", "a small red square"]
df = Counter(word for caption in library for word in dict.fromkeys(caption.split()))
idf = {word: math.log((len(library) + 1) / (count + 0.5)) for word, count in df.items()}
print({word: round(value, 2) for word, value in idf.items()})


def vector(caption):
    """tf * idf of each known word."""
    return torch.tensor([caption.split().count(word) * idf[word] for word in idf])


cosines = [F.cosine_similarity(vector("a red square"), vector(one), dim=0) for one in library]
for cosine, caption in zip(cosines, library, strict=True):
    print(f"{cosine:.2f}  {caption}")

# %% [markdown]
# The package never builds these vectors, but agrees.

# %%
tokenizer = make_tokenizer("word", library, vocab_size=100)
ids = [torch.tensor(tokenizer.encode(caption)) for caption in [*library, "a red square"]]
ids = pad_sequence(ids, batch_first=True)  # (4, L)
assert torch.allclose(Index(ids[:3], library).cosines(ids[3]), torch.stack(cosines), atol=1e-5)

# %% [markdown]
# **Judging.** A discriminator gives a logit $s$ to a pair of picture and caption; $D = \sigma(s)$
# is the probability that the pair is right. A plain GAN has two kinds of pair, (real, right) and
# (fake, right). Reed adds a third, (real, wrong): a real picture with the caption of another
# (algorithm 1, line 10):
#
# $$L_D = -\log D(x, h) - \tfrac12 \log(1 - D(x, \hat h)) - \tfrac12 \log(1 - D(\hat x, h))$$
#
# Two discriminators, both sure which pictures are real. One ignores the caption, so that a wrong
# one makes no difference; the other compares.

# %%
logits = {"ignores": (4.0, 4.0, -4.0), "compares": (4.0, -4.0, -4.0)}
for name, triple in logits.items():
    s_r, s_w, s_f = torch.tensor(triple)
    real, wrong, fake = F.softplus(-s_r), F.softplus(s_w) / 2, F.softplus(s_f) / 2
    print(f"{name:12}two kinds {real + fake:.3f}   three kinds {real + wrong + fake:.3f}")

# %% [markdown]
# With two kinds, both are equally good: nothing asks for a comparison. With three, the first one
# pays. (`softplus(-s)` is $-\log D$, and `softplus(s)` is $-\log(1 - D)$, safe for large logits.)
#
# ## The real module: cut and paste
#
# A caption becomes parts, each with a count and a relation to the part before.

# %%
caption = "a yellow square left of two blue circles"
parts = parse(caption)
print(*parts, sep="\n")

# %% [markdown]
# Find a picture for each part, cut out what differs from the colour of the corners, lay out boxes,
# and paste.

# %%
sources = [memory.generate(part.phrase)[0] for part in parts]
objects = [cut_out(image, threshold=40 / 127.5) for image in sources]  # (4, h, w), colour and alpha
boxes = lay_out(parts, 32)
canvas = background(sources[0])[:, None, None].expand(3, 32, 32)
result = collage(objects, boxes, canvas, fill=0.9)

print("objects", [tuple(one.shape) for one in objects])
print("boxes  ", *boxes, sep="\n")
cut = [one[:3] for one in objects]
show([*sources, *cut, result], ["found"] * 2 + ["cut out"] * 2 + ["pasted"])

# %% [markdown]
# The rules that choose between a stored picture and a collage:

# %%
source(type(memory).answer, "index, config, parts", "return self._collage")

# %% [markdown]
# ## The real module: GAN-INT-CLS
#
# The generator reads noise $z$ and a sentence $h$, and grows a picture from 4 x 4.

# %%
source(Generator.forward)

# %% [markdown]
# The discriminator shrinks a picture to 4 x 4; only there does the sentence join.

# %%
source(Discriminator.cond_logits)

# %% [markdown]
# One step, with the line numbers of algorithm 1:

# %%
source(type(system).losses, "x = batch.image", "r1_penalty(s_r, x)")

# %% [markdown]
# The same lines, one after the other, on a batch of six.

# %%
data = lineage.load_dataset("shapes", split="train", size=32)
batch = data.batch(range(6), epochs=[0] * 6, seed=0)
generator, disc = system.generator, system.discriminator
with torch.no_grad():
    x, h = batch.image, system.text.encode(batch.caption).sentence
    h_wrong = h.roll(1, 0)  # the caption of the row before
    mismatched = is_mismatched(batch.caption, x.device)
    z = torch.randn(6, system.config.z_dim, generator=torch.manual_seed(0))
    x_fake = generator(z, h)
    features = disc.features(x)
    s_r, s_w = disc.cond_logits(features, h), disc.cond_logits(features, h_wrong)
    s_f = disc(x_fake, h)
names = {"x": x, "h": h, "z": z, "x_fake": x_fake, "features": features, "s_r": s_r}
print(*(f"{name:10}{tuple(value.shape)}" for name, value in names.items()), sep="\n")
for name, loss in {
    "real": F.softplus(-s_r).mean(),
    "wrong": 1 / 2 * masked_mean(F.softplus(s_w), mismatched),
    "fake": 1 / 2 * F.softplus(s_f).mean(),
}.items():
    print(f"{name:10}{loss:.3f}")

# %%
wrong = [batch.caption[i - 1] for i in range(6)]
labels = [f"{a:+.1f} {text}" for a, text in zip(s_r, batch.caption, strict=True)]
labels += [f"{a:+.1f} {text}" for a, text in zip(s_w, wrong, strict=True)]
labels += [f"{a:+.1f} {text}" for a, text in zip(s_f, batch.caption, strict=True)]
show([*x, *x, *x_fake], labels, columns=6)

# %% [markdown]
# Rows: (real, right), (real, wrong), (fake, right), each with its logit. The generator wants high
# logits in the third row. Look at the green circle: its "wrong" caption, *a circle*, is true.
# Random pairs are wrong most of the time, which is enough.
#
# Its own turn has a second term. A mixture of two sentences lies near sentences that could be true,
# but no picture belongs to it. The discriminator scores it all the same (equation 5, $\beta =
# 1/2$).

# %%
source(type(system).losses, 'terms = {"cond"', 'yield Turn("generator"')

# %% [markdown]
# ## Training it live
#
# First the text encoder, some seconds, as in notebook 01; then the GAN, from random weights. In all
# about a minute.

# %%
wanted = ["a red circle", "a blue square", "a green cross left of a yellow square"]
steps = lineage.training_steps("gan_int_cls", steps=900, settings={"text_share": 0.45})
watched = watch(steps, wanted)

# %% [markdown]
# White paper first, then spots, then their colours; corners come last. The losses do not fall as in
# other training: both sides improve.

# %%
for number, losses in watched.losses[-5:]:
    print(f"step {number:4}", {name.split("/")[1]: round(v, 2) for name, v in losses.items()})

# %% [markdown]
# ## The pretrained run beside it
#
# The same networks, trained for longer ([results/pretrained](../results/pretrained)). Four noises
# for each caption.

# %%
prompts = [caption for caption in wanted for _ in range(4)]
drawn = [one.generate(prompts) for one in (watched.system, system)]
rows = [image for first in (0, 4, 8) for images in drawn for image in images[first : first + 4]]
show(rows, ["live"] * 4 + ["pretrained"] * 4 + [""] * 16)

# %% [markdown]
# ## Looking inside
#
# Sentences are points, and between two of them lie others. Move from one caption to another; the
# noise stays.

# %%
with torch.no_grad():
    start, end = system.text.encode(["a red circle", "a blue square"]).sentence


def between(share):
    """The picture at a share of the way from the first sentence to the second."""
    with torch.no_grad():
        return generator(z[:1], ((1 - share) * start + share * end)[None])[0]


slider(between, "share", [i / 20 for i in range(21)], [0.0, 0.15, 0.3, 0.45, 0.55, 0.7, 0.85, 1.0])

# %% [markdown]
# Does the discriminator compare? Real pictures (rows), and the logit that it gives to each caption
# (columns).

# %%
real = [data[i] for i in (7, 8, 5, 4, 10)]
texts = [example.captions[0] for example in real]
with torch.no_grad():
    features = disc.features(to_unit(torch.stack([example.image for example in real])))
    sentences = system.text.encode(texts).sentence
    table = torch.stack([disc.cond_logits(features, h.expand(5, -1)) for h in sentences], 1)
for text, row in zip(texts, table.tolist(), strict=True):
    print(f"{text:34}", *(f"{value:6.1f}" for value in row))
print("each picture prefers caption", table.argmax(1).tolist())

# %% [markdown]
# ## Where it fails, and what came next
#
# Unseen combinations and relations: the collage above, the GAN below.

# %%
hard = [
    "a yellow circle",
    "a green triangle",
    "two yellow circles",
    "a red circle left of a blue square",
    "a blue square above a red triangle",
    "a red cross above a blue circle",
    "three green triangles",
    "a red square right of a blue circle",
]
show([*memory.generate(hard), *system.generate(hard)], [""] * 8 + hard)

# %% [markdown]
# Pasting puts every known thing in its place, since places are rules. But a yellow circle was never
# stored, and no rule can make one. The GAN knows yellow and knows circles, and draws something
# that is nearly both. But its outlines are rough, two things often change places, and it
# miscounts. Its generator grows everything in one go, from one sentence vector. The next notebook
# draws a rough picture first, then a second one that mends it.
#
# ## Exercises
#
# Each has a check in the next cell.
#
# **1. Cut out** (1 point). A pixel belongs to the object if its largest difference from the
# background, over the three channels, is above `threshold`.


# %%
def object_mask(picture, ground, threshold):
    """True (S, S) on the object. `picture` is (3, S, S), `ground` a colour (3,)."""
    ### BEGIN SOLUTION
    return (picture - ground[:, None, None]).abs().amax(0) > threshold
    ### END SOLUTION


# %%
check.object_mask(object_mask)

# %% [markdown]
# **2. Three kinds of pair** (2 points). $L_D$ from logits: `s_r` of (real, right), `s_w` of (real,
# wrong), `s_f` of (fake, right), each (B,). It must stay finite for logits of 200.


# %%
def matching_aware_loss(s_r, s_w, s_f):
    """L_D, a scalar: means over the batch, summed with the weights of algorithm 1."""
    ### BEGIN SOLUTION
    return F.softplus(-s_r).mean() + (F.softplus(s_w).mean() + F.softplus(s_f).mean()) / 2
    ### END SOLUTION


# %%
check.matching_aware_loss(matching_aware_loss)

# %% [markdown]
# **3. Break** (2 points). Two rows of a batch may have the same caption; then the "wrong" caption
# is right, and must not count. Mean of $-\log(1 - D)$ over rows whose caption differs from that of
# the row before (for row 0: the last row); 0 if there is none.


# %%
def wrong_pair_loss(s_w, captions):
    """A scalar, from logits (B,) of row i with caption i - 1, and the list of B captions."""
    ### BEGIN SOLUTION
    differs = torch.tensor([captions[i] != captions[i - 1] for i in range(len(captions))])
    return (F.softplus(s_w) * differs).sum() / differs.sum().clamp(min=1)
    ### END SOLUTION


# %%
check.wrong_pair_loss(wrong_pair_loss)

# %% [markdown]
# **4. Interpolate** (1 point). Equation 5: `beta` times each sentence, plus the rest times the
# sentence of the row before.


# %%
def mix_sentences(h, beta):
    """Sentences (B, D) of pairs of neighbours."""
    ### BEGIN SOLUTION
    return beta * h + (1 - beta) * h.roll(1, 0)
    ### END SOLUTION


# %%
check.mix_sentences(mix_sentences)

# %% [markdown]
# **5. Predict** (2 points). For one pair, the three kinds have densities `p_r`, `p_w` and `p_f`.
# Which $D$ makes $-p_r \log D - \tfrac12 p_w \log(1 - D) - \tfrac12 p_f \log(1 - D)$ smallest? What
# is it for perfect fakes (`p_f` is `p_r`), where no wrong pair occurs (`p_w` is 0)?


# %%
def best_discriminator(p_r, p_w, p_f):
    """D, of the shape of the densities."""
    ### BEGIN SOLUTION
    return p_r / (p_r + (p_w + p_f) / 2)
    ### END SOLUTION


# %%
check.best_discriminator(best_discriminator)
