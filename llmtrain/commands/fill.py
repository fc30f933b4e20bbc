"""`llmtrain generate` with a BERT or an XLNet: prompts with [MASK] in them, completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtrain.commands.sharing import SharingConfig, start_sharing
from llmtrain.errors import ConfigError, Problem, UserError
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.standard_streams import print_text

if TYPE_CHECKING:
    from llmtrain.commands.loading import TrainedModel
    from llmtrain.tokenizers.base import Tokenizer

MASK = "[MASK]"


def fill_prompts(
    trained: TrainedModel,
    prompts: Sequence[str],
    top_k: int,
    sharing: SharingConfig,
    encoded: Mapping[str, Any],
    device_name: str,
) -> None:
    """Print each prompt with the likeliest token for every [MASK], and below it each one's `top_k` with
    their probabilities. Raises ConfigError for prompts without [MASK], or too long."""
    from llmtrain.distributed import processes
    from llmtrain.generation.fill import BLANK, fill_masks

    config = trained.config
    assert isinstance(config, BertConfig | XLNetConfig)
    longest = config.max_sequence_length if isinstance(config, BertConfig) else None
    tokenizer = trained.tokenizer()
    rows = [encode_prompt(prompt, tokenizer, config) for prompt in prompts]
    problems = []
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        where = "prompt" if len(prompts) == 1 else f"prompt[{number}]"
        if MASK not in prompt:
            remedy = f'say, prompt="The film was {MASK}."'
            problems.append(
                Problem(where, repr(prompt), f"a text with {MASK}, which this model fills", remedy)
            )
        elif longest is not None and len(row) > longest:
            allowed = f"up to the model's max_sequence_length of {longest}"
            problems.append(Problem(where, f"{len(row)} tokens", allowed, "shorten it"))
    if problems:
        raise ConfigError(problems)
    device = processes.pick_device(device_name)
    mesh = start_sharing(sharing, trained, encoded, device, micro_size=1, sequence_length=max(map(len, rows)))
    model = trained.build_over(mesh, device)
    mask_id = config.special_ids[0] if isinstance(config, BertConfig) else BLANK
    for prompt, row in zip(prompts, rows, strict=True):
        try:
            found = fill_masks(model, row, mask_id, top_k, tokenizer.vocab_size)
        except UserError as error:  # all ranks look at the same prompts
            raise processes.everywhere(error) from None
        if not processes.is_main():
            continue
        best = [candidates[0][0] for candidates in found]
        print_text(_filled(prompt, best, tokenizer))
        for number, candidates in enumerate(found, 1):
            shown = ", ".join(f"{tokenizer.decode([token])!r} {p:.3f}" for token, p in candidates)
            print(f"  {MASK} {number}: {shown}", flush=True)


def encode_prompt(prompt: str, tokenizer: Tokenizer, config: BertConfig | XLNetConfig) -> list[int]:
    """Ids of a prompt with mask_id, or BLANK, for each [MASK], between the special tokens that the model saw
    in training. A space before [MASK] belongs to the piece that it stands for."""
    from llmtrain.generation.fill import BLANK

    mask_id = config.special_ids[0] if isinstance(config, BertConfig) else BLANK
    parts = prompt.split(MASK)
    ids: list[int] = []
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        ids += tokenizer.encode(part if is_last else part.removesuffix(" "))
        ids += [] if is_last else [mask_id]
    # A tokenizer with a [CLS] of its own is that of a model which saw it with every text.
    if not isinstance(config, BertConfig):
        own = tokenizer.special_ids  # XLNet has both at the end
        return [*ids, own["sep"], own["cls"]] if {"sep", "cls"} <= own.keys() else [*ids, tokenizer.eos_id]
    _, cls_id, sep_id = config.special_ids
    has_cls = config.has_pairs or tokenizer.special_ids.get("cls") == cls_id
    return [cls_id, *ids, sep_id] if has_cls else [*ids, tokenizer.eos_id]


def _filled(prompt: str, tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    first, *rest = prompt.split(MASK)
    text = first
    within_word = tokenizer.encode("a")
    for token, part in zip(tokens, rest, strict=True):
        piece = tokenizer.decode_after(within_word, [token])
        if piece.startswith(" "):
            # It begins a word: the prompt has the space, unless the piece itself does.
            piece = tokenizer.decode([token])
        text = (text.removesuffix(" ") if piece.startswith(" ") else text) + piece + part
    return text
