"""Made-up runs: one that looks real, and its awkward relatives."""

import dataclasses
from typing import Any

import numpy as np

from selectune.report.page import (
    Difference,
    Level,
    Phase,
    PoolTable,
    ReportData,
    ShownExample,
    TargetSpectrum,
    TokenMap,
    TrainingFacts,
    Verdict,
)
from unit.report.weight_samples import weight_facts

SCRIPT = "<script>alert('pool')</script><img src=x onerror=alert(1)>"
ARABIC = "ما هي عاصمة فرنسا؟"
_TASKS = ("siqa", "csqa", "obqa", "piqa", "mmlu", "asdiv", "nq-open")
_RECIPE = """output: runs/csqa
seed: 0
model:
  base: demo:model
  dtype: bfloat16
data:
  pool: demo:pool
  target: demo:target/csqa
  heldout: demo:heldout/csqa
adapter: {kind: lora, rank: 8, alpha: 16}
score: {method: gist, options: {rank: 'energy:0.95'}}
select: {rule: topk, budget: 0.05}
tune: {epochs: 4, learning_rate: 0.0005, controls: [random]}
"""
_QUESTIONS = (
    ("Question: Where would you put a plate after washing it?\nAnswer:", " dish rack"),
    ("Question: What do people aim to do at work?\nAnswer:", " complete job"),
    (f"Question: {SCRIPT}\nAnswer:", " 5 < 6 && 7 > 2"),
    (f"Question: {ARABIC}\nAnswer:", " باريس"),
    ("日本の首都はどこですか。\n", " 東京"),
    ("Question: " + "What follows is a very long passage about rivers. " * 900, " water"),
    ("Question: A weasel has a thin body and short legs to easier what?\nAnswer:", " burrow"),
)
_LEVELS = {  # arm: answer loss, accuracy raw and length-normalised, of csqa's 100 questions
    "selected": (3.60, 0.43, 0.51),
    "random": (3.81, 0.41, 0.47),
    "base": (8.71, 0.30, 0.32),
}


def levels_of(task: str, shift: float = 0.0) -> list[Level]:
    """Return three arms on one task."""
    rows: list[Level] = []
    for arm, (loss, raw, norm) in _LEVELS.items():
        numbers = {
            "answer_loss": (loss + shift, 0.42),
            "correct_raw": (raw, 0.097),
            "correct_norm": (norm, 0.098),
        }
        for metric, (value, half) in numbers.items():
            rows.append(
                Level(arm=arm, task=task, metric=metric, n=100, value=value,
                      low=value - half, high=value + half)
            )  # fmt: skip
    return rows


def differences_of(task: str, shift: float = 0.0) -> list[Difference]:
    """Return selected against both baselines on one task."""
    numbers = {
        ("random", "answer_loss"): (-0.214 + shift, 0.16),
        ("base", "answer_loss"): (-5.11 + shift, 0.61),
        ("random", "correct_norm"): (0.04, 0.055),
        ("base", "correct_norm"): (0.19, 0.085),
    }
    return [
        Difference(arm="selected", against=against, task=task, metric=metric, n=100, value=value,
                   low=value - half, high=value + half)
        for (against, metric), (value, half) in numbers.items()
    ]  # fmt: skip


def pool_of(sources: tuple[str, ...], per_source: int = 150, seed: int = 0) -> PoolTable:
    """Return scores that favour some sources."""
    rng = np.random.default_rng(seed)
    n = len(sources) * per_source
    of = np.repeat(np.arange(len(sources)), per_source)
    lean = rng.normal(0, 0.09, len(sources))
    scores = np.clip(rng.normal(0.38 + lean[of], 0.11, n), -1, 0.999)
    energy = np.clip(rng.beta(4, 7, n) + 0.25 * (scores - 0.4), 0, 1)
    return PoolTable(
        ids=[f"{i:016x}-0" for i in range(n)],
        sources=[sources[k] for k in of],
        n_tokens=np.clip(rng.lognormal(3.5, 0.55, n), 5, 512).astype(np.int64),
        scores={"": scores},
        energy={"": energy},
    )


def best_ids(pool: PoolTable, k: int) -> list[str]:
    """Return the ids with the highest scores."""
    order = np.argsort(-next(iter(pool.scores.values())), kind="stable")
    return [pool.ids[i] for i in order[:k]]


def shown(pool: PoolTable, ids: list[str], *, is_selected: bool) -> list[ShownExample]:
    """Return examples to read, in the order of `ids`."""
    rows: list[ShownExample] = []
    for place, example_id in enumerate(ids):
        row = pool.ids.index(example_id)
        prompt, completion = _QUESTIONS[place % len(_QUESTIONS)]
        rows.append(
            ShownExample(
                id=example_id,
                source=pool.sources[row],
                origin=f"pool.jsonl:{row + 1}",
                parts=(("prompt", prompt), ("completion", completion)),
                score=float(pool.scores[""][row]),
                energy=float(pool.energy[""][row]),
                is_selected=is_selected,
                target_task="csqa",
                target_id="00ab34cd56ef7890-0",
                target_parts=(
                    ("prompt", "Question: The forgotten leftovers had gotten quite old, he found "
                     "it covered in mold in the back of his what?\nAnswer:"),
                    ("completion", " refrigerator"),
                ),
            )
        )  # fmt: skip
    return rows


