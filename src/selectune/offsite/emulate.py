"""The owner's whole job: calibrate, compress layer by layer, judge, write the two folders.

out/package/    for the data owner
out/owner/      stays here; report.html says what goes out, and what it is worth
out/work/       layers that are done, for a run that was killed; removed at the end
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selectune.data import Example, Tokens, tokenize
from selectune.digests import digest
from selectune.errors import ConfigError, IncompatibleRunError
from selectune.files import is_complete, lock, open_dir, sweep
from selectune.models import blocks, choose_precision, fingerprint, load_base
from selectune.offsite import manifests
from selectune.offsite.arrangement import Arrangement
from selectune.offsite.assess import Reading, assess
from selectune.offsite.calibration import Calibration, calibration_of
from selectune.offsite.compression import Budget, Compression, Shares
from selectune.offsite.compressor import StackCompressor
from selectune.offsite.distill import MiddleTraining
from selectune.offsite.emulator import build_emulator
from selectune.offsite.layout import Layout
from selectune.offsite.manifests import OwnerRecord, Terms
from selectune.offsite.outlook import Compressor, outlook
from selectune.offsite.package import KIND, OWNER_KIND, save_package
from selectune.offsite.work import Work
from selectune.pipeline.emulator_story import write_page
from selectune.pipeline.measure import Measured
from selectune.progress import Progress, Silent
from selectune.recipe import AdapterSection, ModelSection
from selectune.registry import entry_of, get

PACKAGE, OWNER, WORK = "package", "owner", "work"


@dataclass(frozen=True, slots=True)
class Emulated:
    """An emulator that has been written.

    Attributes:
        package: folder for the data owner.
        owner: folder that stays.
        about: what the owner's record says, plain values.
        text: of its quality, in lines for a person.
    """

    package: Path
    owner: Path
    about: Mapping[str, Any]
    text: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values; scores and spectra stay in the owner's record."""
        kept = {key: value for key, value in self.about.items() if key != "layers"}
        return {"package": str(self.package), "owner": str(self.owner), **kept}

    def lines(self) -> list[str]:
        """Return it as lines for a person."""
        return [
            *self.text,
            f"package: {self.package}, for the data owner",
            f"owner:   {self.owner}, which must not leave this house; look at its report.html",
        ]


