"""Models of ours beside transformers' own, of the same random weights, by way of folders.

    python -m tests.parity.architectures    # print the largest differences of logits, fp32

Every weight is random, biases and norms too, so that none can be mistaken for another. A row of the table is
an `Architecture`; what it is compared in, `Comparison`s by name, belongs to its kind of model.

Dim names: B rows, T tokens.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.interchange.huggingface import export_folder, import_folder
from llmtrain.interchange.trained import build_module, load_weights

V, T = 120, 48
LENGTHS = (T, 31, 10)
"""Tokens of the rows, the rest being padding; and of the documents that are packed into one row."""
FIRST_ID = 8
"""Ids below it mean something to some architecture."""
TOLERANCE = 1e-4

Comparison = Callable[[Any, Any], float]
"""(our model, theirs) → the largest difference of their logits."""


# What a decoder is compared in.


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(FIRST_ID, V, shape, generator=torch.Generator().manual_seed(seed))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest; raises AssertionError where all logits are alike, which would show nothing."""
    assert ours.std() > 0.1
    return float((ours - theirs).abs().max())


def plain(ours: Any, theirs: Any) -> float:
    tokens_BT = tokens(3, T)
    return difference(ours(tokens_BT), theirs(tokens_BT).logits)


def padded(ours: Any, theirs: Any) -> float:
    """Rows of several lengths, padded behind."""
    tokens_BT = tokens(len(LENGTHS), T)
    is_token_BT = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    expected = theirs(tokens_BT, attention_mask=is_token_BT.long()).logits
    found = ours(tokens_BT, documents_BT=is_token_BT.int() - 1)
    return difference(found[is_token_BT], expected[is_token_BT])


def packed(ours: Any, theirs: Any) -> float:
    """Documents in one row; theirs see each by itself."""
    lengths = torch.tensor(LENGTHS)
    tokens_BT = tokens(1, sum(LENGTHS))
    documents_BT = torch.arange(len(LENGTHS)).repeat_interleave(lengths)[None]
    positions_BT = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    expected = [theirs(document_BT).logits[0] for document_BT in tokens_BT.split(LENGTHS, dim=1)]
    found = ours(tokens_BT, documents_BT=documents_BT, positions_BT=positions_BT)
    return difference(found[0], torch.cat(expected))


def cached(ours: Any, theirs: Any) -> float:
    """A prompt, then a token at a time."""
    tokens_BT = tokens(2, T)
    cache = ours.new_cache(T)
    steps = [tokens_BT[:, :11], *tokens_BT[:, 11:].split(1, dim=1)]
    found = torch.cat([ours(step_BT, cache=cache) for step_BT in steps], dim=1)
    return difference(found, theirs(tokens_BT).logits)


def forget_length(theirs: Any) -> None:
    """What a model of theirs with dynamic positions keeps of longer texts than the next."""
    theirs(tokens(1, 2))


def plain_by_length(ours: Any, theirs: Any) -> float:
    forget_length(theirs)
    return plain(ours, theirs)


def packed_by_length(ours: Any, theirs: Any) -> float:
    def each(tokens_BT: Tensor) -> Any:
        forget_length(theirs)
        return theirs(tokens_BT)

    return packed(ours, each)


def cached_by_length(ours: Any, theirs: Any) -> float:
    """A prompt, then a token at a time, by both: a token's key stays as it was when the text was shorter."""
    forget_length(theirs)
    tokens_BT = tokens(2, T)
    cache, their_cache = ours.new_cache(T), None
    found, expected = [], []
    for step_BT in [tokens_BT[:, :11], *tokens_BT[:, 11:].split(1, dim=1)]:
        output = theirs(step_BT, past_key_values=their_cache, use_cache=True)
        their_cache = output.past_key_values
        expected.append(output.logits)
        found.append(ours(step_BT, cache=cache))
    return difference(torch.cat(found, dim=1), torch.cat(expected, dim=1))


BY_LENGTH: dict[str, Comparison] = {
    "plain": plain_by_length,
    "packed": packed_by_length,
    "cache": cached_by_length,
}
DECODER: dict[str, Comparison] = {"plain": plain, "padding": padded, "packed": packed, "cache": cached}
ENCODER: dict[str, Comparison] = {"plain": plain, "padding": padded, "packed": packed}


