"""GAST: every layer learns from the examples that pull it towards the target.

    a_n = <g_n, target gradient>     z = (a - mean a) / std a     p = softmax(z / temperature)
    draw k of n by p, none twice     gradient of the layer = mean of the picked g_n

Paper  "GAST: Gradient-aligned Sparse Tuning of Large Language Models with Data-layer Selection",
  arXiv 2603.09865 (EACL 2026), eq. 9-11. No code is public. Ours: "none twice", the mean of picks,
  a decoder block as the layer, target examples without dropout.
Cost   Time: one pass over `target_batch` examples every `refresh_every` steps, and about one
  percent for the picks. Memory: one copy of the trained weights for the target gradient, and one
  layer's gradients per example.
Fails  When the target is a few noisy examples the draw is close to chance: run pick="random" beside
  it. pick="topk" never learns from half of the examples. A micro-batch of 2 knows only better and
  worse. Raw inner products prefer examples with short answers, whose gradients are long.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, cast

from pydantic import Field
from transformers import TrainerCallback

from selectune.errors import ConfigError
from selectune.registry import get, training_method
from selectune.training.aligned import AlignedSession, Aligning, Form
from selectune.training.method import BatchSource, Method, Scene, Session
from selectune.training.picks import Aggregate
from selectune.training.sources import TokenSource, as_source


@training_method("gast")
@dataclass(frozen=True, slots=True, kw_only=True)
class GAST(Method):
    """Examples chosen for each layer, by alignment with the target gradient."""

    target: Annotated[
        Any,
        Field(
            description='where target examples come from: "pool" is the training set itself '
            '(paper), "target" the target examples; from Python also rows or a data set'
        ),
    ] = "pool"
    keep: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)],
        Field(description="share of each batch that a layer learns from, or a number of examples"),
    ] = 0.5
    pick: Annotated[str, Field(description="row picker; `selectune methods` lists them")] = (
        "softmax"
    )
    temperature: Annotated[float, Field(gt=0, description="of the softmax")] = 1.0
    score: Annotated[
        Literal["dot", "cosine"], Field(description="inner product (paper) or cosine")
    ] = "dot"
    target_batch: Annotated[int, Field(ge=1, description="target examples in one target pass")] = 4
    refresh_every: Annotated[
        int, Field(ge=1, description="optimizer steps between target passes (paper: 1)")
    ] = 1
    momentum: Annotated[
        float, Field(ge=0, lt=1, description="share of the old target gradient that stays (ours)")
    ] = 0.0
    granularity: Annotated[
        Literal["layer", "module"],
        Field(description="what picks: a decoder block, or every module by itself"),
    ] = "layer"
    aggregate: Annotated[
        Aggregate,
        Field(
            description='"mean" of the picks; "share" leaves the rest out of the sum; "unbiased" '
            "divides by the odds, which undoes the tilt (a control)"
        ),
    ] = "mean"
    form: Annotated[
        Form,
        Field(
            description='"separate" target pass; "two_pass" scores the batch before training on '
            'it; "concat" takes the last target_batch rows of each batch for targets (bare loops)'
        ),
    ] = "separate"
    pick_scope: Annotated[
        Literal["local", "global"],
        Field(description="with several processes: pick from one's own examples, or from all"),
    ] = "local"
    loss_weighting: Annotated[
        Literal["auto", "token", "example"],
        Field(description="how the training loss weighs examples; auto finds it out"),
    ] = "auto"
    sampler: Annotated[
        Any,
        Field(description="layer sampler, such as ist: the other layers neither train nor cost"),
    ] = None
    sampler_options: Annotated[
        dict[str, Any] | None, Field(description="options of the layer sampler")
    ] = None

    @property
    def reads_target(self) -> bool:
        """Whether the method, or the sampler inside it, looks at the scene's target examples."""
        sampler = layer_sampler(self)
        is_aim = isinstance(self.target, str) and self.target == "target"
        return is_aim or (sampler is not None and sampler.reads_target)

    def callback(self, *, seed: int | None = None) -> TrainerCallback:
        """Return the method as a callback; see `Method.callback`.

        Raises:
            ConfigError: form is concat, and a trainer makes its batches without targets.
        """
        if self.form == "concat":
            raise ConfigError(
                "form=concat cannot be used in a trainer",
                where="form",
                why="the loop has to append target rows to every batch, and a trainer does not",
                do="use form=separate, or a loop of your own",
            )
        return Method.callback(self, seed=seed)

    def start(self, scene: Scene) -> Session:
        """Hook gates onto the layers.

        Raises:
            ConfigError: the options contradict each other or this scene.
            SelectionError: the model has nothing to train in its layers.
        """
        return start(self, scene, is_shared=False)


