# %% [markdown]
# # 07 · CLIP: pictures and captions in one space
#
# **The question.** A classifier knows the classes that it was trained on, and no others. Captions
# are everywhere. Can a network learn from captions alone what is in a picture, so that any caption
# can serve as a class?
#
# Radford et al. (2021, [arXiv:2103.00020](https://arxiv.org/abs/2103.00020)) train two towers, one
# for pictures, one for captions. Files quoted here: [clip.py](../lineage/clip/clip.py),
# [image_towers.py](../lineage/clip/image_towers.py),
# [clip_text.py](../lineage/text/clip_text.py), [vqgan_clip.py](../lineage/clip/vqgan_clip.py),
# [clipdraw.py](../lineage/clip/clipdraw.py).

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import SVG, display

import lineage
from lineage.clip import clipdraw, rasteriser
from lineage.clip.clip import CLIP, contrastive_loss
from lineage.clip.image_towers import VisionTransformer
from lineage.clip.prompts import spherical_distance
from lineage.clip.vqgan_clip import VQGANCLIP
from lineage.course import begin, check, film, show, slider, source
from lineage.data.contract import to_bytes, to_unit
from lineage.evaluation.judge import Judge, place_name, verdict
from lineage.evaluation.prompts import make_prompts
from lineage.evaluation.real import PromptSet
from lineage.search import search
from lineage.system import LabelledImage
from lineage.text.clip_text import CLIPTextEncoder, CLIPTextTower
from lineage.text.opposites import opposite

begin("07_clip", minutes=1.5)

# %% [markdown]
# ## The idea in one figure
#
# Each picture and each caption becomes a vector. The numbers are cosines: of each row and each
# column, the picture's own caption has the largest.

# %%
clip = lineage.load("pretrained:clip").requires_grad_(False)
data = lineage.load_dataset("shapes", split="validation", size=32)
examples = [data[i] for i in range(300)]
images = to_unit(torch.stack([one.image for one in examples]))  # (N, 3, 32, 32) in [-1, 1]
captions = [one.captions[0] for one in examples]


# %%
def matrix(model, rows):
    """A table of cosines: pictures along the top, their captions at the left."""
    cosines = model.similarity(images[rows], [captions[row] for row in rows]).T
    _, ax = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    ax.imshow(cosines, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_yticks(range(len(rows)), [captions[row] for row in rows])
    ax.set_xticks([])
    ax.spines[:].set_visible(False)
    for i, row in enumerate(rows):
        inset = ax.inset_axes([i - 0.32, -1.6, 0.64, 0.9], transform=ax.transData)
        inset.imshow((images[row].permute(1, 2, 0) + 1) / 2)
        inset.axis("off")
        for j, value in enumerate(cosines[:, i].tolist()):
            ink = "white" if value > 0.55 else "black"
            ax.text(i, j, f"{value:.2f}", color=ink, ha="center", va="center")


matrix(clip, [0, 1, 2, 3, 4, 6, 7, 11])
plt.show()

# %% [markdown]
# ## By hand
#
# Three pictures and three captions, two numbers each. First give each vector length 1, so that
# products are cosines.

# %%
image = F.normalize(torch.tensor([[2.0, 0.1], [0.2, 1.0], [1.0, 1.0]]), dim=1)
words = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.6, 0.9]]), dim=1)
cosines = image @ words.T
print(cosines)

# %% [markdown]
# Which caption belongs to picture $i$? A softmax over the cosines is a guess, and the right answer
# is caption $i$: a classification whose classes are the $B$ captions of the batch. Those of other
# pictures are its **negatives**: the softmax pushes them away. Then the same for captions. With
# $c_{ij}$, the cosine of picture $i$ and caption $j$, and a factor $s$, the loss is the mean of
# both (figure 3 of Radford et al.; **InfoNCE**, van den Oord et al. 2018):
#
# $$L = -\frac{1}{2B} \sum_i \left(
#   \ln \frac{e^{s c_{ii}}}{\sum_j e^{s c_{ij}}} + \ln \frac{e^{s c_{ii}}}{\sum_j e^{s c_{ji}}}
#   \right)$$
#
# One after the other, then at once. Do both agree? (The second argument of `contrastive_loss` hides
# pairs; none yet.)

