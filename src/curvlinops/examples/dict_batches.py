r"""A model as HuggingFace writes them: batches are dictionaries, results have logits.

Run it as ``python -m curvlinops.examples.dict_batches``.

*Question.* Models of the transformers library take ``input_ids`` and ``attention_mask``
by keyword, get their labels from the same dictionary, and return an object with
``.logits``. Their sentences are padded to the longest of each batch. Can all that be
handed over as it is?

*Formula.* What is differentiated is the loss of the concatenated data,
:math:`L = \frac{1}{N} \sum_n \ell(f_\theta(x_n), y_n)`. How sentences are grouped into
batches, and how far they are padded, must not change a matrix.

*Call.* ``GGNLinearOperator(model, loss, params, batches)`` where ``batches`` is a list
of dictionaries, or a loader that gives such. Labels are found under ``"labels"``;
:func:`~curvlinops.as_model` says it where it is not clear.

*What is seen.* The model has token and position embeddings, one layer of self-attention
with a mask, and a classifier. It learns to tell the docstrings of :class:`str`,
:mod:`math` and :mod:`os` apart, character by character. Hessian and GGN agree with the
matrices that :mod:`torch.func` builds, also after the sentences are sorted, regrouped
and padded further. The figure shows eigenvalues, and how much of the GGN's trace lies
in which layer.

Reference: T. Wolf et al., "HuggingFace's Transformers: state-of-the-art natural
language processing", arXiv:1910.03771.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call

from curvlinops import EmpiricalRisk, GGNLinearOperator, HessianLinearOperator
from curvlinops.examples._page import Array, Page, command, relative_error
from curvlinops.examples.functorch import functorch_ggn, functorch_hessian

SUBJECTS = (str, math, os)
LENGTH, CHARACTERS = 56, 96
Batch = dict[str, Tensor]


@dataclass
class ClassifierOutput:
    """What the model returns; ``loss`` only if there were labels."""

    logits: Tensor
    loss: Tensor | None = None


class SentenceClassifier(nn.Module):
    """Embeddings, masked self-attention, the mean of the tokens, a linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(CHARACTERS, width)
        self.positions = nn.Embedding(LENGTH + 16, width)
        self.attention = nn.Linear(width, 3 * width)
        self.mixture = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, len(SUBJECTS))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> ClassifierOutput:
        """Return logits of shape ``(N, number of subjects)``."""
        batch, length = input_ids.shape
        x = self.tokens(input_ids) + self.positions.weight[:length]
        shape = batch, length, 3, self.heads, -1
        q, k, v = self.attention(x).view(shape).permute(2, 0, 3, 1, 4)
        seen = attention_mask.bool()[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = self.norm(x + self.mixture(mixed.transpose(1, 2).flatten(2)))
        weights = attention_mask.to(x.dtype) / attention_mask.sum(1, keepdim=True)
        logits = self.classifier(torch.einsum("nt,ntd->nd", weights, x))
        if labels is None:
            return ClassifierOutput(logits)
        return ClassifierOutput(logits, nn.functional.cross_entropy(logits, labels))


def sentences() -> list[tuple[list[int], int]]:
    """Return characters and subject of the first lines of Python's docstrings."""
    found = []
    for label, subject in enumerate(SUBJECTS):
        for name in sorted(vars(subject)):
            text = inspect.getdoc(getattr(subject, name)) or ""
            lines = [line.strip() for line in text.splitlines()]
            for line in [line for line in lines if len(line) > 10][:3]:
                found.append(([min(ord(c), 127) - 32 for c in line[:LENGTH]], label))
    return found


def collate(rows: list[tuple[list[int], int]], extra: int = 0) -> Batch:
    """Pad sentences to the longest one, and ``extra`` more, as tokenizers do."""
    length = max(len(ids) for ids, _ in rows) + extra
    ids = [ids + [0] * (length - len(ids)) for ids, _ in rows]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor([label for _, label in rows]),
    }


