"""How near an emulator is to its original, and what its middle is trained for, in plain loops."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from selectune.data import Tokens
from selectune.models import blocks


def slow_agreement(
    original: nn.Module, emulator: nn.Module, layers: Mapping[int, int], items: Sequence[Tokens]
) -> tuple[float, float]:
    """Return cosine and relative error of the layers' gradients, one example at a time."""
    own = torch.zeros(0, dtype=torch.float64)
    other = own.clone()
    for j, i in layers.items():
        own = torch.cat([own, _gradient(original, blocks(original)[j], items)])
        other = torch.cat([other, _gradient(emulator, blocks(emulator)[i], items)])
    cosine = (own @ other) / (own.norm() * other.norm())
    return float(cosine), float((other - own).norm() / own.norm())


def _gradient(model: nn.Module, block: nn.Module, items: Sequence[Tokens]) -> Tensor:
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in block.parameters()]
    for item in items:
        model.zero_grad()
        logits = _logits(model, item)
        at = [t for t in range(1, len(item.input_ids)) if item.is_target[t]]
        losses = [-logits[t - 1].log_softmax(-1)[item.input_ids[t]] for t in at]
        torch.stack(losses).mean().backward()
        for part, p in zip(total, block.parameters(), strict=True):
            part += p.grad.double() / len(items)
    model.zero_grad()
    return torch.cat([part.flatten() for part in total])


@torch.no_grad()
def slow_divergence(original: nn.Module, emulator: nn.Module, items: Sequence[Tokens]) -> float:
    """Return the mean KL over predicted tokens, one token at a time."""
    found: list[float] = []
    for item in items:
        p, q = (_logits(m, item).double().softmax(-1) for m in (original, emulator))
        read = [t - 1 for t in range(1, len(item.input_ids)) if item.is_target[t]]
        found += [float((p[t] * (p[t] / q[t]).log()).sum()) for t in read]
    return sum(found) / len(found)


@torch.no_grad()
def slow_distillation(
    original: nn.Module, emulator: nn.Module, ends: Mapping[int, int], items: Sequence[Tokens]
) -> float:
    """Return LM + 30 KD of one batch, without padding: every example by itself."""
    nats: list[Tensor] = []
    wanted: dict[int, list[Tensor]] = {j: [] for j in ends}
    found: dict[int, list[Tensor]] = {j: [] for j in ends}
    for item in items:
        ids = torch.tensor(item.input_ids)[None]
        h = original(ids, output_hidden_states=True).hidden_states
        out = emulator(ids, output_hidden_states=True)
        for j, i in ends.items():
            wanted[j].append(h[j + 1][0])
            found[j].append(out.hidden_states[i + 1][0])
        at = torch.tensor(item.is_target)[1:]
        nats.append(
            functional.cross_entropy(out.logits[0, :-1][at], ids[0, 1:][at], reduction="none")
        )
    distances: list[Tensor] = []
    for j in ends:
        teacher, student = torch.cat(wanted[j]), torch.cat(found[j])
        rms = teacher.square().mean().sqrt()
        distances.append((((teacher - student) / rms) ** 2).mean())
    return float(torch.cat(nats).mean() + 30 * torch.stack(distances).mean())


def _logits(model: nn.Module, item: Tokens) -> Tensor:
    return model(torch.tensor(item.input_ids)[None]).logits[0]
