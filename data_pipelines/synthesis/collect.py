"""Works on all prompts of a route and writes what came of them:

    OUTPUT/rows.jsonl       what is kept, a row a line, in the order of the prompts; read by the source `jsonl`
    OUTPUT/yield.json       how many prompts were kept and how many dropped for which reason, and the settings
    OUTPUT/progress.jsonl   what came of each prompt, in the order in which they were finished

Every prompt has one end: prompts = kept + the sum of the reasons. The first two files are functions of the answers
alone, whatever the concurrency was: duplicates, for one, are found in the order of the prompts. A run that was stopped
goes on where `progress.jsonl` ends; a finished one asks nothing. A prompt that got no reply has not been answered, so
the next run asks it again.

Memory: eight bytes a prompt and a hash for each row that is kept.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

from data_pipelines.errors import InputError
from data_pipelines.synthesis.candidate import Rejected
from data_pipelines.synthesis.code_route import Row
from data_pipelines.synthesis.endpoint import EndpointError, Unanswered

ROWS, YIELD, PROGRESS = "rows.jsonl", "yield.json", "progress.jsonl"
NO_REPLY = "no_reply"
FOUND = 500  # characters of what was found
PATIENCE = 20  # prompts in a row without a reply, after which the run ends

Work = Callable[[int], Row]


@dataclasses.dataclass
class Log:
    """progress.jsonl, locked while it is open. `at`: byte of a prompt's line, -1 without one."""

    file: IO[bytes]
    at: "array[int]"

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, settings: Mapping[str, Any], count: int) -> Iterator["Log"]:
        """Raises InputError for a log of other settings, one in use, and one that is damaged."""
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{path}: found another run writing to it; expected one at a time") from None
            log = cls(file, array("q", [-1]) * count)
            log.read(path, settings)
            yield log

    def read(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.file.seek(0)
        at = 0
        for number, line in enumerate(self.file, start=1):
            if not line.endswith(b"\n"):  # the run was stopped in the middle of it
                break
            try:
                found = json.loads(line)
                if number == 1:
                    same_settings(path, found["settings"], settings)
                elif found["index"] < len(self.at):
                    self.at[found["index"]] = at
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{path}, line {number}: found {error!r}; expected the log of a run") from None
            at += len(line)
        self.file.truncate(at)
        if not at:
            self.write({"settings": settings})

    def write(self, line: Mapping[str, Any]) -> None:
        self.file.seek(0, os.SEEK_END)
        at = self.file.tell()
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        if "index" in line:
            self.at[line["index"]] = at

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        if self.at[index] < 0:
            return None
        self.file.seek(self.at[index])
        found: dict[str, Any] = json.loads(self.file.readline())
        return found


def same_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if differing := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        found = f"a run with other settings (differs in {', '.join(differing)})"
        raise InputError(f"{path}: found {found}; expected the same, or another --output")


def collect(
    work: Work,
    count: int,
    output: Path | str,
    settings: Mapping[str, Any],
    *,
    concurrency: int = 8,
    on_done: Callable[[int], None] = lambda done: None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Runs `work` on the prompts 0 to `count` - 1 that have no end yet, and returns the content of yield.json.

    `settings`: what the rows depend on, as JSON; a folder of others is refused. More prompts may be asked for later.
    `on_done` is called with the number of prompts that are through; `stop` is set where the rest is given up, so that
    `work` need not try any longer. Raises InputError for a folder that does not fit,
    EndpointError if the endpoint gives no replies; what is done by then is kept.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))  # as it is read back
    with Log.open(folder / PROGRESS, settings, count) as log:
        existing = finished(folder, count)
        if existing is not None:
            on_done(count)
            return existing
        missing = ask_all(work, log, concurrency, on_done, stop or threading.Event())
        return write_rows(folder, log, missing, count, settings)


def finished(folder: Path, count: int) -> dict[str, Any] | None:
    """The content of yield.json, if it is about all prompts and about the rows that are there."""
    try:
        found: dict[str, Any] = json.loads((folder / YIELD).read_text(encoding="utf-8"))
        with open(folder / ROWS, "rb") as rows:
            digest = hashlib.file_digest(rows, "sha256").hexdigest()
    except (FileNotFoundError, ValueError):
        return None
    complete = found["prompts"] == count and not found["dropped"].get(NO_REPLY) and found["sha256"] == digest
    return found if complete else None


def ask_all(
    work: Work, log: Log, concurrency: int, on_done: Callable[[int], None], stop: threading.Event
) -> dict[int, Unanswered]:
    """Works on what is not done; the prompts that got no reply."""
    waiting = (i for i in range(len(log.at)) if log.at[i] < 0)
    done = sum(at >= 0 for at in log.at)
    missing: dict[int, Unanswered] = {}
    in_a_row = 0
    running: dict[Future[Row], int] = {}
    pool = ThreadPoolExecutor(concurrency)
    try:
        while True:
            on_done(done)
            for index in waiting:
                running[pool.submit(work, index)] = index
                if len(running) >= 2 * concurrency:
                    break
            if not running:
                return missing
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                unanswered = record(log, index, future)
                in_a_row = in_a_row + 1 if unanswered else 0
                if unanswered:
                    missing[index] = unanswered
                if unanswered and in_a_row >= PATIENCE:
                    raise EndpointError(f"found no reply to {in_a_row} prompts in a row: {unanswered.found}")
                done += 1
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        for future, index in running.items():  # what was under way has been paid for
            if not future.cancelled() and isinstance(future.exception(), Rejected | Unanswered | None):
                record(log, index, future)


def record(log: Log, index: int, future: Future[Row]) -> Unanswered | None:
    """Writes what came of a prompt to the log; or returns that there was no reply."""
    try:
        row = future.result()
    except Unanswered as error:
        if not error.final:
            return error
        log.write({"index": index, "reason": error.reason, "found": error.found[:FOUND]})
    except Rejected as error:
        log.write({"index": index, "reason": error.reason, "found": error.found[:FOUND]})
    else:
        log.write({"index": index, "record": row.record, "key": row.key.hex(), "repaired": row.repaired})
    return None


def write_rows(
    folder: Path, log: Log, missing: Mapping[int, Unanswered], count: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes rows.jsonl and yield.json, each whole or not at all, the second one last."""
    dropped: Counter[str] = Counter()
    checked: Counter[str] = Counter()
    keys: set[bytes] = set()
    repaired = 0
    digest = hashlib.sha256()
    with replacing(folder / ROWS) as rows:
        for index in range(count):
            found = log[index]
            if found is None or "reason" in found:
                dropped[missing[index].reason if found is None else found["reason"]] += 1
                continue
            if (key := bytes.fromhex(found["key"])) in keys:
                dropped["duplicate"] += 1
                continue
            keys.add(key)
            checked[found["record"]["checked"]] += 1
            repaired += found["repaired"]
            line = json.dumps(found["record"], ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            rows.write(line)
    result = {
        "prompts": count,
        "kept": len(keys),
        "dropped": dict(sorted(dropped.items())),
        "repaired": repaired,
        "checked": dict(sorted(checked.items())),
        "sha256": digest.hexdigest(),
        "settings": settings,
    }
    with replacing(folder / YIELD) as file:
        file.write(json.dumps(result, ensure_ascii=False, indent=2).encode() + b"\n")
    return result


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is complete."""
    scratch = path.with_name(f"{path.name}.tmp")
    with open(scratch, "wb") as file:
        yield file
    scratch.replace(path)