def train(model: SentenceClassifier, batches: list[Batch], epochs: int) -> float:
    """Minimise the model's own loss with Adam; return the share of right answers."""
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in batches:
            optimiser.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        pairs = [(model(**b).logits.argmax(1), b["labels"]) for b in batches]
    return torch.cat([guess == label for guess, label in pairs]).double().mean().item()


def body(page: Page) -> None:
    """Train, multiply, regroup the data, compare with dense matrices, draw."""
    number, width, epochs = (24, 4, 20) if page.quick else (96, 6, 40)
    everything = sentences()
    order = np.random.default_rng(page.seed).permutation(len(everything))
    rows = [everything[i] for i in order[:number]]
    groups = [rows[i : i + 8] for i in range(0, number, 8)]
    model = SentenceClassifier(width, heads=2).double()
    batches = [collate(group) for group in groups]
    accuracy = train(model, batches, epochs)
    print(f"{number} docstrings of {', '.join(s.__name__ for s in SUBJECTS)}, ", end="")
    print(f"{accuracy:.0%} of them told apart after {epochs} epochs")

    loss, params = nn.CrossEntropyLoss(), dict(model.named_parameters())
    risk = EmpiricalRisk(model, loss, params, batches)
    G, H = GGNLinearOperator(risk), HessianLinearOperator(risk)
    print(f"batches of lengths {[b['input_ids'].shape[1] for b in batches]}")
    print(G)

    dense_G, dense_H = dense_matrices(model, loss, params, collate(rows))
    v = np.random.default_rng(page.seed).standard_normal(G.shape[0])
    page.check("GGN @ v, vs dense", relative_error(G @ v, dense_G @ v), 1e-12)
    page.check("Hessian @ v, vs dense", relative_error(H @ v, dense_H @ v), 1e-12)
    by_length = sorted(rows, key=lambda row: len(row[0]))
    other = [collate(by_length[i : i + 16], 9) for i in range(0, number, 16)]
    again = HessianLinearOperator(model, loss, params, other)
    error = relative_error(again @ v, dense_H @ v)
    page.check("Hessian @ v, sorted, regrouped, padded more, vs dense", error, 1e-12)

    k = 12
    found = np.sort(eigsh(H, k, which="LA", v0=v, return_eigenvectors=False))[::-1]
    spectrum = np.linalg.eigvalsh(dense_H)[::-1]
    worst = float(np.max(np.abs(found - spectrum[:k])) / spectrum[0])
    page.check(f"{k} eigenvalues of the Hessian, vs dense", worst, 1e-10)
    shares = {
        name: float(block.to_dense().trace()) / np.trace(dense_G)
        for name, block in G.blocks().items()
    }
    rest = abs(sum(shares.values()) - 1)
    page.check("shares of the trace, their sum vs one", rest, 1e-10)
    draw(page, found, spectrum, shares)


def dense_matrices(
    model: nn.Module, loss: nn.Module, params: Mapping[str, Tensor], batch: Batch
) -> tuple[Array, Array]:
    """Return GGN and Hessian of all sentences as one batch, by another road."""
    X = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def logits(params: dict[str, Tensor], X: Batch) -> Tensor:
        return functional_call(model, params, (), X).logits

    problem = logits, loss, params, [(X, batch["labels"])]
    return functorch_ggn(*problem).numpy(), functorch_hessian(*problem).numpy()


def draw(page: Page, found: Array, spectrum: Any, shares: dict[str, float]) -> None:
    """Draw eigenvalues, and where the trace lies."""
    with page.figure("model", 9.5, 3.5, ncols=2) as (left, right):
        ranks = np.arange(1, 1 + 2 * len(found))
        left.plot(ranks, spectrum[: len(ranks)], "ko", markersize=4, label="dense")
        left.plot(ranks[: len(found)], found, "C1x", markersize=9, label="eigsh")
        left.set(xlabel="rank", ylabel="eigenvalue of the Hessian", yscale="log")
        left.grid(alpha=0.3)
        left.legend()
        right.barh(list(shares)[::-1], list(shares.values())[::-1])
        right.set_xlabel("share of the GGN's trace")


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
