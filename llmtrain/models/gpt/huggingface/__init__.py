"""The architectures of transformers that GPT reads and writes."""

from __future__ import annotations

from llmtrain.models.gpt.huggingface import gemma, gpt2, llama, olmo, phi3

FORMS = (
    gpt2.GPT2,
    llama.LLAMA,
    llama.MISTRAL,
    llama.MINISTRAL,
    llama.QWEN2,
    llama.QWEN3,
    llama.SMOLLM3,
    phi3.PHI3,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gemma.GEMMA3_WITH_IMAGES,
    olmo.OLMO2,
    olmo.OLMO3,
)
"""A model is exported as the first architecture that fits."""
