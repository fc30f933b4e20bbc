"""Requests of tasks as conversations, by the chat template of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from llmtrain.chat.encoder import end_ids
from llmtrain.chat.error import ChatError
from llmtrain.chat.renderer import Renderer
from llmtrain.chat.source import PLAIN, template_of
from llmtrain.errors import DataError, Problem
from llmtrain.interchange.trained import TrainedModel

Messages = Sequence[Mapping[str, str]]


class Conversing:
    """Renders conversations in a process of its own; use it in a `with`."""

    def __init__(self, trained: TrainedModel) -> None:
        """Raise DataError for a template that is invalid."""
        tokenizer = trained.tokenizer()
        recorded = trained.objective.chat_template
        try:
            template = template_of(tokenizer, None if recorded == PLAIN else recorded)
            self._renderer = Renderer(template)
            self.end_ids = end_ids(self._renderer, template, tokenizer)
            """What ends an answer."""
        except ChatError as fault:
            raise _problem(fault) from None

    def render(self, messages: Messages, is_asked: bool) -> str:
        """Return the text of a conversation: up to where the answer begins if one is asked for, else up to
        the end of the last message, which the model continues. A system message that the template refuses is
        left out. Raise DataError for what the template refuses else."""
        try:
            return self._rendered(messages, is_asked)
        except ChatError as fault:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise _problem(fault) from None
        return self.render(others, is_asked)

    def _rendered(self, messages: Messages, is_asked: bool) -> str:
        if is_asked:
            return self._renderer.prompt(messages)
        text = self._renderer.conversation(messages).text
        last = messages[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def __enter__(self) -> Conversing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._renderer.close()


def _problem(fault: ChatError) -> DataError:
    return DataError(Problem("chat", f"{fault.got} in a request of a task", fault.allowed, "give chat=false"))
