"""The web page: what it shows, what it refuses, and how it looks to a browser."""

import base64
import csv
import io
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.request import Request, urlopen

import cv2
import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image
from skimage.data import astronaut
from test_videos import matroska

from au_llava import FacialActionUnitPipeline, page, videos
from au_llava.__main__ import main
from au_llava.action_units import CATALOGUE, ActionUnit, parse_answer, select
from au_llava.face_alignment import CROP_SIZE
from au_llava.face_regions import draw_regions, region, region_mask
from au_llava.inputs import is_camera
from au_llava.page import show_error, show_photo, show_video
from au_llava.photos import load_pipeline, questions


CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder, "cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A photograph of two people, one larger than the other."""
    person = Image.fromarray(astronaut()).crop((130, 10, 330, 210))
    photo = Image.new("RGB", (420, 220), "#556677")
    photo.paste(person, (10, 10))
    photo.paste(person.resize((150, 150)), (240, 30))
    path = tmp_path_factory.mktemp("photo") / "two people.png"
    photo.save(path)
    return str(path)


@pytest.fixture
def clip(tmp_path):
    """Two seconds, ten frames each."""
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for number in range(20):
        writer.write(np.full((64, 96, 3), 10 * number, np.uint8))
    writer.release()
    return str(path)


def rows_of(html: str) -> list[list[str]]:
    """The cells of every table's body, tags left out but the bar's width kept."""
    found = []
    for body in re.findall("<tbody>(.*?)</tbody>", html, re.DOTALL):
        for row in re.findall("<tr.*?</tr>", body, re.DOTALL):
            row = re.sub(r'<div style="width:([\d.]+)%">', r"\1", row)
            found.append([re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)])
    return found


def downloads(html: str) -> dict[str, bytes]:
    links = re.findall(r'href="data:[\w/]+;base64,([\w+/=]+)" download="(.*?)"', html)
    return {name: base64.b64decode(data) for data, name in links}


def test_where_the_model_looked_is_shown_when_asked(pipe, pair):
    asked = questions(["detection", "intensity_level"], "AU6,AU12")
    assert "Where the model looked" not in show_photo(pipe, pair, asked, "cascade")
    html = show_photo(pipe, pair, asked, "cascade", evidence=True)
    assert html.count("Where the model looked") == 4  # two faces, two questions


def test_each_face_has_its_bars_prompts_and_raw_answers(pipe, pair):
    asked = questions(["detection", "intensity"], "AU6,AU12")
    html = show_photo(pipe, pair, asked, "cascade")
    wanted = [pipe(pair, task=task, action_units="AU6,AU12", detector="cascade") for task, _ in asked]
    assert len(wanted[0]) == 2 and "2 faces (LBP cascade" in html
    cells = rows_of(html)
    assert len(cells) == 2 * 2 * 2
    expected = [
        (code, unit, face["task"]) for both in zip(*wanted, strict=True) for face in both
        for code, unit in face["action_units"].items()
    ]  # fmt: skip
    for (code, name, width, answer, mean, *certainty), (wanted_code, unit, task) in zip(cells, expected, strict=True):
        assert (code, name) == (wanted_code, unit["name"])
        drawn = unit["value"] if task == "intensity" else unit["expected_value"]
        assert float(width) == pytest.approx(100 * drawn, abs=0.051)
        assert float(mean) == pytest.approx(unit["expected_value"], abs=0.0051)
        if task == "detection":
            assert answer == ("absent", "present")[unit["value"]] and not certainty
        else:
            assert answer == f"{unit['value']:.2f}"
            assert float(certainty[0]) == pytest.approx(unit["probability"], abs=0.0051)
    raw = re.findall(r"<code>(.*?)</code>", html)
    for text, face in zip(raw, [face for faces in wanted for face in faces], strict=True):
        values = [unit["value"] for unit in face["action_units"].values()]
        assert parse_answer(text, face["task"], select("AU6,AU12")) == values
    for task, units in asked:
        assert (
            pipe.processor.prompt(task, units).replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in html
        )