def emulate(
    model: nn.Module | str | Path,
    calibration: Sequence[str],
    out: str | Path,
    *,
    compressor: str | Compressor = "gradot",
    options: Mapping[str, Any] | None = None,
    adapters: Sequence[int] | None = None,
    keep_attention: float = 0.6,
    keep_mlp: float = 0.6,
    budget: Budget = "uniform",
    calibration_blocks: int = 128,
    block_tokens: int = 512,
    questions: Mapping[str, Sequence[Example]] | None = None,
    probe_examples: int = 16,
    max_length: int = 512,
    heal_steps: int = 0,
    layers_at_once: int | None = None,
    token_budget: int = 2048,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precision: str | None = None,
    terms: Terms | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Emulated:
    """Make an emulator of a model and write it as a package, with what its owner keeps.

    The same call again goes on where a killed one stopped, and gives back what is finished.

    Args:
        model: a causal LM, or its folder or name on the Hub; held in the type that it is stored in.
        calibration: generic text; it is in none of the folders.
        out: folder of `package`, `owner` and, meanwhile, `work`.
        compressor: a registered name, or an instance such as `GradOT(lambda_mlp=0.3)`.
        options: of the compressor, where it is named.
        adapters: layers that go out whole; None for the first two and the last two.
        keep_attention: share of the parameters of the other layers' attention to keep.
        keep_mlp: the same of their MLPs.
        budget: "uniform" keeps these shares in every matrix, "global" of all together, by score.
        calibration_blocks: blocks of text to compress by.
        block_tokens: of each.
        questions: what original and emulator are asked, by task; their gradients are compared on
            them too. None compares them on further blocks of text.
        probe_examples: examples of each task, or blocks, whose gradients are compared.
        max_length: tokens of a question with its answer; what comes after them is cut off.
        heal_steps: steps in which a copy of the emulator is trained on the calibration text, to see
            what anybody could win back; 0 leaves that out.
        layers_at_once: whose statistics are held at once; None for as many as fit into 2 GB.
        token_budget: padded tokens in one batch.
        tokenizer: of the model; None loads it from where the model came from.
        precision: autocast of forward passes; None for the type of the model's weights.
        terms: what the data owner may train.
        seed: of every draw.
        progress: told of every long step.

    Raises:
        ConfigError: no such model or compressor, or a wrong option.
        SelectionError: layers or ratios that cannot be, or a model of unknown anatomy.
        DataError: there is too little calibration text.
        IncompatibleRunError: `out` holds another emulator.
        StorageError: the folders cannot be written.
    """
    made, told = compressor_of(compressor, options), progress or Silent()
    model, tokenizer, precision = _loaded(model, tokenizer, precision)
    shares = Shares(keep_attention=keep_attention, keep_mlp=keep_mlp, budget=budget)
    layout = Layout.of(len(blocks(model)), adapters)
    refuse_budget(made, budget)
    ahead = outlook(model, layout, made, **shares.each)
    text = calibration_of(
        calibration, tokenizer, n_blocks=calibration_blocks, block_tokens=block_tokens,
        n_probe=probe_examples, seed=seed,
    )  # fmt: skip
    asked, agreed, out = dict(questions or {}), terms or Terms(), Path(out)
    facts = {
        "method": entry_of("compressor", type(made)).name,
        "options": asdict(cast("Any", made)),
        "adapters": list(layout.adapters),
        **asdict(shares),
        "base": fingerprint(model.state_dict()),
        "calibration": text.fingerprint,
        "token_budget": token_budget,
        "precision": precision,
        "seed": seed,
    }
    made_of = digest(
        {
            **facts,
            "questions": {task: [e.id for e in examples] for task, examples in asked.items()},
            "probe": [probe_examples, block_tokens, max_length, heal_steps],
            "terms": agreed.model_dump(mode="json"),
        }
    )
    with lock(out):
        sweep(out)
        if (about := _finished(out, made_of)) is not None:
            write_page(out / OWNER, out / PACKAGE)
            return Emulated(out / PACKAGE, out / OWNER, about, ["finished before"])
        work = Work(out / WORK, facts)
        is_resumed = work.folder.exists()
        reading = Reading(
            tokenizer=tokenizer,
            pad_id=cast("int | None", tokenizer.pad_token_id) or 0,
            precision=precision,
            token_budget=token_budget,
            max_length=max_length,
        )
        compression = Compression(
            model=model,
            layout=layout,
            compressor=made,
            shares=shares,
            text=text.blocks,
            at_once=ahead.layers_at_once(layers_at_once),
            seed=seed,
            work=work,
            progress=told,
            **reading.passes,
        )
        with Measured() as cost:
            middle, records = compression.middle()
            emulator = build_emulator(model, layout, middle)
            plan = Arrangement.of(layout, middle)
            compression.distil(emulator, plan)
        quality = assess(
            model,
            emulator,
            {j: plan.places[j] for j in layout.adapters},
            _probe(asked, probe_examples, reading) or text.probe,
            reading=reading,
            questions=asked,
            healing=_healing(heal_steps, text),
            progress=told,
            seed=seed,
        )
        for line in quality.lines():
            told.note(line)
        about = {
            "made_of": made_of,
            **facts,
            "n_blocks": len(text.blocks),
            "block_tokens": block_tokens,
            # Of this process alone: what an earlier one had finished is not in it.
            "cost": {**cost.to_json(), "is_resumed": is_resumed},
            "quality": quality.to_json(),
            "layers": records,
        }
        save_package(
            emulator, model, tokenizer, layout=layout, middle=middle, package=out / PACKAGE,
            owner=out / OWNER, about=about, terms=agreed,
        )  # fmt: skip
        work.remove()
        write_page(out / OWNER, out / PACKAGE)
    return Emulated(out / PACKAGE, out / OWNER, about, quality.lines())


def compressor_of(compressor: str | Compressor, options: Mapping[str, Any] | None) -> Compressor:
    """Return a compressor, made from its name and options if it is named.

    Raises:
        ConfigError: no such compressor, a wrong option, or options that would not be used.
    """
    if isinstance(compressor, str):
        entry = get("compressor", compressor, where="emulate.method")
        return cast("Compressor", entry.parse(dict(options or {}), where="emulate.options"))
    if options:
        raise ConfigError(
            "the options would not be used",
            where="options",
            why="the compressor is given with its options",
            do="leave `options` out, or name the compressor",
        )
    return compressor


def refuse_budget(compressor: Compressor, budget: Budget) -> None:
    """Refuse one budget over all layers for a compressor that cuts nothing inside of them.

    Raises:
        ConfigError: it would not be used.
    """
    if budget == "global" and isinstance(compressor, StackCompressor):
        name = entry_of("compressor", type(compressor)).name
        raise ConfigError(
            "the budget global would not be used",
            where="emulate.budget",
            why=f"{name} keeps whole layers or none; their number follows from the shares",
            do="remove emulate.budget, or choose a compressor that cuts inside layers",
        )


def _loaded(
    model: nn.Module | str | Path, tokenizer: PreTrainedTokenizerBase | None, precision: str | None
) -> tuple[nn.Module, PreTrainedTokenizerBase, str]:
    if not isinstance(model, nn.Module):
        asked = ModelSection(base=str(model), dtype=cast("Any", precision or "auto"))
        base = load_base(asked, adapter=AdapterSection(), as_stored=True)
        return base.model, tokenizer or base.tokenizer, base.precision
    if tokenizer is None:
        name = str(cast("Any", model).config.name_or_path)
        tokenizer = cast(
            "PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        )
    held = next(model.parameters())
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    asked = precision or names.get(held.dtype, "float32")
    return model, tokenizer, choose_precision(asked, held.device)


def _finished(out: Path, made_of: str) -> dict[str, Any] | None:
    """Return what is on record of an emulator that is there, if it was made of the same.

    A package that may have been handed out must not give way to one with another id.
    """
    if not (is_complete(out / PACKAGE, KIND) and is_complete(out / OWNER, OWNER_KIND)):
        return None
    opened = open_dir(out / OWNER, kind=OWNER_KIND)
    about = manifests.read(OwnerRecord, opened, manifests.OWNER).about
    if about.get("made_of") != made_of:
        raise IncompatibleRunError(
            f"{out} holds another emulator",
            where=str(out / OWNER),
            why="it was made of another model, text or recipe, and may have been handed out",
            do="choose another output folder",
        )
    return about


def _probe(questions: Mapping[str, Sequence[Example]], n: int, reading: Reading) -> list[Tokens]:
    """Return questions with their answers, the first few of each task."""
    return [
        tokens
        for asked in questions.values()
        for tokens in tokenize(asked[:n], reading.tokenizer, max_length=reading.max_length)
    ]


def _healing(steps: int, text: Calibration) -> tuple[MiddleTraining, Sequence[Tokens]] | None:
    return (MiddleTraining(steps=steps), text.blocks) if steps else None
