"""The sections of a recipe: name, type, range, default and meaning of every key, once.

Error messages, `selectune methods --keys` and the reference are made from them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from selectune.recipe.methods import PLAIN
from selectune.recipe.words import Like

Text = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Text], Field(min_length=1)]
ByName = Annotated[dict[Text, Text], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Steps = Count | Annotated[float, Field(gt=0, lt=1)]  # a number, or a share of all
NotNegative = Annotated[float, Field(ge=0)]
TokenCount = Annotated[
    str, StringConstraints(pattern=r"^[1-9][0-9]{0,11} tokens$"), Like("20000 tokens")
]
TopLayers = Annotated[
    str, StringConstraints(pattern=r"^top:([1-9][0-9]{0,3}|[1-9][0-9]?%)$"), Like("top:8")
]
WholeShare = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]?%$"), Like("90%")]
RANK_RULE = r"^((energy|split):(0?\.\d+|1(\.0*)?)|loo|gap|full)$"
ONLY_TASK = "target"  # what a target without a name is called
SEED_LIMIT = 2**31  # numpy's legacy generators and transformers' set_seed take no more
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]


class Section(BaseModel):
    """A part of a recipe: exact types, no unknown keys, no later changes."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which base model, and how it is held in memory."""

    base: Text = Field(description="base model: a folder, a Hub name, or demo:model")
    revision: Text | None = Field(default=None, description="branch, tag or commit of a Hub model")
    adapter: Text | None = Field(
        default=None,
        description="folder of a peft adapter to take gradients at, instead of a warm-up; for "
        "less and tracin the output of a Trainer: its checkpoints with their optimizer states",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="type of the base weights; auto: bfloat16 where it is fast"
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        default=None,
        description="hold the base's linear maps in 8 bits, or 4 (nf4), by bitsandbytes; a LoRA or "
        "DoRA beside them trains (QLoRA)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the model runs"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="attention implementation of transformers"
    )


class DataSection(Section):
    """What to choose from, what the task looks like, and what proves the result."""

    pool: Text | Names | ByName = Field(
        description="the training examples to choose from: .jsonl, .json, .parquet, .csv, a folder "
        "saved by datasets, or a Hub name; a mapping names the sources"
    )
    target: Text | ByName = Field(
        description="the few examples that stand for the task; a mapping names several tasks"
    )
    heldout: Text | ByName | None = Field(
        default=None, description="examples that only evaluation reads, named as in data.target"
    )
    format: Literal["auto", "text", "prompt-completion", "messages", "alpaca", "sharegpt"] = Field(
        default="auto", description="the form of a row; auto finds it and says so"
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion", description="which tokens count in the loss"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        default=512, description="tokens kept of one example; the rest is cut off and counted"
    )
    max_empty: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05, description="share of examples that may lose every target token to the cut"
    )
    leakage: Literal["drop", "error", "keep"] = Field(
        default="drop",
        description="what happens to pool rows that equal a target or held-out row, and to target "
        "rows that equal a held-out row",
    )
    duplicates: Literal["drop", "keep"] = Field(
        default="drop", description="what happens to pool rows that equal an earlier one"
    )


class AdapterSection(Section):
    """What is trained."""

    kind: Literal["lora", "dora", "series", "parallel", "prefix", "full"] = Field(
        default="lora",
        description="low-rank factors (lora, dora), bottleneck adapters after or beside modules "
        "(series, parallel), virtual tokens (prefix), or the weights themselves (full)",
    )
    rank: Count = Field(default=8, description="lora, dora: rank of the factors")
    alpha: Positive = Field(
        default=16.0, description="lora, dora: factors are scaled by alpha / rank"
    )
    width: Count = Field(default=256, description="series, parallel: width of the bottleneck")
    activation: Literal["tanh", "relu", "gelu", "silu"] = Field(
        default="tanh", description="series, parallel: what bends inside the bottleneck"
    )
    virtual_tokens: Count = Field(
        default=30, description="prefix: keys and values that each block sees before the text"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="dropout before the factors or bottleneck while tuning; gradients are taken "
        "without",
    )
    modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] | None = Field(
        default=None,
        description="names of the modules that get factors or adapters; null: q_proj, k_proj, "
        "v_proj and o_proj for lora and dora, the end of each MLP for series (down_proj in a "
        "Llama), its last two for parallel (up_proj, down_proj)",
    )
    layers: Annotated[list[int], Field(min_length=1)] | None = Field(
        default=None,
        description="full, lora, dora: in which blocks, negative from the end; null: in all, or in "
        "the adapter layers of an emulator",
    )


