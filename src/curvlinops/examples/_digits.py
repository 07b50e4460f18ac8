"""A network that learns to read scikit-learn's 1797 scanned digits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]
Bar = Callable[..., Any]

CPU = torch.device("cpu")


class Digits(NamedTuple):
    """A trained network, its parameters by name, and the digits."""

    model: nn.Sequential
    params: dict[str, Tensor]
    data: Batches
    test_data: Batches


def no_bar(steps: Iterable[Any], **options: Any) -> Iterable[Any]:
    """Show no progress, where a function takes a progress bar like tqdm's."""
    return steps


def load_digits_batches(
    batch_size: int, seed: int, device: torch.device = CPU
) -> tuple[Batches, Batches]:
    """Return mini-batches of training digits and one batch of test digits.

    A fifth is kept for testing. Pixels are between 0 and 1, in float64.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        pixels / 16, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    X_train, X_test, y_train, y_test = (torch.from_numpy(p).to(device) for p in parts)
    batches = zip(X_train.split(batch_size), y_train.split(batch_size), strict=True)
    return list(batches), [(X_test, y_test)]


def make_network(hidden: int, seed: int, device: torch.device = CPU) -> nn.Sequential:
    """Return an untrained network 64-hidden-10 in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    return network.to(device, torch.float64)


def train(model: nn.Module, data: Batches, epochs: int, bar: Bar = no_bar) -> None:
    """Minimise the cross-entropy with torch's own Adam."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in bar(range(epochs), desc="Training"):
        for X, y in data:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(X), y).backward()
            optimiser.step()


def accuracy(model: nn.Module, data: Batches) -> float:
    """Return the share of digits that are read correctly."""
    with torch.no_grad():
        hits = torch.cat([model(X).argmax(1) == y for X, y in data])
    return hits.double().mean().item()


def trained_digits(
    hidden: int,
    epochs: int,
    seed: int,
    batch_size: int = 500,
    split: int | None = None,
) -> Digits:
    """Return a network 64-hidden-10 after training, with its data.

    ``split`` is the seed of what is kept for testing, by default that of the network.
    """
    data, test_data = load_digits_batches(batch_size, seed if split is None else split)
    model = make_network(hidden, seed)
    train(model, data, epochs)
    return Digits(model, dict(model.named_parameters()), data, test_data)