# %%
scale, total = 10.0, 0.0
for i in range(3):
    row, column = (scale * cosines[i]).exp(), (scale * cosines[:, i]).exp()
    p_caption, p_picture = row[i] / row.sum(), column[i] / column.sum()
    total -= (p_caption.log() + p_picture.log()) / 2
    print(f"pair {i}: p(caption | picture) {p_caption:.3f}  p(picture | caption) {p_picture:.3f}")
no_mask = torch.zeros(3, 3, dtype=torch.bool)
assert torch.isclose(total / 3, contrastive_loss(scale * cosines, no_mask))

# %% [markdown]
# The scale $s$ matters: a cosine is at most 1, and a softmax over numbers between -1 and 1 stays
# near uniform. **Predict**: at which of the scales 1, 14.3 and 100 is the loss of these cosines
# smallest? And what does a large scale cost if two captions are exchanged?

# %%
exchanged = cosines[:, [1, 0, 2]]
for scale in (1.0, 1 / 0.07, 100.0):
    losses = [contrastive_loss(scale * one, no_mask).item() for one in (cosines, exchanged)]
    print(f"scale {scale:5.1f}   right {losses[0]:.3f}   two exchanged {losses[1]:.3f}")

# %% [markdown]
# A large scale rewards a good model and punishes a bad one. So it is learnt: $s = e^t$, where the
# parameter $t$ starts at $\ln(1 / 0.07)$, and $s$ never exceeds 100, to keep training stable
# (section 2.5 of Radford et al.).
#
# One more thing. In our small world, many pictures of a batch have the same caption:

# %%
train = lineage.load_dataset("shapes", split="train", size=32)
batch = train.batch(range(128), [0] * 128, seed=0)
doubled = [caption for caption in batch.caption if batch.caption.count(caption) > 1]
print(f"{len(doubled)} of 128 captions occur at least twice, such as {doubled[0]!r}")

# %% [markdown]
# The loss would call a true caption false. Such pairs are masked: they are no negatives. (The paper
# uses no mask: among 400 million pairs, equal captions are rare.)
#
# ## The real module
#
# All of that, as it stands in the package. Two lines wait: `degraded` changes nothing here, and
# `_with_opposites` adds columns that are explained below, under "Left of, or right of?". Their
# number is `more`.

# %%
source(CLIP.losses, "pictures =", "per_image =")

# %%
source(contrastive_loss, "target =", "return")

# %% [markdown]
# The image tower is a vision transformer. It cuts a picture into patches, adds a class token, and
# multiplies the output of that token with a matrix. The text tower lets each token attend only to
# earlier ones. Only the last, the **end token**, attends to all, so its output is the vector of the
# caption.

# %%
source(VisionTransformer.forward, "x = self.embed", "return")

# %%
source(CLIPTextTower.pool, "rows =", "return")

# %%
source(CLIPTextEncoder.forward, "states =", "return")

# %% [markdown]
# Without the two lines that wait, one after the other:

# %%
tower, text = clip.image_tower, clip.text.encode(batch.caption)
x = tower.embed(clip.normalise(batch.image))
values = {"image": batch.image, "tokens": x, "words": text.words, "sentence": text.sentence}
for block in tower.blocks:
    x = block(x)
image = F.normalize(tower.norm_post(x[:, 0]) @ tower.proj, dim=-1)
words = F.normalize(text.sentence, dim=-1)
logits = clip.scale() * image @ words.T
same = torch.tensor([[a == b for b in batch.caption] for a in batch.caption])
others = same & ~torch.eye(128, dtype=torch.bool)
for name, value in {**values, "image vectors": image, "logits": logits}.items():
    print(f"{name:14}{tuple(value.shape)}")
print(f"scale {clip.scale():.1f}, loss {contrastive_loss(logits, others):.3f}")

# %% [markdown]
# 17 tokens are a class token and 4 x 4 patches of 8 pixels; 15 are those of the longest caption.
# That tokens and the joint space both have 64 numbers is this preset's choice.
#
# ## Training it live
#
# 250 steps from random weights, about forty seconds. Each row is a caption; a column has the
# picture, of 300 unseen ones, that fits it best so far. **Predict**: what is learnt first, the
# colour, the number or the shape?


