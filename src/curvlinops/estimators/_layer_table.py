"""A table with one row per block of a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from curvlinops.estimators._base import student

#: What is known of every block, beside its name and size.
QUANTITIES = ("trace", "top_eigenvalue", "frobenius_norm", "effective_dimension")


@dataclass(frozen=True, eq=False, repr=False)
class LayerSummary:
    r"""A table with one row per block; ``table["trace"]`` is a column.

    Attributes
    ----------
    columns : dict
        NumPy arrays of one length by name: ``"name"``, ``"size"`` (rows of the block),
        ``"trace"``, ``"top_eigenvalue"``, ``"frobenius_norm"``,
        ``"effective_dimension"``, each followed by its error, as in
        ``"trace_error"``, and ``"share"``, the block's part of the sum of the traces.
        Traces, eigenvalues and norms are in the unit of the matrix.
    damping : float
        :math:`\delta` of the effective dimensions.
    num_products : int
        Products with the whole matrix that were spent, one per column.
    num_samples : int
        Test vectors whose mean the traces, norms, and effective dimensions are.
    seed : int
        Seed that reproduces the table.
    """

    columns: dict[str, np.ndarray]
    damping: float
    num_products: int
    num_samples: int
    seed: int

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column."""
        return self.columns[name]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.columns["name"])

    def row(self, name: str) -> dict[str, Any]:
        """Return a block's numbers by column, as Python's numbers."""
        names = self["name"].tolist()
        if name not in names:
            raise KeyError(f"No block {name!r}: there are {', '.join(names)}.")
        found = names.index(name)
        return {column: values[found].item() for column, values in self.columns.items()}

    def confidence_interval(
        self, quantity: str, level: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return lower and upper ends of Student's intervals, one per block.

        Parameters
        ----------
        quantity : str
            Name of a column that has an error.
        level : float, optional
            Probability that an interval covers the true value, in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level is a probability in (0, 1), got {level!r}.")
        margin = student(self.num_samples, level) * self[f"{quantity}_error"]
        return self[quantity] - margin, self[quantity] + margin

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all columns but the names, as matrix with one row per block."""
        numbers = [values for name, values in self.columns.items() if name != "name"]
        return np.stack(numbers, axis=1).astype(dtype or np.float64)

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the columns by name, as lists of Python's numbers, for JSON."""
        return {name: column.tolist() for name, column in self.columns.items()}

    def to_pandas(self) -> Any:
        """Return the table as ``pandas.DataFrame``, blocks as index.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: `pip install pandas`. `to_dict` and `columns` "
                "have the same numbers without it."
            ) from error
        return pandas.DataFrame(self.columns).set_index("name")

    def __str__(self) -> str:
        """Return the table as text, values with their errors where there are some."""
        heads = ["block", "size", "trace", "top eigenvalue", "Frobenius norm"]
        heads += ["effective dimension", "share"]
        rows = [heads]
        for i, name in enumerate(self["name"]):
            pairs = [(self[q][i], self[f"{q}_error"][i]) for q in QUANTITIES]
            numbers = [
                f"{value:.4g}" + (f" +- {error:.1g}" if error else "")
                for value, error in pairs
            ]
            share = f"{self['share'][i]:.1%}"
            rows.append([str(name), str(self["size"][i]), *numbers, share])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if j else cell.ljust(width)
                for j, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(lines)

    __repr__ = __str__
