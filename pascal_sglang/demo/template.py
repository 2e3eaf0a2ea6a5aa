"""The chat template of both demo models: ChatML whose generation prompt opens the thinking."""

THINK = "<think>"
END_THINK = "</think>"

# `enable_thinking=false` closes the block at once, as Qwen3's template does, so that SGLang's
# `qwen3` reasoning parser and its template detection work unchanged. Past thinking is not shown.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message.content if message.content is string else '' -%}
{%- if message.role == 'assistant' and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- else -%}
{{- '<think>\\n' -}}
{%- endif -%}
{%- endif -%}
"""
