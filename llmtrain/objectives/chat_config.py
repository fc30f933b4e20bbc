"""What objectives over conversations have in common: the chat template, and the rows of their tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import require
from llmtrain.errors import DataError, Problem
from llmtrain.files import expand_home
from llmtrain.objectives.base import ObjectiveConfig, SpecialIds
from llmtrain.objectives.conversations import ASSISTANT, Conversation
from llmtrain.objectives.unlabelled import Unlabelled
from llmtrain.reading import read_bytes
from llmtrain.standard_streams import print_note

if TYPE_CHECKING:
    from llmtrain.chat.encoder import Encoded, Encoder
    from llmtrain.chat.renderer import Renderer
    from llmtrain.chat.source import ChatTemplate
    from llmtrain.tables.ragged import Column
    from llmtrain.tokenizers.base import Tokenizer

SPANS_VERSION = 1
"""Of what is found to be trained: tables of another version are made anew."""


class ChatConfig(ObjectiveConfig, Unlabelled):
    """Base of the configs of objectives over conversations, which also read the rows of their tables
    (TaskReader)."""

    teaches: ClassVar = ("decoder",)
    data: ClassVar = "table"
    labels: ClassVar[tuple[str, ...]] = ()
    paired: ClassVar = "refused"

    template: Path | None
    prompts: Literal["chat", "text"]
    new_tokens: tuple[str, ...]
    chat_template: str | None
    end_ids: tuple[int, ...]

    def problems(self) -> Iterator[Problem]:
        if self.template is not None and self.chat_template is None:
            try:
                self._given_template()
            except DataError as error:
                yield from (replace(problem, where="template") for problem in error.problems)

        for token in self.new_tokens:
            yield from require(
                token.strip() == token != "", "new_tokens", token, "text without space around it"
            )
        twice = len(self.new_tokens) - len({*self.new_tokens})
        yield from require(not twice, "new_tokens", list(self.new_tokens), "each token once")

    def special_ids(self, model: Any, corpora: Any) -> SpecialIds:
        """Let the vocabulary grow by the new tokens."""
        needed = corpora.vocab_size
        if self.new_tokens and model.vocab_size is not None and model.vocab_size < needed:
            model = replace(model, vocab_size=needed)
        return SpecialIds(model, needed)

    def data_problems(self, data: Any) -> Iterator[Problem]:
        pair = data.text_pair_field
        if pair is not None:
            yield Problem("data.text_pair_field", pair, f"null with objective={self.kind}", "leave it out")

    def with_labels(self, texts: Any) -> ObjectiveConfig:
        """Return the config with the chat template and what ends an answer, as checkpoints store it."""
        from llmtrain.chat.encoder import end_ids

        tokenizer = texts.load_tokenizer()
        template = self.template_of(tokenizer)
        with self.renderer(template) as renderer:
            found = end_ids(renderer, template, tokenizer)
        return replace(self, chat_template=template.source, end_ids=found)  # type: ignore[type-var]

    def special_names(self, model: Any, tokenizer: Tokenizer) -> dict[int, str]:
        pieces = tokenizer.pieces()
        matched = {*tokenizer.added_tokens()}
        ids = {*tokenizer.special_ids.values()} | {i for i, piece in enumerate(pieces) if piece in matched}
        return {i: pieces[i] for i in sorted(ids)}

    # The chat template

    def template_of(self, tokenizer: Tokenizer) -> ChatTemplate:
        """Return the chat template: the one that was recorded, the one that is given, the tokenizer's own, or
        the plain one. Raise DataError for one that cannot be used."""
        from llmtrain.chat.error import ChatError
        from llmtrain.chat.source import PLAIN, template_of

        given = self._given_template()
        try:
            return template_of(tokenizer, None if given == PLAIN else given)
        except ChatError as fault:
            raise DataError(self._problem(fault.got, fault.allowed)) from None

    def renderer(self, template: ChatTemplate) -> Renderer:
        """Return what renders conversations. Raise DataError for a template that cannot be used."""
        from llmtrain.chat.error import ChatError
        from llmtrain.chat.renderer import Renderer

        try:
            return Renderer(template)
        except ChatError as fault:
            raise DataError(self._problem(fault.got, fault.allowed)) from None

    def _given_template(self) -> str | None:
        from llmtrain.chat.source import TEMPLATE_BYTES

        if self.chat_template is not None or self.template is None:
            return self.chat_template
        try:
            return read_bytes(expand_home(self.template), TEMPLATE_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "invalid UTF-8"
            raise DataError(
                self._problem(f"{self.template} ({reason})", "a file with a chat template")
            ) from None

    def _problem(self, got: str, allowed: str) -> Problem:
        where = "chat template of the tokenizer" if self.template is None else "objective.template"
        return Problem(where, got, allowed, "give objective.template=FILE")

    # How rows of a table are read (see TaskReader)

    def identity(self) -> Mapping[str, Any]:
        return {
            "kind": self.kind,
            # The tokenizer's own is part of the tokenizer.
            "template": None if self.template is None else self._given_template(),
            "prompts": self.prompts,
            "version": SPANS_VERSION,
        }

    def encoded(self, conversations: Sequence[Conversation], tokenizer: Tokenizer) -> list[Encoded]:
        """Return the tokens of conversations. Raise UnreadableRowError."""
        from llmtrain.chat.encoder import Encoder
        from llmtrain.chat.error import ChatError
        from llmtrain.chat.source import special_tokens
        from llmtrain.tables.build import UnreadableRowError

        encoder, found, left_out = Encoder(tokenizer), [], 0
        with self.renderer(self.template_of(tokenizer)) as renderer:
            for row, conversation in enumerate(conversations):
                try:
                    encoded, is_short = encoded_row(conversation, tokenizer, encoder, renderer)
                except ChatError as fault:
                    raise UnreadableRowError(row, fault.got, fault.allowed) from None
                found.append(encoded)
                left_out += is_short
        pieces, matched = tokenizer.pieces(), {*tokenizer.added_tokens(), *special_tokens(tokenizer).values()}
        open_ended = sum(pieces[each.ids[each.ends[-1] - 1]] not in matched for each in found)
        if open_ended:
            what = "no token of the chat template ends the last answer, which the model learns to stop by"
            print_note(f"note: of {open_ended:,} rows {what}")
        if left_out:
            print_note(f"note: the chat template leaves out the system message of {left_out:,} rows")
        return found


def columns_of(found: Sequence[Encoded], prefix: str = "") -> dict[str, Column]:
    """Return the columns "tokens"; "trained", whether each is; and "answers", the token after each answer."""
    from llmtrain.tables.ragged import Ragged

    return {
        f"{prefix}tokens": Ragged.of([each.ids for each in found], np.int32),
        f"{prefix}trained": Ragged.of([each.trained for each in found], np.uint8),
        f"{prefix}answers": Ragged.of([each.ends for each in found], np.int32),
    }


def encoded_row(
    conversation: Conversation, tokenizer: Tokenizer, encoder: Encoder, renderer: Renderer
) -> tuple[Encoded, bool]:
    """Return the tokens of a row and which of them are trained, and whether a system message is left out.
    Raise ChatError."""
    from llmtrain.chat.encoder import Encoded
    from llmtrain.chat.error import ChatError, check_text
    from llmtrain.chat.spans import Marked

    if conversation.completion is not None:
        end = tokenizer.pieces()[tokenizer.eos_id]
        text = conversation.prompt + conversation.completion
        check_text(text)
        text += "" if text.endswith(end) else end
        encoded = encoder.conversation(Marked(text, ((len(conversation.prompt), len(text)),)))
        first = np.array(tokenizer.first_ids, np.int32)
        trained = np.concatenate([np.zeros(len(first), bool), encoded.trained])
        whole = np.concatenate([first, encoded.ids])
        return Encoded(whole, trained, encoded.ends + len(first)), False
    marked = renderer.conversation(conversation.messages)
    given = [message["role"] for message in conversation.messages[: conversation.given]].count(ASSISTANT)
    if given:
        every = [message["role"] for message in conversation.messages].count(ASSISTANT)
        if len(marked.answers) != every:
            got = (
                f"{len(marked.answers)} marks of the template for {every} answers, of which {given} are given"
            )
            raise ChatError(got, "a chat template that marks each answer once, or a prompt without answers")
        marked = marked._replace(answers=marked.answers[given:])
    return encoder.conversation(marked), marked.left_out
