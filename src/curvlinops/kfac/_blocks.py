r"""Block-diagonal matrices of parameters, :math:`P \operatorname{diag}(B_l) P^\top`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from os import PathLike
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._operator import TorchOperator
from curvlinops._spaces import TensorSpace, real_scalar
from curvlinops.kfac._uses import Layout
from curvlinops.kronecker import (
    EighDecomposedLinearOperator,
    KroneckerProductLinearOperator,
)

Block = KroneckerProductLinearOperator | EighDecomposedLinearOperator
#: One number, one per factor of a product, or either by parameter name.
Damping = float | tuple[float, ...] | Mapping[str, Any]


class BlockwiseLinearOperator(TorchOperator, LinearOperator):
    r"""A matrix that is block-diagonal over groups of parameters.

    .. math:: P \operatorname{diag}(B_1, \dots, B_L) P^\top

    with blocks :math:`B_l` that are (groups of) Kronecker products or eigendecomposed,
    and :math:`P` the permutation from the blocks' entries to those of the parameters.

    Parameters
    ----------
    space : TensorSpace
        The parameters.
    layouts : sequence of Layout
        Which parameters a block is about, and how they are matrices.
    blocks : sequence of LinearOperator
        The blocks.

    Notes
    -----
    Self-adjoint if the blocks are. A product costs one product with every block, two
    matrix products for a Kronecker-factored one. Damped inverses and powers are
    operators of this class; scalars and diagonals come from the blocks.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import KFACLinearOperator
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.MSELoss()
    >>> data = [(torch.rand(4, 3).double(), torch.rand(4, 2).double())]
    >>> K = KFACLinearOperator(net, loss, list(net.parameters()), data,
    ...     separate_weight_and_bias=False)
    >>> inverse = K.inverse(damping=0.1, use_exact_damping=True)
    >>> dense = torch.linalg.inv(K.to_dense() + 0.1 * torch.eye(8))
    >>> bool(torch.allclose(inverse.to_dense(), dense))
    True
    """

    def __init__(
        self, space: TensorSpace, layouts: Sequence[Layout], blocks: Sequence[Block]
    ) -> None:
        super().__init__(space, space)
        self.layouts, self.blocks = tuple(layouts), tuple(blocks)
        index = {name: i for i, name in enumerate(space.names)}
        self._places = [[index[name] for name in lay.names] for lay in self.layouts]

    def _apply(self, V: Tensor) -> Tensor:
        K = V.shape[1]
        rows = torch.empty(K, V.shape[0], dtype=V.dtype, device=V.device)
        given, results = self._in_space.split(V.T), self._in_space.split(rows)
        for places, layout, block in zip(
            self._places, self.layouts, self.blocks, strict=True
        ):
            M = layout.gather([given[i] for i in places])
            X = M.reshape(K, -1).T.to(block.torch_dtype)
            product = block._apply(X).T.reshape(K, *layout.size)
            for i, part in zip(places, layout.scatter(product), strict=True):
                results[i].copy_(part)
        return rows.T

    # -- scalars and vectors ------------------------------------------------------

    def _sum(self, method: str) -> Tensor:
        values: list[Tensor] = [getattr(block, method)() for block in self.blocks]
        return reduce(torch.add, values)

    def trace(self) -> Tensor:
        """Return the trace."""
        return self._sum("trace")

    def logdet(self) -> Tensor:
        """Return the determinant's logarithm (minus infinity if singular)."""
        return self._sum("logdet")

    def det(self) -> Tensor:
        """Return the determinant, which overflows easily; see :meth:`logdet`."""
        return reduce(torch.mul, [block.det() for block in self.blocks])

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm."""
        norms = torch.stack([block.frobenius_norm() for block in self.blocks])
        return norms.norm()

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues in ascending order."""
        parts = torch.cat([block.eigenvalues() for block in self.blocks])
        return parts.sort().values

    def diagonal(self) -> Tensor:
        """Return the diagonal, of shape ``(P,)``."""
        result = torch.zeros(self.shape[0], dtype=self.torch_dtype, device=self.device)
        tensors = self._in_space.split(result)
        for places, layout, block in zip(
            self._places, self.layouts, self.blocks, strict=True
        ):
            M = block.diagonal().reshape(1, *layout.size)
            for i, part in zip(places, layout.scatter(M), strict=True):
                tensors[i].copy_(part[0])
        return result

    # -- operators ------------------------------------------------------------------

    def map(
        self, function: Callable[[Layout, Block], Block]
    ) -> BlockwiseLinearOperator:
        """Replace every block by a function of it."""
        blocks = map(function, self.layouts, self.blocks)
        return BlockwiseLinearOperator(self._in_space, self.layouts, list(blocks))

    def inverse(
        self, damping: Damping = 0.0, **options: Any
    ) -> BlockwiseLinearOperator:
        """Return the damped inverse, block by block.

        Parameters
        ----------
        damping : float, tuple of float, or mapping of str to these, optional
            Added to factors or to the product, see
            :meth:`KroneckerProductLinearOperator.inverse
            <curvlinops.kronecker.KroneckerProductLinearOperator.inverse>`; there the
            first factor is that of output gradients, here a tuple is ``(input,
            output)``. A mapping gives a block's by the name of one of its parameters.
        **options
            Further arguments of that method.

        Raises
        ------
        ValueError
            If a mapping does not have every block, or names no parameter.
        numpy.linalg.LinAlgError
            If a damped block is not positive definite; it is named.
        """
        named = set(damping) if isinstance(damping, Mapping) else set()
        if unknown := sorted(named - set(self._in_space.names)):
            raise ValueError(f"`damping` names {unknown}, which are no parameters.")

        def invert(layout: Layout, block: Block) -> Block:
            its = damping
            if isinstance(its, Mapping):
                given = [its[name] for name in layout.names if name in its]
                if not given:
                    raise ValueError(f"`damping` has no entry for {layout.names[0]!r}.")
                its = given[0]
            if isinstance(block, EighDecomposedLinearOperator):
                if isinstance(its, tuple):
                    raise ValueError("One number damps an eigendecomposed block.")
                return block.inverse(its)
            if isinstance(its, tuple):
                its = its[::-1]
            single = len(block.factors) == 1
            return block.inverse(its, **({} if single else options))

        return self.map(invert)

    def __pow__(self, p: Any) -> Any:
        """Return the power with a real exponent, block by block."""
        exponent = real_scalar(p)
        if exponent is None or (exponent >= 0 and exponent == int(exponent)):
            return super().__pow__(p)
        return self.map(lambda _, block: block**exponent)

    def block_of(self, name: str) -> Block:
        """Return the block that a parameter is in, as an operator of its own.

        Its entries are ordered as matrices of output rows and input columns; a joint
        bias is the last column.

        Raises
        ------
        KeyError
            If there is no such parameter.
        """
        for layout, block in zip(self.layouts, self.blocks, strict=True):
            if name in layout.names:
                return block
        raise KeyError(
            f"No parameter {name!r}; there are {list(self._in_space.names)}."
        )

    # -- files ------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to an ``npz`` file that :func:`load` reads."""
        arrays: dict[str, np.ndarray] = {}
        described = []
        for i, (layout, block) in enumerate(
            zip(self.layouts, self.blocks, strict=True)
        ):
            spectral = isinstance(block, EighDecomposedLinearOperator)
            Q: Any = (
                block.Q if isinstance(block, EighDecomposedLinearOperator) else block
            )
            tensors = [*Q.factors]
            if isinstance(block, EighDecomposedLinearOperator):
                tensors.append(block.evals)
            for j, tensor in enumerate(tensors):
                arrays[f"block{i}.{j}"] = tensor.cpu().numpy()
            described.append(
                [spectral, len(Q.factors), block.name, *vars(layout).values()]
            )
        space = self._in_space
        header = {
            "format": "curvlinops-blocks-1",
            "names": space.names,
            "shapes": space.shapes,
            "dtype": str(space.dtype).removeprefix("torch."),
            "blocks": described,
        }
        with open(path, "wb") as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)  # type: ignore[arg-type]