def test_every_picture_is_in_the_page_and_says_what_it_shows(pipe, pair):
    html = show_photo(pipe, pair, questions(["detection"], "bp4d"), "cascade")
    pictures = re.findall(r'<img src="(.*?)" alt="(.*?)"', html)
    assert len(pictures) == html.count("<img") == 3
    assert all(source.startswith("data:image/jpeg;base64,") for source, _ in pictures)
    assert "each of its 2 faces" in pictures[0][1]
    present = [[row[0] for row in rows_of(html)[start : start + 12] if row[3] == "present"] for start in (0, 12)]
    assert any(present)
    for (_, text), codes in zip(pictures[1:], present, strict=True):
        assert codes == re.findall(r"AU\d+", text)
    assert not re.search(r"https?://|<script", html)


def test_the_downloads_hold_the_answers(pipe, pair):
    html = show_photo(pipe, pair, questions(["intensity_level"], "AU1,AU12"), "cascade")
    files = downloads(html)
    assert list(files) == ["two people.csv", "two people.json"]
    table = list(csv.DictReader(io.StringIO(files["two people.csv"].decode())))
    whole = json.loads(files["two people.json"])
    faces = pipe(pair, task="intensity_level", action_units="AU1,AU12", detector="cascade")
    for row, line, face in zip(table, whole["rows"], faces, strict=True):
        assert row["file"] == line["file"] == "two people.png"
        for code, unit in face["action_units"].items():
            assert int(row[f"{code}_intensity_level"]) == line[f"{code}_intensity_level"] == unit["value"]
            assert line[f"{code}_intensity_level_expected"] == unit["expected_value"]
    assert {column["name"] for column in whole["columns"]} == set(table[0])
    assert "transformers" in whole["produced by"]["versions"]


def test_weights_are_not_read_anew_for_each_answer(pipe, pair, monkeypatch):
    asked = questions(["detection"], "AU12")
    told = [json.loads(downloads(show_photo(pipe, pair, asked, "none"))["two people.json"])["produced by"]]
    monkeypatch.setattr("au_llava.photos.hashlib", None)
    told.append(json.loads(downloads(show_photo(pipe, pair, asked, "none"))["two people.json"])["produced by"])
    assert len(told[0]["weights SHA-256"]) == 16 and told[0] | {"date": ""} == told[1] | {"date": ""}


def test_what_the_model_was_not_trained_for_is_called_a_guess(pipe, pair, monkeypatch):
    monkeypatch.setattr(pipe.processor, "trained_lists", {"detection": [["AU9", "AU1"], ["AU6", "AU12"]]})
    page = show_photo(pipe, pair, questions(["detection"], "AU9,AU12,AU25"))
    assert "Detection: the model was not trained to tell AU25, so what it says of it is a guess." in page
    texts = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert [re.findall(r"^AU\d+", text, re.MULTILINE) for text in texts] == [["AU9", "AU1"], ["AU6", "AU12"], ["AU25"]]
    assert "guess" not in show_photo(pipe, pair, questions(["detection"], "AU9,AU12"))


def test_raw_answers_are_those_before_calibration(pipe, pair, monkeypatch):
    asked = questions(["detection"], "bp4d")
    before = re.findall(r"<code>(.*?)</code>", show_photo(pipe, pair, asked, "none"))
    never = {"detection": {"temperature": 1.0, "thresholds": dict.fromkeys(CATALOGUE, 1.1)}}
    monkeypatch.setattr(pipe.processor, "calibration", never)
    html = show_photo(pipe, pair, asked, "none")
    assert {row[3] for row in rows_of(html)} == {"absent"}
    assert re.findall(r"<code>(.*?)</code>", html) == before and "1" in before[0]


def test_intervals_stand_in_place_of_probabilities(pipe, pair, monkeypatch):
    asked = questions(["intensity", "intensity_level"], "AU6,AU12")
    margins = {"intensity": {"margins": {"AU12": [0.13, 0.13]}}}
    monkeypatch.setattr(pipe.processor, "calibration", margins)
    html = show_photo(pipe, pair, asked, "cascade")
    cells, faces = rows_of(html), pipe(pair, task="intensity", action_units="AU12", detector="cascade")
    low, high = faces[0]["action_units"]["AU12"]["interval"]
    assert [cell[-1] for cell in cells[:2]] == ["", f"{low:.2f}–{high:.2f}"] and high - low >= 0.13
    assert f'<b style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%" title="{low:.2f}–{high:.2f}">' in html
    assert html.count("nine times in ten") == html.count("prob.: probability") == len(faces)
    row, _ = csv.DictReader(io.StringIO(downloads(html)["two people.csv"].decode()))
    assert float(row["AU12_intensity_low"]) == low and row["AU6_intensity_low"] == ""


