import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.config import decode
from llmtrain.corpus.config import ImageDataConfig, TokenDataConfig
from llmtrain.data.config import DataConfig, data_config_type
from llmtrain.errors import ConfigError

CONF = Path(__file__).parents[3] / "conf" / "data"


@dataclass(frozen=True)
class Whole:
    data: DataConfig


def whole(section: dict[str, Any]) -> DataConfig:
    return decode(Whole, {"data": section}, {"data": data_config_type}).data


def test_shipped_files_hold_every_default():
    tokens = yaml.safe_load((CONF / "tokens.yaml").read_text())
    assert whole(tokens | {"path": "somewhere"}) == TokenDataConfig("somewhere")
    assert set(tokens) == set(TokenDataConfig.__dataclass_fields__)
    images = yaml.safe_load((CONF / "mnist.yaml").read_text())
    assert whole(images) == ImageDataConfig()
    assert set(images) == set(ImageDataConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "tokens", "path": None}, "data.path: got nothing; allowed: a corpus; give data.path=…"),
        ({"kind": "tokens", "path": ""}, "data.path: got ''"),
        ({"path": "a", "overlap": 3}, "data.overlap: got 3; allowed: 0 with packing=concat"),
        ({"path": "a", "shuffle_tars": 0}, "data.shuffle_tars: got 0"),
        ({"path": "a", "sources": {"web": "b"}}, "data.sources: got {'web': 'b'}; allowed: nothing without"),
        ({"path": "a", "mixture": {}}, "data.mixture: got {}; allowed: one corpus or more"),
        ({"path": "a", "mixture": {"web": -1}}, "data.mixture.web: got -1.0; allowed: 0 or more"),
        ({"path": "a", "mixture": {"web": 0}}, "data.mixture: got {'web': 0.0}; allowed: a weight above 0"),
        ({"path": "a", "mixture": {"b/web": 1}}, "data.mixture: got 'b/web'; allowed: a plain name"),
        ({"mixture": {"web": 1}}, "data.sources: got no location for web"),
        (
            {"path": "a", "mixture": {"web": 1}, "sources": {"wbe": "b"}},
            "data.sources.wbe: got no corpus of the mixture; allowed: web",
        ),
        (
            {"path": "a", "mixture": {"web": 1, "books": 1}, "drop_last": True},
            "data.drop_last: got True; allowed: false with a mixture",
        ),
        (
            {"path": "a", "mixture": {"web": 1}, "curriculum": [{"step": 0, "mixture": {"web": 1}}]},
            "data.curriculum[0].step: got 0; allowed: more than 0",
        ),
        (
            {"path": "a", "mixture": {"web": 1}, "curriculum": [{"step": 5, "mixture": {"web": 0}}]},
            "data.curriculum[0].mixture: got {'web': 0.0}; allowed: a weight above 0",
        ),
        ({"path": "a", "cache": {"downloads": 0}}, "data.cache.downloads: got 0"),
        ({"kind": "tokens", "path": "a", "workers": -1}, "data.workers: got -1; allowed: 0 to 256"),
        ({"kind": "tokens", "path": "a", "workers": 257}, "data.workers: got 257; allowed: 0 to 256"),
        (
            {"kind": "tokens", "path": "a", "verify": "never"},
            "data.verify: got 'never'; allowed: size, checksum",
        ),
        ({"kind": "tokens", "path": "a", "worker": 1}, "data.worker: got an unknown key; allowed: workers"),
        ({"kind": "images", "workers": -1}, "data.workers: got -1"),
        ({"kind": "token"}, "data.kind: got 'token'; allowed: tokens"),
    ],
)
def test_refusals(section: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        whole(section)
    assert message in str(caught.value)


def test_a_mixture_s_corpora_have_paths_and_weights():
    section = {
        "path": "s3://bucket/corpora/",
        "mixture": {"web": 3, "books": 1},
        "sources": {"books": "/local/books"},
        "curriculum": [{"step": 10, "mixture": {"code": 1, "web": 1}}],
    }
    data = whole(section)
    assert isinstance(data, TokenDataConfig)
    assert data.paths == {
        "books": "/local/books",
        "code": "s3://bucket/corpora/code",
        "web": "s3://bucket/corpora/web",
    }
    assert data.weights(9) == {"books": 1.0, "code": 0.0, "web": 3.0}
    assert data.weights(10) == {"books": 0.0, "code": 1.0, "web": 1.0}
    assert TokenDataConfig("corpus").paths == {"": "corpus"}
    assert TokenDataConfig("corpus").weights(3) == {"": 1.0}


def test_configs_come_without_torch_and_numpy():
    code = "import sys, llmtrain.corpus.config;sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
