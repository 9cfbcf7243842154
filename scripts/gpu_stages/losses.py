"""Head and loss of a large vocabulary: all logits at once, by chunks as training does it, and Liger's fused loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_stages.clock import waited
from gpu_stages.findings import Findings, at_most
from gpu_stages.models import free
from sparseft.bench.timing import peak_bytes
from sparseft.models.head import LOGITS, cross_entropy

LOSS_ERROR, GRADIENT_ERROR = 2e-3, 2e-2  # of bf16: logits and the gradient by them are rounded to it


def work(findings: Findings) -> None:
    vocabulary, width = (512, 64) if findings.dry else (128_256, 4096)
    for tokens in (32,) if findings.dry else (512, 4096):
        _compare(findings, tokens, width, vocabulary)
        free()


def _compare(findings: Findings, tokens: int, width: int, vocabulary: int) -> None:
    generator = torch.Generator(findings.device).manual_seed(0)
    with torch.device(findings.device):
        weight = torch.randn(vocabulary, width, generator=generator).mul_(width**-0.5).bfloat16()
        x = torch.randn(tokens, width, generator=generator).bfloat16()
        targets = torch.randint(vocabulary, (tokens,), generator=generator)
        weights = torch.full((tokens,), 1 / tokens)

    def plain() -> tuple[Tensor, Tensor]:
        inputs = x.detach().requires_grad_()
        loss = F.cross_entropy((inputs @ weight.t()).float(), targets)
        loss.backward()
        assert inputs.grad is not None
        return loss.detach(), inputs.grad

    def labelled() -> tuple[Tensor, Tensor]:
        step = LOGITS // vocabulary
        loss, gradient, _ = cross_entropy(lambda part: part @ weight.t(), x, targets, weights, step, by_x=True)
        assert gradient is not None
        return loss, gradient

    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"all logits": plain, "by chunks": labelled}
    if not findings.dry and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        def liger() -> tuple[Tensor, Tensor]:
            inputs = x.detach().requires_grad_()
            found = LigerFusedLinearCrossEntropyFunction.apply(inputs, weight, targets)
            loss = found[0] if isinstance(found, tuple) else found
            loss.backward()
            assert inputs.grad is not None
            return loss.detach(), inputs.grad

        ways["Liger"] = liger
    exact = torch.cat([part.float() @ weight.float().t() for part in x.split(512)]).requires_grad_()
    F.cross_entropy(exact, targets).backward()
    assert exact.grad is not None
    true_loss = F.cross_entropy(exact.detach(), targets)
    gradient = torch.cat([part @ weight.float() for part in exact.grad.split(512)])
    del exact
    for name, way in ways.items():
        what = f"{name}, {tokens} tokens"
        with findings.attempt(what):
            loss, by_x = way()
            error = (by_x.float() - gradient).abs().max() / gradient.abs().max()
            findings.number(f"{what}: loss off by", abs(float(loss / true_loss) - 1), "", at_most(LOSS_ERROR))
            findings.number(f"{what}: gradient off by", float(error), "", at_most(GRADIENT_ERROR))
            findings.number(f"{what}", 1000 * waited(way, 2 if findings.dry else 8), "ms")
            if not findings.dry:
                findings.number(f"{what}: peak", peak_bytes(way, torch.device(findings.device)) / 1e9, "GB")