def test_what_is_wrong_is_told_in_words_and_without_folders(pipe, pair, tmp_path, clip, monkeypatch):
    asked = questions(["detection"], "AU12")
    for name in ("text.png", "huge.jpg", "text.mp4", "huge.mp4"):
        (tmp_path / name).write_text("no picture")
    for name in ("huge.jpg", "huge.mp4"):
        os.truncate(tmp_path / name, 200_000_001)
    for show, name, told in (
        (show_photo, "text.png", "text.png: no picture in it; replace it"),
        (show_photo, "huge.jpg", "huge.jpg: 200 MB are too many; make it 20 MB or smaller."),
        (show_video, "text.mp4", "text.mp4: no video stream that can be read"),
        (show_video, "huge.mp4", "huge.mp4: 200 MB are too many; make it 100 MB or smaller."),
        (show_photo, "old.jpg", "old.jpg: uploads are deleted after a while, and this one is; upload it again."),
        (show_video, "old.mp4", "old.mp4: uploads are deleted after a while, and this one is; upload it again."),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(told)}") as error:
            show(pipe, str(tmp_path / name), asked)
        assert str(tmp_path) not in str(error.value)
    monkeypatch.setattr(page, "VIDEO_SECONDS", 1)
    with pytest.raises(ValueError, match="^clip.mp4: longer than 1 seconds"):
        show_video(pipe, clip, asked, detector="none")
    monkeypatch.setattr(videos.Video, "open", lambda path: videos.Video(path, 10.0, 0))  # a file that tells no length
    with pytest.raises(ValueError, match="^clip.mp4: longer than 1 seconds"):
        show_video(pipe, clip, asked, 10, "none")
    assert show_error("a <b> & c") == '<p class="au-error" role="alert">a &lt;b&gt; &amp; c</p>'


def test_a_picture_without_a_face_says_so(pipe, tmp_path):
    Image.new("RGB", (120, 120), "#7f7f7f").save(tmp_path / "grey.png")
    html = show_photo(pipe, str(tmp_path / "grey.png"), questions(["detection"]), "cascade")
    assert "No face was found" in html and not rows_of(html)
    assert b"no face" in downloads(html)["grey.csv"]


def test_a_video_becomes_time_lines(pipe, clip):
    told = []
    html = show_video(pipe, clip, questions(["detection", "intensity"], "AU6,AU12"), 5, "none", told.append)
    assert "10 frames looked at, 1 face followed" in html and 0 < told[-1] <= 1
    assert re.findall(r"<h3>(.*?)</h3>", html) == ["Detection", "Intensity"]
    lines = re.findall(r'<img src="data:image/png;base64,(.*?)"', html)
    assert [Image.open(io.BytesIO(base64.b64decode(line))).width for line in lines] == [1320, 1320]
    table = list(csv.DictReader(io.StringIO(downloads(html)["clip.csv"].decode())))
    assert [float(row["time"]) for row in table] == pytest.approx(np.arange(0, 2, 0.2))
    assert {row["AU12_detection"] for row in table} <= {"0", "1"}


def test_a_browser_s_recording_is_as_long_as_its_last_time(pipe, tmp_path, monkeypatch):
    times = [0, *np.cumsum(np.random.default_rng(0).integers(33, 80, 60)).tolist()]
    matroska(tmp_path / "talk.webm", [Image.new("RGB", (96, 64))] * 60, times)
    html = show_video(pipe, str(tmp_path / "talk.webm"), questions(["detection"], "AU12"), 2, "none")
    assert "7 frames looked at" in html and 'role="alert"' not in html
    monkeypatch.setattr(page, "VIDEO_SECONDS", 1)
    with pytest.raises(ValueError, match="^talk.webm: longer than 1 seconds"):
        show_video(pipe, str(tmp_path / "talk.webm"), questions(["detection"], "AU12"), 2, "none")


def test_of_a_damaged_video_the_rest_is_shown(pipe, clip, monkeypatch):
    monkeypatch.setattr(videos.Video, "open", lambda path: videos.Video(path, 10.0, 100))
    html = show_video(pipe, clip, questions(["detection"], "AU12"), 5, "none")
    assert "10 frames looked at" in html and list(downloads(html)) == ["clip.csv", "clip.json"]
    assert '<p class="au-error" role="alert">clip.mp4: damaged after frame 19, 1.9 of 10.0 seconds; the rows' in html


