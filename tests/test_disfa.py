import math
import re

import numpy as np
import pytest
from dataset_trees import disfa_tree, shade, write_video

from au_llava.action_units import PRESETS
from au_llava.datasets_scripts.disfa import (
    BAD_LANDMARKS,
    PARTS,
    PUBLISHED,
    SUBJECTS,
    Disfa,
    find_recordings,
    has_bad_landmarks,
    main,
    read_levels,
)


@pytest.fixture
def tree(tmp_path):
    return disfa_tree(tmp_path / "DISFA")


def load(tree, tmp_path, name="fold1", **options):
    builder = Disfa(
        config_name=name, data_dir=str(tree), cache_dir=str(tmp_path / "cache"), detector="none", **options
    )
    builder.download_and_prepare()
    return builder.as_dataset()


def test_folds_hold_each_of_the_27_subjects_once():
    absent = {14, 15, 19, 20, 22}
    everyone = [f"SN{n:03d}" for n in range(1, 33) if n not in absent]
    assert sorted(subject for part in PARTS for subject in part) == everyone == list(SUBJECTS)
    assert [len(part) for part in PARTS] == [9, 9, 9]


def test_published_counts_and_bad_stretches_agree_with_jaanets():
    counts = PUBLISHED["ME-GraphAU, MDHR and FMAE"]
    assert [sum(counts[subject] for subject in part) for part in PARTS] == [43604, 43605, 43605]
    dropped = {s: sum(last - first + 1 for first, last in stretches) for s, stretches in BAD_LANDMARKS.items()}
    assert dropped["SN021"] == 3052 and not has_bad_landmarks("SN010", 1)
    # What is left is what JAANet's lists hold for each part.
    left = [sum(counts[subject] - dropped.get(subject, 0) for subject in part) for part in PARTS]
    assert left == [43173, 40344, 42627]


def test_levels_are_read_through_blanks_and_windows_line_ends(tmp_path):
    path, problems = tmp_path / "SN001_au1.txt", []
    path.write_bytes(b"1,0\r\n 2 , 5 \r\n\r\n4,3")
    assert read_levels(path, problems) == {1: 0, 2: 5, 4: 3} and not problems


def test_a_label_file_that_was_cut_to_nothing_is_named(tmp_path):
    path = disfa_tree(tmp_path) / "ActionUnit_Labels" / "SN013" / "SN013_au5.txt"
    path.write_text("")
    with pytest.raises(ValueError, match="SN013_au5.txt: no lines"):
        find_recordings(tmp_path)


def test_a_subject_s_folder_may_be_spelt_small(tree):
    found = [recording.subject for recording in find_recordings(tree)]
    labels = tree / "ActionUnit_Labels"
    (labels / "SN013").rename(labels / "sn013")
    assert [recording.subject for recording in find_recordings(tree)] == found and "SN013" in found


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("2,6", "'6' is none of 0, 1, 2, 3, 4, 5"),
        ("2,9", "'9' is none of"),
        ("2,NaN", "'NaN' is none of"),
        ("2,2.5", "'2.5' is none of"),
        ("2", "1 cells; frame and level are needed"),
        ("1,0", "frame 1 stands there twice"),
        ("-2,0", "'-2' is no frame number"),
        ("48454845,0", "frame 48454845 is beyond the 4845"),
    ],
)
def test_damaged_lines_are_named_and_left_out(tmp_path, line, complaint):
    path, problems = tmp_path / "SN001_au1.txt", []
    path.write_text(f"1,1\n{line}\n3,2\n")
    assert read_levels(path, problems) == {1: 1, 3: 2}
    assert len(problems) == 1 and problems[0].startswith(f"{path}:2: {complaint}")


def test_a_missing_label_file_is_named_or_its_unit_unknown(tree):
    path = tree / "ActionUnit_Labels" / "SN003" / "SN003_au9.txt"
    path.unlink()
    with pytest.raises(ValueError, match=f"{path}: cannot be read"):
        find_recordings(tree)
    recording = next(r for r in find_recordings(tree, skip_bad_labels=True) if r.subject == "SN003")
    assert np.isnan(recording.labels).any(0).tolist() == [code == "AU9" for code in PRESETS["disfa"]]


