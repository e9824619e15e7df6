"""What does training 1 % of the weights in place cost, in time, and in bytes by owner?

SmolLM2-135M, 1 % of the weights of its layers chosen by GaLLoP, 16 examples of 96 tokens of which
the last 24 are targets, AdamW without clipping, the same loss under autocast for all:

    full                    every weight trains, in the type it is stored in
    full fp32               with bfloat16: fp32 weights, a bfloat16 forward pass
    lora                    of equal trained numbers on all seven projections
    shira                   peft's, random entries; its one rank gives the nearest count
    gather, sampled, auto   ours, by the ways that gradients reach the chosen entries

Steps of all forms are interleaved, on copies of the model that share its memory; a ratio is the
median over neighbouring steps. Bytes are counted, in a process of its own for each form, between
the backward pass and the step: what lives beside the base, and what autograd saves (weights left
out, copies of them not). Peak memory is of the steps before.

`mask` compares the scoring pass with forward and backward passes of the same batches that leave
the gradients of the same weights in `.grad`. Finding the base's fingerprint (part of the scoring)
and choosing do not grow with the examples, so they stand apart too.

    python benchmarks/weights.py [--quick] [--dtypes float32] [--forms full,auto] [--batch 64]

`--model FOLDER` takes another model.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from _arms import DENSITY, T, clock, load
from _common import child, ratio
from _owners import FORMS, Arm, Form, shared
from _passes import BUDGET, passes
from transformers.utils import logging as transformers_logging

from selectune.pipeline.measure import Measured
from selectune.training.sparse import SparseModel
from selectune.weights import WeightMask, WeightScores
from selectune.weights.base import base_fingerprint

MASTER: Form = "full fp32"


def asked_forms(text: str) -> list[Form]:
    """Read the names of forms."""
    unknown = set(text.split(",")) - set(FORMS)
    if unknown:
        raise argparse.ArgumentTypeError(f"forms are {', '.join(FORMS)}, not {unknown.pop()}")
    return cast("list[Form]", text.split(","))


def forms_of(dtype: str, asked: list[Form]) -> list[Form]:
    """Return the forms to measure; ratios are to full fine-tuning and to LoRA."""
    names: list[Form] = list(dict.fromkeys(("full", "lora", *asked)))
    return [name for name in names if name != MASTER or dtype != "float32"]


def memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Return peak bytes, and for forms of training the bytes by owner."""
    form, dtype, mask, n = arguments.arm, arguments.dtypes, arguments.mask, arguments.batch
    base = load("float32" if form == MASTER else dtype, arguments.model)
    if mask is None:
        run = passes(base.model, dtype, n)[form]
        with Measured() as measured:
            run()
        return {"peak": _peak(measured)}
    arm = Arm(form, base.model, WeightMask.load(mask), dtype, n)
    arm.step()
    with Measured() as measured:
        for _ in range(2):
            arm.step()
    return {"peak": _peak(measured), "n_trained": arm.n_trained, **arm.owners()}


def _peak(measured: Measured) -> int:
    return measured.device_peak_bytes if torch.cuda.is_available() else measured.peak_bytes


def apart(call: Callable[..., Any], *given: Any) -> Any:  # noqa: ANN401
    """Call a function in a process of its own: one part must not stand on what another left."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_quiet) as pool:
        return pool.submit(call, *given).result()


def estimation(arguments: argparse.Namespace, dtype: str, place: Path) -> dict[str, list[float]]:
    """Return the seconds of all parts of finding the mask, and save it."""
    n, repeats = n_examples(arguments), 1 if arguments.quick else 3
    model = load(dtype, arguments.model).model
    runs = passes(model, dtype, n)
    seconds: dict[str, list[float]] = {name: [] for name in (*runs, "select", "fingerprint")}
    masks: list[WeightMask] = []

    def score_and_select() -> None:  # the evidence is gone when it ends
        scores: list[WeightScores] = []
        seconds["score"].append(clock(lambda: scores.append(cast("Any", runs["score"]()))))
        seconds["select"].append(clock(lambda: masks.append(scores[0].select())))

    for run in passes(model, dtype, BUDGET // T).values():
        run()  # one batch, to warm up
    for _ in range(repeats):
        seconds["plain"].append(clock(runs["plain"]))
        score_and_select()
        seconds["fingerprint"].append(clock(lambda: base_fingerprint(model)))
    masks[0].save(place)
    return seconds


def steps(
    arguments: argparse.Namespace, dtype: str, names: list[Form], place: Path
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the seconds of every step of all forms, and the routes that `auto` found."""
    model, mask = load(dtype, arguments.model).model, WeightMask.load(place)
    arms: dict[Form, Arm] = {}
    for name in names:
        mine = shared(model) if name != MASTER else copy.deepcopy(model).float()
        arms[name] = Arm(name, mine, mask, dtype, arguments.batch)
    for arm in arms.values():
        arm.step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(2 if arguments.quick else 20):
        for name, arm in arms.items():
            seconds[name].append(clock(arm.step))
    auto = arms["auto"].model if "auto" in arms else None
    return seconds, dict(auto.sparse.routes) if isinstance(auto, SparseModel) else {}


