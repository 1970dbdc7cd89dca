"""What a long job has finished, kept on disk line by line, so that a killed job goes on where it stopped."""

import glob
import json
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class _Line(NamedTuple):
    """Where a line stands, which of the job's runs wrote it, whether it ends its part, and whether a row failed."""

    path: Path
    offset: int
    run: int
    done: bool
    failed: bool


class Journal:
    """The finished parts of a job and their rows.

    A part, such as an input file, is one or more lines of JSON. A line that was cut off when the job was killed, never
    reached the disk when the power failed, or was damaged since, ends the file, and what it held is done again.
    Where several processes share a job, each writes a file of its own and reads those of all, whatever their number
    was before. Of lines of one part and number that of the latest run counts, in whichever file it stands.

    Args:
        path (`Path`): The journal's file. It is made, or continued where it holds parts of the same job.
        settings (`dict`): What the rows depend on, JSON-serialisable.
        process (`int`, defaults to 0): Which of the processes this is; others than 0 write `PATH-1` and so on.

    Attributes:
        done, failed (`set[str]`): The parts that are finished, and those with a row whose `status` is `failed`.

    Raises:
        ValueError: The files hold a job with other settings.
    """

    def __init__(self, path: Path, settings: dict, process: int = 0):
        self.path = path
        self.own = path.with_name(f"{path.name}-{process}") if process else path
        self._head = json.dumps({"settings": settings}).encode() + b"\n"
        self._settings = json.loads(self._head)["settings"]  # as they come back from a file
        path.parent.mkdir(parents=True, exist_ok=True)
        length = self.reload().get(self.own, 0)
        self._run = 1 + max((line.run for lines in self._lines.values() for line in lines.values()), default=0)
        self._file = self.own.open("r+b" if length else "wb")
        self._file.seek(length)
        self._file.truncate()
        if not length:
            self._file.write(self._head)
            self._file.flush()

    def reload(self) -> dict[Path, int]:
        """Read what all processes have kept; how many bytes of each file can be used."""
        self.done: set[str] = set()
        self.failed: set[str] = set()
        # By part, and there by the number of the line, so that one that was done twice counts once.
        self._lines: dict[str, dict[int, _Line]] = defaultdict(dict)
        lengths = {path: self._read(path) for path in self._files()}
        for part in self._lines:
            self._settle(part)
        return lengths

    def _files(self) -> list[Path]:
        ours = re.compile(re.escape(self.path.name) + r"(-\d+)?")
        found = self.path.parent.glob(glob.escape(self.path.name) + "*")
        return sorted(path for path in found if ours.fullmatch(path.name) and path.is_file())

    def _read(self, path: Path) -> int:
        with path.open("rb") as file:
            length = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if length:
                        self._note(entry, path, length)
                    else:
                        settings = entry["settings"]
                except (ValueError, KeyError, TypeError):  # not as it was written
                    break
                if not length:
                    self._compare(settings)
                length += len(line)
        return length

    def _compare(self, old: dict) -> None:
        new = self._settings
        others = [
            f"{name} {reprlib.repr(old.get(name))}, now {reprlib.repr(new.get(name))}"
            for name in old | new
            if old.get(name) != new.get(name)
        ]
        if others:
            remedy = f"Give the old ones to go on, or delete {self.path}* to start anew."
            raise ValueError(
                f"{self.path} is of an unfinished job with other settings ({'; '.join(others)}). {remedy}"
            )

    def _note(self, entry: dict, path: Path, offset: int) -> None:
        part, number = entry["part"], entry["number"]
        failed = any(row["status"] == "failed" for row in entry["rows"])
        line = _Line(path, offset, entry["run"], entry["done"], failed)
        if line.run >= self._lines.get(part, {}).get(number, line).run:
            self._lines[part][number] = line

    def _settle(self, part: str) -> None:
        """Tell whether a part is finished, by its last line, and whether it failed."""
        lines = self._lines[part]
        (self.done.add if lines[max(lines)].done else self.done.discard)(part)
        (self.failed.add if any(line.failed for line in lines.values()) else self.failed.discard)(part)

    def take_back(self) -> set[str]:
        """Forget the last line of each part that failed, so that the next takes its place; which parts these are."""
        again = self.done & self.failed
        for part in again:
            del self._lines[part][max(self._lines[part])]
        self.done -= again
        self.failed -= again
        return again

    def add(self, rows: dict[str, list[dict]], done: bool = True) -> None:
        """Keep rows of some parts at once, and note whether the parts are finished with them."""
        for part, found in rows.items():
            number = 0 if part in self.done else len(self._lines[part])
            entry = {"part": part, "run": self._run, "number": number, "done": done, "rows": found}
            self._note(entry, self.own, self._file.tell())
            self._settle(part)
            self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def rows(self, parts: Iterable[str]) -> Iterator[dict]:
        """The rows of these parts in the order of the parts, read from disk."""
        for part in parts:
            for _, line in sorted(self._lines.get(part, {}).items()):
                with line.path.open("rb") as file:
                    file.seek(line.offset)
                    yield from json.loads(file.readline())["rows"]

    def close(self) -> None:
        """Leave the journal for a later job to continue."""
        self._file.close()

    def remove(self, parts: Iterable[str]) -> int:
        """Close the journal and, these parts being done, delete the files of all processes; unless there are others.

        Returns:
            `int`: How many other parts there are, of a job that was asked for more, and was stopped.
        """
        self._file.close()
        others = len(self._lines.keys() - {*parts})
        for path in [] if others else self._files():
            path.unlink()
        return others