def test_missing_labels_are_reported_and_videos_found_whatever_their_capitals(tree):
    left = {recording.subject: recording for recording in find_recordings(tree)}
    assert left["SN010"].numbers == (1, 2, 4, 5, 6) and left["SN010"].left_out == ((3, "no label"),)
    right = {recording.subject: recording for recording in find_recordings(tree, "right")}
    assert right["SN013"].video.name == "RightVideoSN013_Comp.avi"
    assert right["SN003"].numbers == () and right["SN003"].left_out[0] == (1, "no video of the right camera")
    with pytest.raises(ValueError, match="camera 'top'"):
        find_recordings(tree, "top")
    with pytest.raises(FileNotFoundError, match="as distributed"):
        find_recordings(tree / "ActionUnit_Labels")


def test_two_videos_of_one_camera_are_not_chosen_from(tree):
    copy = write_video(tree / "cropped" / "leftvideosn010_comp.avi", [200] * 6)
    found = {recording.subject: recording for recording in find_recordings(tree)}
    assert found["SN010"].numbers == () and found["SN013"].numbers == (1, 2, 3, 4, 5, 6)
    both = f"2 videos: {tree / 'Videos_LeftCamera' / 'LeftVideoSN010_comp.avi'}, {copy}"
    assert found["SN010"].left_out[-1] == (6, both)


def test_frame_n_is_the_nth_picture_of_the_video(tree):
    recording = find_recordings(tree)[1]
    assert recording.subject == "SN010"
    shades = [(recording.numbers[position], round(shade(image), -1)) for position, image, _ in recording.pictures()]
    assert shades == [(1, 20), (2, 40), (4, 80), (5, 100), (6, 120)]
    later = recording.part(3, 5)
    assert [round(shade(image), -1) for _, image, _ in later.pictures()] == [100, 120]


def test_a_truncated_or_unreadable_video_is_told_frame_by_frame(tree):
    write_video(tree / "Videos_LeftCamera" / "LeftVideoSN010_comp.avi", [20, 40, 60, 80])
    (tree / "Videos_LeftCamera" / "LeftVideoSN013_comp.avi").write_bytes(b"RIFF, or not")
    found = {recording.subject: recording for recording in find_recordings(tree)}
    told = {found["SN010"].numbers[position]: why for position, image, why in found["SN010"].pictures() if not image}
    assert told == dict.fromkeys((5, 6), "LeftVideoSN010_comp.avi cannot be read beyond frame 4")
    assert [image for _, image, _ in found["SN013"].pictures()] == [None] * 6


def test_no_frame_after_a_damaged_one_gets_another_ones_picture(tree):
    video = tree / "Videos_LeftCamera" / "LeftVideoSN013_comp.avi"
    data = bytearray(video.read_bytes())
    third, fourth = [found.start() for found in re.finditer(b"00dc", data) if found.start() > data.index(b"movi")][2:4]
    data[third + 8 : fourth] = bytes(fourth - third - 8)  # after its name and length
    video.write_bytes(data)
    recording = next(recording for recording in find_recordings(tree) if recording.subject == "SN013")
    read = {recording.numbers[position]: image for position, image, _ in recording.pictures()}
    assert [number for number, image in read.items() if image] == [1, 2] and len(read) == 6


def test_rows_hold_levels_and_pictures_that_belong_together(tree, tmp_path):
    data = load(tree, tmp_path)
    assert set(data["test"]["subject"]) == {"SN010"} and set(data["train"]["subject"]) == {"SN013", "SN003"}
    for row in data["test"]:
        assert round(shade(row["images"][0]), -1) == 20 * row["frame"]
        levels = dict(zip(row["action_units"], row["labels"], strict=True))
        assert levels.pop("AU12") == min(row["frame"] - 1, 5) and not any(levels.values())
        assert row["task"] == "intensity_level" and row["action_units"] == list(PRESETS["disfa"])
    assert data["test"][4]["completion"][0]["content"] == "[0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0]"


