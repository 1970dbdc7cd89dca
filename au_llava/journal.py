"""What a long job has finished, kept on disk line by line, so that a killed job goes on where it stopped."""

import json
from collections.abc import Container, Iterator
from pathlib import Path


class Journal:
    """The finished parts of a job and their rows.

    A part, such as an input file, is one or more lines of JSON. A line that was cut off when the job was killed is
    dropped, and what it held is done again.

    Args:
        path (`Path`): The journal's file. It is made, or continued where it holds parts of the same job.
        settings (`dict`): What the rows depend on, JSON-serialisable. A journal of other settings is started anew.

    Attributes:
        done, failed (`set[str]`): The parts that are finished, and those with a row whose `status` is `failed`.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.done: set[str] = set()
        self.failed: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"settings": settings}).encode() + b"\n"
        length = self._read(head) if path.is_file() else 0
        self._file = path.open("r+b" if length else "wb")
        self._file.seek(length)
        self._file.truncate()
        if not length:
            self._write(head)

    def _read(self, head: bytes) -> int:
        """Note what is done; the length in bytes of what can be kept, 0 if the settings are others."""
        with self.path.open("rb") as file:
            if file.readline() != head:
                return 0
            length = len(head)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                length += len(line)
                self._note(json.loads(line))
        return length

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def _note(self, entry: dict) -> None:
        if entry["done"]:
            self.done.add(entry["part"])
        if any(row["status"] == "failed" for row in entry["rows"]):
            self.failed.add(entry["part"])

    def add(self, part: str, rows: list[dict], done: bool = True) -> None:
        """Keep rows of a part, and note whether it is finished with them."""
        entry = {"part": part, "done": done, "rows": rows}
        self._write(json.dumps(entry).encode() + b"\n")
        self._note(entry)

    def rows(self, parts: Container[str]) -> Iterator[dict]:
        """The rows of these parts, in the order of the work, read from disk."""
        with self.path.open("rb") as file:
            next(file)
            for line in file:
                entry = json.loads(line)
                if entry["part"] in parts:
                    yield from entry["rows"]

    def close(self) -> None:
        """Leave the journal for a later job to continue."""
        self._file.close()

    def remove(self) -> None:
        """Close the journal and delete it: the job is done."""
        self._file.close()
        self.path.unlink()
