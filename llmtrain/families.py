"""The table of model families: name → config, module, objective, kind of data.

To add a family: a config in models/config.py, a module in models/, one line here, presets in conf/model/.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from llmtrain.config import show
from llmtrain.corpus.config import ImageDataConfig, TokenDataConfig
from llmtrain.corpus.corpora import Corpora, open_corpora
from llmtrain.errors import ConfigError, Problem, nearest
from llmtrain.files import at_home
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.configs import ModelConfig, TransformerConfig
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.parallel.config import RecomputeConfig
from llmtrain.parallel.layout import ModelShape

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.data.datasets.base import Dataset
    from llmtrain.objectives.base import Objective
    from llmtrain.parallel.tensor import Role, Table


@dataclass(frozen=True)
class Family:
    """What belongs together; modules are imported when built, so that the table needs no torch."""

    config: type
    data: Literal["tokens", "images"]
    build: Callable[[Any], nn.Module]
    objective: Callable[[Any, Any], Objective]
    """(model config, data config) → objective."""
    tensor_table: Callable[[Any], Table] | None = None
    """Model config → what tensor parallelism divides, and how; None: it cannot be divided."""
    has_stages: bool = False
    """Its forward is `stages()`, which pipelines divide, and runs its `blocks`, which can be recomputed."""
    has_attention: bool = False
    """It mixes tokens in attention alone, and its head takes each by itself, so that processes can share a
    sequence."""

    @property
    def axes(self) -> frozenset[str]:
        """Axes besides data that the family can be divided over."""
        has = {
            "tensor": self.tensor_table is not None,
            "pipeline": self.has_stages,
            "sequence": self.has_attention,
        }
        return frozenset(axis for axis, can in has.items() if can)


def _gpt(config: GPTConfig) -> nn.Module:
    from llmtrain.models.gpt.model import GPT

    return GPT(config)


def _blocks_table() -> dict[str, Role]:
    """Of models whose blocks are attention and an MLP."""
    return {
        "embedding": "embedding",
        "blocks.*.attention.qkv": "column",
        "blocks.*.attention.output": "row",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "head": "head",
    }


def _gpt_table(config: GPTConfig) -> Table:
    table = _blocks_table()
    if config.gated_mlp:
        table["blocks.*.mlp.gate"] = "column"
    if config.qk_norm:
        is_whole = config.qk_norm_over == "head"
        table["blocks.*.attention.query_norm"] = "shared" if is_whole else "all_heads"
        table["blocks.*.attention.key_norm"] = "shared" if is_whole else "all_heads"
    return table


def _bert(config: BertConfig) -> nn.Module:
    from llmtrain.models.bert.model import Bert

    return Bert(config)


def _bert_table(config: BertConfig) -> Table:
    return _blocks_table()


def _xlnet(config: XLNetConfig) -> nn.Module:
    from llmtrain.models.xlnet.model import XLNet

    return XLNet(config)


def _xlnet_table(config: XLNetConfig) -> Table:
    table: dict[str, Role] = {
        "embedding": "embedding",
        "blocks.*.attention.query": "column",
        "blocks.*.attention.key_value": "column",
        "blocks.*.attention.position": "column",
        "blocks.*.attention.*_bias": "heads",
        "blocks.*.attention.output": "row",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "head": "head",
    }
    if config.has_segments:
        table["blocks.*.attention.segments"] = "heads"
    return table


def _seq2seq(config: Seq2SeqConfig) -> nn.Module:
    from llmtrain.models.encoder_decoder.model import EncoderDecoder

    return EncoderDecoder(config)


def _seq2seq_table(config: Seq2SeqConfig) -> Table:
    table: dict[str, Role] = {
        "embedding": "embedding",
        "*.attention.qkv": "column",
        "*.attention.output": "row",
        "decoder.*.cross_attention.query": "column",
        "decoder.*.cross_attention.key_value": "column",
        "decoder.*.cross_attention.output": "row",
        "*.mlp.up": "column",
        "*.mlp.down": "row",
        "head": "head",
    }
    if config.gated_mlp:
        table["*.mlp.gate"] = "column"
    if config.positions == "relative":
        table["*.attention.relative"] = "heads"
    return table


def _lstm(config: LSTMConfig) -> nn.Module:
    from llmtrain.models.recurrent.model import LSTMLanguageModel

    return LSTMLanguageModel(config)


def _simple_cnn(config: SimpleCNNConfig) -> nn.Module:
    from llmtrain.models.convolutional.model import SimpleCNN

    return SimpleCNN(config)


def _causal_lm(model: ModelConfig, data: TokenDataConfig) -> Objective:
    from llmtrain.objectives.causal_lm import CausalLM

    return CausalLM(document_mask=data.document_mask)


def _masked_lm(model: BertConfig, data: TokenDataConfig) -> Objective:
    from llmtrain.objectives.masked_lm import MaskedLM

    word_starts = text_ids = None
    has_special_ids_inside = model.num_text_ids > min(model.special_ids)
    if model.objective.whole_words or has_special_ids_inside:
        corpora = open_corpora(data)
        if model.objective.whole_words:
            word_starts = corpora.load_tokenizer().word_starts()
        if corpora.special_ids.get("mask") == model.mask_id:
            text_ids = corpora.load_tokenizer().ordinary_ids()
    return MaskedLM(model, document_mask=data.document_mask, word_starts_V=word_starts, text_ids=text_ids)


def _permuted_lm(model: XLNetConfig, data: TokenDataConfig) -> Objective:
    from llmtrain.objectives.permuted_lm import PermutedLM

    return PermutedLM(model, document_mask=data.document_mask)


def _seq2seq_objective(model: Seq2SeqConfig, data: TokenDataConfig) -> Objective:
    from llmtrain.objectives.denoising import Denoising
    from llmtrain.objectives.seq2seq import PairedText
    from llmtrain.objectives.span_corruption import SpanCorruption

    if model.objective.kind == "pairs":
        return PairedText(model)
    if model.objective.kind == "span_corruption":
        return SpanCorruption(model)

    return Denoising(model, open_corpora(data).load_tokenizer().sentence_ends())


def _classification(model: ModelConfig, data: ImageDataConfig) -> Objective:
    from llmtrain.objectives.classification import Classification

    return Classification()


FAMILIES: dict[str, Family] = {
    "gpt": Family(
        GPTConfig, "tokens", _gpt, _causal_lm, tensor_table=_gpt_table, has_stages=True, has_attention=True
    ),
    "bert": Family(BertConfig, "tokens", _bert, _masked_lm, tensor_table=_bert_table, has_stages=True),
    "xlnet": Family(XLNetConfig, "tokens", _xlnet, _permuted_lm, tensor_table=_xlnet_table, has_stages=True),
    "seq2seq": Family(
        Seq2SeqConfig, "tokens", _seq2seq, _seq2seq_objective, tensor_table=_seq2seq_table, has_stages=True
    ),
    "lstm": Family(LSTMConfig, "tokens", _lstm, _causal_lm),
    "simple_cnn": Family(SimpleCNNConfig, "images", _simple_cnn, _classification),
}


OBJECTIVES = {
    "bert": ("mlm", "mlm_nsp", "mlm_sop"),
    "xlnet": ("permuted_lm",),
    "seq2seq": ("seq2seq", "span_corruption", "denoising"),
}
"""Family → its options in conf/objective/; those left out predict the next token."""


def model_config_type(section: Mapping[str, Any]) -> type:
    """The dataclass of a `model` section, by its `family`; raises ConfigError for an unknown one."""
    family = section.get("family", "gpt")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(Problem("model.family", show(family), nearest(str(family), list(FAMILIES))))
    return FAMILIES[family].config


def family_of(model: ModelConfig) -> Family:
    return FAMILIES[model.family]


def skeleton_of(model: ModelConfig) -> nn.Module:
    """The module on the meta device: every parameter has its shape and no values."""
    from llmtrain.nn.initialize import on_meta

    with on_meta():
        return family_of(model).build(model)


def model_shape(model: ModelConfig) -> ModelShape:
    """What the layout asks of the model."""
    family = family_of(model)
    if not isinstance(model, TransformerConfig):
        return ModelShape(model.family, family.axes, dropout=model.dropout)
    scaling = model.blocks.rope_scaling
    return ModelShape(
        model.family,
        family.axes,
        model.blocks.num_layers,
        model.kv_heads,
        model.mlp_width,
        model.dropout,
        shares_tokens=family.has_attention,
        reads_lengths=bool(scaling and scaling.depends_on_length),
    )


def data_problems(model: ModelConfig, data: TokenDataConfig | ImageDataConfig) -> list[Problem]:
    """What keeps `model` from learning from this kind of data."""
    wanted = family_of(model).data
    if data.kind == wanted:
        paired = isinstance(model, BertConfig) and model.has_pairs
        if paired and isinstance(data, TokenDataConfig) and data.packing != "concat":
            allowed = "concat with model.objective.pairs: a row holds one pair of texts"
            return [Problem("data.packing", data.packing, allowed, "give data.packing=concat")]
        if isinstance(model, Seq2SeqConfig) and isinstance(data, TokenDataConfig):
            return _seq2seq_data_problems(model, data)
        return []
    remedy = {"tokens": "add data=tokens data.path=…", "images": "add data=mnist"}[wanted]
    return [Problem("data.kind", f"{data.kind!r} with model.family={model.family}", wanted, remedy)]


def _seq2seq_data_problems(model: Seq2SeqConfig, data: TokenDataConfig) -> list[Problem]:
    kind = model.objective.kind
    if kind != "pairs":
        allowed = f"0 with model.objective.kind={kind}, which would ask for what two rows share twice"
        return [Problem("data.overlap", str(data.overlap), allowed)] if data.overlap else []
    problems = []
    if data.packing != "concat":
        allowed = "concat with model.objective.kind=pairs, which lays whole pairs into rows"
        problems.append(Problem("data.packing", data.packing, allowed, "leave it out"))
    if not data.document_mask:
        allowed = "true with model.objective.kind=pairs: pairs in a row are texts of their own"
        problems.append(Problem("data.document_mask", "false", allowed, "leave it out"))
    return problems


def corpora_problems(model: ModelConfig, corpora: Corpora | None) -> list[Problem]:
    """What keeps `model` from learning from these corpora: it needs pairs, or texts that are none. A decoder
    takes both; to it a pair is two documents in a row."""
    if corpora is None or isinstance(model, GPTConfig | LSTMConfig):
        return []
    if isinstance(model, Seq2SeqConfig) and model.objective.kind == "pairs":
        if corpora.paired:
            return []
        got, allowed = f"{corpora.where}, a corpus of single texts", "pairs with objective=seq2seq"
        remedy = "prepare it with target_field=… or target_source=…, or give another objective=…"
        return [Problem("data.path", got, allowed, remedy)]
    if not corpora.paired:
        return []
    got, allowed = f"{corpora.where}, a corpus of pairs", "single texts with this objective"
    remedy = "give an encoder–decoder with objective=seq2seq, or prepare the texts without target_field"
    return [Problem("data.path", got, allowed, remedy)]


def objective_family(keys: Collection[str]) -> str | None:
    """The family whose objectives have all of these keys but those that none has; None where none or several
    have."""
    known = {key for key in keys if any(key in _objective_keys(name) for name in OBJECTIVES)}
    found = [name for name in OBJECTIVES if known and _objective_keys(name).issuperset(known)]
    return found[0] if len(found) == 1 else None


def _objective_keys(family: str) -> frozenset[str]:
    objectives = [f.default_factory for f in fields(FAMILIES[family].config) if f.name == "objective"]
    return frozenset(f.name for objective in objectives for f in fields(objective))  # type: ignore[arg-type]


def objective_problems(section: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a `model` section, not decoded yet, whose objective is another family's."""
    family, given = section.get("family", "gpt"), section.get("objective")
    if family not in FAMILIES or not isinstance(given, Mapping):
        return []
    unknown = given.keys() - _objective_keys(family)
    theirs = objective_family(unknown)
    if theirs is None:
        return []
    got = f"one of {theirs} ({', '.join(OBJECTIVES[theirs])}) with model.family={family}"
    allowed = ", ".join(OBJECTIVES.get(family, ("null",)))
    return [Problem("objective", got, allowed, f"give another objective=…, or model=… of {theirs}")]


