import json
import signal
import subprocess
import sys
import time
from unittest.mock import create_autospec

import numpy as np
import pyarrow.parquet as pq
import pytest
from dataset_trees import bp4d_tree, disfa_tree, save, shade, write_occurrence
from datasets import load_dataset
from huggingface_hub import HfApi
from PIL import Image
from skimage.data import astronaut

from au_llava.datasets_scripts import bp4d, builder, disfa, preparation, report
from au_llava.datasets_scripts.csv_labels import CsvLabels
from au_llava.datasets_scripts.instructions import FreshSamples
from au_llava.datasets_scripts.preparation import Settings, digest_code, prepare
from au_llava.datasets_scripts.recordings import Recording
from au_llava.face_alignment import find_faces


NONE = Settings(detector="none")


@pytest.fixture
def tree(tmp_path):
    return bp4d_tree(tmp_path / "BP4D")


def times(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def rows(folder) -> list[dict]:
    return [row for path in sorted((folder / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def own_recording(paths, sequence="S1", labels=None) -> Recording:
    labels = np.ones((len(paths), 1)) if labels is None else labels
    numbers = tuple(range(1, len(paths) + 1))
    return Recording("own", "detection", ("AU12",), "S", sequence, numbers, labels, images=tuple(paths))


def test_shards_hold_crops_and_labels_and_load_as_they_are(tree, tmp_path):
    manifest, made = prepare(bp4d.find_recordings(tree), tmp_path / "out", NONE)
    assert made == 4 and manifest["frames"] == 8 and manifest["complete"]
    assert manifest["subjects"] == {"F001": 3, "F007": 1, "M007": 2, "M011": 2}
    assert manifest["left_out"] == [{"sequence": "M007_T2", "why": "no picture in T2", "frames": [2]}]
    assert manifest["settings"]["crop_size"] == 224 and manifest["versions"]["datasets"]
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(data) == 8 and data[0]["images"][0].size == (224, 224)
    asked = data.with_transform(FreshSamples())[0]
    assert asked["completion"][0]["content"] == "[0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]"


def test_a_second_run_does_nothing(tree, tmp_path):
    first, _ = prepare(bp4d.find_recordings(tree), tmp_path / "out", NONE)
    before = times(tmp_path / "out")
    again, made = prepare(bp4d.find_recordings(tree), tmp_path / "out", NONE)
    assert made == 0 and again == first and times(tmp_path / "out") == before


def test_only_what_changed_is_made_again(tree, tmp_path):
    prepare(bp4d.find_recordings(tree), tmp_path / "out", NONE)
    before = times(tmp_path / "out" / "data")
    write_occurrence(tree, "M011_T1", {5: {1: 1}, 6: {}})
    _, made = prepare(bp4d.find_recordings(tree), tmp_path / "out", NONE)
    after = times(tmp_path / "out" / "data")
    assert made == 1 and [name for name in after if after[name] != before[name]] == ["M011_T1-00000.parquet"]
    assert sum(sum(row["labels"]) for row in rows(tmp_path / "out") if row["sequence"] == "M011_T1") == 1


def test_a_killed_run_is_taken_up_where_it_stopped(tree, tmp_path):
    for index in range(15):
        write_occurrence(tree, f"M0{index % 18 + 1:02d}_T{index // 18 + 3}", {n: {4: 1} for n in range(1, 21)})
        for n in range(1, 21):
            save(tree / "Sequences(2D+3D)" / f"M0{index % 18 + 1:02d}" / f"T{index // 18 + 3}" / f"{n:03d}.jpg", n)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "au_llava.datasets_scripts.bp4d", "--data_dir", str(tree)]
    command += ["--output_dir", str(out), "--detector", "none", "--workers", "1"]
    process = subprocess.Popen(command, cwd=bp4d.__file__.rsplit("/", 2)[0], stderr=subprocess.DEVNULL)
    while len(list(out.glob("data/*.parquet"))) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = times(out / "data")
    whole = {name: stamp for name, stamp in before.items() if name.endswith(".parquet")}
    assert 3 <= len(whole) < 19 and not json.loads((out / "manifest.json").read_text())["complete"]
    with pytest.raises(ValueError, match="has not finished"):
        report.push_to_hub(out, "me/bp4d")
    manifest, made = prepare(bp4d.find_recordings(tree), out, NONE)
    after = times(out / "data")
    assert made == 19 - len(whole) and manifest["frames"] == 15 * 20 + 8
    assert {name: after[name] for name in whole} == whole and not any(name.endswith(".partial") for name in after)
    frames = [(row["sequence"], row["frame"]) for row in rows(out)]
    assert len(frames) == len(set(frames)) == 308


def test_several_processes_make_the_same_files(tmp_path):
    tree = disfa_tree(tmp_path / "DISFA")
    for workers in (1, 2):
        prepare(disfa.find_recordings(tree), tmp_path / str(workers), NONE, workers)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n / "data").iterdir()} for n in ("1", "2"))
    assert len(one) == 3 and one == two


