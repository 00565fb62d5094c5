"""Write the command lines of docs/serving.md anew: what ``colqwen3 serve`` prints for one model of each family.

python scripts/serving_commands.py
"""

from __future__ import annotations

from pathlib import Path

from colqwen3_retrievers.engines.vllm.serving import CHAT_TEMPLATES, serve_command, show_command
from colqwen3_retrievers.models.families import FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
START = "<!-- commands: written by scripts/serving_commands.py; a test compares them -->\n"
STOP = "<!-- end of commands -->"


def command_lines() -> str:
    """Give the section: a command for the first model of each family.

    >>> command_lines().count("vllm serve ")
    5
    """
    parts = []
    for family in FAMILIES.values():
        shown = show_command(serve_command(family.models[0])).replace(str(CHAT_TEMPLATES), "$TEMPLATES")
        parts.append(f"### {family.name}\n\n```\n{shown}\n```\n")
    return "\n" + "\n".join(parts) + "\n"


def main() -> None:
    """Replace what stands between the two marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(STOP)[1]
    PAGE.write_text(f"{before}{START}{command_lines()}{STOP}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
