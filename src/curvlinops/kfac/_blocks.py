r"""Block-diagonal matrices of parameters, :math:`P \operatorname{diag}(B_l) P^\top`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, NamedTuple

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._files import ArrayFile
from curvlinops._operand import to_numpy
from curvlinops._operator import TorchOperator, _is_tensor_list
from curvlinops._spaces import TensorSpace, real_exponent
from curvlinops.kfac._uses import Layout
from curvlinops.kronecker import (
    EighDecomposedLinearOperator,
    KroneckerProductLinearOperator,
)

Block = KroneckerProductLinearOperator | EighDecomposedLinearOperator
#: What files are, of matrices that are made of blocks.
FILE = ArrayFile("Kronecker factors", "curvlinops-blocks", 4)
#: One number, one per factor of a product, or either by parameter name.
Damping = float | tuple[float, ...] | Mapping[str, Any]


class Factors(NamedTuple):
    """The covariances of a layer's inputs and of its output gradients.

    Of shape ``(n, n)`` and ``(m, m)``, one dimension less if diagonal, and one more in
    front if the layer has groups.
    """

    input: Tensor
    output: Tensor


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
    kind : mapping, optional
        What a file is to say about them, for operators that read it: settings by name.
    parameters : str, optional
        Fingerprint of the parameters that they belong to.

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
        self,
        space: TensorSpace,
        layouts: Sequence[Layout],
        blocks: Sequence[Block],
        kind: Mapping[str, Any] | None = None,
        parameters: str | None = None,
    ) -> None:
        super().__init__(space, space)
        self.kind, self.parameters = dict(kind or {}), parameters
        self.layouts, self.blocks = tuple(layouts), tuple(blocks)
        index = {name: i for i, name in enumerate(space.names)}
        self._places = [[index[name] for name in lay.names] for lay in self.layouts]

    def _apply(self, V: Tensor) -> Tensor:
        rows = torch.empty(V.shape[::-1], dtype=V.dtype, device=V.device)
        self._multiply(self._in_space.split(V.T), self._in_space.split(rows))
        return rows.T

    def _multiply(self, given: list[Tensor], results: list[Tensor]) -> None:
        """Multiply tensors ``[K, *shape]``; write into others."""
        for places, layout, block in zip(
            self._places, self.layouts, self.blocks, strict=True
        ):
            X = layout.gather([given[i] for i in places]).to(block.torch_dtype)
            into = [results[i] for i in places]
            if isinstance(block, KroneckerProductLinearOperator):
                out = layout.as_view(into[0]) if X.dtype == into[0].dtype else None
                product = block._multiply(X, out)
                if out is not None:
                    continue
            else:
                K = len(X)
                product = block._apply(X.reshape(K, -1).T).T.reshape(K, *layout.size)
            for result, part in zip(into, layout.scatter(product), strict=True):
                result.copy_(part)

    def _product(
        self, x: Any, columns: int | None = None, ndim: int | None = None
    ) -> Any:
        """Multiply a list of tensors as it is, other operands as usual."""
        space = self._in_space
        kind = space.dtype, space.device, False
        if (
            not _is_tensor_list(x)
            or ndim == 2
            or tuple(getattr(t, "shape", None) for t in x) != space.shapes
            or any((t.dtype, t.device, t.requires_grad) != kind for t in x)
        ):
            return super()._product(x, columns, ndim)
        results = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in x]
        self._multiply(*([t.unsqueeze(0) for t in each] for each in (x, results)))
        return results

    # -- scalars and vectors ------------------------------------------------------

    def trace(self) -> Tensor:
        return torch.stack([block.trace() for block in self.blocks]).sum()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        signs, logs = zip(*(b._slogdet(delta) for b in self.blocks), strict=True)
        return torch.stack(signs).prod(), torch.stack(logs).sum()

    def frobenius_norm(self) -> Tensor:
        norms = torch.stack([block.frobenius_norm() for block in self.blocks])
        return norms.norm()

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues in ascending order."""
        parts = torch.cat([block.eigenvalues() for block in self.blocks])
        return parts.sort().values

    def diagonal(self) -> Tensor:
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
            If a mapping does not have every block, has several numbers for one, or
            names no parameter; or if there are too many or too few numbers.
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
                if any(other != given[0] for other in given):
                    raise ValueError(
                        f"`damping` has several values, {given}, for the joint block "
                        f"of {list(layout.names)}: pass one of them."
                    )
                its = given[0]
            if isinstance(block, EighDecomposedLinearOperator):
                if isinstance(its, tuple):
                    raise ValueError("One number damps an eigendecomposed block.")
                return block.inverse(its)
            single = len(block.factors) == 1
            if isinstance(its, tuple):
                its = its[::-1]
                if single and len(its) == 2:
                    its = its[:1]  # there is no input factor
            retry = options.get("retry_double_precision", True)
            its_options = {"retry_double_precision": retry} if single else options
            return block.inverse(its, **its_options)

        return self.map(invert)

    def _times(self, c: float) -> BlockwiseLinearOperator:
        return self.map(lambda _, block: block._times(c))

    def _inverse_of_damped(self, delta: float, **options: Any) -> TorchOperator:
        return self.inverse(delta, use_exact_damping=True)

    def __pow__(self, p: Any) -> Any:
        """Return the power with a real exponent, block by block."""
        exponent = real_exponent(p)
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

    def layers(self) -> Iterator[tuple[str, Block]]:
        """Yield the blocks that have two factors, with the weight's name."""
        for layout, block in zip(self.layouts, self.blocks, strict=True):
            if len(_kronecker(block).factors) == 2:
                yield layout.names[0], block

    def factors(self) -> dict[str, Factors]:
        """Return the factors of every block that has two, by the weight's name.

        Those of an eigendecomposed block are assembled from their eigenvalues and
        eigenvectors.
        """
        factors = {
            name: block.factors
            if isinstance(block, KroneckerProductLinearOperator)
            else block.factors_decomposed()
            for name, block in self.layers()
        }
        return {
            name: Factors(*(f[0] if len(f) == 1 else f for f in its[::-1]))
            for name, its in factors.items()
        }

    # -- files ------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to an ``npz`` file that :func:`load` reads.

        Parameters
        ----------
        path : str or path
            The file. It replaces an earlier one once it is complete.

        Raises
        ------
        ValueError
            If something that is no regular file is there.
        OSError
            If it cannot be written. What was there before is as it was.
        """
        arrays: dict[str, Any] = {}
        described = []
        for i, (layout, block) in enumerate(
            zip(self.layouts, self.blocks, strict=True)
        ):
            product = _kronecker(block)
            parts: dict[str, Sequence[Tensor]] = {"factors": product.factors}
            if isinstance(block, EighDecomposedLinearOperator):
                parts |= {"evals": [block.evals], "spectra": block.spectra or []}
            for part, tensors in parts.items():
                for j, tensor in enumerate(tensors):
                    arrays[f"block{i}.{part}{j}"] = to_numpy(tensor)
            counts = {part: len(tensors) for part, tensors in parts.items()}
            described.append([counts, block.name, *vars(layout).values()])
        space = self._in_space
        about = {
            "kind": self.kind,
            "parameters": self.parameters,
            "names": space.names,
            "shapes": space.shapes,
            "dtype": str(space.dtype).removeprefix("torch."),
            "blocks": described,
        }
        FILE.write(path, about, arrays)


def _kronecker(block: Block) -> KroneckerProductLinearOperator:
    """Return a block's product of factors, or of these factors' eigenvectors."""
    Q: Any = block.Q if isinstance(block, EighDecomposedLinearOperator) else block
    assert isinstance(Q, KroneckerProductLinearOperator)
    return Q


def load(
    path: str | PathLike[str], device: torch.device | str = "cpu", **kind: Any
) -> BlockwiseLinearOperator:
    """Read the blocks that were saved in a file.

    Parameters
    ----------
    path : str or path
        A file that ``save`` of a Kronecker-factored operator has written.
    device : torch.device or str, optional
        Where the result lives.
    **kind : Any
        What the file must say about itself: the operator's class and settings.

    Returns
    -------
    BlockwiseLinearOperator
        The matrix, without its model and data.

    Raises
    ------
    ValueError
        If the file is another one, of another version, cut off, damaged, or of another
        kind; the message says which.
    OSError
        If there is no such file, or it cannot be read.

    Notes
    -----
    A checksum of everything that counts is compared, and nothing is executed.
    """
    about, arrays = FILE.read(path)
    if kind:
        _require_kind(path, about["kind"], kind)
    layouts, blocks = [], []
    for i, (counts, name, names, shapes, *rest) in enumerate(about["blocks"]):
        view, order, size = map(tuple, rest)
        layouts.append(
            Layout(tuple(names), tuple(map(tuple, shapes)), view, order, size)
        )
        parts = {
            part: [
                torch.from_numpy(arrays[f"block{i}.{part}{j}"]).to(device)
                for j in range(count)
            ]
            for part, count in counts.items()
        }
        block: Block = KroneckerProductLinearOperator(
            *parts["factors"], grouped=True, name=name
        )
        if "evals" in parts:
            (evals,), spectra = parts["evals"], parts["spectra"] or None
            block = EighDecomposedLinearOperator(
                evals, block, name=name, spectra=spectra
            )
        blocks.append(block)
    dtype = getattr(torch, about["dtype"])
    space = TensorSpace(about["shapes"], dtype, device, about["names"])
    its = about["kind"], about["parameters"]
    return BlockwiseLinearOperator(space, layouts, blocks, *its)


def _require_kind(
    path: str | PathLike[str], its: Mapping[str, Any], mine: Mapping[str, Any]
) -> None:
    """Raise if a file holds another matrix than it must."""
    differing = [
        f"{key}: {its.get(key)!r} there, {mine.get(key)!r} here"
        for key in dict.fromkeys([*mine, *its])
        if its.get(key) != mine.get(key)
    ]
    if differing:
        raise ValueError(
            f"{fspath(path)} holds the factors of another matrix "
            f"({'; '.join(differing)}). Build the operator as it was when they were "
            "saved, or read them by `curvlinops.kfac.load(path)`, as a matrix of its "
            "own."
        )


__all__ = ["BlockwiseLinearOperator", "load"]
