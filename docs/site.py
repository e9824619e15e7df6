"""What the documents need to become a site; mkdocs calls the functions by their names.

README and the other documents of the root are taken as they are. Links are written for the
repository, where PAPERS.md stands above `docs/`; here they are turned to the site's places.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\((?P<path>[\w./-]+\.md)(?P<anchor>#[\w-]*)?\)")
_FENCE = re.compile(r"^( *)```(\w+) (run|show|recipe)$", re.MULTILINE)
_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"' >]+"
    r"|<link\b(?![^>]*\brel=[\"']?canonical)[^>]*\bhref=[\"']?(?:https?:)?//[^\"' >]+"
    r"|@import[^;]*//[^;]*"
)


def _place(path: str) -> str:
    """Return where on the site a document of the repository stands."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return "index.md" if path == "README.md" else path.lower()


def _documents() -> dict[str, str]:
    """Return place on the site -> path in the repository."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    paths = sorted(file.relative_to(ROOT).as_posix() for file in found)
    return {_place(path): path for path in paths}


def on_files(files: Files, config: Any) -> Files:  # noqa: ANN401
    """Add the documents of the root."""
    for place, path in _documents().items():
        if not path.startswith("docs/"):
            text = (ROOT / path).read_text(encoding="utf-8")
            files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401
    """Turn links to the site's places, and fences to what the highlighter knows."""
    here = page.file.src_uri
    folder = posixpath.dirname(_documents()[here])

    def turned(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found["path"]))
        if not (ROOT / target).is_file():
            return found[0]  # mkdocs says which page, and stops
        link = posixpath.relpath(_place(target), posixpath.dirname(here) or ".")
        return f"]({link}{found['anchor'] or ''})"

    return _FENCE.sub(r"\1```\2", _LINK.sub(turned, markdown))


def on_post_build(config: Any) -> None:  # noqa: ANN401
    """Refuse a site that loads anything from another server.

    Raises:
        PluginError: a page or a style sheet does.
    """
    for file in sorted(Path(config["site_dir"]).rglob("*")):
        if file.suffix in (".html", ".css"):
            found = _LOADED.search(file.read_text(encoding="utf-8"))
            if found:
                raise PluginError(f"{file.name} loads from elsewhere: {found[0][:200]}")
