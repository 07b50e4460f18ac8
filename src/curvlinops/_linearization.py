r"""One batch's derivatives, linearised once and multiplied many times.

At a batch with inputs :math:`X`, targets :math:`y` and model output
:math:`f = f_\theta(X)` every matrix of this package is built from three products:

* ``jvp``: :math:`v \mapsto J v` with :math:`J = \partial f / \partial \theta`,
* ``vjp``: :math:`u \mapsto J^\top u`,
* ``hvp``: :math:`v \mapsto \nabla^2_\theta \ell(f, y)\, v`.

All three are backward passes through autograd graphs that do not depend on the
vector, so a :class:`Linearization` that is kept pays for them once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache, cached_property, partial
from math import inf
from typing import Any, Self, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlinops._adjoint import gap, lost, positive_like
from curvlinops._agreement import in_units, matrices_agree
from curvlinops._backward import grad
from curvlinops._data import Share, cloned, leaves_in, marks_of, strided, tensors_in
from curvlinops._differences import misfits
from curvlinops._finite import all_finite, named, warn_about_product
from curvlinops._folding import Folded, fold
from curvlinops._foreign import foreign_parts, not_differentiable
from curvlinops._forms import Congruence, Middle, Vectors
from curvlinops._hidden import refuse_reentrant
from curvlinops._identity import checked_owner
from curvlinops._locks import new_lock
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._model import (
    ForwardModeBusyError,
    Model,
    graph_leaves,
    graph_nodes,
)
from curvlinops._objects import content_of
from curvlinops._policy import POLICY, Policy
from curvlinops._reading import not_a_tensor
from curvlinops._replay import Product, Route, record, recording
from curvlinops._spaces import TensorSpace, rounding
from curvlinops.losses import Loss

T = TypeVar("T")
Graph = Sequence[Tensor | GradientEdge | None]

#: Attributes of a linearization that hold autograd graphs.
_GRAPHS = ("output", "loss", "_transposed", "_gradient")


class GraphFreedError(Exception):
    """A graph was gone through for the last time, and is needed again all the same."""


class _kept(cached_property[T]):
    """A property that is computed once, with its object's own lock held.

    Up to Python 3.11, those of functools hold a lock of their own, for all objects:
    whoever has the object's lock and asks for one then waits for who has it the other
    way around.
    """

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Self: ...
    @overload
    def __get__(self, instance: Any, owner: Any = None) -> T: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        with instance._lock:
            values, name = vars(instance), self.attrname
            if name not in values:
                values[name] = self.func(instance)
            return values[name]


class Linearization:
    r"""The derivatives of one batch at the model's current parameters.

    A *vector* of parameter space is a list of tensors in parameter shapes, a vector
    of output space a tensor of the output's shape. Both may have one more, leading,
    dimension for several vectors at once.

    Parameters
    ----------
    model : Model
        Model with parameters to differentiate by.
    X, y : Any
        Inputs and targets of the batch, on the model's device.
    make_loss : callable, optional
        Maps output and targets to the batch's :class:`~curvlinops.losses.Loss`.
    index : int, optional
        Position of the batch in the data.
    protect : bool, optional
        Whether the model sees a copy of the inputs, since it may write into them.
    see : callable, optional
        Is told of all that is called in the first evaluation.
    policy : Policy, optional
        When products change their route.

    Notes
    -----
    :math:`J^\top u` is a backward pass through the graph of :math:`f`.
    :math:`J v` differentiates :math:`u \mapsto J^\top u`, a linear function, once
    more: its derivative applied to :math:`v` is :math:`(J^\top)^\top v = J v`. Unlike
    forward-mode differentiation, this exists for every operation that has a twice
    differentiable backward pass, and is its adjoint by construction. The Hessian is
    the derivative of the gradient in reverse mode, too. Forward mode serves where no
    graph is kept, see :meth:`congruence`.

    Graphs are built at first use and kept as long as the object lives. Products are
    safe to call from several threads.
    """

    def __init__(
        self,
        model: Model,
        X: Any,
        y: Any,
        make_loss: Callable[[Tensor, Any], Loss] | None = None,
        index: int = 0,
        protect: bool = True,
        see: Callable[..., None] | None = None,
        policy: Policy = POLICY,
    ) -> None:
        self.index = index
        self._policy = policy
        #: Position among what a risk multiplies, and, of a part, which part it is.
        self.place = index
        self.share: Share | None = None
        #: Number of the output's first row in all data.
        self.first_row = 0
        #: Whether the model writes, or may write, into its input.
        self.writes = protect
        self.X, self.y = X, y
        self._model = model
        self._leaves = model.leaves
        self.make_loss = make_loss
        self._lock = new_lock()
        self._notes: dict[Any, Any] = {}
        self._routes: dict[Hashable, Route] = {}
        # Products asked for, and what has been folded since: `None` if that is no use.
        self._asked: Counter[Hashable] = Counter()
        self._folded: dict[Hashable, tuple[Folded, Middle | None] | None] = {}
        self._nbytes: tuple[tuple[int, ...], int] = ((), 0)
        #: Whether products with the Jacobian come from a graph in any case.
        self.multiplied = False
        #: Whether the next product is the last one, which may drop the graphs.
        self.final = False
        f = vars(self)["output"] = self._evaluated(see)
        #: Space of the output, known also while the output is not kept.
        self.output_space = TensorSpace([f.shape], f.dtype, f.device)

    @_kept
    def output(self) -> Tensor:
        """The model's output, with its graph."""
        return self._evaluated()

    def _evaluated(self, see: Callable[..., None] | None = None) -> Tensor:
        if not self.writes:
            return _checked_output(self._model(self.X, see), self.index)
        X = cloned(self.X)
        form: list[Any] = []
        given = leaves_in(X, form)
        seen = strided(filter(torch.is_tensor, given))
        versions, marks = [t._version for t in seen], marks_of(seen)
        output = _checked_output(self._model(X, see), self.index)
        form_now: list[Any] = []
        self.writes = (
            [*map(id, given)] != [*map(id, leaves_in(X, form_now))]
            or form != form_now
            or versions != [t._version for t in seen]
            or marks != marks_of(seen)
            or not all(map(torch.equal, seen, strided(tensors_in(self.X))))
            or _arrays(given) != _arrays(leaves_in(self.X))
        )
        return output

    @_kept
    def reached(self) -> set[int]:
        """The ``id`` of every leaf of the model that the output depends on."""
        ours = set(map(id, self._leaves))
        return ours.intersection(map(id, graph_leaves(self.output)))

    @_kept
    def loss(self) -> Loss:
        """The batch's loss terms as a function of the output."""
        if self.make_loss is None:
            raise ValueError("This product needs a loss function.")
        loss = self.make_loss(self.output, self.y)
        loss.first_row = self.first_row
        return loss

    @_kept
    def count(self) -> Any:
        """Number of terms that a mean over this batch's loss divides by."""
        return self.loss.count

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, kept under ``key`` as long as the batch is.

        The key is a tuple that begins with the class or function it belongs to.
        """
        with self._lock:
            if checked_owner(key) not in self._notes:
                self._notes[key] = compute()
            return self._notes[key]

    # -- graphs -----------------------------------------------------------------

    @_kept
    def _transposed(self) -> tuple[Tensor, list[Tensor | None]]:
        """A dummy ``u`` and the graph of ``J^T u``, which is linear."""
        u = positive_like(self.output.detach()).requires_grad_()
        graph = _grad([self.output], self._leaves, [u], create_graph=True)
        return u, self._checked_graph("transposed", graph)

    @_kept
    def _gradient(self) -> list[Tensor | None]:
        """The graph of the gradient of the summed loss."""
        graph = _grad([self._value()], self._leaves, [None], create_graph=True)
        return self._checked_graph("gradient", graph)

    def _value(self) -> Tensor:
        """Return the loss, with its graph."""
        value = self.loss.value()
        if self.loss.opaque:
            refuse_reentrant(value, f"the loss of batch {self.index}", self.output)
        if self.output.requires_grad and not value.requires_grad:
            raise ValueError(
                f"The loss of batch {self.index} does not depend on the model's output "
                "through autograd. Compute it without .detach(), .item(), .numpy() or "
                "no_grad()."
            )
        return value

    def _checked_graph(
        self, kind: str, graph: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Return a graph after looking for a derivative that has none itself.

        Torch marks it, but the mark is seen only if everything is differentiated.
        """
        if kind not in self._model.checked_graphs:
            for node in graph_nodes(*(g for g in graph if g is not None)):
                if node.name() == "torch::autograd::Error":
                    roots = [self.loss.value()] if kind == "gradient" else []
                    names = ", ".join(foreign_parts(self.output, *roots))
                    raise RuntimeError(_explained(f"once_differentiable: {names}"))
            self._model.checked_graphs[kind] = True
        return graph

    @property
    def stage(self) -> tuple[int, ...]:
        """What changes whenever something else is kept."""
        loss = self.__dict__.get("loss")
        return (
            *(name in self.__dict__ for name in _GRAPHS),
            sum(r.program is not None for r in list(self._routes.values())),
            len(self._notes),
            len(self._folded),
            len(vars(loss)) if loss else 0,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that graphs, recordings and everything else here keep alive."""
        stage, nbytes = self._nbytes
        if stage != self.stage:
            stage = self.stage
            _, transposed = self.__dict__.get("_transposed", (None, []))
            kept = [self.__dict__.get("output"), *transposed]
            kept += self.__dict__.get("_gradient", [])
            routes = list(self._routes.values())
            for route in routes:
                kept += route.held
            for folded, _ in filter(None, list(self._folded.values())):
                kept += [*folded.held, *folded.pulled]
            loss = self.__dict__.get("loss")
            held = [list(self._notes.values()), dict(vars(loss)) if loss else None]
            kept += tensors_in(held)
            roots = [t for t in kept if t is not None]
            # Data may be a view of far more, which is not kept by this batch alone.
            data = {id(t): t for t in strided(tensors_in([self.X, self.y]))}.values()
            nbytes = graph_bytes(roots, exclude=[*self._leaves, *data])
            nbytes += sum(t.numel() * t.element_size() for t in data)
            nbytes += sum(route.graph_bytes for route in routes)
            self._nbytes = stage, nbytes
        return nbytes

    # -- products ---------------------------------------------------------------

    def multiply(
        self,
        key: Hashable,
        body: Callable[[Linearization, list[Tensor]], Sequence[Tensor]],
        vectors: list[Tensor],
        several: bool = False,
    ) -> Sequence[Tensor]:
        """Return ``body(self, vectors)``, replayed where a recording is trusted.

        Parameters
        ----------
        key : hashable
            Names the product among the batch's; equal keys mean equal matrices.
            ``None`` for a product that is never recorded.
        body : callable
            Linear function of the vectors.
        vectors : list of Tensor
            The vectors.
        several : bool, optional
            Whether they have a leading dimension.
        """
        if key is None:
            return body(self, vectors)
        is_first = (route := self._routes.get(key)) is None
        if route is None:
            late = self._policy.record_after(self.pays_early, self.is_small)
            route = self._routes.setdefault(key, Route(late, self.convolves))
        if route.trusted and all(r.trusted for r in list(self._routes.values())):
            self._drop_graphs()  # nobody has needed them lately
        product: Product = partial(body, self)
        if (folded := self._folded.get(key)) is not None:
            product = partial(self._multiply_folded, *folded)
        products = route.multiply(product, vectors, several)
        if is_first:
            self._warn_unless_finite(key, vectors, products)
        return products

    def _warn_unless_finite(
        self, key: Hashable, vectors: list[Tensor], products: Sequence[Tensor]
    ) -> None:
        """Say why a product is not finite, if it is the first with this batch."""
        known, name = self._model.checked_graphs, (self.index, self.share, key)
        if name in known:
            return
        known[name] = all_finite(products)
        if not known[name] and all_finite(vectors) and self._model.warns:
            names = named(self._model.params, products)
            first = not all_finite(self._pulled(torch.ones_like(self.output)))
            by_loss = not first and _is_loss_at_fault(self)
            warn_about_product(names, self.index, first, by_loss)

    def fold_due(self, key: Hashable, body: Any, number: int) -> bool:
        """Whether as many products have been asked for as folding would cost.

        Parameters
        ----------
        key : hashable
            Names the product.
        body : Any
            What multiplies; only a :class:`Congruence` is folded.
        number : int
            How many products are asked for now.
        """
        asked, policy = self._asked[key], self._policy
        self._asked[key] += number
        late = policy.record_late - 1  # a recording comes next
        if key in self._folded or asked < late:
            return False
        if not isinstance(body, Congruence):
            self._folded[key] = None
            return False
        rank = self.once((Middle.rank, key), lambda: body.middle.rank(self))
        if rank > policy.max_rank:
            self._folded[key] = None
            return False
        return asked >= late + policy.fold_late * (rank - 1)

    def fold(self, key: Hashable, body: Congruence, room: float) -> None:
        r"""Fold :math:`J^\top M J` if that pays and takes no more than some bytes.

        To be called where the model may be evaluated.
        """
        with self._lock:
            if key in self._folded:
                return
            evaluated, folded = "output" in vars(self), None
            try:
                folded = self._checked_fold(key, body, room)
            except Exception as error:  # whatever an operation raises on its own
                raise_if_out_of_memory(error)
            finally:
                if folded is not None or not evaluated:
                    self._drop_graphs()
            if folded is not None:
                self._routes[key] = Route(convolves=self.convolves)
            self._folded[key] = folded

    def _checked_fold(
        self, key: Hashable, body: Congruence, room: float
    ) -> tuple[Folded, Middle | None] | None:
        """Fold; return what multiplies as before, if anything does."""
        if (folded := self._fold(body, room)) is None:
            return None
        route = self._routes.get(key)
        known = route.program if route else None
        like = [leaf.detach() for leaf in self._leaves]
        multiply: Product = known or partial(body, self)
        found: Product = partial(self._multiply_folded, *folded)
        eps = rounding(like[0].dtype, like[0].device, self.convolves)
        same = matrices_agree(found, multiply, like, eps, 0.75, in_units)
        return folded if same else None

    def is_folded(self, key: Hashable) -> bool:
        """Whether a product is made from sensitivities."""
        return self._folded.get(key) is not None

    def unfold(self) -> bool:
        """Give up what has been folded; return whether there was anything."""
        with self._lock:
            keys = [key for key, folded in self._folded.items() if folded is not None]
            for key in keys:
                self._folded[key] = None
                self._routes[key] = Route(convolves=self.convolves)
            return bool(keys)

    @property
    def convolves(self) -> bool:
        """Whether the model has convolutions, as far as that is known."""
        return self._model.convolves

    def _fold(
        self, body: Congruence, room: float
    ) -> tuple[Folded, Middle | None] | None:
        """Fold; return what is left in the middle, too."""

        def pull_back(vectors: Vectors) -> Vectors:
            grads = _grad([self.output], self._leaves, vectors, create_graph=True)
            return _filled(grads, self._leaves, torch.Size())

        program = record(pull_back, [_ramp(self.output.detach())])[1]
        columns, middle = body.middle.columns(self), None
        if columns is None:  # all of output space
            f, outputs = self.output, self.output.shape[1:]
            unit = torch.eye(outputs.numel(), dtype=f.dtype, device=f.device)
            columns = unit.view(-1, 1, *outputs).expand(-1, len(f), *outputs)
            middle = body.middle
        folded = fold(program, columns, room, self.convolves, self._policy)
        return folded and (folded, middle)

    def _multiply_folded(
        self, folded: Folded, middle: Middle | None, V: Vectors
    ) -> Vectors:
        leading = V[0].shape[: V[0].ndim - self._leaves[0].ndim]
        (y,) = _pull_back(folded.pulled, [folded.u], V, leading)
        if middle is not None:
            f = self.output_space.shapes[0]
            y = middle(self, y.reshape(*leading, *f)).reshape(y.shape)
        return torch.func.vmap(folded.pull)(y) if leading else folded.pull(y)

    @_kept
    def pays_early(self) -> bool:
        """Whether a recording pays soon.

        With convolutions on a CPU, whose double backward does four where two are
        needed. On a GPU, watching the operations one by one takes longest.
        """
        if self.output.device.type != "cpu":
            return False
        nodes = graph_nodes(self.output)
        return any("Convolution" in node.name() for node in nodes)

    @_kept
    def is_small(self) -> bool:
        """Whether operations take little longer than starting them."""
        size = sum(t.numel() for t in (*self._leaves, *tensors_in(self.X)))
        return size <= self._policy.small

    def settled(self, key: Hashable) -> bool:
        """Whether further products change nothing about how one is computed."""
        route = self._routes.get(key)
        waits = key in self._asked and key not in self._folded
        return key is None or (route is not None and route.settled and not waits)

    def replays(self, key: Hashable) -> bool:
        """Whether a product needs nothing but a recording of it."""
        route = self._routes.get(key)
        return route is not None and route.trusted

    def jvp(self, V: Sequence[Tensor]) -> Tensor:
        """Multiply by the Jacobian; returns ``[*leading, *output.shape]``."""
        if not self._model.checked_graphs.get(self._transposed_key, True):
            return self._pushed(V)
        u, JTu = self._transposed
        leading = V[0].shape[: V[0].ndim - self._leaves[0].ndim]
        (Jv,) = _pull_back(JTu, [u], V, leading)
        if recording() or self._graph_serves(V, Jv):
            return Jv
        return self._pushed(V)

    @property
    def _transposed_key(self) -> Hashable:
        return ("transposed", self.index, self.share)

    @property
    def _eps(self) -> float:
        space = self._model.space
        return rounding(space.dtype, space.device, self.convolves)

    def _graph_serves(self, V: Sequence[Tensor], Jv: Tensor) -> bool:
        """Whether :math:`J v` comes from the graph of the transpose, or forward mode.

        Looked at once per batch, and wherever the product is not finite.
        """
        known, key = self._model.checked_graphs, self._transposed_key
        if bool(Jv.isfinite().all()):
            if key in known:
                return known[key]
            share = self._lost_share(V, Jv)
        elif all(bool(v.isfinite().all()) for v in V):
            share = inf
        else:
            return True
        known[key] = not share or not self._forward_serves()
        if known[key] and max(self._eps**0.5, 1e-6) < share < inf:
            del known[key]
            raise not_differentiable(
                foreign_parts(self.output),
                f"Products with the Jacobian J of batch {self.index} are wrong: "
                f"w^T (J v) and v^T (J^T w) differ by {share:.1g} of their size.",
                "; or give it a `jvp` method, for derivatives in forward mode",
            )
        return known[key]

    def _lost_share(self, V: Sequence[Tensor], Jv: Tensor) -> float:
        """Return which share of the Jacobian the graph of its transpose has lost."""
        u, JTu = self._transposed
        known = [None if g is None else g.detach() for g in JTu]
        w, JTw = u.detach(), _filled(known, self._leaves, torch.Size())

        def push(V: Vectors) -> Tensor:
            return _pull_back(JTu, [u], V, torch.Size())[0]

        if not foreign_parts(self.output):
            if Jv.ndim > w.ndim:
                Jv, V = Jv.sum(0), [v.sum(0) for v in V]
            if not gap(Jv, w, V, JTw, self._eps):
                return 0.0
        return lost(push, self._pulled, w, JTw, self._eps)

    def _pulled(self, U: Tensor) -> Vectors:
        return _pull_back([self.output], self._leaves, [U], torch.Size())

    def _pushed(self, V: Sequence[Tensor], wait: bool = True) -> Tensor:
        """Multiply by the Jacobian in forward mode, vector by vector."""
        if V[0].ndim > self._leaves[0].ndim:
            return torch.stack(
                [self._pushed([v[k] for v in V]) for k in range(len(V[0]))]
            )
        return self._model.directional(self.fresh_input(), V, self.reached, wait)

    def _forward_serves(self) -> bool:
        """Whether forward mode gives the Jacobian that reverse mode has.

        Looked at once per batch.
        """
        model, key = self._model, ("forward", self.index, self.share)
        if key not in model.checked_graphs and model.forward_mode:
            try:
                w = positive_like(self.output.detach())
                push, pull = partial(self._pushed, wait=False), self._pulled
                share = lost(push, pull, w, pull(w), self._eps)
                model.forward_mode = model.checked_graphs[key] = not share
            except ForwardModeBusyError:
                return False
            except Exception as error:  # whatever a model or an operation raises
                raise_if_out_of_memory(error)
                model.forward_mode = False
        return model.checked_graphs.get(key, False)

    def vjp(self, U: Tensor) -> Vectors:
        """Multiply by the Jacobian's transpose; returns tensors in parameter shapes."""
        leading = U.shape[: U.ndim - len(self.output_space.shapes[0])]
        return self._last("output", [U], leading)

    def congruence(
        self, middle: Callable[[Linearization, Tensor], Tensor], V: Sequence[Tensor]
    ) -> Vectors:
        r"""Multiply by :math:`J^\top M J`.

        Parameters
        ----------
        middle : callable
            Maps this batch and a vector :math:`u` of output space to :math:`M u`.
        V : list of Tensor
            Vectors of parameter space.

        Notes
        -----
        Where no graph is kept, :math:`J v` is computed in forward mode if that agrees
        with reverse mode. Otherwise, a graph of :math:`u \mapsto J^\top u` pays.
        """
        several = V[0].ndim > self._leaves[0].ndim
        fresh = self.final and "_transposed" not in vars(self)
        if fresh and not (self.multiplied or several or recording()):
            Jv = self._pushed_if_right(V)
            if Jv is not None:
                return self.vjp(middle(self, Jv))
        return self.vjp(middle(self, self.jvp(V)))

    def _pushed_if_right(self, V: Sequence[Tensor]) -> Tensor | None:
        """Multiply by the Jacobian in forward mode, unless that fails."""
        if not self._forward_serves():
            return None
        try:
            return self._pushed(V, wait=False)
        except ForwardModeBusyError:
            return None

    def fresh_input(self) -> Any:
        """Return the input for an evaluation that may write into it."""
        return cloned(self.X) if self.writes else self.X

    def hvp(self, V: Sequence[Tensor]) -> Vectors:
        """Multiply by the Hessian of the summed loss."""
        known, key = self._model.checked_graphs, ("gradient", self.index, self.share)
        if key not in known:
            self._compare_with_differences()
            known[key] = True
        leading = V[0].shape[: V[0].ndim - self._leaves[0].ndim]
        try:
            return self._last("_gradient", V, leading)
        except RuntimeError as error:
            raise_if_out_of_memory(error)
            if self.loss.opaque:  # it may say that it is to blame
                self.loss.hessian_mul(torch.zeros_like(self.loss.output))
            raise

    def _compare_with_differences(self) -> None:
        """Raise if the gradient's graph lacks a part of the Hessian.

        Torch's own operations are believed.
        """
        graph, names = self._gradient, foreign_parts(self.output, self.loss.value())
        if not names:
            return

        def evaluate(
            tensors: Sequence[Tensor], differentiate: bool
        ) -> tuple[Tensor, Vectors]:
            model = self._model.shifted(tensors)

            def body() -> tuple[Tensor, Vectors]:
                batch = Linearization(model, self.X, self.y, self.make_loss)
                batch.share, batch.first_row = self.share, self.first_row
                return batch.output, batch.gradient() if differentiate else []

            return model.run(body)

        def multiply(V: Vectors) -> Vectors:
            return _pull_back(graph, self._leaves, V, torch.Size())

        at = [leaf.detach() for leaf in self._leaves], self.gradient()
        wrong = misfits(evaluate, multiply, *at, self._pulled, self._eps)
        if wrong:
            rows = [list(self._model.params)[i] for i in wrong]
            raise not_differentiable(
                names,
                f"The Hessian of batch {self.index} is wrong in the rows of {rows}: it "
                "is not the derivative of the gradient, by central differences.",
            )

    def _last(
        self, name: str, vectors: Sequence[Tensor], leading: torch.Size
    ) -> Vectors:
        """Go back to the parameters, for the last time if this is the final product.

        Torch then frees what is saved for it on the way, unless that may be needed
        again: a model or a loss may keep parts of a graph.
        """
        loss = self.__dict__.get("loss")
        frees = self.final and self._model.may_free and not (loss and loss.opaque)
        graph: Graph = [self.output] if name == "output" else getattr(self, name)
        if self.final:
            if frees:  # the values are not needed
                graph = [_edge(output) for output in graph]
            self._drop_graphs()
        return _pull_back(graph, self._leaves, vectors, leading, retain_graph=not frees)

    def _drop_graphs(self) -> None:
        """Forget the graphs, which are built again on demand."""
        with self._lock:
            for name in _GRAPHS:
                self.__dict__.pop(name, None)

    def gradient(self) -> Vectors:
        """Return the gradient of the summed loss in parameter shapes."""
        if (graph := self.__dict__.get("_gradient")) is not None:
            grads = [None if g is None else g.detach() for g in graph]
        else:
            grads = _grad([self._value()], self._leaves, [None])
        return _filled(grads, self._leaves, torch.Size())


def _is_loss_at_fault(batch: Linearization) -> bool:
    """Whether a loss's second derivative by the output is not finite."""
    if batch.make_loss is None:
        return False
    try:
        product = batch.loss.hessian_mul(torch.ones_like(batch.output))
    except NotImplementedError:  # there is no loss beside the model
        return False
    return not all_finite([product])


def _edge(output: Tensor | GradientEdge | None) -> GradientEdge | None:
    """Return where a graph begins, ``None`` if there is none."""
    if isinstance(output, Tensor):
        return get_gradient_edge(output) if output.requires_grad else None
    return output


def _grad(
    outputs: Sequence[Any],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    retain_graph: bool = True,
    **options: Any,
) -> list[Tensor | None]:
    """Differentiate tensors or edges; a missing dependence gives ``None``."""
    if all(isinstance(t, Tensor) and not t.requires_grad for t in outputs):
        return [None] * len(inputs)
    try:
        return list(
            grad(
                outputs,
                inputs,
                grad_outputs,
                retain_graph=retain_graph,
                allow_unused=True,
                **options,
            )
        )
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        message = _explained(str(error))
        if "through the graph a second time" in message:
            raise GraphFreedError(message) from error
        raise RuntimeError(message) from error


def _explained(message: str) -> str:
    """Add the likely cause and its cure to an autograd error."""
    hints = {
        "use_reentrant": "Use `checkpoint(..., use_reentrant=False)`.",
        "once_differentiable": "Curvature needs a twice differentiable backward pass.",
        "is not implemented": "An operation of the model has no second derivative.",
        "twice": "Curvature needs a twice differentiable backward pass.",
    }
    hint = next((cure for cause, cure in hints.items() if cause in message), "")
    return f"Differentiating the model failed. {hint} torch says: {message}"


def _pull_back(
    outputs: Graph,
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    leading: torch.Size,
    retain_graph: bool = True,
) -> Vectors:
    """Multiply vectors by the transposed derivative of ``outputs`` by ``inputs``."""
    pairs = [
        (out, v)
        for out, v in zip(outputs, vectors, strict=True)
        if out is not None and (isinstance(out, GradientEdge) or out.requires_grad)
    ]
    if not pairs:
        return _filled([None] * len(inputs), inputs, leading)
    outs, vs = [list(side) for side in zip(*pairs, strict=True)]
    if leading:
        grads = _grad(outs, inputs, vs, is_grads_batched=True)
    else:
        grads = _grad(outs, inputs, vs, retain_graph)
    return _filled(grads, inputs, leading)


def _ramp(like: Tensor) -> Tensor:
    """Return a tensor without two equal entries."""
    steps = torch.linspace(1, 2, like.numel(), dtype=like.dtype, device=like.device)
    return steps.reshape(like.shape)


def _filled(
    grads: Iterable[Tensor | None], inputs: Sequence[Tensor], leading: torch.Size
) -> Vectors:
    """Replace missing derivatives by zeros, and sparse ones by dense ones."""
    return [
        t.new_zeros(()).expand((*leading, *t.shape))
        if g is None
        else g
        if g.layout is torch.strided
        else g.to_dense()
        for g, t in zip(grads, inputs, strict=True)
    ]


def _arrays(leaves: Iterable[Any]) -> list[Any]:
    """Return what NumPy's arrays among a nest's leaves contain."""
    return [content_of(x) for x in leaves if isinstance(x, np.ndarray)]


def _checked_output(output: Any, index: int) -> Tensor:
    """Return the model's output after checking that it can be differentiated."""
    if not torch.is_tensor(output):
        raise not_a_tensor(output, index)
    if output.is_nested:
        raise TypeError(
            "The model must return a plain tensor, got a nested (jagged) one for batch "
            f"{index}: return its `.values()`, or `.to_padded_tensor(0.0)`."
        )
    if not output.is_floating_point():
        raise TypeError(
            f"The model must return real floating-point numbers, got {output.dtype}."
            + " Return `torch.view_as_real(output)`." * output.is_complex()
        )
    if not torch.isfinite(output).all():
        raise ValueError(
            f"The model's output is not finite (NaN or infinity) for batch {index}. "
            "Look at that batch's inputs and at the parameters."
        )
    return output


def graph_bytes(roots: Iterable[Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """Count the bytes of the tensors that autograd graphs keep alive."""
    known = {t.untyped_storage().data_ptr() for t in exclude}
    total = 0

    def add(tensor: Tensor) -> None:
        nonlocal total
        for part in strided([tensor]):
            if part._is_zerotensor():  # forward mode's, which has no memory
                continue
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                total += storage.nbytes()

    roots = list(roots)
    for root in roots:
        add(root)
    for node in graph_nodes(*roots):
        for value in _saved(node):
            if torch.is_tensor(value):
                add(value)
    return total


def _saved(node: Any) -> list[Any]:
    """Return what a node of an autograd graph saved for its backward pass."""
    values: list[Any] = []
    for raw_name, name in _saved_names(node.__class__):
        try:
            raw = getattr(node, raw_name)
            packed = raw if isinstance(raw, (tuple, list)) else [raw]
            # Behind a hook (activation checkpointing) the value is not kept but
            # computed on access.
            if any(getattr(one, "unpack_hook", None) is not None for one in packed):
                continue
            value = getattr(node, name)
        except RuntimeError as error:  # already freed
            raise_if_out_of_memory(error)
            continue
        values += value if isinstance(value, (tuple, list)) else [value]
    return values


@cache
def _saved_names(node_type: type) -> list[tuple[str, str]]:
    """Return the attributes of saved tensors of a node type, raw and as they are."""
    raw_names = [name for name in dir(node_type) if name.startswith("_raw_saved_")]
    names = [name.removeprefix("_raw") for name in raw_names]
    return [
        (raw, name if hasattr(node_type, name) else name.removeprefix("_"))
        for raw, name in zip(raw_names, names, strict=True)
    ]