# %%
def train_clip(looks, wanted):
    """Train a CLIP, and show the nearest picture of each caption at each look."""
    rows, place = [[] for _ in wanted], display("", display_id=True)
    for step in lineage.training_steps("clip", steps=looks[-1]):
        if step.number in looks:
            with step.trainer.averaged() as model:  # the moving average of the weights
                best = model.similarity(images, wanted).argmax(0)  # (K,)
            for row, caption, i in zip(rows, wanted, best.tolist(), strict=True):
                name = "" if row else f"{caption}: "
                row.append(LabelledImage(f"{name}step {step.number}", images[i]))
            place.update(show(rows, side=64))
    return step.system.requires_grad_(False)


wanted = ["a red circle", "two blue squares", "a green cross left of a yellow triangle"]
young = train_clip([1, 15, 30, 60, 100, 150, 200, 250], wanted)

# %% [markdown]
# Colours come first, since a single patch shows them. Shapes and numbers follow, and change until
# the end.
#
# ## The pretrained run beside it
#
# The same towers, trained for longer ([results/pretrained](../results/pretrained)). How often does
# a picture's own caption have the highest cosine of the 300? And how often does a caption with a
# word of place fit better than the same caption with the opposite word? A guess gives 50 %.

# %%
different = torch.tensor([[a != b for b in captions] for a in captions])
placed = [i for i, caption in enumerate(captions) if opposite(caption)]
turned = [opposite(captions[i]) for i in placed]
print(f"a caption and its opposite: {captions[placed[0]]!r}, {turned[0]!r}")


def report(name, model):
    """Recall of captions, and accuracy of words of place."""
    cosines = model.similarity(images, captions)
    own = cosines.diagonal()
    first = ~((cosines > own[:, None]) & different).any(1)
    place = own[placed] > model.similarity(images[placed], turned).diagonal()
    print(f"{name:11} own caption first {first.float().mean():.0%}   "
          f"better than its opposite {place.float().mean():.0%} of {len(placed)}")  # fmt: skip


report("250 steps", young)
report("pretrained", clip)

# %% [markdown]
# The second number counts captions with left, right, above or below. Keep it in mind.
#
# ## Looking inside
#
# **Any caption is a class.** No training picture shows a yellow circle, but "a yellow circle" is
# one of our 16 classes. Here are pictures of combinations that were never seen in training:

# %%
unseen = lineage.load_dataset("shapes", split="heldout", size=32)
unseen = [one for one in (unseen[i] for i in range(300)) if one.meta["kind"] == "single"]
things = [one.meta["objects"][0] for one in unseen]
seen_by = clip.encode_image(to_unit(torch.stack([one.image for one in unseen])))
vectors = F.normalize(seen_by, dim=-1)  # (N, P)
colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "cross")
pairs = [f"{colour} {shape}" for colour in colours for shape in shapes]


def accuracy(names, truth, templates):
    """Share of pictures whose nearest class is the right one."""
    guess = (vectors @ clip.classifier(names, templates).T).argmax(1).tolist()
    right = [names[g] == t for g, t in zip(guess, truth, strict=True)]
    return sum(right) / len(right)


truth = [f"{thing['colour']} {thing['shape']}" for thing in things]
print("classes unseen in training:", sorted(set(truth)))
print(f"accuracy {accuracy(pairs, truth, ['a {}']):.0%}, by chance {1 / len(pairs):.0%}")

# %% [markdown]
# A harder task: where is the object? The classes are nine places. A caption such as "a red circle
# in the top left" is a **template** with a place filled in. It names some object, for most pictures
# the wrong one. A **prompt ensemble** (section 3.1.4 of Radford et al.) uses many templates, here
# all 16 objects, and averages their unit vectors.

# %%
places = sorted({place_name(thing["x"], thing["y"]) for thing in things})
truth = [place_name(thing["x"], thing["y"]) for thing in things]
every = [f"a {pair} {{}}" for pair in pairs]
single = [accuracy(places, truth, [template]) for template in every]
print(f"one template: {min(single):.0%} to {max(single):.0%}, {sum(single) / 16:.0%} in the mean")
print(f"all 16 together: {accuracy(places, truth, every):.0%}, by chance {1 / len(places):.0%}")
print("the first caption:", every[0].format(places[0]))

# %%
source(CLIP.classifier, "parts =", "return")

