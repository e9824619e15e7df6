"""Switching layers on and off: what trains, what stays to the bit, and what comes back."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deep import ADAPTERS, deep_model, deep_trainable
from peft import PrefixTuningConfig, get_peft_model
from tiny import tiny_tokens
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from ranks import PAIR, run_ranks
from selectune.adapters.add import quiet
from selectune.data import Batch
from selectune.errors import ConfigError, IncompatibleRunError, SelectionError
from selectune.methods.data_layer.gast import GAST
from selectune.methods.layers import ist as ist_file
from selectune.methods.layers.ist import IST
from selectune.methods.layers.lisa import LISA
from selectune.methods.layers.ows import OWS
from selectune.methods.layers.rst import RST
from selectune.models import blocks
from selectune.training import layer_sampling, retired, sampling_limits
from selectune.training.layer_sampling import LayerSession, active_layers
from selectune.training.method import Method, Scene, Session
from selectune.training.sources import TokenSource
from selectune.training.suppression import response_of, turned_down

N_LAYERS = 5
POOL = TokenSource(tiny_tokens(20, seed=4), pad_id=0)
BATCHES = [TokenSource(tiny_tokens(4, seed=k), pad_id=0).draw(range(4)) for k in range(10, 18)]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer that does not turn a rounding of a small gradient into a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.5)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Loop:
    """A bare training loop with two micro-batches per step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
    ) -> None:
        self.model, self.optimizer = model.train(), optimizer(model)
        self.losses: list[float] = []

    @contextmanager
    def attached(self, method: Method | None, step: int = 0) -> Iterator[Session | None]:
        if method is None:
            yield None
            return
        with method.attach(
            self.model, self.optimizer, pool=POOL, target=POOL, seed=3, step=step
        ) as session:
            yield session

    def steps(
        self, first: int, last: int, each: Callable[[int, str], None] = lambda *_: None
    ) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            self.optimizer.zero_grad()
            each(step, "begin")
            for k in range(2):
                found = loss(self.model, BATCHES[(2 * step + k) % len(BATCHES)])
                (found / 2).backward()
                self.losses.append(found.item())
                each(step, "micro-batch")
            self.optimizer.step()
            each(step, "end")


def trained(method: Method | None, model: nn.Module | None = None, steps: int = 6) -> Loop:
    loop = Loop(deep_trainable("lora", N_LAYERS, dropout=0.3) if model is None else model)
    with loop.attached(method):
        loop.steps(0, steps)
    return loop


def assert_same_bits(a: Loop, b: Loop) -> None:
    assert a.losses == b.losses
    assert_close(whole(a.model), whole(b.model), rtol=0, atol=0)
    assert_close(a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"], rtol=0,
                 atol=0)  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [RST(layers=1.0), RST(layers=N_LAYERS), LISA(layers=1.0), OWS(layers=N_LAYERS, interval=2)],
    ids=["rst", "rst by number", "lisa", "ows"],
)
def test_all_layers_active_is_plain_training(method: Method) -> None:
    assert_same_bits(trained(method), trained(None))


def test_probes_leave_no_trace_in_the_training() -> None:
    probing = trained(IST(interval=2, lr=0.0, layers=2))
    assert_same_bits(probing, trained(RST(layers=2)))
    probing_all = trained(IST(interval=1, layers=1.0))
    assert_same_bits(probing_all, trained(None))


@pytest.mark.parametrize("kind", ["lora", "full", *ADAPTERS[1:]])
def test_layers_that_stand_still_stay_to_the_bit(kind: str) -> None:
    loop = Loop(deep_trainable(kind, N_LAYERS))
    place = {
        name: k
        for k, block in enumerate(blocks(loop.model))
        for name, p in loop.model.named_parameters()
        if p.requires_grad and any(p is q for q in block.parameters())
    }
    outside = {n for n, p in loop.model.named_parameters() if p.requires_grad and n not in place}
    parameters = dict(loop.model.named_parameters())
    before: dict[str, Any] = {}
    seen: list[set[int]] = []

    def snapshot() -> dict[str, Any]:
        return {
            n: (
                parameters[n].detach().clone(),
                copy.deepcopy(loop.optimizer.state.get(parameters[n])),
            )
            for n in place
        }

    def each(step: int, at: str) -> None:
        assert isinstance(session, LayerSession)
        if at == "begin":
            before.clear()
            before.update(snapshot())
            seen.append(set(active_layers(loop.model)))
        assert at == "end" or set(active_layers(loop.model)) == seen[-1]
        if at == "micro-batch":
            assert {place[n] for n in place if parameters[n].grad is not None} == seen[-1]
        if at == "end":
            after = snapshot()
            for n, k in place.items():
                if k in seen[-1]:
                    assert not torch.equal(before[n][0], after[n][0]), n
                else:
                    assert_close(after[n], before[n], rtol=0, atol=0)

    with loop.attached(RST(layers=2)) as session:
        loop.steps(0, 7, each)
    assert all(len(active) == 2 for active in seen)
    assert len(set(map(frozenset, seen))) > 2
    assert active_layers(loop.model) == list(range(N_LAYERS))
    assert outside == (set(dict(deep_model(1).named_parameters())) & outside)


