"""The architectures of transformers that can be imported and exported."""

from __future__ import annotations

from typing import Any

from llmtrain.errors import ConfigError, Problem
from llmtrain.models.bert import huggingface as bert
from llmtrain.models.encoder_decoder import huggingface as seq2seq
from llmtrain.models.gpt.huggingface import gemma, gpt2, llama, olmo, phi3
from llmtrain.models.huggingface.form import Form
from llmtrain.models.xlnet import huggingface as xlnet

FORMS: dict[str, Form] = {
    form.model_type: form
    for form in (
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
        bert.BERT,
        bert.ROBERTA,
        xlnet.XLNET,
        seq2seq.T5,
        seq2seq.BART,
    )
}
"""model_type of config.json → form. A model is exported in the first form that it fits."""


def form_of(config: Any, came_from: str | None = None) -> Form:
    """Return the form that computes the same as a model of this config.

    came_from: model_type of the folder that the model was imported from; preferred if it still fits.
    Raise ConfigError that names the keys that prevent an export.
    """
    misfits = {
        name: form.misfits(config)
        for name, form in FORMS.items()
        if isinstance(config, form.config) and form.part is None
    }
    fitting = [name for name, keys in misfits.items() if not keys]
    if fitting:
        return FORMS[came_from if came_from in fitting else fitting[0]]
    elsewhere = "such a model can be trained and used here, not exported"
    if not misfits:
        families = sorted({form.config().family for form in FORMS.values()})
        raise ConfigError(
            Problem("checkpoint", f"a model of family {config.family}", ", ".join(families), elsewhere)
        )
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    got = ", ".join(f"{key}={getattr(config, key)}" for key in misfits[nearest])
    allowed = ", ".join(f"{key}={has}" for key, has in misfits[nearest].items())
    raise ConfigError(
        Problem(
            "model",
            f"{got}: a form that transformers has not",
            allowed,
            f"the nearest is {nearest}; {elsewhere}",
        )
    )
