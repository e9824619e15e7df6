"""What the steps of a run say of their results, to a person and to a program."""

from collections.abc import Mapping
from typing import Any

from selectune.evaluation import Evaluation, Verdict
from selectune.pipeline.economy import told_fast
from selectune.selection import Scores


def told_scores(scores: Scores) -> str:
    """Return what was scored by what, at which ranks."""
    tasks = scores.about.get("tasks", {})
    ranks = {task: about["rank"] for task, about in tasks.items() if "rank" in about}
    said = f"{len(scores)} examples scored by {scores.method}"
    if ranks:
        said += ", rank " + ", ".join(f"{rank} ({task})" for task, rank in ranks.items())
    fast = scores.about.get("fast")
    return f"{said}\n{told_fast(fast)}" if fast else said


def evaluation_facts(
    answers: Mapping[str, Mapping[str, Evaluation]], found: Verdict
) -> dict[str, Any]:
    """Return all answers in numbers, by arm and task, and the verdict."""
    arms = {
        arm: {task: one.to_json() for task, one in by_task.items()}
        for arm, by_task in answers.items()
    }
    return {"verdict": found.to_json(), "arms": arms}


def evaluation_lines(answers: Mapping[str, Mapping[str, Evaluation]], found: Verdict) -> list[str]:
    """Return a table of the answers, the verdict, and what to try."""
    lines = [f"{'arm':<14}{'task':<12}{'answer loss':>12}{'accuracy':>10}{'n':>6}"]
    for arm, by_task in answers.items():
        for task, one in by_task.items():
            share = "-" if one.accuracy is None else f"{one.accuracy:.3f}"
            lines.append(f"{arm:<14}{task:<12}{one.answer_loss:>12.3f}{share:>10}{one.n:>6}")
    lines += ["", found.text]
    lines += [f"  try: {advice}" for advice in found.advice]
    return lines
