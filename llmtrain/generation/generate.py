"""Continue prompts with any model whose forward takes tokens and a cache.

Dim names: B prompts run together, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.errors import CheckpointError, ConfigError, Problem
from llmtrain.generation.config import GenerateConfig

OnToken = Callable[[int, int], None]
"""Called with (prompt index, token) as each token is drawn."""


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    *,
    eos_id: int | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """New token ids after each prompt, without the prompt and without eos_id, which ends it.

    model: has `new_cache(max_length)` and `forward(tokens_BT, cache=…)` → logits (B, T, V).
    Prompts of equal length run together, so that nothing is padded. A draw depends on (seed, index of
    the prompt, place in the text) alone, not on the other prompts.

    Raises ConfigError for prompts that are empty, too long with what is to be added, or of another
    vocabulary; CheckpointError for a model whose logits are not finite.
    """
    config = config or GenerateConfig()
    if found := list(_problems(model, prompts, config)):
        raise ConfigError(found)
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    outputs: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for indices in by_length.values():
            for start in range(0, len(indices), config.batch_size):
                group = indices[start : start + config.batch_size]
                for index, token in _run_group(model, prompts, group, config, eos_id):
                    outputs[index].append(token)
                    if on_token is not None:
                        on_token(index, token)
    finally:
        model.train(was_training)
    return outputs


@torch.inference_mode()
def sample(logits_BV: Tensor, config: GenerateConfig, draws: Sequence[float]) -> Tensor:
    """One token a row, (B,) int64. `draws`: a number in [0, 1) a row, its place in the distribution."""
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV.double() / config.temperature
    tokens_BV: Tensor | None = None
    if config.top_k is not None:
        scaled_BV, tokens_BV = scaled_BV.topk(min(config.top_k, scaled_BV.shape[1]))
    elif config.top_p is not None:
        scaled_BV, tokens_BV = scaled_BV.sort(descending=True)
    probs_BV = scaled_BV.softmax(-1)
    if config.top_p is not None:
        before_BV = probs_BV.cumsum(-1) - probs_BV
        # The likeliest token stays, whatever rounding does to its 0.
        keep_BV = before_BV < config.top_p
        keep_BV[:, 0] = True
        probs_BV = probs_BV * keep_BV
    cumulative_BV = probs_BV.cumsum(-1)
    targets_B1 = torch.tensor(draws, dtype=torch.float64, device=logits_BV.device)[:, None]
    targets_B1 = targets_B1 * cumulative_BV[:, -1:]
    places_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True)
    return (places_B1 if tokens_BV is None else tokens_BV.gather(1, places_B1)).squeeze(1)


def _run_group(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    group: list[int],
    config: GenerateConfig,
    eos_id: int | None,
) -> Iterator[tuple[int, int]]:
    """(prompt index, token) as drawn, for prompts of one length."""
    device = next(model.parameters()).device
    tokens_BT = torch.tensor([list(prompts[index]) for index in group], device=device)
    length = tokens_BT.shape[1]
    cache: Any = model.new_cache(length + config.max_new_tokens)  # type: ignore[operator]
    running = set(group)
    for position in range(length, length + config.max_new_tokens):
        with torch.inference_mode():
            logits_BV = model(tokens_BT, cache=cache)[:, -1].float()
            if not logits_BV.isfinite().all():
                raise CheckpointError(
                    Problem(
                        "model",
                        "logits that are not finite",
                        remedy="the run diverged; take an earlier checkpoint",
                    )
                )
            draws = [_uniform(config.seed, index, position) for index in group]
            tokens_B = sample(logits_BV, config, draws)
        for index, token in zip(group, tokens_B.tolist(), strict=True):
            if index in running and token == eos_id:
                running.remove(index)
            elif index in running:
                yield index, token
        if not running:
            return
        tokens_BT = tokens_B[:, None]


def _uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.blake2b(f"{seed}\0{index}\0{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _problems(
    model: nn.Module, prompts: Sequence[Sequence[int]], config: GenerateConfig
) -> Iterator[Problem]:
    for problem in config.problems():
        yield problem.within("generate")
    model_config: Any = model.config
    longest: int | None = getattr(model_config, "max_sequence_length", None)
    vocab_size: int = model_config.vocab_size
    for index, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        if not prompt:
            yield Problem(where, "no tokens", "1 or more", "give some text")
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            yield Problem(
                where,
                f"token {min(prompt) if min(prompt) < 0 else max(prompt)}",
                f"0 to {vocab_size - 1}",
                "use the tokenizer that the model was trained with",
            )
        elif longest is not None and len(prompt) >= longest:
            yield Problem(
                where,
                f"{len(prompt)} tokens",
                f"fewer than the model's max_sequence_length of {longest}",
                "shorten it",
            )
        elif longest is not None and len(prompt) + config.max_new_tokens > longest:
            yield Problem(
                "generate.max_new_tokens",
                f"{config.max_new_tokens} after a prompt of {len(prompt)} tokens",
                f"at most {longest - len(prompt)}: the model's max_sequence_length is {longest}",
            )
