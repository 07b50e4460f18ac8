"""A model whose result is no tensor, or has its classes on another axis, as a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from curvlinops._counts import as_count, count
from curvlinops._reading import Caller, Reading


class AsModel:
    """A model, and how its result is read; see :func:`as_model`.

    Attributes
    ----------
    module : nn.Module or callable
        The model as it is.
    reading : Reading
        What of its result is the prediction.
    """

    def __init__(self, module: Callable[..., Any], reading: Reading) -> None:
        self.module, self.reading = module, reading

    def __call__(self, *args: Any) -> Tensor:
        """Return the prediction for ``(X)``, or ``(params, X)`` of a plain callable."""
        *params, X = args
        result = self.module(*params, X) if params else Caller()(self.module, X)
        prediction: Tensor = self.reading.tensor(result)
        return prediction

    def __repr__(self) -> str:
        return f"as_model({self.module!r}, {self.reading})"

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the module's parameters."""
        return self._of_module("parameters")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the module's parameters, by the names that they have there."""
        return self._of_module("named_parameters")

    def _of_module(self, name: str) -> Any:
        if isinstance(self.module, nn.Module):
            return getattr(self.module, name)()
        raise TypeError(
            "A model given as a plain callable has no parameters of its own: pass the "
            "dict of names to tensors that it is called with."
        )


def as_model(
    module: Callable[..., Any],
    output: str | int | Callable[[Any], Tensor] = "logits",
    *,
    class_axis: int | None = None,
    with_labels: bool | None = None,
) -> AsModel:
    r"""Say what of a model's result is the prediction, and where its classes are.

    Parameters
    ----------
    module : nn.Module or callable
        The model: a module, or a function ``(params_dict, X)``, that returns an object,
        a mapping or a tuple with tensors in it.
    output : str, int, or callable, optional
        Which of these is the prediction :math:`f`: the name of an attribute or a key, a
        place in a tuple, or a function of the result that returns a tensor.
    class_axis : int, optional
        The axis of :math:`f` that has the classes, if it is not axis 1: ``-1`` for
        logits of shape ``[B, T, V]``. It is moved to axis 1, where torch's losses look
        for it, so that :math:`f` has the shape ``[B, V, T]``.
    with_labels : bool, optional
        Whether the model gets the labels, too, of batches that are mappings. By
        default if ``output`` is ``"loss"``, which models compute from them.

    Returns
    -------
    AsModel
        To be passed as a model to any operator or risk; it can also be called. Names
        of parameters are those of ``module``.

    Raises
    ------
    TypeError
        When the model is evaluated, if there is no such tensor in its result; the
        message names those that there are.
    ValueError
        If ``class_axis`` is no whole number; when the model is evaluated, if the
        prediction has no such axis.

    Notes
    -----
    *What needs no adapter.* A batch is a pair ``(X, y)``, or a mapping with its labels
    under one of the names ``labels``, ``label``, ``targets``, ``target``, ``y``. A
    module gets a mapping ``X`` by keyword if the keys are names of its arguments, or if
    it fails with the mapping as its only argument. A result that has a tensor
    ``.logits`` stands for that tensor. Logits ``[B, T, V]`` with labels ``[B, T]`` and
    cross-entropy have their classes on the last axis, as the shapes of the first batch
    say. These say nothing where ``T = V``: then torch's rule counts for a model that
    returns a tensor (axis 1), and one that returns ``.logits`` is refused until
    ``class_axis`` is given.

    *Nothing is shifted.* Libraries that compute a ``loss`` of a causal language model
    compare the logits at one position with the label of the next. Cross-entropy of
    ``.logits`` and ``labels`` does not: pass labels that are shifted, or take
    ``"loss"``.

    *The loss as output.* ``as_model(module, output="loss")`` with the loss function
    ``lambda f, y: f`` has the Hessian and the gradient of the model's own loss. Its GGN
    is zero, since the loss is linear in this output. The loss function is a callable
    like any other, but what is inside of the output cannot be cut or put together. So
    what a batch's loss averages over has to be said: by ``num_terms_fn``, e.g.
    ``lambda f, y: (y[:, 1:] != -100).sum()`` for a mean over tokens, or
    ``reduction="mean"`` where each datum counts the same, or ``reduction="sum"``.

    *Losses as outputs.* With one value per datum as output, the rows of the Jacobian
    are the data's gradients, as for influence functions; see the examples.

    Cost: none.

    References
    ----------
    Koh and Liang, "Understanding Black-box Predictions via Influence Functions",
    arXiv:1703.04730, for the second example.

    Examples
    --------
    A model that takes keywords and returns an object, and batches with labels inside:

    >>> import torch
    >>> from types import SimpleNamespace
    >>> from curvlinops import GGNLinearOperator, as_model
    >>> class Tagger(torch.nn.Linear):
    ...     def forward(self, features, mask=None):
    ...         return SimpleNamespace(logits=super().forward(features), loss=None)
    >>> tagger, loss = Tagger(5, 3), torch.nn.CrossEntropyLoss()
    >>> batch = {"features": torch.rand(2, 4, 5), "labels": torch.zeros(2, 4).long()}
    >>> model = as_model(tagger, class_axis=-1)
    >>> G = GGNLinearOperator(model, loss, list(tagger.parameters()), [batch])
    >>> model({"features": batch["features"]}).shape
    torch.Size([2, 3, 4])
    >>> other = GGNLinearOperator(tagger, loss, list(tagger.parameters()), [batch])
    >>> torch.allclose(G.to_dense(), other.to_dense())  # found by itself here
    True

    How the loss of a test datum changes with the weight of each training datum,
    :math:`-\nabla \ell_i^\top (H + \delta I)^{-1} \nabla \ell_\text{test}`: the losses
    are the outputs of a model whose inputs are ``(X, y)``.

    >>> from curvlinops import (CGInverseLinearOperator, HessianLinearOperator,
    ...                         IdentityLinearOperator, JacobianLinearOperator)
    >>> net = torch.nn.Linear(3, 2).double()
    >>> X, y = torch.rand(6, 3).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    >>> params = {name: p.detach() for name, p in net.named_parameters()}
    >>> def losses(params, batch):
    ...     f = torch.func.functional_call(net, params, (batch[0],))
    ...     return torch.nn.functional.cross_entropy(f, batch[1], reduction="none")
    >>> J = JacobianLinearOperator(losses, params, [((X, y), None)])
    >>> H = HessianLinearOperator(net, loss, params, [(X, y)])
    >>> A = H + 0.1 * IdentityLinearOperator(H.in_shapes, H.device, H.torch_dtype)
    >>> test = JacobianLinearOperator(losses, params, [((X[:1], 1 - y[:1]), None)])
    >>> g = test.adjoint() @ torch.ones(1).double()
    >>> influence = -(J @ (CGInverseLinearOperator(A) @ g))
    >>> dense = -(J.to_dense() @ torch.linalg.solve(A.to_dense(), g))
    >>> torch.allclose(influence, dense)
    True
    """
    if isinstance(module, AsModel):
        module = module.module
    if not callable(module):
        raise TypeError(
            "`as_model` takes a module or a callable `(params, X)`, got "
            f"{type(module).__name__}."
        )
    place = as_count(output)
    if place is None and not (isinstance(output, str) or callable(output)):
        raise TypeError(
            "`output` must be a name, a place in a tuple, or a function of the model's "
            f"result, got {output!r}."
        )
    labels = output == "loss" if with_labels is None else with_labels
    axis = None if class_axis is None else count("class_axis", class_axis, None)
    return AsModel(module, Reading(output if place is None else place, axis, labels))
