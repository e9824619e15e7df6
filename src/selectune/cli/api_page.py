"""docs/api.md: the public names of selectune with signatures and docstrings, read from the source.

Nothing is imported to read it: signatures stand as they were written, whatever decorators do.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_HEADS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source")
_HEAD = re.compile(rf"({'|'.join(_HEADS)}):")
_ENTRY = re.compile(r"(\*{0,2}[\w.]+): (.*)")
_CODE = re.compile(r"(`[^`]*`)")

# Public, and not names of the package: what others of a kind inherit, and readers of other tools.
_BESIDE = {
    "What every training method has": {"Method": "selectune.training.method"},
    "selectune.interchange.bergson": {
        "bergson_scores": "selectune.interchange.bergson",
        "bergson_similarity": "selectune.interchange.bergson",
    },
}

Definition = ast.FunctionDef | ast.ClassDef


def api_page() -> str:
    """Return the page as Markdown."""
    lines = [
        "# API",
        "",
        "Made from the source by `python -m selectune.cli.pages`; a test keeps it current. Names",
        "are looked up on first use: `import selectune` imports neither torch nor peft.",
    ]
    for title, module in (("selectune", "selectune"), ("selectune.weights", "selectune.weights")):
        lines += ["", f"## {title}"]
        for name, home in _homes(module).items():
            lines += ["", *_told(title, name, home)]
    for title, homes in _BESIDE.items():
        lines += ["", f"## {title}"]
        for name, home in homes.items():
            lines += ["", *_told(home, name, home)]
    return "\n".join(lines) + "\n"


def public_names(module: str) -> list[str]:
    """Return what a package names in `__all__`."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and _is_called(node.targets[0], "__all__"):
            return [str(name) for name in ast.literal_eval(node.value)]
    raise LookupError(f"{module} has no __all__")


def _homes(module: str) -> dict[str, str]:
    """Return the module of every public name that is no module itself."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and _is_called(node.targets[0], "_HOMES"):
            homes: Mapping[str, str] = ast.literal_eval(node.value)
            return {name: homes[name] for name in public_names(module) if name in homes}
    raise LookupError(f"{module} has no _HOMES")


def _is_called(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


@cache
def _tree(module: str) -> ast.Module:
    path = _ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _definition(module: str, name: str) -> Definition:
    """Return where a name is defined, through the packages that pass it on."""
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name)
    raise LookupError(f"{module} does not define {name}")


def _told(shown: str, name: str, home: str) -> Iterator[str]:
    node = _definition(home, name)
    yield f"### {name}"
    yield ""
    yield from _signature(f"{shown}.{name}", node)
    yield ""
    yield from _markdown(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                yield from ("", f"#### {name}.{part.name}", "")
                yield from _signature(part.name, part)
                yield ""
                yield from _markdown(ast.get_docstring(part) or "")


def _signature(shown: str, node: Definition) -> Iterator[str]:
    yield "```python show"
    if isinstance(node, ast.ClassDef):
        fields = [_field(part) for part in _fields(node)]
        is_by_name = any("kw_only=True" in ast.unparse(d) for d in node.decorator_list)
        yield from _call(shown, ["*", *fields] if fields and is_by_name else fields, "")
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        kinds = [ast.unparse(d) for d in node.decorator_list]
        if "property" in kinds:
            yield f"{shown}{returns.replace(' -> ', ': ')}"
        else:
            yield from _call(shown, list(_arguments(node.args)), returns)
    yield "```"


def _call(shown: str, arguments: list[str], returns: str) -> Iterator[str]:
    line = f"{shown}({', '.join(arguments)}){returns}"
    if len(line) <= 100:
        yield line
    else:
        yield f"{shown}("
        yield from (f"    {argument}," for argument in arguments)
        yield f"){returns}"


def _fields(node: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    """Yield the fields of a dataclass; none of another class."""
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        yield from (part for part in node.body if isinstance(part, ast.AnnAssign))


def _field(part: ast.AnnAssign) -> str:
    kind = part.annotation
    # Annotated holds the description of an option, which stands under the methods.
    if isinstance(kind, ast.Subscript) and _is_called(kind.value, "Annotated"):
        kind = kind.slice.elts[0] if isinstance(kind.slice, ast.Tuple) else kind
    default = f" = {ast.unparse(part.value)}" if part.value else ""
    return f"{ast.unparse(part.target)}: {ast.unparse(kind)}{default}"


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    gap = len(plain) - len(arguments.defaults)
    for k, argument in enumerate(plain):
        if argument.arg not in ("self", "cls"):
            yield _argument(argument, arguments.defaults[k - gap] if k >= gap else None)
    if arguments.vararg:
        yield f"*{_argument(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _argument(argument, default)
    if arguments.kwarg:
        yield f"**{_argument(arguments.kwarg, None)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def _markdown(docstring: str) -> Iterator[str]:
    """Yield a Google docstring as Markdown: sections become lists."""
    in_section = False
    for line in docstring.split("\n"):
        if head := _HEAD.fullmatch(line):
            in_section = True
            yield from (f"**{head[1]}**", "")
        elif in_section and line.startswith("    "):
            entry = _ENTRY.fullmatch(line.strip())
            is_entry = entry is not None and not line.startswith("     ")
            if entry and is_entry:
                yield f"- `{entry[1]}`: {_escaped(entry[2])}"
            else:
                yield f"  {_escaped(line.strip())}"
        elif line.startswith("    "):
            yield line  # a block of code, as it stands
        else:
            in_section = in_section and not line
            yield _escaped(line)


def _escaped(text: str) -> str:
    """Return text in which `<`, `*` and brackets mean themselves, outside of code."""
    parts = _CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([<*\[\]])", r"\\\1", part) for part in parts
    )
