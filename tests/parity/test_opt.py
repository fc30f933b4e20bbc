"""OPT's form (arXiv:2205.01068) as presets build it, against transformers with the same weights."""

from __future__ import annotations

import torch
from transformers import OPTConfig, OPTForCausalLM

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT

D, N, L, V, T = 32, 4, 2, 96, 24
LINEAR = {"attention.output": "self_attn.out_proj", "mlp.up": "fc1", "mlp.down": "fc2"}
NORMS = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}


def test_logits() -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "ffn_dim": 4 * D,
    }
    theirs = OPTForCausalLM(
        OPTConfig(**sizes, word_embed_proj_dim=D, max_position_embeddings=T, dropout=0.0, init_std=0.2)
    ).eval()
    config = GPTConfig(
        vocab_size=V,
        max_sequence_length=T,
        position_offset=2,
        hidden_size=D,
        num_layers=L,
        num_heads=N,
        activation="relu",
    )
    given = {name.removeprefix("model.decoder."): value for name, value in theirs.state_dict().items()}
    ours = GPT(config)
    weights = {
        "embedding.weight": given["embed_tokens.weight"],
        "head.weight": given["embed_tokens.weight"],
        "positions.weight": given["embed_positions.weight"],
    }
    for part in ("weight", "bias"):
        weights[f"norm.{part}"] = given[f"final_layer_norm.{part}"]
        for i in range(L):
            for own, other in (LINEAR | NORMS).items():
                weights[f"blocks.{i}.{own}.{part}"] = given[f"layers.{i}.{other}.{part}"]
            # Rows by head: its query, its key, its value.
            qkv = [given[f"layers.{i}.self_attn.{kind}_proj.{part}"].unflatten(0, (N, -1)) for kind in "qkv"]
            weights[f"blocks.{i}.attention.qkv.{part}"] = torch.stack(qkv, 1).flatten(0, 2)
    ours.load_state_dict(weights)
    tokens = torch.randint(V, (2, T))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