def measure(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one type of weights, and print a row for each form."""
    names = forms_of(dtype, arguments.forms)
    words = ["--dtypes", dtype, *(["--model", arguments.model] if arguments.model else [])]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "mask"
        mask_facts = _mask_facts(apart(estimation, arguments, dtype, place), arguments, words)
        told = ", ".join(f"{key} {mask_facts[key]}" for key in list(mask_facts)[2:])
        print(f"{dtype} mask, beside plain passes: {told}", flush=True)
        words += ["--batch", str(arguments.batch), "--mask", str(place)]
        bytes_of = {name: child(__file__, "--arm", name, *words) for name in names}
        seconds, routes = apart(steps, arguments, dtype, names, place)
    rows: dict[str, Any] = {}
    for name in names:
        found = bytes_of[name]
        rows[name] = {
            "time_to_full": ratio(seconds[name], seconds["full"]),
            "time_to_lora": ratio(seconds[name], seconds["lora"]),
            "beyond_to_full": round(found["beyond"] / bytes_of["full"]["beyond"], 4),
            "median_seconds": round(statistics.median(seconds[name]), 4),
            "n_trained": found["n_trained"],
            "bytes": {key: value for key, value in found.items() if key != "n_trained"},
        }
        _print_row(f"{dtype} {name}", rows[name])
    return {"mask": mask_facts, "forms": rows, "routes": routes}


def n_examples(arguments: argparse.Namespace) -> int:
    """Return how many examples the mask is found from."""
    return 16 if arguments.quick else 128


def _mask_facts(
    seconds: dict[str, list[float]], arguments: argparse.Namespace, words: list[str]
) -> dict[str, Any]:
    n = n_examples(arguments)
    whole = [a + b for a, b in zip(seconds["score"], seconds["select"], strict=True)]
    peaks = {
        k: child(__file__, "--arm", k, *words, "--batch", str(n))["peak"]
        for k in ("plain", "score")
    }
    return {
        "n_examples": n,
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "score": ratio(seconds["score"], seconds["plain"]),
        "score_and_select": ratio(whole, seconds["plain"]),
        "peak_bytes": round(peaks["score"] / peaks["plain"], 3),
    }


def _print_row(title: str, row: dict[str, Any]) -> None:
    held = ", ".join(f"{key} {value / 1e6:.1f}" for key, value in row["bytes"].items())
    print(
        f"{title:<20} {row['n_trained']:>11,} trained; time {row['time_to_full']:.3f} of full, "
        f"{row['time_to_lora']:.3f} of lora; beyond the base {row['beyond_to_full']:.1%} of full\n"
        f"    MB: {held}",
        flush=True,
    )


def _quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Measure the mask, memory and steps for each type of weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 steps, 16 examples for the mask")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the weights")
    parser.add_argument(
        "--forms", type=asked_forms, default=list(FORMS), help="names, with commas between"
    )
    parser.add_argument("--batch", type=int, default=16, help="examples in a step")
    parser.add_argument("--model", help="folder of another model; SmolLM2-135M by default")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        _quiet()
        print(json.dumps(memory(arguments)))
        return
    found = {dtype: measure(dtype, arguments) for dtype in arguments.dtypes.split(",")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    facts |= {"model": arguments.model or "SmolLM2-135M", "density": DENSITY}
    facts |= {"tokens": arguments.batch * T}
    print(json.dumps({"benchmark": "weights", **facts, "dtypes": found}))


if __name__ == "__main__":
    main()