def test_what_lies_outside_the_layers_is_left_as_it_is() -> None:
    model = deep_trainable("full", N_LAYERS)
    model.get_output_embeddings().weight.requires_grad_(True)
    free, frozen = model.lm_head.weight, model.model.embed_tokens.weight
    before = free.detach().clone(), frozen.detach().clone()
    loop = Loop(model)
    with loop.attached(LISA(layers=1, interval=2)):
        loop.steps(0, 1)
        assert free.requires_grad
        assert not frozen.requires_grad
    assert not torch.equal(free, before[0])
    assert torch.equal(frozen, before[1])


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("order", ["before", "after"])
def test_it_does_not_matter_how_gradients_are_cleared(to_none: bool, order: str) -> None:
    def run(to_none: bool, order: str) -> nn.Module:
        model = deep_trainable("lora", N_LAYERS)
        optimizer = adam(model)
        with RST(layers=2).attach(model, optimizer, seed=3):
            for batch in BATCHES[:6]:
                if order == "before":
                    optimizer.zero_grad(set_to_none=to_none)
                loss(model, batch).backward()
                optimizer.step()
                if order == "after":
                    optimizer.zero_grad(set_to_none=to_none)
        return model

    assert_close(whole(run(to_none, order)), whole(run(True, "before")), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_scales_come_back_also_from_an_error(kind: str) -> None:
    model = deep_trainable(kind, N_LAYERS).train()
    model.base_model.eval()  # a mix of modes, to be kept
    session = IST(interval=1).start(Scene(model, adam(model), pool=POOL))
    scales = [
        (module, module.scaling, dict(module.scaling))
        for module in model.modules()
        if isinstance(getattr(module, "scaling", None), dict)
    ]
    assert (kind == "ia3") == (not scales)
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]

    def check() -> None:
        for module, table, values in scales:
            assert module.scaling is table
            assert table == values
            assert all(type(value) is type(values[key]) for key, value in table.items())
        assert [module.training for module in model.modules()] == modes
        assert [len(module._forward_hooks) for module in model.modules()] == hooks

    state = torch.get_rng_state()
    session.begin_step(0)
    session.begin_step(1)
    assert torch.equal(torch.get_rng_state(), state)
    check()

    def fail(*_: object) -> None:
        if len(calls) == 1:
            raise ZeroDivisionError
        calls.append(1)

    calls: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        session.begin_step(2)
    handle.remove()
    assert calls == [1]
    assert torch.equal(torch.get_rng_state(), state)
    check()
    session.close()


def test_each_module_keeps_a_scale_of_its_own() -> None:
    model = deep_trainable("lora", 2)
    modules = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    for k, module in enumerate(modules):
        module.scaling["default"] = 0.1 * (k + 1)
        module.scaling["another"] = 7.0
    layers = layer_sampling.ready(Scene(model))[1]
    with turned_down([response_of(layer) for layer in layers], 0.25):
        for k, module in enumerate(modules):
            assert module.scaling == {"default": 0.1 * (k + 1) * 0.25, "another": 7.0}
    assert [m.scaling["default"] for m in modules] == [0.1 * (k + 1) for k in range(len(modules))]


def test_a_probe_inside_an_autocast_leaves_no_casts_behind() -> None:
    model = deep_trainable("lora", 3)
    optimizer = adam(model)
    before = whole(model)
    with (
        torch.autocast("cpu", torch.bfloat16),
        IST(interval=1, layers=1.0).attach(model, optimizer, pool=POOL, precision="bfloat16"),
    ):
        for batch in BATCHES[:2]:
            loss(model, batch).backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
            torch.clear_autocast_cache()  # what the loop's own steps leave is the loop's affair
    assert all(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad
    )


