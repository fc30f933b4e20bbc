"""Memory of a GPT on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.nn.memory import LayersMemory


class GPTMemory(LayersMemory[GPTConfig]):
    """Causal attention over this rank's tokens of a sequence-parallel group."""

    causal = True

    @property
    def has_softcap(self) -> bool:
        return self.model.logit_softcap is not None
