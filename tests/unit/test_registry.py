import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest

from selectune.errors import ConfigError
from selectune.recipe.words import option_rows
from selectune.registry import Entry, get, methods, register
from selectune.training.method import Method

EVERY = [
    *methods("data_scorer"),
    *methods("selection_rule"),
    *methods("training_method"),
    *methods("weight_scorer"),
    *methods("compressor"),
]
PICKERS = methods("row_picker")


@pytest.mark.parametrize("entry", PICKERS, ids=lambda e: e.name)
def test_a_row_picker_says_what_it_does(entry: Entry) -> None:
    assert entry.summary.endswith((".", ")."))
    assert entry.needs <= {"score", "norm2", "gram"}
    assert entry.parse({}) == entry.options()


@pytest.mark.parametrize("entry", EVERY, ids=lambda e: e.name)
def test_every_method_says_what_a_user_needs(entry: Entry) -> None:
    assert entry.summary
    assert entry.paper, f"{entry.name} names no paper"
    assert entry.cost, f"{entry.name} does not say what it costs"
    assert entry.fails, f"{entry.name} does not say when it fails"
    assert is_dataclass(entry.options)


@pytest.mark.parametrize(
    "entry", [*methods("data_scorer"), *methods("compressor")], ids=lambda e: e.name
)
def test_a_scorer_is_one_file_named_after_it(entry: Entry) -> None:
    file = Path(sys.modules[entry.function.__module__].__file__ or "")
    assert file.stem == entry.name


@pytest.mark.parametrize("entry", EVERY, ids=lambda e: e.name)
def test_defaults_survive_being_written_out(entry: Entry) -> None:
    # "x" for what has no default, such as a path.
    default = entry.options(**dict.fromkeys(entry.required, "x"))
    plain = {f.name: getattr(default, f.name) for f in fields(entry.options)}
    assert entry.parse(plain) == default


@pytest.mark.parametrize("entry", methods("training_method"), ids=lambda e: e.name)
def test_a_training_method_is_its_options_and_checks_them(entry: Entry) -> None:
    assert issubclass(entry.options, Method)
    assert isinstance(entry.parse({}), entry.options)
    assert all(row[3] for row in option_rows(entry.options)), "an option without a description"
    with pytest.raises(ConfigError, match=f"no option of {entry.name}"):
        entry.parse({"no_such_option": 1})


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(ConfigError, match='did you mean "gist"'):
        get("data_scorer", "gst")
    with pytest.raises(ConfigError, match='did you mean "less"'):
        get("data_scorer", "LESS")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rnk": 3}, 'did you mean "rank"'),
        ({"rank": "energy:2"}, "rank"),
        ({"aggregate": "best"}, "aggregate"),
        ({"energy": "gate:-1"}, "energy"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        get("data_scorer", "gist").parse(options)


def test_a_bad_registration_fails_at_import() -> None:
    @dataclass(frozen=True)
    class Options:
        pass

    with pytest.raises(ValueError, match="registered twice"):
        register("data_scorer", "gist", options=Options)
    with pytest.raises(ValueError, match="must match"):
        register("data_scorer", "Gist!", options=Options)
    with pytest.raises(ValueError, match="must be a dataclass"):
        register("data_scorer", "other", options=int)
