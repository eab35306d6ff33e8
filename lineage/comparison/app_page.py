"""The page of `lineage app`, in gradio: what is on it, and which function answers which button.

What is drawn is in `app_drawing`, the controls in `app_controls`, the cards in `app_html`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from lineage.comparison import app_html
from lineage.comparison.app_controls import MAX_TEXT, Control, controls_of, options_from
from lineage.comparison.app_desk import Desk
from lineage.comparison.app_drawing import (
    MAX_PICTURES,
    MAX_PIXELS,
    Result,
    Wish,
    chosen,
    draw_each,
    repaint_each,
    story_of,
    wish_of,
)
from lineage.comparison.app_parts import EDITOR_SIDE, SCROLL, component, editor, status_line
from lineage.comparison.app_runs import AppRun
from lineage.errors import UserError
from lineage.sheets import picture

QUEUE = "drawing"  # all that draws shares one queue
MAX_WAITING = 32  # drawings in the queue
STATE_SECONDS = 3600  # after which what a session has drawn is forgotten

Values = Mapping[Any, Any]
"""What the components show, by component."""

UNREAD = (
    "All systems are done. The judge cannot read this caption, which is none of the data's "
    "sentences: below each picture is only what it detects."
)
FAILED = (
    f"This has failed. A picture may be no picture, or have more than {MAX_PIXELS / 1e6:.0f} "
    "million pixels; the terminal shows the reason."
)


class Page:
    """The page of some runs.

    Args:
        runs: The runs.
        faults: Sentences about runs that cannot be used.
        examples: Captions to choose from.
        threads: Number of threads on a CPU; None for as many as are free.

    Attributes:
        blocks: The page, to be served.
    """

    def __init__(
        self,
        runs: Sequence[AppRun],
        faults: Sequence[str],
        examples: Sequence[str],
        threads: int | None,
    ) -> None:
        self.runs, self.threads, self.desk = runs, threads, Desk()
        self.controls: list[dict[Any, Control]] = []
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # gradio decodes an upload before it comes here
        with gr.Blocks(
            title="lineage",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(STATE_SECONDS, STATE_SECONDS),
        ) as self.blocks:
            gr.Markdown(
                "# The history of text-to-image, side by side\n"
                "Write a caption, and let the chosen systems draw it, the oldest first."
            )
            for sentence in faults:
                gr.HTML(app_html.fault(f"Left out: {sentence}"), padding=False)
            self.drawn = gr.State([], time_to_live=STATE_SECONDS)
            self.frames = gr.State([], time_to_live=STATE_SECONDS)
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    self._wish(examples)
                with gr.Column(scale=3, min_width=300), gr.Tabs():
                    with gr.Tab("Pictures"):
                        self._pictures()
                    with gr.Tab("How it came about", visible=any(r.shows_how for r in runs)):
                        self._story()
                    with gr.Tab("Repaint", visible=any(r.inpaints or r.continues for r in runs)):
                        self._repainting()
            self._wire()
        self.blocks.queue(default_concurrency_limit=1, max_size=MAX_WAITING)

    # --- what is on the page ----------------------------------------------------------------------

    def _wish(self, examples: Sequence[str]) -> None:
        self.caption = gr.Textbox(
            examples[0] if examples else "",
            label="Caption",
            lines=2,
            max_length=MAX_TEXT,
            placeholder="a red circle left of a blue square",
            elem_id="caption",
        )
        if examples:
            gr.Examples(list(examples), self.caption, label="Captions of the data")
        with gr.Row():
            self.count = gr.Slider(1, MAX_PICTURES, 1, step=1, label="Pictures", min_width=120)
            self.seed = gr.Number(0, label="Seed", precision=0, min_width=120)
        self.draw_button = gr.Button("Draw", variant="primary", elem_id="draw")
        self.systems = gr.CheckboxGroup(
            [(run.label, place) for place, run in enumerate(self.runs)],
            value=list(range(len(self.runs))),
            label="Systems",
            elem_id="systems",
        )
        with gr.Accordion("Options of each system", open=False, elem_id="options"):
            gr.Markdown("What is left as it is, or empty, is as the run has it.")
            for run in self.runs:
                own: dict[Any, Control] = {}
                if controls := controls_of(run):
                    with gr.Accordion(run.label, open=False):
                        own = {component(control): control for control in controls}
                self.controls.append(own)

    def _pictures(self) -> None:
        self.status = status_line("status")
        self.results = gr.HTML(
            app_html.note("The pictures appear here, system by system."),
            padding=False,
            elem_id="results",
        )

    def _story(self) -> None:
        showing = [(run.label, place) for place, run in enumerate(self.runs) if run.shows_how]
        gr.Markdown(
            "How the first picture of the caption and the seed comes about, with default options: "
            "every step of a denoising, the codes in the order in which they are written, or "
            "which words each part of the picture attends to."
        )
        with gr.Row(equal_height=True):
            self.story_system = gr.Dropdown(
                showing,
                value=showing[-1][1] if showing else None,
                label="System",
                elem_id="story-system",
                interactive=True,
            )
            self.story_button = gr.Button("Show", variant="primary", elem_id="show", scale=0)
        self.story_status = status_line("story-status")
        self.step = gr.Slider(1, 2, 1, step=1, label="Step", visible=False, elem_id="step")
        self.story = gr.HTML("", padding=False, elem_id="story")

    def _repainting(self) -> None:
        able = [
            (f"{run.label}: {'repaints' if run.inpaints else 'continues'}", place)
            for place, run in enumerate(self.runs)
            if run.inpaints or run.continues
        ]
        gr.Markdown(
            "Take a picture that was drawn, or upload one, whose centred square is used. Paint "
            "over what is to change, and say in the caption what the picture shall show. Diffusion "
            "models repaint the painted part, or, if nothing is painted, change all of it; models "
            "of codes continue the upper part, whatever is painted."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                self.editor = editor()
            with gr.Column(min_width=300):
                self.source = gr.Dropdown(
                    [], label="Picture that was drawn", elem_id="source", interactive=True
                )
                self.take_button = gr.Button("Take it into the editor", elem_id="take")
                self.painters = gr.CheckboxGroup(
                    able, value=[place for _, place in able], label="Systems", elem_id="painters"
                )
                self.strength = gr.Slider(
                    0.05,
                    1,
                    1.0,
                    step=0.05,
                    label="strength",
                    info="Of systems that repaint: how much may change; 1 is all that is painted.",
                    visible=any(run.inpaints for run in self.runs),
                )
                self.keep = gr.Slider(
                    0,
                    1,
                    0.5,
                    step=0.05,
                    label="keep",
                    info="Of systems that continue: the share that is kept, from above.",
                    visible=any(run.continues for run in self.runs),
                )
        self.repaint_button = gr.Button("Repaint", variant="primary", elem_id="repaint")
        self.repaint_status = status_line("repaint-status")
        self.repainted = gr.HTML("", padding=False, elem_id="repainted")

    # --- which function answers which button ------------------------------------------------------

    def _wire(self) -> None:
        controls = {one for own in self.controls for one in own}
        wish = {self.caption, self.count, self.seed, *controls}
        self._on_click(
            self.draw_button,
            self._draw,
            {*wish, self.systems},
            self.status,
            [self.results, self.drawn, self.source],
        )
        self.caption.submit(None, js="() => document.querySelector('#draw').click()")
        self.draw_button.click(None, js=SCROLL)
        self._on_click(
            self.story_button,
            self._show,
            {self.caption, self.seed, self.story_system},
            self.story_status,
            [self.step, self.frames, self.story],
        )
        self.step.change(
            self._frame,
            [self.step, self.frames],
            self.story,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        self.take_button.click(
            self._take, [self.source, self.drawn], self.editor, queue=False, **_QUIET
        )
        painting = {self.editor, self.painters, self.strength, self.keep}
        self._on_click(
            self.repaint_button,
            self._repaint,
            {*wish, *painting},
            self.repaint_status,
            [self.repainted],
        )
        self.blocks.unload(self._unload)

    def _on_click(
        self,
        button: gr.Button,
        answer: Callable[..., Iterator[dict[Any, Any]]],
        inputs: set[Any],
        status: gr.Markdown,
        outputs: list[Any],
    ) -> None:
        """Let a button queue a drawing; the status says at once whether somebody else draws."""

        def enter(request: gr.Request) -> str:
            return self.desk.enter(str(request.session_hash))

        def serve(values: Values, request: gr.Request) -> Iterator[dict[Any, Any]]:
            visitor = str(request.session_hash)
            self.desk.begin(visitor, "it has just begun")
            try:
                for update in answer(values):
                    if text := update.get(status):
                        self.desk.begin(visitor, text.rstrip("."))
                    yield update
            except UserError as error:
                yield {status: app_html.fault(str(error))}
            finally:
                self.desk.leave(visitor)

        def fail(request: gr.Request) -> str:
            self.desk.leave(str(request.session_hash))
            return app_html.fault(FAILED)

        queued = button.click(enter, None, status, queue=False, **_QUIET).then(
            serve,
            inputs,
            [status, *outputs],
            concurrency_id=QUEUE,
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=[status],
            api_visibility="private",
        )
        queued.failure(fail, None, status, queue=False, **_QUIET)

    def _unload(self, request: gr.Request) -> None:
        self.desk.leave(str(request.session_hash))

    # --- answers ----------------------------------------------------------------------------------

    def _wish_of(self, values: Values, places: Sequence[int]) -> Wish:
        options: dict[int, dict[str, Any]] = {}
        for place in places:
            own = self.controls[place]
            shown = {control.name: values.get(box) for box, control in own.items()}
            options[place] = options_from(list(own.values()), shown)
        return wish_of(
            values.get(self.caption), values.get(self.count), values.get(self.seed), options
        )

    def _draw(self, values: Values) -> Iterator[dict[Any, Any]]:
        runs = chosen(self.runs, values.get(self.systems))
        wish = self._wish_of(values, list(runs))
        for results in self._growing(draw_each(runs, wish, self.threads)):
            yield {
                self.status: _progress(results, list(runs.values()), "draws"),
                self.results: app_html.cards(results, wish.caption),
            }
        if any(one.is_right is None for result in results for one in result.verdicts):
            yield {self.status: UNREAD}
        images = [image for result in results for image in result.images]
        choices = [(name, number) for number, name in enumerate(_names(results))]
        source = gr.Dropdown(choices, value=0 if choices else None)
        yield {self.drawn: images, self.source: source}

    def _growing(self, results: Iterator[Result]) -> Iterator[list[Result]]:
        """All results so far, at first none."""
        sofar: list[Result] = []
        yield sofar
        for result in results:
            sofar.append(result)
            yield sofar

    def _show(self, values: Values) -> Iterator[dict[Any, Any]]:
        place = values.get(self.story_system)
        (run,) = chosen(self.runs, [] if place is None else [place]).values()
        wish = wish_of(values.get(self.caption), 1, values.get(self.seed))
        yield {
            self.story_status: f"{run.title} draws.",
            self.step: gr.Slider(visible=False),
            self.story: "",
        }
        story = story_of(run, wish, self.threads)
        done = {self.story_status: f"{run.label}: {wish.caption}"}
        frames = [app_html.frame(images) for images in story.frames]
        if not frames:
            yield {**done, self.frames: [], self.story: app_html.rows(story.rows)}
            return
        last = len(frames)
        slider = gr.Slider(1, last, last, step=1, label=f"Step, of {last}", visible=True)
        yield {**done, self.frames: frames, self.step: slider, self.story: frames[-1]}

    def _frame(self, step: float, frames: list[str]) -> Any:
        return frames[min(len(frames), max(1, round(step))) - 1] if frames else gr.skip()

    def _take(self, place: int | None, drawn: list[Tensor]) -> Any:
        if place is None or not 0 <= place < len(drawn):
            gr.Info("There is no picture yet: draw one first, or upload one.")
            return gr.skip()
        return picture(drawn[place], EDITOR_SIDE)

    def _repaint(self, values: Values) -> Iterator[dict[Any, Any]]:
        runs = chosen(self.runs, values.get(self.painters))
        wish = self._wish_of(values, list(runs))
        image, mask = picture_and_mask(values.get(self.editor))
        strength, keep = values.get(self.strength), values.get(self.keep)
        results = repaint_each(runs, wish, image, mask, strength, keep, self.threads)
        for sofar in self._growing(results):
            yield {
                self.repaint_status: _progress(sofar, list(runs.values()), "paints"),
                self.repainted: app_html.cards(sofar, wish.caption),
            }


_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def _names(results: Sequence[Result]) -> list[str]:
    """Names of all pictures of some results: `DDPM`, or `DDPM, picture 2`."""
    names = []
    for result in results:
        several = len(result.images) > 1
        for number in range(1, len(result.images) + 1):
            names.append(f"{result.run.title}{f', picture {number}' if several else ''}")
    return names


def _progress(results: Sequence[Result], runs: Sequence[AppRun], verb: str) -> str:
    """`2 of 5 systems are done; DDPM draws.`"""
    done, total = len(results), len(runs)
    if done == total:
        return "Done." if total == 1 else f"All {total} systems are done."
    return f"{done} of {total} systems are done; {runs[done].title} {verb}."


def picture_and_mask(value: Any) -> tuple[Image.Image, Any]:
    """The picture in the editor, and where it is painted over: (height, width), or None.

    Raises:
        UserError: there is no picture.
    """
    background = (value or {}).get("background")
    if background is None or not background.getbbox():
        raise UserError("There is no picture to start from: take a drawn one, or upload one.")
    layers = [np.asarray(layer.convert("RGBA"))[..., 3] > 127 for layer in value["layers"] or ()]
    return background, np.any(layers, axis=0) if layers else None
