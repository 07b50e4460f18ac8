"""What the operators that are built from an empirical risk have in common."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._closed_forms import require_square
from curvlinops._counts import count
from curvlinops._forms import Form as Form
from curvlinops._forms import Middle as Middle
from curvlinops._forms import Side as Side
from curvlinops._forms import congruence as congruence
from curvlinops._model import Parameters, matching_names
from curvlinops._operator import TorchOperator
from curvlinops._plan import Plan, loops_of, plan
from curvlinops._random import Rng
from curvlinops._rows import JACOBIAN, JacobianOfRows, MatrixOfRows
from curvlinops._spaces import TensorSpace
from curvlinops._status import Status
from curvlinops._verify import Report, verify
from curvlinops.risk import EmpiricalRisk


class RiskOperator(TorchOperator):
    """Mixin of the operators that are built from an empirical risk.

    Parameters
    ----------
    risk : EmpiricalRisk
        The risk.
    in_space, out_space : TensorSpace, optional
        Parameter space if absent.
    """

    risk: EmpiricalRisk
    #: What a product multiplies by, the first form first. Operators that multiply by
    #: something else have none.
    forms: Sequence[Form] = ()

    def __init__(
        self,
        risk: EmpiricalRisk,
        in_space: TensorSpace | None = None,
        out_space: TensorSpace | None = None,
    ) -> None:
        super().__init__(in_space or risk.space, out_space or risk.space)
        self.risk = risk

    def _apply(self, V: Tensor) -> Tensor:
        return self.risk.apply(self.forms, V, self._title(), self.shape[0])

    def _of(self, risk: EmpiricalRisk) -> Self:
        """Return the same matrix of another risk."""
        twin = copy.copy(self)
        twin.risk = risk
        return twin

    def _depends_on_batches(self) -> str:
        """Say why other batches of the same data may give another matrix, if so."""
        return ""

    def _title(self, task: str = "_matmat") -> str:
        return f"{type(self).__name__}.{task}"

    def fix_route(self, route: str | None = None) -> str:
        """Compute products in one way, for all operators of this risk.

        See :meth:`TorchOperator.fix_route
        <curvlinops._operator.TorchOperator.fix_route>`.
        """
        route = super().fix_route(route)
        self.risk.plain += 1
        return route

    def free_route(self) -> None:
        """Take back one :meth:`fix_route`."""
        super().free_route()
        self.risk.plain = max(self.risk.plain - 1, 0)

    def parameters_fingerprint(self) -> str:
        """Return a digest of the parameters' names and bits."""
        digest = hashlib.sha256()
        for name, value in self.risk.params.items():
            bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode())
            digest.update(bits.numpy().data)
        return digest.hexdigest()

    def to_dense(self, block_size: int = 64) -> Tensor:
        r"""Return the matrix, made of single data's Jacobians if that costs less.

        Else as :math:`A I` in blocks of columns.

        Parameters
        ----------
        block_size : int, optional
            Number of columns multiplied at once.

        Returns
        -------
        Tensor
            Of shape ``(M, N)``, in :attr:`torch_dtype`, on :attr:`device`.

        Examples
        --------
        >>> import torch
        >>> from curvlinops import GGNLinearOperator
        >>> net, loss = torch.nn.Linear(9, 2), torch.nn.MSELoss()
        >>> data = [(torch.rand(30, 9), torch.rand(30, 2))]
        >>> G = GGNLinearOperator(net, loss, dict(net.named_parameters()), data)
        >>> dense = G.to_dense()
        >>> bool(torch.allclose(dense[:, 3], G @ torch.eye(20)[3], atol=1e-6))
        True
        >>> G.status().matrix
        True
        """
        matrix = self._whole()
        return super().to_dense(block_size) if matrix is None else matrix

    def _whole(self) -> Tensor | None:
        """Return the matrix where computing it at once costs less."""
        forms, wanted = self.forms, MatrixOfRows(self.risk.space)
        if len(forms) != 1 or forms[0].middle is None or not forms[0].mean:
            return None
        key = forms[0].key(self.risk)
        return self.risk.by_rows(forms[0].middle, wanted, self._title(), key)

    def _whole_jacobian(self, length: int) -> Tensor | None:
        wanted = JacobianOfRows(self.risk.space, length)
        return self.risk.by_rows(None, wanted, self._title(), JACOBIAN)

    def refresh(self) -> None:
        """Forget recordings, after changes that cannot be seen.

        See :meth:`EmpiricalRisk.refresh <curvlinops.risk.EmpiricalRisk.refresh>`.
        """
        self.risk.refresh()

    def block(
        self, rows: str | Iterable[str], cols: str | Iterable[str] | None = None
    ) -> ParameterBlock:
        """Return the rows and columns of some parameters, chosen by name.

        Parameters
        ----------
        rows : str, or iterable of str
            Names of parameters, or patterns such as ``"encoder.*"``, in which ``*``
            stands for anything, ``?`` for one character, ``[ab]`` for ``a`` or ``b``.
        cols : str, or iterable of str, optional
            The same for the columns; by default those of the rows.

        Returns
        -------
        ParameterBlock
            Parameters come in the order of the operator's. Lists of tensors have the
            shapes of the chosen parameters.

        Raises
        ------
        ValueError
            If a name or pattern matches no parameter.
        TypeError
            If the operator's rows or columns are not those of parameters.

        Notes
        -----
        A product costs one product with the operator.
        """
        names = self.risk.space.names
        if not self._in_space.names == self._out_space.names == names:
            raise TypeError(
                f"Blocks are chosen by parameter name, but {self!r} does not map "
                'parameters to parameters. Choose the parameters with `params="..."` '
                "when the operator is built, or use `SubmatrixLinearOperator`."
            )
        chosen = _chosen(rows, names)
        return ParameterBlock(
            self, chosen, chosen if cols is None else _chosen(cols, names)
        )

    def blocks(self) -> dict[str, ParameterBlock]:
        """Return the diagonal block of every parameter, by name."""
        return {name: self.block([name]) for name in self.risk.params}

    def plan(self, columns: int = 1) -> Plan:
        """Predict how much memory products take, and how each batch is multiplied.

        Parameters
        ----------
        columns : int, optional
            Number of columns of the operand.

        Returns
        -------
        Plan
            ``plan.peak`` and ``plan.held``, in bytes, ``plan.batches`` with one
            :class:`~curvlinops._plan.BatchPlan` each, and a table as its string.

        Raises
        ------
        MemoryError
            If products do not fit into the risk's ``max_memory``; the message says how
            many bytes would do.
        TypeError
            If products do not run over the data (Kronecker-factored matrices).

        Notes
        -----
        Of products with this operator as if nothing else used the risk. Predicted from
        a few products with two and three data of the first batch (with the whole first
        batch, where the model does not take fewer), so other batches are taken to
        differ in their size only. Many columns may be multiplied by the rows of single
        data instead, see :meth:`to_dense`, which takes up to 64 MiB. Not counted are
        model, parameters, and data, and what operations of torch use inside.

        Cost: these products, and one pass over the data that reads their sizes; with
        ``max_memory``, one more that compares parts with whole batches, where these are
        cut. Models, recordings and random states stay as they are.

        The check at construction evaluates whole batches. To plan before anything does,
        build with ``check_deterministic=False``, or with a ``max_memory``, which bounds
        the check as well.

        Examples
        --------
        >>> import torch
        >>> from curvlinops import GGNLinearOperator
        >>> net, loss = torch.nn.Linear(300, 20), torch.nn.MSELoss()
        >>> data = [(torch.rand(n, 300), torch.rand(n, 20)) for n in (64, 32)]
        >>> G = GGNLinearOperator(net, loss, dict(net.named_parameters()), data)
        >>> plan = G.plan()
        >>> [batch.route for batch in plan.batches]
        ['recording kept', 'recording kept']
        >>> less = GGNLinearOperator(net, loss, dict(net.named_parameters()), data,
        ...                          max_memory=plan.peak * 4 // 5)
        >>> less.plan().peak <= plan.peak * 4 // 5
        True
        """
        return plan(self, count("columns", columns, 1))

    def status(self) -> Status:
        """Say what is kept between products, and why nothing is.

        Returns
        -------
        Status
            ``status.batches`` with what is kept of each batch, ``status.held`` in
            bytes, ``status.matrix``, and ``status.reason``; all in words as its string.

        Raises
        ------
        TypeError
            If products do not run over the data (Kronecker-factored matrices).

        Notes
        -----
        Looks at what is there, and computes nothing. :meth:`plan` predicts it.

        Examples
        --------
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from curvlinops import GGNLinearOperator
        >>> net, loss = torch.nn.Linear(300, 20), torch.nn.MSELoss()
        >>> data = TensorDataset(torch.rand(64, 300), torch.rand(64, 20))
        >>> loader = DataLoader(data, batch_size=16, shuffle=True)
        >>> args = net, loss, list(net.parameters())
        >>> GGNLinearOperator(*args, loader).status().reason[:47]
        'Nothing is kept, since the batches of a `DataLo'
        >>> G = GGNLinearOperator(*args, list(loader))
        >>> _ = G @ torch.ones(6020)
        >>> G.status().batches
        ('graph', 'graph', 'graph', 'graph')
        """
        loops, _ = loops_of(self, 1)
        return self.risk.status([loop.key for loop in loops])

    def verify(self, rng: Rng = 0) -> Report:
        """Check this operator on its own model, loss and data.

        See :func:`curvlinops._verify.verify` for what is checked, and at which cost.

        Parameters
        ----------
        rng : int, numpy.random.Generator, torch.Generator, or None, optional
            Source of the random directions.

        Returns
        -------
        Report
            ``report.ok``, and a table with all errors and tolerances as its string.
        """
        return verify(self, rng)


