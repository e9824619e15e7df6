"""Ask everybody's models the same held-out questions: what offsite tuning won, and at what price.

No single party has all of them: the data owner has emulator and held-out questions, the model's
owner the original and the plugged model. What is not at hand is left out.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from selectune.errors import ConfigError
from selectune.evaluation import Evaluation
from selectune.files import lock, sweep, write_file
from selectune.models import model_is_package
from selectune.offsite.standing import Standing, Who, standing
from selectune.pipeline.answered import Respondent, rank_options
from selectune.pipeline.arms import BASE, SELECTED
from selectune.pipeline.ground import Ground
from selectune.pipeline.prepare import DemoNames
from selectune.pipeline.run import Run, need_heldout
from selectune.pipeline.verification import read_run
from selectune.progress import Progress
from selectune.recipe import Recipe, load_recipe

STANDING = "standing.json"


def evaluate_plugged(
    recipe: Recipe,
    out: Path,
    *,
    plugged: str,
    original: str | None = None,
    openly: Path | None = None,
    allow: Sequence[str] = (),
    progress: Progress,
) -> Standing:
    """Ask a plugged model, and what it is to be compared with, the recipe's held-out questions.

    Args:
        recipe: with a package as its base: its run is finished first, for the emulator untouched
            (emulator ZS) and tuned (EFT). With the original as its base: nothing is trained.
        out: folder of the recipe's run; the answers go there, and `standing.json`.
        plugged: the model that `selectune plug` wrote (PI).
        original: the model that the package was made of (ZS).
        openly: folder of a finished run that tuned the original itself (FT).
        allow: what may differ from what the run's folder was made with, as in `Run`.
        progress: told of every long step.

    Raises:
        ConfigError: no held-out data, an original beside one that is the base already, or an open
            run that is not finished.
        DataError: the open run answered other questions.
    """
    need_heldout(recipe)
    answers: dict[Who, Mapping[str, Evaluation]] = {}
    is_package = model_is_package(recipe.model.base)
    if original is not None and not is_package:
        raise ConfigError(
            "the original is named twice",
            where="--original",
            why=f"model.base is {recipe.model.base}, which is no package",
            do="leave --original out, or name the package as model.base",
        )
    if openly is not None:
        answers["ft"] = _of_open_run(openly, progress)
    if is_package:
        found = Run(recipe, out=out, allow=allow, progress=progress).answers()
        answers |= {"emulator": found[BASE], "eft": found[SELECTED]}
    untouched = original if is_package else recipe.model.base
    models: dict[Who, str | None] = {"zs": untouched, "pi": plugged}
    with lock(out):
        sweep(out)
        for who, model in models.items():
            if model is not None:
                answers[who] = _asked(recipe, model, out / who, progress)
        section = recipe.evaluate
        found = standing(answers, n_boot=section.intervals, seed=recipe.seed)
        text = json.dumps(found.to_json(), indent=2, ensure_ascii=False)
        write_file(out / STANDING, text.encode())
    return found


def _asked(recipe: Recipe, model: str, out: Path, progress: Progress) -> dict[str, Evaluation]:
    """Return the answers of an untouched model."""
    changed = recipe.changed({"model.base": DemoNames().path(model), "output": str(out)})
    ground = Ground(changed, out, shared=None, tasks=None, progress=progress)
    heldout = ground.prepared.heldout
    questions = {task: heldout[task] for task in ground.tasks if task in heldout}
    return rank_options(ground, Respondent.arm(ground, BASE, None), questions)


def _of_open_run(folder: Path, progress: Progress) -> Mapping[str, Evaluation]:
    """Return the answers of what a finished run tuned."""
    config = folder / "config.yaml"
    if not config.exists() or "evaluate" not in read_run(folder)["steps"]:
        raise ConfigError(
            f"{folder} holds no evaluated run",
            where="--open",
            why="what tuning in the open reaches is read from a finished run on the original",
            do="finish one with `selectune run`, on the same held-out data",
        )
    recipe = load_recipe(config)
    return Run(recipe, out=folder, progress=progress).answers()[SELECTED]
