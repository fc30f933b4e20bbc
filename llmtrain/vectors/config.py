"""Models of word vectors and the texts that they learn from: frozen dataclasses, free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class VocabularyKeys:
    """Which words have a vector."""

    optimizer: ClassVar[str] = "sgd"
    """What trains the family's vectors."""

    min_count: int = 5
    """Minimum number of occurrences of a word; rarer words are left out of the text."""
    max_words: int | None = None
    """Maximum number of words, of which the most frequent are kept; null: no limit."""
    phrases: int = 0
    """Passes that join pairs of words which often stand together, as new_york (Mikolov et al. 2013,
    arXiv:1310.4546, section 4); a second pass finds phrases of up to four words."""
    phrase_threshold: float = 100.0
    """Least score (n_ab − min_count) · words / (n_a · n_b) at which a pair becomes a phrase."""

    def width(self, num_words: int) -> int:
        """Return the numbers of a vector. num_words: of the vocabulary."""
        return num_words

    def problems(self) -> Iterator[Problem]:
        yield from require(self.min_count >= 1, "min_count", self.min_count, "1 or more")
        most = self.max_words
        yield from require(most is None or most >= 2, "max_words", most, "2 or more, or null")
        yield from require(0 <= self.phrases <= 4, "phrases", self.phrases, "0 to 4")
        yield from require(
            self.phrase_threshold > 0, "phrase_threshold", self.phrase_threshold, "more than 0"
        )


@dataclass(frozen=True)
class VectorKeys(VocabularyKeys):
    """Size of the vectors and of the context of a word."""

    dimensions: int = 100
    """Dimensions of a vector."""
    window: int = 5
    """Most words on each side of a word that are its context."""

    def width(self, num_words: int) -> int:
        return self.dimensions

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from require(1 <= self.dimensions <= 4096, "dimensions", self.dimensions, "1 to 4096")
        yield from require(1 <= self.window <= 1000, "window", self.window, "1 to 1000")


@dataclass(frozen=True)
class PredictionKeys(VectorKeys):
    """How words are predicted from their context."""

    architecture: Literal["skip_gram", "cbow"] = "skip_gram"
    """skip_gram: a word and each word of its context predict each other; cbow: the mean of the context
    predicts the word (Mikolov et al. 2013, arXiv:1301.3781)."""
    loss: Literal["negative_sampling", "hierarchical_softmax"] = "negative_sampling"
    """negative_sampling: the word is discriminated from words drawn at random; hierarchical_softmax: its path
    through
    a Huffman tree over the vocabulary is predicted (arXiv:1310.4546, sections 2.1 and 2.2)."""
    negatives: int = 5
    """Number of words drawn at random for each predicted word."""
    negative_power: float = 0.75
    """Words are drawn in proportion to count^negative_power."""
    shared_negatives: bool = False
    """With skip_gram of word2vec, the words of a window share the drawn ones (Ji et al. 2016,
    arXiv:1604.04661), which is a little faster; false: each pair has its own, as in word2vec."""
    dynamic_window: bool = True
    """Each word's window is drawn uniformly from 1 to `window`, so that near words count more; false: always
    `window`."""
    subsample: float = 1e-3
    """A word of the share f of the text is kept with the probability √(t/f) + t/f, with t = subsample; 0: all
    are kept."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from require(1 <= self.negatives <= 64, "negatives", self.negatives, "1 to 64")
        power = self.negative_power
        yield from require(0 <= power <= 2, "negative_power", power, "0 to 2")
        yield from require(0 <= self.subsample < 1, "subsample", self.subsample, "0 up to, not including, 1")

    @property
    def grams(self) -> Grams | None:
        """Return which n-grams of a word have vectors besides; None: none."""
        return None


class Grams(NamedTuple):
    """Character n-grams that have vectors."""

    shortest: int
    longest: int
    buckets: int


@dataclass(frozen=True)
class Word2VecConfig(PredictionKeys):
    """Skip-gram and CBOW (Mikolov et al. 2013)."""

    family: Literal["word2vec"] = "word2vec"
    """The family of the model."""


@dataclass(frozen=True)
class FastTextConfig(PredictionKeys):
    """Skip-gram and CBOW over words and their character n-grams (Bojanowski et al. 2017, arXiv:1607.04606),
    so that words never seen have vectors too."""

    family: Literal["fasttext"] = "fasttext"
    """The family of the model."""
    shortest: int = 3
    """Fewest characters of an n-gram; the marks < and > of a word's beginning and end count."""
    longest: int = 6
    """Most characters of an n-gram."""
    buckets: int = 200_000
    """Vectors of n-grams, which share them by a hash. The paper has 2,000,000, which take 800 MB with 100
    dimensions, in memory and in each checkpoint."""

    @property
    def grams(self) -> Grams:
        return Grams(self.shortest, self.longest, self.buckets)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from require(1 <= self.shortest <= 32, "shortest", self.shortest, "1 to 32")
        allowed = f"shortest={self.shortest} to 32"
        yield from require(self.shortest <= self.longest <= 32, "longest", self.longest, allowed)
        yield from require(1 <= self.buckets <= 1 << 28, "buckets", self.buckets, f"1 to {1 << 28}")


