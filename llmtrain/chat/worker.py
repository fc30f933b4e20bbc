"""The process that renders chat templates: requests as JSON lines in, answers as JSON lines out.

Each request may take some seconds of computation; the kernel ends the process that takes more. Its memory is
bounded too. `Renderer` starts it.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from typing import Any

from llmtrain.chat.error import ChatError
from llmtrain.chat.spans import Spans
from llmtrain.chat.template import Template

MEMORY = 2 << 30
"""Bytes of addresses."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    spans: Spans | None = None
    seconds = 1
    for line in sys.stdin:
        request = json.loads(line)
        seconds = request.get("seconds", seconds)
        _allow(seconds)
        try:
            if "template" in request:
                template = Template(request["template"], request["tokens"])
                spans = Spans(template, request["added"], request["tokens"].get("bos_token"))
                reply: dict[str, Any] = {}
            else:
                assert spans is not None
                reply = _reply(spans, request)
        except ChatError as fault:
            reply = {"fault": [fault.got, fault.allowed]}
        except (MemoryError, RecursionError):
            reply = {"fault": ["a chat template that needs too much memory", "one that needs less"]}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _reply(spans: Spans, request: dict[str, Any]) -> dict[str, Any]:
    if request["prompt"]:
        return {"text": spans.prompt(request["messages"]), "answers": []}
    marked = spans.of(request["messages"])
    return {"text": marked.text, "answers": marked.answers, "left_out": marked.left_out}


def _allow(seconds: int) -> None:
    """Let the process compute for some seconds from now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, most))


if __name__ == "__main__":
    main()
