"""What do emulators give away, and what does tuning on them win for the model?

For every compressor, ratio and seed: emulate, tune, plug, evaluate; beside them the model untouched
and tuned in the open. One JSON per cell: the same command again does what is missing. An emulator
is made once for all seeds, and asked once; what its owner knows of it goes to emulators.csv.

    python benchmarks/recipes/offsite.py FOLDER [--methods gradot,random] [--ratios 0.6,0.4]
        [--seeds 0,1,2] [--adapters 0,1,-2,-1] [--ft] [--metric answer_loss] [key=value ...]

A method may carry options: gradot:lambda_mlp=0.3.
"""

import argparse
import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from selectune.evaluation import Evaluation, Metric
from selectune.evaluation.options import COLUMNS
from selectune.files import open_dir, write_file
from selectune.offsite import manifests
from selectune.offsite.emulate import OWNER as OWNER_PART
from selectune.offsite.emulate import PACKAGE
from selectune.offsite.manifests import OwnerRecord
from selectune.offsite.package import OWNER_KIND
from selectune.offsite.plugin import plug_files
from selectune.offsite.table import Offsite, OffsiteTable, offsite_table
from selectune.pipeline.answered import evaluate_arm
from selectune.pipeline.arms import BASE, SELECTED
from selectune.pipeline.emulation import Emulation
from selectune.pipeline.emulator_story import write_pages
from selectune.pipeline.ground import Ground
from selectune.pipeline.prepare import DemoNames
from selectune.pipeline.run import Run
from selectune.progress import Silent
from selectune.recipe import load_owner_recipe, load_recipe

RECIPE = Path(__file__).with_name("offsite.yaml")
METHODS = (
    "gradot,gradot:lambda_attention=0.3:lambda_mlp=0.3,svd_magnitude,activation_aware,random,"
    "layer_drop,layer_drop_distilled,crash"
)
OWNER = """
output: {out}
model: {{base: demo:model}}
emulate:
  method: {method}
  options: {options}
  adapters: {adapters}
  keep_attention: {ratio}
  keep_mlp: {ratio}
  calibration: demo:commonsense/text/calibration
  calibration_blocks: 64
  block_tokens: 256
  probe: {probe}
"""
PROBE_EXAMPLES = 12  # of each task, by which an owner judges an emulator
ByTask = Mapping[str, Evaluation]


