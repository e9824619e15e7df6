"""Made-up comparisons for the page."""

from selectune.report.grid_facts import ALL_TASKS, GridCell, GridFacts, TextFacts

_METHODS = {"random": 0.0, "gist": -0.2, "less <b>": 0.02, "grad_cosine": 0.3}


def full_grid() -> GridFacts:
    """Return three methods on two tasks and three seeds: one better, one worse, one open."""
    cells: list[GridCell] = []
    for task, level in (("piqa", 2.0), ("csqa", 4.0), (ALL_TASKS, 3.0)):
        cells.append(GridCell(task=task, method="base", losses=[level + 1], accuracy=0.25))
        for k, (method, gap) in enumerate(_METHODS.items()):
            away = None if method == "random" else (gap, gap - 0.1, gap + 0.1)
            cells.append(
                GridCell(
                    task=task,
                    method=method,
                    losses=[level + gap - 0.05, level + gap, level + gap + 0.05],
                    accuracy=0.4 - gap / 10,
                    against_random=away,
                    accuracy_against_random=away
                    and (-gap / 10, -gap / 10 - 0.01, -gap / 10 + 0.01),
                    over_base=(gap - 1, gap - 1.1, gap - 0.9),
                    learning_rate=None if task == ALL_TASKS else 1e-3,
                    epochs=None if task == ALL_TASKS else 4,
                    seconds=60.0 + 100 * k,
                )
            )
    texts = [TextFacts(method="base", nats_per_token=3.0)]
    texts += [
        TextFacts(method=method, nats_per_token=3.1, over_base=(0.1, 0.05, 0.15))
        for method in _METHODS
    ]
    return GridFacts(
        title="grid",
        seeds=(0, 1, 2),
        cells=cells,
        texts=texts,
        tried=[("gist", "piqa", 1e-3, 4, 2.5), ("gist", "piqa", 1e-4, 4, 2.75)],
        cells_folder="runs/grid/cells",
    )


def bare_grid() -> GridFacts:
    """Return random alone, on one task without options and one seed."""
    cells = [
        GridCell(task="only", method="base", losses=[3.0]),
        GridCell(task="only", method="random", losses=[2.0], over_base=(-1.0, -1.5, -0.5)),
    ]
    return GridFacts(title="bare", seeds=(7,), cells=cells)