def with_segments(ours: Any, theirs: Any) -> float:
    """Texts A and B."""
    tokens_BT = tokens(3, T)
    segments_BT = (torch.arange(T) >= torch.tensor([[20], [5], [T]])).long()
    output = theirs(tokens_BT, token_type_ids=segments_BT)
    expected = output.prediction_logits if "prediction_logits" in output else output.logits
    return difference(ours(tokens_BT, segments_BT=segments_BT), expected)


class OfTokens(nn.Module):
    """BertForPreTraining with its token logits under the name that all others have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        output = self.model(*arguments, **settings)
        output.logits = output.prediction_logits
        return output


def of_tokens(comparison: Comparison) -> Comparison:
    return lambda ours, theirs: comparison(ours, OfTokens(theirs))


PRE_TRAINING = {name: of_tokens(comparison) for name, comparison in ENCODER.items()}


def packed_relatively(ours: Any, theirs: Any) -> float:
    """Documents in one row, by a model that needs no positions."""

    def without_positions(tokens_BT: Tensor, documents_BT: Tensor, positions_BT: Tensor) -> Tensor:
        logits: Tensor = ours(tokens_BT, documents_BT=documents_BT)
        return logits

    return packed(without_positions, theirs)


def permuted(ours: Any, theirs: Any) -> float:
    """Predicted places in an order, of rows with padding behind."""
    tokens_BT = tokens(len(LENGTHS), T)
    is_token_BT = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    targets_BM = torch.stack([torch.arange(n)[seed::3][:3] for seed, n in enumerate(LENGTHS)])
    order_BT = torch.zeros_like(tokens_BT).scatter(1, targets_BM, torch.tensor([[2, 3, 1]] * len(LENGTHS)))
    is_seen_BTT = (order_BT[:, None] < order_BT[:, :, None]) | (order_BT == 0)[:, None]
    expected = theirs(
        tokens_BT,
        attention_mask=is_token_BT.float(),
        perm_mask=(~is_seen_BTT).float(),
        target_mapping=nn.functional.one_hot(targets_BM, T).float(),
    ).logits
    found = ours(tokens_BT, order_BT=order_BT, targets_BM=targets_BM, documents_BT=is_token_BT.int() - 1)
    return difference(found, expected)


XLNET: dict[str, Comparison] = {
    "plain": plain,
    "padding": padded,
    "packed": packed_relatively,
    "segments": with_segments,
    "permuted": permuted,
}


# What an encoder–decoder is compared in.

TARGETS = (9, 20, 33)
"""Tokens of the targets of sources that have LENGTHS."""


def sources_and_targets(lengths: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and which are tokens, of sources and of targets in rows of their own; of the first `lengths`."""
    lengths_B, targets_B = torch.tensor(LENGTHS)[:lengths, None], torch.tensor(TARGETS)[:lengths, None]
    S, T = int(lengths_B.max()), int(targets_B.max())
    B = len(lengths_B)
    are_sources, are_targets = torch.arange(S) < lengths_B, torch.arange(T) < targets_B
    return tokens(B, S), are_sources, tokens(B, T, seed=1), are_targets


def paired(ours: Any, theirs: Any) -> float:
    """A source and a target; and their losses."""
    sources_BS, _, tokens_BT, _ = sources_and_targets(1)
    labels_BT = tokens(*tokens_BT.shape, seed=2)
    expected = theirs(input_ids=sources_BS, decoder_input_ids=tokens_BT, labels=labels_BT)
    loss = ours(tokens_BT, sources_BS=sources_BS, labels_BT=labels_BT) / labels_BT.numel()
    logits = ours(tokens_BT, sources_BS=sources_BS)
    return max(difference(logits, expected.logits), float((loss - expected.loss).abs()))


def padded_pairs(ours: Any, theirs: Any) -> float:
    """Sources and targets of several lengths, padded behind."""
    sources_BS, are_sources_BS, tokens_BT, are_targets_BT = sources_and_targets()
    expected = theirs(
        input_ids=sources_BS,
        attention_mask=are_sources_BS.long(),
        decoder_input_ids=tokens_BT,
        decoder_attention_mask=are_targets_BT.long(),
    ).logits
    found = ours(
        tokens_BT,
        sources_BS=sources_BS,
        source_documents_BS=are_sources_BS.int() - 1,
        documents_BT=are_targets_BT.int() - 1,
    )
    return difference(found[are_targets_BT], expected[are_targets_BT])


