# %% [markdown]
# # 04 · AttnGAN: which word belongs where
#
# **The question.** StackGAN gives every position of the picture the same vector of the whole
# sentence. Which colour belongs to which thing? Can a position attend to the words?
#
# Xu et al. (2017, [arXiv:1711.10485](https://arxiv.org/abs/1711.10485)) let it. A second model,
# DAMSM, measures how well regions of a picture and words of a caption match, and trains the
# generator with it. Files explained here: [attngan.py](../lineage/attngan/attngan.py),
# [damsm.py](../lineage/attngan/damsm.py).

# %%
import torch
import torch.nn.functional as F

import lineage
from lineage.attngan.attngan import AttnGAN
from lineage.attngan.damsm import cosine, matching_losses, region_attention, word_similarity
from lineage.course import begin, check, film, show, slider, source, watch
from lineage.data.shapes import COLOURS
from lineage.evaluation.metrics import r_precision
from lineage.evaluation.scorer import clip_scorer
from lineage.evaluation.sections import wrong_captions
from lineage.text.contract import TextFeatures

begin("04_attngan", minutes=2)

# %% [markdown]
# ## The idea in one figure
#
# The first row: one picture at three scales. Below: the same picture, bright where it attends to
# the word.

# %%
system = lineage.load("pretrained:attngan")
film(system, "a blue triangle and a red square")

# %% [markdown]
# ## By hand: attention to words
#
# Each position $j$ has a hidden vector $h_j$, each word a vector $e'_k$. Their products, after a
# softmax over words, are weights; the weighted mean of the words is the context (equation 2):
#
# $$c_j = \sum_k \beta_{jk}\, e'_k, \qquad
#   \beta_{jk} = \frac{\exp(h_j^T e'_k)}{\sum_l \exp(h_j^T e'_l)}$$
#
# Two positions, three words. The third is padding, and must get no weight.

# %%
hidden = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # (N, G)
words = torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 5.0]])  # (L, G)
mask = torch.tensor([True, True, False])  # (L,)

contexts = []
for h in hidden:
    scores = (words[mask] @ h).exp()
    weights = scores / scores.sum()
    contexts.append(weights @ words[mask])
    print("weights", weights, "  context", contexts[-1])

# %% [markdown]
# All positions at once: a score of $-\infty$ becomes a weight of 0. Do both agree?

# %%
weights = (hidden @ words.T).masked_fill(~mask, -torch.inf).softmax(1)  # (N, L)
print(weights)
print(weights @ words)
assert torch.allclose(weights @ words, torch.stack(contexts))

# %% [markdown]
# ## The real module
#
# The same lines for a batch. `project_words` brings the words to the width of the hidden state.

# %%
stage = system.generator.next_stages[0]
source(type(stage.attention).forward, "height, width", "return")

# %% [markdown]
# The generator is a chain: the sentence makes the first hidden state, and each next stage adds what
# the words say, and doubles the side.

# %%
source(type(stage).forward, "context, attention")

# %% [markdown]
# Line by line, on two captions of different length.

# %%
captions = ["a red circle", "a green cross above a yellow square"]
torch.manual_seed(0)
z, eps = torch.randn(2, system.config.z_dim), torch.randn(2, system.config.cond_dim)
generator, text = system.generator, system.text.encode(captions)
with torch.no_grad():
    c, mu, logvar = generator.ca_net(text.sentence, eps)
    hidden = generator.first_stage(z, c)
    context, attention = stage.attention(hidden, text.words, text.mask)
    larger, _ = stage(hidden, text, c)

shapes = {"sentence": text.sentence, "words": text.words, "mask": text.mask, "hidden": hidden}
for name, value in {**shapes, "attention": attention, "context": context, "larger": larger}.items():
    print(f"{name:10}{tuple(value.shape)}")
print("sum over words", attention.sum(1).unique(), "  on padding", attention[0, 3:].max().item())

# %% [markdown]
# ## DAMSM: how well do words and regions match?
#
# Each **word** now attends to the **regions** of a picture: a softmax over words (equation 8), then
# one over regions, sharpened by $\gamma_1$ (equation 9).

# %%
source(region_attention, "scores = ")

# %%
data = lineage.load_dataset("shapes", split="validation", size=32)
pairs = [e for e in (data[i] for i in range(80)) if " of " in e.captions[0]][:4]
captions = [example.captions[0] for example in pairs]
pictures = torch.stack([example.image for example in pairs]).float() / 127.5 - 1
with torch.no_grad():
    text, regions = system.text.encode(captions), system.image_encoder(pictures).regions
    scores, alpha = region_attention(text.words, text.mask, regions, gamma1=4.0)
named = {"words (J, L, D)": text.words, "regions (I, N, D)": regions, "alpha (I, J, L, N)": alpha}
print(*[f"{name:20}{tuple(value.shape)}" for name, value in named.items()], sep="\n")


