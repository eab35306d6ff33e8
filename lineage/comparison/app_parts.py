"""Parts of the page of `lineage app`, of gradio: its theme, components of controls, the editor."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lineage.comparison.app_controls import MAX_TEXT, Control

EDITOR_SIDE = 320  # pixels of a drawn picture in the editor

THEME = gr.themes.Default(  # fonts of the system: no other is asked for
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
)

SCROLL = """() => {
    if (window.innerWidth < 700) document.querySelector("#status").scrollIntoView();
}"""
"""On a narrow screen the pictures stand below the controls."""


def status_line(name: str) -> gr.Markdown:
    """A line that says what is going on; gradio adds the place in the queue."""
    return gr.Markdown("", elem_id=name, elem_classes="lineage-status")


def component(control: Control) -> Any:
    """The component of a control."""
    label: dict[str, Any] = {"label": control.name, "info": control.help}
    match control.kind:
        case "choice":
            return gr.Dropdown(list(control.choices), value=control.value, **label)
        case "flag":
            return gr.Checkbox(control.value, **label)
        case "slider":
            low, high, step = control.minimum, control.maximum, control.step
            return gr.Slider(low, high, control.value, step=step, **label)
    return gr.Textbox(control.value, max_length=MAX_TEXT, **label)


def editor() -> gr.ImageEditor:
    """An editor in which a picture is painted over, in one colour."""
    return gr.ImageEditor(
        type="pil",
        image_mode="RGBA",
        label="Picture",
        sources=["upload"],
        transforms=[],
        layers=False,
        brush=gr.Brush(default_size=40, colors=["#e8590c"], color_mode="fixed"),
        eraser=gr.Eraser(default_size=40),
        canvas_size=(EDITOR_SIDE, EDITOR_SIDE),
        height=460,
        buttons=[],
        elem_id="editor",
    )