class Bench:
    """All cells in one folder.

    Args:
        folder: where they lie.
        adapters: layers that train.
        overrides: of the data owner's recipe.
    """

    def __init__(self, folder: Path, adapters: Sequence[int], overrides: Sequence[str]) -> None:
        self.folder, self.adapters = folder, list(adapters)
        self.recipe = load_recipe(RECIPE, overrides)
        self.made: dict[str, Path] = {}

    def openly(self, name: str, layers: Sequence[int] | None, seed: int) -> dict[str, ByTask]:
        """Return the model's answers, untouched and with some layers tuned on the data itself."""

        def run() -> dict[str, ByTask]:
            adapter = {"kind": "full", "layers": None if layers is None else list(layers)}
            found = self._run({"tune.adapter": adapter, "seed": seed}, f"{name}-{seed}")
            return {"zs": found[BASE], "tuned": found[SELECTED]}

        return self._cell(f"{name}-{seed}", run)

    def offsite(self, method: str, ratio: float, seed: int) -> Offsite:
        """Return one cell of the table; the emulator is made once for all seeds."""
        name, *pairs = method.split(":")
        made = self.folder / label(method, ratio)
        self.made[made.name] = made

        def run() -> dict[str, ByTask]:
            made.mkdir(parents=True, exist_ok=True)
            owner = made / "owner.yaml"
            options = "{" + ", ".join(pair.replace("=", ": ") for pair in pairs) + "}"
            text = OWNER.format(
                out=made, method=name, options=options, adapters=self.adapters, ratio=ratio,
                probe=json.dumps(self._probe()),
            )  # fmt: skip
            owner.write_text(text, encoding="utf-8")
            Emulation(load_owner_recipe(owner), Silent()).emulate()
            cell = f"{made.name}/seed-{seed}"
            found = self._run({"model.base": str(made / "package"), "seed": seed}, cell)
            plugged = self._plugged(made, self.folder / cell, seed)
            return {"emulator": found[BASE], "tuned": found[SELECTED], "plugged": plugged}

        return Offsite(**self._cell(f"{made.name}-seed-{seed}", run))

    def _run(self, changes: Mapping[str, Any], name: str) -> dict[str, dict[str, Evaluation]]:
        out = self.folder / name
        recipe = self.recipe.changed({**changes, "output": str(out)})
        return Run(recipe, out=out, shared=self.folder / "shared").answers()

    def _probe(self) -> dict[str, str]:
        """Return files of a few target examples of each task."""
        demo, probe = DemoNames(), {}
        for task, source in cast("Mapping[str, str]", self.recipe.data.target).items():
            lines = Path(demo.path(source)).read_bytes().splitlines(keepends=True)
            path = self.folder / "probe" / f"{task}.jsonl"
            write_file(path, b"".join(lines[:PROBE_EXAMPLES]))
            probe[task] = str(path)
        return probe

    def emulators(self) -> str:
        """Return what the owner knows of every emulator, as CSV."""
        out = io.StringIO()
        layers = [f"cosine_layer_{place}" for place in range(len(self.adapters))]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            ["emulator", "ratio_middle", "ratio_whole", "cosine", "relative_error", *layers,
             "divergence_nats", "loss_nats", "model_loss_nats", "seconds", "peak_bytes"]
        )  # fmt: skip
        for name, made in self.made.items():
            record = manifests.read(
                OwnerRecord, open_dir(made / "owner", kind=OWNER_KIND), manifests.OWNER
            ).model_dump(mode="json")
            about = record["about"]
            quality, cost = about["quality"], about["cost"]
            gradients = quality["gradients"]
            writer.writerow(
                [name, quality["ratios"]["middle"], quality["ratios"]["whole"],
                 gradients["cosine"], gradients["relative_error"],
                 *(one["cosine"] for one in gradients["by_layer"].values()),
                 quality["divergence_nats"], quality["losses_nats"]["emulator"],
                 quality["losses_nats"]["original"], cost["seconds"], cost["peak_bytes"]]
            )  # fmt: skip
        return out.getvalue()

    def _plugged(self, made: Path, run: Path, seed: int) -> ByTask:
        """Return the answers of the model with the tuned layers in it."""
        tuned = run / "tuned"
        plug_files(DemoNames().path("demo:model"), run / "plugin", made / "owner", tuned)
        recipe = self.recipe.changed({"model.base": str(tuned), "seed": seed})
        ground = Ground(recipe, run / "pi", shared=None, tasks=None, progress=Silent())
        answers = evaluate_arm(ground, BASE, None, ground.prepared.heldout)
        shutil.rmtree(tuned)
        return answers

    def _cell(self, name: str, run: Callable[[], dict[str, ByTask]]) -> dict[str, ByTask]:
        """Return a finished cell, or finish it."""
        path = self.folder / "cells" / f"{name}.json"
        if not path.exists():
            found = run()
            rows = {
                part: {task: one.table.to_pylist() for task, one in by_task.items()}
                for part, by_task in found.items()
            }
            write_file(path, json.dumps(rows).encode())
        schema = pa.schema(list(COLUMNS.items()))
        return {
            part: {
                task: Evaluation(pa.Table.from_pylist(rows, schema=schema))
                for task, rows in by_task.items()
            }
            for part, by_task in json.loads(path.read_bytes()).items()
        }


def label(method: str, ratio: float) -> str:
    """Return the name of an emulator, and of its folder."""
    return f"{method.replace(':', '-')}-{ratio}"


def table(
    bench: Bench,
    methods: Sequence[str],
    ratios: Sequence[float],
    seeds: Sequence[int],
    *,
    with_ft: bool,
    metric: Metric,
) -> OffsiteTable:
    """Do what is missing, and return the table."""
    adapter_only = {s: bench.openly("ft-adapter", bench.adapters, s) for s in seeds}
    whole = {s: bench.openly("ft", None, s)["tuned"] for s in seeds} if with_ft else None
    cells = {
        (label(method, ratio), seed): bench.offsite(method, ratio, seed)
        for ratio in ratios
        for method in methods
        for seed in seeds
    }
    return offsite_table(
        cells,
        adapter_only[seeds[0]]["zs"],
        ft=whole,
        ft_adapter={seed: found["tuned"] for seed, found in adapter_only.items()},
        metric=metric,
    )


def _numbers(text: str) -> list[Any]:
    return [json.loads(part) for part in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--ratios", type=_numbers, default=[0.6, 0.4])
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2])
    parser.add_argument("--adapters", type=_numbers, default=[0, 1, -2, -1])
    parser.add_argument("--ft", action="store_true", help="also tune the whole model")
    parser.add_argument("--metric", default="correct_norm")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_intermixed_args()
    bench = Bench(asked.folder, asked.adapters, asked.overrides)
    found = table(
        bench,
        asked.methods.split(","),
        asked.ratios,
        asked.seeds,
        with_ft=asked.ft,
        metric=asked.metric,
    )
    write_file(asked.folder / "table.json", json.dumps(found.to_json(), indent=1).encode())
    write_file(asked.folder / "table.csv", found.to_csv().encode())
    write_file(asked.folder / "emulators.csv", bench.emulators().encode())
    write_pages(asked.folder, OWNER_PART, PACKAGE, found)
    print("\n".join(found.lines()))
