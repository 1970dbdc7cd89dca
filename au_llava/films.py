"""Pictures of a video whose rows are there: the film with boxes, ids and bars, and its time lines."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, groupby, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from PIL import Image

from .drawing import AS_ANSWERED, draw_bars, draw_faces, draw_timeline
from .photos import Question
from .tables import readable, replaced
from .videos import Video, closing_capture


HEIGHT = 480  # pixels; smaller videos are enlarged, so that bars and names can be read
SMALLEST = 0.75  # of their size, to which bars in a film are made smaller so that those of one more face fit
LARGEST = 7800  # pixels that a picture and its bars may be wide; MPEG-4 ends at 8191
STEPS, FACES = 800, 4  # of a time line; at most so many faces


def entry(row: dict, question: Question, thresholds: dict[str, float] | None = None) -> dict:
    """A row's face as the pipeline would give it, for one question, with the thresholds of its units where given."""
    task, units = question
    box = [row.get(f"box_{side}") for side in ("x0", "y0", "x1", "y1")]
    answers = {}
    for unit in units:
        key = f"{unit.code}_{task}"
        answers[unit.code] = {"name": unit.name, "value": row[key], "expected_value": row[f"{key}_expected"]}
        if thresholds is not None:
            answers[unit.code]["threshold"] = thresholds.get(unit.code, 0.5)
        if f"{key}_low" in row:
            answers[unit.code]["interval"] = [row[f"{key}_low"], row[f"{key}_high"]]
    return {"id": row["face"], "task": task, "box": None if None in box else box, "action_units": answers}


def write_film(
    target: Path, video: Video, rows: Iterator[dict], question: Question, thresholds: dict[str, float] | None = None
) -> None:
    """Write the video again with boxes and ids on its faces and, beside it, their bars.

    Frames between two that were looked at show the answers of the earlier one. Times are kept, with a variable frame
    rate too. Where ffmpeg is installed, the sound is kept and the film is H.264, which browsers play. Where it is not,
    or fails, as a build without H.264 does, the film is silent MPEG-4.

    Args:
        target (`Path`): An `.mp4` file.
        rows (`Iterator[dict]`): The video's rows, in the order of its frames.
        question (`Question`): Which answers to show.
        thresholds (`dict[str, float]`, *optional*): From which probability on each unit is called present, 0.5 where
            this does not say; for `detection` only.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, so that what a killed job leaves of it is nobody's input.
    with replaced(target) as draft, TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        silent, writer, written, shown = Path(folder, "silent.mp4"), None, 0, None
        # MPEG-4 counts time in parts of a second, 65,535 at most: of a rate such as 66.667 there would be too many.
        rate = video.rate if video.rate < 65 else round(video.rate)
        for time, picture in _pictures(video, rows, question, thresholds):
            if writer is None:
                code = cv2.VideoWriter.fourcc(*"mp4v")
                place = os.fsencode(silent)  # see closing_capture
                writer = cv2.VideoWriter(place, code, rate, picture.size)  # type: ignore[call-overload]
            while shown is not None and written < round(time * rate):  # it stays until this one is shown
                writer.write(shown)
                written += 1
            shown = cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR)
        if writer:
            writer.write(shown)
            writer.release()
        reason = _add_sound(silent, video, draft) if shutil.which("ffmpeg") else None
        if not draft.exists():
            silent.replace(draft)
        if reason:
            print(f"au-llava: {target}: ffmpeg failed ({reason}); the film is silent MPEG-4.", file=sys.stderr)


def _add_sound(silent: Path, video: Video, target: Path) -> str | None:
    """Write the silent film as H.264 with the video's sound; why not, if ffmpeg cannot."""
    with closing_capture(video.path) as capture:
        capture.grab()
        begins = capture.get(cv2.CAP_PROP_PTS) / (capture.get(cv2.CAP_PROP_FPS) or 1.0)
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", str(silent)]
    # The film begins with the picture, and so does its sound, though the file's may begin before.
    command += ["-seek_timestamp", "1", "-ss", f"{begins:.6f}"]
    # Absolute, as OpenCV gets it: a colon in a name is no protocol.
    command += ["-i", str(Path(video.path).absolute())]
    command += ["-map", "0:v", "-map", "1:a?", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if not done.returncode:
        return None
    target.unlink(missing_ok=True)
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]