def curve(start: float, end: float, n: int, seed: int) -> list[tuple[int, float]]:
    """Return a noisy loss that falls."""
    rng = np.random.default_rng(seed)
    losses = end + (start - end) * np.exp(-np.arange(n) / (n / 4)) + rng.normal(0, 0.35, n)
    return [(step + 1, float(max(loss, 0.05))) for step, loss in enumerate(losses)]


def full_run() -> ReportData:
    """Return a run with every part."""
    pool = pool_of(_TASKS)
    ids = best_ids(pool, 52)
    worst = best_ids(pool, len(pool.ids))[::-1][:6]
    eigenvalues = np.exp(-np.arange(24) / 5.5) + 0.004
    return ReportData(
        title="csqa with GIST on SmolLM2-135M-Instruct",
        verdicts={
            "csqa": Verdict(
                text="Better than random. Against random examples of the same number, its answer "
                "loss is 0.214 nats per token lower [0.054, 0.374] (100 held-out examples); its "
                "accuracy differs by +4.0 points [-1.5, +9.5]. Against the base model, its answer "
                "loss is 5.110 nats per token lower [4.500, 5.720] (100 held-out examples).",
                code="better_than_random",
                advice=["This is one seed: the interval knows the noise of the questions, not that "
                        "of training. `selectune compare` repeats it over several."],
            )
        },
        facts={
            "Base model": "SmolLM2-135M-Instruct, bfloat16",
            "Adapter": "LoRA, rank 8, q k v o",
            "Targets": "24 examples of csqa",
            "Seed": "0",
            "Device": "2 CPU cores",
        },
        method="gist",
        method_summary="GIST: examples whose gradient points where the target's gradients point.",
        pool=pool,
        selected_ids=ids,
        levels=levels_of("csqa"),
        differences=differences_of("csqa"),
        spectra=[TargetSpectrum(task="csqa", eigenvalues=eigenvalues.tolist(), rank=17)],
        best=shown(pool, ids[:7], is_selected=True),
        worst=shown(pool, worst, is_selected=False),
        loss_curves={"selected": curve(8.1, 1.6, 104, 1), "random": curve(8.6, 2.4, 104, 2)},
        phases=[
            Phase(name="prepare", seconds=11.2, peak_bytes=640_000_000),
            Phase(name="warm up", seconds=34.9, peak_bytes=1_720_000_000, pool_epochs=0.05),
            Phase(name="score", seconds=231.0, peak_bytes=2_110_000_000, pool_epochs=1.02),
            Phase(name="select", seconds=0.2, peak_bytes=650_000_000),
            Phase(name="tune selected", seconds=118.4, peak_bytes=1_830_000_000, pool_epochs=0.2),
            Phase(name="tune random", seconds=121.0, peak_bytes=1_810_000_000, pool_epochs=0.2),
            Phase(name="evaluate", seconds=96.3, peak_bytes=1_420_000_000, note="base reused"),
        ],
        left_out={"equal to a target or held-out row": 3, "duplicate of an earlier row": 12},
        warnings=["4 of 1,050 pool examples were cut at 512 tokens."],
        recipe_yaml=_RECIPE,
        run={"selectune": "0.1.0", "torch": "2.13.0", "seed": 0, "threads": 2,
             "note": SCRIPT},
    )  # fmt: skip


def wide_run(full_run: ReportData) -> ReportData:
    """Return a run with 40 sources, five tasks, odd names, huge texts and many warnings."""
    names = (ARABIC, SCRIPT, "ソース" * 12, "x" * 300, "\u202eevil", "nul\x00byte", "half\ud800")
    sources = (*names, *(f"source-{i:02d}" for i in range(33)))
    pool = pool_of(sources, 30, seed=3)
    tasks = ("csqa", "siqa", ARABIC, "piqa", SCRIPT)
    rng = np.random.default_rng(4)
    score = {task: pool.scores[""] + rng.normal(0, 0.03, len(pool.ids)) for task in tasks}
    score["csqa"][:5] = -np.inf
    wide = dataclasses.replace(
        pool,
        scores=score,
        energy={task: np.clip(pool.energy[""] + 0.05 * k, 0, 1) for k, task in enumerate(tasks)},
    )
    ids = best_ids(wide, 60)
    text = "Worse than not tuning. Against the base model, its answer loss is 0.9 nats higher."
    return dataclasses.replace(
        full_run,
        title=f"{SCRIPT} · {ARABIC}",
        pool=wide,
        selected_ids=ids,
        verdicts={
            t: Verdict(
                text=text, code="worse_than_base", advice=["Lower `tune.learning_rate` by 3."]
            )
            for t in tasks
        },
        levels=[x for k, t in enumerate(tasks) for x in levels_of(t, 0.4 * k)],
        differences=[x for k, t in enumerate(tasks) for x in differences_of(t, 0.13 * k)],
        spectra=[
            TargetSpectrum(task=t, eigenvalues=np.exp(-np.arange(9 + 60 * k) / 4).tolist(), rank=5)
            for k, t in enumerate(tasks)
        ],
        loss_curves={
            a: curve(8, 2, 2000, k)
            for k, a in enumerate(("selected", "random", "length", "perplexity"))
        }
        | {"gradient cosine": [(1, 3.0), (2, float("nan")), (3, 2.0)]},
        warnings=[f"warning {i}: {SCRIPT} {ARABIC}" for i in range(30)],
    )