# %% [markdown]
# **Search by words.** The vectors of the pictures are computed once; each query is one product.
# `lineage search` does this for a folder of your own.

# %%
gallery = F.normalize(clip.encode_image(images), dim=-1)
names = [str(i) for i in range(len(images))]


def found(query):
    """The picture that fits a query best."""
    return images[search(clip, gallery, names, [query], 1)[0][0].number]


queries = ["green", "three", "a large shape", "bottom left", "a cross above", "red and blue"]
slider(found, "query", queries, still=queries)

# %% [markdown]
# **Words over places.** Compare a caption with each patch's vector (`similarity_map`, which leaves
# out the last attention; second row: white is the best patch of its own picture, black the worst).
# A second way is slower: cover a window, and see how the cosine changes (third row: red where
# covering lowers it, blue where it rises).


# %%
def covered(picture, caption):
    """Change of the cosine, (13, 13), when a window of 8 x 8 pixels is background."""
    windows = []
    for y in range(0, 25, 2):
        for x in range(0, 25, 2):
            one = picture.clone()
            one[:, y : y + 8, x : x + 8] = picture[:, :1, :1]  # the corner is background
            windows.append(one)
    before, after = (clip.similarity(p, [caption]) for p in (picture[None], torch.stack(windows)))
    return (before - after).view(13, 13)


def red_and_blue(change):
    """A map in [-1, 1] as a picture: 1 is red, 0 white, -1 blue."""
    change = change / change.abs().max()
    return 1 - 2 * torch.stack([(-change).clamp(min=0), change.abs(), change.clamp(min=0)])


chosen = [i for i in placed if len({o["colour"] for o in examples[i].meta["objects"]}) == 2][:6]
first = [" ".join(captions[i].split()[:3]) for i in chosen]  # the words of the first object
maps = clip.similarity_map(images[chosen], first)
grey = (maps - maps.amin((1, 2), True)) / (maps.amax((1, 2), True) - maps.amin((1, 2), True))
changes = [red_and_blue(covered(images[i], t)) for i, t in zip(chosen, first, strict=True)]
show([*images[chosen], *(2 * grey[:, None] - 1), *changes], [*first, *[""] * 12], columns=6)

# %% [markdown]
# The patch vectors light up on the *background*. A likely reason: through attention, empty patches
# store what the whole picture shows. Larger CLIPs do so, too (Li et al. 2023,
# [arXiv:2304.05653](https://arxiv.org/abs/2304.05653)). Covering says more, but not enough. Where
# the *other* object is hidden, the words fit better: blue. Where the named one is hidden, they
# should fit worse: red. That holds in some of the pictures only.
#
# **Left of, or right of?** Captions of photographs differ by their nouns, and CLIP is close to a
# **bag of words**: which words occur counts, their order hardly (Yuksekgonul et al. 2023,
# [arXiv:2210.01936](https://arxiv.org/abs/2210.01936)). The loss explains why. A batch teaches a
# word of place where it holds a caption and its opposite. Count those in ten batches:

# %%
with_place = with_opposite = 0
for first_id in range(0, 1280, 128):
    batch = train.batch(range(first_id, first_id + 128), [0] * 128, seed=0)
    false = [opposite(caption) for caption in batch.caption]
    with_place += sum(caption is not None for caption in false)
    with_opposite += sum(caption in batch.caption for caption in false)
print(f"{with_place} of 1280 captions have a word of place.")
print(f"For {with_opposite} of them the opposite is in the same batch.")

# %% [markdown]
# Without such a negative, ignoring the word costs nothing. So each picture gets one more negative:
# its own caption with the word of place reversed (`model.spatial_negatives`; NegCLIP, the remedy of
# the same paper, exchanges words in the same way). `column` has its logit for each picture, and
# minus infinity where there is no opposite:

# %%
source(CLIP._with_opposites, "false =", "return torch.cat")

# %% [markdown]
# Look at the two numbers above again: after 250 steps, the words of place are little better than a
# guess; after long training, they are right almost always. And who has which colour? The recipe
# adds no negatives for that. Exchange the colours of two objects in the caption:

