"""Small folders laid out as BP4D, DISFA and FEAFA are distributed, with the quirks that they have in the wild."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from au_llava.action_units import PRESETS
from au_llava.datasets_scripts.bp4d import INTENSITY_UNITS


BP4D_COLUMNS = [1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24, 27, 28]


def picture(shade: int, side: int = 48) -> Image.Image:
    """A picture that can be told by its shade, even after compression."""
    return Image.new("RGB", (side, side), (shade, shade, shade))


def shade(image: Image.Image) -> float:
    return float(np.asarray(image.convert("L")).mean())


def save(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(shade).save(path)
    return path


def write_occurrence(root: Path, sequence: str, rows: dict[int, dict[int, int]], ends: str = "\n") -> Path:
    """A csv of AU_OCC; `rows` gives by frame the AUs that are not 0."""
    path = root / "AUCoding" / "AU_OCC" / f"{sequence}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(map(str, [0, *BP4D_COLUMNS]))]
    lines += [",".join(map(str, [n, *(aus.get(au, 0) for au in BP4D_COLUMNS)])) for n, aus in rows.items()]
    path.write_bytes((ends.join(lines) + ends).encode())
    return path


def bp4d_tree(root: Path) -> Path:
    """Four subjects from all three parts. In M007_T2 frame 2 has no picture; in M011_T1 AU7 is unknown in frame 5."""
    frames = root / "Sequences(2D+3D)"
    write_occurrence(root, "F001_T1", {n: {12: 1, 6: 1} for n in (9, 10, 11)})
    for number in (8, 9, 10, 11, 12):  # 8 and 12 are not labelled
        save(frames / "F001" / "T1" / f"{number:03d}.jpg", 10 * number)
    write_occurrence(root, "M007_T2", {1: {}, 2: {4: 1}, 3: {4: 1}}, ends="\r\n")
    for number in (1, 3):
        save(frames / "M007" / "T2" / f"{number:04d}.jpg", 50 + number)
    write_occurrence(root, "M011_T1", {5: {7: 9, 5: 1}, 6: {1: 1, 24: 1}}, ends="\n\n")
    for number in (5, 6):
        save(frames / "M011" / "T1" / f"{number}.jpg", 100 + number)
    write_occurrence(root, "F007_T8", {1200: {10: 1}})
    save(frames / "F007" / "T8" / "1200.jpg", 200)
    (root / "AUCoding" / "AU_OCC" / "notes.txt").write_text("as received")
    for unit in INTENSITY_UNITS:
        name = f"AU{int(unit[2:]):02d}"
        folder = root / "AUCoding" / "AU_INT" / name
        folder.mkdir(parents=True)
        for sequence, numbers in {"F001_T1": (9, 10), "M007_T2": (1,), "M011_T1": (5,), "F007_T8": (1200,)}.items():
            level = 9 if (unit, sequence) == ("AU17", "F001_T1") else 3
            (folder / f"{sequence}_{name}.csv").write_text("".join(f"{n},{level}\n" for n in numbers))
    return root


def write_video(path: Path, shades: list[int], side: int = 48) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20, (side, side))
    for value in shades:
        writer.write(np.full((side, side, 3), value, np.uint8))
    writer.release()
    return path


def disfa_tree(root: Path, frames: int = 6) -> Path:
    """Three subjects, one of each part. SN010 lacks the label of frame 3; the right camera lacks SN003.

    In SN010 frame n has AU12 at level n - 1, at most 5; in SN013 every unit is at 2; in SN003 all are 0. The left
    picture of frame n has the shade 20 * n, the right one 20 * n + 10.
    """
    for subject in ("SN010", "SN013", "SN003"):
        folder = root / "ActionUnit_Labels" / subject
        folder.mkdir(parents=True)
        for code in PRESETS["disfa"]:
            levels = dict.fromkeys(range(1, frames + 1), 2 if subject == "SN013" else 0)
            if subject == "SN010":
                levels = {n: min(n - 1, 5) if code == "AU12" else 0 for n in levels if n != 3}
            ends = "\r\n" if subject == "SN013" else "\n"
            text = "".join(f"{n},{level}{ends}" for n, level in levels.items())
            (folder / f"{subject}_au{code[2:]}.txt").write_bytes(text.encode())
        left, right = [20 * n for n in range(1, frames + 1)], [20 * n + 10 for n in range(1, frames + 1)]
        write_video(root / "Videos_LeftCamera" / f"LeftVideo{subject}_comp.avi", left)
        if subject != "SN003":
            write_video(root / "Video_RightCamera" / f"RightVideo{subject}_Comp.avi", right)
    return root


def write_auw(path: Path, values, ends: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((" ".join(f"{value:.6f}" for value in values) + ends).encode())
    return path


def feafa_tree(root: Path) -> Path:
    """PV001 (10 frames), PV008 with its pictures elsewhere, PV003 with gaps, and SN010 of part B."""
    for n in range(10):
        write_auw(root / "FEAFA-A" / "PV001.output" / f"{n:08d}.auw", [n / 10] * 24, " \r\n" if n % 2 else "\n")
        save(root / "FEAFA-A" / "PV001.output" / f"{n:08d}.jpg", 10 * n + 10)
        save(root / "FEAFA-A" / "PV001.output" / f"{n:08d}_crop.jpg", 255)
    write_auw(root / "FEAFA-A" / "PV008.output" / "00000003.auw", [0.25] * 24)
    save(root / "pictures" / "pv008_data" / "3.png", 150)
    write_auw(root / "FEAFA-A" / "PV003.output" / "00000000.auw", [1.0] + [0.0] * 23)
    save(root / "FEAFA-A" / "PV003.output" / "00000000.jpg", 80)
    write_auw(root / "FEAFA-A" / "PV003.output" / "00000001.auw", [0.5] * 24)  # no picture
    save(root / "FEAFA-A" / "PV003.output" / "00000002.jpg", 90)  # no label
    write_auw(root / "FEAFA-B" / "SN010.output" / "00000007.auw", [0.125] * 24)
    save(root / "FEAFA-B" / "SN010.output" / "00000007.jpg", 70)
    return root