class TermsSection(Section):
    """What a data owner may train of a package; `plug` takes nothing else."""

    forms: Annotated[list[Literal["full", "lora"]], Field(min_length=1)] = Field(
        default=["full", "lora"], description="whole layers, LoRA inside them, or either"
    )
    max_rank: Count | None = Field(default=None, description="of LoRA; null: any that fits")
    modules: Names | None = Field(
        default=None, description="names of the modules that LoRA may be in; null: every linear one"
    )
    licence: str = Field(default="", description="a note for people, in the public manifest")


class EmulateSection(Section):
    """How a model's owner makes an emulator to hand out."""

    method: Text = Field(default="gradot", description="compressor; `selectune methods` lists them")
    options: dict[str, Any] = Field(default={}, description="options of the compressor")
    adapters: Annotated[list[int], Field(min_length=1)] | None = Field(
        default=None,
        description="layers that go out whole, to be tuned; negative from the end; null: the first "
        "two and the last two",
    )
    keep_attention: Share = Field(
        default=0.6, description="share of the parameters of the other layers' attention to keep"
    )
    keep_mlp: Share = Field(default=0.6, description="the same of their MLPs")
    budget: Literal["uniform", "global"] = Field(
        default="uniform",
        description="uniform: these shares in every matrix; global: of all together, by score",
    )
    calibration: Text | Names = Field(
        description="generic text to compress by; never leaves the owner: a file or a name as in "
        "data.pool"
    )
    calibration_blocks: Count = Field(
        default=128, description="blocks of calibration text that statistics are taken from"
    )
    block_tokens: Annotated[int, Field(ge=2)] = Field(
        default=512, description="tokens of one block"
    )
    probe: Text | ByName | None = Field(
        default=None,
        description="examples on which emulator and model are compared, named as data.heldout; "
        "null: further blocks of the calibration text",
    )
    probe_examples: Count = Field(
        default=16,
        description="examples of each task, or blocks, that gradients and logits are compared on",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        default=512, description="tokens kept of an example of the probe"
    )
    heal_steps: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="steps in which a copy of the emulator's middle is trained on calibration "
        "text, to see what anybody could win back; 0: not measured",
    )
    layers_at_once: Count | None = Field(
        default=None,
        description="layers whose statistics are held at once; each group costs a pass over the "
        "calibration text; null: as many as fit into 2 GB",
    )
    token_budget: Count = Field(default=2048, description="padded tokens in one batch")
    terms: TermsSection = TermsSection()


class WarmupSection(Section):
    """The short training after which gradients are taken."""

    fraction: Share = Field(default=0.05, description="random share of the pool to warm up on")
    epochs: Annotated[int, Field(ge=0)] = Field(
        default=1, description="passes over that share; 0 takes gradients at the adapter's start"
    )
    schedule_epochs: Count = Field(
        default=4,
        description="length of the learning-rate schedule, of which warmup.epochs are run",
    )
    learning_rate: Positive | None = Field(
        default=None,
        description="peak learning rate; null: tune.learning_rate. Batches, scheduler and "
        "optimizer are those of tune: other ones there make warm-up and gradients anew",
    )
    until: Literal["epochs", "overlap"] = Field(
        default="epochs",
        description="epochs: all of warmup.epochs; overlap: at most these, and no longer than the "
        "space of the target gradients moves",
    )
    overlap: Share = Field(
        default=0.9,
        description="until overlap: how much of their space two checks have in common where it "
        "counts as resting; 1 is all",
    )
    overlap_times: Count = Field(
        default=2, description="until overlap: as many such overlaps in a row end the warm-up"
    )
    overlap_every: Count = Field(
        default=50, description="until overlap: steps between two checks, on targets only"
    )


