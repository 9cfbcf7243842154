"""For the page of the Python API (mkdocs.yml): a line of a docstring that begins with a parameter's name starts a
paragraph of its own, as it does in the source."""

from __future__ import annotations

import re
from typing import Any

import griffe


class OwnParagraphs(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        source = obj.all_members.get("__init__", obj) if isinstance(obj, griffe.Class) else obj
        names = [p.name for p in getattr(source, "parameters", [])]
        lines = []
        for line in obj.docstring.value.splitlines():
            match = re.match(r"(\w+)(, \w+)*: ", line)
            if match and match[1] in names:
                lines += ["", f"`{match[0].removesuffix(': ')}`: {line[match.end() :]}"]
            else:
                lines.append(line)
        obj.docstring.value = "\n".join(lines)
