"""Videos: frames and their times, ids that stay, jobs that go on, and what is made beside the table."""

import csv
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from itertools import islice, pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from skimage.data import astronaut

from au_llava import films, photos
from au_llava.__main__ import main
from au_llava.action_units import select
from au_llava.drawing import draw_timeline
from au_llava.films import _panel, write_timelines
from au_llava.inputs import expand
from au_llava.smoothing import smoothed
from au_llava.tracking import Tracker
from au_llava.videos import Video, recognize_video


needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")


def write(path, pictures, rate=10):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, pictures[0].size)
    for picture in pictures:
        writer.write(cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))
    writer.release()


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-nostdin", "-loglevel", "error", "-y", *map(str, arguments)], check=True)


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """25 frames of 96 x 64 pixels, 10 a second, ever brighter."""
    monkeypatch.chdir(tmp_path)
    write("clip.mp4", [Image.new("RGB", (96, 64), (number * 10, 0, 0)) for number in range(25)])
    return "clip.mp4"


def recognize(folder, *arguments, detector="none"):
    return main(["recognize", *arguments, "--model", folder, "--detector", detector])


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_frames_have_numbers_times_and_pictures(clip):
    frames = list(Video.open(clip).frames())
    assert [frame.number for frame in frames] == list(range(25))
    assert np.allclose([frame.time for frame in frames], np.arange(25) / 10)
    red = [np.asarray(frame.image)[..., 0].mean() for frame in frames]
    assert np.allclose(red, np.arange(25) * 10, atol=6)
    assert [frame.number for frame in Video.open(clip).frames(start=20)] == [20, 21, 22, 23, 24]


@pytest.mark.parametrize(
    ("rate", "numbers"), [(1, [0, 10, 20]), (4, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23]), (50, range(25))]
)
def test_sampling_takes_the_first_frame_of_each_step(clip, rate, numbers):
    assert [frame.number for frame in Video.open(clip).frames(rate)] == list(numbers)
    assert [frame.number for frame in Video.open(clip).frames(rate, 10)] == [n for n in numbers if n >= 10]


def test_a_name_is_no_address(clip):
    for name in (
        "10:30.mp4",
        "%03d.mp4",
        "-x.mp4",
        *([os.fsdecode(b"m\xfcller.mp4")] if sys.platform == "linux" else []),
    ):
        Path(name).write_bytes(Path(clip).read_bytes())
        assert len(list(Video.open(name).frames())) == 25


def timed(path, source, times):
    """Copy an MP4 file and give its frames other times, in milliseconds, the last of them its end."""
    data = bytearray(Path(source).read_bytes())
    scale = data.index(b"mdhd") + 16
    data[scale : scale + 8] = struct.pack(">2I", 1000, times[-1])
    start = data.index(b"stts") - 4
    old = struct.unpack(">I", data[start : start + 4])[0]
    steps = [struct.pack(">2I", 1, after - before) for before, after in pairwise(times)]
    new = struct.pack(">I4s2I", 16 + 8 * len(steps), b"stts", 0, len(steps)) + b"".join(steps)
    data[start : start + old] = new
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        place = data.index(name) - 4
        size = struct.unpack(">I", data[place : place + 4])[0] + len(new) - old
        data[place : place + 4] = struct.pack(">I", size)
    Path(path).write_bytes(data)


