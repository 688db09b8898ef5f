# ruff: noqa: E501 (templates read best as they are)
"""Chat templates of the project's own writing in the formats that published models use, with their control tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """A template, the tokens that a tokenizer for it has, and why it is refused (None: it is followed)."""

    template: str
    tokens: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None
    refused: str | None = None


ALTERNATE = (
    "{% set start = 1 if messages[0].role == 'system' else 0 %}"
    "{% for m in messages[start:] %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)

STYLES = {
    "chatml": Style(
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "chatml, default system": Style(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama 2": Style(
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% set sys = none %}{% endif %}"
        "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
        "{% endif %}{% if loop.first and sys is not none %}{% set text = '<<SYS>>\n' ~ sys ~ '\n<</SYS>>\n\n' ~ m.content %}"
        "{% else %}{% set text = m.content %}{% endif %}{% if m.role == 'user' %}"
        "{{ bos_token ~ '[INST] ' ~ text | trim ~ ' [/INST]' }}{% else %}{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}"
        "{% endif %}{% endfor %}",
        ("<s>", "</s>"), "<s>", "</s>",
    ),
    "llama 3": Style(
        "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
        " + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>", "<|eot_id|>",
    ),
    "llama 3.1, with the date": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}"
        "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n{{ sys }}<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>", "<|eot_id|>",
    ),
    "mistral 0.1, no system": Style(
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}",
        ("<s>", "</s>"), "<s>", "</s>",
    ),
    "mistral 0.3, system in the last user turn": Style(
        "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set sys = none %}{% set rest = messages %}{% endif %}"
        "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
        "{% for m in rest %}{% if m.role == 'user' %}{% if sys is not none and m == users[-1] %}"
        "{{ '[INST]' + ' ' + sys + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '[INST]' + ' ' + m.content + '[/INST]' }}"
        "{% endif %}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>",
    ),
    "gemma": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
        "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim"
        " + '<end_of_turn>\n' }}{% endfor %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<end_of_turn>",
    ),
    "phi 3": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{{ eos_token }}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), None, "<|endoftext|>",
    ),
    "zephyr": Style(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endfor %}",
        ("<s>", "</s>"), "<s>", "</s>",
    ),
    "vicuna": Style(
        "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{{ 'USER: ' + m.content if m.role == 'user' else ' ASSISTANT: ' + m.content + eos_token }}"
        "{% endfor %}",
        ("<s>", "</s>"), "<s>", "</s>",
    ),
    "deepseek": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<|User|>' + m.content }}{% else %}{{ '<|Assistant|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}",
        ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"), "<|begin|>", "<|end|>",
    ),
    "reasoning dropped from history": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content %}"
        "{% if '</think>' in text and not loop.last %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|Assistant|>' + text + '<|end|>' }}{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"), "<|begin|>", "<|end|>",
    ),
    "empty reasoning in front of the last answer": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last "
        "and '</think>' not in m.content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "command-r": Style(
        "{{ bos_token }}{% for m in messages %}{{ '<|START|>' + {'user': '<|USER|>', 'assistant': '<|BOT|>', "
        "'system': '<|SYSTEM|>'}[m.role] + m.content + '<|END|>' }}{% endfor %}",
        ("<bos>", "<|START|>", "<|END|>", "<|USER|>", "<|BOT|>", "<|SYSTEM|>"), "<bos>", "<|END|>",
    ),
    "granite": Style(
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
        "{% endfor %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), None, "<|end_of_text|>",
    ),
    "bos is eos": Style(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}",
        ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>",
    ),
    "openchat": Style(
        "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}"
        "{% endfor %}",
        ("<s>", "</s>", "<|end_of_turn|>"), "<s>", "<|end_of_turn|>",
    ),
    "channels, another end for the last turn": Style(
        "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    ),
    "headers in words": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '### Instruction:\n' + m.content + '\n' }}{% else %}{{ '### Response:\n' + m.content + '\n<|EOT|>\n' }}"
        "{% endif %}{% endfor %}",
        ("<bos>", "<|EOT|>"), "<bos>", "<|EOT|>",
    ),
    "the next turn ends a turn": Style(
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"), None, "<|endoftext|>",
    ),
    "only the last turn ends": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{{ eos_token }}",
        ("<|user|>", "<|assistant|>", "<|system|>", "</s>"), None, "</s>",
    ),
    "always ready for an answer": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}<|assistant|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "</s>"), None, "</s>",
        refused="with a token that opens turns",
    ),
    "contents and ends alone": Style(
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", ("<|endoftext|>",), None, "<|endoftext|>"
    ),
    "alpaca": Style(
        "{% for m in messages %}{{ '### ' + {'user': 'Instruction', 'assistant': 'Response', 'system': 'System'}[m.role]"
        " + ':\n' + m.content + '\n\n' }}{% endfor %}",
        ("</s>",), None, "</s>",
        refused="ends turn . with no control token",
    ),
    "upper case": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | upper + '<|im_end|>\n' }}{% endfor %}",
        ("<|im_start|>", "<|im_end|>"),
        refused="rewrites (the text of )?turn",
    ),
}  # fmt: skip
