"""The fuzzer: each reader over many mutations of real files, in a process whose end, time and memory are
watched from outside.

    with Specimens() as specimens, Fuzzer(specimens) as fuzzer:
        for outcome in fuzzer.run("gguf", range(100)): …

A mutation is a function of the reader's name and of the seed: `reproduce` does one of them again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from llmtrain import standard_streams
from llmtrain.errors import UserError
from tests.support import fuzz_specimens
from tests.support.clean_text import UncleanError, check_printed, check_refusal
from tests.support.fuzz_readers import READERS
from tests.support.mutations import mutate

SECONDS = 5.0
"""Of processor time, as others may be at work on the machine; or of waiting for what does not come."""
STILL_SECONDS = 2.0
"""Without any processor time: a process that waits, not one that others keep from going on."""
GROWTH_BYTES = 500 << 20
ADDRESS_SPACE_BYTES = 3 << 30
"""More than a reader has before it, where a reader's growth ends in a MemoryError, not in a machine without
memory."""
FILE_BYTES = 1 << 30
WARM_UP_SECONDS = 60.0
GOOD = ("accepted", "refused")
BAD = ("traceback", "unclean", "hang", "growth", "crash")
"""unclean: text for a person of several lines, of no end, or with characters that steer a terminal."""
OUTCOMES = (*GOOD, *BAD)
_CONTEXT = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome:
    reader: str
    seed: int
    kind: str
    """One of OUTCOMES."""
    detail: str = ""
    """First line of an exception, or how the process ended."""
    where: str = ""
    """Line of llmtrain in which it happened."""

    @property
    def is_good(self) -> bool:
        return self.kind in GOOD

    def __str__(self) -> str:
        return f"{self.reader} {self.seed}: {self.kind}: {self.detail}" + (
            f" ({self.where})" if self.where else ""
        )


class Specimens:
    """The files that are changed, and a folder to read copies in."""

    def __enter__(self) -> Specimens:
        # In memory where there is such a place: thousands of copies are made.
        memory = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
        self.root = Path(self._folder.name) / "specimens"
        self.scratch = Path(self._folder.name) / "scratch"
        # In a process of its own: libraries start threads, which a process that forks should not have.
        _in_child(fuzz_specimens.build, self.root)
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _in_child(function: Any, *arguments: Any) -> None:
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, "the specimens could not be made"


# One mutation.


def lay_out(specimens: Specimens, name: str, pattern: str) -> Path:
    """Fill the scratch folder with one of the reader's files and all that it needs, and go there; → the
    file."""
    os.chdir(specimens.root)
    shutil.rmtree(specimens.scratch, ignore_errors=True)
    path = min(Path().glob(pattern))
    own = Path(*path.parts[: 2 if path.parts[0] == "hf" else 1])
    for folder in {own, *map(Path, READERS[name].needs)}:
        shutil.copytree(folder, specimens.scratch / folder)
    os.chdir(specimens.scratch)
    return path


def spoil(specimens: Specimens, name: str, seed: int) -> Path:
    """Lay out the reader's files with one of them changed; → which, within the scratch folder."""
    reader = READERS[name]
    source = random.Random(f"{name}/{seed}")
    pattern = source.choice(sorted(reader.files))
    path = lay_out(specimens, name, pattern)
    if source.random() < 1 / 40:
        _put_something_else(path, source)
        return path
    other = source.choice([file for file in sorted(path.parent.iterdir()) if file.is_file()])
    before = path.read_bytes()
    path.write_bytes(mutate(before, reader.files[pattern], f"{name}/{seed}", other.read_bytes()))
    if seed % 2:
        with contextlib.suppress(Exception):  # a manifest that is none any more
            reader.fix_up(path)
    return path


def _put_something_else(path: Path, source: random.Random) -> None:
    path.unlink()
    what = source.choice(("nothing", "an empty file", "a folder", "a pipe", "itself", "/dev/zero"))
    if what == "an empty file":
        path.touch()
    elif what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    elif what != "nothing":
        path.symlink_to(path.name if what == "itself" else what)


GREY = re.compile("\x1b\\[90m([^\x1b]*)\x1b\\[0m")
"""Text that `data show` prints in grey on a terminal, with no other control sequence in it."""


class _Terminal(standard_streams._Text):
    def isatty(self) -> bool:
        return True


def _terminal(errors: str) -> _Terminal:
    """A stream as the command line has it, to a place that keeps all."""
    return _Terminal(io.BytesIO(), "utf-8", errors, write_through=True)  # type: ignore[arg-type]


def read(name: str, path: Path) -> None:
    """Read as the verbs do; raises what they raise, and UncleanError for what they say."""
    out, err = _terminal("strict"), _terminal("backslashreplace")
    refusal = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            READERS[name].read(path)
        except UserError as error:
            refusal = error
    for stream in (out, err):
        text = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
        check_printed(GREY.sub(r"\1", text))
    if refusal is not None:
        check_refusal(refusal)
        raise refusal


def outcome_of(name: str, seed: int, path: Path) -> Outcome:
    try:
        read(name, path)
    except UserError as error:
        return Outcome(name, seed, "refused", str(error).split("\n")[0])
    except UncleanError as error:
        return Outcome(name, seed, "unclean", str(error))
    except BaseException as error:
        line = (str(error).splitlines() or [""])[0][:200]
        return Outcome(name, seed, "traceback", f"{type(error).__name__}: {line}", _line_of(error))
    return Outcome(name, seed, "accepted")