def bare_run() -> ReportData:
    """Return a run by a method without gradients that was never evaluated."""
    pool = pool_of(("pool",), 40)
    bare = dataclasses.replace(pool, energy={})
    return ReportData(
        title="random", pool=bare, selected_ids=best_ids(bare, 2), recipe_yaml="", method="random"
    )


def steps_of(
    n_layers: int = 30,
    n_steps: int = 400,
    *,
    batch: int = 16,
    n_active: int | None = None,
    picks: bool = True,
    seed: int = 0,
    arm: str = "selected",
) -> TrainingFacts:
    """Return the facts of a method that draws `n_active` layers and picks half of each batch.

    Upper layers gain importance; neighbours share much of what they like; short answers are liked.
    """
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(2.2, 0.8, 600), 1, 120).astype(int)
    ids = [f"{i:016x}-0" for i in range(600)]
    place = np.arange(n_layers)
    lean = 1.3 * np.exp(-(((place - 0.7 * n_layers) / (0.18 * n_layers)) ** 2)) - 0.5
    u = np.zeros(n_layers)
    records: list[tuple[int, dict[str, Any]]] = []
    for step in range(n_steps):
        facts: dict[str, Any] = {}
        if n_active is not None and step % 10 == 0:
            u -= (step > 0) * rng.normal(40 * lean / n_steps, 0.12)
            facts["importance"] = (1 / (1 + np.exp(u))).tolist()
        draw = rng.gumbel(size=n_layers) - np.log1p(np.exp(u))
        active = np.sort(np.argsort(-draw)[: n_active or n_layers]).tolist()
        facts["active"] = active
        if picks:
            facts |= _picks_of(rng, n_layers, active, lengths, ids, batch, 1 - 0.7 * step / n_steps)
        records.append((step, facts))
    n_tokens = dict(zip(ids, lengths.tolist(), strict=True))
    return TrainingFacts(arm=arm, n_layers=n_layers, records=records, n_tokens=n_tokens)


def _picks_of(
    rng: np.random.Generator,
    n_layers: int,
    active: list[int],
    lengths: np.ndarray,
    ids: list[str],
    batch: int,
    scale: float,
) -> dict[str, Any]:
    rows = rng.choice(len(ids), batch, replace=False)
    taste = np.cumsum(rng.normal(0, 0.35, (n_layers, batch)), 0) + rng.normal(0, 1, batch)
    taste -= 0.6 * np.log(lengths[rows] / 9)
    size = scale * 2e-3 * (1 + 2 * np.arange(n_layers) / n_layers)
    found: dict[str, list[Any]] = {
        k: [None] * n_layers for k in ("alignment_mean", "alignment_std", "max_z", "tokens")
    }
    picks: dict[str, str] = {}
    for i in active:
        score = size[i] * (0.4 + taste[i])
        z = (score - score.mean()) / score.std()
        chosen = np.argsort(-(z + rng.gumbel(size=batch)))[: batch // 2]
        found["alignment_mean"][i] = float(score.mean())
        found["alignment_std"][i] = float(score.std())
        found["max_z"][i] = float(np.abs(z).max())
        found["tokens"][i] = int(lengths[rows[chosen]].sum())
        picks[str(i)] = "".join("1" if n in chosen else "0" for n in range(batch))
    return {**found, "picks": picks, "examples": [ids[r] for r in rows]}


def method_run(full_run: ReportData) -> ReportData:
    """Return the full run, trained by a method that draws layers and picks examples for each."""
    return dataclasses.replace(
        full_run,
        training=[
            steps_of(n_active=8),
            steps_of(n_layers=12, n_steps=40, arm=SCRIPT, seed=1),
            steps_of(n_layers=80, n_steps=300, n_active=20, picks=False, arm=ARABIC, seed=2),
        ],
        weights=weight_facts("selected", SCRIPT, ARABIC),
        token_maps=[token_map(SCRIPT), token_map(ARABIC)],
    )


def token_map(source: str, form: str = "loss", n: int = 5) -> TokenMap:
    """Return an example whose last n tokens have scores, from a helpful one to a harmful one."""
    return TokenMap(
        id=f"{source}-0",
        task=source,
        source=source,
        place=1,
        n=1,
        form=form,
        score=0.5,
        tokens=["Question:", f" {source}", "\nAnswer:", *(f" t{k}" for k in range(n))],
        scores=[None, None, None, *np.linspace(1, -0.5, n).tolist()],
    )
