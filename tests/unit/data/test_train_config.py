import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.config import decode
from llmtrain.data.train_config import DataConfig, ImageDataConfig, TokenDataConfig, data_config_type
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
        ({"kind": "tokens", "path": "???"}, "data.path: got nothing"),
        ({"kind": "tokens", "path": ""}, "data.path: got ''"),
        ({"kind": "tokens", "path": "a", "workers": -1}, "data.workers: got -1; allowed: 0 or more"),
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


def test_configs_come_without_torch_and_numpy():
    code = "import sys, llmtrain.data.train_config;sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
