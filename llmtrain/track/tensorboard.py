"""Tracker that writes TensorBoard event files. On resume, TensorBoard hides later steps of the killed run
(purge_step)."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.track.base import Metrics, WrittenText
from llmtrain.track.config import TensorBoardConfig


class TensorBoardTracker:
    """Writes metrics as scalars under their names, and the config of the run as text."""

    def __init__(
        self,
        config: TensorBoardConfig,
        folder: Path,
        resolved_config: dict[str, Any],
        resume_step: int | None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(folder),
            purge_step=0 if resume_step is None else resume_step + 1,
            flush_secs=config.flush_seconds,
        )
        if resume_step is None:
            text = json.dumps(resolved_config, indent=2, default=str)
            self._writer.add_text("config", _verbatim(text), 0)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        import numpy as np
        from PIL import Image

        for name, png in pictures.items():
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def write(self, step: int, texts: Sequence[WrittenText]) -> None:
        parts = (
            f"beginning\n\n{_verbatim(beginning)}\n\ncontinuation\n\n{_verbatim(continuation)}"
            for beginning, continuation in texts
        )
        self._writer.add_text("texts", "\n\n---\n\n".join(parts), step)

    def state(self) -> dict[str, Any]:
        # Metrics up to a checkpoint must be on disk, as a resumed run does not repeat these steps.
        self._writer.flush()
        return {}

    def alert(self, title: str, text: str) -> None:
        """Do nothing: no one is there to be told."""

    def keep(self, step: int, checkpoint: Path) -> None:
        """Do nothing: checkpoints lie in the run folder."""

    def close(self, failed: bool) -> None:
        self._writer.close()


def _verbatim(text: str) -> str:
    """Return the text as a block that Markdown leaves as it is."""
    return "\n".join("    " + line for line in text.splitlines())
