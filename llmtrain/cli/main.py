"""The command line, `llmtrain VERB key=value …`: find the verb, run it, end the process with its exit code.

Hydra is imported only once a verb is known, so that `llmtrain --help` answers at once.
"""

from __future__ import annotations

import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace

from llmtrain import standard_streams
from llmtrain.cli.explain import print_keys, print_problems, second_usage, usage
from llmtrain.cli.verbs import (
    PLAIN_WORDS,
    SECOND_VERBS,
    STANDS_ALONE,
    VERBS,
    has_second_verb,
    second_verb,
    with_plain_words,
)
from llmtrain.distributed import launcher, stopping
from llmtrain.errors import EXIT_CODE, INTERRUPTED_EXIT_CODE, Problem, UserError, nearest
from llmtrain.orphans import end_with_launcher

HELP = ("-h", "--help", "help")

SILENCE_SECONDS = 5.0
"""Seconds that a rank waits before it exits while another rank prints the message. A launcher ends all ranks
when the first one exits, which could cut the message off."""

LOST_SECONDS = 3.0
"""Seconds that a rank waits before it reports a lost connection. Meanwhile the rank that exited prints the
cause, or the launcher asks this rank to end."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with the verb's exit code."""
    standard_streams.replace_streams()
    try:
        try:
            code = _answer(sys.argv[1:] if arguments is None else arguments)
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
    except standard_streams.OutputLost as lost:
        print_problems(lost.problems)
        code = lost.exit_code
    finish(code)


def _answer(arguments: list[str]) -> int:
    if not arguments or arguments[0] in HELP:
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from importlib import metadata

        print(f"llmtrain {metadata.version('llmtrain')}")
        return 0
    if arguments[0] == "keys":
        return print_keys(arguments[1:])
    launcher.set_command([sys.argv[0], *arguments])
    end_with_launcher()
    verb = arguments[0]
    if verb not in VERBS:
        known = nearest(verb, [*VERBS, "keys"])
        print_problems([Problem("llmtrain", repr(verb), known, "see llmtrain --help")])
        return EXIT_CODE
    # A stop may be requested while the configuration is still being composed.
    with stopping.request.listening() if verb in ("train", "finetune") else nullcontext():
        return run_verb(verb, arguments[1:])


def run_verb(verb: str, arguments: list[str]) -> int:
    """Run a verb with the arguments after it, print the problems of a UserError, and return the exit code."""
    if verb in SECOND_VERBS and verb not in STANDS_ALONE and (not arguments or arguments[0] in HELP):
        print(second_usage(verb))
        return 0
    try:
        if has_second_verb(verb, arguments):
            verb, arguments = second_verb(verb, arguments)
        elif verb in PLAIN_WORDS:
            arguments = with_plain_words(verb, arguments)
        from llmtrain.cli import hydra_app

        return hydra_app.run(verb, arguments)
    except UserError as error:
        if _is_printed_here(error):
            print_problems(error.problems)
        else:
            time.sleep(SILENCE_SECONDS)
            # This rank was not ended meanwhile: the printing rank has no error, so it is this rank's own.
            if not error.everywhere:
                prefix = f"rank {launcher.rank()}: "
                print_problems([replace(p, where=prefix + p.where) for p in error.problems])
        return EXIT_CODE
    except KeyboardInterrupt:
        print("llmtrain: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        from llmtrain.files import is_disk_full

        if not is_disk_full(error):
            raise
        where = str(error.filename or "the disk")
        print_problems([Problem(where, "a full disk", "", "make room, then run the same command again")])
        return EXIT_CODE
    except RuntimeError as error:
        _leave_if_lost(error)
        raise


def _is_printed_here(error: UserError) -> bool:
    """Return whether this process prints the error: only one rank prints an error that all ranks raise."""
    if launcher.world_size() == 1:
        return True
    if error.everywhere is not None:
        return launcher.rank() == 0 or not error.everywhere
    torch_distributed = sys.modules.get("torch.distributed")
    started = torch_distributed is not None and torch_distributed.is_initialized()
    if not started:
        return launcher.local_rank() == 0
    return True


def _leave_if_lost(error: RuntimeError) -> None:
    """If `error` says that another rank is gone, end the process without waiting for other ranks."""
    if "llmtrain.distributed.processes" in sys.modules:
        from llmtrain.distributed import processes

        said = processes.lost_rank(error)
        if said is not None:
            processes.finish(tell_lost_rank(said), together=False)


def tell_lost_rank(said: str) -> int:
    """Print that another rank is gone, unless this rank is asked to stop as well; return the exit code."""
    deadline = time.monotonic() + LOST_SECONDS
    while not stopping.request.asked and time.monotonic() < deadline:
        time.sleep(0.05)
    if stopping.request.asked:
        return INTERRUPTED_EXIT_CODE
    where, got = f"rank {launcher.rank()}", f"a lost connection to another rank ({said})"
    print_problems([Problem(where, got, remedy="that process ended; its own message tells why")])
    return 1


def finish(exit_code: int) -> None:
    """End the process; the ranks of a process group end together, without gloo's fragile shutdown."""
    if "llmtrain.distributed.processes" in sys.modules:
        from llmtrain.distributed import processes

        try:
            processes.finish(exit_code)
        except RuntimeError as error:
            _leave_if_lost(error)
            raise
    sys.exit(exit_code)
