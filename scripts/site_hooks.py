"""What mkdocs does besides (mkdocs.yml): the pages that stand at the repository's root, and nothing from elsewhere.

Links are written as GitHub follows them; those that leave docs/ are rewritten for the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # file: page
# What a browser would fetch by itself; links that a reader follows may lead anywhere.
FETCHED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


def on_files(files: Any, config: Any) -> Any:
    for name, page in FROM_ROOT.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](").replace("](README.md", "](index.md")
        for other, target in FROM_ROOT.items():
            text = text.replace(f"]({other}", f"]({target}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    for name, target in (*FROM_ROOT.items(), ("README.md", "index.md")):
        markdown = re.sub(rf"\]\(((?:\.\./)*)\.\./{re.escape(name)}", rf"](\g<1>{target}", markdown)
    return markdown


def on_post_page(output: str, page: Any, config: Any) -> str:
    found = FETCHED.search(output)
    if found and 'rel="canonical"' not in found[0]:
        raise PluginError(f"{page.file.src_path} would load {found[1]}: the site must be readable offline.")
    return output
