"""A recipe: everything that decides one run, checked before any model is loaded.

Name, type, range, default and meaning of a key stand once, in the sections below; error messages,
`selectune methods --keys` and the reference are made from them by `describe`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from selectune import recipe_words as words
from selectune.errors import ConfigError, nearest
from selectune.recipe_file import Tree, dump_yaml, read_tree
from selectune.recipe_methods import PLAIN, unknown_methods

Text = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Text], Field(min_length=1)]
ByName = Annotated[dict[Text, Text], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
TokenCount = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,11} tokens$")]
SEED_LIMIT = 2**31  # numpy's legacy generators and transformers' set_seed take no more
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]


class Section(BaseModel):
    """A part of a recipe: exact types, no unknown keys, no later changes."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which base model, and how it is held in memory."""

    base: Text = Field(description="base model: a folder, a Hub name, or demo:model")
    revision: Text | None = Field(default=None, description="branch, tag or commit of a Hub model")
    adapter: Text | None = Field(
        default=None,
        description="folder of a peft adapter to take gradients at, instead of a warm-up",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="type of the base weights; auto: bfloat16 where it is fast"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the model runs"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="attention implementation of transformers"
    )


class DataSection(Section):
    """What to choose from, what the task looks like, and what proves the result."""

    pool: Text | Names | ByName = Field(
        description="the training examples to choose from: .jsonl, .json, .parquet, .csv, a folder "
        "saved by datasets, or a Hub name; a mapping names the sources"
    )
    target: Text | ByName = Field(
        description="the few examples that stand for the task; a mapping names several tasks"
    )
    heldout: Text | ByName | None = Field(
        default=None, description="examples that only evaluation reads, named as in data.target"
    )
    format: Literal["auto", "text", "prompt-completion", "messages", "alpaca", "sharegpt"] = Field(
        default="auto", description="the form of a row; auto finds it and says so"
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion", description="which tokens count in the loss"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        default=512, description="tokens kept of one example; the rest is cut off and counted"
    )
    max_empty: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05, description="share of examples that may lose every target token to the cut"
    )
    leakage: Literal["drop", "error", "keep"] = Field(
        default="drop",
        description="what happens to pool rows that equal a target or held-out row, and to target "
        "rows that equal a held-out row",
    )
    duplicates: Literal["drop", "keep"] = Field(
        default="drop", description="what happens to pool rows that equal an earlier one"
    )


class AdapterSection(Section):
    """What is trained."""

    kind: Literal["lora", "dora", "series", "parallel", "prefix", "full"] = Field(
        default="lora",
        description="low-rank factors (lora, dora), bottleneck adapters after or beside modules "
        "(series, parallel), virtual tokens (prefix), or the weights themselves (full)",
    )
    rank: Count = Field(default=8, description="lora, dora: rank of the factors")
    alpha: Positive = Field(
        default=16.0, description="lora, dora: factors are scaled by alpha / rank"
    )
    width: Count = Field(default=256, description="series, parallel: width of the bottleneck")
    activation: Literal["tanh", "relu", "gelu", "silu"] = Field(
        default="tanh", description="series, parallel: what bends inside the bottleneck"
    )
    virtual_tokens: Count = Field(
        default=30, description="prefix: keys and values that each block sees before the text"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="dropout before the factors or bottleneck while tuning; gradients are taken "
        "without",
    )
    modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] | None = Field(
        default=None,
        description="names of the modules that get factors or adapters; null: q_proj, k_proj, "
        "v_proj and o_proj for lora and dora, the end of each MLP for series (down_proj in a "
        "Llama), its last two for parallel (up_proj, down_proj)",
    )
    layers: Annotated[list[int], Field(min_length=1)] | None = Field(
        default=None,
        description="kind full: which blocks are trained, negative from the end; null: all",
    )


# What each kind reads of the section, beside `kind`.
_FACTORS = frozenset({"rank", "alpha", "dropout", "modules"})
_BOTTLENECK = frozenset({"width", "activation", "dropout", "modules"})
_READ_BY = {
    "lora": _FACTORS,
    "dora": _FACTORS,
    "series": _BOTTLENECK,
    "parallel": _BOTTLENECK,
    "prefix": frozenset({"virtual_tokens"}),
    "full": frozenset({"layers"}),
}


class WarmupSection(Section):
    """The short training after which gradients are taken."""

    fraction: Share = Field(default=0.05, description="random share of the pool to warm up on")
    epochs: Annotated[int, Field(ge=0)] = Field(
        default=1, description="passes over that share; 0 takes gradients at the adapter's start"
    )
    schedule_epochs: Count = Field(
        default=4,
        description="length of the learning-rate schedule, of which warmup.epochs are run",
    )


