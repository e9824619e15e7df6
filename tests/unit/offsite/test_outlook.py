"""What a plan promises is what is built; what cannot be built is refused from shapes alone."""

import pytest
import torch
from deep import deep_model

from selectune.errors import SelectionError
from selectune.methods.compressors.crash import Crash
from selectune.methods.compressors.gradot import GradOT
from selectune.methods.compressors.layer_drop import LayerDrop
from selectune.methods.compressors.svd_magnitude import SvdMagnitude
from selectune.models import blocks
from selectune.offsite.compressor import compress_layer, compress_stack
from selectune.offsite.emulator import build_emulator
from selectune.offsite.layout import Layout
from selectune.offsite.outlook import outlook
from selectune.offsite.quality import parameter_ratios

FAMILIES = ["llama", "qwen2", "gpt2", "opt"]
LAYOUT = Layout.of(6, [0, -1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [(0.6, 0.6), (1.0, 0.4), (0.5, 1.0)])
def test_planned_parameters_are_the_stored_ones(family: str, keep: tuple[float, float]) -> None:
    model = deep_model(6, family)
    shares = {"keep_attention": keep[0], "keep_mlp": keep[1]}
    found = outlook(model, LAYOUT, SvdMagnitude(), **shares)
    middle = {
        j: compress_layer(blocks(model)[j], j, SvdMagnitude(), None, **shares)[0]
        for j in LAYOUT.middle
    }
    ratios = parameter_ratios(model, build_emulator(model, LAYOUT, middle), {0: 0, 5: 5})
    assert ratios.middle == found.n_emulated / found.n_middle
    assert found.n_kept is None


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_layers_are_the_stored_ones(family: str) -> None:
    model = deep_model(6, family)
    shares = {"keep_attention": 0.6, "keep_mlp": 0.6}
    found = outlook(model, LAYOUT, LayerDrop(), **shares)
    middle, record = compress_stack(model, LAYOUT, LayerDrop(), **shares)
    emulator = build_emulator(model, LAYOUT, middle)
    last = len(blocks(emulator)) - 1
    assert len(record.kept) == found.n_kept
    ratios = parameter_ratios(model, emulator, {0: 0, 5: last})
    assert ratios.middle == found.n_emulated / found.n_middle


def test_shapes_are_enough() -> None:
    with torch.device("meta"):
        model = deep_model(6)
    found = outlook(model, LAYOUT, GradOT(), keep_attention=0.6, keep_mlp=0.6)
    assert found.channels == 15
    assert found.ranks["self_attn.q_proj"] == 4
    assert found.statistics_bytes > 0


@pytest.mark.parametrize(
    "compressor", [GradOT(), LayerDrop(), Crash()], ids=["gradot", "drop", "crash"]
)
def test_ratios_that_free_nothing_are_refused(compressor: object) -> None:
    with pytest.raises(SelectionError, match="the emulator would be the model itself"):
        outlook(deep_model(6), LAYOUT, compressor, keep_attention=1.0, keep_mlp=1.0)


def test_fewer_ranks_than_are_protected_are_refused() -> None:
    with pytest.raises(SelectionError, match="leaves rank"):
        outlook(deep_model(6), LAYOUT, GradOT(protect=0.9), keep_attention=0.5, keep_mlp=0.5)
