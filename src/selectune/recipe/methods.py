"""Every method that a recipe names, looked up in the registry with its options."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from selectune import registry
from selectune.errors import TOLD, ConfigError, nearest
from selectune.recipe import words
from selectune.recipe.file import Tree

if TYPE_CHECKING:
    from selectune.recipe import Recipe
    from selectune.recipe.sections import (
        EmulateSection,
        TuneChoice,
        TuneSection,
        WarmupSection,
    )

FULL = "full"  # the whole pool, where a scorer could be named
RANDOM = "random"  # what every choice is compared with
PLAIN = "plain"  # no method, where a training method could be named
BESIDE_QUANTISED = ("lora", "dora")  # kinds of adapter that are tested on quantised weights

_STAYS = "it does not look at the gradients of the model that trains"


def unknown_methods(recipe: "Recipe", tree: Tree) -> list[ConfigError]:
    """Return the method names and options that the registry does not know."""
    matrix = recipe.matrix.methods if recipe.matrix else ()
    found = _scorer(("score", "method"), recipe.score.method, recipe.score.options, tree)
    found += _rule(("select", "rule"), recipe.select.rule, tree)
    for i, name in enumerate(recipe.tune.controls):
        if name != PLAIN:
            found += _scorer(("tune", "controls", i), name, None, tree)
    found += _training(("tune",), recipe.tune, tree)
    for i, row in enumerate(matrix):
        path = ("matrix", "methods", i)
        if isinstance(row, str):
            found += _scorer(path, row, None, tree)
            continue
        found += _scorer((*path, "method"), row.method, row.options, tree)
        if row.select is not None and row.select.rule is not None:
            found += _rule((*path, "select", "rule"), row.select.rule, tree)
        if row.tune is not None:
            found += _training((*path, "tune"), row.tune, tree)
        if row.emulate is not None:
            found += unknown_compressor(row.emulate, tree, path)
    if found:
        return found
    return [
        *_unused_economy(recipe, tree), *_unused_adapters(recipe, tree), *_unsuited(recipe, tree),
    ]  # fmt: skip


def _unused_adapters(recipe: "Recipe", tree: Tree) -> list[ConfigError]:
    """Return the rows whose own adapter no gradient would be taken of."""
    found: list[ConfigError] = []
    for i, row in enumerate(recipe.matrix.methods if recipe.matrix else ()):
        if isinstance(row, str) or row.adapter is None:
            continue
        again = recipe.tune.reselect_every if row.tune is None else row.tune.reselect_every
        reasons = {
            f"{row.method} takes no gradients": not _takes_gradients(row.method),
            "model.adapter names the one of all rows": recipe.model.adapter is not None,
            "on an emulator gradients are those of the layers that train": row.emulate is not None,
            "tune.reselect_every goes by what trains": again is not None,
        }
        found += [
            ConfigError(
                f'the adapter of the row "{row.name}" would not be used',
                where=tree.where(("matrix", "methods", i, "adapter")),
                why=why,
                do="remove adapter from the row, or what it does not go with",
            )
            for why, holds in reasons.items()
            if holds
        ]
    return found


def _rule(path: words.Path, name: str, tree: Tree) -> list[ConfigError]:
    try:
        registry.get("selection_rule", name, where=tree.where(path))
    except ConfigError as error:
        return [error]
    return []


def _unused_economy(recipe: "Recipe", tree: Tree) -> list[ConfigError]:
    """Return what makes gradient passes cheaper where none is made."""
    section = recipe.score.model_dump(include={"layers", "max_length", "precision", "fast"})
    given = [key for key, value in section.items() if value]
    names = [recipe.score.method, *recipe.tune.controls]
    if recipe.matrix is not None:
        names = [row if isinstance(row, str) else row.method for row in recipe.matrix.methods]
    if not given or any(map(_takes_gradients, names)):
        return []
    return [
        ConfigError(
            f"score.{key} would not be used",
            where=tree.where(("score", key)),
            why=f"it makes gradient passes cheaper, and none is made for {', '.join(names)}",
            do=f"remove score.{key}, or use a scorer such as gist",
        )
        for key in given
    ]


def _unsuited(recipe: "Recipe", tree: Tree) -> list[ConfigError]:
    """Return the scorers that do not go with how the recipe warms up or chooses anew."""
    stays = [
        ConfigError(
            f"{name} would choose the same examples again",
            where=tree.where(path),
            why=_STAYS,
            do="use gist, grad_cosine or another scorer of gradients, or remove "
            "tune.reselect_every",
        )
        for path, name in _reselecting(recipe)
        if not _reads_the_model(name)
    ]
    stays += [
        ConfigError(
            f'the row "{row}" would choose the same examples again: {name}',
            where=tree.where(path),
            why=f"tune.reselect_every is for every row, and {name}: {_STAYS}",
            do="remove tune.reselect_every, and give the rows that can choose anew one of their "
            f"own: tune: {{reselect_every: {recipe.tune.reselect_every}}}",
        )
        for path, row, name in _told_to_reselect(recipe)
        if not _reads_the_model(name)
    ]
    return stays + [
        ConfigError(
            f"{name} needs a warm-up of a fixed length",
            where=tree.where(path),
            why="it reads the end of every epoch, and warmup.until: overlap may end the warm-up "
            "within one",
            do="write warmup.until: epochs, or use gist",
        )
        for path, name, warmup in _scored(recipe)
        if warmup.until == "overlap" and "checkpoints" in registry.get("data_scorer", name).needs
    ]


def _takes_gradients(name: str) -> bool:
    if name in (FULL, PLAIN):
        return False
    return not registry.get("data_scorer", name).needs.isdisjoint({"gradients", "checkpoints"})


def _reads_the_model(name: str) -> bool:
    return name != FULL and "gradients" in registry.get("data_scorer", name).needs


def _reselecting(recipe: "Recipe") -> "list[tuple[words.Path, str]]":
    """Return the place and name of every scorer that is told by itself to choose anew."""
    found: list[tuple[words.Path, str]] = []
    if recipe.matrix is None and recipe.tune.reselect_every is not None:
        found.append((("tune", "reselect_every"), recipe.score.method))
    for i, row in enumerate(recipe.matrix.methods if recipe.matrix else ()):
        if not isinstance(row, str) and row.tune and row.tune.reselect_every is not None:
            path: words.Path = ("matrix", "methods", i, "tune", "reselect_every")
            found.append((path, row.method))
    return found


def _told_to_reselect(recipe: "Recipe") -> "list[tuple[words.Path, str, str]]":
    """Return place, name and scorer of every row that chooses anew because all rows shall.

    Random examples and the whole pool stand beside, and stay as they are, as one run's controls do.
    """
    found: list[tuple[words.Path, str, str]] = []
    if recipe.matrix is None or recipe.tune.reselect_every is None:
        return found
    for i, row in enumerate(recipe.matrix.methods):
        name, method = (row, row) if isinstance(row, str) else (row.name, row.method)
        own = None if isinstance(row, str) or row.tune is None else row.tune.reselect_every
        if own is None and method not in (RANDOM, FULL):
            found.append((("matrix", "methods", i), name, method))
    return found


def _scored(recipe: "Recipe") -> "list[tuple[words.Path, str, WarmupSection]]":
    """Return the place and name of every scorer, with the warm-up before it."""
    found: list[tuple[words.Path, str, WarmupSection]] = []
    if recipe.matrix is None:
        found.append((("score", "method"), recipe.score.method, recipe.warmup))
        found += [
            (("tune", "controls", i), name, recipe.warmup)
            for i, name in enumerate(recipe.tune.controls)
        ]
    for i, row in enumerate(recipe.matrix.methods if recipe.matrix else ()):
        path: words.Path = ("matrix", "methods", i)
        if isinstance(row, str):
            found.append((path, row, recipe.warmup))
        else:
            found.append((path, row.method, row.warmup or recipe.warmup))
    return [one for one in found if one[1] not in (FULL, PLAIN)]


def unknown_compressor(
    section: "EmulateSection", tree: Tree, home: words.Path = ()
) -> list[ConfigError]:
    """Return what is wrong with the compressor that a section names, and its options.

    Args:
        section: of an owner's recipe, or of a row of a comparison.
        tree: that holds it.
        home: where the section stands in it.
    """
    path = (*home, "emulate", "method")
    try:
        entry = registry.get("compressor", section.method, where=tree.where(path))
    except ConfigError as error:
        return [error]
    return _options(entry, section.options, path, tree)


def _scorer(
    path: words.Path, name: str, options: Mapping[str, Any] | None, tree: Tree
) -> list[ConfigError]:
    # This imports the scorers, and with them numpy and pyarrow: not before it is needed.
    names = [entry.name for entry in registry.methods("data_scorer")]
    whole_pool = name == FULL and path[0] != "score"
    if whole_pool and not options:
        return []
    if whole_pool or name not in names:
        return [
            ConfigError(
                '"full" takes no options' if whole_pool else f'"{name}" is no data scorer',
                where=tree.where(path),
                why=f"known are: {', '.join(names)}",
                do='remove "options"' if whole_pool else nearest(name, names, instead=TOLD),
            )
        ]
    return _options(registry.get("data_scorer", name), options or {}, path, tree)


def _training(
    path: words.Path, section: "TuneSection | TuneChoice", tree: Tree
) -> list[ConfigError]:
    """Return what is wrong with the names in a section that says how something is trained."""
    found = _method((*path, "method"), section.method, section.options, tree)
    if section.weights is None:
        return found
    # This imports torch and transformers: only where single weights train.
    home = (*path, "weights")
    names = [entry.name for entry in registry.methods("weight_scorer")]
    if section.weights.method not in names:
        found.append(
            ConfigError(
                f'"{section.weights.method}" is no scorer of weights',
                where=tree.where((*home, "method")),
                why=f"known are: {', '.join(names)}",
                do=nearest(section.weights.method, names, instead=TOLD),
            )
        )
        return found
    entry = registry.get("weight_scorer", section.weights.method)
    options = dict(section.weights.options)
    if section.weights.density is not None:
        if "density" in options:
            found.append(
                ConfigError(
                    "density stands twice",
                    where=tree.where((*home, "options", "density")),
                    why="weights.density says it already",
                    do='remove "density" from the options',
                )
            )
        options["density"] = section.weights.density
    return found + _options(entry, options, (*home, "method"), tree)


def _method(
    path: words.Path, name: str, options: Mapping[str, Any], tree: Tree
) -> list[ConfigError]:
    home = (*path[:-1], "options")
    if name == PLAIN:
        if not options:
            return []
        return [
            ConfigError(
                f'"{PLAIN}" takes no options',
                where=tree.where(home),
                why=f"{PLAIN} takes: no options; it stands for training without a method",
                do=f'remove "options", or name a method: {_known("training_method")}',
            )
        ]
    # This imports torch and transformers: only where a method is named.
    names = [PLAIN, *(entry.name for entry in registry.methods("training_method"))]
    if name not in names:
        return [
            ConfigError(
                f'"{name}" is no training method',
                where=tree.where(path),
                why=f"known are: {', '.join(names)}",
                do=nearest(name, names, instead=TOLD),
            )
        ]
    entry = registry.get("training_method", name)
    found = _options(entry, options, path, tree)
    if found:
        return found
    return _named_in_options(entry, options, home, tree)


def _named_in_options(
    entry: registry.Entry, options: Mapping[str, Any], home: words.Path, tree: Tree
) -> list[ConfigError]:
    """Return what is wrong with the methods that options name: a picker, a sampler, a source."""
    found: list[ConfigError] = []
    pick, sampler, target = (options.get(key) for key in ("pick", "sampler", "target"))
    if pick is not None:
        try:
            registry.get("row_picker", str(pick), where=tree.where((*home, "pick")))
        except ConfigError as error:
            found.append(error)
    if sampler is not None:
        own = options.get("sampler_options") or {}
        try:
            inner = registry.get(
                "training_method", str(sampler), where=tree.where((*home, "sampler"))
            )
            inner.parse(own, where=tree.where((*home, "sampler_options")))
        except ConfigError as error:
            found.append(error)
    # From Python it may also be rows; a recipe can only name one of the two that it has.
    if target is not None and target not in ("pool", "target"):
        found.append(
            ConfigError(
                f'option "target" of {entry.name} cannot be {target!r}',
                where=tree.where((*home, "target")),
                why="a recipe has a pool and a target",
                do=nearest(str(target), ["pool", "target"]),
            )
        )
    return found


def _known(family: registry.Family) -> str:
    return ", ".join(entry.name for entry in registry.methods(family))


def _options(
    entry: registry.Entry, options: Mapping[str, Any], path: words.Path, tree: Tree
) -> list[ConfigError]:
    """Return what is wrong with the options of one method, each by its own key."""
    home = (*path[:-1], "options")
    try:
        entry.parse(dict(options), where=tree.where(home))
    except ConfigError as whole:
        if not set(entry.required) <= set(options):
            return [whole]
        found: list[ConfigError] = []
        needed = {key: options[key] for key in entry.required}
        for key, value in options.items():
            try:
                entry.parse({**needed, key: value}, where=tree.where((*home, key)))
            except ConfigError as error:
                found.append(error)
        return found or [whole]
    return []