class ParameterBlock(TorchOperator, LinearOperator):
    r"""The block :math:`A_{R, C}` of an operator on parameter space, by names.

    Parameters
    ----------
    A : TorchOperator
        An operator from parameters to parameters.
    rows, cols : list of str
        Names of parameters.

    Notes
    -----
    A product costs one product with ``A``. The adjoint is the block of ``A``'s adjoint
    with rows and columns exchanged.
    """

    def __init__(self, A: TorchOperator, rows: list[str], cols: list[str]) -> None:
        self.args = (A, rows, cols)
        in_space, self._cols = _subspace(A._in_space, cols)
        out_space, self._rows = _subspace(A._out_space, rows)
        super().__init__(in_space, out_space)

    def _apply(self, V: Tensor) -> Tensor:
        A, _, _ = self.args
        full = V.new_zeros(A.shape[1], V.shape[1])
        full[self._cols] = V
        return A._apply(full)[self._rows]

    def trace(self) -> Tensor:
        require_square(self, "trace")
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        A, rows, cols = self.args
        if rows != cols:
            return super().diagonal()
        return A.diagonal()[self._rows]

    def _adjoint(self) -> TorchOperator:
        A, rows, cols = self.args
        if A.adjoint() is A and rows == cols:
            return self
        return ParameterBlock(A.adjoint(), cols, rows)


