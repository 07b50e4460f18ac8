"""Models whose rows belong to data in every way there is, with data to put together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from packing import (
    PROJECTIONS,
    R,
    attend,
    attention,
    differences_of_sums,
    dispatched,
    experts,
    language_model,
    listed,
    marked,
    of_lengths,
    owners,
    packed,
    padded,
    pairs,
    ragged,
    raising,
    rnn,
    routed,
    sequence_of,
    sequences,
    summed,
    time_major,
    tokens,
    top2,
    with_table,
)

W = {"w": (4, 3), "v": (3, 2)}
WB = {**W, "b": (3,)}
MOE = {"e0": (4, 3), "e1": (4, 3), "b": (3,), "v": (3, 2)}


@dataclass
class Case:
    """A model, shapes of its parameters, and its data.

    Parameters
    ----------
    model : callable
        Maps parameters and what ``together`` makes of data to rows of two or more
        classes.
    shapes : dict
        Shapes of parameters.
    make : callable
        Makes a list of data.
    together : callable
        Makes a batch of a list.
    rows : callable
        Maps a datum to the number of its rows.
    by_time : bool
        Whether the output's rows are sorted by positions first.
    size : callable, optional
        Maps a batch to the number of its data.
    least : int
        The fewest data that the model can be evaluated on.
    warns, reduces : bool
        Whether rows are sent back one by one; whether it is known of all rows whose
        they are.
    classes : int
        The number of entries of a row.
    """

    model: Callable[..., Any]
    shapes: dict[str, Any]
    make: Callable[[], list[Any]]
    together: Callable[[list[Any]], Any] = torch.stack
    rows: Callable[[Any], int] = lambda _: 1
    by_time: bool = False
    size: Callable[[Any], int] | None = None
    least: int = 1
    warns: bool = False
    reduces: bool = True
    classes: int = 2

    def build(self):
        """Return parameters and data, each an input with the targets of its rows."""
        torch.manual_seed(3)
        params = {n: R(s).double() for n, s in self.shapes.items()}
        params |= {n: torch.zeros_like(params[n]) for n in params if n == "zero"}
        double = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
        inputs = [
            tuple(map(double, x)) if isinstance(x, tuple) else double(x)
            for x in self.make()
        ]
        ys = [torch.randint(self.classes, (self.rows(x),)) for x in inputs]
        return params, list(zip(inputs, ys, strict=True))

    def batch(self, data):
        """Put data together."""
        inputs, ys = zip(*data, strict=True)
        y = torch.stack(ys).T.flatten() if self.by_time else torch.cat(ys)
        return self.together(list(inputs)), y


CASES = {
    "loop": Case(
        lambda p, X: torch.stack([(x @ p["w"]).tanh().mean(0) for x in X]) @ p["v"],
        *(W, lambda: sequences(3)),
    ),
    "loop of vectors": Case(
        lambda p, X: torch.stack([(x @ p["w"] + p["b"]).tanh() @ p["v"] for x in X]),
        *(WB, lambda: [R(4) for _ in range(5)]),
    ),
    "loop of images": Case(
        lambda p, X: (
            torch.stack(
                [
                    F.conv2d(x[None], p["W"], p["b"], groups=2).tanh().mean((0, 2, 3))
                    for x in X
                ]
            )
            @ p["v"]
        ),
        {"W": (4, 2, 2, 2), "b": (4,), "v": (4, 2)},
        lambda: [R(4, 3, 3) for _ in range(3)],
    ),
    "nested loops": Case(
        lambda p, X: (
            torch.cat(
                [
                    torch.stack([(row @ p["w"] * p["b"]).tanh() for row in x]).cumsum(0)
                    for x in X
                ]
            )
            @ p["v"]
        ),
        *(WB, lambda: sequences(3)),
        rows=len,
    ),
    "chunks": Case(
        lambda p, X: (
            torch.cat(
                [(x @ p["w"] + p["b"]).tanh().cumsum(1).mean(1) for x in X.split(2)]
            )
            @ p["v"]
        ),
        *(WB, lambda: sequences(5)),
    ),
    "chunks of norms": Case(
        lambda p, X: (
            torch.cat(
                [
                    F.layer_norm(x @ p["w"], (3,), p["g"], p["b"]).tanh().mean(1)
                    for x in X.split(3)
                ]
            )
            @ p["v"]
        ),
        *({**WB, "g": (3,)}, lambda: sequences(7, 2)),
    ),
    "masked rows": Case(
        lambda p, X: summed(X, (X["x"][X["mask"]] @ p["w"] + p["b"]).tanh()) @ p["v"],
        *(WB, lambda: ragged(3, 3, 1, 2, 3), padded),
        size=of_lengths,
    ),
    "masked language": Case(
        lambda p, X: (attend(X @ p["w"]) @ p["v"])[X[..., 0] > 0],
        *(W, lambda: marked(4)),
        rows=lambda x: int((x[:, 0] > 0).sum()),
    ),
    "packed attention": Case(
        lambda p, X: (
            summed(X, attend(X["x"] @ p["w"], owners(X)[:, None] == owners(X)) * p["b"])
            @ p["v"]
        ),
        *(WB, lambda: ragged(1, 3, 2, 2), packed),
        size=of_lengths,
    ),
    "packed tokens": Case(
        lambda p, X: attend(X["x"] @ p["w"], owners(X)[:, None] == owners(X)) @ p["v"],
        *(W, lambda: ragged(1, 3, 2, 2), packed, len),
        size=of_lengths,
        warns=True,
    ),
    "tokens of a mask": Case(
        lambda p, X: (
            attend(X["x"][X["mask"]] @ p["w"], owners(X)[:, None] == owners(X)) @ p["v"]
        ),
        *(W, lambda: ragged(1, 3, 2, 2), padded, len),
        size=of_lengths,
    ),
    "split by numbers": Case(
        lambda p, X: (
            torch.stack(
                [
                    attend(h).mean(0)
                    for h in (X["x"] @ p["w"]).split(X["lengths"].tolist())
                ]
            )
            @ p["v"]
        ),
        *(W, lambda: ragged(1, 3, 2, 2), packed),
        size=of_lengths,
    ),
    "split by a list": Case(
        lambda p, X: (
            torch.stack(
                [h.tanh().sum(0) for h in (X["x"] @ p["w"]).split(X["lengths"])]
            )
            @ p["v"]
        ),
        *(W, lambda: ragged(1, 3, 2, 2), listed),
        size=of_lengths,
    ),
    "packed by numbers": Case(
        lambda p, X: (
            summed(
                X,
                torch.cat(
                    [x[:n] for x, n in zip(X["x"], X["lengths"].tolist(), strict=True)]
                )
                .matmul(p["w"])
                .tanh(),
            )
            @ p["v"]
        ),
        *(W, lambda: ragged(1, 3, 2, 2), padded),
        size=of_lengths,
    ),
    "differences of sums": Case(
        *(differences_of_sums, WB, lambda: ragged(*[1, 3, 2] * 6), packed),
        size=of_lengths,
    ),
    "a list of data": Case(
        lambda p, X: torch.stack([(x @ p["w"]).tanh().sum(0) for x in X]) @ p["v"],
        *(W, lambda: ragged(2, 1, 3, 2), list),
        size=len,
    ),
    "packed sequence": Case(
        *(sequence_of, WB, lambda: ragged(2, 3, 1, 3, 2), padded), size=of_lengths
    ),
    "sorted by length": Case(
        lambda p, X: (
            (X["x"] @ p["w"])[o := X["lengths"].argsort(descending=True)]
            .add(p["b"])
            .tanh()
            .mul(X["mask"][o].unsqueeze(-1))
            .sum(1)[o.argsort()]
            @ p["v"]
        ),
        *(WB, lambda: ragged(2, 3, 1, 3, 2), padded),
        size=of_lengths,
    ),
    "last token": Case(
        lambda p, X: (
            (X["x"] @ p["w"])
            .tanh()
            .cumsum(1)[torch.arange(of_lengths(X)), X["lengths"] - 1]
            @ p["v"]
        ),
        *(W, lambda: ragged(3, 1, 2, 3, 2), padded),
        size=of_lengths,
    ),
    "branch on a mask": Case(
        lambda p, X: (
            (
                (X["x"] @ p["w"]).tanh()
                * (1 if bool(X["mask"].all()) else X["mask"].unsqueeze(-1))
            ).sum(1)
            @ p["v"]
        ),
        *(W, lambda: ragged(3, 3, 3, 1, 2), padded),
        size=of_lengths,
    ),
    "experts": Case(
        lambda p, X: (
            experts(p, h := X.reshape(-1, 4), (h[:, 0] > 0).long())
            .reshape(len(X), -1, 3)
            .mean(1)
            @ p["v"]
        ),
        *(MOE, lambda: sequences(4)),
    ),
    "experts for data": Case(routed(0), MOE, lambda: [R(4) for _ in range(6)]),
    "an expert without rows": Case(routed(9), MOE, lambda: [R(4) for _ in range(4)]),
    "two experts each": Case(
        *(top2, {**MOE, "e2": (4, 3), "gate": (4, 3)}, lambda: sequences(5)), rows=len
    ),
    "dispatch by matrices": Case(
        *(dispatched, {n: MOE[n] for n in ("e0", "e1", "v")}, lambda: sequences(4, 2)),
        reduces=False,
    ),
    "sorted by content": Case(
        lambda p, X: (
            torch.empty(len(X), 2)
            .to(X)
            .index_copy(
                *(0, o := X.sum(1).argsort(), (X[o] @ p["w"] + p["b"]).tanh() @ p["v"])
            )
        ),
        *(WB, lambda: [R(4) for _ in range(5)]),
    ),
    "time first": Case(
        lambda p, X: (
            ((time_major(X) @ p["w"] * p["g"] + p["b"]).tanh())
            .reshape(-1, len(X), 3)
            .cumsum(0)
            .transpose(0, 1)
            .flatten(0, 1)
            @ p["v"]
        ),
        *({**WB, "g": (3,)}, lambda: sequences(4)),
        rows=len,
    ),
    "time first throughout": Case(
        *(rnn, {**W, "u": (3, 3)}, lambda: sequences(4)), rows=len, by_time=True
    ),
    "frames": Case(
        lambda p, X: (
            F.conv1d(X.transpose(0, 1).flatten(0, 1), p["W"], p["b"])
            .tanh()
            .reshape(-1, len(X), 2, 4)
            .mean((0, 3))
            @ p["v"]
        ),
        {"W": (2, 3, 2), "b": (2,), "v": (2, 2)},
        lambda: [R(2, 3, 5) for _ in range(3)],
    ),
    "a shift, time first": Case(
        lambda p, X: (time_major(X) + p["b"]).tanh().reshape(-1, len(X), 4).mean(0),
        *({"b": (4,)}, lambda: sequences(3, 2)),
        classes=4,
    ),
    "a shift of two inputs": Case(
        lambda p, X: torch.mul(*(torch.cat(X) + p["b"]).tanh().chunk(2)),
        *({"b": (4,)}, lambda: [(R(4), R(4)) for _ in range(3)], pairs),
        size=lambda X: len(X[0]),
        classes=4,
    ),
    "two inputs": Case(
        lambda p, X: (
            torch.mul(*(torch.cat(X) @ p["w"] + p["b"]).tanh().chunk(2)) @ p["v"]
        ),
        *(WB, lambda: [(R(4), R(4)) for _ in range(4)], pairs),
        size=lambda X: len(X[0]),
    ),
    "heads before data": Case(
        lambda p, X: (
            (X @ p["w"])
            .reshape(len(X), -1, 2, 2)
            .permute(2, 0, 1, 3)
            .flatten(0, 1)
            .matmul(p["u"])
            .tanh()
            .cumsum(1)
            .mean(1)
            .reshape(2, len(X), 2)
            .sum(0)
        ),
        *({"w": (4, 4), "u": (2, 2)}, lambda: sequences(3, 2)),
    ),
    "data in reverse": Case(
        lambda p, X: ((X.flip(0) @ p["w"]).tanh().cumsum(1).mean(1) @ p["v"]).flip(0),
        *(W, lambda: sequences(4)),
    ),
    "data as columns": Case(
        lambda p, X: (p["v"].T @ (p["w"].T @ X.T).tanh()).T,
        *(W, lambda: [R(4) for _ in range(5)]),
    ),
    "two at least": Case(
        raising(
            2,
            lambda p, X: (
                (time_major(X) @ p["w"] + p["b"]).tanh().reshape(-1, len(X), 3).mean(0)
                @ p["v"]
            ),
        ),
        *(WB, lambda: sequences(4, 2)),
        least=2,
    ),
    "all at once": Case(
        raising(
            4,
            lambda p, X: (
                (time_major(X) @ p["w"] + p["b"]).tanh().reshape(-1, len(X), 3).mean(0)
                @ p["v"]
            ),
        ),
        *(WB, lambda: sequences(4, 2)),
        least=4,
    ),
    "a mask as long as the batch": Case(
        lambda p, X: attend(X["x"] @ p["w"], X["causal"]).flatten(0, 1) @ p["v"],
        *(W, lambda: sequences(3), with_table, len),
        size=lambda X: len(X["x"]),
    ),
    "places as long as the batch": Case(
        lambda p, X: (
            (X["x"] + F.embedding(X["places"].expand(len(X["x"]), -1), p["places"]))
            .matmul(p["w"])
            .tanh()
            .mean(1)
            @ p["v"]
        ),
        *({**W, "places": (3, 4)}, lambda: sequences(3), with_table),
        size=lambda X: len(X["x"]),
    ),
    "tokens, time first": Case(
        lambda p, ids: (
            (F.embedding(ids.T.reshape(-1), p["tokens"]) @ p["u"] + p["b"])
            .tanh()
            .reshape(-1, len(ids), 3)
            .mul(torch.arange(1.0, 4)[:, None, None])
            .mean(0)
            @ p["v"]
        ),
        {"tokens": (5, 3), "u": (3, 3), "b": (3,), "v": (3, 2)},
        lambda: [torch.tensor(ids) for ids in ([1, 1, 1], [1, 1, 1], [1, 1, 2])],
    ),
    "a language model": Case(
        language_model,
        {
            "tokens": (6, 4),
            "places": (4, 4),
            "g": (4,),
            "h": (4,),
            "W": (4, 4),
            "b": (4,),
        },
        lambda: tokens(4, 4, 6),
        rows=len,
        classes=6,
    ),
    "attention, time first": Case(
        *(attention, {**PROJECTIONS, "v": (4, 2)}, lambda: sequences(3))
    ),
    "zeros in front": Case(
        lambda p, X: (
            (time_major(X) @ p["w"] @ p["zero"] + p["b"])
            .tanh()
            .reshape(-1, len(X), 3)
            .cumsum(0)
            .mean(0)
            @ p["v"]
        ),
        *({**WB, "zero": (3, 3)}, lambda: sequences(4)),
    ),
}
