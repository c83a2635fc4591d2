"""Hooks of mkdocs, which builds the documentation's site.

The repository's pages are written for readers of the source tree. The site differs in four places:
the README is its first page, first_steps.py is shown as a page, every package has a page of API
reference, and the rows of paper.md link to the definitions they name. FieldLists is an extension of
griffe, which reads the docstrings.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pixart_jax"
# `pixart_jax/diffusion/gaussian.py:73` `add_noise`, a cell of paper.md
CODE = re.compile(r"`pixart_jax/([\w/]+)\.py:\d+` `([\w.]+)`")
# "name: text", a line of a docstring that describes an argument, field or error
FIELD = re.compile(r"(?<=[.:;\n])\n *([\w*.]+(?:, [\w*.]+)*): (?=\S)")


class FieldLists(griffe.Extension):
    """Shows the "name: text" lines of a docstring as a list."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            text = FIELD.sub(r"\n\n- `\1`: ", obj.docstring.value)
            text = re.sub(r":(?:meth|func|class|mod):(?=`)", "", text)
            # [b, h, w, c] is a shape, not a link
            obj.docstring.value = re.sub(r"(`[^`]*`)|\[", lambda m: m[1] or r"\[", text)


def modules() -> dict[str, list[str]]:
    """Package, or "top level", → its modules' dotted names."""
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__" and ast.get_docstring(ast.parse(file.read_text("utf-8"))):
            name = ".".join(parts).removesuffix(".__init__")
            package = parts[1] if len(parts) > 2 else "top level"
            found.setdefault(package, []).append(name)
    return found


def pages() -> dict[str, str]:
    """Path of a generated page → its Markdown."""
    steps = (ROOT / "docs/first_steps.py").read_text("utf-8")
    found = {
        "tutorial.md": f"# Train and sample on one page\n\n```python\n{steps}```\n",
        **{name: (ROOT / name).read_text("utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")},
    }
    for package, names in modules().items():
        entries = "\n\n".join(f"::: {name}" for name in names)
        path = f"reference/{package.replace(' ', '_')}.md"
        found[path] = f"---\ntitle: {package}\n---\n\n{entries}\n"
    return found


def on_config(config):
    """Fills the API reference's entry in the navigation."""
    reference = [f"reference/{package.replace(' ', '_')}.md" for package in modules()]
    for entry in config.nav:
        if isinstance(entry, dict) and "API reference" in entry:
            entry["API reference"] = reference
    return config


def on_files(files, config):
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    path = page.file.src_uri
    if path == "index.md":
        markdown = (ROOT / "README.md").read_text("utf-8")
    if path == "paper.md":
        markdown = CODE.sub(_link, markdown)
    if "/" not in path:  # links as they are relative to docs/
        markdown = re.sub(r"\]\((?:\.\./|docs/)", "](", markdown)
        markdown = markdown.replace("](README.md)", "](index.md)")
        markdown = markdown.replace("](first_steps.py)", "](tutorial.md)")
    return markdown


def _link(match: re.Match) -> str:
    module, name = match[1].replace("/", "."), match[2]
    if any(part.startswith("_") for part in name.split(".")):
        return match[0]  # private definitions are not in the reference
    return f"[`{module}.{name}`][pixart_jax.{module}.{name}]"
