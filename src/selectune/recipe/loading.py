"""A recipe: everything that decides one run, checked before any model is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import Field, ValidationError

from selectune.errors import ConfigError, nearest
from selectune.recipe import words
from selectune.recipe.checks import contradictions
from selectune.recipe.file import Tree, dump_yaml, read_tree
from selectune.recipe.methods import unknown_compressor, unknown_methods
from selectune.recipe.sections import (
    AdapterSection,
    DataSection,
    EmulateSection,
    EvaluateSection,
    MatrixSection,
    ModelSection,
    ScoreSection,
    Section,
    Seed,
    SelectSection,
    TuneSection,
    WarmupSection,
)


class Recipe(Section):
    """Everything that decides one run."""

    output: str = Field(
        default="", description="folder of the run; empty: runs/<name of the recipe>"
    )
    seed: Seed = Field(default=0, description="seed of every random draw")
    model: ModelSection
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    warmup: WarmupSection = WarmupSection()
    score: ScoreSection = ScoreSection()
    select: SelectSection = SelectSection()
    tune: TuneSection = TuneSection()
    evaluate: EvaluateSection = EvaluateSection()
    matrix: MatrixSection | None = Field(
        default=None, description="a grid of runs, for compare only"
    )

    def resolved_yaml(self) -> str:
        """Return the recipe with every default written out; `load_recipe` reads it back."""
        return dump_yaml(self.model_dump(mode="json"))

    def changed(self, changes: Mapping[str, Any]) -> "Recipe":
        """Return a copy with other values.

        Args:
            changes: dotted key to plain value, such as {"tune.epochs": 2}.

        Raises:
            ConfigError: an unknown key, a wrong type or a value out of range.
        """
        tree = Tree(self.model_dump(mode="json"), {}, "recipe")
        for key, value in changes.items():
            tree.put(tuple(key.split(".")), value, f"changed by {key}={value!r}")
        return _checked(tree)


class OwnerRecipe(Section):
    """Everything that decides one emulator: a model's owner has no pool and no target."""

    output: str = Field(
        default="",
        description="folder of package/ and owner/; empty: runs/<name of the recipe>",
    )
    seed: Seed = Field(default=0, description="seed of every random draw")
    model: ModelSection
    emulate: EmulateSection

    def resolved_yaml(self) -> str:
        """Return the recipe with every default written out; `load_owner_recipe` reads it back."""
        return dump_yaml(self.model_dump(mode="json"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `section.key=value` overrides, and check all of it.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, the value read as YAML.

    Raises:
        ConfigError: one message with every mistake, each by key and line.
    """
    tree = _overridden(path, overrides)
    if _is_owners(tree):
        raise ConfigError(
            f"{tree.name} is the recipe of a model's owner",
            where=tree.where(("emulate",)),
            why="its section emulate makes a package, which another recipe names as model.base",
            do=f"selectune emulate {path}",
        )
    return _named(_checked(tree), path)


def load_owner_recipe(path: str | Path, overrides: Sequence[str] = ()) -> OwnerRecipe:
    """Read the recipe of a model's owner, with overrides, and check all of it.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, the value read as YAML.

    Raises:
        ConfigError: one message with every mistake, each by key and line.
    """
    tree = _overridden(path, overrides)
    recipe = _read(tree, OwnerRecipe)
    mistakes = unknown_compressor(recipe.emulate, tree)
    if recipe.model.adapter is not None:
        mistakes.append(
            ConfigError(
                "model.adapter would not be used",
                where=tree.where(("model", "adapter")),
                why="an emulator is made of a plain model",
                do="remove model.adapter, or merge the adapter first",
            )
        )
    if recipe.model.quantization is not None:
        mistakes.append(
            ConfigError(
                "an emulator is made of weights in full precision",
                where=tree.where(("model", "quantization")),
                why="quantised ones can be neither decomposed nor narrowed",
                do="remove model.quantization",
            )
        )
    if mistakes:
        raise words.together(mistakes, tree.name)
    return _named(recipe, path)


def is_owner_recipe(path: str | Path) -> bool:
    """Return whether a file is the recipe of a model's owner.

    Raises:
        ConfigError: it is no recipe at all.
    """
    return _is_owners(read_tree(Path(path)))


def _is_owners(tree: Tree) -> bool:
    return "emulate" in tree.data and "data" not in tree.data


def _overridden(path: str | Path, overrides: Sequence[str]) -> Tree:
    tree = read_tree(Path(path))
    mistakes: list[ConfigError] = []
    for text in overrides:
        try:
            tree.override(text)
        except ConfigError as error:
            mistakes.append(error)
    if mistakes:
        raise words.together(mistakes, tree.name)
    return tree


AnyRecipe = TypeVar("AnyRecipe", Recipe, OwnerRecipe)


def _named(recipe: AnyRecipe, path: str | Path) -> AnyRecipe:
    if recipe.output:
        return recipe
    return recipe.model_copy(update={"output": f"runs/{Path(path).stem}"})


def describe() -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, description) of every key, in the order of a recipe."""
    return words.rows(Recipe)


def describe_owner() -> list[tuple[str, str, str, str]]:
    """Return the same of every key of an owner's recipe that no other recipe has."""
    return words.rows(EmulateSection, "emulate.")


def _checked(tree: Tree) -> Recipe:
    """Return the recipe that the tree holds; every mistake is told at once."""
    _complete_rows(tree)
    recipe = _read(tree, Recipe)
    mistakes = [*contradictions(recipe, tree), *unknown_methods(recipe, tree)]
    if mistakes:
        raise words.together(mistakes, tree.name)
    return recipe


def _complete_rows(tree: Tree) -> None:
    """Give the emulate of every row the keys that matrix.emulate says for all of them.

    Raises:
        ConfigError: matrix.emulate has a key that no emulator has.
    """
    home = ("matrix", "emulate")
    matrix = _mapping(tree.data.get("matrix"))
    shared, rows = _mapping(matrix.get("emulate")), matrix.get("methods")
    strange = [key for key in shared if key not in EmulateSection.model_fields]
    if strange:
        raise ConfigError(
            f'"matrix.emulate.{strange[0]}" is no key of a recipe',
            where=tree.where((*home, strange[0])),
            why=f"matrix.emulate has the keys {', '.join(EmulateSection.model_fields)}",
            do=nearest(strange[0], EmulateSection.model_fields),
        )
    for i, row in enumerate(cast("list[Any]", rows) if isinstance(rows, list) else []):
        own = _mapping(_mapping(row).get("emulate"))
        for key in [key for key in shared if own and key not in own]:
            own[key] = shared[key]
            place = tree.origins.get((*home, key)) or tree.origins.get(home)
            if place is not None:  # a mistake in it is told where it is written
                tree.origins["matrix", "methods", i, "emulate", key] = place


def _mapping(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _read(tree: Tree, form: type[AnyRecipe]) -> AnyRecipe:
    """Return what the tree holds, as far as each key by itself can tell."""
    for name, info in form.model_fields.items():
        # `tune:` with every line below it commented out reads as null and means the defaults.
        if name in tree.data and tree.data[name] is None and words.is_section(info.annotation):
            tree.data[name] = {}
    try:
        # From JSON, strict mode takes a list for a tuple and still no "4" for a 4.
        return form.model_validate_json(tree.to_json())
    except ValidationError as error:
        raise words.together(words.mistakes(error, form, tree), tree.name) from None