def test_a_loss_that_is_no_number_moves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = deep_trainable("lora", 3)
    session = IST(interval=1).start(Scene(model, adam(model), pool=POOL))
    session.begin_step(0)
    session.begin_step(1)
    u = session.guide.u.copy()
    assert u.any()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = math.nan
    session.begin_step(2)
    assert (session.guide.u == u).all()
    assert "importance stays" in caplog.text
    assert set(session.end_step()) == {"active"}
    session.close()


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Count what autograd keeps for backward, each storage once, without the model's own."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(t)  # so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss(model, batch)
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_saved_bytes_fall_with_every_layer_that_stands_still(dropout: float) -> None:
    n_layers = 6
    found = []
    for count in range(1, n_layers + 1):
        model = deep_trainable("lora", n_layers, dropout=dropout).train()
        # Layer 0 always trains here, so that backward runs through all of them each time.
        session = RST(layers=count).start(Scene(model, adam(model)))
        seed = next(s for s in range(500) if _draws(s, count, n_layers) == list(range(count)))
        session.close()
        session = RST(layers=count).start(Scene(model, adam(model), seed))
        session.begin_step(0)
        assert active_layers(model) == list(range(count))
        found.append(saved_bytes(model, BATCHES[0]))
        session.close()
    steps = np.diff(found)
    assert (steps > 0).all()
    assert steps.max() == steps.min()  # linear in the layers that train
    n, t = BATCHES[0].input_ids.shape
    # Inputs of three lora_A, with dropout a copy of each: 16 of q and o, 24 of down; 3 numbers per
    # lora_B.
    inputs = 4 * n * t * 3 * 3
    assert steps[0] >= inputs


def _draws(seed: int, count: int, n_layers: int) -> list[int]:
    rng = np.random.default_rng([seed, 0, layer_sampling.CHOICE])
    return layer_sampling.draw(np.zeros(n_layers), count, rng)


def test_backward_stops_below_the_lowest_active_layer() -> None:
    model = deep_trainable("lora", 4)
    session = RST(layers=1).start(Scene(model, adam(model)))
    seen = set()
    asks: list[bool] = []
    for block in blocks(model):
        block.register_forward_hook(lambda _m, _i, out: asks.append(out.requires_grad))
    for step in range(12):
        session.begin_step(step)
        (active,) = active_layers(model)
        asks.clear()
        loss(model, BATCHES[0])
        assert asks == [k >= active for k in range(4)]
        seen.add(active)
    assert len(seen) > 2
    session.close()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    ("family", "dtype", "near"),
    [
        ("llama", torch.float32, 1e-5),
        ("llama", torch.float64, 1e-9),
        # Random, and so steep that a rounding in fp32 grows tenfold in every step.
        ("gpt2", torch.float64, 1e-6),
    ],
)
def test_merging_trains_alike_and_leaves_the_base_to_the_bit(
    kind: str, family: str, dtype: torch.dtype, near: float
) -> None:
    def run(merge: bool) -> tuple[Loop, list[dict[str, Tensor]], list[float]]:
        loop = Loop(deep_trainable(kind, N_LAYERS, family).to(dtype), sgd)
        saved, measured = [], []

        def each(step: int, at: str) -> None:
            if at == "end" and step % 2:
                saved.append({n: t.clone() for n, t in loop.model.state_dict().items()})
                loop.model.eval()
                with torch.no_grad():
                    measured.append(loss(loop.model, BATCHES[-1]).item())
                loop.model.train()

        with loop.attached(IST(layers=2, hold=3, merge=merge, interval=4)):
            loop.steps(0, 10, each)
        return loop, saved, measured

    start = deep_trainable(kind, N_LAYERS, family).to(dtype)
    base = {n: p for n, p in start.named_parameters() if not p.requires_grad}
    merged, saved, measured = run(True)
    plain, plain_saved, plain_measured = run(False)
    np.testing.assert_allclose(merged.losses, plain.losses, rtol=max(near, 1e-6))
    np.testing.assert_allclose(measured, plain_measured, rtol=max(near, 1e-6))
    assert_close(whole(merged.model), whole(plain.model), rtol=near, atol=near)
    for one, other in zip(saved, plain_saved, strict=True):
        assert_close(one, other, rtol=near, atol=near)
        assert one.keys() == start.state_dict().keys()
        assert all(torch.equal(one[n], base[n]) for n in one.keys() & base.keys())
    assert all(torch.equal(p, base[n]) for n, p in merged.model.named_parameters() if n in base)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in merged.model.modules())
    assert not any(m.merged for m in merged.model.modules() if hasattr(m, "merged_adapters"))


