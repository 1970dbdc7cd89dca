"""How much memory a long video needs over its first ten seconds: it should not grow with the video.

    python benchmarks/video_memory.py [--minutes 10] [--fps 2] [--detector none]

It makes a 1280 x 720 video of so many minutes, recognises it, and prints the resident memory as it goes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
from skimage.data import astronaut

from au_llava.photos import load_pipeline, questions
from au_llava.videos import Video, recognize_video


RATE = 25


def make_video(path: Path, minutes: float) -> None:
    """A face that wanders over a grey picture."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), RATE, (1280, 720))
    face = cv2.cvtColor(astronaut(), cv2.COLOR_RGB2BGR)
    for number in range(round(minutes * 60 * RATE)):
        picture = np.full((720, 1280, 3), 90, np.uint8)
        left = round(384 + 384 * np.sin(number / 50))
        picture[100:612, left : left + 512] = face
        writer.write(picture)
    writer.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--fps", type=float, default=2)
    parser.add_argument("--detector", default="none")
    parser.add_argument("--model")
    arguments = parser.parse_args()
    if arguments.minutes < 0.5:
        parser.error(f"--minutes {arguments.minutes:g} is too short to grow in; give 0.5 or more")

    pipe, process, early = load_pipeline(arguments.model), psutil.Process(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path, peak = Path(folder, "long.mp4"), 0.0
        make_video(path, arguments.minutes)
        started, frames = time.perf_counter(), 0
        asked = questions(["detection"])
        for rows in recognize_video(pipe, Video.open(str(path)), asked, arguments.fps, detector=arguments.detector):
            memory, seconds = process.memory_info().rss / 2**20, rows[-1]["time"]
            frames += len({row["frame"] for row in rows})
            early = early or (memory if seconds >= 10 else 0.0)
            peak = max(peak, memory)
            print(f"{seconds:6.1f} s of video, {memory:7.1f} MiB", flush=True)
        taken = time.perf_counter() - started
    print(f"grew by {peak - early:.1f} MiB over the first ten seconds; {frames / taken:.1f} frames a second")


if __name__ == "__main__":
    main()