def lit(image, weights):
    """A picture (3, S, S), bright where weights (N,) of its square regions are large."""
    side = int(len(weights) ** 0.5)
    brightness = (weights / weights.max()).view(1, 1, side, side)
    return (image + 1) * F.interpolate(brightness, image.shape[1:])[0] - 1


tokens = system.text.tokens(captions[0])
lit_by_word = [lit(pictures[0], weights) for weights in alpha[0, 0, : len(tokens)]]
show([pictures[0], *lit_by_word], ["", *tokens], columns=len(tokens) + 1)

# %% [markdown]
# How sharp should it be? Move $\gamma_1$ for the second word: 0 is a mean over all regions.


# %%
def sharpened(gamma1):
    """The first picture, lit by the attention of its caption's second word."""
    return lit(pictures[0], region_attention(text.words, text.mask, regions, gamma1)[1][0, 0, 1])


slider(sharpened, "gamma1", [0, 1, 2, 4, 8, 16, 32], still=[0, 1, 2, 4, 8, 16, 32])

# %% [markdown]
# Each word has a cosine with its context $c_i$. Equation 10 joins them to one number for picture
# $Q$ and caption $D$, a soft maximum:
#
# $$R(Q, D) = \log \sum_i \exp(\gamma_2 \cos(c_i, e_i))$$

# %%
config = system.damsm_config
with torch.no_grad():
    contexts = torch.einsum("ijln,ind->ijld", alpha, regions)
    cosines = cosine(contexts, text.words[None])  # (I, J, L)
    by_hand = ((config.gamma2 * cosines).exp() * text.mask).sum(2).log()
    similarity = word_similarity(config, text.words, text.mask, regions)  # (I, J)
assert torch.allclose(by_hand, similarity, atol=1e-3)
print("\n".join(captions))
print(similarity)

# %% [markdown]
# Row: picture, column: caption. The largest number of each row should stand on the diagonal. The
# loss asks for this in both directions (equations 11 to 13), for words as here and for sentences.

# %%
source(matching_losses, "own = ", "return")

# %% [markdown]
# The generator's loss adds this to what the discriminators of three scales say.

# %%
source(AttnGAN.generator_terms, "for side, disc", "damsm_weight * term")

# %% [markdown]
# ## Training it live
#
# First DAMSM, then the GAN, about a minute.

# %%
wanted = ["a red circle", "two blue squares", "a green cross left of a yellow triangle"]
settings = {"damsm_share": 0.3}
watched = watch(lineage.training_steps("attngan", steps=600, settings=settings), wanted)

# %% [markdown]
# DAMSM takes 180 of the steps; it learns from real pictures, before there is a generator.
# **Predict**: what would the generator gain from a DAMSM that has learned nothing?
#
# ## The pretrained run beside it
#
# The same networks, trained for longer ([results/pretrained](../results/pretrained)). Above: live.

# %%
show([*watched.system.generate(wanted), *system.generate(wanted)], [""] * 3 + wanted, columns=3)

# %% [markdown]
# ## Looking inside: sentence or words?
#
# The sentence enters at the start, the words later. Give the generator the sentence of one caption
# (the row) and the words of another (the column). Which one does it follow?

# %%
mixed = ["a red square", "two green squares", "a blue circle", "three yellow circles"]
text = system.text.encode(mixed)
images = []
for row in range(4):
    other = TextFeatures(text.words, text.mask, text.sentence[[row] * 4], text.ids)
    with torch.no_grad():
        images.append(generator(other, z[[0] * 4], eps[[0] * 4]).images[-1])
blank = torch.ones(1, 3, 32, 32)
labels = [label for caption in mixed for label in (f"sentence: {caption}", *mixed)]
show(torch.cat([torch.cat([blank, row]) for row in images]), labels, columns=5)

# %% [markdown]
# Number and places follow the sentence, colours and outlines follow the words: the first stage
# places things that have no name yet.
#
# Do colour words light up their own things? The mean weight on pixels of the word's colour, and on
# pixels of the other colour, divided by the mean weight everywhere: 1 is chance.

# %%
names = ["red", "green", "blue", "yellow"]
combos = [(a, b) for a in names for b in names if a != b] * 4
pictures, maps = system.attention([f"a {a} circle left of a {b} square" for a, b in combos])
for side, weights in zip(system.sides[1:], maps, strict=True):
    small = F.adaptive_avg_pool2d(pictures, weights.shape[-1])
    own, rival = [], []
    for image, word_maps, pair in zip(small, weights, combos, strict=True):
        rgb = torch.tensor([COLOURS[name] for name in pair]) / 127.5 - 1  # (2, 3)
        near = ((image - rgb[:, :, None, None]).abs().amax(1) < 0.6).float()  # (2, s, s)
        lift = (word_maps[1] * near).sum((1, 2)) / near.sum((1, 2)) / word_maps[1].mean()
        own.append(lift[0]), rival.append(lift[1])
    print(f"for {side} x {side}: own {torch.stack(own).nanmean():.2f}", end="   ")
    print(f"other {torch.stack(rival).nanmean():.2f}")

