"""Write the families' chat templates, by which a vLLM server makes a family's exact prompts from any messages.

python scripts/chat_templates.py
"""

from __future__ import annotations

import json

from colqwen3_retrievers.engines.vllm.serving import CHAT_TEMPLATES
from colqwen3_retrievers.models.families import FAMILIES, Family


def chat_template(family: Family) -> str:
    """Write the Jinja chat template of a family.

    A message's text that already holds an image or video placeholder is a whole prompt and taken as it stands: that is
    how our client sends what it has rendered. Otherwise an image becomes the family's image document, with any text
    beside it, a video its video document, and text alone a query, or a text document in the role ``document``.

    Args:
        family: whose prompts.

    Returns:
        The template; ASCII, ends in a line break that Jinja drops.

    >>> "Describe the image." in chat_template(FAMILIES["tomoro"])
    True
    """
    before, after = family.image.replace("{visual}", "{image}").split("{text}")
    strip = " | trim" if family.strip else ""
    image = f"{_literal(before, '{image}', 'image')} ~ beside ~ {json.dumps(after)}"
    lines = [
        f"{{#- {family.name}: written by scripts/chat_templates.py; change the family's row, not this file. -#}}",
        '{%- set image = "<|vision_start|><|image_pad|><|vision_end|>" -%}',
        '{%- set video = "<|vision_start|><|video_pad|><|vision_end|>" -%}',
        '{%- set found = namespace(text="", images=0, videos=0, role="user") -%}',
        "{%- for message in messages -%}",
        '{%- set found.role = message["role"] -%}',
        '{%- if message["content"] is string -%}',
        '{%- set found.text = found.text ~ message["content"] -%}',
        "{%- else -%}",
        '{%- for part in message["content"] -%}',
        '{%- if part["type"] == "text" -%}{%- set found.text = found.text ~ part["text"] -%}',
        '{%- elif part["type"] == "video" -%}{%- set found.videos = found.videos + 1 -%}',
        "{%- else -%}{%- set found.images = found.images + 1 -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f'{{%- set beside = ({json.dumps(family.beside)} ~ found.text | trim) if found.text | trim else "" -%}}',
        '{%- if "<|image_pad|>" in found.text or "<|video_pad|>" in found.text -%}',
        "{{- found.text -}}",
        "{%- elif found.videos -%}",
        _video_branch(family),
        "{%- elif found.images -%}",
        f"{{{{- {image} -}}}}",
        '{%- elif found.role == "document" -%}',
        f"{{{{- {_text(family.text, strip)} -}}}}",
        "{%- else -%}",
        f"{{{{- {_text(family.query, strip)} -}}}}",
        "{%- endif -%}",
    ]
    return "\n".join(lines) + "\n"


def _video_branch(family: Family) -> str:
    if family.video is None:
        return f'{{{{- raise_exception("family {family.name} has no prompt for videos") -}}}}'
    before, after = family.video.replace("{visual}", "{video}").split("{text}")
    return f"{{{{- {_literal(before, '{video}', 'video')} ~ beside ~ {json.dumps(after)} -}}}}"


def _literal(text: str, mark: str, variable: str) -> str:
    before, after = text.split(mark)
    return f"{json.dumps(before)} ~ {variable} ~ {json.dumps(after)}"


def _text(template: str, strip: str) -> str:
    before, after = template.split("{text}")
    return f"{json.dumps(before)} ~ (found.text{strip}) ~ {json.dumps(after)}"


def main() -> None:
    """Write one file a family."""
    for family in FAMILIES.values():
        (CHAT_TEMPLATES / f"{family.name}.jinja").write_text(chat_template(family), encoding="utf-8")


if __name__ == "__main__":
    main()