class ScoreSection(Section):
    """How pool examples are scored."""

    method: Text = Field(default="gist", description="scorer; `selectune methods` lists them")
    options: dict[str, Any] = Field(default={}, description="options of the scorer")
    token_budget: Count = Field(default=1024, description="padded tokens in one gradient batch")
    shard_examples: Count = Field(
        default=256, description="examples in one resumable shard of the store"
    )


class SelectSection(Section):
    """How scores become a selection."""

    rule: Text = Field(default="topk", description="selection rule; `selectune methods` lists them")
    budget: Count | Share | TokenCount = Field(
        default=0.05,
        description='how much to keep: 0.05 is a share, 500 a count, "20000 tokens" a length',
    )
    quotas: dict[str, tuple[float, float]] = Field(
        default={}, description="source: [least, most], as shares of the selection between 0 and 1"
    )
    near_duplicates: Share | None = Field(
        default=None,
        description="drop what has at least this 5-gram Jaccard similarity to a better one",
    )


class TuneSection(Section):
    """How an adapter is trained on the selection."""

    trainer: Literal["transformers", "trl"] = Field(
        default="transformers", description="which trainer"
    )
    epochs: Count = Field(default=4, description="passes over the selection")
    learning_rate: Positive = Field(default=2e-4, description="peak learning rate")
    batch_size: Count = Field(default=16, description="examples in one forward pass")
    accumulation: Count = Field(default=1, description="forward passes in one optimizer step")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="how the learning rate moves after its warm-up"
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.03, description="share of the steps in which the learning rate rises"
    )
    weight_decay: NotNegative = Field(default=0.0, description="decay of AdamW")
    max_grad_norm: Positive = Field(default=1.0, description="gradients are clipped to this norm")
    save_every: Count | None = Field(
        default=None, description="steps between checkpoints; null: after every epoch"
    )
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints that are kept")
    controls: list[Text] = Field(
        default=["random"],
        description="what is tuned beside the selection: scorers at the same budget, or full, all "
        "trained with the same method; plain is the selection itself, trained without the method",
    )
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"] = Field(
        default="adamw_torch", description="optimizer, as transformers calls it"
    )
    method: Text = Field(
        default=PLAIN,
        description="training method, plain for none; `selectune methods` lists them; the warm-up "
        "always trains plainly",
    )
    options: dict[str, Any] = Field(default={}, description="options of the training method")

    def plainly(self) -> "TuneSection":
        """Return the same training without a method."""
        return self.model_copy(update={"method": PLAIN, "options": {}})


class EvaluateSection(Section):
    """How arms are compared on held-out examples."""

    intervals: Annotated[int, Field(ge=100)] = Field(
        default=10000, description="bootstrap draws behind an interval"
    )
    limit: Count | None = Field(default=None, description="held-out examples per task; null: all")
    token_budget: Count = Field(default=4096, description="padded tokens in one evaluation batch")
    lm_eval: list[Text] = Field(default=[], description="lm-eval tasks to run too (extra: eval)")


class TuneChoice(Section):
    """How one row of a comparison is trained."""

    method: Text = Field(description="training method, plain for none")
    options: dict[str, Any] = Field(default={}, description="options of the training method")


class MatrixMethod(Section):
    """One row of a comparison, with options of its own."""

    name: Text = Field(description="what the table calls it")
    method: Text = Field(description="scorer; `selectune methods` lists them")
    options: dict[str, Any] = Field(default={}, description="options of the scorer")
    epochs: Count | None = Field(
        default=None,
        description="epochs of this method alone, such as 1 for full; null: as the others",
    )
    tune: TuneChoice | None = Field(
        default=None,
        description="training method of this row alone; null: tune.method, as for the others",
    )


class TuneGrid(Section):
    """Values tried for every method alike, on a split of the target, never on held-out data."""

    learning_rate: list[Positive] = Field(default=[], description="peak learning rates to try")
    epochs: list[Count] = Field(default=[], description="numbers of epochs to try")
    choose: Literal["task", "all"] = Field(
        default="task",
        description="task: values, selection and training for each target task by itself; all: one "
        "for all of them, chosen by the mean over tasks",
    )


