"""A recipe says each thing once, and every mistake in it is told by key and line."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selectune.errors import ConfigError
from selectune.recipe import Recipe, Section, describe, describe_owner, load_recipe
from selectune.recipe.file import MAX_BYTES, dump_yaml
from selectune.recipes import demo_recipe

SMALL = """\
model:
  base: some/model
data:
  pool: pool.jsonl
  target: {csqa: target.jsonl}
"""
GRID = (
    SMALL
    + "tune: {adapter: {}, weights: {}, tokens: {}}\n"
    + "matrix:\n  methods:\n  - gist\n"
    + "  - {name: mine, method: gist, warmup: {}, emulate: {calibration: text.jsonl},\n"
    + "     tune: {method: gast, adapter: {}, weights: {}, tokens: {}}}\n"
    + "  tune: {epochs: [1]}\n"
)
ANY_FOLDER = [HealthCheck.function_scoped_fixture]


def write(folder: Path, text: str | bytes, name: str = "demo.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(folder: Path, text: str | bytes, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides)


def refusal(folder: Path, text: str | bytes, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return caught.value


def leaf_keys() -> list[str]:
    return [key for key, *_ in describe() if key != "matrix"]


def set_key(tree: dict[str, Any], key: str, value: object, rename: str | None = None) -> None:
    """Set or rename one dotted key, the slow and obvious way."""
    *parents, last = key.split(".")
    for name in parents:
        below = tree.setdefault(name.removesuffix("[]"), {})
        tree = below[1] if name.endswith("[]") else below
    tree.pop(last, None)
    tree[rename or last] = value


def full_tree(folder: Path) -> dict[str, Any]:
    return load(folder, GRID).model_dump(mode="json")


# What is read


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2.5E-5", 2.5e-5), ("1", 1.0), (".5", 0.5), ("+3.", 3.0)],
)
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, SMALL, f"tune.learning_rate={text}").tune.learning_rate == value
    in_file = load(tmp_path, SMALL + f"tune: {{learning_rate: {text}}}\n")
    assert in_file.tune.learning_rate == value


@pytest.mark.parametrize("word", ["no", "on", "yes", "1:30", "2024-01-31", "1_000", "0o7", "!"])
def test_yaml_1_1_does_not_turn_words_into_values(tmp_path: Path, word: str) -> None:
    quoted = f"'{word}'" if word == "!" else word
    assert load(tmp_path, SMALL, f"model.revision={quoted}").model.revision == word
    quoted_key = SMALL.replace("csqa", quoted)
    assert load(tmp_path, quoted_key).data.target == {word: "target.jsonl"}


def test_a_budget_keeps_the_kind_it_was_written_in(tmp_path: Path) -> None:
    def budget(text: str) -> object:
        return load(tmp_path, SMALL, f"select.budget={text}").select.budget

    assert [(type(b), b) for b in map(budget, ("0.05", "1", "1.0", "20000 tokens"))] == [
        (float, 0.05), (int, 1), (float, 1.0), (str, "20000 tokens"),
    ]  # fmt: skip


def test_a_section_without_keys_means_its_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL + "tune:\n# epochs: 1\n").tune == load(tmp_path, SMALL).tune


def test_the_output_folder_is_called_like_the_recipe(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL).output == "runs/demo"
    assert load(tmp_path, SMALL, "output=elsewhere").output == "elsewhere"


def test_the_shipped_demo_recipe_is_valid() -> None:
    recipe = load_recipe(demo_recipe())
    assert recipe.model.base == "demo:model"
    assert recipe.tune.learning_rate == 5e-4


# What is refused, by key and line


@pytest.mark.parametrize("key", leaf_keys())
def test_a_misspelt_key_is_refused_with_the_nearest_name(tmp_path: Path, key: str) -> None:
    tree = full_tree(tmp_path)
    right = key.rsplit(".", 1)[-1]
    wrong = right[:-1] + "_" + right[-1]
    set_key(tree, key, None, rename=wrong)
    text = dump_yaml(tree)
    line = next(i for i, row in enumerate(text.split("\n"), 1) if f"{wrong}:" in row)
    message = str(refusal(tmp_path, text))
    assert f'{wrong}" is no key of a recipe' in message
    assert f"{wrong}, demo.yaml line {line}" in message
    assert f'did you mean "{right}"?' in message


@pytest.mark.parametrize("key", leaf_keys())
def test_a_value_of_another_type_is_refused_with_what_was_expected(
    tmp_path: Path, key: str
) -> None:
    tree = full_tree(tmp_path)
    set_key(tree, key, {"qq": [{"qq": 1}]})
    message = str(refusal(tmp_path, dump_yaml(tree)))
    assert key.replace("[]", "[1]") in message
    assert "demo.yaml line" in message
    assert "expected" in message or "takes:" in message or "keys" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("tune.epochs", "four", "a whole number of at least 1"),
        ("tune.epochs", "'4'", "a whole number of at least 1"),
        ("tune.epochs", "true", "a whole number of at least 1"),
        ("tune.epochs", "1.5", "a whole number of at least 1"),
        ("tune.learning_rate", "0", "a number above 0"),
        ("tune.learning_rate", ".nan", "a number above 0"),
        ("tune.learning_rate", ".inf", "a number above 0"),
        ("data.max_empty", "1.5", "a number of at least 0 and of at most 1"),
        ("select.budget", "5%", 'or text like "20000 tokens"'),
        ("select.budget", "-1", "a whole number of at least 1 or a number above 0"),
        ("adapter.modules", "q_proj", "a list of text or all-linear"),
        ("data.pool", "[a, 3]", "expected text"),
        ("seed", "2147483648", "below 2147483648"),
        ("model", "gpt2", "a mapping with the keys base"),
        (
            "matrix",
            "[gist]",
            "a mapping with the keys methods, budgets, targets, seeds, tune, transfer, emulate or "
            "null",
        ),
    ],
)
def test_file_and_command_line_refuse_alike(
    tmp_path: Path, key: str, value: str, expected: str
) -> None:
    section, _, name = key.rpartition(".")
    tree = {"model": {"base": "m"}, "data": {"pool": "p", "target": "t"}}
    tree.setdefault(section, {}).pop(name, None)
    if not section:
        del tree[section]
        tree.pop(name, None)
    rows = [*dump_yaml({k: v for k, v in tree.items() if k != section}).rstrip("\n").split("\n")]
    here = tree.get(section, {})
    block = [f"{section}:", *(f"  {k}: {v}" for k, v in here.items()), f"  {name}: {value}"]
    text = "\n".join([*rows, *(block if section else [f"{name}: {value}"])]) + "\n"
    for error, where in (
        (refusal(tmp_path, text), f"{key}, demo.yaml line {len(text.splitlines())}"),
        (refusal(tmp_path, SMALL, f"{key}={value}"), f"command line, {key}={value}"),
    ):
        assert expected in error.why
        assert error.where.replace("[1]", "") == where


def test_a_missing_key_is_named_with_its_meaning(tmp_path: Path) -> None:
    error = refusal(tmp_path, "model: {base: m}\ndata: {pool: p}\n")
    assert error.what == '"data.target" is missing'
    assert error.where == "data, demo.yaml line 2"
    assert "stand for the task" in error.why


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = SMALL.replace("base", "bsae") + "tune:\n  epochs: four\n  lerning_rate: 1\n"
    message = str(refusal(tmp_path, text, "seed=x"))
    assert message.startswith("5 mistakes in demo.yaml\n")
    for part in ("model.bsae", '"model.base" is missing', "tune.epochs", "lerning_rate", "seed=x"):
        assert part in message


def test_a_key_of_another_section_is_pointed_at(tmp_path: Path) -> None:
    error = refusal(tmp_path, SMALL + "tune: {near_duplicates: 0.8}\n")
    assert error.do == 'did you mean "select.near_duplicates"?'


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("seed: 1\nseed: 2\n", 2, '"seed" twice (first in line 1)'),
        ("a: &x [1]\nb: *x\n", 2, "the alias *x"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "the tag tag:yaml.org,2002:python"),
        ("a: !mine 1\n", 1, "the tag !mine"),
        ("model:\n\tbase: x\n", 2, "indented with a tab"),
        ("a: 1\nb: [1, 2\n", 3, "not YAML"),
        ("a: 1\n--- \nb: 2\n", 2, "not YAML"),
        ("a: 1\n[x]: 1\n", 2, "a key that is no word"),
        ("seed: " + "9" * 5000, 1, "a number of 5000 digits"),
        ("a: " + "[" * 5000, 1, "nesting deeper than 20"),
        ('a: "\\ud800"', 1, "half a surrogate pair"),
        (b"a: 1\nb: \xff\n", 2, "not UTF-8"),
    ],
)
def test_dangerous_or_broken_yaml_is_refused_by_line(
    tmp_path: Path, text: str | bytes, line: int, what: str
) -> None:
    error = refusal(tmp_path, text)
    assert what in error.what
    assert error.where == f"demo.yaml line {line}"
    assert error.do


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "alias" in refusal(tmp_path, "\n".join(rows)).what


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "empty"),
        (b"# nothing\n", "empty"),
        (b"just a sentence", "instead of sections"),
        (b"[1, 2]", "instead of sections"),
        (b"a: \x00", "cannot stand in a recipe"),
        (b"#" * (MAX_BYTES + 1), "larger than 256 kB"),
    ],
)
def test_what_is_no_recipe_is_called_so(tmp_path: Path, text: bytes, what: str) -> None:
    assert what in refusal(tmp_path, text).what


@given(raw=st.one_of(st.binary(max_size=200), st.text("abm:-[]{}&*!|>'\"#\n\t 1e.~", max_size=80)))
@settings(max_examples=200, deadline=None, suppress_health_check=ANY_FOLDER)
def test_no_bytes_raise_anything_but_our_error(tmp_path: Path, raw: bytes | str) -> None:
    try:
        load(tmp_path, raw if isinstance(raw, bytes) else raw.encode())
    except ConfigError as error:
        assert error.where  # noqa: PT017  (what passes is fine too, and no recipe is that short)
    else:
        pytest.fail("no text this short is a recipe")


# Overrides


def test_an_override_replaces_one_value_and_makes_what_it_needs(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL, "tune.epochs=2", "data.target.siqa=b.jsonl", "seed=7")
    assert (recipe.tune.epochs, recipe.seed) == (2, 7)
    assert recipe.data.target == {"csqa": "target.jsonl", "siqa": "b.jsonl"}
    listed = load(tmp_path, SMALL, "data.pool=[a.jsonl, 'b=c.jsonl']")
    assert listed.data.pool == ["a.jsonl", "b=c.jsonl"]
    assert load(tmp_path, SMALL, "model.revision=").model.revision is None


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("tune.epochs", "is no override"),
        ("=4", "is no override"),
        ("tune..epochs=4", "is no override"),
        ("tune.epochs=[", "not YAML"),
        ("tune.epochs=*x", "alias"),
        ("data.pool.x=1", "cannot be set"),
    ],
)
def test_a_broken_override_is_quoted_back(tmp_path: Path, override: str, what: str) -> None:
    error = refusal(tmp_path, SMALL, override)
    assert what in error.what
    assert error.where == f"command line, {override}"


def test_an_override_of_an_unknown_key_offers_the_nearest(tmp_path: Path) -> None:
    error = refusal(tmp_path, SMALL, "tune.epoch=4")
    assert (error.where, error.do) == ("command line, tune.epoch=4", 'did you mean "epochs"?')
    assert refusal(tmp_path, SMALL, "tun.epochs=4").do == 'did you mean "tune"?'


def test_changed_is_checked_like_a_file(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL)
    assert recipe.changed({"tune.epochs": 1, "seed": 3}).tune.epochs == 1
    assert recipe.tune.epochs == 4
    with pytest.raises(ConfigError, match=r"tune\.epochs cannot be 0"):
        recipe.changed({"tune.epochs": 0})


# What contradicts itself


@pytest.mark.parametrize(
    ("overrides", "where", "what"),
    [
        (["adapter.kind=series", "adapter.layers=[0]"], "adapter.layers=[0]", "would not be used"),
        (["adapter.kind=full", "adapter.rank=4"], "adapter.rank=4", "would not be used"),
        (["model.adapter=a", "warmup.epochs=2"], "warmup", "would not be used"),
        (
            ["matrix={methods: [{name: own, method: length, adapter: {rank: 2}}]}"],
            "methods",
            "the adapter of the row",
        ),
        (
            [
                "matrix={methods: [{name: own, method: gist, adapter: {rank: 2}}]}",
                "tune.reselect_every=0.5",
            ],
            "methods",
            "the adapter of the row",
        ),
        (
            ["matrix={methods: [{name: own, method: gist, adapter: {kind: full, rank: 2}}]}"],
            "methods",
            "would not be used",
        ),
        (["warmup.epochs=5"], "warmup.epochs=5", "past the end"),
        (
            ["matrix={methods: [{name: a, method: gist, select: {rule: topp}}]}"],
            "methods",
            '"topp" is no selection rule',
        ),
        (
            ["matrix={methods: [{name: a, method: gist, select: {quotas: {x: [0.5, 0.1]}}}]}"],
            "methods",
            "the quota of",
        ),
        (
            ["matrix={methods: [{name: a, method: full, select: {budget: 3}}]}"],
            "methods",
            "selects nothing",
        ),
        (
            [
                "matrix={methods: [gist], budgets: ['900 tokens']}",
                "tune.reselect_every=0.5",
            ],
            "tune.reselect_every",
            "another number of examples",
        ),
        (["select.quotas.a=[0.5, 0.1]"], "select.quotas.a", "the quota of"),
        (["select.quotas={a: [0.6, 1], b: [0.6, 1]}"], "select.quotas", "more than 1"),
        (["matrix.methods=[gist]", "matrix.targets=[csqq]"], "matrix.targets", "is no target"),
        (
            ["matrix.methods=[gist]", "matrix.targets=[a]", "data.target=a.jsonl"],
            "matrix.targets",
            "is no target",
        ),
        (["score.method=gits"], "score.method=gits", '"gits" is no data scorer'),
        (["score.method=full"], "score.method=full", '"full" is no data scorer'),
        (["score.options.rnk=3"], "score.options.rnk=3", '"rnk" is no option of gist'),
        (["select.rule=topp"], "select.rule=topp", '"topp" is no selection rule'),
        (["tune.controls=[randm]"], "tune.controls", '"randm" is no data scorer'),
        (["matrix.methods=[gits]"], "matrix.methods", '"gits" is no data scorer'),
        (
            ["matrix.methods=[{name: a, method: gist, options: {rnk: 1}}]"],
            "matrix.methods",
            '"rnk" is no option of gist',
        ),
        (["tune.method=gats"], "tune.method=gats", '"gats" is no training method'),
        (["tune.method=gast", "tune.options.keap=0.5"], "tune.options.keap", '"keap" is no option'),
        (["tune.method=gast", "tune.options.keep=1.5"], "tune.options.keep", "cannot be 1.5"),
        (["tune.method=gast", "tune.options.pick=softmx"], "tune.options.pick", "is no row picker"),
        (["tune.method=gast", "tune.options.target=pol"], "tune.options.target", "cannot be 'pol'"),
        (
            ["tune.method=gast", "tune.options.sampler=gatt"],
            "tune.options.sampler",
            '"gatt" is no training method',
        ),
        (["tune.options.keep=0.5"], "tune.options", '"plain" takes no options'),
        (["tune.controls=[random, plain]"], "tune.controls", "would equal the selection"),
        (
            ["matrix.methods=[{name: a, method: random, tune: {method: gats}}]"],
            "matrix.methods",
            '"gats" is no training method',
        ),
        (
            ["matrix.methods=[{name: a, method: random, tune: {method: gast, options: {k: 1}}}]"],
            "matrix.methods",
            '"k" is no option of gast',
        ),
    ],
)
def test_contradictions_and_unknown_methods_are_refused(
    tmp_path: Path, overrides: list[str], where: str, what: str
) -> None:
    error = refusal(tmp_path, SMALL, *overrides)
    assert what in error.what
    assert where in error.where
    assert error.do


def test_the_whole_pool_is_a_control_and_a_column(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL, "tune.controls=[random, full]", "matrix.methods=[gist, full]")
    assert recipe.tune.controls == ["random", "full"]


def test_a_training_method_is_named_with_its_options(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        SMALL,
        "tune.method=gast",
        "tune.options={keep: 0.25, pick: topk}",
        "tune.controls=[random, plain]",
        "matrix.methods=[{name: a, method: random, tune: {method: plain}}]",
    )
    assert recipe.tune.plainly() == recipe.tune.model_copy(
        update={"method": "plain", "options": {}}
    )
    again = write(tmp_path, recipe.resolved_yaml(), "again.yaml")
    assert load_recipe(again) == recipe


def test_plain_training_waits_for_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    code = f"from selectune.recipe import load_recipe; load_recipe({str(path)!r})"
    code += "; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What is written


text_values = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
recipes = st.fixed_dictionaries(
    {
        "model.base": st.one_of(
            text_values, st.sampled_from(["1e-4", "no", "null", "1", "~", "0x1"])
        ),
        "model.revision": st.none() | text_values,
        "data.pool": st.lists(text_values, min_size=1, max_size=3)
        | st.dictionaries(text_values, text_values, min_size=1, max_size=3),
        "tune.learning_rate": st.floats(min_value=1e-300, max_value=1e300),
        "select.budget": st.floats(min_value=1e-9, max_value=1.0)
        | st.integers(1, 10**9)
        | st.just("12 tokens"),
        "select.quotas": st.just({}) | st.just({"a": [0.0, 0.5], "no": [0.1, 1.0]}),
    }
)


@given(changes=recipes)
@settings(max_examples=40, deadline=None, suppress_health_check=ANY_FOLDER)
def test_resolved_yaml_replays_the_recipe(tmp_path: Path, changes: dict[str, Any]) -> None:
    tree: dict[str, Any] = {"output": "o", "model": {}, "data": {"target": "t"}}
    for key, value in changes.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    recipe = load(tmp_path, dump_yaml(tree))
    again = load(tmp_path, recipe.resolved_yaml())
    assert again == recipe
    assert again.model.base == changes["model.base"]


def test_resolved_yaml_names_every_key(tmp_path: Path) -> None:
    text = load(tmp_path, GRID, "adapter.kind=full").resolved_yaml()
    for key in leaf_keys():
        assert f"{key.rsplit('.', 1)[-1]}:" in text
    assert load(tmp_path, text).adapter.kind == "full"  # defaults written out are no contradiction


def all_sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for child in section.__subclasses__():
        yield from all_sections(child)


def test_every_key_is_described_once() -> None:
    rows = [*describe(), *describe_owner()]
    keys = [key for key, *_ in rows]
    assert len(keys) == len(set(keys))
    assert all(kind and default and text for _, kind, default, text in rows)
    named = {key.rsplit(".", 1)[-1] for key in keys} | {
        "model", "data", "adapter", "warmup", "score", "select", "tune", "evaluate", "emulate",
        "terms",
    }  # fmt: skip
    for section in all_sections(Section):
        assert set(section.model_fields) <= named


def test_a_recipe_cannot_be_changed_in_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, SMALL).tune.epochs = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys, selectune.recipe; "
        "print({'torch', 'numpy', 'pyarrow', 'transformers', 'peft'} & set(sys.modules))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "set()"


# Where there is no recipe


def test_a_missing_file_is_answered_with_the_nearest_recipe(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    for name, offer in (("dmo.yaml", '"demo.yaml"?'), ("demo", 'demo.yaml"?')):
        with pytest.raises(ConfigError, match="there is no recipe") as caught:
            load_recipe(tmp_path / name)
        assert caught.value.do.endswith(offer)
    with pytest.raises(ConfigError, match="selectune demo"):
        load_recipe(tmp_path / "nowhere" / "x.yaml")


def test_a_folder_is_answered_with_the_recipes_in_it(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    with pytest.raises(ConfigError, match="is a folder") as caught:
        load_recipe(tmp_path)
    assert caught.value.do == f"name the file: {path}"


def test_an_override_in_the_place_of_the_recipe_is_seen() -> None:
    with pytest.raises(ConfigError, match="stands where the recipe belongs"):
        load_recipe("tune.epochs=4")