def _line_of(error: BaseException) -> str:
    """The innermost line of llmtrain, and the library's that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{_short(frame.filename)}:{frame.lineno}" for frame in frames if "/llmtrain/" in frame.filename]
    last = f"{_short(frames[-1].filename)}:{frames[-1].lineno}"
    return ours[-1] if ours and ours[-1] == last else f"{ours[-1] if ours else ''} → {last}"


def _short(file: str) -> str:
    """From the package's name on."""
    starts = [file.rfind(f"/{top}/") for top in ("llmtrain", "tests")]
    library = file.rfind("/site-packages/")
    starts.append(library + len("/site-packages") if library >= 0 else file.rfind("/lib/"))
    return file[max(starts) + 1 :]


def reproduce(specimens: Specimens, name: str, seed: int) -> None:
    """Read one mutation in this process: raises what the reader raises."""
    path = spoil(specimens, name, seed)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
    try:
        read(name, path)
    finally:
        faulthandler.cancel_dump_traceback_later()


# Many.


class Fuzzer:
    """One process after the other, each of which reads mutations until it hangs or dies."""

    def __init__(self, specimens: Specimens) -> None:
        self._specimens = specimens
        self._stack = specimens.root.parent / "stack.txt"
        self._pipe: Connection | None = None
        self._process: Any = None
        self._warm: set[str] = set()

    def __enter__(self) -> Fuzzer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, name: str, seeds: Iterable[int]) -> Iterator[Outcome]:
        """What becomes of each mutation, in order. Raises AssertionError where the reader takes not even the
        files as they are."""
        for seed in seeds:
            outcome = self._do(name, seed)
            if outcome.kind in ("crash", "growth"):
                # Once more: an earlier mutation may have done the harm.
                self._end()
                outcome = self._do(name, seed)
                self._end()
            yield outcome

    def _do(self, name: str, seed: int) -> Outcome:
        if name not in self._warm:
            problem = self._ask((name, None), WARM_UP_SECONDS)
            assert problem == "", f"{name} does not read its files as they are: {problem}"
            self._warm.add(name)
        # Two answers: the time in which a file is changed is not the reader's.
        answer = self._ask((name, seed), WARM_UP_SECONDS)
        answer = answer or self._ask(None, SECONDS)
        if isinstance(answer, str):
            kind = "hang" if self._process.is_alive() else "crash"
            self._end()
            return Outcome(name, seed, kind, answer, self._last_line())
        return answer

    def _ask(self, request: Any, seconds: float) -> Any:
        """What the process answers, or how it ended without an answer."""
        if self._process is None:
            self._pipe, theirs = _CONTEXT.Pipe()
            self._process = _CONTEXT.Process(target=_serve, args=(self._specimens, theirs, self._stack))
            self._process.start()
            theirs.close()
        assert self._pipe is not None
        try:
            started = moved = time.monotonic()
            before = used = self._processor_seconds()
            self._pipe.send(request)
            while not self._pipe.poll(0.1):
                now, last, used = time.monotonic(), used, self._processor_seconds()
                moved = now if used > last else moved
                waits = now - started > seconds and now - moved > STILL_SECONDS
                if waits or used - before > seconds:
                    return f"over {seconds:g} s{', waiting' if waits else ''}"
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _processor_seconds(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def _end(self) -> None:
        if self._process is not None:
            assert self._pipe is not None
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process, self._warm = None, set()

    def _last_line(self) -> str:
        """Where the process was, as faulthandler wrote it."""
        last = re.split("^(?:Timeout|Fatal)", self._stack.read_text(), flags=re.MULTILINE)[-1]
        frames = re.findall(r'File "([^"]+)", line (\d+)', last)
        found = [f"{_short(file)}:{line}" for file, line in frames if "/llmtrain/" in file]
        return found[0] if found else ""


def _serve(specimens: Specimens, pipe: Connection, stack: Path) -> None:
    """Answer (reader, None) with what is wrong with its files; (reader, seed) with "" when they are changed,
    and what comes after it with the outcome."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    # Under pytest these are its own.
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    # What a process that is killed leaves goes with the specimens.
    tempfile.tempdir = str(specimens.root.parent)
    _limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    with stack.open("w") as file:
        faulthandler.enable(file)
        while True:
            try:
                name, seed = pipe.recv()
            except EOFError:
                os._exit(0)
            file.seek(0)
            file.truncate()
            if seed is None:
                pipe.send(_warm_up(specimens, name))
                continue
            path = spoil(specimens, name, seed)
            pipe.send("")
            pipe.recv()
            pipe.send(_watched(name, seed, path, file))


def _watched(name: str, seed: int, path: Path, stack: Any) -> Outcome:
    before = _reset_peak()
    faulthandler.dump_traceback_later(0.9 * SECONDS, repeat=True, file=stack)
    outcome = outcome_of(name, seed, path)
    faulthandler.cancel_dump_traceback_later()
    growth = _status("VmHWM") - before
    if growth > GROWTH_BYTES:
        told = f"{growth >> 20:,} MiB; {outcome.kind} {outcome.detail}"[:200]
        return Outcome(name, seed, "growth", told, outcome.where)
    return outcome


def _warm_up(specimens: Specimens, name: str) -> str:
    """Read the files as they are, which also imports what reading needs; → what is wrong with them."""
    reader = READERS[name]
    _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
    try:
        for pattern in reader.files:
            path = lay_out(specimens, name, pattern)
            reader.fix_up(path)
            read(name, path)
    except Exception:
        return traceback.format_exc()
    gc.collect()
    gc.freeze()  # or each collection would look at all modules
    _limit(resource.RLIMIT_AS, _status("VmSize") + ADDRESS_SPACE_BYTES)
    return ""


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    bounds = [bound for bound in (most, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(what, (min(bounds, default=resource.RLIM_INFINITY), hard))


def _status(key: str) -> int:
    """Bytes, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def _reset_peak() -> int:
    """Let VmHWM begin anew; → what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")