@dataclass(frozen=True)
class GloveConfig(VectorKeys):
    """GloVe: the logarithms of co-occurrence counts as products of vectors (Pennington et al. 2014)."""

    optimizer: ClassVar[str] = "adagrad"

    family: Literal["glove"] = "glove"
    """The family of the model."""
    x_max: float = 100.0
    """Count from which on pairs weigh alike (section 4.2 of the paper)."""
    power: float = 0.75
    """A pair with the count x weighs (x / x_max)^power below it."""
    symmetric: bool = True
    """The context is on both sides of a word; false: before it alone."""
    memory_pairs: int = 1 << 25
    """Pairs that are counted in memory (16 bytes each, four times that while they are sorted) before they are
    written to the run folder and merged."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from require(self.x_max > 0, "x_max", self.x_max, "more than 0")
        yield from require(0 < self.power <= 2, "power", self.power, "more than 0, up to 2")
        yield from require(
            self.memory_pairs >= 1 << 10, "memory_pairs", self.memory_pairs, f"{1 << 10} or more"
        )


MOST_ONE_HOT = 20_000


@dataclass(frozen=True)
class OneHotConfig(VocabularyKeys):
    """One dimension for each word: a baseline without any similarity between words."""

    family: Literal["one_hot"] = "one_hot"
    """The family of the model."""
    max_words: int | None = 10_000
    """Maximum number of words, of which the most frequent are kept; each is a dimension."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        few = self.max_words is not None and self.max_words <= MOST_ONE_HOT
        yield from require(few, "max_words", self.max_words, f"2 to {MOST_ONE_HOT:,}, as each is a dimension")


VectorsConfig = Word2VecConfig | FastTextConfig | GloveConfig | OneHotConfig
VECTORS_CONFIGS: dict[str, type[VocabularyKeys]] = {
    "word2vec": Word2VecConfig,
    "fasttext": FastTextConfig,
    "glove": GloveConfig,
    "one_hot": OneHotConfig,
}


MODELS = ", ".join(VECTORS_CONFIGS)


def vectors_config_type(section: Mapping[str, Any]) -> type[VocabularyKeys] | None:
    """Return the config class for a `model` section, by its `family`; None for a model of another kind."""
    family = section.get("family")
    return VECTORS_CONFIGS.get(family) if isinstance(family, str) else None


@dataclass(frozen=True)
class TextsConfig:
    """Texts whose words are counted: files as `llmtrain prepare` reads them, or a corpus that it wrote."""

    path: tuple[str, ...]
    """Files, folders, glob patterns, package:NAME/path or URLs of files, as of `llmtrain prepare`; or the
    folder of a corpus, whose training documents are read."""
    kind: Literal["texts"] = "texts"
    """Words of text."""
    text_field: str = "text"
    """Column or key of the text in .jsonl, .csv, .tsv, .parquet and the .json members of a .tar."""
    txt_document: Literal["auto", "file", "line", "paragraph"] = "auto"
    """The unit of a .txt file beyond which no context reaches. auto: consecutive paragraphs of about 4
    KiB."""
    quoting: Literal["auto", "double", "none"] = "auto"
    """Quotes in .csv and .tsv, as of `llmtrain prepare`."""
    pattern: str = r"[^\W_]+(?:['’][^\W_]+)*"
    """Regular expression of a word: letters and digits, with apostrophes inside."""
    lower: bool = True
    """Convert words to lower case."""
    most_words: int = 10_000_000
    """Maximum number of different words that are counted at once; beyond it the counts of the rarest are
    dropped."""

    def problems(self) -> Iterator[Problem]:
        allowed = "files, folders, globs, package:NAME/path, or a corpus"
        if not self.path:
            yield Problem("path", "nothing", allowed, "give data.path=…")
        yield from require(bool(self.text_field), "text_field", self.text_field, "a name")
        try:
            has_groups = re.compile(self.pattern).groups > 0
        except re.error as error:
            yield Problem("pattern", f"{self.pattern!r} ({error})", "a regular expression")
        else:
            allowed = "an expression without groups: (?:…) in place of (…)"
            yield from require(not has_groups, "pattern", self.pattern, allowed)
        yield from require(self.most_words >= 1000, "most_words", self.most_words, "1000 or more")
