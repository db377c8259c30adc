"""Crash-safe writing of scores: a journal of the finished rows, which a later run can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sharpcore.errors import InvalidInput
from sharpcore.prompts import PromptRow
from sharpcore.table import (
    Row,
    ScoreTable,
    column_types,
    metric_names,
    parquet_metadata,
    table_format,
    write_rows,
)

# A constant, so that a resumed run writes the same bytes as one that was never stopped.
ROW_GROUP = 1024
_VERSION = 1


class Journal:
    """The finished rows of a run, kept in `<output>.partial.jsonl` until `finish` makes `output` of them.

    `complete` says that the output was found with all of them, so that there is nothing to do.

    The first line of the journal holds the run's settings, every further line the rows of one block of
    prompts; each is on disk (fsync) when `append` returns. Rows are keyed by the index of their prompt in the
    input, so prompts may repeat.

    `prompts` is the whole input; `settings` is a JSON object of all that decides the numbers, and says
    which rows and columns a prompt has in this kind of `table`. Raises InvalidInput if
    the output or its journal exists and neither `resume` nor `overwrite` is given, if `resume` finds other
    settings or other prompts (the message says which), or if another process is writing the same output.
    """

    def __init__(
        self,
        output: str | Path,
        settings: Mapping[str, Any],
        prompts: Sequence[PromptRow],
        *,
        resume: bool = False,
        overwrite: bool = False,
        table: type[ScoreTable] = ScoreTable,
    ) -> None:
        self.output = Path(output)
        self.path = _journal_path(self.output)
        self.format = table_format(self.output)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        self.finished = 0
        self.complete = False
        self._prompts = prompts
        self._table = table
        self._rows_per_prompt = len(table.empty_rows(settings, [0.0] * len(settings["steps"])))
        check_output(self.output, resume=resume, overwrite=overwrite)
        self._size = 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _lock(self._file, self.path)
        except InvalidInput:
            os.close(self._file)
            raise
        try:
            if resume:
                self._size = self._load()
                if self._size == 0 and self.output.exists():
                    self._take_over_output()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the journal's file; what was appended stays on disk, an empty journal is removed."""
        if self._file < 0:
            return
        empty = os.fstat(self._file).st_size == 0
        os.close(self._file)
        self._file = -1
        if empty:
            self.path.unlink(missing_ok=True)

    def append(self, first: int, rows: Sequence[Row]) -> None:
        """Add the rows of the prompts from index `first` on; they are on disk on return, or (on any error)
        not in the journal.

        `rows` holds all rows of each prompt, in order. Raises ValueError unless they continue the journal.
        """
        count, rest = divmod(len(rows), self._rows_per_prompt)
        if first != self.finished or rest:
            raise ValueError(
                f"block of {len(rows)} rows from prompt {first} does not continue prompt {self.finished}"
            )
        if self._size == 0:
            os.ftruncate(self._file, 0)
            self._write_line({"sharpcore_journal": _VERSION, "settings": self.settings})
        self._write_line({"first": first, "count": count, "rows": list(rows)})
        self.finished += count

    def record(self, blocks: Iterable[Sequence[Row]], timesteps: Sequence[float]) -> Iterator[int]:
        """Append blocks of a scorer's rows and yield the number of finished prompts after each.

        `blocks` has the rows of the unfinished prompts without an error, in order; each row gets the columns
        that its prompt carries, and the rows of the prompts with an error are put in their places.
        `timesteps` are those of the steps.
        """
        waiting = iter(self._prompts[self.finished :])
        rows: list[Row] = []
        for block in blocks:
            for start in range(0, len(block), self._rows_per_prompt):
                for prompt in waiting:
                    if prompt.error is None:
                        scored = block[start : start + self._rows_per_prompt]
                        if any(row["prompt"] != prompt.prompt for row in scored):
                            raise ValueError(f"the scorer's rows are not those of row {prompt.row}")
                        rows += [{"prompt": prompt.prompt, **prompt.columns} | row for row in scored]
                        break
                    rows += self._bad_rows(prompt, timesteps)
            self.append(self.finished, rows)
            yield self.finished
            rows = []
        for prompt in waiting:
            rows += self._bad_rows(prompt, timesteps)
        if rows:
            self.append(self.finished, rows)
            yield self.finished

    def _bad_rows(self, prompt: PromptRow, timesteps: Sequence[float]) -> list[Row]:
        first: Row = {"prompt": prompt.prompt, **prompt.columns}
        places = self._table.empty_rows(self.settings, timesteps)
        return [first | place | {"error": prompt.error} for place in places]

    def failed(self) -> int:
        """How many of the finished prompts have an error."""
        return len(
            {n // self._rows_per_prompt for n, row in enumerate(self.rows()) if row["error"] is not None}
        )

    def rows(self) -> Iterator[Row]:
        """All finished rows, read back block by block from the disk."""
        for _, block in self._blocks():
            yield from block["rows"]

    def assemble(self) -> None:
        """Write the finished rows to a temporary file beside the output, which then takes its name."""
        temporary = self.output.with_name(self.output.name + ".tmp")
        metadata = {"settings": self.settings}
        try:
            write_rows(
                temporary,
                self.rows(),
                column_types(self.rows(), self._table.standard),
                format=self.format,
                row_group=ROW_GROUP,
                metadata=metadata,
            )
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.output)
        finally:
            temporary.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write the output and remove the journal."""
        self.assemble()
        self.close()
        self.path.unlink(missing_ok=True)

    def keep(self) -> str:
        """After an interruption, make the output of the finished rows if possible, and say where they are."""
        done = f"{self.finished} of {len(self._prompts)} prompts are finished"
        try:
            self.assemble()
        except OSError as error:
            reason = f"{self.output} could not be written: {error.strerror or error}"
            return f"{done} and kept in {self.path} ({reason}); --resume goes on with them"
        return f"{done} and kept in {self.output}; --resume goes on with them"

    def _write_line(self, value: Mapping[str, Any]) -> None:
        data = json.dumps(value, allow_nan=False).encode() + b"\n"
        try:
            os.lseek(self._file, self._size, os.SEEK_SET)
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def _blocks(self, header: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (offset behind the line, value) of every complete line; a torn last line is left out."""
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                offset += len(line)
                try:
                    value = json.loads(line)
                except ValueError:
                    if file.read(1):
                        raise InvalidInput(
                            f"{self.path}: line {number} is damaged; --overwrite starts anew"
                        ) from None
                    return
                if not line.endswith(b"\n"):
                    return
                if header or number > 1:
                    yield offset, value

    def _load(self) -> int:
        """Check the journal on disk against this run; return the length of its usable part."""
        size = 0
        for end, value in self._blocks(header=True):
            size = end
            if "rows" not in value:
                self._compare_settings(value.get("settings", {}), self.path)
                continue
            if value["first"] != self.finished:
                raise InvalidInput(
                    f"{self.path}: prompt {self.finished} is missing in it; --overwrite starts anew"
                )
            self._compare_prompts(value["rows"], value["first"], self.path)
            self.finished += value["count"]
        return size

    def _take_over_output(self) -> None:
        """Begin the journal with the rows of an output that lost its own, unless that has all of them."""
        rows = self._table.read(self.output).rows
        whole = len(rows) == len(self._prompts) * self._rows_per_prompt
        if self.format == "parquet":
            metadata = parquet_metadata(self.output)
            self._compare_settings(metadata.get("settings", {}), self.output)
        elif whole:
            self._compare_settings(self._settings_of(rows), self.output, partly=True)
        else:
            raise InvalidInput(
                f"{self.output}: nothing to resume: there is no {self.path.name} beside it, and a "
                f"{self.format} file does not say with which settings it was made; --overwrite starts anew"
            )
        self._compare_prompts(rows, 0, self.output)
        if whole:
            self.finished, self.complete = len(self._prompts), True
        else:
            self.append(0, rows)

    def _settings_of(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What rows tell of the settings that made them: steps; of scores also the metrics, and the seeds
        where their number is another one."""
        first = rows[: self._rows_per_prompt]
        steps = [row.get("step") for row in first]
        found: dict[str, Any] = {"steps": list(dict.fromkeys(steps))}
        if "metrics" not in self.settings:
            return found
        found["metrics"] = list(metric_names(first[0])) if first else self.settings["metrics"]
        seeds = self.settings["seeds"]
        for row in rows:
            for name in found["metrics"]:
                scores = row.get(f"{name}_seeds")
                if scores is not None and len(scores) != len(seeds):
                    found["seeds"] = f"{len(scores)} of them"
        return found

    def _compare_settings(self, there: Mapping[str, Any], path: Path, *, partly: bool = False) -> None:
        names = [*there, *(name for name in self.settings if name not in there and not partly)]
        differing = [
            f"{name} (there {there.get(name)!r}, now {self.settings.get(name)!r})"
            for name in names
            if there.get(name) != self.settings.get(name)
        ]
        if differing:
            raise InvalidInput(
                f"--resume: {path} was made with other settings: {'; '.join(differing)}; "
                "take the same ones, or --overwrite"
            )

    def _compare_prompts(self, rows: Sequence[Row], first: int, path: Path) -> None:
        for number, row in enumerate(rows):
            index = first + number // self._rows_per_prompt
            if index >= len(self._prompts):
                raise InvalidInput(
                    f"--resume: {path} has more prompts than the input, which has {len(self._prompts)}"
                )
            prompt = self._prompts[index]
            for name, value in [("prompt", prompt.prompt), *prompt.columns.items()]:
                if row.get(name) != value and not (
                    path.suffix == ".csv" and _csv_text(row.get(name)) == _csv_text(value)
                ):
                    raise InvalidInput(
                        f"--resume: the input is not the one {path} was made from: row {index + 1} has "
                        f"{name} {value!r}, there it is {row.get(name)!r}"
                    )


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise InvalidInput unless a run may write to `output`: a table, in a folder that exists."""
    table_format(output)
    if resume and overwrite:
        raise InvalidInput("--resume and --overwrite exclude each other")
    if not output.parent.is_dir():
        raise InvalidInput(f"{output}: there is no folder {output.parent}")
    if output.is_dir():
        raise InvalidInput(f"{output}: expected a file, this is a folder")
    if resume or overwrite:
        return
    for path, what in (
        (_journal_path(output), "an interrupted run left its rows here"),
        (output, "it exists already"),
    ):
        if path.exists():
            raise InvalidInput(f"{path}: {what}; --resume goes on with it, --overwrite starts anew")


def _csv_text(value: Any) -> str:
    """A value as a CSV file tells it."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def _journal_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial.jsonl")


def _lock(file: int, path: Path) -> None:
    """Keep a second process from writing the same journal, where the system has file locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidInput(f"{path}: another process is writing it") from None
