"""Parts of the page of `lineage app` as HTML: cards of results, frames, rows. All text is escaped.

The colours are those of the page's theme, so that they fit in light and in dark.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from lineage.comparison.app_drawing import Result, Verdict
from lineage.data.contract import to_bytes
from lineage.sheets import data_url, picture
from lineage.system import LabelledImage
from lineage.units import as_seconds

MAX_SIDE = 512  # pixels of a picture on the page

CSS = """
:root { --lineage-right: #15803d; --lineage-wrong: #b91c1c; }
.dark { --lineage-right: #4ade80; --lineage-wrong: #fca5a5; }
.gradio-container { max-width: 88rem !important; margin: 0 auto !important; }
.lineage-cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--card, 9.5rem)), 1fr)); }
.lineage-card { border: 1px solid var(--border-color-primary); border-radius: .5rem;
  padding: .75rem; min-width: 0; background: var(--block-background-fill);
  overflow-wrap: anywhere; }
.lineage-card h3 { font-size: 1rem; line-height: 1.3; margin: 0; }
.lineage-card p { margin: .25rem 0 .5rem; font-size: .85rem; line-height: 1.35; }
.lineage-soft { color: var(--body-text-color-subdued); }
.lineage-pictures { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 5.2rem), 1fr)); }
.lineage-strip { display: grid; gap: .5rem; margin-bottom: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); }
.lineage-frame { display: grid; gap: 1rem; max-width: 36rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 8rem), 1fr)); }
.lineage-figure { margin: 0; min-width: 0; }
.lineage-figure img { width: 100%; max-width: 18rem; display: block; margin: 0; border-radius: 2px;
  image-rendering: pixelated; border: 1px solid var(--border-color-primary); }
.lineage-figure figcaption { font-size: .8rem; margin-top: .3rem; line-height: 1.35;
  overflow-wrap: anywhere; }
.lineage-right { color: var(--lineage-right); font-weight: 600; }
.lineage-wrong { color: var(--lineage-wrong); font-weight: 600; }
.lineage-fault { color: var(--lineage-wrong) !important; margin: 0; }
@media (max-width: 30rem) {  /* all tabs fit, and none is in a menu */
  .tab-container button { padding: 0 .4rem !important; font-size: .85rem !important; }
}
.lineage-status .pending { opacity: 1 !important; }
.lineage-status [data-testid="status-tracker"]:not(:empty) { position: static !important;
  opacity: 1 !important; justify-content: flex-start; align-items: flex-start; }
.lineage-status .progress-text { position: static !important; transform: none !important;
  padding: 0 !important; font-size: .85rem;
  color: var(--body-text-color-subdued) !important; }
.lineage-empty { color: var(--body-text-color-subdued); margin: 0; }
"""


def note(text: str) -> str:
    """A sentence in place of pictures that are not there yet."""
    return str(Markup('<p class="lineage-empty">{}</p>').format(text))


def fault(text: str) -> str:
    """A sentence about what went wrong."""
    return str(Markup('<p class="lineage-fault" role="alert">{}</p>').format(text))


def cards(results: Sequence[Result], caption: str) -> str:
    """Cards of results, side by side as far as the page is wide enough."""
    several = any(len(result.images) > 1 for result in results)
    return str(
        Markup('<div class="lineage-cards" style="--card: {}">{}</div>').format(
            "18rem" if several else "9.5rem",
            Markup().join(_card(result, caption) for result in results),
        )
    )


def _card(result: Result, caption: str) -> Markup:
    run = result.run
    about = f"{run.year}, {as_seconds(result.seconds)}" if result.images else str(run.year)
    parts = [
        Markup("<h3>{}</h3>").format(run.title),
        Markup('<p class="lineage-soft">{}</p>').format(about),
    ]
    if result.error:
        parts.append(Markup(fault(result.error)))
    figures = []
    for number, image in enumerate(result.images):
        below = _verdict(result.verdicts[number]) if result.verdicts else Markup()
        figures.append(_figure(image, f"{caption}, drawn by {run.title}", below))
    parts.append(Markup('<div class="lineage-pictures">{}</div>').format(Markup().join(figures)))
    parts += [Markup('<p class="lineage-soft">{}</p>').format(text) for text in result.notes]
    return Markup('<section class="lineage-card">{}</section>').format(Markup().join(parts))


def _verdict(verdict: Verdict) -> Markup:
    detected = f"detected: {verdict.detected}"
    if verdict.is_right is None:
        return Markup("{}").format(detected)
    if verdict.is_right:
        return Markup('<span class="lineage-right">✓ right</span><br>{}').format(detected)
    wrong = f"✗ wrong: {verdict.wrong}"
    return Markup('<span class="lineage-wrong">{}</span><br>{}').format(wrong, detected)


def _figure(image: Tensor, alt: str, caption: Markup) -> Markup:
    pil = picture(image)
    if max(pil.size) > MAX_SIDE:
        pil.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    html = Markup(
        '<figure class="lineage-figure"><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>'
    )
    return html.format(data_url(pil), alt, caption)


def frame(images: Sequence[LabelledImage]) -> str:
    """The pictures of one step, side by side."""
    return _labelled("lineage-frame", images)


def rows(images: Sequence[Sequence[LabelledImage]]) -> str:
    """Rows of labelled pictures."""
    return "".join(_labelled("lineage-strip", row) for row in images)


def _labelled(name: str, images: Sequence[LabelledImage]) -> str:
    figures = [
        _figure(to_bytes(one.image).cpu(), one.label, Markup("{}").format(one.label))
        for one in images
    ]
    return str(Markup('<div class="{}">{}</div>').format(name, Markup().join(figures)))