def test_a_merged_layer_costs_no_factors_and_no_saved_bytes() -> None:
    model = deep_trainable("lora", N_LAYERS, dropout=0.2).train()
    calls: list[int] = []
    for k, block in enumerate(blocks(model)):
        for name, module in block.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda *_, k=k: calls.append(k))
    session = RST(layers=2, hold=5, merge=True).start(Scene(model, adam(model)))
    session.begin_step(0)
    with_merge = saved_bytes(model, BATCHES[0])
    assert set(calls) == set(active_layers(model))
    calls.clear()
    model.eval()
    with torch.no_grad():
        loss(model, BATCHES[0])
    assert set(calls) == set(range(N_LAYERS))  # evaluation runs the adapters themselves
    session.close()
    plain = RST(layers=2, hold=5).start(Scene(model.train(), adam(model)))
    plain.begin_step(0)
    assert with_merge <= saved_bytes(model, BATCHES[0])
    plain.close()


def test_merged_copies_serve_until_something_changes() -> None:
    model = deep_trainable("lora", 4)
    optimizer = adam(model)
    session = RST(layers=1, hold=2, merge=True).start(Scene(model, optimizer, 1))
    made: list[dict[int, Any]] = []
    for step in range(8):
        session.begin_step(step)
        loss(model, BATCHES[step]).backward()
        optimizer.step()
        made.append(dict(session._merged._copies))
    for before, after in itertools.pairwise(made):
        assert set(after) == set(range(4)) - set(after).symmetric_difference(range(4))
        assert all(after[k] is before[k] for k in before.keys() & after.keys())
    standing = next(iter(made[-1]))
    with torch.no_grad():
        next(p for n, p in blocks(model)[standing].named_parameters() if "lora_B" in n).mul_(2)
    session.begin_step(7)
    assert session._merged._copies[standing] is not made[-1][standing]
    # Someone who turns adapters off for a pass sees the base.
    with torch.no_grad(), model.disable_adapter():
        model.train()
        expected = loss(model, BATCHES[0])
    session.close()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(loss(model, BATCHES[0]), expected)


def test_merging_in_every_step_is_advised_against(caplog: pytest.LogCaptureFixture) -> None:
    model = deep_trainable("lora", 3)
    RST(merge=True).start(Scene(model, adam(model))).close()
    assert "hold" in caplog.text


@pytest.mark.parametrize(
    "method",
    [
        IST(interval=2, layers=2),
        IST(interval=2, layers=2, hold=3, merge=True, probe_from="target"),
        RST(layers=2),
        LISA(layers=2, interval=3),
        LISA(layers=2, interval=3, retire="drop"),
        OWS(layers=2, interval=3),
    ],
    ids=["ist", "ist held and merged", "rst", "lisa", "lisa drop", "ows"],
)
@pytest.mark.parametrize("stop", [3, 4, 5, 6])
def test_resuming_equals_not_stopping(method: Method, stop: int) -> None:
    unbroken = trained(method, steps=9)
    first = Loop(deep_trainable("lora", N_LAYERS, dropout=0.3))
    with first.attached(method) as session:
        first.steps(0, stop)
        facts, tensors = session.state()
        weights = copy.deepcopy(first.model.state_dict())
        moments = copy.deepcopy(first.optimizer.state_dict())
    second = Loop(deep_trainable("lora", N_LAYERS, dropout=0.3))
    second.model.load_state_dict(weights)
    second.optimizer.load_state_dict(moments)
    with second.attached(method, step=stop) as session:
        session.load_state(facts, {k: t.clone() for k, t in tensors.items()})
        second.losses = list(first.losses)
        second.steps(stop, 9)
        end = session.state()
    assert_same_bits(second, unbroken)
    again = Loop(deep_trainable("lora", N_LAYERS, dropout=0.3))
    with again.attached(method) as session:
        again.steps(0, 9)
        assert session.state()[0] == end[0]
        assert_close(session.state()[1], end[1], rtol=0, atol=0)


