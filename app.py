"""The web page: photographs and videos in, faces with their Action Units out. `au-llava app`, or a Hub Space.

    python app.py

Gradio builds the page; [`au_llava.page`] makes what it shows. Uploads are deleted soon and when the server stops;
nothing else is stored, no usage is reported, and the page loads nothing from elsewhere. `docs/web_page.md` tells more.
"""

import os
from pathlib import Path

import gradio as gr

from au_llava import default_checkpoint
from au_llava.action_units import CATALOGUE, PRESETS, TASKS
from au_llava.demo import SYNTHETIC_ONLY
from au_llava.inputs import PICTURES
from au_llava.page import (
    PHOTO_BYTES,
    PHOTO_FACES,
    STYLES,
    VIDEO_BYTES,
    VIDEO_SECONDS,
    show_error,
    show_photo,
    show_video,
)
from au_llava.photos import check_detector, load_pipeline, questions


KEPT = 15 * 60  # seconds that an uploaded file may lie on the server
RATE = 10  # frames of a second, at most
DEFAULT, OWN = "each task's own list", "my own list"
INTRODUCTION = """\
# AU-LLaVA: facial Action Units

A face and a text description go in, one number for each Action Unit (AU) comes out. An Action Unit is a movement of
the face, not an emotion, an intention or a fact about a person: decide nothing about people with it, and ask before
you show someone else's face to a machine.
"""
LIMITS = f"""\
Photographs up to {PHOTO_BYTES // 10**6} MB, of which the {PHOTO_FACES} largest faces are taken; videos up to
{VIDEO_BYTES // 10**6} MB and {VIDEO_SECONDS} seconds. Uploads are deleted after {KEPT // 60} minutes.
Nothing else is kept.
"""
# Gradio's own blue is too pale to read white text on it.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(button_primary_background_fill="*primary_600", color_accent="*primary_600")


def build(pipe, detector: str = "auto") -> gr.Blocks:
    """The page around a pipeline.

    Args:
        pipe ([`FacialActionUnitPipeline`]): What recognises.
        detector (`str`, defaults to `"auto"`): What finds the faces, see [`find_faces`].
    """

    def asked(tasks: list[str], preset: str, own: list[str]):
        if not tasks:
            raise ValueError("No task is ticked; tick at least one.")
        if preset == OWN and not own:
            raise ValueError("Your own list of Action Units is empty; choose at least one.")
        return questions(tasks, {DEFAULT: None, OWN: ",".join(own)}.get(preset, preset))

    # Gradio hands on what the page sends as it came, so that what is wrong with a file is told in words.
    def photo(file: dict | None, tasks: list[str], preset: str, own: list[str], is_face: bool, looked: bool) -> str:
        """Recognise the Action Units of every face in a photograph; the answer is HTML."""
        try:
            if not (file and file["path"]):
                raise ValueError("There is no photograph yet; upload one, take one, or choose an example.")
            finder = "none" if is_face else detector
            return show_photo(pipe, file["path"], asked(tasks, preset, own), finder, looked)
        except (ValueError, OSError) as error:
            return show_error(str(error))

    def video(
        file: dict | None,
        tasks: list[str],
        preset: str,
        own: list[str],
        rate: float,
        progress=gr.Progress(),  # noqa: B008 - Gradio looks for it among the defaults
    ) -> str:
        """Recognise the Action Units of the faces in a video over time; the answer is HTML."""
        try:
            if not (file and file["path"]):
                raise ValueError("There is no video yet; upload or record one.")
            return show_video(
                pipe, file["path"], asked(tasks, preset, own), min(max(rate, 1), RATE), detector, progress
            )
        except (ValueError, OSError) as error:
            return show_error(str(error))

    with gr.Blocks(title="AU-LLaVA: facial Action Units", analytics_enabled=False, delete_cache=(60, KEPT)) as blocks:
        gr.Markdown(INTRODUCTION)
        if pipe.model.name_or_path == default_checkpoint():
            gr.HTML(f'<p class="au-note">{SYNTHETIC_ONLY}</p>')
        with gr.Tab("Photograph"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    label="Photograph", sources=["upload", "webcam", "clipboard"], height=320, buttons=[],
                    alt_text="The photograph to recognise", webcam_options=gr.WebcamOptions(mirror=False),
                )  # fmt: skip
                chosen = _choices("detection")
                is_face = gr.Checkbox(label="The picture is one face, cut out already")
                looked = gr.Checkbox(label="Show where the model looked (slower)")
                start = gr.Button("Recognise", variant="primary")
                found = gr.HTML(render=False, elem_id="photo-answer")
                inputs = [picture, *chosen, is_face, looked]
                files = sorted(p for p in Path(default_checkpoint(), "examples").iterdir() if p.suffix in PICTURES)
                examples = gr.Examples(
                    [[str(path)] for path in files], picture, label="Examples (rendered faces)", cache_examples=False,
                    example_labels=[path.stem for path in files],
                )  # fmt: skip
            with gr.Column(scale=3, min_width=300):
                found.render()
        start.click(photo, inputs, found, api_name="photo", preprocess=False)
        examples.load_input_event.then(photo, inputs, found, preprocess=False, api_visibility="private")
        with gr.Tab("Video"):
            with gr.Row():
                with gr.Column(min_width=300):
                    film = gr.Video(
                        label="Video", sources=["upload", "webcam"], buttons=[],
                        webcam_options=gr.WebcamOptions(mirror=False),
                    )  # fmt: skip
                with gr.Column(min_width=300):
                    chosen = _choices("intensity_level")
                    rate = gr.Slider(1, RATE, 2, step=1, label="Frames looked at in each second")
                    start = gr.Button("Recognise", variant="primary")
            line = gr.HTML(elem_id="video-answer")
        start.click(video, [film, *chosen, rate], line, api_name="video", preprocess=False)
        gr.Markdown(LIMITS)
    return blocks


def _choices(task: str) -> tuple[gr.CheckboxGroup, gr.Dropdown, gr.Dropdown]:
    """What to ask: tasks, a list of Action Units, and a list of one's own."""
    kinds = [(f"{name.replace('_', ' ').capitalize()}: {kind.answer}", name) for name, kind in TASKS.items()]
    tasks = gr.CheckboxGroup(kinds, value=[task], label="Task")
    lists = [(f"{name}: {len(codes)} units", name) for name, codes in PRESETS.items()]
    preset = gr.Dropdown([(DEFAULT, DEFAULT), *lists, (OWN, OWN)], value=DEFAULT, label="Action Units")
    units = [(f"{unit.code} {unit.name}", unit.code) for unit in CATALOGUE.values()]
    own = gr.Dropdown(units, value=[], multiselect=True, label="My own list", visible=False)
    preset.change(lambda name: gr.Dropdown(visible=name == OWN), preset, own, api_visibility="private")
    return tasks, preset, own


def launch(pipe, detector: str = "auto", **settings):
    """Serve the page until it is interrupted.

    Args:
        settings: More of Gradio's own `launch` settings, such as `server_port`.
    """
    return build(pipe, detector).launch(
        theme=THEME, css_paths=STYLES, max_file_size=VIDEO_BYTES, footer_links=[],
        run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, **settings,
    )  # fmt: skip


if __name__ == "__main__":
    # A Space has settings, no command line.
    launch(load_pipeline(os.environ.get("MODEL")), check_detector("auto"))