def packed_pairs(ours: Any, theirs: Any) -> float:
    """Pairs in one row with padding behind; theirs see each by itself."""
    sources_BS, are_sources_BS, tokens_BT, are_targets_BT = sources_and_targets()
    texts = {"sources": (sources_BS, are_sources_BS), "tokens": (tokens_BT, are_targets_BT)}
    expected = [
        theirs(input_ids=sources[mine][None], decoder_input_ids=targets[other][None]).logits[0]
        for sources, mine, targets, other in zip(
            sources_BS, are_sources_BS, tokens_BT, are_targets_BT, strict=True
        )
    ]
    row: dict[str, Tensor] = {}
    for name, (ids, are_tokens) in texts.items():
        numbers, places = are_tokens.nonzero(as_tuple=True)
        row[name] = torch.cat([ids[are_tokens], ids.new_zeros(5)])[None]
        row[f"{name}_documents"] = torch.cat([numbers, numbers.new_full((5,), -1)])[None]
        row[f"{name}_positions"] = torch.cat([places, places.new_zeros(5)])[None]
    found = ours(
        row["tokens"],
        documents_BT=row["tokens_documents"],
        positions_BT=row["tokens_positions"],
        sources_BS=row["sources"],
        source_documents_BS=row["sources_documents"],
        source_positions_BS=row["sources_positions"],
    )
    return difference(found[0, :-5], torch.cat(expected))


def cached_pairs(ours: Any, theirs: Any) -> float:
    """Sources of several lengths, encoded once; the targets' beginnings, then a token at a time."""
    sources_BS, are_sources_BS, tokens_BT, _ = sources_and_targets()
    cache = ours.new_cache(
        tokens_BT.shape[1], sources_BS=sources_BS, source_documents_BS=are_sources_BS.int() - 1
    )
    steps = [tokens_BT[:, :4], *tokens_BT[:, 4:].split(1, dim=1)]
    found = torch.cat([ours(step_BT, cache=cache) for step_BT in steps], dim=1)
    expected = theirs(
        input_ids=sources_BS, attention_mask=are_sources_BS.long(), decoder_input_ids=tokens_BT
    ).logits
    return difference(found, expected)


PAIRS: dict[str, Comparison] = {
    "plain": paired,
    "padding": padded_pairs,
    "packed": packed_pairs,
    "cache": cached_pairs,
}


# The table.


@dataclass(frozen=True)
class Architecture:
    """One model of transformers."""

    name: str
    model_class: str
    """Of transformers, with its heads."""
    settings: Mapping[str, Any]
    """Of its config, where they differ from the class' own."""
    comparisons: Mapping[str, Comparison] = field(default_factory=lambda: DECODER)
    unread: tuple[str, ...] = ()
    """Tensors of theirs that their own forward never reads; what stands in them may change."""

    untied: tuple[str, ...] = ()
    """Weights that get a value of their own, where a config cannot say so."""
    buffers: tuple[str, ...] = ()
    """Those that add to the logits, and are made random too."""

    def theirs(self) -> Any:
        """The model with every weight random."""
        import transformers

        model_class = getattr(transformers, self.model_class)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**self.settings)).eval()
        for name in self.untied:
            weight = nn.Parameter(model.get_parameter(name).detach().clone())
            model.get_submodule(name.rpartition(".")[0]).weight = weight
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            for name in self.buffers:
                model.get_buffer(name).normal_()
        return model


_GPT2 = {
    "vocab_size": V,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
}
_LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_YARN_IN_FULL = {**_YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 0.7}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.2, 2.0, 5.0, 9.0],
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
_PARTIAL = {"partial_rotary_factor": 0.5}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
_GEMMA = {
    **_LLAMA,
    "head_dim": 16,
    "sliding_window": 9,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
_NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}
_ROPE_BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_BERT = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_XLNET = {
    "vocab_size": V,
    "d_model": 32,
    "n_layer": 2,
    "n_head": 4,
    "d_inner": 40,
    "initializer_range": 0.2,
}
_ROBERTA = {**_BERT, "pad_token_id": 1, "layer_norm_eps": 1e-5}

_T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}