def test_a_state_of_something_else_is_refused() -> None:
    model = deep_trainable("lora", 3)

    def start(method: Method, model: nn.Module = model, seed: int = 0) -> Session:
        return method.start(Scene(model, None, seed, pool=POOL))

    saved = start(IST()).state()
    start(IST()).load_state(*saved)
    for other in (
        start(IST(interval=3)),
        start(RST()),
        start(IST(), seed=1),
        start(IST(), deep_trainable("lora", 4)),
    ):
        with pytest.raises(IncompatibleRunError, match="the saved state has"):
            other.load_state(*saved)


def test_dropped_states_begin_anew_and_offloaded_ones_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved: list[tuple[int, str]] = []

    def move(tensor: Tensor, device: torch.device) -> Tensor:
        moved.append((tensor.data_ptr(), str(device)))
        return tensor

    monkeypatch.setattr(retired, "move", move)
    loops = {
        retire: trained(LISA(layers=2, interval=1, retire=retire), steps=8)
        for retire in ("keep", "drop", "offload")
    }
    assert_same_bits(loops["offload"], loops["keep"])
    assert len(moved) > 0
    assert len(moved) % 2 == 0  # each one comes back, at the latest at the end
    assert loops["drop"].losses != loops["keep"].losses
    model = deep_trainable("lora", N_LAYERS)
    optimizer = adam(model)
    with LISA(layers=2, interval=1, retire="drop").attach(model, optimizer):
        for batch in BATCHES:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            held = {id(p) for p in optimizer.state}
            # The next draw stands already: what it does not name has no state.
            assert held <= {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match="retire=drop needs the optimizer"):
        LISA(layers=1, retire="drop").start(Scene(model))


def refused(method: Method, model: nn.Module, **scene: object) -> str:
    with pytest.raises((ConfigError, SelectionError)) as error:
        method.start(Scene(model, **{"pool": POOL, **scene}))
    return str(error.value)


@pytest.mark.parametrize("method", [IST, RST, LISA, OWS])
def test_what_cannot_work_is_refused(method: Callable[..., Method]) -> None:
    model = deep_trainable("lora", 3)
    assert "4 layers cannot be drawn of 3" in refused(method(layers=4), model)
    for wrong in (0, 0.0, 1.5, -1, "many"):
        with pytest.raises(ConfigError, match="layers"):
            method(layers=wrong)
    late = torch.optim.SGD([next(p for p in model.parameters() if p.requires_grad)], lr=0.1)
    assert "the optimizer lacks 17 parameters" in refused(method(layers=1), model, optimizer=late)
    model.merge_adapter()
    assert "merged" in refused(method(layers=1), model)
    bare = deep_model(2)
    for p in bare.parameters():
        p.requires_grad_(False)
    assert "no layer of the model" in refused(method(layers=1), bare)
    with quiet():
        prefix = get_peft_model(
            deep_model(2), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        )
    assert "put_in_blocks" in refused(method(layers=1), prefix)


def test_what_ist_needs_is_named() -> None:
    assert "lisa or ows" in refused(IST(), deep_trainable("full", 3))
    assert "needs two layers" in refused(IST(), deep_trainable("lora", 1))
    lora = deep_trainable("lora", 3)
    assert 'probe_from="pool"' in refused(IST(), lora, pool=None)
    assert 'probe_from="target"' in refused(IST(probe_from="target"), lora)
    assert "OWS needs training examples" in refused(OWS(layers=1), lora, pool=None)
    assert "nothing to merge" in refused(RST(merge=True, hold=2), deep_trainable("series", 3))
    for wrong in ({"suppress": 1.0}, {"candidates": 1}, {"interval": 0}, {"reward": "loss"}):
        with pytest.raises(ConfigError):
            IST(**wrong)


def test_sharded_and_strict_models_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = deep_trainable("lora", 2)

    class Wrapper(DistributedDataParallel):
        def __init__(self, module: nn.Module, static_graph: bool, find: bool) -> None:
            nn.Module.__init__(self)
            self.module, self.static_graph, self.find_unused_parameters = module, static_graph, find

    assert "find_unused_parameters=True" in refused(RST(), Wrapper(model, False, False))
    assert "static_graph=True" in refused(RST(), Wrapper(model, True, True))
    session = RST().start(Scene(Wrapper(model, False, True)))
    assert [layer.name for layer in session.layers] == [
        layer.name for layer in layer_sampling.ready(Scene(model))[1]
    ]
    first = next(p for p in model.parameters() if p.requires_grad)
    first.ds_id = 0
    assert "DeepSpeed" in refused(RST(), model)
    del first.ds_id
    monkeypatch.setattr(type(adam(model)), "__module__", "deepspeed.runtime.zero")
    assert "DeepSpeed" in refused(RST(), model, optimizer=adam(model))
    monkeypatch.undo()
    sampling_limits.refuse_unfit(Scene(torch.compile(model, backend="eager")))
    assert "compiled" in caplog.text