def test_long_recordings_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "SHARD_FRAMES", 2)
    tree = disfa_tree(tmp_path / "DISFA")
    prepare(disfa.find_recordings(tree), tmp_path / "out", NONE)
    shards = sorted(path.name for path in (tmp_path / "out" / "data").glob("SN010*"))
    assert shards == [f"SN010-{start:05d}.parquet" for start in (0, 2, 4)]
    found = [
        (row["frame"], round(shade(_open(row)), -1)) for row in rows(tmp_path / "out") if row["subject"] == "SN010"
    ]
    assert found == [(1, 20), (2, 40), (4, 80), (5, 100), (6, 120)]


def _open(row: dict) -> Image.Image:
    return find_faces(preparation.face_alignment.open_image(row["images"][0]["bytes"]), "none")[0].crop


def test_faces_are_aligned_as_in_photographs_and_empty_pictures_told(tmp_path):
    photograph = Image.fromarray(astronaut())
    photograph.save(tmp_path / "1.png")
    Image.new("RGB", (200, 200), "green").save(tmp_path / "2.png")
    photograph.crop((0, 0, 512, 300)).save(tmp_path / "3.png")
    recording = own_recording([tmp_path / f"{n}.png" for n in (1, 2, 3)])
    manifest, _ = prepare([recording], tmp_path / "out", Settings(detector="cascade"))
    assert manifest["left_out"] == [{"sequence": "S1", "why": "no face found", "frames": [2]}]
    assert manifest["aligned_by_five_points"] == 0
    expected = find_faces(photograph, "cascade")[0].crop
    got = _open(rows(tmp_path / "out")[0])
    assert np.abs(np.asarray(got, float) - np.asarray(expected, float)).mean() < 2  # JPEG at quality 95


def test_one_bad_picture_does_not_harm_the_others(tmp_path):
    paths = [save(tmp_path / f"{n}.jpg", 30 * n) for n in range(1, 7)]
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    paths[2].write_bytes(b"")
    paths[5].unlink()
    paths[5].symlink_to(tmp_path / "not mounted" / "6.jpg")
    labels = np.array([[1.0], [1.0], [1.0], [np.nan], [0.0], [1.0]])
    manifest, _ = prepare([own_recording(paths, labels=labels)], tmp_path / "out", NONE)
    assert [row["frame"] for row in rows(tmp_path / "out")] == [1, 5]
    why = {entry["frames"][0]: entry["why"] for entry in manifest["left_out"]}
    assert why[4] == "no known label" and set(why) == {2, 3, 4, 6}
    assert why[6].startswith(f"unreadable image: {paths[5]}: no such file")
    assert why[2].startswith(f"unreadable image: {paths[1]}") and why[3].startswith(f"unreadable image: {paths[2]}")


