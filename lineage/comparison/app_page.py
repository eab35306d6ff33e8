"""The page of `lineage app`, in gradio: what is on it, and which function answers which button.

What is drawn is in `app_drawing`, the controls in `app_controls`, the cards in `app_html`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from lineage.comparison import app_html
from lineage.comparison.app_controls import MAX_TEXT, Control, controls_of, options_from
from lineage.comparison.app_drawing import (
    MAX_PICTURES,
    MAX_PIXELS,
    DrawRequest,
    Result,
    draw_each,
    draw_request,
    repaint_each,
    runs_at,
    visualisation_of,
)
from lineage.comparison.app_parts import EDITOR_SIDE, SCROLL, component, editor, status_line
from lineage.comparison.app_queue import DrawingQueue
from lineage.comparison.app_runs import AppRun
from lineage.comparison.app_sessions import Session, Sessions
from lineage.errors import UserError
from lineage.sheets import picture

QUEUE = "drawing"  # all that draws shares one queue
MAX_WAITING = 32  # drawings in the queue
FILE_SECONDS = 3600  # after which uploads are deleted

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
        self.runs, self.threads = runs, threads
        self.queue, self.sessions = DrawingQueue(), Sessions()
        self.controls: list[dict[Any, Control]] = []
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # gradio decodes an upload before it comes here
        with gr.Blocks(
            title="lineage",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(FILE_SECONDS, FILE_SECONDS),
        ) as self.blocks:
            gr.Markdown(
                "# The history of text-to-image, side by side\n"
                "Write a caption, and let the chosen systems draw it, the oldest first."
            )
            for sentence in faults:
                gr.HTML(app_html.fault(f"Left out: {sentence}"), padding=False)
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    self._inputs(examples)
                with gr.Column(scale=3, min_width=300), gr.Tabs():
                    with gr.Tab("Pictures"):
                        self._pictures()
                    with gr.Tab("How it came about", visible=any(r.shows_how for r in runs)):
                        self._process()
                    with gr.Tab("Repaint", visible=any(r.inpaints or r.continues for r in runs)):
                        self._repainting()
            self._wire()
        self.blocks.queue(default_concurrency_limit=1, max_size=MAX_WAITING)

    # --- what is on the page ----------------------------------------------------------------------

    def _inputs(self, examples: Sequence[str]) -> None:
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

    def _process(self) -> None:
        showing = [(run.label, place) for place, run in enumerate(self.runs) if run.shows_how]
        gr.Markdown(
            "How the first picture of the caption and the seed comes about, with default options: "
            "every step of a denoising, the codes in the order in which they are written, or "
            "which words each part of the picture attends to."
        )
        with gr.Row(equal_height=True):
            self.process_system = gr.Dropdown(
                showing,
                value=showing[-1][1] if showing else None,
                label="System",
                elem_id="process-system",
                interactive=True,
            )
            self.process_button = gr.Button("Show", variant="primary", elem_id="show", scale=0)
        self.process_status = status_line("process-status")
        self.step = gr.Slider(1, 2, 1, step=1, label="Step", visible=False, elem_id="step")
        self.process = gr.HTML("", padding=False, elem_id="process")

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
        inputs = {self.caption, self.count, self.seed, *controls}
        self._on_click(
            self.draw_button,
            self._draw,
            {*inputs, self.systems},
            self.status,
            [self.results, self.source],
        )
        self.caption.submit(None, js="() => document.querySelector('#draw').click()")
        self.draw_button.click(None, js=SCROLL)
        self._on_click(
            self.process_button,
            self._show,
            {self.caption, self.seed, self.process_system},
            self.process_status,
            [self.step, self.process],
        )
        self.step.change(
            self._frame,
            self.step,
            self.process,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        self.take_button.click(self._take, self.source, self.editor, queue=False, **_QUIET)
        painting = {self.editor, self.painters, self.strength, self.keep}
        self._on_click(
            self.repaint_button,
            self._repaint,
            {*inputs, *painting},
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
            return self.queue.enter(str(request.session_hash))

        def serve(values: Values, request: gr.Request) -> Iterator[dict[Any, Any]]:
            session = str(request.session_hash)
            self.queue.begin(session, "it has just begun")
            try:
                for update in answer(values, self.sessions[session]):
                    if text := update.get(status):
                        self.queue.begin(session, text.rstrip("."))
                    yield update
            except UserError as error:
                yield {status: app_html.fault(str(error))}
            finally:
                self.queue.leave(session)

        def fail(request: gr.Request) -> str:
            self.queue.leave(str(request.session_hash))
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
        self.queue.leave(str(request.session_hash))
        self.sessions.forget(str(request.session_hash))

    # --- answers ----------------------------------------------------------------------------------

    def _request(self, values: Values, places: Sequence[int]) -> DrawRequest:
        options: dict[int, dict[str, Any]] = {}
        for place in places:
            own = self.controls[place]
            shown = {control.name: values.get(box) for box, control in own.items()}
            options[place] = options_from(list(own.values()), shown)
        return draw_request(
            values.get(self.caption), values.get(self.count), values.get(self.seed), options
        )

    def _draw(self, values: Values, session: Session) -> Iterator[dict[Any, Any]]:
        runs = runs_at(self.runs, values.get(self.systems))
        request = self._request(values, list(runs))
        for results in _growing(draw_each(runs, request, self.threads)):
            yield {
                self.status: _progress(results, list(runs.values()), "draws"),
                self.results: app_html.cards(results, request.caption),
            }
        if any(one.is_right is None for result in results for one in result.verdicts):
            yield {self.status: UNREAD}
        session.pictures = [image for result in results for image in result.images]
        choices = [(name, number) for number, name in enumerate(_names(results))]
        source = gr.Dropdown(choices, value=0 if choices else None)
        yield {self.source: source}

    def _show(self, values: Values, session: Session) -> Iterator[dict[Any, Any]]:
        place = values.get(self.process_system)
        (run,) = runs_at(self.runs, [] if place is None else [place]).values()
        request = draw_request(values.get(self.caption), 1, values.get(self.seed))
        yield {
            self.process_status: f"{run.title} draws.",
            self.step: gr.Slider(visible=False),
            self.process: "",
        }
        shown = visualisation_of(run, request, self.threads)
        done = {self.process_status: f"{run.label}: {request.caption}"}
        session.frames = [app_html.frame(images) for images in shown.frames]
        last = len(session.frames)
        if last == 0:
            yield {**done, self.process: app_html.rows(shown.rows)}
            return
        slider = gr.Slider(1, last, last, step=1, label=f"Step, of {last}", visible=True)
        yield {**done, self.step: slider, self.process: session.frames[-1]}

    def _frame(self, step: float, request: gr.Request) -> Any:
        frames = self.sessions[str(request.session_hash)].frames
        return frames[min(len(frames), max(1, round(step))) - 1] if frames else gr.skip()

    def _take(self, place: int | None, request: gr.Request) -> Any:
        drawn = self.sessions[str(request.session_hash)].pictures
        if place is None or not 0 <= place < len(drawn):
            gr.Info("There is no picture yet: draw one first, or upload one.")
            return gr.skip()
        return picture(drawn[place], EDITOR_SIDE)

    def _repaint(self, values: Values, session: Session) -> Iterator[dict[Any, Any]]:
        runs = runs_at(self.runs, values.get(self.painters))
        request = self._request(values, list(runs))
        image, mask = picture_and_mask(values.get(self.editor))
        strength, keep = values.get(self.strength), values.get(self.keep)
        results = repaint_each(runs, request, image, mask, strength, keep, self.threads)
        for so_far in _growing(results):
            yield {
                self.repaint_status: _progress(so_far, list(runs.values()), "paints"),
                self.repainted: app_html.cards(so_far, request.caption),
            }


_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def _growing(results: Iterator[Result]) -> Iterator[list[Result]]:
    """All results so far, at first none."""
    so_far: list[Result] = []
    yield so_far
    for result in results:
        so_far.append(result)
        yield so_far


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