class ScoreSection(Section):
    """How pool examples are scored."""

    method: Text = Field(default="gist", description="scorer; `selectune methods` lists them")
    options: dict[str, Any] = Field(default={}, description="options of the scorer")
    layers: TopLayers | None = Field(
        default=None,
        description='last blocks whose gradients are taken: "top:8" or "top:25%"; the backward '
        "pass ends there; null: all blocks",
    )
    max_length: Annotated[int, Field(ge=2)] | WholeShare | None = Field(
        default=None,
        description="tokens of an example that gradient passes read, the beginning of its prompt "
        'left out first; "90%": as many as leave that share of the pool whole; null: '
        "data.max_length",
    )
    precision: Literal["auto", "float32", "bfloat16"] | None = Field(
        default=None,
        description="of gradient passes; auto: bfloat16 where it is fast; null: as model.dtype",
    )
    fast: bool = Field(
        default=False,
        description="cheaper values for score.max_length and precision where they are "
        "null; a random probe is scored with and without them, and its rank correlation told",
    )
    token_budget: Count = Field(default=1024, description="padded tokens in one gradient batch")
    shard_examples: Count = Field(
        default=256, description="examples in one resumable shard of the store"
    )


class SelectSection(Section):
    """How scores become a selection."""

    rule: Text = Field(default="topk", description="selection rule; `selectune methods` lists them")
    budget: Count | Share | TokenCount = Field(
        default=0.05,
        description='how much to keep: 0.05 is a share, 500 a count, "20000 tokens" a length',
    )
    quotas: dict[str, tuple[float, float]] = Field(
        default={}, description="source: [least, most], as shares of the selection between 0 and 1"
    )
    near_duplicates: Share | None = Field(
        default=None,
        description="drop what has at least this 5-gram Jaccard similarity to a better one",
    )


class WeightsSection(Section):
    """Which single weights of the base train."""

    method: Text = Field(
        default="gallop", description="scorer of weights; `selectune methods` lists them"
    )
    density: Share | None = Field(
        default=None,
        description="share of the eligible weights that trains; null: the scorer's own, or another "
        "budget among the options",
    )
    options: dict[str, Any] = Field(
        default={}, description="options of the scorer, such as lora_rank, scope or examples"
    )
    shuffled: bool = Field(
        default=False,
        description="train as many weights of every tensor as the scorer chose, at random places: "
        "the control that tells what its scores are worth inside tensors",
    )
    route: Literal["auto", "gather", "sampled", "columns"] = Field(
        default="gather",
        description="how gradients reach the weights: picked from the dense gradient of one tensor "
        "at a time, computed for them alone, or for whole input columns; auto measures, and two "
        "runs may then differ by rounding",
    )
    decay_to: Literal["zero", "base"] | None = Field(
        default=None,
        description="what weight decay pulls to: zero, or the base's value; null: zero in place, "
        "the base's value composed",
    )
    form: Literal["in_place", "compose"] = Field(
        default="in_place",
        description="in_place: the weights themselves change; compose: what changes acts beside "
        "the matrices, which stay as they are and cost a sparse product more in each pass",
    )


def _is_null(value: object) -> bool:
    return value is None


def _is_empty(value: object) -> bool:
    return value == {}


class TokensSection(Section):
    """Which loss tokens of an example train, by their token scores."""

    keep: Literal["positive"] | Share = Field(
        default="positive",
        description="positive: the tokens whose training lowers the target's loss; 0.5: the best "
        "half of every example; one token of an example always stays",
    )
    rank: Count | Annotated[str, Field(pattern=RANK_RULE)] | None = Field(
        default=None,
        description="rank of the target space that scores are taken in, as for gist; null: "
        "score.options.rank, or energy:0.95",
    )
    shuffled: bool = Field(
        default=False,
        description="keep as many tokens of every example, at random places: the control that "
        "tells what the scores are worth",
    )