# %% [markdown]
# ## R-precision
#
# Does the picture retrieve its own caption among 99 others? In the paper, DAMSM compares them. But
# the generator was trained with the same DAMSM; the CLIP that comes with the package has seen
# neither of them, and is fairer.

# %%
examples = [data[i] for i in range(300)]
captions = [example.captions[0] for example in examples]
drawn = system.generate(captions)
real = torch.stack([example.image for example in examples]).float() / 127.5 - 1
scorer = clip_scorer("pretrained:clip")
pool = torch.cat([torch.arange(300)[:, None], wrong_captions(captions)], 1)  # the first is true
with torch.no_grad():
    sentence = system.text.encode(captions).sentence
for name, images in {"real": real, "drawn": drawn, "shuffled": drawn.roll(1, 0)}.items():
    bytes_ = ((images + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        damsm = r_precision(system.image_embedding(images), sentence[pool]).mean()
    other = r_precision(scorer.image(bytes_), scorer.text(captions)[pool]).mean()
    print(f"{name:9} by its own DAMSM {damsm:.2f}   by CLIP {other:.2f}")

# %% [markdown]
# Where DAMSM is kinder to drawn pictures than CLIP, the generator has learned DAMSM,
# not captions. `shuffled` is near chance, 1 in 100.
#
# ## Where it fails, and what came next
#
# Two things and a relation, eight tries.

# %%
hard = "a yellow cross above a green square"
show(system.generate([hard] * 8), [hard] + [""] * 7)

# %%
film(system, hard)

# %% [markdown]
# The eight tries hardly differ: the generator has learned to ignore its noise. Places come from the
# sentence alone, and are often exchanged; words cannot move things. DM-GAN and MirrorGAN went
# further on this road. The next notebooks leave it: a picture becomes a sequence of codes, which a
# transformer predicts like words.
#
# ## Exercises
#
# Each has a check in the next cell. Masks are True where there is a word.
#
# **1. Build** (2 points). Equation 2 for a batch: `hidden` (B, G, H, W), `projected` words
# (B, L, G), `mask` (B, L).


# %%
def word_contexts(hidden, projected, mask):
    """Contexts (B, G, H, W) of all positions."""
    ### BEGIN SOLUTION
    scores = torch.einsum("blg,bghw->blhw", projected, hidden)
    weights = scores.masked_fill(~mask[:, :, None, None], -torch.inf).softmax(1)
    return torch.einsum("blhw,blg->bghw", weights, projected)
    ### END SOLUTION


# %%
check.word_contexts(word_contexts)

# %% [markdown]
# **2. Build** (2 points). Equations 7 to 9 for one picture and one caption without padding: `words`
# (L, D), `regions` (N, D).


# %%
def region_weights(words, regions, gamma1):
    """Attention (L, N) of each word to the regions; each row sums to 1."""
    ### BEGIN SOLUTION
    over_words = (words @ regions.T).softmax(0)
    return (gamma1 * over_words).softmax(1)
    ### END SOLUTION


# %%
check.region_weights(region_weights)

# %% [markdown]
# **3. Build** (2 points). Equation 10 for one pair: `words` and `contexts` are (L, D).


# %%
def caption_score(words, contexts, gamma2):
    """R(Q, D), one number."""
    ### BEGIN SOLUTION
    return (gamma2 * F.cosine_similarity(words, contexts, dim=1)).exp().sum().log()
    ### END SOLUTION


# %%
check.caption_score(caption_score)

# %% [markdown]
# **4. Extend** (1 point). The loss in both directions. `similarity` (B, B) holds
# $\gamma_3 R$ of picture i (row) and caption j; no two captions are the same.


# %%
def pair_loss(similarity):
    """L_1 + L_2, one number."""
    ### BEGIN SOLUTION
    own = torch.arange(len(similarity))
    return F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)
    ### END SOLUTION


# %%
check.pair_loss(pair_loss)

# %% [markdown]
# **5. Predict, then measure** (1 point). A famous defect: the public code flattens (B, positions)
# to rows. Row r belongs to picture `r // positions`, but gets the mask of caption `r % batch`.
# Which share of rows has the right caption's mask?


# %%
def own_mask_share(batch, positions):
    """Share of the rows, from 0 to 1."""
    ### BEGIN SOLUTION
    rows = range(batch * positions)
    return sum(r // positions == r % batch for r in rows) / len(rows)
    ### END SOLUTION


# %%
check.own_mask_share(own_mask_share)