ARCHITECTURES = (
    Architecture("gpt2", "GPT2LMHeadModel", _GPT2),
    Architecture(
        "gpt2, untied",
        "GPT2LMHeadModel",
        {**_GPT2, "tie_word_embeddings": False, "n_inner": 48, "activation_function": "gelu"},
    ),
    Architecture("llama", "LlamaForCausalLM", {**_LLAMA, "num_key_value_heads": 4}),
    Architecture("llama, grouped queries", "LlamaForCausalLM", _LLAMA),
    Architecture(
        "llama, tied, biases",
        "LlamaForCausalLM",
        {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    Architecture("llama, llama3 rope", "LlamaForCausalLM", {**_LLAMA, "rope_parameters": _LLAMA3}),
    Architecture("llama, linear rope", "LlamaForCausalLM", {**_LLAMA, "rope_parameters": _LINEAR}),
    Architecture("llama, yarn", "LlamaForCausalLM", {**_LLAMA, "rope_parameters": _YARN}),
    Architecture("llama, yarn in full", "LlamaForCausalLM", {**_LLAMA, "rope_parameters": _YARN_IN_FULL}),
    Architecture(
        "llama, yarn, mscale",
        "LlamaForCausalLM",
        {**_LLAMA, "rope_parameters": {**_YARN, "mscale": 1.4, "mscale_all_dim": 0.6}},
    ),
    Architecture(
        "llama, dynamic rope",
        "LlamaForCausalLM",
        {**_LLAMA, "rope_parameters": _DYNAMIC, "max_position_embeddings": 16},
        BY_LENGTH,
    ),
    Architecture("llama, longrope", "LlamaForCausalLM", {**_LLAMA, "rope_parameters": _LONGROPE}, BY_LENGTH),
    Architecture("llama, attention biases", "LlamaForCausalLM", {**_LLAMA, "attention_bias": True}),
    Architecture("llama, MLP biases", "LlamaForCausalLM", {**_LLAMA, "mlp_bias": True}),
    Architecture(
        "smollm", "LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 1}
    ),
    Architecture("smollm3", "SmolLM3ForCausalLM", {**_LLAMA, "no_rope_layers": [1, 0, 1]}),
    Architecture(
        "smollm3, windows",
        "SmolLM3ForCausalLM",
        {**_LLAMA, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 9},
    ),
    Architecture("mistral", "MistralForCausalLM", {**_LLAMA, "sliding_window": None, "head_dim": 16}),
    Architecture("mistral, window", "MistralForCausalLM", {**_LLAMA, "sliding_window": 9}),
    Architecture("phi3", "Phi3ForCausalLM", _LLAMA),
    Architecture("phi3, partial, window", "Phi3ForCausalLM", {**_LLAMA, **_PARTIAL, "sliding_window": 9}),
    # As Phi 3's and Phi 4's folders of long contexts say it.
    Architecture(
        "phi3, longrope",
        "Phi3ForCausalLM",
        {
            **_LLAMA,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.2, 1.5],
                "long_factor": [1.1, 3.0, 9.0],
            },
        },
        BY_LENGTH,
    ),
    Architecture(
        "ministral",
        "MinistralForCausalLM",
        {**_LLAMA, "head_dim": 16, "sliding_window": 9, "layer_types": _MIXED},
    ),
    Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA),
    Architecture(
        "qwen2, tied, window", "Qwen2ForCausalLM", {**_LLAMA, **_WINDOW, "tie_word_embeddings": True}
    ),
    # As Qwen's model cards say to put it into config.json.
    Architecture(
        "qwen2, yarn",
        "Qwen2ForCausalLM",
        {
            **_LLAMA,
            "max_position_embeddings": 16,
            "rope_theta": 1_000_000.0,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"},
        },
    ),
    Architecture(
        "qwen3, yarn, biases",
        "Qwen3ForCausalLM",
        {
            **_LLAMA,
            "head_dim": 16,
            "attention_bias": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
    Architecture(
        "qwen2, windows of single layers", "Qwen2ForCausalLM", {**_LLAMA, **_WINDOW, "max_window_layers": 1}
    ),
    Architecture("qwen3", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 16}),
    Architecture("qwen3, tied", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
    Architecture("gemma", "GemmaForCausalLM", {**_LLAMA, "head_dim": 16}),
    Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA),
    Architecture(
        "gemma2, untied, no caps, biases", "Gemma2ForCausalLM", {**_GEMMA, **_NO_CAPS, "attention_bias": True}
    ),
    Architecture("gemma3", "Gemma3ForCausalLM", {**_GEMMA, "layer_types": _MIXED}),
    Architecture(
        "gemma3, scaled rope",
        "Gemma3ForCausalLM",
        {**_GEMMA, **_NO_CAPS, "layer_types": _MIXED, "rope_parameters": _ROPE_BY_KIND},
    ),
    Architecture(
        "gemma3, one scaled rope",
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "layer_types": _MIXED,
            "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _LINEAR),
        },
    ),
    Architecture("olmo2", "Olmo2ForCausalLM", _LLAMA),
    Architecture("olmo2, biases", "Olmo2ForCausalLM", {**_LLAMA, "attention_bias": True}),
    Architecture(
        "olmo3",
        "Olmo3ForCausalLM",
        {**_LLAMA, "sliding_window": 9, "layer_types": _MIXED, "tie_word_embeddings": True},
    ),
    Architecture(
        "olmo3, yarn",
        "Olmo3ForCausalLM",
        {
            **_LLAMA,
            "sliding_window": 9,
            "layer_types": _MIXED,
            "rope_parameters": {**_ROPE_BY_KIND, "full_attention": _YARN},
        },
    ),
    Architecture("bert, pairs", "BertForPreTraining", _BERT, {**PRE_TRAINING, "segments": with_segments}),
    Architecture("bert", "BertForMaskedLM", _BERT, {**ENCODER, "segments": with_segments}),
    Architecture(
        "bert, untied",
        "BertForMaskedLM",
        {**_BERT, "tie_word_embeddings": False},
        ENCODER,
        unread=("cls.predictions.bias",),
    ),
    Architecture("roberta", "RobertaForMaskedLM", {**_ROBERTA, "type_vocab_size": 1}, ENCODER),
    Architecture("roberta, segments", "RobertaForMaskedLM", _ROBERTA, {**ENCODER, "segments": with_segments}),
    Architecture("xlnet", "XLNetLMHeadModel", _XLNET, XLNET),
    Architecture("xlnet, untied", "XLNetLMHeadModel", {**_XLNET, "tie_word_embeddings": False}, XLNET),
    Architecture("t5", "T5ForConditionalGeneration", _T5, PAIRS),
    Architecture(
        "t5 1.1",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        PAIRS,
        untied=("lm_head.weight",),
    ),
    Architecture(
        "t5, logits not scaled",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
        PAIRS,
    ),
    Architecture("bart", "BartForConditionalGeneration", _BART, PAIRS),
    Architecture(
        "bart, scaled, bias",
        "BartForConditionalGeneration",
        {**_BART, "scale_embedding": True, "activation_function": "relu"},
        PAIRS,
        buffers=("final_logits_bias",),
    ),
)


