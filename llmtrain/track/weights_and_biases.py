"""Log to a Weights & Biases run, and resume it after a kill under the same id and at the same step.

W&B drops values for a step that it already has. A killed run has usually logged steps after its checkpoint,
and has lost the values that waited in memory (by default, those of 15 seconds). A resumed run therefore asks
which steps arrived, the server when online and the local log when offline, skips them, and fills in the lost
ones from metrics.jsonl.
"""

from __future__ import annotations

import io
import logging
import math
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError, Problem
from llmtrain.files import open_regular
from llmtrain.git import head_commit
from llmtrain.track.base import Metrics, WrittenText
from llmtrain.track.config import WandbConfig
from llmtrain.track.jsonl import read_metrics
from llmtrain.urls import without_credentials

logger = logging.getLogger(__name__)


class WandbTracker:
    """Logs to the run `run_id`, or to a new one if None.

    history: the metrics.jsonl from which a resumed run fills in lost steps; None: it fills in none.
    Without a network the run is kept offline, with a warning; `wandb sync` uploads it later.
    Raise ConfigError if W&B refuses the settings or the account.
    """

    def __init__(
        self,
        config: WandbConfig,
        *,
        run_dir: Path,
        run_name: str,
        resolved_config: dict[str, Any],
        resume_step: int | None,
        run_id: str | None,
        history: Path | None,
    ) -> None:
        self._run = _init(config, run_dir, run_name, resolved_config, run_id)
        self._run_id = run_id if self._run.disabled else self._run.id
        self._first_step = 0
        self._keeps = config.artifacts
        if run_id is None or self._run.disabled:
            return
        self._first_step = last_logged_step(run_dir, run_id) + 1 if self._run.offline else self._run.step
        if resume_step is not None and history is not None:
            for record in read_metrics(history):
                if record["step"] <= resume_step:
                    self.log(record.pop("step"), {k: math.nan if v is None else v for k, v in record.items()})

    def log(self, step: int, metrics: Metrics) -> None:
        if step >= self._first_step:
            self._run.log(dict(metrics), step=step)

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        import wandb
        from PIL import Image

        if step >= self._first_step:
            images = {name: wandb.Image(Image.open(io.BytesIO(png))) for name, png in pictures.items()}
            self._run.log(images, step=step)

    def write(self, step: int, texts: Sequence[WrittenText]) -> None:
        import wandb

        if step >= self._first_step:
            table = wandb.Table(["step", *WrittenText._fields], [[step, *text] for text in texts])
            self._run.log({"texts": table}, step=step)

    def state(self) -> dict[str, Any]:
        return {"run_id": self._run_id}

    def alert(self, title: str, text: str) -> None:
        # Of several with one title within a minute W&B sends the first.
        self._run.alert(title=title, text=text, level="WARN")

    def keep(self, step: int, checkpoint: Path) -> None:
        import wandb

        if self._keeps:
            artifact = wandb.Artifact(f"checkpoint-{self._run_id}", type="model", metadata={"step": step})
            artifact.add_dir(str(checkpoint))
            self._run.log_artifact(artifact, aliases=["latest", checkpoint.name])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def last_logged_step(run_dir: Path, run_id: str) -> int:
    """Return the last step in the local logs of W&B run `run_id` under `run_dir`; -1 if there is none."""
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2  # its classes are created at run time
    last = -1
    for path in run_dir.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb"):
        for content in _log_records(path):
            try:
                record = protocol.Record.FromString(content)
            except Exception:  # DecodeError of protobuf, whose module depends on its version
                break
            if record.WhichOneof("record_type") == "history":
                last = max(last, record.history.step.num)
    return last


def _init(
    config: WandbConfig, run_dir: Path, run_name: str, resolved_config: dict[str, Any], run_id: str | None
) -> Any:
    import wandb

    sys.argv = [without_credentials(word) for word in sys.argv]  # W&B uploads them
    # W&B would run git, and git the programs that a repository's own settings name.
    settings = wandb.Settings(disable_git=True, git_commit=head_commit(), save_code=False)

    def init(mode: Any) -> Any:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            name=run_name,
            group=config.group,
            tags=list(config.tags),
            notes=config.notes,
            config=resolved_config,
            allow_val_change=True,
            dir=str(run_dir),
            id=run_id,
            resume="allow" if run_id else None,
            mode=mode,
            settings=settings,
        )

    try:
        return init(config.mode)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        text = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            Problem("track.wandb", text, "", "correct it, or give track.wandb.mode=offline")
        ) from error
    except wandb.errors.CommError as error:
        logger.warning(
            "track.wandb cannot reach the server, the run is kept offline: %s", str(error).splitlines()[0]
        )
        return init("offline")


_BLOCK_BYTES = 32768
_LONGEST_RECORD = 64 << 20
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _log_records(path: Path) -> Iterator[bytes]:
    """Yield the complete records of a .wandb file, up to an incomplete end: LevelDB's log format after 7
    bytes of W&B's own (github.com/google/leveldb/blob/main/doc/log_format.md).

    Read here because wandb has no reader in Python in all versions: 0.19 has wandb.sdk.internal.datastore,
    0.31 has none.
    """
    with open(path, "rb", opener=open_regular) as file:
        block = file.read(_BLOCK_BYTES)
        position, parts = 7, b""
        while block:
            while position + _HEADER.size <= len(block):
                _, length, kind = _HEADER.unpack_from(block, position)
                position += _HEADER.size
                content = block[position : position + length]
                if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(content) < length:
                    return
                position += length
                parts = content if kind in (_FULL, _FIRST) else parts + content
                if len(parts) > _LONGEST_RECORD:
                    return
                if kind in (_FULL, _LAST):
                    yield parts
            block, position = file.read(_BLOCK_BYTES), 0
