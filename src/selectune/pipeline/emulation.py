"""The recipe of a model's owner put to work: the emulator, or what it would be and cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from selectune.data import Example, read_examples
from selectune.data.examples import plain_text
from selectune.digests import digest
from selectune.models import (
    blocks,
    load_base,
    load_config,
    load_tokenizer,
)
from selectune.offsite.calibration import calibration_of
from selectune.offsite.emulate import (
    Emulated,
    compressor_of,
    emulate,
    refuse_budget,
)
from selectune.offsite.layout import Layout
from selectune.offsite.manifests import Terms
from selectune.offsite.outlook import Outlook, outlook
from selectune.pipeline.outcome import Outcome
from selectune.pipeline.prepare import DemoNames, read_tasks
from selectune.progress import Progress
from selectune.recipe import AdapterSection, ModelSection, OwnerRecipe


class Emulation:
    """An owner's recipe with its names looked up.

    Args:
        recipe: what to do.
        progress: told of every long step.
    """

    def __init__(self, recipe: OwnerRecipe, progress: Progress) -> None:
        self.recipe, self.progress = recipe, progress
        demo, section = DemoNames(), recipe.emulate
        base = demo.path(recipe.model.base)
        self.model: ModelSection = recipe.model.model_copy(update={"base": base})
        self._text = demo.paths(section.calibration)
        self._probe = None if section.probe is None else demo.paths(section.probe)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the emulator depends on beside model and recipe: text and questions, by content."""
        return {
            "text": digest({"texts": self._texts()}),
            "questions": {task: [e.id for e in asked] for task, asked in self._questions().items()},
        }

    def outline(self) -> nn.Module:
        """Return the model as shapes only."""
        with torch.device("meta"):
            return cast("nn.Module", AutoModelForCausalLM.from_config(load_config(self.model)))

    def plan(self) -> Outcome:
        """Say what the emulator would be; weights are not read, and nothing is written.

        Raises:
            SelectionError: layers or ratios that cannot be, or a model of unknown anatomy.
            DataError: there is too little calibration text, or a question cannot be read.
        """
        section = self.recipe.emulate
        bare = self.outline()
        compressor = compressor_of(section.method, section.options)
        refuse_budget(compressor, section.budget)
        ahead = outlook(
            bare,
            Layout.of(len(blocks(bare)), section.adapters),
            compressor,
            keep_attention=section.keep_attention,
            keep_mlp=section.keep_mlp,
        )
        text = calibration_of(
            self._texts(), load_tokenizer(self.model), n_blocks=section.calibration_blocks,
            block_tokens=section.block_tokens, n_probe=section.probe_examples,
            seed=self.recipe.seed,
        )  # fmt: skip
        asked = {task: len(examples) for task, examples in self._questions().items()}
        at_once = ahead.layers_at_once(section.layers_at_once)
        facts: dict[str, Any] = {
            "method": section.method,
            "adapters": list(ahead.layout.adapters),
            "middle": len(ahead.layout.middle),
            "kept_layers": ahead.n_kept,
            "ranks": dict(ahead.ranks),
            "channels": ahead.channels,
            "parameters": {
                "adapter": ahead.n_adapter,
                "middle": ahead.n_middle,
                "emulated": ahead.n_emulated,
                "model": ahead.n_whole,
            },
            "statistics_bytes": at_once * ahead.statistics_bytes,
            "layers_at_once": at_once,
            "blocks": len(text.blocks),
            "probe_blocks": len(text.probe),
            "questions": asked,
        }
        return Outcome(facts, _lines(facts, ahead, section.block_tokens))

    def emulate(self) -> Emulated:
        """Make the emulator and write it; resume, or give back what is there."""
        recipe, section = self.recipe, self.recipe.emulate
        base = load_base(self.model, adapter=AdapterSection(), as_stored=True)
        return emulate(
            base.model,
            self._texts(),
            Path(recipe.output),
            compressor=section.method,
            options=section.options,
            adapters=section.adapters,
            keep_attention=section.keep_attention,
            keep_mlp=section.keep_mlp,
            budget=section.budget,
            calibration_blocks=section.calibration_blocks,
            block_tokens=section.block_tokens,
            questions=self._questions(),
            probe_examples=section.probe_examples,
            max_length=section.max_length,
            heal_steps=section.heal_steps,
            layers_at_once=section.layers_at_once,
            token_budget=section.token_budget,
            tokenizer=base.tokenizer,
            precision=base.precision,
            terms=Terms.model_validate_json(section.terms.model_dump_json()),
            seed=recipe.seed,
            progress=self.progress,
        )

    def _texts(self) -> list[str]:
        rows = read_examples(cast("Any", self._text), what="calibration text")
        return [plain_text(example.content) for example in rows]

    def _questions(self) -> dict[str, tuple[Example, ...]]:
        if self._probe is None:
            return {}
        return read_tasks(cast("Any", self._probe), "probe", "auto")


def _lines(facts: Mapping[str, Any], ahead: Outlook, block_tokens: int) -> list[str]:
    layout, n = ahead.layout, facts["parameters"]
    trained = ", ".join(map(str, layout.adapters))
    if ahead.n_kept is not None:
        kept = f"{ahead.n_kept} of {len(layout.middle)} middle layers stay"
    else:
        ranks = ", ".join(f"{key} {rank}" for key, rank in ahead.ranks.items())
        channels = "all" if ahead.channels is None else f"{ahead.channels}"
        kept = f"in each of {len(layout.middle)} middle layers: {channels} channels; "
        kept += f"ranks {ranks}" if ranks else "attention as it is"
    asked = ", ".join(f"{task} {count}" for task, count in facts["questions"].items())
    return [
        f"method      {facts['method']}",
        f"adapter     layers {trained} of {layout.n_layers} go out whole, "
        f"{n['adapter']:,} parameters",
        f"middle      {kept}",
        f"size        {n['emulated']:,} of {n['middle']:,} parameters of the middle, "
        f"{n['emulated'] / n['middle']:.1%}; the model has {n['model']:,}",
        f"text        {facts['blocks']} blocks of {block_tokens} tokens to compress by, "
        f"{facts['probe_blocks']} to judge by",
        f"questions   {asked or 'none'}",
        f"memory      {facts['statistics_bytes'] / (1 << 20):,.1f} MB of statistics, of "
        f"{facts['layers_at_once']} layers at once, beside the model and its activations",
    ]
