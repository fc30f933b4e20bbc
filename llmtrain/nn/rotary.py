"""Rotary positions (RoFormer, arXiv:2104.09864): rotate each pair of a head's dims by an angle proportional
to the token's position.

Dim names: B batch, T sequence, N heads, H head width, R rotated dims.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmtrain.nn.documents import Documents
from llmtrain.nn.layer_config import LayerConfig
from llmtrain.nn.rope_config import RopeScaling


def rotary_tables(
    config: LayerConfig, positions_BT: Tensor, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each position's angles, times the attention factor, (B, T, 1, R/2) fp32.

    documents: the documents that positions count in; None: a row is one, up to its largest position.
    """
    scaling = config.rope_scaling
    lengths_BT = None
    if scaling is not None and scaling.depends_on_length:
        lengths_BT = _lengths(positions_BT, documents)[..., None, None]
    frequencies = rotary_frequencies(
        config.rotary_width, config.rope_theta, scaling, positions_BT.device, lengths_BT
    )
    angles = positions_BT[:, :, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    factor = 1.0 if scaling is None else attention_factor(scaling)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + R/2) of the first R dims by its angle: Llama's half-split pairing, as
    stored by Hugging Face."""
    half = cos.shape[-1]
    first, second, rest = x_BTNH.split((half, half, x_BTNH.shape[-1] - 2 * half), dim=-1)
    cos, sin = cos.to(x_BTNH.dtype), sin.to(x_BTNH.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rotary_frequencies(
    width: int,
    theta: float,
    scaling: RopeScaling | None,
    device: torch.device | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return the angle per position, in radians, for each pair of `width` dims: (R/2,) fp32, or with a last
    dim of R/2 after the dims of `lengths`.

    lengths: tokens of the texts that positions belong to, with a last dim of 1, for kinds of scaling that
        depend on them. None: within the original context.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    if scaling is not None and scaling.kind == "dynamic" and lengths is not None:
        original, factor = scaling.original_max_sequence_length, scaling.factor
        longer = factor * lengths.clamp(min=original) / original - (factor - 1)
        return 1.0 / (theta * longer ** (width / (width - 2))) ** exponents
    frequencies = 1.0 / theta**exponents
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        short, long = (
            frequencies / torch.tensor(factors, device=device)
            for factors in (scaling.short_factors, scaling.long_factors)
        )
        is_long = None if lengths is None else lengths > scaling.original_max_sequence_length
        return short if is_long is None else torch.where(is_long, long, short)
    if scaling.kind == "yarn":
        kept = _kept_by_yarn(width, theta, scaling, frequencies.device)
    else:
        kept = _kept_by_llama3(frequencies, scaling)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def attention_factor(scaling: RopeScaling) -> float:
    """Return the factor of queries and keys."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        return yarn_attention_factor(scaling.factor)
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_sequence_length))
    return 1.0


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """Return YaRN's factor, equation 22; `scale` is mscale in DeepSeek."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _kept_by_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return 1 for wavelengths well inside the original context, which stay unscaled, 0 for those beyond
    it, and a linear transition between, by their rotations within it."""
    turns = scaling.original_max_sequence_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return ((turns - low) / (high - low)).clamp(0.0, 1.0)


def _kept_by_yarn(width: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """Return the same as for llama3, but with a transition linear in the pair index (YaRN, section 3.2)."""

    def pair(turns: float) -> float:
        """Return the fractional pair index whose wavelength makes `turns` rotations within the original
        context."""
        wavelength = scaling.original_max_sequence_length / turns
        return width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    return 1.0 - ((pairs - first) / ((last - first) or 0.001)).clamp(0.0, 1.0)


def _lengths(positions_BT: Tensor, documents: Documents | None) -> Tensor:
    """Return the tokens up to the last of each token's document, (B, T), or (B, 1) if a row is one."""
    if documents is None:
        return positions_BT.amax(1, keepdim=True) + 1
    ends_BT = documents.ends
    return positions_BT.expand_as(ends_BT).gather(1, ends_BT - 1) + 1