def test_layers_without_an_adapter_are_left_out() -> None:
    model = deep_trainable("lora", 4)
    for p in blocks(model)[1].parameters():
        p.requires_grad_(False)
    scene = Scene(model, adam(model), pool=POOL)
    session = IST(layers=2, interval=1).start(scene)
    for step in range(6):
        session.begin_step(step)
        facts = session.end_step()
        assert set(facts["active"]) <= {0, 2, 3}
        assert facts["active"] == active_layers(model)
        assert facts.get("layers", [0, 2, 3]) == [0, 2, 3]
        assert len(facts["importance"]) == 3
        if step:
            assert all(set(s) <= {0, 2, 3} for s in facts["probe"]["sets"])
    session.close()
    session.close()
    assert active_layers(model) == [0, 2, 3]


@pytest.mark.parametrize("merge", [False, True])
def test_gast_picks_examples_for_active_layers_only(merge: bool) -> None:
    def run(merge: bool, refresh_every: int) -> tuple[Loop, list[dict[str, Any]]]:
        loop = Loop(deep_trainable("lora", N_LAYERS))
        sampler = IST(layers=2, interval=3, hold=2, merge=merge)
        method = GAST(target_batch=3, sampler=sampler, refresh_every=refresh_every)
        scene = Scene(loop.model, loop.optimizer, 3, pool=POOL, weighting="token")
        session, facts = method.start(scene), []
        for step in range(7):
            session.begin_step(step)
            loop.steps(step, step + 1)
            facts.append(session.end_step())
        session.close()
        return loop, facts

    for refresh_every in (1, 3):
        loop, facts = run(merge, refresh_every)
        for found in facts:
            assert len(found["active"]) == 2
            assert set(found["picks"]) == {str(k) for k in found["active"]}
        assert {step for step, found in enumerate(facts) if "probe" in found} == {3, 6}
        if merge:
            plain, plain_facts = run(False, refresh_every)
            np.testing.assert_allclose(loop.losses, plain.losses, rtol=1e-4)
            assert [f["picks"] for f in facts] == [f["picks"] for f in plain_facts]


def test_draws_are_functions_of_seed_and_step() -> None:
    def drawn(seed: int, steps: list[int], **options: object) -> list[tuple[int, ...]]:
        model = deep_trainable("lora", N_LAYERS)
        session = RST(layers=2, **options).start(Scene(model, None, seed))
        found = []
        for step in steps:
            session.begin_step(step)
            found.append(tuple(active_layers(model)))
        return found

    whole_run = drawn(0, list(range(20)))
    assert drawn(0, list(range(10, 20))) == whole_run[10:]
    assert drawn(1, list(range(20))) != whole_run
    held = drawn(0, list(range(20)), hold=5)
    assert [len(set(held[k : k + 5])) for k in range(0, 20, 5)] == [1] * 4
    assert held[5] == whole_run[5]
    assert drawn(0, [7, 8], hold=5) == [held[5]] * 2


def test_the_rigged_probe_of_a_session_moves_u(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ist_file, "probe_losses", lambda _scene, _batch, turned, factor: [
            0.1 * len(turned) + k * factor for k in range(len(turned))
        ],
    )  # fmt: skip
    model = deep_trainable("lora", 4)
    session = IST(interval=1).start(replace(Scene(model, None), pool=POOL))
    session.begin_step(1)
    assert session.guide.u.any()


def test_two_processes_choose_and_learn_as_one(tmp_path: Path) -> None:
    run_ranks(Path(__file__).parent / "layers_of_one_rank.py", tmp_path, (*PAIR, (0, 1)))
    first, second, alone = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("2-0", "2-1", "1-0")
    )
    assert first == second
    for name, found in first.items():
        assert found["active"] == alone[name]["active"]
        for key, values in found["tensors"].items():
            np.testing.assert_allclose(values, alone[name]["tensors"][key], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["weights"], alone[name]["weights"], rtol=1e-4, atol=1e-5)
    assert any(first["ist"]["tensors"]["u"])
