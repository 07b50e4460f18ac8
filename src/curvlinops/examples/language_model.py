r"""A character-level language model with attention, and its curvature.

Run it as ``python -m curvlinops.examples.language_model``.

*Question.* Curvature of a transformer: is there more to it than for a perceptron? The
loss is a mean over tokens, attention is causal, and some parameters (embeddings, norms)
are curved very differently from others.

*Formula.* With logits of shape ``(B, T, V)`` and targets of shape ``(B, T)``, every
token is a term of its own:

.. math::

    L(\theta) = \frac{1}{B T} \sum_{b, t}
    -\log p_\theta(x_{b, t + 1} \mid x_{b, 1}, \dots, x_{b, t}) ,

so the GGN is :math:`\frac{1}{BT} \sum_{bt} J_{bt}^\top (\operatorname{diag} p - p
p^\top) J_{bt}`, and does not change when the sequences are batched differently.

*Call.* ``HessianLinearOperator(as_model(model, class_axis=-1), loss, params, data)``.
Attention runs in its math form, as the fused kernels have no second derivatives; it
keeps the matrix of attention weights, :math:`T^2` numbers per head and sequence.

*What is seen.* The text is Python's own documentation, the docstrings of the standard
library. After training the model knows the frequent words; the printed lines are its
own. The spectra: many eigenvalues near zero, few large ones, and a Hessian with a
negative part, which the GGN has not. Layer by layer, the largest eigenvalues of the
blocks span two orders of magnitude, one of the reasons given for why such models are
trained by Adam rather than by gradient descent.

References: A. Vaswani et al., "Attention is all you need", arXiv:1706.03762. Y. Zhang
et al., "Why transformers need Adam: a Hessian perspective", arXiv:2402.16788.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import sys
import textwrap
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    SpectralDensity,
    as_model,
    lanczos_approximate_spectrum,
    top_eigenpairs,
)
from curvlinops.examples._page import Page, command, relative_error
from curvlinops.examples.functorch import functorch_ggn, functorch_hessian
from curvlinops.plots import plot_spectral_density

MODULES = argparse, inspect, json, random, textwrap
ALPHABET = "\n !\"#$%&'()*+,-./0123456789:;<=>?@[]_`abcdefghijklmnopqrstuvwxyz{|}"
Batches = list[tuple[Tensor, Tensor]]


def text() -> str:
    """Return the docstrings of some modules of the standard library, in lower case."""
    found = []
    for module in MODULES:
        for name in sorted(vars(module)):
            item = getattr(module, name)
            if getattr(item, "__module__", None) == module.__name__:
                found.append(inspect.getdoc(item) or "")
    joined = "\n".join(found).lower()
    return "".join(c for c in joined if c in ALPHABET)


class LanguageModel(nn.Module):
    """One block of a transformer, on characters.

    Parameters
    ----------
    width, heads, length : int
        Width of the embeddings, number of heads, longest sequence.
    """

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Embedding(length, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.mixture = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of shape ``(B, T, V)`` for characters of shape ``(B, T)``."""
        batch, length = ids.shape
        x = self.tokens(ids) + self.positions.weight[:length]
        shape = batch, length, 3, self.heads, -1
        q, k, v = self.attention(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mixture(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of all tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(model: LanguageModel, ids: Tensor, length: int, steps: int) -> list[float]:
    """Minimise the loss of random pieces of the text with Adam."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(ids) - length - 1, (32, 1))
        pieces = ids[starts + torch.arange(length + 1)]
        optimiser.zero_grad()
        loss = token_loss(model(pieces[:, :-1]), pieces[:, 1:])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def write(model: LanguageModel, length: int, number: int) -> str:
    """Return text that the model writes, the likelier the letter the likelier."""
    ids = torch.tensor([[ALPHABET.index("r")]])
    with torch.no_grad():
        for _ in range(number):
            odds = model(ids[:, -length:])[0, -1].softmax(0)
            ids = torch.cat([ids, torch.multinomial(odds, 1)[None]], 1)
    return "".join(ALPHABET[i] for i in ids[0].tolist())


def body(page: Page) -> None:
    """Train, write, look at the curvature, compare with dense, draw."""
    width, length, steps = (4, 16, 150) if page.quick else (24, 32, 1500)
    content = text()
    ids = torch.tensor([ALPHABET.index(c) for c in content])
    model = LanguageModel(width, 2, length)
    losses = train(model, ids, length, steps)
    late = float(np.mean(losses[-50:]))
    print(f"{len(content)} characters; loss {losses[0]:.3f} -> {late:.3f} for one,")
    print(f"where equal odds have {np.log(len(ALPHABET)):.3f}. The model writes:")
    print(textwrap.indent(write(model, length, 160), "  | "))
    page.check("loss over that of equal odds", late / np.log(len(ALPHABET)), 0.9)

    model = model.double()
    pieces = ids[: 8 * (length + 1)].view(8, -1)
    batches = [(part[:, :-1], part[:, 1:]) for part in pieces.split([3, 5])]
    params, loss = dict(model.named_parameters()), nn.CrossEntropyLoss()
    risk = EmpiricalRisk(as_model(model, class_axis=-1), loss, params, batches)
    H, G = HessianLinearOperator(risk), GGNLinearOperator(risk)
    print(f"\n{H}\n{G}")
    compare(page, H, G, model, (pieces[:, :-1], pieces[:, 1:]))

    ncv, repeats = (40, 2) if page.quick else (50, 2)
    options: dict[str, Any] = {"num_repeats": repeats, "rng": page.seed}
    densities = {
        "Hessian": lanczos_approximate_spectrum(H, ncv, **options),
        "GGN": lanczos_approximate_spectrum(G, ncv, **options),
    }
    for name, density in densities.items():
        low, high = density.boundaries
        print(f"{name:<8} eigenvalues seen from {low:.4f} to {high:.4f}")
    page.check("GGN, minus its least eigenvalue", -densities["GGN"].boundaries[0], 1e-8)
    tops = block_eigenvalues(H, page.seed)
    largest = float(densities["Hessian"].boundaries[1])
    excess = max(tops.values()) / largest - 1
    page.check("largest eigenvalue of a block above that of the whole", excess, 1e-3)
    draw(page, losses, densities, tops)


def compare(
    page: Page, H: Any, G: Any, model: LanguageModel, batch: tuple[Tensor, Tensor]
) -> None:
    """Compare a layer's block, of Hessian and GGN, with dense matrices."""
    name = "positions.weight" if page.quick else "norm2.*"
    block_H, block_G = H.block(name), G.block(name)
    chosen = {
        key: p
        for key, p in model.named_parameters()
        if key.startswith(name.removesuffix("*"))
    }
    rest = {key: p.detach() for key, p in model.named_parameters() if key not in chosen}

    def logits(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.func.functional_call(model, {**rest, **params}, (X,)).flatten(0, 1)

    data = [(batch[0], batch[1].flatten())]
    problem = logits, nn.CrossEntropyLoss(), chosen, data
    for kind, block, dense in (
        ("Hessian", block_H, functorch_hessian(*problem)),
        ("GGN", block_G, functorch_ggn(*problem)),
    ):
        v = np.random.default_rng(page.seed).standard_normal(len(dense))
        error = relative_error(block @ v, dense.numpy() @ v)
        page.check(f"{kind}, block {name} vs dense", error, 1e-10)
        top = top_eigenpairs(block, 1, rng=page.seed).numpy()[0]
        truth = torch.linalg.eigvalsh(dense)[-1].item()
        page.check(f"{kind}, its largest eigenvalue", abs(top / truth - 1), 1e-8)


def block_eigenvalues(H: HessianLinearOperator, seed: int) -> dict[str, float]:
    """Return the largest eigenvalue of every parameter's block."""
    return {
        name: float(top_eigenpairs(block, 1, tol=1e-4, rng=seed).values[0])
        for name, block in H.blocks().items()
    }


def draw(
    page: Page,
    losses: list[float],
    densities: dict[str, SpectralDensity],
    tops: dict[str, float],
) -> None:
    """Draw training, densities, and the blocks' eigenvalues."""
    with page.figure("language_model", 13, 3.9, ncols=3) as (left, middle, right):
        left.plot(losses, linewidth=0.7)
        left.set(xlabel="step", ylabel="loss per character", title="training")
        plot_spectral_density(densities, middle)
        middle.set_title("all eigenvalues")
        right.barh(list(tops)[::-1], list(tops.values())[::-1])
        right.set(xscale="log", title="largest eigenvalue of each block")
        right.tick_params(axis="y", labelsize=8)


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
