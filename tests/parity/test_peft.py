"""PEFT folders, in and out: the same logits and gradients as peft, and the same model merged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtrain.commands import export, import_
from llmtrain.errors import UserError
from llmtrain.interchange.trained import load_trained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SIZE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BERT = {**SIZE, "intermediate_size": 48, "max_position_embeddings": 64, "num_labels": 3}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
        {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "use_rslora": True},
    ),
    "Llama, all": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
        {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"o_proj": 5}},
    ),
    "GPT-2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "Phi-3": (
        lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA, pad_token_id=0)),
        {"target_modules": ["qkv_proj", "gate_up_proj"]},
    ),
    "BERT": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
}


def made(case: str, folder: Path) -> Any:
    """→ a model of peft, saved as folder/peft over folder/base."""
    build, keys = CASES[case]
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder / "peft")
    return adapted.eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))


def ours(path: Path) -> Any:
    return load_trained(path).build(torch.device("cpu"))


def outputs(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Of a model of ours."""
    if model.config.task is None:
        return model(tokens_BT)  # type: ignore[no-any-return]
    lengths_B = torch.full((len(tokens_BT),), tokens_BT.shape[1])
    return model(tokens_BT, lengths_B=lengths_B)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_same_logits_both_ways(case: str, tmp_path: Path) -> None:
    reference = made(case, tmp_path)
    plain = type(reference.get_base_model()).from_pretrained
    tokens_BT = tokens()
    wanted = reference(tokens_BT).logits.detach()
    import_.run({"source": tmp_path / "peft", "base": tmp_path / "base", "output": tmp_path / "ours"})
    model = ours(tmp_path / "ours")
    assert torch.allclose(outputs(model, tokens_BT), wanted, atol=1e-5)

    export.run({"checkpoint": tmp_path / "ours", "output": tmp_path / "merged", "form": "merged"})
    merged = plain(tmp_path / "merged").eval()
    assert torch.allclose(merged(tokens_BT).logits, wanted, rtol=1e-5, atol=1e-6)

    export.run({"checkpoint": tmp_path / "ours", "output": tmp_path / "again", "form": "peft"})
    said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(plain(tmp_path / "base"), tmp_path / "again").eval()
    assert torch.allclose(again(tokens_BT).logits, wanted, atol=1e-5)


VIRTUAL = {
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(VIRTUAL))
@pytest.mark.parametrize("form", ["Llama", "GPT-2"])
def test_virtual_tokens(kind: str, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CASES[form][0]()
    model.save_pretrained(tmp_path / "base")
    reference = peft.get_peft_model(model, VIRTUAL[kind]())
    for parameter in reference.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    reference.save_pretrained(tmp_path / "peft")
    tokens_BT = tokens()
    wanted = reference.eval()(tokens_BT).logits.detach()[:, -tokens_BT.shape[1] :]
    import_.run({"source": tmp_path / "peft", "base": tmp_path / "base", "output": tmp_path / "ours"})
    module = ours(tmp_path / "ours")
    assert torch.allclose(module(tokens_BT), wanted, atol=1e-5)
    cache = module.new_cache(64)  # generation: at first several tokens, then one by one
    found = [module(part, cache=cache) for part in tokens_BT.split([12, 1, 7], dim=1)]
    assert torch.allclose(torch.cat(found, dim=1), wanted, atol=1e-5)
    export.run({"checkpoint": tmp_path / "ours", "output": tmp_path / "again", "form": "peft"})
    plain = type(model).from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()
    assert torch.allclose(again(tokens_BT).logits[:, -tokens_BT.shape[1] :], wanted, atol=1e-5)


@pytest.mark.slow
def test_same_gradients(tmp_path: Path) -> None:
    reference = made("Llama", tmp_path)
    import_.run({"source": tmp_path / "peft", "base": tmp_path / "base", "output": tmp_path / "ours"})
    model, tokens_BT = ours(tmp_path / "ours"), tokens()
    reference(tokens_BT, labels=tokens_BT).loss.backward()
    labels_BT = torch.nn.functional.pad(tokens_BT[:, 1:], (0, 1), value=-100)
    (model(tokens_BT, labels_BT=labels_BT) / (labels_BT != -100).sum()).backward()
    theirs = dict(reference.named_parameters())
    layer = "base_model.model.model.layers.1"
    qkv = model.get_submodule("blocks.1.attention.qkv.lora")
    scale = model.config.adaptation.scale / (12 / 4**0.5)  # ours folds theirs into B
    for number, part in enumerate(("q_proj", "v_proj")):
        wanted = theirs[f"{layer}.self_attn.{part}.lora_A.default.weight"].grad
        assert torch.allclose(qkv.a.grad[4 * number : 4 * number + 4], wanted, atol=1e-6)
    up = model.get_submodule("blocks.1.mlp.up.lora")
    wanted = theirs[f"{layer}.mlp.up_proj.lora_B.default.weight"].grad
    assert wanted.abs().max() > 1e-4
    assert torch.allclose(up.b.grad, wanted * scale, atol=1e-6)


def refusal(**keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        import_.run(keys)
    return str(caught.value)


@pytest.mark.slow
def test_refusals(tmp_path: Path) -> None:
    made("Llama", tmp_path)
    where = {"source": tmp_path / "peft", "output": tmp_path / "ours"}
    other = tmp_path / "other"
    made("GPT-2", other)
    assert "a matrix that the base does not have" in refusal(**where, base=other / "base")
    assert "no Hugging Face folder" in refusal(**where, base=tmp_path)
    wider = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "hidden_size": 64}))
    wider.save_pretrained(tmp_path / "wider")
    assert "give the base that it was trained over" in refusal(**where, base=tmp_path / "wider")
    path = tmp_path / "peft" / "adapter_config.json"
    said = json.loads(path.read_text())
    for key, value, got in [
        ("peft_type", "IA3", "'IA3'"),
        ("use_dora", True, "use_dora"),
        ("bias", "all", "bias"),
        ("alpha_pattern", {r".*\.q_proj": 3}, "regular expressions"),
        ("base_model_name_or_path", "someone/something", "nothing, over someone/something"),
    ]:
        path.write_text(json.dumps({**said, key: value}))
        base = {} if key == "base_model_name_or_path" else {"base": tmp_path / "base"}
        assert got in refusal(**where, **base)
    assert not (tmp_path / "ours").exists()