def test_every_unit_has_its_place_on_the_face():
    for unit in CATALOGUE.values():
        mask = region_mask(unit)
        assert mask.shape == (CROP_SIZE, CROP_SIZE) and 100 < mask.sum() < 12_000, unit.code
        twin = {(CROP_SIZE - x1, y0, CROP_SIZE - x0, y1) for x0, y0, x1, y1 in region(unit)}
        assert twin == set(region(unit.mirrored()))
    brow, mouth = (np.argwhere(region_mask(CATALOGUE[code]))[:, 0].mean() for code in ("AU4", "AU12"))
    assert brow < CROP_SIZE / 2 < mouth
    left = np.argwhere(region_mask(CATALOGUE["FEAFA5"]))[:, 1]  # the subject's left brow
    assert left.min() > CROP_SIZE / 2
    assert region(ActionUnit("EAR", "Ear Wiggler", "the ears move", "ears")) == []


def test_only_the_regions_of_the_units_keep_their_colours():
    crop = Image.new("RGB", (CROP_SIZE, CROP_SIZE), "#cc6644")
    drawn = np.asarray(draw_regions(crop, select("AU12"), CROP_SIZE))[:, :CROP_SIZE]
    inside, coloured = region_mask(CATALOGUE["AU12"]), (drawn == (0xCC, 0x66, 0x44)).all(-1)
    assert coloured[inside].mean() > 0.5 and not coloured[~inside].any()
    assert draw_regions(crop, []).size == (448, 448)
    assert draw_regions(crop, select("feafa")).size[1] == 448


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert "pip install au-llava[app]" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(capsys):
    pytest.importorskip("gradio", reason="needs the extra [app]")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    assert f"Port {port} is taken" in capsys.readouterr().err


def test_the_page_asks_what_was_chosen(pipe, pair):
    pytest.importorskip("gradio", reason="needs the extra [app]")
    from au_llava.app import DEFAULT, OWN, build

    blocks = build(pipe, "cascade")
    assert not blocks.analytics_enabled and blocks.delete_cache == (60, 900)
    photo, video = (next(f.fn for f in blocks.fns.values() if f.api_name == name) for name in ("photo", "video"))
    assert [row[0] for row in rows_of(photo({"path": pair}, ["detection"], OWN, ["AU12", "FEAFA3"], True, False))] == [
        "AU12",
        "FEAFA3",
    ]
    assert len(rows_of(photo({"path": pair}, ["detection"], DEFAULT, [], False, False))) == 2 * 12
    assert len(rows_of(photo({"path": pair}, ["detection", "intensity"], "disfa8", [], True, True))) == 2 * 8
    for arguments, told in (
        ((None, ["detection"], DEFAULT, [], False, False), "There is no photograph yet"),
        (({"path": pair}, [], DEFAULT, [], False, False), "No task is ticked"),
        (({"path": pair}, ["detection"], OWN, [], False, False), "own list of Action Units is empty"),
    ):
        assert re.match(f'<p class="au-error" role="alert">.*{told}', photo(*arguments))
    assert "There is no video yet" in video(None, ["detection"], DEFAULT, [], 2)


def test_a_camera_is_recognised_until_it_is_stopped(folder, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    opened = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda device, *how: opened(clip if device == 7 else device))
    common = ["--model", folder, "--detector", "none", "--action-units", "AU12"]
    assert main(["recognize", "7", *common]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["frame"] for line in lines] == list(range(20)) and {line["file"] for line in lines} == {"7"}
    times = [line["time"] for line in lines]
    assert times == sorted(times) and times[-1] > 0

    class Stopped:
        """The clip, and Ctrl-C at its sixth frame."""

        def __init__(self, capture):
            self.capture, self.count = capture, 0

        def grab(self):
            self.count += 1
            if self.count == 6:
                raise KeyboardInterrupt
            return self.capture.grab()

        def __getattr__(self, name):
            return getattr(self.capture, name)

    monkeypatch.setattr(cv2, "VideoCapture", lambda device, *how: Stopped(opened(clip)))
    assert main(["recognize", "7", "--output", "t.csv", *common]) == 0
    with open("t.csv", newline="") as file:
        assert [row["frame"] for row in csv.DictReader(file)] == ["0", "1", "2", "3", "4"]
    assert Path("t.csv.camera7.detection.png").is_file()
    for drawn in ("--overlay=drawn", "--evidence=attention"):
        assert main(["recognize", "7", drawn, *common]) == 2 and "only input" in capsys.readouterr().err


