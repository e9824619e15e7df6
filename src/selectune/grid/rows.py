"""The rows of a matrix: their names, their budgets, and which random draw each is compared with."""

from collections.abc import Sequence

from selectune.errors import ConfigError
from selectune.grid.table import RANDOM
from selectune.pipeline.arms import BASE
from selectune.recipe import MatrixMethod, MatrixSection, SelectChoice
from selectune.recipe.methods import FULL

Budget = int | float | str


def rows_of(matrix: MatrixSection, usual: Budget) -> list[MatrixMethod]:
    """Return the rows: each with every budget that the matrix names, and random beside each.

    Args:
        matrix: of a recipe.
        usual: `select.budget`.

    Raises:
        ConfigError: two rows of one name, or one with a name that the table needs for itself.
    """
    given = [
        m if isinstance(m, MatrixMethod) else MatrixMethod(name=m, method=m) for m in matrix.methods
    ]
    methods: list[MatrixMethod] = []
    for row in given:
        is_random = row == _random(RANDOM, None)
        if not matrix.budgets or is_random or row.method == FULL or _budget(row, "") != "":
            methods.append(row)
            continue
        own = row.select or SelectChoice()
        for budget in matrix.budgets:
            select = own.model_copy(update={"budget": budget})
            changes = {"name": f"{row.name}, {budget}", "select": select}
            methods.append(row.model_copy(update=changes))
    if RANDOM not in [m.name for m in methods]:
        methods.insert(0, _random(RANDOM, None))
    there = {_budget(m, usual) for m in methods if m == _random(m.name, m.select)}
    place = [m.name for m in methods].index(RANDOM)
    for budget in dict.fromkeys(_budget(m, usual) for m in methods):
        if budget not in there:
            place += 1
            select = SelectChoice(budget=budget)
            methods.insert(place, _random(f"{RANDOM}, {budget}", select))
    for method in methods:
        is_plain = method == _random(RANDOM, None)
        if method.name == BASE or (method.name == RANDOM and not is_plain):
            raise ConfigError(
                f'a row of the matrix is called "{method.name}"',
                where="matrix.methods",
                why="that is the untouched model"
                if method.name == BASE
                else "that is what every row is compared with: plain training on a random draw",
                do="give it another name",
            )
    names = [m.name for m in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f'two methods of the matrix are called "{twice[0]}"',
            where="matrix.methods",
            why="a name is a row of the table",
            do="give them different names",
        )
    return methods


def references_of(methods: Sequence[MatrixMethod], usual: Budget) -> dict[str, str]:
    """Return what each row is compared with: random at its budget.

    Args:
        methods: from `rows_of`.
        usual: `select.budget`.
    """
    random = {
        _budget(m, usual): m.name for m in reversed(methods) if m == _random(m.name, m.select)
    }
    return {m.name: random[_budget(m, usual)] for m in methods}


def _random(name: str, select: SelectChoice | None) -> MatrixMethod:
    return MatrixMethod(name=name, method=RANDOM, select=select)


def _budget(method: MatrixMethod, usual: Budget) -> Budget:
    own = None if method.select is None else method.select.budget
    return usual if own is None or method.method == FULL else own
