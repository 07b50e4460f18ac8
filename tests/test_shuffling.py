"""Data whose batches differ from pass to pass: what is said, and when."""

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import references
from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)
from tolerances import assert_close

LOSS = nn.CrossEntropyLoss()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def dataset() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.rand(7, 3).double(), torch.randint(2, (7,)))


class Scattered:
    """No loader, but in another order each time."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        for chunk in torch.randperm(7).split(3):
            yield self.dataset[chunk]


def loaders(dataset: TensorDataset) -> dict[str, Any]:
    sampler = RandomSampler(dataset)
    return {
        "`shuffle=True`": DataLoader(dataset, 3, shuffle=True),
        "`shuffle=True`, too": DataLoader(
            dataset, batch_sampler=BatchSampler(sampler, 3, False)
        ),
        "`Scattered`": Scattered(dataset),
    }


def data_of(dataset: TensorDataset) -> list[tuple[Tensor, Tensor]]:
    return [dataset[:4], dataset[4:]]


@pytest.mark.parametrize("place", range(3))
def test_it_is_said_once_with_the_cure(net: nn.Module, dataset: Any, place: int):
    what, loader = [*loaders(dataset).items()][place]
    params = dict(net.named_parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for cls in (GGNLinearOperator, HessianLinearOperator):
            reference = {
                GGNLinearOperator: references.ggn,
                HessianLinearOperator: references.hessian,
            }[cls]
            expected = reference(net, LOSS, params, data_of(dataset))
            A = cls(net, LOSS, params, loader)
            for _ in range(3):
                assert_close(A @ np.eye(26), expected)
            A.plan()
            assert_close(copy.copy(A).to_dense(), expected)
    (message,) = [str(w.message) for w in caught]
    for part in (what.split(",")[0], "evaluates the model", "shuffle=False"):
        assert part in message
    for part in ("`list(loader)`", "larger batches"):
        assert part in message


def test_it_is_said_without_a_check(net: nn.Module, dataset: Any):
    loader = DataLoader(dataset, 3, shuffle=True)
    params = dict(net.named_parameters())
    A = GGNLinearOperator(net, LOSS, params, loader, check_deterministic=False)
    assert "shuffle=False" in A.status().reason
    with pytest.warns(UserWarning, match="shuffle=False") as caught:
        for _ in range(3):
            A @ np.ones(26)
    assert len(caught) == 1


def test_what_it_does_not_concern(net: nn.Module, dataset: Any):
    """Data that repeat, matrices that need no data, and what was asked for."""
    params = dict(net.named_parameters())
    loader = DataLoader(dataset, 3, shuffle=True)
    A = GGNLinearOperator(net, LOSS, params, DataLoader(dataset, 3))
    A @ np.ones(26)
    A = GGNLinearOperator(net, LOSS, params, list(loader))
    A @ np.ones(26)
    K = KFACLinearOperator(net, LOSS, params, loader, fisher_type="type-2")
    K @ np.ones(26)
    A = GGNLinearOperator(net, LOSS, params, loader, cache="off")
    A @ np.ones(26)
    EmpiricalRisk(net, LOSS, params, loader).gradient_and_loss()


def test_each_product_evaluates_the_model_anew(dataset: Any):
    """What is said of the cost, counted."""

    class Counting(nn.Linear):
        calls = 0

        def forward(self, X: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(X)

    net = Counting(3, 2).double()
    params = dict(net.named_parameters())
    calls = {}
    for name, data in (
        ("shuffled", DataLoader(dataset, 3, shuffle=True)),
        ("listed", [*DataLoader(dataset, 3)]),
        ("off", [*DataLoader(dataset, 3)]),
        ("larger", DataLoader(dataset, 7, shuffle=True)),
    ):
        cache = "off" if name == "off" else "auto"
        A = GGNLinearOperator(net, LOSS, params, data, cache=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                A @ np.ones(8)
            before = Counting.calls
            A @ np.ones(8)
        calls[name] = Counting.calls - before
    assert calls["listed"] == 0
    assert calls["shuffled"] == calls["off"] == 3 * calls["larger"] > 0


@pytest.mark.filterwarnings("ignore:The batches of:UserWarning")
def test_plan_and_status_say_why(net: nn.Module, dataset: Any):
    params = dict(net.named_parameters())

    def make(data: Any, **options: Any) -> GGNLinearOperator:
        A = GGNLinearOperator(net, LOSS, params, data, **options)
        A @ np.ones(26)
        A @ np.ones(26)
        return A

    loader = DataLoader(dataset, 3, shuffle=True)
    unknown = make(DataLoader(dataset, 3), check_deterministic=False)
    cases = (
        (make(loader), "shuffle=True.*shuffle=False"),
        (unknown, "check_deterministic.*list"),
        (make([*loader], cache="off"), '`cache` is "off"'),
    )
    for A, reason in cases:
        plan, status = A.plan(), A.status()
        for said in (plan.reason, status.reason, str(plan), str(status)):
            assert "Nothing is kept" in said
            assert re.search(reason, said)
        assert {b.route for b in plan.batches} == {"recomputed"}
        assert status.batches == ("recomputed",) * 3
        assert status.held == 0
    kept = make([*loader])
    assert kept.plan().reason == kept.status().reason == ""
    assert kept.status().batches == ("graph",) * 3
    assert kept.status().held > 0
    assert not kept.status().matrix


def test_status_follows(net: nn.Module, dataset: Any):
    params = dict(net.named_parameters())
    batches = [*DataLoader(dataset, 3)]
    G = GGNLinearOperator(net, LOSS, params, batches)
    assert "no product" in G.status().reason
    seen = []
    for _ in range(60):
        G @ np.ones(26)
        seen.append(G.status())
    assert seen[0].batches == ("graph",) * 3
    assert seen[-1].matrix
    assert "matrix is kept" in str(seen[-1])
    with torch.no_grad():
        net[0].weight.mul_(1.1)
    assert "no product" in G.status().reason
    one = GGNLinearOperator(net, LOSS, params, batches, cache=seen[0].held // 2)
    one @ np.ones(26)
    assert "recomputed" in one.status().batches
    assert "Not all is kept" in one.status().reason
    assert "Not all is kept" in one.plan().reason
    K = KFACLinearOperator(net, LOSS, params, batches)
    with pytest.raises(TypeError, match="over the data"):
        K.status()


def test_the_cure_of_loaders_that_leave_data_out(net: nn.Module, dataset: Any):
    weighted = WeightedRandomSampler(torch.rand(7), 7)
    drops = DataLoader(dataset, 3, shuffle=True, drop_last=True)
    cases = (
        (DataLoader(dataset, 3, sampler=weighted), "draws other data.*`list"),
        (drops, "last 1 of 7 data are left out.*`drop_last=False`"),
    )
    for loader, cure in cases:
        params = dict(net.named_parameters())
        A = GGNLinearOperator(net, LOSS, params, loader, check_deterministic=False)
        with pytest.warns(UserWarning, match=cure) as caught:
            A @ np.ones(26)
        assert "does not depend" not in str(caught[0].message)
        assert re.search(cure, A.status().reason)


# Passes whose losses differ


class Augmented(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.rand(3).double(), torch.tensor(0)


def test_why_passes_differ_is_named(net: nn.Module, dataset: Any):
    weighted = WeightedRandomSampler(torch.rand(7), 7)
    drawn = RandomSampler(dataset, replacement=True)
    drops = r"`drop_last=True` leaves out 1 of 7 data.*`shuffle=False`"
    batched = BatchSampler(RandomSampler(dataset), 3, True)
    cases = (
        (DataLoader(dataset, 3, shuffle=True, drop_last=True), drops),
        (DataLoader(dataset, batch_sampler=batched), drops),
        (DataLoader(dataset, 3, sampler=weighted), "`WeightedRandomSampler` draws"),
        (DataLoader(dataset, 3, sampler=drawn), "`RandomSampler` draws"),
        (DataLoader(Augmented(), 2), "random augmentation"),
    )
    for loader, cause in cases:
        torch.manual_seed(0)
        with pytest.raises(ValueError, match=rf"differs between the passes.*{cause}"):
            GGNLinearOperator(net, LOSS, dict(net.named_parameters()), loader)


def test_dropping_nothing_is_no_fault(net: nn.Module, dataset: Any):
    loader = DataLoader(dataset, 7, shuffle=True, drop_last=True)
    params = dict(net.named_parameters())
    with pytest.warns(UserWarning, match="differ from pass to pass"):
        found = GGNLinearOperator(net, LOSS, params, loader).to_dense()
    assert_close(found, references.ggn(net, LOSS, params, data_of(dataset)))