def load(
    path: str | PathLike[str], device: torch.device | str = "cpu"
) -> BlockwiseLinearOperator:
    """Read the blocks that were saved in a file.

    Parameters
    ----------
    path : str or path
        A file that ``save`` of a Kronecker-factored operator has written.
    device : torch.device or str, optional
        Where the result lives.

    Returns
    -------
    BlockwiseLinearOperator
        The matrix, without its model and data.

    Raises
    ------
    ValueError
        If the file is of another kind.
    """
    with np.load(path, allow_pickle=False) as file:
        if "header" not in file:
            raise ValueError(f"{path!r} holds no Kronecker factors: it has no header.")
        header = json.loads(str(file["header"]))
        if header.get("format") != "curvlinops-blocks-1":
            raise ValueError(
                f"{path!r} has an unknown format {header.get('format')!r}."
            )
        layouts, blocks = [], []
        for i, (spectral, k, name, names, shapes, *rest) in enumerate(header["blocks"]):
            view, order, size = map(tuple, rest)
            layouts.append(
                Layout(tuple(names), tuple(map(tuple, shapes)), view, order, size)
            )
            tensors = [
                torch.from_numpy(file[f"block{i}.{j}"]).to(device)
                for j in range(k + spectral)
            ]
            Q = KroneckerProductLinearOperator(*tensors[:k], grouped=True, name=name)
            blocks.append(
                EighDecomposedLinearOperator(tensors[k], Q, name=name)
                if spectral
                else Q
            )
    dtype = getattr(torch, header["dtype"])
    space = TensorSpace(header["shapes"], dtype, device, header["names"])
    return BlockwiseLinearOperator(space, layouts, blocks)


__all__ = ["BlockwiseLinearOperator", "load"]
