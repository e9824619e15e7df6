"""Gradients per example equal the one-example loop, whatever the model, adapter and batch."""

import copy
from collections.abc import Callable

import pytest
import torch
from loops import loop_gradients, loop_loss
from tiny import FAMILIES, KINDS, VOCABULARY, tiny_batch, tiny_model, tiny_tokens, tiny_trainable
from torch import Tensor, nn

from selectune.data import Batch, collate
from selectune.errors import SelectionError
from selectune.gradients.capture import Capture
from selectune.gradients.engine import GradientEngine, example_loss
from selectune.gradients.kernels import Rows
from selectune.models import blocks


def dense(engine: GradientEngine, batch: Batch) -> dict[str, Tensor]:
    """Return the engine's dense gradients, and fail if a parameter is handed over twice."""
    found: dict[str, Tensor] = {}

    def keep(name: str, rows: Rows) -> None:
        assert name not in found
        found[name] = rows.dense().clone()

    engine.run(batch, keep)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Compare relative to the norm of each example's gradient at each parameter."""
    largest = max(e.flatten(1).norm(dim=1).max() for e in expected.values())
    for name, want in expected.items():
        got = found.get(name, torch.zeros_like(want))
        error = (got - want).flatten(1).norm(dim=1)
        bound = rtol * want.flatten(1).norm(dim=1) + rtol * 1e-2 * largest
        assert (error <= bound).all(), (name, float(error.max()), float(bound.min()))