# %%
pairs_of = {
    i: one.meta["objects"]
    for i, one in enumerate(examples)
    if len({o["colour"] for o in one.meta["objects"]}) == 2
    and len({o["shape"] for o in one.meta["objects"]}) == 2
}
own, wrong = [], []
for one, two in pairs_of.values():
    texts = [(one, two), (two, one)]
    phrase = "a {} " + one["shape"] + " and a {} " + two["shape"]
    both = [phrase.format(a["colour"], b["colour"]) for a, b in texts]
    own.append(both[0])
    wrong.append(both[1])
print(f"{own[0]!r} against {wrong[0]!r}")
for name, model in {"250 steps": young, "pretrained": clip}.items():
    a, b = (model.similarity(images[list(pairs_of)], t).diagonal() for t in (own, wrong))
    print(f"{name:11} right for {(a > b).float().mean():.0%} of {len(own)} pictures")

# %% [markdown]
# Who has which colour needs no negatives of its own here, only time: in a world of four colours,
# many other captions of a batch are such negatives. Among photographs they are rare.
#
# ## What it made possible: drawing with a gradient
#
# CLIP draws nothing. But its cosine has a gradient with respect to the picture. In 2021 people
# without a large computer used it: keep CLIP as it is, and change the picture until it fits the
# caption. **Predict**: what will the pixels look like?


# %%
def draw_pixels(wanted, steps=100):
    """Pictures (B, 3, 32, 32) whose pixels climb the cosine."""
    torch.manual_seed(0)
    pixels = (0.1 * torch.randn(len(wanted), 3, 32, 32)).requires_grad_()
    text, adam = clip.encode_text(wanted), torch.optim.Adam([pixels], lr=0.05)
    for _ in range(steps):
        features = clip.encode_image(pixels.clamp(-1, 1))
        (-F.cosine_similarity(features, text).sum()).backward()
        adam.step()
        adam.zero_grad()
    return pixels.detach().clamp(-1, 1)


prompts = {prompt.prompt: prompt for prompt in make_prompts("easy")}
wanted = ["a red circle", "two blue squares", "three green crosses"]
wanted += ["a red triangle and a blue square", "a circle left of a triangle", "a yellow circle"]
judge, drawn = Judge.load(), {"pixels": draw_pixels(wanted)}


# %%
def judged(*names):
    """A row of pictures by each name, with CLIP's cosine and what the judge detects."""
    rows = []
    for name in names:
        cosines = clip.similarity(drawn[name], wanted).diagonal().tolist()
        read = judge.detect(to_bytes(drawn[name]))
        parts = zip(wanted, cosines, read, drawn[name], strict=True)
        rows.append([LabelledImage(f"{text} {c:.2f}: {one}", x) for text, c, one, x in parts])
    return show(rows, side=120)


judged("pixels")

# %% [markdown]
# Below each picture: caption, cosine, and the objects that the **judge** finds. The judge is a
# detector that took no part in this; `?` is a shape that it does not recognise. CLIP gives these
# pictures higher cosines than real ones, and there is nothing to see. Such pictures are
# **adversarial**: gradient steps changed them until a network erred. This happens close to real
# pictures, too. Change each number by at most 6 percent of its range, so that the picture fits
# another caption.

# %%
rows, others = [0, 2, 4, 11], ["a red cross", "a blue cross", "a green circle", "two circles"]
real, own = images[rows], [captions[row] for row in rows]
change = torch.zeros_like(real, requires_grad=True)
for _ in range(40):
    features = clip.encode_image(real + change)
    better = F.cosine_similarity(features, clip.encode_text(others))
    worse = F.cosine_similarity(features, clip.encode_text(own))
    (gradient,) = torch.autograd.grad((better - worse).sum(), change)
    with torch.no_grad():
        change.add_(0.02 * gradient.sign()).clamp_(-0.12, 0.12)
fooled = (real + change.detach()).clamp(-1, 1)
of_own, of_other = (clip.similarity(fooled, t).diagonal().tolist() for t in (own, others))
read = judge.detect(to_bytes(fooled))
labels = [
    f"{a} {cos_a:.2f}, {b} {cos_b:.2f}; the judge: {objects}"
    for a, cos_a, b, cos_b, objects in zip(own, of_own, others, of_other, read, strict=True)
]
show([*real, *fooled], [*own, *labels], columns=4, side=160)

