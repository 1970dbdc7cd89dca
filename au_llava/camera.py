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
from .recognize import _about, _columns, _settings, prepared
from .tables import write_table
from .videos import Video, recognize_video


def run(arguments: Namespace) -> int:
    """Carry out `recognize` on a camera until Ctrl-C, which here is the ordinary end; the exit code.

    Rows wait on disk until the table is written, after an error, too. A camera's frames are not kept, so there is no
    film.
    """
    name, *others = arguments.input
    if others or arguments.overlay or arguments.smooth or arguments.evidence:
        raise ValueError(f"Camera {name} must be the only input, and goes without --overlay, --evidence and --smooth.")
    asked, output = prepared(arguments)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    arguments.detector = check_detector(arguments.detector)
    video, pipe = Video.open(name), load_pipeline(arguments.model, arguments.device)
    chosen = _columns(pipe, asked, arguments)
    with TemporaryFile("w+") as kept:

        def again() -> Iterator[dict]:
            kept.seek(0)
            return map(json.loads, kept)

        found = recognize_video(pipe, video, asked, arguments.fps, group=1, **_settings(arguments))
        bar = tqdm(unit="frame", disable=None if output else True)
        try:
            with suppress(KeyboardInterrupt), closing(found), bar:
                for rows in found:
                    bar.update()
                    for row in rows:
                        if output:
                            kept.write(json.dumps(row) + "\n")
                        else:
                            print(json.dumps({column.name: column.value(row) for column in chosen}), flush=True)
        finally:  # whatever ended it, what was seen will not be seen again
            if output:
                write_table(output, again(), chosen, _about(pipe, arguments))
                seen = sum(row["status"] == "ok" for row in again())
                print(f"Faces in all frames: {seen}. {output}, described in {output}.columns.json", file=sys.stderr)
        if output and seen:
            write_timelines(Path(f"{output}.camera{name}"), video, again, asked, arguments.fps)
    return 0
