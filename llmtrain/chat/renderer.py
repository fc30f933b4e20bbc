"""Start the process that renders chat templates (worker.py), and send it requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import llmtrain
from llmtrain.chat.error import ChatError
from llmtrain.chat.source import ChatTemplate
from llmtrain.chat.spans import Marked

SECONDS = 20
"""Maximum computing time for one conversation, in seconds."""


class Renderer:
    """A chat template in a process of its own; use it in a `with`."""

    def __init__(self, template: ChatTemplate, seconds: int = SECONDS) -> None:
        """seconds: of computation that a conversation may take. Raise ChatError for an invalid template."""
        self._template, self._seconds = template, seconds
        self._process: subprocess.Popen[str] | None = None
        self._start()

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> Marked:
        """Return the text of a conversation and what of it is trained. Raise ChatError."""
        reply = self._ask({"messages": messages, "prompt": False})
        answers = tuple((begin, end) for begin, end in reply["answers"])
        return Marked(reply["text"], answers, reply["left_out"])

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text after which the model writes its answer. Raise ChatError."""
        text: str = self._ask({"messages": messages, "prompt": True})["text"]
        return text

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        package = Path(llmtrain.__file__).parents[1]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmtrain.chat.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # Nothing is imported from the folder in which the user works.
            cwd=package,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        template = self._template
        try:
            tokens, added = dict(template.tokens), list(template.added)
            limits = {"seconds": self._seconds}
            self._ask({"template": template.source, "tokens": tokens, "added": added, **limits})
        except ChatError:
            self.close()
            raise

    def _ask(self, request: Mapping[str, Any]) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request, default=_placeholder) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._ended(process)
        reply = json.loads(line)
        if "fault" in reply:
            raise ChatError(*reply["fault"])
        return reply

    def _ended(self, process: subprocess.Popen[str]) -> ChatError:
        code = process.wait()
        self.close()
        if code == -signal.SIGXCPU:
            return ChatError("a chat template that takes too long", "one that ends in some seconds")
        return ChatError(f"a chat template whose process ended with code {code}", "one that can be rendered")


def _placeholder(value: object) -> str:
    """Return the form in which a template gets a value that is not JSON, such as a date of a parquet file."""
    return f"<{type(value).__name__}>"
