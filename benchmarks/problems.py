"""Problems that the benchmarks share: models, losses and data, the same in every run.

A problem is data: a thunk that builds it and facts about it. Weights and data come
from torch's generator with a fixed seed, so that every process that runs the same
version of torch gets the same numbers (the runner compares checksums).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A model with data, and what a benchmark may ask of it.

    Parameters
    ----------
    about : str
        One line for tables.
    build : callable
        Returns model and batches.
    warmup : int
        Products after which every route has settled.
    settles_by_itself : bool
        Whether that is seen from the batches' routes. (No matrix comes after these.)
    max_columns : int
        Widest block of columns that is multiplied.
    """

    about: str
    build: Callable[..., tuple[nn.Module, Batches]]
    warmup: int = 100
    settles_by_itself: bool = True
    max_columns: int = 64


class Block(nn.Module):
    """Residual block of two 3x3 convolutions, as ResNet18 has them."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.skip = nn.Sequential()
        if stride != 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        return (self.main(x) + self.skip(x)).relu()


class Transformer(nn.Module):
    """Decoder in the manner of GPT-2; attention is spelled out."""

    def __init__(
        self, vocabulary: int, length: int, dim: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.place = nn.Embedding(length, dim)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, one row per token."""
        h = self.token(x) + self.place(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h)).flatten(0, 1)


class Layer(nn.Module):
    """Attention and two linear maps, both residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend to earlier tokens, then transform every token."""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norm2(x))


def multilayer(
    widths: tuple[int, ...], batch: int, batches: int, nonlinearity: type[nn.Module]
) -> tuple[nn.Module, Batches]:
    """Return a fully connected network and random data."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nonlinearity()]
    data = [
        (torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,)))
        for _ in range(batches)
    ]
    return nn.Sequential(*layers[:-1]), data


def mlp(batches: int = 1, width: int = 512) -> tuple[nn.Module, Batches]:
    """Return 784-512-512-10 with ReLU, batches of 512."""
    return multilayer((784, width, width, 10), 512, batches, nn.ReLU)


def tiny(batches: int = 1) -> tuple[nn.Module, Batches]:
    """Return 8-24-24-4 with tanh, batches of 64."""
    return multilayer((8, 24, 24, 4), 64, batches, nn.Tanh)


def cnn() -> tuple[nn.Module, Batches]:
    """Return ResNet18's layout, of width 32, and 32 images of 3x32x32."""
    torch.manual_seed(0)
    widths = 32, 32, 64, 128, 256
    layers: list[nn.Module] = [
        nn.Conv2d(3, 32, 3, 1, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    ]
    for i, (c_in, c_out) in enumerate(pairwise(widths)):
        layers += [Block(c_in, c_out, 1 if i == 0 else 2), Block(c_out, c_out, 1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)]
    data = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
    return nn.Sequential(*layers).eval(), data


def gpt() -> tuple[nn.Module, Batches]:
    """Return 4 layers of width 256, and 4 sequences of 128 random tokens."""
    torch.manual_seed(0)
    model = Transformer(vocabulary=1000, length=128, dim=256, depth=4, heads=8)
    X, y = torch.randint(1000, (4, 128)), torch.randint(1000, (4 * 128,))
    return model, [(X, y)]


PROBLEMS = {
    "mlp": Problem("784-512-512-10, ReLU, one batch of 512", mlp),
    "tiny": Problem("8-24-24-4, tanh, one batch of 64", tiny, 150, False),
    "tiny8": Problem(
        "8-24-24-4, tanh, 8 batches of 64", lambda: tiny(batches=8), 400, False
    ),
    "cnn": Problem(
        "ResNet18's layout, width 32, eval BatchNorm, 32 images 3x32x32",
        cnn,
        max_columns=16,
    ),
    "gpt": Problem(
        "4 layers, width 256, 8 heads, untied, 4 sequences of 128 of 1000 tokens",
        gpt,
        max_columns=16,
    ),
}


def problem(name: str) -> Problem:
    """Return a problem by name, such as ``mlp`` or ``mlp:batches=8,width=128``."""
    if name in PROBLEMS:
        return PROBLEMS[name]
    base, _, options = name.partition(":")
    numbers = {k: int(v) for k, v in (o.split("=") for o in options.split(","))}
    build = PROBLEMS[base].build
    return replace(PROBLEMS[base], about=name, build=lambda: build(**numbers))


#: Short names of the matrices, and what both packages call their operators.
MATRICES = {
    "ggn": "GGNLinearOperator",
    "hessian": "HessianLinearOperator",
    "ef": "EFLinearOperator",
}


def mean_gradient(
    model: nn.Module, data: Batches, params: list[nn.Parameter]
) -> list[Tensor]:
    """Return the gradient of the mean cross-entropy: one unit of cost."""
    count = sum(len(y) for _, y in data)
    total = [torch.zeros_like(p) for p in params]
    for X, y in data:
        loss = cross_entropy(model(X), y, reduction="sum") / count
        for t, g in zip(total, torch.autograd.grad(loss, params), strict=True):
            t += g
    return total


def reference_product(matrix: str, build: Callable[[], Any], v: Tensor) -> Tensor:
    """Multiply with a matrix in float64 by plain autograd, reverse mode only."""
    model, data = build()
    model = model.double()
    params = list(model.parameters())
    v = v.double()
    vs = [
        part.view_as(p)
        for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)
    ]
    count, total = sum(len(y) for _, y in data), torch.zeros_like(v)
    for X, y in data:
        f = model(X if not X.is_floating_point() else X.double())
        loss = cross_entropy(f, y, reduction="sum") / count
        if matrix == "hessian":
            g = torch.autograd.grad(loss, params, create_graph=True)
            products = torch.autograd.grad(g, params, vs)
        else:
            u = torch.zeros_like(f, requires_grad=True)
            JTu = torch.autograd.grad(f, params, u, create_graph=True)
            (Jv,) = torch.autograd.grad(JTu, u, vs)
            (g,) = torch.autograd.grad(loss, f, create_graph=True)
            if matrix == "ggn":
                (w,) = torch.autograd.grad(g, f, Jv, retain_graph=True)
            else:
                w = count * (g * Jv).sum(-1, keepdim=True) * g
            products = torch.autograd.grad(f, params, w.detach())
        total += torch.cat([p.flatten() for p in products])
    return total