def recompute_problems(model: ModelConfig, recompute: RecomputeConfig) -> list[Problem]:
    """What keeps `model` from recomputing its activations."""
    if recompute.mode == "none" or family_of(model).has_stages:
        return []
    got = f"{recompute.mode} with model.family={model.family}, which has no blocks"
    return [Problem("recompute.mode", got, "none", "give recompute=none")]


def open_sources(
    model: ModelConfig,
    data: TokenDataConfig | ImageDataConfig,
    corpora: Corpora | None,
    split: str,
    sequence_length: int,
) -> dict[str, Dataset]:
    """Corpus → the numbered samples of its split; "" where there is one alone. Corpora without held-out
    text are left out, and those without training text that none is drawn of. Raises DataError when they
    cannot be had."""
    from llmtrain.data.datasets.base import TokenSequences
    from llmtrain.data.datasets.images import Images
    from llmtrain.data.datasets.paired_rows import PairedRows
    from llmtrain.data.datasets.pairs import Passages

    if isinstance(data, ImageDataConfig):
        return {"": Images.open(data.path, split, getattr(model, "num_classes", 10))}
    assert corpora is not None
    optional = data.undrawn if split == "train" else data.names
    if isinstance(model, BertConfig) and model.has_pairs:
        splits = corpora.splits(split, optional)
        return {name: Passages(tokens, sequence_length) for name, tokens in splits.items()}
    if isinstance(model, Seq2SeqConfig):
        cache = at_home(data.cache.dir)
        text_length, source_length, target_length = model.objective.lengths(sequence_length)
        if model.objective.kind == "pairs":
            splits = corpora.splits(split, optional)
            return {
                name: PairedRows(tokens, source_length, target_length, cache=cache)
                for name, tokens in splits.items()
            }
        sequence_length = text_length
    return {
        name: TokenSequences(
            tokens,
            sequence_length,
            packing=data.packing,
            overlap=data.overlap,
            cache=at_home(data.cache.dir),
        )
        for name, tokens in corpora.splits(split, optional).items()
    }


def open_dataset(
    model: ModelConfig,
    data: TokenDataConfig | ImageDataConfig,
    corpora: Corpora | None,
    split: str,
    sequence_length: int,
    on_skip: Callable[[str, int], None] = lambda shard, samples: None,
) -> Dataset:
    """The samples of one split of all corpora, for evaluation. on_skip: told (shard, samples) of each bad
    shard that is left out as data.on_bad_shard says. Raises DataError when they cannot be had."""
    from llmtrain.data.datasets.base import Concatenation, WithoutBadShards

    sources: list[Dataset] = list(open_sources(model, data, corpora, split, sequence_length).values())
    if isinstance(data, TokenDataConfig) and data.on_bad_shard == "skip":
        sources = [WithoutBadShards(dataset, on_skip) for dataset in sources]
    return sources[0] if len(sources) == 1 else Concatenation(sources)


def open_data(data: TokenDataConfig | ImageDataConfig) -> Corpora | None:
    """The token corpora, or None for data that is none. Raises DataError when they cannot be used."""
    return None if isinstance(data, ImageDataConfig) else open_corpora(data)
