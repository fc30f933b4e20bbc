"""A trained decoder as a language model of the lm-evaluation-harness.

Requests become tokens as in the harness's own `hf` model, and what does not fit the model is cut as there, so
that figures equal those of an exported folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmtrain.errors import DataError, Problem
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.settings import text_ends
from llmtrain.harness.codec import Codec
from llmtrain.harness.continuing import Ends
from llmtrain.harness.conversing import Conversing
from llmtrain.harness.scoring import Row
from llmtrain.harness.team import Team
from llmtrain.interchange.trained import TrainedModel

NEW_TOKENS = 256
"""Maximum number of tokens of a text where a task sets none, as in the `hf` model."""
UNBOUNDED = 2048
"""Tokens that a model without a maximum length reads, as in the `hf` model."""
Render = Callable[[Sequence[Mapping[str, str]], bool], str]
"""(messages with role and content, whether an answer is to follow) → the text of a conversation."""
_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "min_new_tokens",
)
"""Keys of a task's generation_kwargs that are settings of generation here."""


class HarnessModel(TemplateLM):
    """Runs on rank 0, and hands all work to the team."""

    def __init__(
        self,
        team: Team,
        codec: Codec,
        max_length: int,
        resolve: Callable[[GenerateConfig], GenerateConfig],
        end_ids: Sequence[int],
        render: Render | None = None,
        shares_contexts: bool = True,
    ) -> None:
        """max_length: tokens that the model reads at most. resolve: gives settings of generation what the
        model's folder says. end_ids: ids any of which ends a text. render: the model's chat template.
        shares_contexts: read a context once for all its continuations."""
        super().__init__()
        self._team, self._codec = team, codec
        self.max_length = max_length
        self._resolve, self._end_ids, self._render = resolve, frozenset(end_ids), render
        self._shares = shares_contexts

    @classmethod
    def of(
        cls,
        team: Team,
        codec: Codec,
        trained: TrainedModel,
        max_length: int | None = None,
        conversing: Conversing | None = None,
    ) -> HarnessModel:
        """Return a trained decoder. max_length: None: all that it reads. conversing: renders conversations,
        whose answers have ends of their own."""
        said = {} if trained.origin is None else trained.origin.generation
        scaling = trained.config.rotary_scaling
        return cls(
            team,
            codec,
            max_length or longest_of(trained.config.longest_row),
            lambda config: config.resolved(has_sources=False, folder_settings=said),
            [*text_ends(trained, codec.eos_id), *(() if conversing is None else conversing.end_ids)],
            None if conversing is None else conversing.render,
            # LongRoPE rotates the keys of a context by other factors where the whole is longer.
            shares_contexts=scaling is None or scaling.changes_beyond is None,
        )

    @property
    def eot_token_id(self) -> int:
        return self._codec.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._codec.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return self._codec.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._codec.encode(string, add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, whether greedy) of the continuation of each (context,
        continuation)."""
        for request in requests:
            if not any(request.args):
                raise DataError(Problem("tasks", "a request without a text", "", "correct the task"))
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each (text,), read in windows of max_length, each token once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = [
                (None, *make_disjoint_window(pair))
                for pair in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the scores of (texts, tokens of the context, tokens of the continuation).

        Continuations that differ in their last token alone, as the letters of a choice do, share a row.
        """
        answers: dict[tuple[int, ...], list[list[int]]] = {}
        contexts: dict[tuple[int, ...], int] = {}
        wanted: list[tuple[tuple[int, ...], int]] = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                got = f"a continuation of {len(continuation):,} tokens ({_short(texts)})"
                allowed = f"1 to {self.max_length:,}, what the model reads"
                raise DataError(Problem("tasks", got, allowed, "correct the task, or leave it out"))
            inputs = tuple((context + continuation)[:-1][-self.max_length :])
            of_inputs = answers.setdefault(inputs, [])
            # The last token of a context predicts the first one of a continuation.
            is_whole = len(inputs) == len(context) + len(continuation) - 1
            contexts.setdefault(inputs, len(context) - 1 if is_whole and self._shares else 0)
            wanted.append((inputs, len(of_inputs)))
            of_inputs.append(continuation)
        if not answers:
            return []
        rows = [Row(list(inputs), each, contexts[inputs]) for inputs, each in answers.items()]
        scores = dict(zip(answers, self._team.score(rows), strict=True))
        return [tuple(scores[inputs][place]) for inputs, place in wanted]  # type: ignore[misc]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return what the model writes after each context, (context, generation_kwargs)."""
        texts: dict[int, str] = {}
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        for numbers in by_settings.values():
            settings, until = self._settings(requests[numbers[0]].args[1])
            longest = self.max_length - settings.new_tokens
            if longest < 1:
                got = f"generation_kwargs of {settings.new_tokens:,} new tokens"
                allowed = f"fewer than the {self.max_length:,} that the model reads"
                raise DataError(Problem("tasks", got, allowed, "give max_gen_toks in the task"))
            contexts = [requests[number].args[0] for number in numbers]
            prompts = [self.tok_encode(context)[-longest:] or [self.prefix_token_id] for context in contexts]
            ends = Ends.of(until, self._end_ids, self._codec)
            texts |= zip(numbers, self._team.write(prompts, settings, ends), strict=True)
        return [texts[number] for number in range(len(requests))]

    def _settings(self, of_task: Mapping[str, Any]) -> tuple[GenerateConfig, list[str]]:
        """Return the settings of a task's generation_kwargs, and the texts that end a text."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(of_task), NEW_TOKENS))
        until = handle_stop_sequences(given.pop("until", None), eos=None)
        new_tokens = given.pop("max_gen_toks")
        samples = given.pop("do_sample", False)
        given = {name: value for name, value in given.items() if value is not None}
        if unknown := sorted(set(given) - {*_SETTINGS}):
            got = ", ".join(f"{name}={given[name]}" for name in unknown)
            allowed = f"until, max_gen_toks, do_sample, {', '.join(_SETTINGS)}"
            raise DataError(Problem("tasks", f"generation_kwargs with {got}", allowed))
        if samples:
            given.setdefault("temperature", 1.0)
        else:
            given = {name: value for name, value in given.items() if name not in ("top_k", "top_p")}
            given["temperature"] = None if (given.get("num_beams") or 1) > 1 else 0.0
        config = GenerateConfig(max_new_tokens=new_tokens, **given)
        if problems := list(config.problems()):
            raise DataError(problem.within("tasks: generation_kwargs") for problem in problems)
        return self._resolve(config), until

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation by the model's chat template."""
        if self._render is None:
            raise DataError(Problem("chat", "a tokenizer without a chat template", "false"))
        return self._render(chat_history, add_generation_prompt)


def longest_of(longest_row: int | None) -> int:
    """Return how many tokens a model reads at most."""
    return UNBOUNDED if longest_row is None else longest_row


def _short(texts: Any) -> str:
    text = repr(texts[1] if texts else "")
    return text if len(text) <= 60 else f"{text[:60]}…"