def ours_from(folder: Path) -> nn.Module:
    """Our model of a folder, in evaluation mode."""
    imported = import_folder(folder)
    assert not imported.fresh
    module = build_module(imported.config, torch.device("cpu"))
    load_weights(module, imported.weights)
    return module.eval()


@torch.no_grad()
def differences(architecture: Architecture, folder: Path) -> dict[str, float]:
    """Comparison → the largest difference of logits, by way of an empty `folder`."""
    theirs = architecture.theirs()
    theirs.save_pretrained(folder)
    ours = ours_from(folder)
    return {name: compare(ours, theirs) for name, compare in architecture.comparisons.items()}


def changed_tensors(architecture: Architecture, folder: Path, file_bytes: int) -> list[str]:
    """Names of tensors that are not bit for bit what they were after a way in and out of ours, in files of
    `file_bytes` at most; by way of an empty `folder`."""
    theirs = architecture.theirs()
    theirs.save_pretrained(folder / "theirs", max_shard_size=file_bytes)
    imported = import_folder(folder / "theirs")
    export_folder(
        imported.config,
        imported.weights,
        None,
        folder / "ours",
        file_bytes=file_bytes,
        origin=imported.origin,
    )
    again = type(theirs).from_pretrained(folder / "ours", dtype=torch.float32)
    before, after = theirs.state_dict(), again.state_dict()
    names = sorted((before.keys() | after.keys()) - set(architecture.unread))
    return [n for n in names if n not in before or n not in after or not torch.equal(before[n], after[n])]


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Architecture → comparison → difference, as text."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(map(len, rows)) + 2
    lines = [f"{'architecture':<{width}}" + "".join(f"{column:>10}" for column in columns)]
    for name, row in rows.items():
        cells = (f"{row[column]:>10.1e}" if column in row else f"{'-':>10}" for column in columns)
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _main() -> int:
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows = {}
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            rows[architecture.name] = differences(architecture, Path(folder))
    print(table(rows))
    largest = max(value for row in rows.values() for value in row.values())
    print(f"largest: {largest:.1e}; allowed: {TOLERANCE:.0e}")
    return 0 if largest <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(_main())