class TuneSection(Section):
    """How an adapter is trained on the selection."""

    trainer: Literal["transformers", "trl"] = Field(
        default="transformers", description="which trainer"
    )
    epochs: Count = Field(default=4, description="passes over the selection")
    learning_rate: Positive = Field(default=2e-4, description="peak learning rate")
    batch_size: Count = Field(default=16, description="examples in one forward pass")
    accumulation: Count = Field(default=1, description="forward passes in one optimizer step")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="how the learning rate moves after its warm-up"
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.03, description="share of the steps in which the learning rate rises"
    )
    weight_decay: NotNegative = Field(default=0.0, description="decay of AdamW")
    max_grad_norm: Positive = Field(default=1.0, description="gradients are clipped to this norm")
    save_every: Count | None = Field(
        default=None, description="steps between checkpoints; null: after every epoch"
    )
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints that are kept")
    controls: list[Text] = Field(
        default=["random"],
        description="what is tuned beside the selection: scorers at the same budget, or full, all "
        "trained with the same method; plain is the selection itself, trained without the method "
        "and on all tokens",
    )
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"] = Field(
        default="adamw_torch", description="optimizer, as transformers calls it"
    )
    method: Text = Field(
        default=PLAIN,
        description="training method, plain for none; `selectune methods` lists them; the warm-up "
        "always trains plainly",
    )
    options: dict[str, Any] = Field(default={}, description="options of the training method")
    adapter: AdapterSection | None = Field(
        default=None,
        description="what is trained on the selection; null: as the section adapter, with which "
        "gradients are taken",
    )
    weights: WeightsSection | None = Field(
        default=None,
        description="single weights of the base to train instead of an adapter, or beside "
        "tune.adapter where that is given too",
    )
    # Left out where it is null: what was trained before there was such a key is still found.
    tokens: TokensSection | None = Field(
        default=None,
        exclude_if=_is_null,
        description="train on some loss tokens of an example only, by token scores; these take "
        "full gradients, whatever score.layers, max_length, precision and fast say; null: on all "
        "of them",
    )

    reselect_every: Steps | None = Field(
        default=None,
        description="choose anew after every so many steps, or every such share of the training: "
        "gradients of the targets and of a shortlist, four times the selection, are taken at the "
        "model as it is then, as score.layers, max_length, precision and fast say, and training "
        "goes on with what scores best; for scorers of gradients, such as gist; null: the "
        "selection stays",
    )

    def plainly(self) -> "TuneSection":
        """Return the same training without a method, on all tokens of one selection to the end."""
        changes = {"method": PLAIN, "options": {}, "tokens": None, "reselect_every": None}
        return self.model_copy(update=changes)

    def of_section_adapter(self) -> "TuneSection":
        """Return the plain training of what gradients are taken with."""
        return self.plainly().model_copy(update={"adapter": None, "weights": None})


class EvaluateSection(Section):
    """How arms are compared on held-out examples."""

    intervals: Annotated[int, Field(ge=100)] = Field(
        default=10000, description="bootstrap draws behind an interval"
    )
    limit: Count | None = Field(
        default=None, description="held-out examples per task, and texts; null: all"
    )
    token_budget: Count = Field(default=4096, description="padded tokens in one evaluation batch")
    generate: bool = Field(
        default=False,
        description="compare: also let models write their answers, beside ranking the options",
    )
    text: Text | None = Field(
        default=None,
        description='compare: rows of plain text ("text") that has nothing to do with the tasks; '
        "the loss on it shows what is forgotten",
    )
    lm_eval: list[Text] = Field(default=[], description="lm-eval tasks to run too (extra: eval)")


class TuneChoice(Section):
    """How one row of a comparison is trained."""

    method: Text = Field(default=PLAIN, description="training method, plain for none")
    options: dict[str, Any] = Field(default={}, description="options of the training method")
    adapter: AdapterSection | None = Field(
        default=None, description="what this row trains; null: tune.adapter"
    )
    weights: WeightsSection | None = Field(
        default=None, description="single weights that this row trains; null: tune.weights"
    )
    tokens: TokensSection | None = Field(
        default=None,
        exclude_if=_is_null,
        description="loss tokens that this row trains on; null: tune.tokens",
    )
    reselect_every: Steps | None = Field(
        default=None, description="when this row chooses anew; null: tune.reselect_every"
    )

    def over(self, tune: TuneSection) -> TuneSection:
        """Return how the row is trained, where a recipe's other rows are trained like `tune`."""
        changes: dict[str, Any] = {"method": self.method, "options": self.options}
        if self.reselect_every is not None:
            changes["reselect_every"] = self.reselect_every
        # A row that trains something of its own does so alone.
        if self.adapter is not None or self.weights is not None:
            changes |= {"adapter": self.adapter, "weights": self.weights}
        if self.tokens is not None:
            changes |= {"tokens": self.tokens}
        return tune.model_copy(update=changes)


