"""Chat templates in the styles of families that have one, with `[[` and `]]` around what the model writes.

With these as `{% generation %}` a template says itself what is trained; without them that has to be found.
"""

# ruff: noqa: E501 - line ends mean something in a template
from __future__ import annotations

from typing import NamedTuple


class Style(NamedTuple):
    source: str
    tokens: tuple[str, ...]
    """What its tokenizer matches whole, besides <s> and </s>."""
    thinks: bool = False
    """Whether it has a place of its own for what stands in <think>."""

    @property
    def plain(self) -> str:
        return self.source.replace("[[", "").replace("]]", "")

    @property
    def marked(self) -> str:
        return self.source.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")


IM = ("<|im_start|>", "<|im_end|>")
_TURN = r"""{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}
[[{{ m['content'] + '<|im_end|>' }}]]{% else %}
{{ m['content'] + '<|im_end|>' }}{% endif %}
{{ '\n' }}{% endfor %}
"""
_ALTERNATE = r"""{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}
"""

STYLES = {
    "chatml": Style(_TURN + r"""{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""", IM),
    "chatml without a prompt": Style(_TURN, IM),
    "chatml with a default system message": Style(
        r"""{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}
"""
        + _TURN
        + r"""{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
        IM,
    ),
    "chatml over another vocabulary": Style(
        _TURN + r"""{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""", ()
    ),
    "llama 2": Style(
        r"""{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{% for m in rest %}"""
        + _ALTERNATE
        + r"""{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}{% if loop.first and system %}
{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}
{{ m['content'].strip() + ' [/INST]' }}{% else %}[[{{ ' ' + m['content'].strip() + ' ' + eos_token }}]]{% endif %}
{% endfor %}""",
        (),
    ),
    "llama 3": Style(
        r"""{{ bos_token }}{% for m in messages %}
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['role'] == 'assistant' %}
[[{{ m['content'] | trim + '<|eot_id|>' }}]]{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Style(
        r"""{% if messages[0].role == 'system' %}{% set system = messages[0].content %}
{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{{ bos_token }}{% for m in rest %}"""
        + _ALTERNATE
        + r"""{% if m.role == 'user' and loop.last and system is defined %}
{{ '[INST]' + system + '\n\n' + m.content + '[/INST]' }}{% elif m.role == 'user' %}
{{ '[INST]' + m.content + '[/INST]' }}{% else %}[[{{ ' ' + m.content + eos_token }}]]{% endif %}
{% endfor %}""",
        ("[INST]", "[/INST]"),
    ),
    "gemma": Style(
        r"""{{ bos_token }}{% if messages[0].role == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}"""
        + _ALTERNATE
        + r"""{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}[[{{ m.content | trim + '<end_of_turn>' }}]]
{{- '\n' }}{% else %}
{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "qwen 3": Style(
        r"""{% set ns = namespace(last=0) %}{% for m in messages %}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}
{% set thought = '' %}{% set content = m.content %}
{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}
{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{% if m.reasoning_content %}{% set thought = m.reasoning_content.strip() %}{% endif %}
[[{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{ content + '<|im_end|>' }}]]{% else %}{{ m.content + '<|im_end|>' }}{% endif %}
{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
        (*IM, "<think>", "</think>"),
        thinks=True,
    ),
    "qwen 3.5, not thinking": Style(
        r"""{% set ns = namespace(last=0) %}{% for m in messages %}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}
{% set thought = '' %}{% set content = m.content %}
{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}
{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{% if loop.index0 > ns.last %}{{ '<think>\n' }}{% if thought %}[[{{ thought + '\n</think>\n\n' }}]]{% else %}
{{ '\n</think>\n\n' }}{% endif %}{% endif %}
[[{{ content + '<|im_end|>' }}]]{% else %}{{ m.content + '<|im_end|>' }}{% endif %}
{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}""",
        (*IM, "<think>", "</think>"),
        thinks=True,
    ),
    "phi 3": Style(
        r"""{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}
[[{{ m.content + '<|end|>' }}]]{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "deepseek": Style(
        r"""{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}
{{ '<｜User｜>' + m.content }}{% else %}
{{ '<｜Assistant｜>' }}[[{{ m.content.split('</think>')[-1] + eos_token }}]]{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}""",
        ("<｜User｜>", "<｜Assistant｜>"),
        thinks=True,
    ),
    "gpt-oss": Style(
        r"""{{ '<|start|>system<|message|>Reasoning: medium<|end|>' }}{% for m in messages %}
{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}[[{{ '<|channel|>final<|message|>' + m.content }}
{%- if loop.last and not add_generation_prompt %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}]]{% else %}
{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}""",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
    ),
    "glm": Style(
        r"""{{ '[gMASK]<sop>' }}{% for m in messages %}
{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}[[{{ m.content }}]]
{%- elif not loop.first and messages[loop.index0 - 1].role == 'assistant' %}
[[{{ '<|' + m.role + '|>' }}]]{{ '\n' + m.content }}{% else %}
{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "falcon": Style(
        r"""{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}
[[{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}]]{% else %}{{ m.content }}{% endif %}
{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}""",
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "command": Style(
        r"""{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{ '<|START_OF_TURN|><|CHATBOT|>' }}[[{{ '<|START_RESPONSE|>' + m.content }}
{{- '<|END_RESPONSE|><|END_OF_TURN|>' }}]]{% else %}
{{ '<|START_OF_TURN|>' + m.role + m.content + '<|END_OF_TURN|>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|START_OF_TURN|><|CHATBOT|>' }}{% endif %}""",
        ("<|START_OF_TURN|>", "<|CHATBOT|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|END_OF_TURN|>"),
    ),
    "parts": Style(
        r"""{% for m in messages %}{{ m.role | upper + ': ' }}{% for part in m.content %}
{% if part.type == 'text' %}{% if m.role == 'assistant' %}[[{{ part.text + eos_token }}]]{% else %}
{{ part.text }}{% endif %}{% endif %}{% endfor %}
{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}""",
        (),
    ),
    "vicuna": Style(
        r"""{{ 'A chat with an assistant. ' }}{% for m in messages %}{% if m.role == 'user' %}
{{ 'USER: ' + m.content + ' ' }}{% elif m.role == 'assistant' %}
{{ 'ASSISTANT:' }}[[{{ ' ' + m.content + eos_token }}]]{% else %}{{ m.content + ' ' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
        (),
    ),
}  # fmt: skip


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = {
    "one answer": [message("user", "How many men are in it?"), message("assistant", "Two men, and a dog.")],
    "system and turns": [
        message("system", "You tell of films."),
        message("user", " Is it old?\n"),
        message("assistant", "It is. "),
        message("user", "Is it old?"),
        message("assistant", "It is."),
    ],
    "what repeats": [
        message("user", "assistant\n<b>It is.</b> user"),
        message("assistant", "<b>It is.</b>\n\nuser\nassistant: it is"),
        message("user", "für 東京 👩‍👧 é"),
        message("assistant", "東京 👩‍👧 cafés\n\n\n"),
        message("user", "It is."),
        message("assistant", " It is.\n"),
    ],
    "white space": [message("user", "a"), message("assistant", "\n\n  def f():\n\treturn 1\n")],
    "thoughts": [
        message("user", "Is it?"),
        message("assistant", "<think>\nPerhaps.\n</think>\n\nYes."),
        message("user", "Sure?"),
        message("assistant", "<think>\nI said so.\n</think>\n\nSure."),
    ],
    "a question at the end": [message("user", "a"), message("assistant", "b"), message("user", "c")],
}
