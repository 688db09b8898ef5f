# ruff: noqa: E501 (templates read best as they are)
"""Chat templates with tools and reasoning, of the project's own writing after the syntax that model families document."""

CHATML_TOOLS = r"""
{%- macro system(text) %}<|im_start|>system
{{ text }}{% if tools %}{{ '\n\n' if text }}# Tools

Functions that may be called are in <tools></tools>:
<tools>{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}

</tools>

Write each call as JSON with its name and arguments in <tool_call></tool_call>.{% endif %}<|im_end|>
{% endmacro %}
{%- macro calls(message, text) %}
{%- for call in message.tool_calls or [] %}
{{- '\n' if text or not loop.first }}{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}
{%- endmacro %}
{%- macro result(message, before, after) %}
{{- '<|im_start|>user' if before != 'tool' }}{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{{- '<|im_end|>\n' if after != 'tool' }}
{%- endmacro %}
{%- macro role_at(index) %}{{ messages[index].role if 0 <= index < messages | length }}{% endmacro %}
"""

QWEN_2_5 = (
    CHATML_TOOLS
    + r"""
{%- if messages[0].role == 'system' %}{{- system(messages[0].content) }}{% else %}{{- system('You are a helpful assistant.') }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- result(message, role_at(loop.index0 - 1), role_at(loop.index0 + 1)) }}
{%- elif not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') + calls(message, message.content) + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""
)

# The reasoning of answers before the last question is left out; an answer to it has reasoning, if only an empty one.
QWEN_3 = (
    CHATML_TOOLS
    + r"""
{%- if messages[0].role == 'system' %}{{- system(messages[0].content) }}{% elif tools %}{{- system('') }}{% endif %}
{%- set ns = namespace(last_question=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}{% set ns.last_question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- result(message, role_at(loop.index0 - 1), role_at(loop.index0 + 1)) }}
{%- elif message.role == 'assistant' %}
{%- set text, reasoning = message.content or '', '' %}
{%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
{%- elif '</think>' in text %}
{%- set reasoning = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last_question and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
{%- else %}{{- text }}{% endif %}
{{- calls(message, text) + '<|im_end|>\n' }}
{%- elif not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}{{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false }}
{%- endif %}"""
)

# Declarations in the first user turn, one call a turn, results as JSON.
LLAMA_3_1 = r"""
{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- if messages[0].role == 'system' %}{% set system, rest = messages[0].content | trim, messages[1:] %}{% else %}{% set system, rest = '', messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Environment: ipython\n' if tools }}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for message in rest %}
{%- if message.role == 'user' and loop.first and tools %}
{{- '<|start_header_id|>user<|end_header_id|>\n\nAnswer with a JSON call of one of these functions, if it helps.\n\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{% endfor %}
{{- message.content | trim + '<|eot_id|>' }}
{%- elif message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
{%- elif message.role in ('tool', 'ipython') %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"""

# Declarations and system turn stand in front of the last user turn; ids have nine letters.
MISTRAL = r"""
{%- if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}{% else %}{% set system, rest = none, messages %}{% endif %}
{%- set users = namespace(last=-1) %}
{%- for message in rest %}{% if message.role == 'user' %}{% set users.last = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for message in rest %}
{%- if message.role == 'user' %}
{%- if tools and loop.index0 == users.last %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + (system + '\n\n' if system and loop.index0 == users.last else '') + message.content + '[/INST]' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}
{{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported, with the exception of an initial optional system message!') }}
{%- endif %}
{%- endfor %}"""

GEMMA_3 = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set prefix, rest = messages[0].content + '\n\n', messages[1:] %}{% else %}{% set prefix, rest = '', messages %}{% endif %}
{%- for message in rest %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + (prefix if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{{- '<start_of_turn>model\n' if add_generation_prompt }}"""

# Calls with values of their own syntax; results and the answer follow in the same model turn.
GEMMA_4 = r"""
{%- macro value(given) %}
{%- if given is string %}{{- '<|"|>' + given + '<|"|>' }}
{%- elif given is mapping %}{{- '{' }}{% for key, inner in given | dictsort %}{{- key + ':' + value(inner) }}{{- ',' if not loop.last }}{% endfor %}{{- '}' }}
{%- elif given is sequence %}{{- '[' }}{% for inner in given %}{{- value(inner) }}{{- ',' if not loop.last }}{% endfor %}{{- ']' }}
{%- else %}{{- given | tojson }}{% endif %}
{%- endmacro %}
{{- bos_token }}
{%- set ns = namespace(before='') %}
{%- if tools or messages[0].role == 'system' %}
{{- '<|turn>system\n' }}{{- messages[0].content | trim if messages[0].role == 'system' }}
{%- for tool in tools or [] %}{{- '<|tool>declaration:' + tool.function.name + value(tool.function) + '<tool|>' }}{% endfor %}
{{- '<turn|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|tool_response>response:' + message.name + '{value:' + value(message.content) + '}<tool_response|>' }}{% set ns.before = 'tool' %}
{%- elif message.role == 'assistant' %}
{{- '<|turn>model\n' if ns.before != 'tool' }}
{{- message.content | trim }}
{%- for call in message.tool_calls or [] %}{{- '<|tool_call>call:' + call.function.name + value(call.function.arguments) + '<tool_call|>' }}{% endfor %}
{%- if not message.tool_calls %}{{- '<turn|>\n' }}{% endif %}{% set ns.before = 'model' %}
{%- elif not (loop.first and message.role == 'system') %}
{{- '<|turn>' + message.role + '\n' + message.content | trim + '<turn|>\n' }}{% set ns.before = message.role %}
{%- endif %}
{%- endfor %}
{{- '<|turn>model\n' if add_generation_prompt and ns.before != 'tool' }}"""

# Arguments are strings; reasoning is left out of every turn.
DEEPSEEK = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{% endif %}
{%- if tools %}{{- '\n\n## Tools\n' }}{% for tool in tools %}{{- '\n### ' + tool.function.name + '\n' + tool.function | tojson }}{% endfor %}{% endif %}
{%- set ns = namespace(after_tool=false) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}{% set ns.after_tool = false %}
{%- elif message.role == 'assistant' %}
{{- '<｜Assistant｜>' if not ns.after_tool }}
{%- set text = message.content or '' %}
{%- if '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- text }}
{%- if message.tool_calls %}
{{- '<｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜>' }}
{%- endif %}
{{- '<｜end▁of▁sentence｜>' }}{% set ns.after_tool = false %}
{%- elif message.role == 'tool' %}
{{- '<｜tool▁outputs▁begin｜>' if not ns.after_tool }}
{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}{% set ns.after_tool = true %}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<｜tool▁outputs▁end｜>' }}{% endif %}
{%- endif %}
{%- endfor %}
{{- '<｜Assistant｜>' if add_generation_prompt and not ns.after_tool }}"""
DEEPSEEK_R1 = DEEPSEEK.replace(
    "'<｜Assistant｜>' if add_generation_prompt", "'<｜Assistant｜><think>\\n' if add_generation_prompt"
)
DEEPSEEK_TOKENS = tuple(
    f"<｜{name}｜>"
    for name in "User Assistant tool▁calls▁begin tool▁calls▁end tool▁call▁begin tool▁call▁end tool▁sep "
    "tool▁outputs▁begin tool▁outputs▁end tool▁output▁begin tool▁output▁end".split()
)

# The token of the next role ends a turn.
GLM_4 = r"""[gMASK]<sop>
{%- if tools %}
{{- '<|system|>\nFunctions that may be called:' }}
{%- for tool in tools %}{{- '\n\n## ' + tool.function.name + '\n\n' + tool.function | tojson(indent=4) }}{% endfor %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- '<|observation|>\n' + message.content }}
{%- elif message.tool_calls %}
{%- for call in message.tool_calls %}{{- '<|assistant|>' + call.function.name + '\n' + call.function.arguments | tojson }}{% endfor %}
{%- else %}{{- '<|' + message.role + '|>\n' + message.content }}
{%- endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}"""

GLM_4_5 = r"""[gMASK]<sop>
{%- if tools %}
{{- '<|system|>\n# Tools\n\n<tools>\n' }}{% for tool in tools %}{{- tool | tojson + '\n' }}{% endfor %}{{- '</tools>' }}
{%- endif %}
{%- set ns = namespace(last_question=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last_question = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|observation|>' if loop.first or messages[loop.index0 - 1].role != 'tool' }}{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- elif message.role == 'assistant' %}
{%- set text, reasoning = message.content or '', '' %}
{%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
{%- elif '</think>' in text %}
{%- set reasoning = text.split('</think>')[0].split('<think>')[-1] %}{% set text = text.split('</think>')[-1] %}
{%- endif %}
{{- '<|assistant|>\n<think>' + (reasoning.strip() if loop.index0 > ns.last_question else '') + '</think>' }}
{{- '\n' + text.strip() if text.strip() }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '\n<arg_key>' + key + '</arg_key>\n<arg_value>' }}{{- value if value is string else value | tojson }}{{- '</arg_value>' }}
{%- endfor %}
{{- '\n</tool_call>' }}
{%- endfor %}
{%- else %}{{- '<|' + message.role + '|>\n' + message.content }}
{%- endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}"""

# Channels; the reasoning in front of calls is kept until the final answer; a call and the last answer end otherwise.
GPT_OSS = r"""
{{- '<|start|>system<|message|>You are a helpful assistant.\nKnowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}{% else %}{% set system, rest = '', messages %}{% endif %}
{%- if system or tools %}
{{- '<|start|>developer<|message|>' }}{{- '# Instructions\n\n' + system if system }}
{%- if tools %}
{{- '\n\n# Tools\n\nnamespace functions {\n' }}
{%- for tool in tools %}{{- '// ' + tool.function.description + '\ntype ' + tool.function.name + ' = (_: ' + tool.function.parameters | tojson + ') => any;\n' }}{% endfor %}
{{- '} // namespace functions' }}
{%- endif %}
{{- '<|end|>' }}
{%- endif %}
{%- set ns = namespace(tool='') %}
{%- for message in rest %}
{%- if message.role == 'assistant' %}
{%- set later = namespace(final=false) %}
{%- for other in rest[loop.index:] %}{% if other.role == 'assistant' and not other.tool_calls %}{% set later.final = true %}{% endif %}{% endfor %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one tool call a message') }}{% endif %}
{%- if message.content and message.thinking %}{{ raise_exception('Cannot pass both content and thinking in an assistant message with tool calls!') }}{% endif %}
{%- set reasoning = message.thinking or message.content %}
{%- if reasoning and not later.final %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + reasoning + '<|end|>' }}{% endif %}
{%- set call = message.tool_calls[0].function %}{% set ns.tool = call.name %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' + call.arguments | tojson + '<|call|>' }}
{%- else %}
{%- if message.thinking and loop.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}
{%- endif %}
{%- elif message.role == 'tool' %}
{{- '<|start|>functions.' + ns.tool + ' to=assistant<|channel|>commentary<|message|>' + message.content | tojson + '<|end|>' }}
{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{{- '<|start|>assistant' if add_generation_prompt }}"""

# Two tokens end each answer.
COMMAND_R = r"""
{%- macro open(role) %}{{- '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' }}{% endmacro %}
{{- bos_token }}
{%- if tools or messages[0].role == 'system' %}
{{- open('SYSTEM') }}{{- messages[0].content if messages[0].role == 'system' }}
{%- if tools %}{{- '\n\n## Available Tools\n```json\n' + tools | map(attribute='function') | list | tojson(indent=4) + '\n```' }}{% endif %}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}
{%- set ns = namespace(count=0, result=0) %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{{- open('CHATBOT') }}
{%- if message.content %}{{- '<|START_THINKING|>' + message.content + '<|END_THINKING|>' }}{% endif %}
{{- '<|START_ACTION|>[' }}{% set ns.result = ns.count %}
{%- for call in message.tool_calls %}
{{- '\n    {"tool_call_id": "' ~ ns.count ~ '", "tool_name": "' + call.function.name + '", "parameters": ' + call.function.arguments | tojson + '}' }}{{- ',' if not loop.last }}{% set ns.count = ns.count + 1 %}
{%- endfor %}
{{- '\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>' }}
{%- elif message.role == 'assistant' %}{{- open('CHATBOT') + '<|START_RESPONSE|>' + message.content + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}
{%- elif message.role == 'tool' %}
{{- open('SYSTEM') + '<|START_TOOL_RESULT|>[{"tool_call_id": "' ~ ns.result ~ '", "content": ' + message.content | tojson + '}]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>' }}{% set ns.result = ns.result + 1 %}
{%- elif not (loop.first and message.role == 'system') %}{{- open(message.role | upper) + message.content + '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}
{%- endfor %}
{{- open('CHATBOT') if add_generation_prompt }}"""
COMMAND_R_TOKENS = tuple(
    f"<|{name}|>"
    for name in "START_OF_TURN_TOKEN END_OF_TURN_TOKEN USER_TOKEN CHATBOT_TOKEN SYSTEM_TOKEN START_RESPONSE END_RESPONSE "
    "START_ACTION END_ACTION START_THINKING END_THINKING START_TOOL_RESULT END_TOOL_RESULT".split()
)

GRANITE = r"""
{%- macro turn(role, text) %}{{- '<|start_of_role|>' + role + '<|end_of_role|>' + text + '<|end_of_text|>\n' }}{% endmacro %}
{%- if messages[0].role != 'system' %}{{- turn('system', 'Knowledge Cutoff Date: April 2024.\nYou are Granite, developed by IBM.') }}{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- set calls = namespace(all=[]) %}
{%- for call in message.tool_calls %}{% set calls.all = calls.all + [{'name': call.function.name, 'arguments': call.function.arguments}] %}{% endfor %}
{{- turn('assistant', (message.content or '') + '<|tool_call|>' + calls.all | tojson) }}
{%- else %}{{- turn('tool_response' if message.role == 'tool' else message.role, message.content) }}
{%- endif %}
{%- if loop.first and tools and message.role == 'system' %}{{- turn('available_tools', tools | tojson(indent=4)) }}
{%- elif loop.first and tools %}{{- turn('available_tools', tools | tojson(indent=4)) }}{% endif %}
{%- endfor %}
{{- '<|start_of_role|>assistant<|end_of_role|>' if add_generation_prompt }}"""

PHI_4_MINI = r"""
{%- if tools or messages[0].role == 'system' %}
{{- '<|system|>' }}{{- messages[0].content if messages[0].role == 'system' }}{{- '<|tool|>' + tools | tojson + '<|/tool|>' if tools }}{{- '<|end|>' }}
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- set calls = namespace(all=[]) %}
{%- for call in message.tool_calls %}{% set calls.all = calls.all + [call.function] %}{% endfor %}
{{- '<|assistant|>' + (message.content or '') + '<|tool_call|>' + calls.all | tojson + '<|/tool_call|><|end|>' }}
{%- elif message.role == 'tool' %}{{- '<|tool_response|>' + message.content + '<|end|>' }}
{%- elif not (loop.first and message.role == 'system') %}{{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt else eos_token }}"""
PHI_4 = r"""
{%- for message in messages %}{{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}{% endfor %}
{{- '<|im_start|>assistant<|im_sep|>' if add_generation_prompt }}"""