def start(options: GAST, scene: Scene, *, is_shared: bool) -> AlignedSession:
    """Return the session of GAST or a relative.

    Args:
        options: checked here against each other.
        scene: the model and what is around it.
        is_shared: one pick for all layers.
    """
    picker = get("row_picker", options.pick, where="pick")
    if "gram" in picker.needs and options.form != "two_pass":
        raise ConfigError(
            f"pick={options.pick} needs form=two_pass",
            where="form",
            why="it compares gradients at their true size, which a loss in training hides",
            do="set form=two_pass",
        )
    if options.pick_scope == "global" and "gram" in picker.needs:
        raise ConfigError(
            f"pick={options.pick} cannot pick from the examples of all processes",
            where="pick_scope",
            why="it compares every two of them, and their gradients stay where they are",
            do="set pick_scope=local",
        )
    if is_shared and options.form != "two_pass":
        raise ConfigError(
            "one pick for all layers needs form=two_pass",
            where="form",
            why="the first layer would have to pick before the others are known",
            do="set form=two_pass, or pick per layer",
        )
    # Not by `asdict`, which copies a whole data set.
    about = {
        f.name: getattr(options, f.name)
        for f in fields(options)
        if f.name not in {"target", "sampler"}
    }
    sampler = layer_sampler(options)
    about["sampler"] = None if sampler is None else repr(sampler)
    if options.loss_weighting != "auto":
        scene = replace(scene, weighting=options.loss_weighting)
    how = Aligning(
        keep=options.keep,
        pick=picker.function,
        needs=cast("frozenset[str]", picker.needs),
        score=options.score,
        is_shared=is_shared,
        is_same_noise=options.pick == "random_shared",
        granularity=options.granularity,
        target_batch=options.target_batch,
        refresh_every=options.refresh_every,
        momentum=options.momentum,
        temperature=options.temperature,
        aggregate=options.aggregate,
        form=options.form,
        pick_scope=options.pick_scope,
    )
    is_read = "score" in picker.needs and options.form != "concat"
    # Picks that look at no target need none, and concatenated targets come with the batch.
    source = _source(options, scene) if is_read else TokenSource((), pad_id=0)
    session = None if sampler is None else sampler.start(scene)
    try:
        return AlignedSession(scene, how, source, sampler=session, about=about)
    except BaseException:
        if session is not None:
            session.close()
        raise


def layer_sampler(options: GAST) -> Method | None:
    """Return the layer sampler that the options give or name, None without one.

    Raises:
        ConfigError: no such sampler, or a wrong option of it.
    """
    if options.sampler is None or isinstance(options.sampler, Method):
        return options.sampler
    entry = get("training_method", str(options.sampler), where="sampler")
    if issubclass(entry.options, GAST):
        raise ConfigError(
            f"{entry.name} chooses examples, not layers",
            where="sampler",
            do="give a layer sampler: ist, rst, lisa or ows",
        )
    return cast("Method", entry.parse(options.sampler_options or {}, where="sampler_options"))


def _source(options: GAST, scene: Scene) -> BatchSource:
    if not isinstance(options.target, str):
        return as_source(options.target, scene)
    if options.target not in ("pool", "target"):
        return as_source(options.target, scene)
    found = scene.pool if options.target == "pool" else scene.target
    if found is None:
        raise ConfigError(
            f'target="{options.target}" is not at hand',
            where="target",
            why="no training set with rows by index was given"
            if options.target == "pool"
            else "no target examples were given",
            do="give target= some rows or a data set, or attach(..., pool=, target=)",
        )
    return found
