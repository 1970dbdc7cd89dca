"""`au-llava recognize 0`: what a camera sees, as JSON Lines while it happens or as a table in the end."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryFile

from tqdm import tqdm

from .films import write_timelines
from .photos import check_detector, load_pipeline
from .recognize import _about, _settings, prepared
from .tables import write_table
from .videos import Video, recognize_video


def run(arguments: Namespace) -> int:
    """Carry out `recognize` on a camera until Ctrl-C, which here is the ordinary end; the exit code.

    Rows wait on disk until the table is written. A camera's frames are not kept, so there is no film.
    """
    name, *others = arguments.input
    if others or arguments.overlay or arguments.smooth:
        raise ValueError(f"Camera {name} must be the only input, and goes without --overlay and --smooth.")
    asked, chosen, output = prepared(arguments)
    arguments.detector = check_detector(arguments.detector)
    video, pipe = Video.open(name), load_pipeline(arguments.model, arguments.device)
    with TemporaryFile("w+") as kept:
        found = recognize_video(pipe, video, asked, arguments.fps, group=1, **_settings(arguments))
        with suppress(KeyboardInterrupt), closing(found), tqdm(unit="frame", disable=None if output else True) as bar:
            for rows in found:
                bar.update()
                for row in rows:
                    if output:
                        kept.write(json.dumps(row) + "\n")
                    else:
                        print(json.dumps({column.name: column.value(row) for column in chosen}), flush=True)
        if output:

            def again() -> Iterator[dict]:
                kept.seek(0)
                return map(json.loads, kept)

            write_table(output, again(), chosen, _about(pipe, arguments))
            seen = sum(row["status"] == "ok" for row in again())
            if seen:
                write_timelines(Path(f"{output}.camera{name}"), video, again, asked, arguments.fps)
            print(f"Faces in all frames: {seen}. {output}, described in {output}.columns.json", file=sys.stderr)
    return 0