def matroska(path, pictures, times, rate=None, shown=None):
    """Write a Matroska or WebM file whose frames have these times, in milliseconds, the last of them its end.

    `rate` is what the file says of its frames a second; nothing, as browsers write it, by default. `shown` is how many
    pixels wide they are to be shown, by default as they are stored.
    """

    def element(number, *content):
        body = b"".join(content)
        return bytes.fromhex(number) + (1 << 56 | len(body)).to_bytes(8, "big") + body

    width, height = (side.to_bytes(2, "big") for side in pictures[0].size)
    track = [element("D7", b"\1"), element("73C5", b"\1"), element("83", b"\1"), element("86", b"V_MJPEG")]
    track += [element("23E383", (10**9 // rate).to_bytes(4, "big"))] if rate else []
    display = [element("54B0", shown.to_bytes(2, "big")), element("54BA", height)] if shown else []
    track += [element("E0", element("B0", width), element("BA", height), *display)]
    clusters = [
        element("1F43B675", element("E7", time.to_bytes(4, "big")), element("A3", b"\x81\0\0\x80", jpeg(picture)))
        for time, picture in zip(times, pictures, strict=False)
    ]
    length = element("1549A966", element("2AD7B1", (10**6).to_bytes(4, "big")),
                     element("4489", struct.pack(">d", times[-1])))  # fmt: skip
    segment = element("18538067", length, element("1654AE6B", element("AE", *track)), *clusters)
    Path(path).write_bytes(element("1A45DFA3", element("4282", b"matroska")) + segment)


def jpeg(picture):
    return cv2.imencode(".jpg", np.asarray(picture)[..., ::-1])[1].tobytes()


def index_first(path):
    """Put the index of an MP4 file before its frames, so that it can be read when the end is missing."""
    data = Path(path).read_bytes()
    frames, index = data.index(b"mdat") - 4, data.index(b"moov") - 4
    moved = bytearray(data[index:])
    table = moved.index(b"stco") + 8
    (count,) = struct.unpack(">I", moved[table : table + 4])
    for place in range(table + 4, table + 4 + 4 * count, 4):
        (offset,) = struct.unpack(">I", moved[place : place + 4])
        moved[place : place + 4] = struct.pack(">I", offset + len(moved))
    Path(path).write_bytes(data[:frames] + moved + data[frames:index])


def test_a_repeated_time_does_no_harm_to_those_after_it(clip):
    times = [*range(0, 1000, 100), *range(900, 2400, 100)]
    timed("twice.mp4", clip, [*times, 2400])
    found = [frame.time for frame in Video.open("twice.mp4").frames()]
    assert np.allclose(found, np.array(times) / 1000, atol=0.002) and found == sorted(set(found))


def test_times_are_counted_from_the_first_picture(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "late.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    for _ in range(5):
        writer.write(np.zeros((64, 96, 3), np.uint8))
    writer.release()
    data = bytearray((tmp_path / "late.avi").read_bytes())
    first = data.index(b"00dc", data.index(b"movi"))  # it becomes an empty one, for which no picture is shown
    length = struct.unpack("<I", data[first + 4 : first + 8])[0]
    data[first + 4 : first + 16] = struct.pack("<I4sI", 0, b"JUNK", length - 8)
    entry = data.index(b"idx1") + 8
    data[entry + 12 : entry + 16] = bytes(4)
    (tmp_path / "late.avi").write_bytes(data)
    times = [frame.time for frame in Video.open(str(tmp_path / "late.avi")).frames()]
    assert times == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_whole_video_is_not_called_damaged(clip, folder):
    timed("fast.mp4", clip, [*range(0, 2000, 400), *range(2000, 2420, 20)])  # most frames in the last half second
    assert recognize(folder, "fast.mp4", "--fps", "5", "--output", "t.csv") == 0
    assert [row["frame"] for row in read("t.csv")] == ["0", "1", "2", "3", "4", "5", "15"]
    timed("still.mp4", clip, [*range(0, 1250, 50), 2500])  # the last frame stays
    assert recognize(folder, "still.mp4", "--fps", "1", "--output", "t.csv") == 0


@pytest.mark.parametrize("rate", [30, None])
def test_a_whole_video_of_varying_rate_is_not_called_damaged(tmp_path, monkeypatch, folder, rate):
    monkeypatch.chdir(tmp_path)
    times = [0, *np.cumsum(np.random.default_rng(0).integers(33, 80, 60)).tolist()]
    matroska("talk.webm", [Image.new("RGB", (96, 64))] * 60, times, rate)
    video = Video.open("talk.webm")
    assert (video.rate, video.count) == ((30, round(times[-1] * 0.03)) if rate else (25, 0))
    assert [frame.time for frame in video.frames()] == pytest.approx(np.array(times[:-1]) / 1000)
    assert recognize(folder, "talk.webm", "--fps", "2", "--output", "t.csv") == 0
    assert {row["status"] for row in read("t.csv")} == {"ok"}


def test_a_video_that_was_cut_or_begins_after_its_sound_is_not_called_damaged(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("cut.mp4", [Image.new("RGB", (96, 64))] * 25)  # so alike that only every twelfth stands for itself
    data = bytearray(Path("cut.mp4").read_bytes())
    edit = data.index(b"elst") + 12  # of which length, in thousandths, and from where on, in ticks of the track
    ticks = struct.unpack(">I", data[(place := data.index(b"mdhd") + 16) : place + 4])[0]
    data[edit : edit + 8] = struct.pack(">2I", 1400, round(1.1 * ticks))
    Path("cut.mp4").write_bytes(data)
    matroska("late.mkv", [Image.new("RGB", (96, 64))] * 25, [*range(2000, 4600, 100)], 10)
    shown = {"cut.mp4": 14, "late.mkv": 25}
    assert {name: len(list(Video.open(name).frames())) for name in shown} == shown
    assert recognize(folder, *shown, "--fps", "1", "--output", "t.csv") == 0
    assert {row["status"] for row in read("t.csv")} == {"ok"}


def test_a_picture_that_is_stored_squeezed_is_as_wide_as_it_is_shown(tmp_path):
    halves = Image.new("RGB", (72, 64))
    halves.paste("red", (0, 0, 36, 64))
    matroska(tmp_path / "wide.mkv", [halves], [0, 100], 10, shown=96)
    [frame] = Video.open(str(tmp_path / "wide.mkv")).frames()
    assert frame.image.size == (96, 64)
    assert frame.image.getpixel((43, 32))[0] > 200 and frame.image.getpixel((52, 32))[0] < 50


def test_a_turned_picture_that_is_stored_squeezed_is_as_high_as_it_is_shown(clip):
    data = bytearray(Path(clip).read_bytes())
    header = data.index(b"tkhd") + 4
    turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data[header + 40 : header + 84] = turn + struct.pack(
        ">2I", 128 << 16, 64 << 16
    )  # shown 128 pixels wide, then turned
    Path("turned.mp4").write_bytes(data)
    width, height = next(Video.open("turned.mp4").frames()).image.size
    assert height / width == pytest.approx(128 / 64, rel=0.02)


@needs_ffmpeg
def test_variable_rate_and_rotation(clip):
    ffmpeg("-i", clip, "-vf", "setpts='if(lt(N,10),N/10,1+(N-10)/5)/TB'", "-fps_mode", "vfr", "slow.mkv")
    times = [frame.time for frame in Video.open("slow.mkv").frames()]
    assert np.allclose(times, [*np.arange(10) / 10, *(1 + np.arange(15) / 5)], atol=0.002)
    assert [frame.number for frame in Video.open("slow.mkv").frames(1)] == [0, 10, 15, 20]
    ffmpeg("-i", clip, "-c", "copy", "-metadata:s:v", "rotate=90", "turned.mp4")
    if "rotation" in subprocess.run(["ffprobe", "turned.mp4"], capture_output=True, text=True).stderr:
        assert next(Video.open("turned.mp4").frames()).image.size == (64, 96)


def test_a_row_for_each_frame_and_a_time_line(clip, folder):
    assert recognize(folder, clip, "--task", "all", "--output", "t.csv") == 0
    rows = read("t.csv")
    assert [int(row["frame"]) for row in rows] == list(range(25))
    assert np.allclose([float(row["time"]) for row in rows], np.arange(25) / 10)
    assert {(row["file"], row["status"], row["face"]) for row in rows} == {(clip, "ok", "1")}
    assert all(row["AU12_intensity_level"] in "012345" for row in rows)
    for task in ("detection", "intensity_level", "intensity"):
        with Image.open(f"t.csv.clip.mp4.{task}.png") as picture:
            assert picture.width == 1320


def test_answers_are_smoothed_over_time_only_when_asked(clip, folder):
    question = ("--task", "intensity_level", "--action-units", "AU1,AU12")
    assert recognize(folder, clip, *question, "--output", "raw.csv") == 0
    assert recognize(folder, clip, *question, "--output", "smooth.csv", "--smooth", "0.4") == 0
    raw, smooth = read("raw.csv"), read("smooth.csv")
    keys = [key for key in raw[0] if key.startswith("AU") and not key.endswith(("_low", "_high"))]
    series = np.array([[float(row[key]) for key in keys] for row in raw])
    for place, row in enumerate(smooth):
        window = np.sort(series[max(0, place - 2) : place + 3], axis=0)
        assert [float(row[key]) for key in keys] == window[(len(window) - 1) // 2].tolist()
    assert [row["time"] for row in raw] == [row["time"] for row in smooth]
    assert np.abs(np.diff(series, axis=0)).sum() > 0 and any(a != b for a, b in zip(raw, smooth, strict=True))
    assert "median over 0.4 seconds" in Path("smooth.csv.columns.json").read_text()
    assert "median" not in Path("raw.csv.columns.json").read_text()


def test_smoothing_keeps_faces_and_files_apart():
    asked, key = [("intensity_level", select("AU12"))], "AU12_intensity_level"
    times, first, second = [0.0, 0.1, 0.9, 1.0, 1.1], [0, 5, 1, 5, 1], [3, 3, 3, 0, 0]
    rows = [
        {"file": name, "time": time, "face": face, key: value + (name == "b")}
        for name in "ab"
        for time, *values in zip(times, first, second, strict=True)
        for face, value in enumerate(values, 1)
    ]
    rows[4:4] = [{"file": "a", "time": 0.5, "status": "no face"}]
    rows += [{"file": "b", "status": "failed"}, {"file": "photo.png", "face": 1, key: 4}]
    found = list(smoothed(iter(rows), asked, 0.25))
    assert [{**row, key: 0} for row in found] == [{**row, key: 0} for row in rows]  # nothing else changes
    for name, more in (("a", 0), ("b", 1)):
        answers = {
            face: [row[key] for row in found if (row["file"], row.get("face")) == (name, face)] for face in (1, 2)
        }
        # Two frames alone: the lower one; then 0.9, 1.0 and 1.1 s together at 1.0 s, two by two at the ends.
        assert answers == {
            1: [0 + more, 0 + more, 1 + more, 1 + more, 1 + more],
            2: [3 + more, 3 + more, more, more, more],
        }
    assert found[-1][key] == 4


def test_a_smoothed_probability_is_that_of_the_answer():
    asked = [("detection", select("AU1")), ("intensity_level", select("AU1"))]
    rows = [
        {"file": "a.mp4", "time": step / 10, "face": 1, "AU1_detection": int(present > 0.4),
         "AU1_detection_probability": present if present > 0.4 else 1 - present, "AU1_detection_expected": present,
         "AU1_intensity_level": level, "AU1_intensity_level_probability": sure, "AU1_intensity_level_expected": level}
        for step, (present, level, sure) in enumerate([(0.9, 3, 0.8), (0.1, 0, 0.3), (0.2, 0, 0.9), (0.3, 1, 0.7)])
    ]  # fmt: skip
    first, second, *_ = smoothed(iter(rows), asked, 0.2)
    assert (first["AU1_detection"], first["AU1_detection_expected"], first["AU1_detection_probability"]) == (
        0, 0.1, 0.9
    )  # fmt: skip
    assert (second["AU1_intensity_level"], second["AU1_intensity_level_probability"]) == (0, 0.3)
    mean = rows[1] | {"AU1_detection": 0.1}  # as a calibration may decide
    assert list(smoothed([mean], asked, 0.2)) == [mean]


@pytest.mark.parametrize(("rate", "fps"), [(25, 2), (29.97, 2), (24, 5), (25, 10)])
def test_one_wrong_frame_goes_though_frames_are_unevenly_apart(rate, fps):
    places = sorted({math.ceil(step * rate / fps - 1e-6) for step in range(9)})  # the first frames that are due
    key = "AU1_detection_expected"
    rows = [
        {"file": "a.mp4", "time": place / rate, "face": 1, key: 0.1 if number == 4 else 0.9}
        for number, place in enumerate(places)
    ]
    asked = [("detection", select("AU1"))]
    assert [row[key] for row in smoothed(rows, asked, 2 / fps, 1 / fps)] == [0.9] * len(rows)
    rows[5][key] = 0.1  # two of the three in a window: no farther frame has a say
    assert [row[key] for row in smoothed(rows, asked, 2 / fps, 1 / fps)] == [row[key] for row in rows]


def test_a_window_without_another_frame_is_refused(clip, folder, capsys):
    assert recognize(folder, clip, "--fps", "2", "--smooth", "0.5", "--output", "t.csv") == 2
    assert "--smooth 0.5 seconds hold no other frame at --fps 2; give at least 1," in capsys.readouterr().err
    assert recognize(folder, clip, "--smooth", "0.1", "--output", "t.csv") == 0  # ten frames a second
    assert "hold no other of its 10 frames a second, so nothing is smoothed; give at least 0.2." in (
        capsys.readouterr().err
    )


def test_a_film_has_a_rate_that_mpeg_4_takes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = cv2.VideoWriter("fast.avi", cv2.VideoWriter.fourcc(*"MJPG"), 66.667, (96, 96))
    for shade in range(8):
        writer.write(np.full((96, 96, 3), 30 * shade, np.uint8))
    writer.release()
    assert recognize(folder, "fast.avi", "--fps", "20", "--output", "t.csv", "--overlay", "film.mp4") == 0
    assert Video.open("film.mp4").rate == pytest.approx(67)


def test_a_film_is_no_larger_than_mpeg_4_takes(tmp_path):
    matroska(tmp_path / "wide.mkv", [Image.new("RGB", (4200, 64))], [0, 100], 10)
    film = tmp_path / "film.mp4"
    films.write_film(film, Video.open(str(tmp_path / "wide.mkv")), iter([]), ("detection", select("AU12")))
    assert 7500 < next(Video.open(str(film)).frames()).image.width < 8192


def test_a_time_line_has_no_gap_where_frames_are_far_apart(clip, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        films, "draw_timeline", lambda values, *rest: drawn.append(values) or draw_timeline(values, *rest)
    )
    asked = [("detection", select("AU1,AU12"))]
    times = [*range(20), *(20 + step / 30 for step in range(60))]
    rows = [{"frame": frame, "time": time, "status": "ok", "face": 1, "AU1_detection_expected": time > 10,
             "AU12_detection_expected": 0.5} for frame, time in enumerate(times)]  # fmt: skip
    rows[5:7] = [{"frame": frame, "time": frame, "status": "no face"} for frame in (5, 6)]
    write_timelines(Path("t"), Video(clip, 80 / 22, 80), lambda: iter(rows), asked, None)
    first, second = drawn[0][1]
    moments = (np.arange(films.STEPS) + 0.5) / films.STEPS * (times[-1] + 22 / 80)
    assert (np.isnan(first) == ((moments > 5) & (moments < 7))).mean() > 0.995
    seen = ~np.isnan(first)
    assert (first[seen] == (moments[seen] > 11)).mean() > 0.995 and (second[seen] == 0.5).all()


def test_time_lines_of_equal_names_do_not_meet(clip, folder):
    for name in ("in/a/b.mp4", "in/a_b.mp4"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, name)
    assert recognize(folder, "in", "--fps", "1", "--output", "t.csv") == 0
    assert Path("t.csv.a/b.mp4.detection.png").is_file() and Path("t.csv.a_b.mp4.detection.png").is_file()


def test_time_lines_do_not_meet_the_files_of_unfinished_jobs(clip, folder):
    folders = ("full", "partial_occlusion", "partial", "partial_", "partial-1")
    for name in folders:
        Path("in", name).mkdir(parents=True)
        shutil.copy(clip, Path("in", name, "a.mp4"))
    shutil.copy(clip, "in/partial.mp4")
    for _ in range(2):  # the second job finds the time lines of the first
        assert recognize(folder, "in", "--fps", "1", "--output", "t.csv") == 0
    drawn = ("full", "partial_occlusion", "partial_", "partial__", "partial-1_")
    assert {str(path) for path in Path().rglob("t.csv*.png")} == {"t.csv.partial.mp4.detection.png"}
    assert {str(path) for path in Path().glob("t.csv*/*")} == {f"t.csv.{name}/a.mp4.detection.png" for name in drawn}
    assert not Path("t.csv.partial").exists() and len(read("t.csv")) == 3 * 6


def test_a_transport_stream_is_a_video(clip, folder):
    Path("in").mkdir()
    for name in ("in/a.ts", "in/b.m2ts"):
        write(name, [Image.new("RGB", (96, 64))] * 25)
    assert recognize(folder, "in", "--fps", "1", "--output", "t.csv") == 0
    assert [(row["file"], row["frame"]) for row in read("t.csv")] == [
        (name, frame) for name in ("in/a.ts", "in/b.m2ts") for frame in ("0", "10", "20")
    ]


@needs_ffmpeg
def test_the_film_keeps_time_and_sound(clip, folder):
    ffmpeg("-f", "lavfi", "-i", "sine=duration=2.5", "-i", clip, "-c:v", "copy", "-map", "0", "-map", "1", "sound.mp4")
    assert recognize(folder, "sound.mp4", clip, "--fps", "2", "--output", "t.jsonl", "--overlay", "drawn") == 0
    found = subprocess.run(["ffprobe", "drawn/sound.mp4.mp4"], capture_output=True, text=True).stderr
    assert "Audio: aac" in found and "h264" in found and "Duration: 00:00:02.5" in found
    frames = list(Video.open("drawn/sound.mp4.mp4").frames())
    assert len(frames) == 25 and frames[0].image.size == (720 + 360, 480)
    assert np.asarray(frames[20].image)[100:300, 100:300, 0].mean() > 150  # the video's picture is there, enlarged
    assert np.asarray(frames[20].image)[:, 720:].std() > 20  # and bars beside it
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["clip.mp4.mp4", "sound.mp4.mp4"]


@needs_ffmpeg
def test_a_film_s_sound_goes_with_its_picture(clip, tmp_path):
    tone = "sine=duration=4,volume='if(lt(t,2),0,1)':eval=frame"  # from 2 seconds on; the picture begins at 1.5
    ffmpeg("-f", "lavfi", "-i", tone, "-itsoffset", "1.5", "-i", clip, "-map", "0", "-map", "1", "late.mp4")
    films.write_film(Path("film.mp4"), Video.open("late.mp4"), iter(()), ("detection", select("AU1")))
    ffmpeg("-i", "film.mp4", "-f", "s16le", "-ac", "1", "-ar", "8000", "sound")
    begins = int((abs(np.fromfile("sound", dtype=np.int16)) > 1000).argmax()) / 8000
    assert Video.open("film.mp4").count == 25 and abs(begins - 0.5) < 0.1


def test_a_film_that_is_being_drawn_is_nobody_s_input(clip, monkeypatch):
    seen = []

    def look(silent, *others):
        seen.extend(expand(["drawn"]))

    monkeypatch.setattr(films.shutil, "which", lambda name: name)
    monkeypatch.setattr(films, "_add_sound", look)
    films.write_film(Path("drawn/film.mp4"), Video.open(clip), iter(()), ("detection", select("AU1")))
    assert seen == ["drawn"] and expand(["drawn"]) == ["drawn/film.mp4"]  # the folder itself: there was nothing in it


def test_a_film_has_room_for_the_bars_of_two_faces():
    units = {unit.code: {"name": unit.name, "value": 1, "expected_value": 0.9} for unit in select("bp4d")}
    faces = [{"id": number, "task": "detection", "action_units": units} for number in (2, 1, 3)]
    blue = [(np.asarray(_panel(faces[:count], 360, 480)).astype(int) @ [-1, 0, 1] > 120).any(1) for count in range(4)]
    bars = [int(np.diff(rows.astype(int)).clip(0).sum()) for rows in blue]
    assert bars == [0, 12, 24, 24]
    assert (np.asarray(_panel(faces, 360, 480)) == np.asarray(_panel(faces[:2], 360, 480))).all()


def faces_of_films(monkeypatch, calibration: dict) -> list[dict]:
    """Lets every model have a calibration; what films show is put into the list."""
    shown: list[dict] = []
    monkeypatch.setattr(films, "_panel", lambda faces, *size: shown.extend(faces) or _panel(faces, *size))
    load = photos.load_pipeline

    def calibrated(*arguments):
        pipe = load(*arguments)
        pipe.processor.calibration = calibration
        return pipe

    monkeypatch.setattr("au_llava.recognize.load_pipeline", calibrated)
    return shown


def test_a_film_s_bars_show_thresholds(clip, folder, monkeypatch):
    shown = faces_of_films(monkeypatch, {"detection": {"thresholds": {"AU1": 0.25}}})
    question = ("--action-units", "AU1,AU12", "--fps", "1", "--output", "t.csv", "--overlay", "drawn")
    assert recognize(folder, clip, *question) == recognize(folder, clip, *question, "--task", "intensity_level") == 0
    limits = [[unit.get("threshold") for unit in face["action_units"].values()] for face in shown]
    assert limits == [[0.25, 0.5]] * 3 + [[None, None]] * 3


def test_intervals_go_with_a_video_s_answers(clip, folder, monkeypatch):
    shown = faces_of_films(monkeypatch, {"intensity_level": {"margins": {"AU1": [1, 2]}}})
    question = ("--action-units", "AU1,AU12", "--fps", "2", "--task", "intensity_level", "--smooth", "1")
    assert recognize(folder, clip, *question, "--output", "t.jsonl", "--overlay", "drawn") == 0
    lines = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    for line in lines:
        value = line["AU1_intensity_level"]
        ends = [max(value - 2, 0), min(value + 2, 5)] if value else [0, 1]
        assert [line["AU1_intensity_level_low"], line["AU1_intensity_level_high"]] == ends
        assert line["AU12_intensity_level_low"] is line["AU12_intensity_level_high"] is None
    drawn = [[unit.get("interval") for unit in face["action_units"].values()] for face in shown]
    ends = [[line[f"AU1_intensity_level_{end}"] for end in ("low", "high")] for line in lines]
    assert lines and drawn == [[own, None] for own in ends]


def test_where_ffmpeg_fails_the_film_is_silent(clip, folder, monkeypatch, capsys):
    Path("bin").mkdir()
    Path("bin/ffmpeg").write_text("#!/bin/sh\necho \"Unknown encoder 'libx264'\" >&2\nexit 1\n")
    Path("bin/ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(Path("bin").absolute()), prepend=os.pathsep)
    assert recognize(folder, clip, "--fps", "2", "--output", "t.csv", "--overlay", "film.mp4") == 0
    assert "film.mp4: ffmpeg failed (Unknown encoder 'libx264'); the film is silent" in capsys.readouterr().err
    assert len(list(Video.open("film.mp4").frames())) == 25
    assert sorted(path.name for path in Path().glob("*.mp4")) == ["clip.mp4", "film.mp4"]


def test_bad_videos_lose_nothing(clip, folder, tmp_path):
    data = Path(clip).read_bytes()
    Path("cut.mp4").write_bytes(data[: len(data) // 2])
    Path("zero.mp4").touch()
    Path("text.mov").write_text("no video")
    Image.new("RGB", (60, 60)).save("photo.png")
    assert recognize(folder, "cut.mp4", "zero.mp4", "text.mov", "none.avi", clip, "photo.png", "--fps", "1",
                     "--output", "t.csv") == 1  # fmt: skip
    rows = read("t.csv")
    failed = {row["file"] for row in rows if row["status"] == "failed"}
    assert failed == {"cut.mp4", "zero.mp4", "text.mov", "none.avi"}
    assert all(row["file"] in row["error"] for row in rows if row["status"] == "failed")
    assert [row["frame"] for row in rows if row["file"] == clip] == ["0", "10", "20"]
    assert [row["frame"] for row in rows if row["file"] == "photo.png"] == [""]


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_what_stands_before_the_damage_is_kept(tmp_path, monkeypatch, folder, name):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (100, 64, 96, 3), dtype=np.uint8)
    pictures = [Image.fromarray(picture) for picture in noise]
    if name == "cut.mkv":
        matroska(name, pictures, [*range(0, 10_100, 100)], 10)
    else:
        write(name, pictures)
        index_first(name)
    assert len(list(Video.open(name).frames())) == 100
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: len(data) // 2])
    assert recognize(folder, name, "--output", "t.csv") == 1
    *rows, last = read("t.csv")
    assert 30 < len(rows) < 60 and {row["status"] for row in rows} == {"ok"}
    end = float(rows[-1]["time"])
    assert last["status"] == "failed"
    assert re.search(rf"{name}: damaged after frame \d+, {end:.1f} of 10.0 seconds; the rows", last["error"])


def test_a_damaged_frame_amid_a_video_is_told(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    matroska("talk.mkv", [Image.new("RGB", (96, 64))] * 25, [*range(0, 2600, 100)], 10)
    data = bytearray(Path("talk.mkv").read_bytes())
    tenth = [found.start() for found in re.finditer(b"\xff\xd8\xff", data)][9]
    data[tenth : data.index(b"\xff\xd9", tenth)] = bytes(data.index(b"\xff\xd9", tenth) - tenth)
    Path("talk.mkv").write_bytes(data)
    assert recognize(folder, "talk.mkv", "--output", "t.csv") == 1
    *rows, last = read("t.csv")
    assert [row["frame"] for row in rows] == list("012345678")
    assert "talk.mkv: damaged after frame 8, 0.8 of 2.5 seconds" in last["error"]


def shades_of_film(video):
    """Which of the video's pictures, each 10 brighter than the one before, a film made of it shows."""
    films.write_film(Path("film.mp4"), Video.open(video), iter([]), ("detection", select("AU12")))
    frames = Video.open("film.mp4").frames()
    return [round(np.asarray(frame.image)[:, :300, 0].mean() / 10) for frame in frames]


def test_a_film_keeps_a_picture_until_the_next_is_shown(clip):
    write("few.mp4", [Image.new("RGB", (320, 240), (number * 10, 0, 0)) for number in range(5)], rate=1)
    timed("gap.mp4", "few.mp4", [0, 300, 600, 2600, 2900, 3200])
    assert Video.open("gap.mp4").rate == 5 / 3.2  # the film's, too, so the first two are nearer than its pictures
    assert shades_of_film("gap.mp4") == [1, 2, 2, 2, 3, 4]


def test_a_film_drops_no_picture_whose_time_is_rounded(clip):
    pictures = [Image.new("RGB", (320, 240), (number * 10, 0, 0)) for number in range(25)]
    matroska("whole.mkv", pictures, [round(number * 1000 / 30) for number in range(26)], 30)
    assert [frame.time for frame in Video.open("whole.mkv").frames()][:4] == pytest.approx([0, 0.033, 0.067, 0.1])
    assert shades_of_film("whole.mkv") == list(range(25))


def test_a_video_that_failed_in_the_middle_is_tried_again_from_there(clip, folder, monkeypatch):
    pictures = [Image.new("RGB", (96, 64), (number * 3, 0, 0)) for number in range(80)]
    write("long.mp4", pictures)
    matroska("cut.mkv", pictures[:20], [*range(0, 2100, 100)], 10)
    Path("cut.mkv").write_bytes(Path("cut.mkv").read_bytes()[:8000])
    Path("zero.mp4").touch()
    command = ("long.mp4", "cut.mkv", "zero.mp4", clip, "--output", "t.csv")

    def interrupted(*_):
        raise KeyboardInterrupt

    given, groups = [], 1

    def unsteady(pipe, video, asked, per_second, earlier, **settings):
        earlier = list(earlier)
        given.append((video.path, len(earlier)))
        yield from islice(recognize_video(pipe, video, asked, per_second, earlier, **settings), groups)
        if groups == 1:
            raise OSError(f"{video.path}: the disk went away")

    with monkeypatch.context() as patch:
        patch.setattr("au_llava.recognize.write_table", interrupted)
        patch.setattr("au_llava.videos.recognize_video", unsteady)
        assert recognize(folder, *command) == 130
        groups = None
        assert recognize(folder, *command) == 130
        assert recognize(folder, *command) == 130
    cut = len(list(Video.open("cut.mkv").frames()))
    assert given == [("long.mp4", 0), ("cut.mkv", 0), (clip, 0), ("long.mp4", 64), ("cut.mkv", cut), (clip, 25),
                     ("cut.mkv", cut)]  # fmt: skip
    assert recognize(folder, *command) == 1 and not Path("t.csv.partial").exists()
    assert recognize(folder, *command[:-1], "whole.csv") == 1
    assert Path("t.csv").read_text() == Path("whole.csv").read_text()
    files = ["long.mp4"] * 80 + ["cut.mkv"] * (cut + 1) + ["zero.mp4"] + [clip] * 25
    assert 5 < cut < 15 and [row["file"] for row in read("t.csv")] == files


def test_a_film_that_cannot_be_drawn_costs_no_row(clip, folder, capsys):
    name = "cost $1_$2.mp4"
    Path(clip).rename(name)
    arguments = (name, "--fps", "2", "--output", "t.csv", "--overlay")
    assert (
        recognize(folder, *arguments, "film.png") == 2
        and "name a folder, or a file in .mp4" in capsys.readouterr().err
    )
    Path("drawn", f"{name}.mp4").mkdir(parents=True)
    assert recognize(folder, *arguments, "drawn") == 1
    assert (
        f"au-llava: {name}: not drawn (" in (err := capsys.readouterr().err) and "0 failed, 1 not drawn: t.csv" in err
    )
    assert [row["frame"] for row in read("t.csv")] == ["0", "5", "10", "15", "20"]
    assert Path(f"t.csv.{name}.detection.png").is_file() and not Path("t.csv.partial").exists()


def test_videos_need_a_table_to_go_to(clip, folder, capsys):
    assert recognize(folder, clip) == 2
    assert "--output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        recognize(folder, clip, "--fps", "0")


def test_faces_are_followed(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    person = Image.fromarray(astronaut()).crop((130, 10, 330, 210)).resize((120, 120))
    pictures = []
    for number in range(6):
        picture = Image.new("RGB", (320, 130), "#556677")
        if number != 3:
            picture.paste(person, (4 * number, 5))
        if number > 1:
            picture.paste(person, (196 - 3 * number, 5))
        pictures.append(picture)
    write("pair.mp4", pictures)
    assert recognize(folder, "pair.mp4", "--output", "t.csv", "--overlay", "drawn", detector="cascade") == 0
    seen = {(int(row["frame"]), int(row["face"])): float(row["box_x0"]) for row in read("t.csv")}
    assert {number for number, face in seen if face == 1} == {0, 1, 2, 4, 5}
    assert {number for number, face in seen if face == 2} == {2, 3, 4, 5}
    assert all((x < 100) == (face == 1) for (_, face), x in seen.items())


def test_a_killed_job_goes_on_and_ends_with_the_same_file(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (200, 8, 12, 3), dtype=np.uint8)
    write("long.mp4", [Image.fromarray(picture).resize((96, 64)) for picture in noise])
    command = [sys.executable, "-m", "au_llava", "recognize", "long.mp4", "--model", folder, "--detector", "none"]
    command += ["--output", "t.csv"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*command, "--output", "t.csv"], env=environment, stderr=subprocess.DEVNULL)
    journal, until = Path("t.csv.partial"), time.monotonic() + 300
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 2) and time.monotonic() < until:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    done = journal.read_bytes().count(b"\n") - 1
    assert 0 < done < 4 and not Path("t.csv").exists()
    with journal.open("ab") as file:
        file.write(b'{"part": "long.mp4", "done": fal')
    assert recognize(folder, "long.mp4", "--output", "t.csv") == 0
    assert not journal.exists()
    assert recognize(folder, "long.mp4", "--output", "whole.csv") == 0
    assert Path("t.csv").read_text() == Path("whole.csv").read_text()


def test_ids_follow_places():
    tracker = Tracker(patience=1.0)
    left, right = (0, 0, 100, 100), (300, 0, 400, 100)
    assert tracker.update(0.0, [left, right]) == [1, 2]
    assert tracker.update(0.1, [right, left]) == [2, 1]
    assert tracker.update(0.2, []) == []
    assert tracker.update(0.9, [(60, 0, 160, 100)]) == [1]  # moved on while it was not seen
    assert tracker.update(1.0, [(60, 0, 85, 25)]) == [3]  # a much smaller face is someone else
    assert tracker.update(2.5, [right]) == [4]  # too late
    assert tracker.update(2.6, [(150, 500, 250, 600), (330, 0, 430, 100)]) == [5, 4]


def test_a_face_keeps_its_id_from_frame_to_frame_however_far_apart_they_are():
    first, resumed = Tracker(patience=1.0), Tracker(patience=1.0)
    still, other = (400, 200, 600, 400), (0, 0, 100, 100)
    assert first.update(0.0, [still, other]) == [1, 2]
    assert first.update(2.0, [still]) == [1]
    assert first.update(4.0, [other, still]) == [3, 1], "the other was lost for longer than it is waited for"
    for when, faces in ((0.0, [(1, still), (2, other)]), (2.0, [(1, still)])):
        resumed.note(when, faces)
    assert resumed.update(4.0, [other, still]) == [3, 1]
    first.update(6.0, [])
    assert first.update(8.0, [still]) == [4]


def test_a_face_that_stays_keeps_its_id_whatever_the_others_do():
    tracker, still = Tracker(), (400, 200, 600, 400)
    assert tracker.update(0.0, [(50, 250, 150, 350), still]) == [1, 2]
    assert tracker.update(0.04, [still, (770, 170, 1030, 430)]) == [2, 3]
    assert tracker.update(0.08, [still]) == [2]


def test_crossing_faces_keep_their_ids():
    tracker = Tracker()
    for step in range(21):
        x = 10 * step
        boxes = [(x, 0, x + 60, 60), (200 - x, 40, 260 - x, 100)]
        assert tracker.update(step / 25, boxes) == [1, 2]


def test_a_time_line_shows_the_values():
    values = {1: np.linspace(0, 5, 20).reshape(2, 10), 4: np.full((2, 10), np.nan)}
    figure = draw_timeline(
        values, {"AU1": "Inner Brow Raiser", "AU12": "Lip Corner Puller"}, "intensity_level", 2.5, "x"
    )
    *axes, bar = figure.axes
    assert [one.get_title(loc="left") for one in axes] == ["Face 1", "Face 4"]
    assert np.array_equal(axes[0].images[0].get_array(), values[1])
    assert axes[0].images[0].get_clim() == (0, 5) and axes[0].images[0].get_extent()[:2] == [0, 2.5]
    assert [label.get_text() for label in axes[1].get_yticklabels()] == [
        "AU1 Inner Brow Raiser",
        "AU12 Lip Corner Puller",
    ]
    assert bar.get_ylabel() == "mean, 0 to 5"
    with pytest.raises(ValueError, match="no face"):
        draw_timeline({}, {}, "detection", 1.0)