# %% [markdown]
# ### VQGAN+CLIP: let a decoder hold the brush
#
# Crowson et al. (2022, [arXiv:2204.08583](https://arxiv.org/abs/2204.08583)) change the latents of
# a VQGAN, whose decoder can hardly draw noise. CLIP gets many random **cutouts**: crops, turned and
# with noise added. A pattern that deceives CLIP in one of them fails in the others.

# %%
source(VQGANCLIP.optimise, "with torch.enable_grad", "z.copy_")

# %% [markdown]
# The distance inside `prompt_losses` is half the squared *angle*. For opposite vectors (an angle
# near 3.14) the cosine has a gradient near 0; half the squared angle has a large one:

# %%
angle = torch.tensor([0.1, 1.5, 3.1], requires_grad=True)
circle, east = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([1.0, 0.0])
for name, distance in {
    "1 - cosine": 1 - circle @ east,
    "spherical": spherical_distance(circle, east),
}.items():
    (slope,) = torch.autograd.grad(distance.sum(), angle, retain_graph=True)
    print(f"{name:11} distance {distance.detach()}   slope {slope}")

# %%
vqgan_clip = lineage.load("pretrained:vqgan_clip")
film(vqgan_clip, "a red circle")

# %% [markdown]
# Last row: the cutouts of the last step, as CLIP gets them. The loss is no smooth curve, since each
# step has other cutouts.
#
# ### CLIPDraw: a pen instead of pixels
#
# Frans et al. (2021, [arXiv:2106.14843](https://arxiv.org/abs/2106.14843)) change strokes: cubic
# Bezier curves with a width and a colour. A pixel is on a stroke or not, which has no gradient.
# The distance to the curve has one:

# %%
source(rasteriser.bernstein, "s = 1", "return")

# %%
source(rasteriser.soft_coverage, "d = torch", "ramp =")

# %%
source(clipdraw.clipdraw_loss, "loss =")

# %%
pen = lineage.load("pretrained:clipdraw")
film(pen, "a red circle")

# %% [markdown]
# First row: the drawing. Second row: a view of it, in perspective, as CLIP gets it. The result is a
# vector file, sharp at any size:

# %%
(vector,) = pen.svg("a red circle")
SVG(vector.replace('width="512" height="512"', 'width="200" height="200"'))

# %% [markdown]
# ### Who says that it is right?
#
# The same six captions, by all three. A diffusion model, which was *trained* to draw, and real
# pictures stand beside them. `other` is the cosine of the CLIP that you trained above: no picture
# was optimised for it. *Judged right*: the judge finds exactly the objects of the caption.
# **Predict**: which of the three loses most of its cosine with the other CLIP?

# %%
drawn |= {"vqgan_clip": vqgan_clip.generate(wanted), "clipdraw": pen.generate(wanted)}
drawn["ddpm"] = lineage.load("pretrained:ddpm").generate(wanted)
drawn["real"] = to_unit(PromptSet(judge, [prompts[t] for t in wanted], "", 32, seed=0).pictures)
print(f"{'':12}CLIP   other   judged right")
for name, pictures in drawn.items():
    ours, other = (m.similarity(pictures, wanted).diagonal().mean() for m in (clip, young))
    found = judge.detect(to_bytes(pictures))
    right = [verdict(one, prompts[text])["strict"] for one, text in zip(found, wanted, strict=True)]
    print(f"{name:12}{ours:.2f}{other:8.2f}{sum(right):9} of {len(wanted)}")

# %%
judged("vqgan_clip", "clipdraw", "ddpm")

