"""Hooks of MkDocs: one set of links for the site and for GitHub.

The README, the changelog and the guide for contributors become pages. Files of the project that a page links to, such
as examples, become pages with their source, and the links are pointed there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?P<text>(?:\[[^][]*)?\])\((?P<target>[^)\s]+)\)")
_ROLE = re.compile(r":(?:class|meth|func|data|mod|attr|obj):<code>~?\.*([^<]+)</code>")
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and the files outside the folder of the documentation that pages link to."""
    root = Path(config.config_file_path).parent
    for source, uri in _PAGES.items():
        text = _relinked(root, (root / source).read_text("utf-8"), source, uri)
        files.append(File.generated(config, uri, content=text))
    linked = set()
    for file in files.documentation_pages():
        if file.src_uri.endswith(".md"):
            origin = next((old for old, new in _PAGES.items() if new == file.src_uri), f"docs/{file.src_uri}")
            text = (root / origin).read_text("utf-8")
            linked |= {path for _, path, _ in _local_links(root, text, origin) if not path.startswith("docs/")}
    for path in sorted(linked - set(_PAGES)):
        page = File.generated(config, f"source/{path}.md", content=_source_page(root / path, path))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave the folder of the documentation to the pages made from their targets."""
    uri = page.file.src_uri
    if not uri.endswith(".md") or page.file.generated_by:
        return markdown
    return _relinked(Path(config.config_file_path).parent, markdown, f"docs/{uri}", uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Drop the roles of Sphinx in docstrings: ``:class:`~.evaluator.Evaluator``` becomes ``Evaluator``."""
    return _ROLE.sub(lambda role: f"<code>{_short(role[1])}</code>", html)


def _short(name: str) -> str:
    """Return ``Class.member``, ``Class`` or ``function`` of a dotted name."""
    parts = name.split(".")
    keep = 2 if len(parts) > 1 and parts[-2][:1].isupper() else 1
    return ".".join(parts[-keep:])


def _local_links(root: Path, text: str, origin: str) -> Iterator[tuple[re.Match[str], str, str]]:
    """Yield each link to a file of the project, with its path from the root and its anchor."""
    for link in _LINK.finditer(text):
        target, _, anchor = link["target"].partition("#")
        if target and "://" not in target and not target.startswith("mailto:"):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
            if (root / path).exists():
                yield link, path, anchor


def _relinked(root: Path, text: str, origin: str, uri: str) -> str:
    """Return the text of the file ``origin`` with links as the page ``uri`` needs them."""
    done, end = [], 0
    for link, path, anchor in _local_links(root, text, origin):
        page = path.removeprefix("docs/") if path.startswith("docs/") else _PAGES.get(path, f"source/{path}.md")
        target = posixpath.relpath(page, posixpath.dirname(uri) or ".") + (f"#{anchor}" if anchor else "")
        shown = f"[{_title(root / path)}]" if re.fullmatch(r"\[[\w/]+\.md\]", link["text"]) else link["text"]
        done += [text[end : link.start()], f"{shown}({target})"]
        end = link.end()
    return "".join(done) + text[end:]


def _title(page: Path) -> str:
    """Return the heading of a page: on the site, links that are named by a file are named by it."""
    return next(line[2:] for line in page.read_text("utf-8").splitlines() if line.startswith("# "))


def _source_page(path: Path, name: str) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(("_", ".")))
        return f"# {name}/\n\n" + "\n".join(f"- `{entry}`" for entry in names) + "\n"
    if path.suffix == ".md":
        return path.read_text("utf-8")
    return f"# {name}\n\n````{_LANGUAGES.get(path.suffix, '')}\n{path.read_text('utf-8').rstrip()}\n````\n"
