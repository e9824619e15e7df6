"""Every recipe that ships, and every one behind a table of PAPERS.md, on a tiny demo.

Names such as `demo:pool` lead to a random model and a handful of rows per task. All recipes are
planned as they stand, but for the budget; grids run with all of their rows, on one seed and task.
"""

import json
import random
from pathlib import Path

import pytest

from selectune.cli import main
from selectune.data.demo import COMMONSENSE, SEVEN, DemoAssets, Mix, build_tasks
from selectune.grid.compare import compare
from selectune.pipeline import prepare
from selectune.pipeline.run import Run
from selectune.progress import Silent
from selectune.recipe import Recipe, load_recipe
from workspace import question, save_model

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    [*ROOT.glob("src/selectune/recipes/*.y*ml"), *ROOT.glob("benchmarks/recipes/*.y*ml")]
)
SIZES = {"pool": 8, "target": 8, "heldout": 4}  # rows of each task
BUDGET = "select.budget=0.1"  # some ask for more examples than there are
SMALL = (BUDGET, "tune.epochs=1", "tune.batch_size=4", "evaluate.intervals=200")
AGAIN = "-0.4"  # compressors that stand there a second time, at a smaller size
BLOCKS = ("matrix.emulate.calibration_blocks=2", "matrix.emulate.block_tokens=16")


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DemoAssets]:
    """Return what stands for the demo's parts, by mix."""
    root = tmp_path_factory.mktemp("demo")
    save_model(root / "model", n_layers=6)  # four are an emulator's adapter
    config = root / "model/config.json"
    longer = {**json.loads(config.read_text()), "max_position_embeddings": 2048}
    config.write_text(json.dumps(longer))  # the default data.max_length is past the tiny model's
    return {mix.name: tiny_demo(root, mix) for mix in (SEVEN, COMMONSENSE)}


@pytest.fixture(autouse=True)
def _tiny_demo(demos: dict[str, DemoAssets], monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(*, mix: Mix = SEVEN, **sizes: int) -> DemoAssets:
        return demos[mix.name]

    monkeypatch.setattr(prepare, "demo_assets", tiny)


def tiny_demo(root: Path, mix: Mix) -> DemoAssets:
    rng, folder = random.Random(0), root / mix.name
    n = sum(SIZES.values())
    rows = {
        task: [{**question("words", rng), "source": task} for _ in range(n)] for task in mix.files
    }
    texts = [f"paragraph {k}: the owl sees {k * k} stars" for k in range(440)] if mix.prose else []
    build_tasks(folder, rows, SIZES, texts)
    return DemoAssets(
        model=root / "model",
        pool=folder / "pool.jsonl",
        targets={task: folder / f"target/{task}.jsonl" for task in mix.files},
        heldout={task: folder / f"heldout/{task}.jsonl" for task in mix.files},
        texts={name: folder / f"text/{name}.jsonl" for name in ("calibration", "heldout")}
        if mix.prose
        else {},
    )


def run_small(recipe: Path, out: Path) -> Recipe:
    """Run a recipe, a grid with one seed, learning rate and task, and return what was run."""
    whole = load_recipe(recipe)
    if whole.matrix is None:
        small = load_recipe(recipe, [*SMALL, f"output={out}"])
        Run(small, out=out).all()
        return small
    task = (list(whole.matrix.targets) or list(whole.data.target))[0]
    one = ("matrix.seeds=[0]", "matrix.tune.learning_rate=[1e-3]", f"matrix.targets=[{task}]")
    small = load_recipe(recipe, [*SMALL, *blocks_of(recipe), *one, f"output={out}"])
    assert small.matrix is not None
    rows = [m for m in small.matrix.methods if isinstance(m, str) or not m.name.endswith(AGAIN)]
    matrix = small.matrix.model_copy(update={"methods": rows})
    small = small.model_copy(update={"matrix": matrix})
    compare(small, out=out, progress=Silent())
    return small


def blocks_of(recipe: Path) -> tuple[str, ...]:
    """Return what a recipe with emulators needs, where text is as short as here."""
    matrix = load_recipe(recipe).matrix
    return BLOCKS if matrix is not None and matrix.emulate else ()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_every_recipe_is_planned(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["plan", str(recipe), f"output={tmp_path / 'out'}", BUDGET, *blocks_of(recipe)])
    assert (code, capsys.readouterr().err) == (0, "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_every_recipe_runs(recipe: Path, tmp_path: Path) -> None:
    small = run_small(recipe, tmp_path / "out")
    assert (tmp_path / "out/report.html").exists()
    if small.matrix is None:
        return
    names = {m if isinstance(m, str) else m.name for m in small.matrix.methods} | {"random"}
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert {row["method"] for row in table["rows"]} == names | {"base"}
    assert {row["task"] for row in table["rows"]} >= set(small.matrix.targets)
    cells = list((tmp_path / "out").glob("cells/*/cell.json"))
    assert len(cells) == len(names) * len(small.matrix.targets)
