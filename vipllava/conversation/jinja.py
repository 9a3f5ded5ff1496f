"""Chat templates as Jinja, so that they travel with a checkpoint into other engines.

A message's content is a text, or a list of ``{"type": "image"}`` and ``{"type": "text", "text":
...}``, as engines pass it. What is rendered equals :meth:`ChatTemplate.render`; a system message
of the caller's replaces the template's own text.
"""

from __future__ import annotations

import json
from typing import Final

from vipllava.conversation.templates import IMAGE_PLACEHOLDER, SYSTEM_TEXTS, ChatTemplate

_TEXT_OF: Final = """\
{%- macro text_of(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'text' -%}{{ item['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""


def jinja_template(template: ChatTemplate, *, bos: str = "", after_image: str = "") -> str:
    """Return the Jinja of a template.

    Args:
        template: what to write down.
        bos: said first, where the template spells no beginning itself: engines tokenize a rendered
            chat without adding one.
        after_image: said right behind the picture's token; a space makes some tokenizers give the
            ids that a checkpoint was trained with, see
            :func:`vipllava.checkpoints.processor.build_processor`.
    """
    image = _quote(IMAGE_PLACEHOLDER + after_image + template.image_suffix)
    user_text = "" if template.drops_user_text else "{{- text_of(message) -}}\n"
    lines = [
        _TEXT_OF,
        _say(template.bos or bos),
        "{%- if messages[0]['role'] == 'system' -%}\n",
    ]
    own = next((text for text in SYSTEM_TEXTS if text in template.system), None)
    if own is None:
        lines.append("{{- raise_exception('this chat template has no system message') -}}\n")
    else:
        before, _, behind = template.system.partition(own)
        lines += [_say(before), "{{- text_of(messages[0]) -}}\n", _say(behind)]
        lines.append("{%- set turns = messages[1:] -%}\n")
    lines += [
        "{%- else -%}\n",
        _say(template.system),
        "{%- set turns = messages -%}\n{%- endif -%}\n",
        "{%- for message in turns -%}\n",
        "{%- if message['role'] == 'user' -%}\n",
        f"{{{{- {_quote(template.user_prefix)} if loop.first else "
        f"{_quote(template.user_prefix_later)} -}}}}\n",
        _say(template.user_lead),
        "{%- if message['content'] is not string -%}\n",
        "{%- for item in message['content'] if item['type'] == 'image' -%}\n",
        "{%- if not loop.first -%}\n{{- raise_exception('one picture a turn') -}}\n{%- endif -%}\n",
        f"{{{{- {image} -}}}}\n",
        "{%- endfor -%}\n{%- endif -%}\n",
        user_text,
        _say(template.user_end),
        "{%- elif message['role'] == 'assistant' -%}\n",
        _say(template.assistant_prefix + template.assistant_lead),
        "{{- text_of(message) -}}\n",
        _say(template.assistant_end + template.after_assistant),
        "{%- else -%}\n",
        "{{- raise_exception('unknown role ' ~ message['role']) -}}\n",
        "{%- endif -%}\n{%- endfor -%}\n",
        "{%- if add_generation_prompt -%}\n",
        _say(template.assistant_prefix),
        "{%- endif -%}",
    ]
    return "".join(lines)


def _say(text: str) -> str:
    return f"{{{{- {_quote(text)} -}}}}\n" if text else ""


def _quote(text: str) -> str:
    return json.dumps(text)