def test_a_truncated_video_is_reported(tmp_path):
    tree = disfa_tree(tmp_path / "DISFA")
    video = tree / "Videos_LeftCamera" / "LeftVideoSN003_comp.avi"
    video.write_bytes(video.read_bytes()[: len(video.read_bytes()) // 2])
    manifest, _ = prepare(disfa.find_recordings(tree), tmp_path / "out", NONE)
    entry = next(entry for entry in manifest["left_out"] if entry["sequence"] == "SN003")
    assert "LeftVideoSN003_comp.avi cannot be read beyond frame" in entry["why"]
    assert manifest["subjects"]["SN003"] + len(entry["frames"]) == 6 and manifest["subjects"]["SN013"] == 6


def test_a_link_to_a_video_that_is_gone_costs_that_video_alone(tmp_path):
    tree = disfa_tree(tmp_path / "DISFA")
    video = tree / "Videos_LeftCamera" / "LeftVideoSN003_comp.avi"
    film = video.rename(tmp_path / video.name)
    video.symlink_to(tmp_path / "not mounted" / video.name)
    manifest, _ = prepare(disfa.find_recordings(tree), tmp_path / "out", NONE)
    assert manifest["subjects"] == {"SN003": 0, "SN010": 5, "SN013": 6}
    assert "LeftVideoSN003_comp.avi cannot be read beyond frame 0" in str(manifest["left_out"])
    video.unlink()
    video.symlink_to(film)
    manifest, made = prepare(disfa.find_recordings(tree), tmp_path / "out", NONE)
    assert made == 1 and manifest["subjects"]["SN003"] == 6


def test_other_settings_need_another_folder(tree, tmp_path):
    recordings = bp4d.find_recordings(tree)
    prepare(recordings, tmp_path / "out", NONE)
    before = times(tmp_path / "out")
    with pytest.raises(ValueError, match="made with settings.*Give another output folder"):
        prepare(recordings, tmp_path / "out", Settings(detector="cascade"))
    with pytest.raises(ValueError, match="made with task detection"):
        prepare(bp4d.find_recordings(tree, "intensity_level"), tmp_path / "out", NONE)
    assert times(tmp_path / "out") == before
    with pytest.raises(ValueError, match="detector"):
        prepare(recordings, tmp_path / "new", Settings(detector="yolo"))
    with pytest.raises(ValueError, match="no labelled frames"):
        prepare([], tmp_path / "new", NONE)


def test_crops_of_two_detectors_are_not_mixed(tmp_path, monkeypatch):
    asked, out = [], tmp_path / "out"
    first, second = (own_recording([save(tmp_path / f"{name}.jpg", 90)], name) for name in ("S1", "S2"))

    def find(image, detector, max_faces=None):
        asked.append(detector)
        return find_faces(image, "none")

    monkeypatch.setattr(preparation, "find_faces", find)
    monkeypatch.setattr(preparation, "which_detector", lambda detector: "cascade")
    manifest, _ = prepare([first], out)
    assert asked == ["auto", "cascade"] and manifest["detector"] == "cascade"
    monkeypatch.setattr(preparation, "which_detector", lambda detector: "models/det_10g.onnx")
    assert prepare([first], out) == (manifest, 0)
    with pytest.raises(ValueError, match="crops found by cascade, and this run would add some found by det_10g.onnx"):
        prepare([first, second], out)


def test_rows_follow_the_detector_that_found_the_faces(tmp_path, monkeypatch):
    save(tmp_path / "face.png", 60)
    (tmp_path / "labels.csv").write_text("image,AU12\nface.png,1\n")

    def grey(detector: str, **folders) -> int:
        """What the one crop shows, when `auto` stands for this detector."""
        for module in (preparation, builder):
            monkeypatch.setattr(module, "which_detector", lambda asked: detector)
        shown = Image.new("RGB", (64, 64), (60, 60, 60) if detector == "cascade" else (200, 200, 200))
        monkeypatch.setattr(preparation, "find_faces", lambda *_, **__: find_faces(shown, "none"))
        data = CsvLabels(data_dir=str(tmp_path / "labels.csv"), cache_dir=str(tmp_path / "cache"), **folders)
        data.download_and_prepare()
        return data.as_dataset("train")[0]["images"][0].getpixel((9, 9))[0]

    first, second = ({"crops_dir": str(tmp_path / name)} for name in ("first", "second"))
    assert grey("cascade", **first) == 60 and grey("models/det_10g.onnx", **second) == 200
    assert grey("models/det_10g.onnx", **first) == 60, "these crops were there already"
    assert grey("cascade") == 60 and grey("models/det_10g.onnx") == 200, "in the cache, a folder for each"


def test_a_quick_look_takes_a_few_frames_of_each_sequence(tree, tmp_path):
    manifest, _ = prepare(bp4d.find_recordings(tree), tmp_path / "out", Settings("none", limit=5), 1, bp4d.PUBLISHED)
    assert manifest["frames"] == 5 and manifest["comparison"] == []
    assert manifest["subjects"] == {"F001": 2, "F007": 1, "M007": 2, "M011": 0}


@pytest.mark.parametrize("option", ["--limit", "--workers"])
def test_no_frame_or_process_at_all_is_refused_by_the_option_s_name(tree, tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        bp4d.main(["--data_dir", str(tree), "--output_dir", str(tmp_path / "out"), "--detector", "none", option, "0"])
    assert f"argument {option}: '0' is no number of 1 or more" in capsys.readouterr().err


def test_counts_are_compared_in_plain_words():
    published = {"a list": {"F001": 3, "F002": 2}, "another": {"F001": 3, "F002": 4}}
    assert report.compare({"F001": 3, "F002": 2}, published) == [
        "a list: 5 frames; here 5, the same.",
        "another: 7 frames; here 5 (-2). F002: 4 there, 2 here (-2).",
    ]
    assert report.compare({"F003": 4, "F004": 0}, {"a list": {}}) == [
        "a list: 0 frames; here 4 (+4). F003: not there, 4 here."
    ]
    # Differences are told even where they cancel out.
    assert report.compare({"F001": 2, "F002": 3}, published)[0].startswith("a list: 5 frames; here 5 (+0). F001: 3")


def test_the_contact_sheet_shows_crops_of_the_whole_set(tmp_path):
    recordings = [
        own_recording([save(tmp_path / name / f"{n}.jpg", base + n) for n in range(40)], name)
        for name, base in (("dark", 40), ("light", 200))
    ]
    prepare(recordings, tmp_path / "out", NONE)
    sheet = Image.open(tmp_path / "out" / "contact_sheet.jpg")
    assert sheet.size == (8 * 112, 6 * 140)
    tiles = [sheet.crop((x * 112, y * 140, x * 112 + 112, y * 140 + 112)) for y in range(6) for x in range(8)]
    assert [shade(tile) > 150 for tile in tiles] == [False] * 24 + [True] * 24


def test_the_card_warns_and_the_upload_is_private(tree, tmp_path, monkeypatch):
    prepare(bp4d.find_recordings(tree), tmp_path / "out", NONE)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: other" in card and "Licence warning" in card and "8 face crops" in card
    hub = create_autospec(HfApi, instance=True)
    hub.create_repo.return_value = "https://example.org/datasets/me/bp4d"
    monkeypatch.setattr(report, "HfApi", lambda: hub)
    assert report.push_to_hub(tmp_path / "out", "me/bp4d") == "https://example.org/datasets/me/bp4d"
    hub.create_repo.assert_called_once_with("me/bp4d", repo_type="dataset", private=True, exist_ok=True)
    sent = hub.upload_folder.call_args.kwargs
    assert sent["folder_path"] == tmp_path / "out" and "data/M007_T2-00000.parquet" in sent["allow_patterns"]
    assert len(sent["allow_patterns"]) == 4 + 3 and sent["delete_patterns"] == "data/*"

    hub.upload_folder.reset_mock()
    hub.repo_info.return_value.private = False  # it was there before, and everyone sees it
    with pytest.raises(ValueError, match="me/bp4d is public; give --public"):
        report.push_to_hub(tmp_path / "out", "me/bp4d")
    hub.upload_folder.assert_not_called()
    report.push_to_hub(tmp_path / "out", "me/bp4d", private=False)
    hub.upload_folder.assert_called_once()


def test_the_card_of_one_s_own_pictures_speaks_of_no_agreement(tmp_path):
    prepare([own_recording([save(tmp_path / "1.jpg", 20)])], tmp_path / "out", NONE)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Aligned face crops of one's own pictures" in card and "everyone in it has agreed" in card
    assert "licen" not in card.lower() and "OWN" not in card


def test_who_is_not_listed_any_more_leaves_the_folder(tree, tmp_path):
    recordings = bp4d.find_recordings(tree)
    prepare(recordings, tmp_path / "out", NONE)
    kept = [recording for recording in recordings if recording.subject != "F001"]
    manifest, made = prepare(kept, tmp_path / "out", NONE)
    assert made == 0 and "F001" not in manifest["subjects"]
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == sorted(manifest["shards"])


def test_the_code_digest_ignores_comments_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    sources = ["def f():\n    return 1\n", "# why\ndef f():\n\n    return 1  # one\n", "def f():\n    return 2\n"]
    for index, source in enumerate(sources):
        (tmp_path / f"variant{index}.py").write_text(source)
    first, same, other = (digest_code(__import__(f"variant{index}")) for index in range(3))
    assert first == same != other


def test_pictures_of_another_folder_are_others(tmp_path):
    first, second = (own_recording([save(tmp_path / name / "1.bmp", 20)]) for name in "ab")
    assert first.images[0].stat().st_size == second.images[0].stat().st_size
    assert preparation.fingerprint(first) != preparation.fingerprint(second)