def _chosen(patterns: str | Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the names that match one of some patterns, in their own order."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = {name for pattern in patterns for name in matching_names(pattern, names)}
    if not found:
        raise ValueError("Got no names: pass at least one name or pattern.")
    return [name for name in names if name in found]


def _subspace(space: TensorSpace, names: list[str]) -> tuple[TensorSpace, Tensor]:
    """Return the space of some of the tensors, and their places in a vector."""
    numbers = [space.names.index(name) for name in names]
    slices, places = space.slices(), torch.arange(space.dim)
    shapes = [space.shapes[i] for i in numbers]
    index = torch.cat([places[slices[i]] for i in numbers]).to(space.device)
    return TensorSpace(shapes, space.dtype, space.device, names), index


def as_risk(
    model_func: Callable[..., Any] | EmpiricalRisk,
    loss_func: Callable[..., Any] | None,
    params: Parameters | None,
    data: Iterable[Any] | None,
    **options: Any,
) -> EmpiricalRisk:
    """Return an operator's risk, given as such or as its four ingredients.

    Raises
    ------
    TypeError
        If an ingredient is missing, or given beside a risk.
    """
    if isinstance(model_func, EmpiricalRisk):
        if any(x is not None for x in (loss_func, params, data)):
            raise TypeError("A risk already has its loss, parameters and data.")
        defaults = {"progressbar": False, "check_deterministic": True}
        # Whether the check is wanted does not matter any more.
        given = options.keys() - {"check_deterministic"}
        if late := [k for k in given if options[k] not in (None, defaults.get(k))]:
            raise TypeError(
                f"The options {sorted(late)} belong to the risk, which exists already: "
                "pass them to `EmpiricalRisk(...)`."
            )
        return model_func
    if params is None or data is None:
        raise TypeError(
            "Pass model, loss, params and data (or an `EmpiricalRisk` in their place)."
        )
    return EmpiricalRisk(model_func, loss_func, params, data, **options)