class SelectChoice(Section):
    """How one row of a comparison selects, where not as the others."""

    rule: Text | None = Field(default=None, description="selection rule; null: select.rule")
    budget: Count | Share | TokenCount | None = Field(
        default=None,
        description="how much this row keeps; random at the same budget stands beside, and is what "
        "the row is compared with; null: select.budget",
    )
    quotas: dict[str, tuple[float, float]] | None = Field(
        default=None, description="source: [least, most]; null: select.quotas"
    )
    near_duplicates: Share | None = Field(
        default=None, description="as in select; null: select.near_duplicates"
    )

    def over(self, select: SelectSection) -> SelectSection:
        """Return how the row selects, where a recipe's other rows select like `select`."""
        own = self.model_dump(exclude_none=True)
        return SelectSection.model_validate({**select.model_dump(), **own})


class MatrixMethod(Section):
    """One row of a comparison, with options of its own."""

    name: Text = Field(description="what the table calls it")
    method: Text = Field(description="scorer; `selectune methods` lists them")
    options: dict[str, Any] = Field(default={}, description="options of the scorer")
    select: SelectChoice | None = Field(
        default=None,
        exclude_if=_is_null,
        description="how this row alone selects; null: as in the section select",
    )
    epochs: Count | None = Field(
        default=None,
        description="epochs of this method alone, such as 1 for full; null: as the others",
    )
    tune: TuneChoice | None = Field(
        default=None,
        description="training method of this row alone; null: tune.method, as for the others",
    )
    warmup: WarmupSection | None = Field(
        default=None,
        description="warm-up before this row's gradients alone; null: the section warmup, which "
        "serves all others together",
    )
    adapter: AdapterSection | None = Field(
        default=None,
        exclude_if=_is_null,
        description="adapter that this row's gradients are taken of, warm-up included; what trains "
        "on its choice is that of the others; null: the section adapter",
    )
    emulate: EmulateSection | None = Field(
        default=None,
        exclude_if=_is_null,
        description="an emulator of model.base, made once, that this row selects and tunes on; its "
        "answers are those of model.base with the tuned layers plugged in; layers are counted as "
        "in model.base",
    )


class TuneGrid(Section):
    """Values tried for every method alike, on a split of the target, never on held-out data."""

    learning_rate: list[Positive] = Field(default=[], description="peak learning rates to try")
    epochs: list[Count] = Field(default=[], description="numbers of epochs to try")
    choose: Literal["task", "all"] = Field(
        default="task",
        description="task: values, selection and training for each target task by itself; all: one "
        "for all of them, chosen by the mean over tasks",
    )


class MatrixSection(Section):
    """A grid of runs; base and random always stand beside."""

    methods: Annotated[list[Text | MatrixMethod], Field(min_length=1)] = Field(
        description="scorers, or {name, method, options}; full is the whole pool"
    )
    budgets: list[Count | Share | TokenCount] = Field(
        default=[],
        exclude_if=_is_empty,
        description="every row once with each of these, beside random at the same; empty: each row "
        "once, with select.budget or its own",
    )
    targets: list[Text] = Field(default=[], description="names in data.target; empty: all of them")
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(
        default=[0], description="one run per seed"
    )
    tune: TuneGrid | None = Field(
        default=None, description="learning rates and epochs to choose from"
    )
    transfer: bool | Names = Field(
        default=False,
        description="train on each target task's own examples in the pool and test on all tasks: "
        "how much helps elsewhere, and how much is forgotten; names: test on these beside its own",
    )
    emulate: dict[str, Any] = Field(
        default={},
        exclude_if=_is_empty,
        description="keys that the emulate of a row takes from here where it leaves them out",
    )