@pytest.mark.parametrize("kind", [*KINDS, "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_equals_the_loop_in_fp32(family: str, kind: str) -> None:
    model = tiny_trainable(family, kind)
    expected = loop_gradients(model, tiny_tokens())
    for side in ("left", "right"):
        found = dense(GradientEngine(model), tiny_batch(side=side))
        assert_same(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "opt"])
def test_engine_equals_the_loop_in_fp64(family: str, kind: str) -> None:
    model = tiny_trainable(family, kind).double()
    expected = loop_gradients(model, tiny_tokens())
    # RMSNorms, and the angles of GPT-J's positions, are computed in fp32 whatever the weights are.
    rtol = 1e-9 if family in ("gpt2", "opt") else 1e-6
    assert_same(dense(GradientEngine(model), tiny_batch()), expected, rtol)


# transformers 5.24 renames it to `activation_checkpointing_enable`; 5.23 has the old name only.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_activation_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    model = tiny_trainable("llama", kind)
    expected = dense(GradientEngine(model), tiny_batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    engine = GradientEngine(model)
    model.train()  # transformers checkpoints in training mode only; dropout is 0 here
    found = dense(engine, tiny_batch())
    assert_same(found, expected, rtol=1e-6)
    assert all(p.grad is None for p in model.parameters())


# GPT-2 looks positions up once for the whole batch, without a batch axis; OPT's class looks up
# something else than what it is given. Neither is in a block.
POSITIONS = {"gpt2": {"transformer.wpe.weight"}, "opt": {"model.decoder.embed_positions.weight"}}


@pytest.mark.parametrize("kind", [*KINDS, "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_need_no_slow_path(family: str, kind: str) -> None:
    model = tiny_trainable(family, kind)
    assert len(blocks(model)) == 2
    engine = GradientEngine(model)
    engine.probe(tiny_batch())
    assert engine.looped == (POSITIONS.get(family, set()) if kind == "full" else set())
    assert not engine.idle


def test_chosen_layers_alone_are_captured() -> None:
    model = tiny_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1." in name)
    expected = loop_gradients(model, tiny_tokens())
    found = dense(GradientEngine(model), tiny_batch())
    assert found.keys() == expected.keys()
    assert_same(found, expected, rtol=1e-5)


def test_tied_weights_get_the_sum_of_both_uses() -> None:
    model = tiny_model("gemma")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for p in model.parameters():
        p.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    assert_same(
        dense(GradientEngine(model), tiny_batch()),
        loop_gradients(model, tiny_tokens()),
        rtol=1e-5,
    )


class Odd(nn.Module):
    """A wrapper that adds one trap of DESIGN.md to a tiny Llama's hidden states."""

    def __init__(self, trap: str) -> None:
        super().__init__()
        self.inner = tiny_model("llama")
        for p in self.inner.parameters():
            p.requires_grad_(False)
        self.trap = trap
        torch.manual_seed(1)
        self.extra = nn.Linear(16, 16)
        self.experts = nn.Parameter(torch.randn(2, 16, 16) * 0.3)
        self.experts.requires_grad_(trap == "experts")
        self.inner.model.layers[0].register_forward_hook(self._after)

    def _after(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        match self.trap:
            case "twice":
                return output + self.extra(self.extra(output))
            case "functional":
                mixed = nn.functional.linear(output, self.extra.weight)
                return output + mixed + self.extra(output)
            case "broadcast":
                return output + self.extra(torch.ones(1, 16))
            case "flat":  # tokens routed without a batch axis, as mixtures of experts do
                return output + self.extra(output.flatten(0, 1)).view_as(output)
            case "mixed":  # the same, with the tokens of different examples side by side
                flat = self.extra(output.transpose(0, 1).flatten(0, 1))
                return output + flat.view(*output.shape[1::-1], 16).transpose(0, 1)
            case _:
                extra = torch.einsum("nti,eoi->nto", output, self.experts)
                return output + extra + self.extra(output)

    def forward(self, **kwargs: Tensor) -> object:
        return self.inner(**kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()


@pytest.mark.parametrize("trap", ["twice", "functional", "broadcast", "flat", "mixed", "experts"])
def test_known_traps_give_the_exact_gradient(trap: str) -> None:
    model = Odd(trap).eval()
    expected = loop_gradients(model, tiny_tokens())
    found = dense(GradientEngine(model), tiny_batch())
    assert found.keys() == expected.keys()
    assert_same(found, expected, rtol=1e-5)


@pytest.mark.parametrize("trap", ["broadcast", "mixed"])
def test_a_first_batch_of_one_example_hides_no_trap(trap: str) -> None:
    engine = GradientEngine(Odd(trap).eval())
    dense(engine, tiny_batch(1))
    expected = loop_gradients(engine.model, tiny_tokens())
    assert_same(dense(engine, tiny_batch()), expected, rtol=1e-5)
    assert engine.looped == {"extra.weight", "extra.bias"}


# As above: one name in transformers 5.23, another in 5.24.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("how", ["lora", "dora", "reentrant", "non-reentrant"])
def test_rows_are_freed_as_the_backward_pass_goes_by(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_trainable("llama", "dora" if how == "dora" else "lora")
    engine = GradientEngine(model)
    if "reentrant" in how:
        kwargs = {"use_reentrant": how == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
        model.train()
    engine.probe(tiny_batch())
    seen: list[str] = []
    before_finish: list[int] = []
    finish = Capture.finish

    def watched(capture: Capture) -> None:
        before_finish.append(len(seen))
        finish(capture)

    monkeypatch.setattr(Capture, "finish", watched)
    engine.run(tiny_batch(), lambda name, _: seen.append(name))
    # No parameter is used twice, so none has to wait for the end with its rows.
    assert before_finish == [len(engine.parameters)]


class Rare(nn.Module):
    """A tiny Llama with a bare parameter that only examples holding token 7 use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama").requires_grad_(False)
        torch.manual_seed(1)
        self.always = nn.Linear(16, 16)
        self.rare = nn.Parameter(torch.randn(16, 16))
        self.inner.model.layers[0].register_forward_hook(self._after)

    def _after(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output + self.always(input=output)
        if self.holds.any():
            output = output + (output @ self.rare) * self.holds[:, None, None]
        return output

    def forward(self, **kwargs: Tensor) -> object:
        self.holds = (kwargs["input_ids"] == 7).any(1)
        return self.inner(**kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()


def test_a_parameter_first_used_by_a_later_batch_is_not_missed() -> None:
    engine = GradientEngine(Rare().eval())
    items = tiny_tokens()
    for item in items:
        item.input_ids[item.input_ids == 7] = 8
    assert dense(engine, collate(items, pad_id=0)).keys() == {"always.weight", "always.bias"}
    assert engine.looped == frozenset()
    for item in items[:2]:
        item.input_ids[0] = 7
    expected = loop_gradients(engine.model, items)
    for _ in range(2):  # found out by the first such batch, known to the second
        found = dense(engine, collate(items, pad_id=0))
        assert found.keys() == expected.keys()
        assert_same(found, expected, rtol=1e-5)
    assert engine.looped == {"rare"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("way", ["plain", "reentrant", "looped"])
def test_gradients_that_stood_in_the_model_stay(way: str) -> None:
    model = Odd("experts") if way == "looped" else tiny_trainable("llama", "lora")
    engine = GradientEngine(model)
    if way == "reentrant":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        model.train()
    for p in engine.parameters.values():
        p.grad = torch.ones_like(p)
    dense(engine, tiny_batch())
    assert all(bool((p.grad == 1).all()) for p in engine.parameters.values())


def test_rows_add_up_to_the_batch_gradient() -> None:
    model = tiny_trainable("qwen2", "lora")
    batch = tiny_batch()
    sums: dict[str, Tensor] = {}
    GradientEngine(model).run(batch, lambda n, r: sums.update({n: r.combine(torch.ones(r.n))}))
    model.zero_grad()
    example_loss(model, batch).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(sums[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "series", "parallel", "prefix"])
def test_bf16_follows_fp32(kind: str) -> None:
    model = tiny_trainable("llama", kind)
    exact = dense(GradientEngine(copy.deepcopy(model)), tiny_batch())
    rough = dense(GradientEngine(model, precision="bfloat16"), tiny_batch())
    a = torch.cat([v.flatten(1) for v in exact.values()], 1)
    b = torch.cat([rough[k].flatten(1) for k in exact], 1)
    assert (nn.functional.cosine_similarity(a, b) > 0.995).all()
    assert not torch.equal(a, b)


def test_torch_func_agrees() -> None:
    model = tiny_trainable("gpt2", "lora")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    state = {n: p.detach() for n, p in model.named_parameters()}

    def loss(trained: dict[str, Tensor], ids: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {**state, **trained}, kwargs={"input_ids": ids})
        scores = out.logits[0, :-1].float()
        return nn.functional.cross_entropy(scores, ids[0, 1:])

    for example in tiny_tokens():
        whole = type(example)(example.id, example.input_ids, example.is_target | True)
        ids = torch.as_tensor(example.input_ids)[None]
        expected = torch.func.grad(loss)({n: state[n] for n in names}, ids)
        whole.is_target[0] = False
        found = dense(GradientEngine(model), collate([whole], pad_id=0))
        assert_same(found, {n: g[None] for n, g in expected.items()}, rtol=1e-5)


def test_opacus_agrees_where_it_applies() -> None:
    opacus = pytest.importorskip("opacus.grad_sample")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 12), nn.LayerNorm(12))
    ids = torch.randint(0, VOCABULARY, (4, 6))
    engine_rows: dict[str, Tensor] = {}

    with Capture(plain, lambda n, r: engine_rows.update({n: r.dense()})) as capture:
        capture.expect(4)
        capture.backward(plain(ids).square().sum((1, 2)))
    wrapped = opacus.GradSampleModule(copy.deepcopy(plain), loss_reduction="sum")
    wrapped(ids).square().sum().backward()
    for name, p in wrapped._module.named_parameters():
        torch.testing.assert_close(engine_rows[name], p.grad_sample, rtol=1e-5, atol=1e-5)


def test_losses_are_the_loop_losses() -> None:
    model = tiny_trainable("llama", "lora")
    losses = GradientEngine(model).run(tiny_batch(), lambda n, r: None)
    expected = torch.stack([loop_loss(model, e) for e in tiny_tokens()])
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-6)


def test_a_frozen_model_is_refused() -> None:
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(SelectionError, match="no parameter of the model is trainable"):
        GradientEngine(model)


ROW_QUESTIONS: dict[str, Callable[[Rows, Tensor], Tensor]] = {
    "combine": lambda rows, G: rows.combine(torch.linspace(-1, 2, rows.n).to(G)),
    "dot": lambda rows, G: rows.dot(G[0]),
    "norm2": lambda rows, G: rows.norm2(),
    "project": lambda rows, G: rows.project(G.flatten(1)),
}
ANSWERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "combine": lambda g, G: torch.tensordot(torch.linspace(-1, 2, len(g)).to(g), g, 1),
    "dot": lambda g, G: torch.stack([(row * G[0]).sum() for row in g]),
    "norm2": lambda g, G: torch.stack([(row * row).sum() for row in g]),
    "project": lambda g, G: torch.stack([torch.stack([(row * d).sum() for d in G]) for row in g]),
}


@pytest.mark.parametrize("question", sorted(ROW_QUESTIONS))
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "opt"])
def test_every_question_to_rows_equals_the_dense_answer(family: str, question: str) -> None:
    model = tiny_trainable(family, "full").double()
    checked: list[str] = []

    def check(name: str, rows: Rows) -> None:
        g = rows.dense()
        assert g.shape == (rows.n, *rows.shape)
        torch.manual_seed(len(checked))
        G = torch.randn(3, *rows.shape, dtype=g.dtype)
        torch.testing.assert_close(
            ROW_QUESTIONS[question](rows, G), ANSWERS[question](g, G), rtol=1e-9, atol=1e-9
        )
        checked.append(name)

    engine = GradientEngine(model)
    engine.run(tiny_batch(), check)
    assert sorted(checked) == sorted(engine.parameters)