def _pictures(
    video: Video, rows: Iterator[dict], question: Question, thresholds: dict[str, float] | None
) -> Iterator[tuple[float, Image.Image]]:
    """When each frame of the film is shown, and what it shows."""
    groups = ((number, list(group)) for number, group in groupby(rows, lambda row: row["frame"]))
    coming, faces, panel = next(groups, None), [], None
    for frame in video.frames():
        while coming and coming[0] <= frame.number:
            faces = [entry(row, question, thresholds) for row in coming[1] if row["status"] == "ok"]
            coming, panel = next(groups, None), None
        width, height = frame.image.size
        scale = min(max(1.0, HEIGHT / height), LARGEST / (width + 0.75 * height))
        width, height = (2 * round(side * scale / 2) for side in frame.image.size)  # H.264 wants even sides
        picture = Image.new("RGB", (width + max(360, height * 3 // 4 // 2 * 2), height), "white")
        if panel is None:
            panel = _panel(faces, picture.width - width, height)
        boxes = [face | {"box": face["box"] and [side * scale for side in face["box"]]} for face in faces]
        picture.paste(draw_faces(frame.image.resize((width, height)), boxes), (0, 0))
        picture.paste(panel, (width, 0))
        yield frame.time, picture


def _panel(faces: list[dict], width: int, height: int) -> Image.Image:
    """The bars of as many faces as fit, made smaller where that lets in more; the lowest ids first."""
    panel, top = Image.new("RGB", (width, height), "white"), 0
    blocks = [
        draw_bars(face["action_units"], face["task"], width, f"Face {face['id']}: {face['task'].replace('_', ' ')}")
        for face in sorted(faces, key=lambda face: face["id"])
    ]
    while len(blocks) > 1 and sum(block.height for block in blocks) * SMALLEST > height:
        blocks.pop()
    scale = min(1.0, height / sum(block.height for block in blocks)) if blocks else 1.0
    for block in blocks:
        block = block.resize((int(block.width * scale), int(block.height * scale)), Image.Resampling.LANCZOS)
        panel.paste(block, (0, top))
        top += block.height
    return panel


def write_timelines(
    stem: Path, video: Video, rows: Callable[[], Iterator[dict]], asked: list[Question], per_second: float | None
) -> list[Path]:
    """Write a time line for each question, `STEM.task.png`, of the faces seen longest; the paths written.

    Args:
        rows: Gives the video's rows in order. They are taken twice and only means over short steps are kept, so that
            memory does not grow with the video.
        per_second (`float`, *optional*): How many frames of each second were looked at; all by default.
    """
    counts: Counter[int] = Counter()
    rate, seconds = min(per_second or video.rate, video.rate), 0.0
    for row in rows():
        seconds = row["time"] + 1 / rate
        counts.update([row["face"]] if row["status"] == "ok" else [])
    longest = sorted(number for number, _ in counts.most_common(FACES))
    if not longest:
        return []
    kinds = {task: "" if task in AS_ANSWERED else "_expected" for task, _ in asked}
    keys = [f"{unit.code}_{task}{kinds[task]}" for task, units in asked for unit in units]
    sums, seen = np.zeros((len(longest), len(keys), STEPS)), np.zeros((len(longest), STEPS))
    frames = ((time, list(group)) for time, group in groupby(rows(), lambda row: row["time"]))
    for (time, group), (following, _) in pairwise(chain(frames, [(seconds, [])])):
        step = min(int(time / seconds * STEPS), STEPS - 1)
        steps = slice(step, max(step + 1, int(following / seconds * STEPS)))  # all until the next frame looked at
        for row in group:
            if row.get("face") in longest:
                face = longest.index(row["face"])
                sums[face, :, steps] += np.array([[row[key]] for key in keys])
                seen[face, steps] += 1
    with np.errstate(invalid="ignore"):
        means = sums / seen[:, None]  # NaN where a face was not seen
    written, start = [], 0
    for task, units in asked:
        part = means[:, start : start + len(units)]
        start += len(units)
        path, names = stem.with_name(f"{stem.name}.{task}.png"), {unit.code: unit.name for unit in units}
        title = f"{readable(Path(video.path).name)}: {task.replace('_', ' ')}"
        figure = draw_timeline(dict(zip(longest, part, strict=True)), names, task, seconds, title)
        with replaced(path) as draft:
            figure.savefig(draft)
        written.append(path)
    return written
