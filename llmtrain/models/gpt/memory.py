"""Memory of a GPT on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.nn.memory import LayersMemory, vocabulary_head_bytes


class GPTMemory(LayersMemory[GPTConfig]):
    """Causal attention over this rank's tokens of a sequence-parallel group."""

    causal = True

    def head_bytes(self) -> int:
        return vocabulary_head_bytes(
            self.model,
            self.numbers,
            tokens=self.tokens,
            device=self.conditions.device,
            tensor=self.layout.tensor,
            has_softcap=self.model.logit_softcap is not None,
        )