def test_an_error_leaves_what_a_camera_has_seen(folder, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda device, *how: opened(clip))
    answered, seen = FacialActionUnitPipeline._forward, []

    def failing(self, faces, *args, **how):
        seen.append(faces)
        if len(seen) > 4:  # the first is what loading tries
            raise RuntimeError("the device is gone")
        return answered(self, faces, *args, **how)

    monkeypatch.setattr(FacialActionUnitPipeline, "_forward", failing)
    asked = ["recognize", "7", "--output", "new/t.csv", "--model", folder, "--detector", "none"]
    with pytest.raises(RuntimeError, match="the device is gone"):
        main(asked)
    with open("new/t.csv", newline="") as file:
        assert [row["frame"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_only_small_numbers_are_cameras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "8").mkdir()
    assert [is_camera(name) for name in ("0", "7", "99", "100", "2024", "07", "-1", "8")] == [True] * 3 + [False] * 5


def test_a_camera_that_is_not_there_is_named(folder, capsys):
    assert main(["recognize", "77", "--model", folder, "--detector", "none"]) == 2
    assert "au-llava: 77: no camera of this number can be opened" in capsys.readouterr().err


GUIDE = (ROOT / "docs/web_page.md").read_text()
SPACE = re.search(r"```yaml\n---\n(.*?)---\n```", GUIDE, re.DOTALL)[1]
NEEDS = re.search(r"`requirements.txt`:\n\n```text\n(.*?)```", GUIDE, re.DOTALL)[1].split()


def test_the_guide_s_space_is_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    card = yaml.safe_load(SPACE)
    assert f"gradio=={card['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert (ROOT / card["app_file"]).is_file() and card["license"] == "apache-2.0"
    assert {need.replace("-headless", "") for need in NEEDS} <= set(project["dependencies"])


@pytest.mark.slow
def test_a_space_needs_no_more_than_the_guide_lists():
    """What it does not list is made absent before the page is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {need.replace("-headless", "") for need in NEEDS}
    named = {"scikit-learn": "sklearn"}
    absent = [re.match(r"[\w-]+", need)[0] for need in project["dependencies"] if need not in listed]
    absent = [named.get(name, name) for name in absent]
    assert "peft" in absent and "sklearn" in absent
    brought = ("huggingface-hub", "jinja2", "numpy", "pillow", "safetensors", "tqdm")  # by those listed
    absent = [name for name in absent if name not in brought]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import app; app.load_pipeline(); print('works')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "works\n", done.stderr[-2000:]


@pytest.fixture
def site(pipe, tmp_path, monkeypatch):
    """The page, served; what it asked of other machines, and which files it holds."""
    pytest.importorskip("gradio", reason="needs the extra [app]")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    import gradio

    from au_llava.app import launch

    outside = []

    def note(event, arguments):
        if event == "socket.connect" and arguments[1][0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(arguments[1])

    sys.addaudithook(note)
    _, address, _ = launch(pipe, "cascade", prevent_thread_lock=True, quiet=True)
    yield address, outside, tmp_path / "uploads"
    gradio.close_all(verbose=False)


@pytest.mark.slow
def test_files_of_the_server_are_not_for_visitors(site, tmp_path):
    address, *_ = site
    Image.open(ROOT / "examples/smile.jpg").save(tmp_path / "private.jpg")
    for path in (tmp_path / "private.jpg", ROOT / "examples/smile.jpg"):
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        call = Request(
            f"{address}gradio_api/call/photo", json.dumps({"data": [file, ["detection"], "bp4d", [], 1]}).encode()
        )
        call.add_header("Content-Type", "application/json")
        number = json.load(urlopen(call))["event_id"]
        told = urlopen(f"{address}gradio_api/call/photo/{number}").read().decode()
        assert told.startswith("event: error") and "<table" not in told


@pytest.mark.slow
def test_in_a_browser(site, pipe, pair, tmp_path):
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright, the Python package")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    address, outside, uploads = site
    Image.open(pair).resize((640, 480)).save(tmp_path / "camera.mjpeg", "JPEG")
    (tmp_path / "text.png").write_text("no picture")
    film = cv2.VideoWriter(str(tmp_path / "clip.webm"), cv2.VideoWriter.fourcc(*"VP80"), 10, (420, 220))
    for _ in range(10):
        film.write(cv2.imread(pair))
    film.release()
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    flags.append(f"--use-file-for-fake-video-capture={tmp_path / 'camera.mjpeg'}")
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        view = browser.new_page(viewport={"width": 400, "height": 800})
        view.set_default_timeout(180_000)
        errors, asked = [], []
        view.on("console", lambda message: message.type == "error" and errors.append(message.text))
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(address)
        answer, start = view.locator("#photo-answer"), view.get_by_role("button", name="Recognise")

        # a photograph in, bars out
        view.locator("input[type=file]").set_input_files(pair)
        view.get_by_alt_text("The photograph to recognise").wait_for()
        start.click()
        answer.locator("table").nth(1).wait_for()
        faces = pipe(pair, detector="cascade")
        units = [unit for face in faces for unit in face["action_units"].values()]
        assert len(faces) == 2 and answer.get_by_role("row").count() == 2 + len(units)
        shares = answer.locator(".track div").evaluate_all(
            "bars => bars.map(bar => bar.clientWidth / bar.parentElement.clientWidth)"
        )
        assert shares == pytest.approx([unit["expected_value"] for unit in units], abs=0.02)
        assert answer.locator("img").evaluate_all("all => all.every(one => one.alt && one.naturalWidth > 0)")
        answer.get_by_text("The exact text").click()
        assert answer.get_by_text("Task: detect which facial Action Units").is_visible()
        with view.expect_download() as download:
            answer.get_by_role("link", name="Download CSV").click()
        assert len(download.value.path().read_text().splitlines()) == 3
        assert view.evaluate("document.documentElement.scrollWidth") <= 400
        named = "all => all.every(one => one.ariaLabel || one.innerText || one.labels?.length)"
        assert view.locator("button:visible, input:visible").evaluate_all(named)

        # a list of one's own
        view.get_by_label("Action Units", exact=True).click()
        view.get_by_role("option", name="my own list").click()
        view.get_by_role("combobox", name="My own list").click()
        view.get_by_role("option", name="AU12 Lip Corner Puller").click()
        view.keyboard.press("Escape")
        start.click()
        answer.locator("tbody tr").nth(2).wait_for(state="detached")
        assert answer.locator("tbody th").all_inner_texts() == ["AU12", "AU12"]

        # an example, a file that is no picture, the camera
        view.get_by_role("button", name="smile").click()
        answer.get_by_text("1 face (").wait_for()
        view.get_by_role("button", name="Remove Image").click()
        view.locator("input[type=file]").set_input_files(tmp_path / "text.png")
        view.wait_for_function("document.querySelector('[alt=\"The photograph to recognise\"]')")
        start.click()
        answer.get_by_role("alert").wait_for()
        assert answer.inner_text() == "text.png: no picture in it; replace it, or convert it to PNG or JPEG."
        view.get_by_role("button", name="Remove Image").click()
        view.get_by_role("button", name="Capture from camera").click()
        view.get_by_role("button", name="Click to Access Webcam").click()
        view.get_by_role("button", name="capture photo").click()
        view.get_by_alt_text("The photograph to recognise").wait_for()
        start.click()
        answer.get_by_text("2 faces (").wait_for()

        # a video
        view.get_by_role("tab", name="Video").click()
        view.locator("input[type=file]:visible, [role=tabpanel]:visible input[type=file]").set_input_files(
            tmp_path / "clip.webm"
        )
        view.locator("video").wait_for()
        view.get_by_role("button", name="Recognise").locator("visible=true").click()
        view.locator("#video-answer .wide img").wait_for()
        assert view.locator("#video-answer").get_by_text("2 faces followed").is_visible()
        assert view.evaluate("document.documentElement.scrollWidth") <= 400
        browser.close()
    assert not errors
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == [] and not outside
    import gradio

    assert {"clip.webm", "text.png"} <= {path.name for path in uploads.rglob("*")}
    gradio.close_all(verbose=False)
    left = {path.name for path in uploads.rglob("*") if path.is_file()}
    assert left == {path.name for path in (ROOT / "examples").glob("*.jpg")}  # which came with the page
