"""MkDocs hooks: pages that are made of the code, of the notebook, and of files outside of docs/.

MkDocs calls `on_files` once and `on_page_markdown` for each page (mkdocs.yml, `hooks`).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import sparring
from sparring.cli._app import app
from sparring.study import Plan

ROOT = Path(__file__).parents[1]

# Files outside of docs/ that are pages of the site, and the names that they have there.
OUTSIDE = {"README.md": "index.md", "benchmarks/RESULTS.md": "measurements.md", "CHANGELOG.md": "changes.md"}
PLAIN = ("LICENSE", "CITATION.cff", "SECURITY.md", "CONTRIBUTING.md")  # named by links, but no pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {name: (ROOT / path).read_text(encoding="utf-8") for path, name in OUTSIDE.items()}
    made |= {f"api/{part}.md": f"# sparring.{part}\n\n::: sparring.{part}\n" for part in sparring._PARTS}
    made["tutorial.md"] = notebook(json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8")))
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for file in [*files]:
        if file.src_uri == "tutorial.ipynb":
            files.remove(file)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site, and put what is said by code where a page asks for it."""
    made = {"<!-- commands -->": commands, "<!-- plan -->": plan_tables}
    for mark, make in made.items():
        markdown = markdown.replace(mark, make()) if mark in markdown else markdown
    return linked(markdown)


def linked(markdown: str) -> str:
    """Return Markdown whose links to files of the repository lead to the site's pages, or are plain text."""
    for path, name in OUTSIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(path)}", f"]({name}", markdown)
    markdown = re.sub(rf"\[([^]]+)\]\((?:\.\./)*(?:{'|'.join(PLAIN)})\)", r"\1", markdown)
    return re.sub(r"\]\((?:\.\./)?docs/", "](", markdown.replace("](tutorial.ipynb)", "](tutorial.md)"))


def notebook(content: dict[str, Any]) -> str:
    """Return a notebook as Markdown, each cell of code followed by what it printed and showed."""
    parts = []
    for cell in content["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", [])})
            html = "".join(data.get("text/html", ()))
            parts.append(html or f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """Return every command with its arguments and options, as the command line has them."""
    parts = []
    for command in app.registered_commands:
        assert command.callback is not None
        rows = [_option(one) for one in inspect.signature(command.callback).parameters.values()]
        table = "\n".join(["| | default | |", "|---|---|---|", *rows])
        parts.append(f"### sparring {command.name}\n\n{inspect.getdoc(command.callback)}\n\n{table}")
    return "\n\n".join(parts)


def _option(parameter: inspect.Parameter) -> str:
    (about,) = parameter.annotation.__metadata__
    given = (about.default, *(about.param_decls or ()))  # in an annotation, typer keeps the first name as the default
    names = [one for one in given if isinstance(one, str) and one.startswith("--")]
    name = names[0] if names else f"--{parameter.name.replace('_', '-')}"
    shown = about.metavar if type(about).__name__ == "ArgumentInfo" else f"{name} {about.metavar or ''}".rstrip()
    default = "" if parameter.default in (None, False, "", inspect.Parameter.empty) else f"`{parameter.default}`"
    return f"| `{_cell(shown)}` | {default} | {_cell(about.help or '')} |"


def plan_tables() -> str:
    """Return every table of a plan file with its keys, their types and defaults."""
    parts, found = [_keys(Plan)], typing.get_type_hints(Plan)
    for name, kind in found.items():
        for one in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(one) and isinstance(one, type):
                title = f"[[{name}]]" if typing.get_origin(kind) is tuple else f"[{name}]"
                parts.append(f"### {title}\n\n{inspect.getdoc(one)}\n\n{_keys(one)}")
    return "\n\n".join(parts)


def _keys(kind: type) -> str:
    rows = ["| key | type | default |", "|---|---|---|"]
    for one in dataclasses.fields(kind):
        plain = one.default is not dataclasses.MISSING and one.default not in ("", None)
        kinds = str(one.type).replace(" | None", "").replace(" | ", " or ")
        rows.append(f"| `{one.name}` | `{kinds}` | {f'`{one.default!r}`' if plain else ''} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