@pytest.mark.parametrize(("threshold", "present"), [(2, [4, 5, 6]), (3, [4, 5, 6]), (4, [5, 6])])
def test_presence_begins_at_the_threshold(tree, tmp_path, threshold, present):
    data = load(tree, tmp_path, task="detection", threshold=threshold, action_units="disfa8")
    assert data["test"][0]["action_units"] == list(PRESETS["disfa8"]) and data["test"][0]["task"] == "detection"
    assert [row["frame"] for row in data["test"] if row["labels"][5] == 1] == present
    assert {value for row in data["train"] for value in row["labels"]} == ({0, 1} if threshold == 2 else {0})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"threshold": 3}, "threshold=3 says what is present; give task=detection with it"),
        ({"threshold": 0, "task": "detection"}, "threshold is 0; give the level, 1 to 5"),
        ({"threshold": "two", "task": "detection"}, "threshold is 'two'; give the level, 1 to 5"),
    ],
)
def test_a_threshold_that_says_nothing_is_refused(tree, tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        load(tree, tmp_path, **options)


def test_relations_count_a_unit_from_its_first_level_on(tree, tmp_path):
    for unit in (1, 2):  # of SN003, who is trained on in fold 1
        (tree / "ActionUnit_Labels" / "SN003" / f"SN003_au{unit}.txt").write_text("1,0\n2,0\n3,0\n4,1\n5,1\n6,1\n")
    (tree / "ActionUnit_Labels" / "SN013" / "SN013_au1.txt").write_text("".join(f"{n},0\n" for n in range(1, 7)))
    row = load(tree, tmp_path, relations=True, action_units="AU1,AU2")["test"][0]
    assert "when AU1 is active, AU2 is active in 100 % of frames" in row["prompt"][0]["content"]


def test_a_task_that_is_none_is_refused(tree, tmp_path):
    with pytest.raises(ValueError, match="rows of disfa for task 'detections'"):
        load(tree, tmp_path, task="detections")


def test_unknown_levels_stay_unknown_below_a_threshold(tree, tmp_path):
    path = tree / "ActionUnit_Labels" / "SN010" / "SN010_au4.txt"
    path.write_text("1,0\n2,0\n4,0\n6,0\n")
    row = load(tree, tmp_path, task="detection")["test"][3]
    assert row["frame"] == 5 and math.isnan(row["labels"][2]) and "AU4 " not in row["prompt"][0]["content"]


def test_bad_landmarks_are_dropped_by_choice(tree, tmp_path, monkeypatch):
    monkeypatch.setitem(BAD_LANDMARKS, "SN010", ((2, 4),))
    assert load(tree, tmp_path)["test"]["frame"][:] == [1, 2, 4, 5, 6]
    assert load(tree, tmp_path, drop_bad_landmarks=True)["test"]["frame"][:] == [1, 5, 6]


def test_the_two_cameras_do_not_share_crops(tree, tmp_path):
    options = ["--data_dir", str(tree), "--output_dir", str(tmp_path / "out"), "--detector", "none", "--workers", "1"]
    main(options)
    with pytest.raises(ValueError, match="Give another output folder"):
        main([*options, "--camera", "right"])
    data = load(tree, tmp_path, camera="right")
    assert [round(shade(row["images"][0]), -1) for row in data["test"]] == [30, 50, 90, 110, 130]
    assert set(data["train"]["subject"]) == {"SN013"}


def test_the_cache_follows_the_labels(tree, tmp_path):
    assert load(tree, tmp_path)["test"][0]["labels"][6] == 0
    path = tree / "ActionUnit_Labels" / "SN010" / "SN010_au12.txt"
    path.write_text(path.read_text().replace("1,0", "1,4", 1))
    assert load(tree, tmp_path)["test"][0]["labels"][6] == 4
