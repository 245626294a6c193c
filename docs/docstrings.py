# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Lets mkdocstrings show docstrings in Transformers' style: arguments as a list, and [`~X`] as a link to X."""

import re
from typing import Any

import griffe


class TransformersDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        objects = [found for found in walk(pkg) if found.docstring]
        links = {found.path.split(".", depth)[-1]: found.path for depth in (1, 2, 3, 4) for found in objects}
        for found in objects:
            found.docstring.value = to_markdown(found.docstring.value, links)


def walk(found: griffe.Object) -> list[griffe.Object]:
    return [found, *(child for member in found.members.values() if not member.is_alias for child in walk(member))]


def to_markdown(text: str, links: dict[str, str]) -> str:
    def link(match: re.Match[str]) -> str:
        if match[1] is None:
            return re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"\1", match[0])  # a block of code
        name = f"<code>{match[1].split('.')[-1]}</code>"
        return f'<autoref optional identifier="{links[match[1]]}">{name}</autoref>' if match[1] in links else name

    lines, section = [], ""
    text = re.sub(r",\n +(?=[\w, ]+ \(\*optional\*\):)", ", ", text)  # names of several arguments, on two lines
    for line in re.sub(r"(?s)```.*?```|\[`~?([\w.]+)`\]", link, text).splitlines():
        if heading := re.fullmatch(r"(Args|Attributes|Example|Raises|Returns|Yields):", line):
            section, line = heading[1], f"\n**{heading[1]}**\n"
        elif section in ("Args", "Attributes", "Raises") and re.match(r"    \S", line):
            group = re.fullmatch(r"    > (.+)", line)
            named = re.sub(r"^    (\w[\w, ]*)(?=[ :])", r"    **\1**", line).replace("    ", "- ", 1)
            line = f"\n*{group[1]}*\n" if group else named
        elif line.startswith("    ") and section:
            line = line[4:]
        if line.startswith("- ") and lines and lines[-1] and not lines[-1].startswith(("- ", "    ")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)