# %% [markdown]
# Rows: VQGAN+CLIP, CLIPDraw, DDPM. A score that was optimised is no measure any more. The pixels
# have the highest cosine, and almost none with the other CLIP. Decoder and pen keep theirs: the
# other CLIP knows colours better than shapes, so blobs of the right colour satisfy it. The judge,
# which reads outlines and counts, seldom agrees. The trained model draws most of what was asked, at
# no higher cosine. So whoever reports a CLIP score should not have optimised it, and should use a
# second measure.
#
# ## Where it fails, and what came next
#
# - **Cosines are no probabilities.** Real pairs have cosines near 0.8 here, near 0.3 in the large
#   CLIP. Compare captions for one picture. A limit for all pictures, as in
#   `lineage data filter --min-similarity`, holds only for one CLIP and one data set.
# - **Words of place** need negatives of their own.
# - **Optimising is slow and blind.** Every picture is a training of its own, and what CLIP never
#   saw pulls in any direction. GLIDE (2021), a diffusion model, was guided by a CLIP of noisy
#   pictures and drew better with guidance that needs no other network (notebook 09). DALL-E
#   (notebook 06) lets CLIP only choose among finished pictures. unCLIP (2022) draws from CLIP's
#   vector of a picture.
# - **The text tower is still used.** Stable Diffusion's cross-attention reads its token vectors. So
#   can the systems of this package: `lineage train ddpm --set text=clip:RUN` takes the tower of a
#   run, frozen.
#
# ## Exercises
#
# Each has a check in the next cell. B pairs, P width of the joint space.
#
# **1. Build** (2 points). The loss $L$ above, for a batch without equal captions. `image` and
# `text` are (B, P) and not yet unit vectors; `scale` is a number.


# %%
def clip_loss(image, text, scale):
    """Mean of both cross-entropies, a scalar."""
    ### BEGIN SOLUTION
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits = scale * image @ text.T  # (B, B)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    ### END SOLUTION


# %%
check.clip_loss(clip_loss)

# %% [markdown]
# **2. Predict, then compute** (1 point). Let each pair have cosine 1, and all others -1. Then the
# loss is a lower bound; with more than two pairs no vectors reach it. What is it for 128 pairs and
# a scale of 1, and of 10? `smallest_loss(128, 1.0)` shows why a scale of 1 is not enough.


# %%
def smallest_loss(num_pairs, scale):
    """The loss, a number, if own cosines are 1 and all others -1."""
    ### BEGIN SOLUTION
    others = (num_pairs - 1) * math.exp(-scale)
    return -math.log(math.exp(scale) / (math.exp(scale) + others))
    ### END SOLUTION


# %%
check.smallest_loss(smallest_loss)

# %% [markdown]
# **3. Mask** (1 point). `logits` (B, B) of pictures and captions. Pairs off the diagonal whose
# captions are equal are no negatives. Return a copy in which they are minus infinity; do not change
# `logits` itself.


# %%
def mask_same(logits, captions):
    """New logits (B, B); `captions` is a list of B texts."""
    ### BEGIN SOLUTION
    same = torch.tensor([[a == b for b in captions] for a in captions])
    same.fill_diagonal_(False)
    return logits.masked_fill(same, -torch.inf)
    ### END SOLUTION


# %%
check.mask_same(mask_same)

# %% [markdown]
# **4. Ensemble** (2 points). `features` (T, K, P) are captions of K classes by T templates, not yet
# unit vectors, and of very different lengths. Average them so that each template has the same
# weight.


# %%
def ensemble(features):
    """A classifier: unit vectors (K, P)."""
    ### BEGIN SOLUTION
    mean = F.normalize(features, dim=-1).mean(0)
    return F.normalize(mean, dim=-1)
    ### END SOLUTION


# %%
check.ensemble(ensemble)

# %% [markdown]
# **5. Draw** (2 points). Coverage of pixels by a stroke of radius $r$ (`radius`, in pixels),
# $\min(1, \max(0, r - d + \frac12))$, where $d$ is the distance of a pixel's centre to the curve
#
# $$B(t) = (1-t)^3 P_0 + 3 (1-t)^2 t\, P_1 + 3 (1-t) t^2 P_2 + t^3 P_3.$$
#
# Compute the N points of the curve at `t` (N,), and take the distance to the nearest of them.
# `points` is (4, 2), the control points $P_0$ to $P_3$; `centres` is (Q, 2).


# %%
def stroke_coverage(points, radius, centres, t):
    """Coverage (Q,) in [0, 1], with a gradient to the points."""
    ### BEGIN SOLUTION
    s = 1 - t
    weights = torch.stack([s**3, 3 * s**2 * t, 3 * s * t**2, t**3], dim=1)  # (N, 4)
    curve = weights @ points  # (N, 2)
    d = (centres[:, None] - curve).norm(dim=2).amin(1)  # (Q,)
    return (radius - d + 0.5).clamp(0, 1)
    ### END SOLUTION


# %%
check.stroke_coverage(stroke_coverage)
