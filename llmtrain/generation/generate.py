"""Continue prompts with a decoder, or generate targets of sources with an encoder–decoder.

Dim names: B prompts of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from llmtrain.errors import ConfigError, Problem
from llmtrain.generation.beam import beam_search
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.rows import Rows, has_sources
from llmtrain.nn.linear import packed_weights
from llmtrain.watch import phases

OnToken = Callable[[int, int], None]
"""Called with (prompt index, token) for each token as it is drawn; with beam search, once the text is
complete."""


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    *,
    eos_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the generated token ids for each prompt, without the prompt and the end token. For an
    encoder–decoder, the prompts are sources and the results targets.

    model: has `new_cache(max_length)` and `forward(tokens_BT, cache=…)` → logits (B, T, V); `new_cache` of an
    encoder–decoder also takes sources.
    eos_ids: ids that end a generated text.
    on_done: called with the index of a prompt when its text is complete.

    Batches contain prompts of equal length, so that no padding is needed, or sources of any length. A random
    draw depends only on (seed, index of the prompt, position in the text), not on other prompts.

    Raise ConfigError for prompts that are empty, too long together with the new tokens, or contain ids
    outside the vocabulary; CheckpointError if the logits are not finite.
    """
    config = (config or GenerateConfig()).resolved(has_sources=has_sources(model))
    if found := list(_problems(model, prompts, config)):
        raise ConfigError(found)
    outputs: list[list[int]] = [[] for _ in prompts]
    with for_writing(model, config):
        for group in _groups(prompts, config.batch_size, mixed=has_sources(model)):
            rows = Rows(
                model,
                [prompts[index] for index in group],
                config.new_tokens,
                config.repetition_penalty or 1.0,
            )
            if config.num_beams is not None and config.num_beams > 1:
                written: Iterator[tuple[int, int]] = (
                    (i, token) for i, text in enumerate(beam_search(rows, config, eos_ids)) for token in text
                )
            else:
                starts = [0 if has_sources(model) else len(prompts[index]) for index in group]
                written = _one_by_one(rows, group, starts, config, eos_ids)
            for i, token in written:
                outputs[group[i]].append(token)
                if on_token is not None:
                    on_token(group[i], token)
            if on_done is not None:
                for index in group:
                    on_done(index)
    return outputs


@torch.inference_mode()
def sample(logits_BV: Tensor, config: GenerateConfig, draws: Sequence[float]) -> Tensor:
    """Return one token per row, (B,) int64. draws: a number in [0, 1) per row, mapped through the cumulative
    distribution; unused if the temperature is 0."""
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    assert config.temperature is not None
    scaled_BV = logits_BV.double() / config.temperature
    tokens_BV: Tensor | None = None
    if config.top_k is not None:
        scaled_BV, tokens_BV = scaled_BV.topk(min(config.top_k, scaled_BV.shape[1]))
    elif config.top_p is not None:
        scaled_BV, tokens_BV = scaled_BV.sort(descending=True)
    probs_BV = scaled_BV.softmax(-1)
    if config.top_p is not None:
        before_BV = probs_BV.cumsum(-1) - probs_BV
        # Always keep the most likely token, even if rounding makes before_BV nonzero.
        keep_BV = before_BV < config.top_p
        keep_BV[:, 0] = True
        probs_BV = probs_BV * keep_BV
    cumulative_BV = probs_BV.cumsum(-1)
    targets_B1 = torch.tensor(draws, dtype=torch.float64, device=logits_BV.device)[:, None]
    targets_B1 = targets_B1 * cumulative_BV[:, -1:]
    indices_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True)
    return (indices_B1 if tokens_BV is None else tokens_BV.gather(1, indices_B1)).squeeze(1)


@contextmanager
def for_writing(model: nn.Module, config: GenerateConfig) -> Iterator[None]:
    """Put the model in evaluation mode, with packed weights if they are faster."""
    was_training = model.training
    model.eval()
    try:
        with packed_weights() if _pays_to_pack(model, config) else nullcontext():
            yield
    finally:
        model.train(was_training)


def _pays_to_pack(model: nn.Module, config: GenerateConfig) -> bool:
    """Return whether to hold a packed copy of the weights: on a CPU, for 16 tokens or more, if memory
    suffices."""
    weights = list(model.parameters())
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    on_cpu = weights[0].device.type == "cpu"
    return on_cpu and config.new_tokens >= 16 and 2 * size < psutil.virtual_memory().available


def _groups(prompts: Sequence[Sequence[int]], size: int, *, mixed: bool) -> Iterator[list[int]]:
    """Yield batches of at most `size` prompt indices, of equal length or, if `mixed`, of similar length."""
    by_length: dict[int, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        by_length.setdefault(0 if mixed else len(prompts[index]), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _one_by_one(
    rows: Rows,
    group: Sequence[int],
    starts: Sequence[int],
    config: GenerateConfig,
    eos_ids: Collection[int],
) -> Iterator[tuple[int, int]]:
    """Yield (index in the group, token) as tokens are drawn. starts: position of the first new token of each
    text."""
    running = list(range(len(group)))
    for length in range(config.new_tokens):
        phases.go_on()
        logits_BV = rows.penalized(rows.logits)
        if length < (config.min_new_tokens or 0):
            logits_BV[:, rows.known(eos_ids)] = -torch.inf
        draws = []
        if config.temperature != 0:
            draws = [uniform(config.seed, group[i], starts[i] + length) for i in running]
        tokens_B = sample(logits_BV, config, draws)
        tokens = tokens_B.tolist()
        going = [row for row, token in enumerate(tokens) if token not in eos_ids]
        for row in going:
            yield running[row], tokens[row]
        if not going or length + 1 == config.new_tokens:
            return
        if len(going) < len(running):
            kept_B = torch.tensor(going, device=rows.device)
            rows.select(kept_B)
            tokens_B, running = tokens_B[kept_B], [running[row] for row in going]
        rows.extend(tokens_B)


def uniform(seed: int, index: int, position: int) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on the arguments."""
    digest = hashlib.blake2b(f"{seed}\0{index}\0{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _problems(
    model: nn.Module, prompts: Sequence[Sequence[int]], config: GenerateConfig
) -> Iterator[Problem]:
    for problem in config.problems():
        yield problem.within("generate")
    model_config: Any = model.config
    longest: int | None = model_config.longest_row
    vocab_size: int = model_config.vocab_size
    is_source = has_sources(model)
    for index, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        if not prompt:
            yield Problem(where, "no tokens", "1 or more", "give a text")
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            yield Problem(
                where,
                f"token {min(prompt) if min(prompt) < 0 else max(prompt)}",
                f"0 to {vocab_size - 1}",
                "use the tokenizer that the model was trained with",
            )
        elif longest is not None and len(prompt) > longest - (0 if is_source else 1):
            allowed = (
                f"{'at most' if is_source else 'fewer than'} the model's max_sequence_length of {longest}"
            )
            yield Problem(where, f"{len(prompt)} tokens", allowed, "shorten it")
        elif longest is not None and not is_source and len(prompt) + config.new_tokens > longest:
            yield Problem(
                "generate.max_new_tokens",
                f"{config.new_tokens} after a prompt of {len(prompt)} tokens",
                f"at most {longest - len(prompt)}: the model's max_sequence_length is {longest}",
            )
    if longest is not None and is_source and config.new_tokens > longest:
        allowed = f"at most {longest}, the model's max_sequence_length"
        yield Problem("generate.max_new_tokens", str(config.new_tokens), allowed)