class MatrixSection(Section):
    """A grid of runs; base and random always stand beside."""

    methods: Annotated[list[Text | MatrixMethod], Field(min_length=1)] = Field(
        description="scorers, or {name, method, options}; full is the whole pool"
    )
    targets: list[Text] = Field(default=[], description="names in data.target; empty: all of them")
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(
        default=[0], description="one run per seed"
    )
    tune: TuneGrid | None = Field(
        default=None, description="learning rates and epochs to choose from"
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


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `section.key=value` overrides, and check all of it.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, the value read as YAML.

    Raises:
        ConfigError: one message with every mistake, each by key and line.
    """
    tree = read_tree(Path(path))
    mistakes: list[ConfigError] = []
    for text in overrides:
        try:
            tree.override(text)
        except ConfigError as error:
            mistakes.append(error)
    if mistakes:
        raise words.together(mistakes, tree.name)
    recipe = _checked(tree)
    if not recipe.output:
        recipe = recipe.model_copy(update={"output": f"runs/{Path(path).stem}"})
    return recipe


def describe() -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, description) of every key, in the order of a recipe."""
    return words.rows(Recipe)


def _checked(tree: Tree) -> Recipe:
    """Return the recipe that the tree holds; every mistake is told at once."""
    for name, info in Recipe.model_fields.items():
        # `tune:` with every line below it commented out reads as null and means the defaults.
        if name in tree.data and tree.data[name] is None and words.is_section(info.annotation):
            tree.data[name] = {}
    try:
        # From JSON, strict mode takes a list for a tuple and still no "4" for a 4.
        recipe = Recipe.model_validate_json(tree.to_json())
    except ValidationError as error:
        raise words.together(words.mistakes(error, Recipe, tree), tree.name) from None
    mistakes = [*_contradictions(recipe, tree), *unknown_methods(recipe, tree)]
    if mistakes:
        raise words.together(mistakes, tree.name)
    return recipe


def _contradictions(recipe: Recipe, tree: Tree) -> list[ConfigError]:
    """Return what each key allows but the keys together do not."""
    found: list[ConfigError] = []

    def add(path: words.Path, what: str, why: str, do: str) -> None:
        found.append(ConfigError(what, where=tree.where(path), why=why, do=do))

    adapter = recipe.adapter
    for key, value in adapter.model_dump(exclude={"kind"}).items():
        is_read = key in _READ_BY[adapter.kind]
        if not is_read and value != AdapterSection.model_fields[key].default:
            add(
                ("adapter", key),
                f"adapter.{key} would not be used",
                f"adapter.kind is {adapter.kind}, which has no {key}",
                f"remove adapter.{key}, or change adapter.kind",
            )
    if recipe.model.adapter is not None and recipe.warmup != WarmupSection():
        add(
            ("warmup",),
            "the warm-up would not be used",
            "model.adapter names the adapter at which gradients are taken",
            "remove the section warmup, or remove model.adapter",
        )
    if recipe.warmup.epochs > recipe.warmup.schedule_epochs:
        add(
            ("warmup", "epochs"),
            f"warmup.epochs is {recipe.warmup.epochs}, past the end of the schedule",
            f"warmup.schedule_epochs is {recipe.warmup.schedule_epochs}",
            "make warmup.schedule_epochs at least warmup.epochs",
        )
    for source, (least, most) in recipe.select.quotas.items():
        if not 0 <= least <= most <= 1:
            add(
                ("select", "quotas", source),
                f'the quota of "{source}" cannot be [{least}, {most}]',
                "a quota is [least, most], as shares of the selection: 0 <= least <= most <= 1",
                f"for example {source}: [0.1, 0.5]",
            )
    if sum(least for least, _ in recipe.select.quotas.values()) > 1 + 1e-9:
        add(
            ("select", "quotas"),
            "the least shares of select.quotas sum to more than 1",
            "they are shares of one selection",
            "lower some of them",
        )
    if PLAIN in recipe.tune.controls and recipe.tune.method == PLAIN:
        add(
            ("tune", "controls", recipe.tune.controls.index(PLAIN)),
            f'the control "{PLAIN}" would equal the selection',
            f"it is the selection trained without a method, and tune.method is {PLAIN}",
            f'remove "{PLAIN}", or name a tune.method',
        )
    tasks = recipe.data.target
    for i, name in enumerate(recipe.matrix.targets if recipe.matrix else ()):
        if isinstance(tasks, str) or name not in tasks:
            add(
                ("matrix", "targets", i),
                f'"{name}" is no target of this recipe',
                "matrix.targets takes names that data.target gives",
                "write data.target as a mapping of names to files, or remove matrix.targets"
                if isinstance(tasks, str)
                else nearest(name, tasks),
            )
    return found
