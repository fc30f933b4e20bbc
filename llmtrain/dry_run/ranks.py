"""Which ranks are rehearsed, and several of them by turns, each in a process of its own.

A rehearsal makes its process that rank for good. The processes are forked from one that has imported torch
already, so that a further rank costs its own work alone.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmtrain.dry_run.record import Rehearsal
from llmtrain.errors import ConfigError, LaunchError, Problem, UserError

if TYPE_CHECKING:
    from llmtrain.train.resolve import Resolved

NAMES = ("first", "middle", "last")
MOST = 64
"""Ranks that one command rehearses."""


def ranks_of(words: Sequence[str], world_size: int) -> list[int]:
    """Return the ranks that the words name, each once: numbers, and first, middle and last of `world_size`.

    Raise ConfigError for other words, and for ranks that the run has not."""
    named = {"first": 0, "middle": world_size // 2, "last": world_size - 1}
    allowed = f"0 to {world_size - 1}, below world_size, or {', '.join(NAMES)}"
    found: list[int] = []
    for word in (part.strip() for text in words for part in text.split(",")):
        rank = named.get(word)
        if rank is None and word.isascii() and word.isdecimal():
            rank = int(word)
        if rank is None or rank >= world_size:
            raise ConfigError(Problem("rank", word or "nothing", allowed))
        found.append(rank)
    ranks = list(dict.fromkeys(found))
    if not 1 <= len(ranks) <= MOST:
        raise ConfigError(Problem("rank", f"{len(ranks)} ranks", f"1 to {MOST} in one command"))
    return ranks


def rehearse_each(resolved: Resolved, ranks: Sequence[int]) -> Iterator[Rehearsal]:
    """Yield what each rank did: the only one in this process, and each of several in its own, by turns.

    Raise the UserError of a rank, and LaunchError for a rank whose process ended by itself."""
    from llmtrain.dry_run.rehearsal import prepare, rehearse

    if len(ranks) == 1:
        yield rehearse(resolved, ranks[0])
        return
    prepare(resolved)
    context = multiprocessing.get_context("fork")
    for rank in ranks:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(sender, resolved, rank), daemon=True)
        process.start()
        sender.close()
        try:
            answer: Rehearsal | UserError = receiver.recv()
        except EOFError:
            process.join()
            raise LaunchError(_ended(rank, process.exitcode or 0)) from None
        finally:
            receiver.close()
        process.join()
        if isinstance(answer, UserError):
            raise answer
        yield answer


def _answer(sender: Any, resolved: Resolved, rank: int) -> None:
    """Send what a rank did, or why it is refused. Other errors are defects, and print their traceback."""
    from llmtrain.dry_run.rehearsal import rehearse

    try:
        sender.send(rehearse(resolved, rank))
    except UserError as error:
        sender.send(error)


def _ended(rank: int, code: int) -> Problem:
    how = f"signal {-code}: out of memory, or ended by hand" if code < 0 else f"exit code {code}"
    return Problem(f"dry run of rank {rank}", f"a process that ended by itself ({how})", "", "see above")
