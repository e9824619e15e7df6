"""The steps of one run, each resumable: score, select, tune, evaluate, report.

Every step reads what earlier steps left on disk, does what is missing, and puts itself on record in
run.json. The same command again goes on where the last one stopped.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from selectune.adapters import adapter_fingerprint, checkpoints_fingerprint, load_tuned
from selectune.errors import ConfigError, CorruptFileError, DataError
from selectune.evaluation import Evaluation, Verdict, check_questions, together, verdict
from selectune.files import (
    CLAIMS,
    MANIFEST,
    Alone,
    Crew,
    KillPoint,
    is_complete,
    kill_point,
    lock,
    sha256_file,
    share,
    sweep,
    write_file,
)
from selectune.methods.evidence import ReadsCheckpoints
from selectune.methods.rules import Budget
from selectune.models import model_is_package
from selectune.offsite.plugin_files import KIND as PLUGIN_KIND
from selectune.offsite.plugin_saving import save_plugin
from selectune.pipeline.answered import Respondent, rank_options
from selectune.pipeline.arms import (
    BASE,
    SELECTED,
    TunedArm,
    choose,
    control_selection,
    source_of,
    tune_arm,
)
from selectune.pipeline.economy import told_fast
from selectune.pipeline.foresee import refuse_unworkable
from selectune.pipeline.ground import Ground, digest
from selectune.pipeline.measure import Measured
from selectune.pipeline.outcome import Outcome
from selectune.pipeline.plan import make_plan
from selectune.pipeline.processes import Part
from selectune.pipeline.record import Record, precision_input
from selectune.pipeline.reselection import Source
from selectune.pipeline.run_files import (
    CHOSEN,
    METRICS,
    SCORES,
    count_sources,
    read_own_scores,
    write_chosen,
    write_metrics,
)
from selectune.pipeline.scoring import score_pool, share_passes, shares_passes
from selectune.pipeline.story import tell
from selectune.pipeline.telling import evaluation_facts, evaluation_lines, told_scores
from selectune.pipeline.token_scoring import FILES as TOKENS
from selectune.pipeline.token_scoring import (
    Form,
    named,
    rank_rule,
    read_tokens,
    token_scores,
    write_tokens,
)
from selectune.pipeline.warmup import warmup_tuning
from selectune.progress import Progress, Silent
from selectune.recipe import Recipe
from selectune.recipe.methods import PLAIN
from selectune.recipe.package import fitted
from selectune.registry import get
from selectune.report import write_report
from selectune.selection import Scores, Selection

PLUGIN = "plugin"


class Run:
    """One run of a recipe in a folder.

    Args:
        recipe: what to do.
        out: the run's folder; made when missing.
        shared: a folder for work that several runs have in common (`compare` gives one).
        tasks: the target tasks this run is about; None for all.
        allow: what may differ from what the folder was made with: recipe keys or sections,
            "data" (the files too), "adapter_files", "score_file", "precision", "libraries".
        progress: told of every long step.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        out: Path,
        shared: Path | None = None,
        tasks: Sequence[str] | None = None,
        allow: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        recipe = fitted(recipe)
        self.recipe, self.out = recipe, out
        self._allow = allow
        self.ground = Ground(
            recipe,
            out,
            shared=shared,
            tasks=tasks,
            progress=progress or Silent(),
        )
        self._scores: Scores | None = None
        self._arms: list[TunedArm] | None = None
        self._answers: dict[str, dict[str, Evaluation]] | None = None
        self._is_locked = False
        self._leads = ""

    def plan(self) -> Outcome:
        """Say what would train, on what, at what price; nothing is written."""
        return make_plan(self.ground)

    def score(self) -> Outcome:
        """Score every candidate."""
        with self._writing():
            scores = self._ensure_scores()
            entry = self._record.entry("score")
            facts = {"scores": str(self.out / SCORES), **(entry["facts"] if entry else {})}
            return Outcome(facts, [told_scores(scores), f"scores: {self.out / SCORES}"])

    def share(self, part: Part) -> Outcome:
        """Do one process's part of the gradient passes, beside others in the same folder.

        All that share a folder have the same recipe, data and libraries (`Record`) and the same
        weights (the store's identity). The leader of a launch stays until all is done; the next
        step it does alone, once the others have left.

        Args:
            part: which of the processes this is.

        Raises:
            ConfigError: the scorer takes no gradients, so there is nothing to share.
            StorageError: another process writes there.
            IncompatibleRunError: the folder is another run's, or others see other inputs.
        """
        method = self.recipe.score.method
        if not shares_passes(method):
            if not part.launch:
                raise ConfigError(
                    f"{method} cannot be scored in shards",
                    where="command line, --shard",
                    why="only gradient passes are shared, and it takes none",
                    do="leave --shard out",
                )
            self.ground.progress.note(f"{method} takes no gradients: one process scores")
            return Outcome({})
        with share(self.out, launch=part.launch) as is_held:
            outcome = self._share(part) if is_held else Outcome({}, ["all is scored"])
        self._leads = part.launch
        return outcome

    def _share(self, part: Part) -> Outcome:
        section = self.recipe.score
        crew = Crew(
            self.out / CLAIMS, index=part.index, n=part.n,
            is_fixed=not part.launch, waits=part.is_leader,
            instead=f"run `selectune score RECIPE --shard 1/{part.n}` to its end, then the other "
            "shards, then `selectune score RECIPE`",
        )  # fmt: skip
        self.ground.hands = crew
        try:
            with crew.turn("run", lambda: (self.out / "run.json").exists()):
                _ = self._record
            if self._record.done("score", self._score_fingerprint()) is not None:
                return Outcome({"is_complete": True}, ["all is scored"])
            worked = share_passes(self.ground, section.method, dict(section.options))
        finally:
            self.ground.hands = Alone()
            crew.close()
        facts = {
            "shard": f"{part.index + 1}/{part.n}",
            "n_computed": worked.n_computed,
            "n_done": worked.n_done,
            "n_shards": worked.n_shards,
            "is_complete": worked.is_complete,
        }
        text = [
            f"shard {facts['shard']}: {worked.n_computed} shards of the store computed here, "
            f"{worked.n_done} of {worked.n_shards} done",
            "now `selectune score` without --shard"
            if worked.is_complete
            else "when the others are done: `selectune score` without --shard",
        ]
        return Outcome(facts, text)

    def refuse_early(self, verb: str) -> None:
        """Tell before the pool is scored what a verb would stumble over afterwards.

        Args:
            verb: what will be done with the scores, by its name on the command line.
        """
        if verb in ("run", "tune"):
            refuse_unworkable(self.ground, [self.recipe.tune])
        if verb == "evaluate":
            need_heldout(self.recipe)
        if verb in ("run", "evaluate"):
            self._refuse_unanswerable()
        if verb != "score":
            self._refuse_small_pool()

    def select(self) -> Outcome:
        """Choose examples within the budget."""
        with self._writing():
            selection = self._ensure_selection()
            by_source = count_sources(self.ground, selection)
            facts = {
                "n_selected": len(selection),
                "n_pool": len(selection.universe),
                "by_source": by_source,
                "files": [str(self.out / name) for name in CHOSEN],
            }
            mix = ", ".join(f"{source} {n}" for source, n in by_source.items())
            text = [
                f"{len(selection)} of {len(selection.universe)} pool examples chosen: {mix}",
                f"files: {self.out / CHOSEN[0]}, {self.out / CHOSEN[1]}",
            ]
            return Outcome(facts, text)

    def tokens(self, *, form: Form = "loss", ids: Sequence[str] = ()) -> Outcome:
        """Score the tokens of the chosen examples.

        Args:
            form: by whose loss asks for the target's direction, or by where modules answer.
            ids: candidates to look at instead of the selection.

        Raises:
            ConfigError: the pool has no such candidate, or the model no forward-mode derivative.
            CoverageError: what trains cannot be split by position.
        """
        with self._writing():
            facts = self._ensure_tokens(form, tuple(dict.fromkeys(ids)))
            text = [
                f"{task}: {of['n_positive']:,} of {of['n_tokens']:,} tokens of "
                f"{facts['n_examples']} examples help, rank {of['rank']}"
                for task, of in facts["tasks"].items()
            ]
            files = [str(self.out / name) for name in TOKENS]
            text.append(f"files: {', '.join(files)}; `selectune report` draws some of them")
            return Outcome({**facts, "files": files}, text)

    def tune(self) -> Outcome:
        """Tune an adapter on the selection, and one per control."""
        with self._writing():
            self.refuse_early("tune")
            arms = self._ensure_arms()
            facts = {
                a.name: {
                    "path": str(a.path),
                    "n_examples": a.n_examples,
                    "n_steps": a.result.n_steps,
                    "last_loss": a.result.losses[-1][1],
                }
                for a in arms
            }
            text = [
                f"{a.name}: {a.n_examples} examples, {a.result.n_steps} steps, training loss "
                f"{a.result.losses[0][1]:.3f} -> {a.result.losses[-1][1]:.3f}, adapter {a.path}"
                for a in arms
            ]
            plugin = self._record.entry("plugin")
            if plugin is not None:
                text.append(f"plugin: {plugin['facts']['path']}, for the model's owner")
            return Outcome({"arms": facts, "plugin": plugin and plugin["facts"]["path"]}, text)

    def evaluate(self) -> Outcome:
        """Ask base and arms the held-out questions, and compare.

        Raises:
            ConfigError: the recipe names no held-out data.
        """
        need_heldout(self.recipe)
        with self._writing():
            answers = self._ensure_answers()
            found = self._verdict(answers)
            return Outcome(evaluation_facts(answers, found), evaluation_lines(answers, found))

    def report(self) -> Outcome:
        """Write the report of what is there."""
        with self._writing():
            path = self._write_report()
            return Outcome({"report": str(path)}, [f"report: {path}"])

    def all(self) -> Outcome:
        """Do every step, and end with a plain verdict."""
        with self._writing():
            self.refuse_early("run")
            selection = self._ensure_selection()
            self._ensure_arms()
            facts: dict[str, Any] = {"n_selected": len(selection)}
            fast = self._ensure_scores().about.get("fast")
            text = [told_fast(fast)] if fast else []
            text.append(f"{len(selection)} of {len(selection.universe)} pool examples chosen")
            if self.recipe.data.heldout is not None:
                answers = self._ensure_answers()
                found = self._verdict(answers)
                facts |= evaluation_facts(answers, found)
                text += evaluation_lines(answers, found)
            else:
                text.append("no verdict: data.heldout names no held-out examples")
            path = self._write_report()
            facts["report"] = str(path)
            return Outcome(facts, [*text, f"report: {path}"])

    def answers(self) -> dict[str, dict[str, Evaluation]]:
        """Do what is missing up to the evaluation; return arm -> task -> answers."""
        with self._writing():
            return self._ensure_answers()

    @cached_property
    def _record(self) -> Record:
        inputs = {
            "data": self.ground.prepared.fingerprint,
            "adapter_files": self._own_adapter,
            "precision": precision_input(self.recipe.model),
            **_outside_scores(self.recipe),
        }
        return Record(self.out, self.recipe, allow=self._allow, inputs=inputs)

    def _writing(self) -> ExitStack:
        """Hold the folder for this process while a step writes into it."""
        stack = ExitStack()
        if not self._is_locked:
            # A leader waits until the others of its launch have left.
            leads = self._leads
            stack.enter_context(lock(self.out, waits=bool(leads), launch=leads))
            sweep(self.out)
            self._is_locked = True
            stack.callback(self._unlock)
        _ = self._record
        return stack

    def _unlock(self) -> None:
        self._is_locked = False

    @cached_property
    def _own_adapter(self) -> str:
        """A hash of what is read of the user's own adapter; empty without one."""
        own, section = self.recipe.model.adapter, self.recipe.score
        if own is None:
            return ""
        entry = get("data_scorer", section.method)
        if "checkpoints" not in entry.needs:
            return adapter_fingerprint(own)
        reading: ReadsCheckpoints = entry.parse(dict(section.options))
        return checkpoints_fingerprint(own, reading.epochs)

    def _score_fingerprint(self) -> str:
        recipe, targets = self.recipe, self.ground.prepared.targets
        return digest(
            {
                "model": recipe.model.model_dump(mode="json"),
                "adapter": recipe.adapter.model_dump(mode="json"),
                "warmup": recipe.warmup.model_dump(mode="json"),
                "tune": warmup_tuning(recipe).model_dump(mode="json", exclude={"controls"}),
                "score": recipe.score.model_dump(mode="json"),
                "data": [recipe.data.max_length, recipe.data.loss_on],
                "tokens": self.ground.tokens.fingerprint,
                "adapter_files": self._own_adapter,
                "tasks": {t: [(e.id, e.group) for e in targets[t]] for t in self.ground.tasks},
                "seed": recipe.seed,
                **_outside_scores(recipe),
            }
        )

    def _ensure_scores(self) -> Scores:
        if self._scores is not None:
            return self._scores
        fingerprint = self._score_fingerprint()
        path = self.out / SCORES
        if (entry := self._record.done("score", fingerprint)) is not None:
            self.ground.expected_base = entry["facts"].get("base")
            self._scores = read_own_scores(path)
            self._recall_costs()
            return self._scores
        section = self.recipe.score
        with Measured() as measured:
            scores = score_pool(self.ground, section.method, dict(section.options))
        scores.save(path)
        facts = {"method": scores.method, "n": len(scores), "about": dict(scores.about)}
        facts |= {"base": self.ground.seen_base, "costs": dict(self.ground.costs)}
        self._record.write("score", fingerprint, cost=measured, files=[SCORES], facts=facts)
        kill_point(KillPoint.SCORES_DONE)
        self._scores = scores
        return scores

    def _recall_costs(self) -> None:
        for entry in self._record.steps.values():
            self.ground.costs |= entry["facts"].get("costs", {})

    def _refuse_small_pool(self) -> None:
        pool = self.ground.tokens.pool
        Budget.of(self.recipe.select.budget, len(pool), int(pool.lengths.sum()))

    def _ensure_selection(self) -> Selection:
        # A budget that the pool cannot fill is told before the gradients, which may take hours.
        self._refuse_small_pool()
        scores = self._ensure_scores()
        fingerprint = digest(
            {
                "scores": self._score_fingerprint(),
                "select": self.recipe.select.model_dump(mode="json"),
                "sources": self.ground.prepared.sources,
                "dropped": self.ground.dropped,
            }
        )
        folder = self.out / "selection"
        if self._record.done("select", fingerprint) is not None:
            return Selection.from_pretrained(folder, fingerprint=fingerprint)
        with Measured() as measured:
            selection = choose(self.ground, scores, fingerprint)
            selection.save_pretrained(folder)
            write_chosen(self.out, self.ground, scores, selection)
        facts = {"n_selected": len(selection), "by_source": count_sources(self.ground, selection)}
        self._record.write("select", fingerprint, cost=measured, files=CHOSEN, facts=facts)
        kill_point(KillPoint.SELECTION_DONE)
        return selection

    def _tokens_fingerprint(self, form: Form, ids: Sequence[str]) -> str:
        facts = {"scores": self._score_fingerprint(), "ids": list(ids), "form": form}
        return digest({**facts, "rule": rank_rule(self.recipe, self.recipe.tune.tokens)})

    def _ensure_tokens(self, form: Form, ids: Sequence[str]) -> Mapping[str, Any]:
        asked = named(self.ground, ids)
        wanted = ids or self._ensure_selection().ids
        fingerprint = self._tokens_fingerprint(form, wanted)
        if (entry := self._record.done("tokens", fingerprint)) is not None:
            return entry["facts"]
        with Measured() as measured:
            # In the pool's order, as the selection is trained on.
            chosen = set(wanted)
            items = asked or [t for t in self.ground.tokens.pool if t.id in chosen]
            rule = rank_rule(self.recipe, self.recipe.tune.tokens)
            label = "named examples" if ids else SELECTED
            by_task = token_scores(self.ground, items, rule=rule, form=form, label=label)
            write_tokens(self.out, self.ground, wanted, by_task)
        facts = {
            "form": form,
            "ids": list(ids),
            "n_examples": len(items),
            "tasks": {one.task: one.to_json() for one in by_task},
            "costs": dict(self.ground.costs),
        }
        self._record.write("tokens", fingerprint, cost=measured, files=TOKENS, facts=facts)
        return facts

    def _found_tokens(self, selection: Selection) -> list[dict[str, Any]]:
        """Return the token scores that `tokens` left of today's selection, none where it has not.

        Raises:
            CorruptFileError: they are not what run.json says.
        """
        entry = self._record.entry("tokens")
        if entry is None:
            return []
        ids = entry["facts"]["ids"] or selection.ids
        fingerprint = self._tokens_fingerprint(entry["facts"]["form"], ids)
        return read_tokens(self.out) if self._record.done("tokens", fingerprint) else []

    def _ensure_arms(self) -> list[TunedArm]:
        if self._arms is None:
            self._arms = self._tuned_arms()
        return self._arms

    def _tuned_arms(self) -> list[TunedArm]:
        selection = self._ensure_selection()
        tuning, section = self.recipe.tune, self.recipe.score
        if tuning.tokens is not None:
            self._ensure_tokens("loss", ())
        source = self._source(section.method, section.options, self._ensure_scores())
        arms = [tune_arm(self.ground, SELECTED, selection, source=source)]
        for name in tuning.controls:
            is_plain = name == PLAIN
            ids = selection if is_plain else control_selection(self.ground, name)
            how = tuning.plainly() if is_plain else tuning
            source = None if is_plain else self._source(name, {})
            arms.append(tune_arm(self.ground, name, ids, tuning=how, source=source))
        write_metrics(self.out, arms)
        facts = {
            arm.name: {
                "path": str(arm.path),
                "n_examples": arm.n_examples,
                "n_steps": arm.result.n_steps,
                "n_trainable": arm.result.n_trainable,
                "n_moved": arm.result.n_moved,
                **({"reselected": list(map(asdict, arm.refreshes))} if arm.refreshes else {}),
            }
            for arm in arms
        }
        cost = {
            "seconds": sum(arm.result.seconds for arm in arms),
            "peak_bytes": max(arm.result.peak_bytes for arm in arms),
        }
        fingerprint = digest({"selection": selection.fingerprint, "arms": facts})
        self._record.write(
            "tune", fingerprint, cost=cost, files=[METRICS],
            facts={"arms": facts, "costs": dict(self.ground.costs)},
        )  # fmt: skip
        self._write_plugin(arms[0])
        return arms

    def _source(
        self, name: str, options: Mapping[str, Any], scores: Scores | None = None
    ) -> Source | None:
        if self.recipe.tune.reselect_every is None:
            return None
        return source_of(self.ground, name, options, scores=scores)

    def _write_plugin(self, arm: TunedArm) -> None:
        """Write what an emulator's owner takes back, and nothing else; with other bases nothing."""
        package, out = self.recipe.model.base, self.out / PLUGIN
        if not model_is_package(package):
            return
        fingerprint = sha256_file(arm.path / MANIFEST)
        if self._record.done("plugin", fingerprint) and is_complete(out, PLUGIN_KIND):
            return
        with Measured() as measured:
            save_plugin(load_tuned(self.ground.base(), arm.path), package, out)
        self._record.write("plugin", fingerprint, cost=measured, facts={"path": str(out)})

    def _ensure_answers(self) -> dict[str, dict[str, Evaluation]]:
        if self._answers is None:
            self._answers = self._evaluated_arms()
        return self._answers

    def _evaluated_arms(self) -> dict[str, dict[str, Evaluation]]:
        arms = self._ensure_arms()
        questions = {
            task: self.ground.prepared.heldout[task]
            for task in self.ground.tasks
            if task in self.ground.prepared.heldout
        }
        paths: dict[str, Path | None] = {BASE: None, **{arm.name: arm.path for arm in arms}}
        answers = {
            name: rank_options(self.ground, Respondent.arm(self.ground, name, path), questions)
            for name, path in paths.items()
        }
        found = self._verdict(answers)
        facts = evaluation_facts(answers, found)
        if self.recipe.evaluate.lm_eval:
            facts["lm_eval"] = self._lm_eval(paths)
        text = json.dumps(facts, indent=2, ensure_ascii=False)
        write_file(self.out / "evaluation.json", text.encode())
        fingerprint = digest({"facts": facts})
        self._record.write(
            "evaluate", fingerprint, cost={}, files=["evaluation.json"],
            facts={"costs": dict(self.ground.costs)},
        )  # fmt: skip
        return answers

    def _refuse_unanswerable(self) -> None:
        """Tell before anything is trained what evaluation would stumble over at the end."""
        section = self.recipe.evaluate
        for questions in self.ground.prepared.heldout.values():
            asked = questions[: section.limit]
            check_questions(asked, self.ground.tokenizer, self.recipe.data.max_length)
        if section.lm_eval:
            from selectune.evaluation.harness import need_lm_eval

            need_lm_eval()

    def _lm_eval(self, paths: Mapping[str, Path | None]) -> dict[str, Any]:
        from selectune.evaluation.harness import run_lm_eval

        found: dict[str, Any] = {}
        for name, path in paths.items():
            base = self.ground.base()
            model = base.model if path is None else load_tuned(base, path)
            found[name] = run_lm_eval(
                model,
                base.tokenizer,
                self.recipe.evaluate.lm_eval,
                max_length=self.recipe.data.max_length,
                limit=self.recipe.evaluate.limit,
                seed=self.recipe.seed,
            )
        return found

    def _verdict(self, answers: Mapping[str, Mapping[str, Evaluation]]) -> Verdict:
        def joined(arm: str) -> Evaluation | None:
            return together(answers[arm]) if arm in answers else None

        selected = joined(SELECTED)
        assert selected is not None
        return verdict(
            selected,
            joined("random"),
            joined(BASE),
            n_boot=self.recipe.evaluate.intervals,
            seed=self.recipe.seed,
        )

    def _write_report(self) -> Path:
        scores, selection = self._ensure_scores(), self._ensure_selection()
        arms = self._ensure_arms() if self._record.entry("tune") else []
        answers = self._ensure_answers() if self._record.entry("evaluate") else {}
        found = self._verdict(answers) if answers else None
        data = tell(
            self.ground,
            scores=scores,
            selection=selection,
            arms=arms,
            answers=answers,
            verdict=found,
            tokens=self._found_tokens(selection),
            run=self._record.to_json(),
        )
        path = write_report(self.out, data)
        kill_point(KillPoint.REPORT_DONE)
        return path


def need_heldout(recipe: Recipe) -> None:
    """Refuse a recipe without held-out data.

    Raises:
        ConfigError: there is none.
    """
    if recipe.data.heldout is None:
        raise ConfigError(
            "there is nothing to evaluate on",
            where="data.heldout",
            why="the recipe names no held-out examples",
            do="give data.heldout: examples of the task that neither pool nor target holds",
        )


def _outside_scores(recipe: Recipe) -> dict[str, str]:
    """Return the sha256 of the file that the recipe's scorer reads; nothing for other scorers.

    Raises:
        DataError: there is no such file.
    """
    entry = get("data_scorer", recipe.score.method)
    if "file" not in entry.needs:
        return {}
    path = Path(str(recipe.score.options["path"])).expanduser()
    try:
        return {"score_file": sha256_file(path.resolve())}
    except CorruptFileError as error:
        raise DataError(
            f'the scores "{path.name}" do not exist',
            where="score.options.path",
            why=error.what,
            do="check the path; it is relative to where you stand",
        ) from error
