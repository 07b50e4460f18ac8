r"""The empirical risk: a model, a loss, parameters, data; the only loop over data.

.. math::

    L(\theta) = \frac{\sum_b S_b(\theta)}{\sum_b D_b}

with :math:`S_b` the *summed* loss of batch :math:`b` and :math:`D_b` what a ``mean``
reduction divides that batch's sum by (for ``sum``, the denominator is one). This is the
loss of the concatenated data, however it is split into batches.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from math import inf
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from curvlinops._adapter import AsModel
from curvlinops._columns import VJPS, Columns
from curvlinops._compiled import module_behind
from curvlinops._counts import as_count, optional_count
from curvlinops._data import (
    Share,
    Tables,
    ahead,
    checked_data,
    cloned,
    length_of,
    moved,
    part_of,
    shares,
    tensors_in,
)
from curvlinops._dense import Dense, Factors, Jacobians, may_be_dense
from curvlinops._determinism import check_modes, find_terms, look, passes_agree
from curvlinops._draws import (
    drawn,
    draws_outside_torch,
    may_draw,
    preserved_rng,
)
from curvlinops._failures import (
    holds_nested,
    meets_numpy,
    model_failure,
    nested_failure,
    require_numbers,
)
from curvlinops._forms import Body, Congruence, Form, Middle, Side
from curvlinops._grouping import Grouping
from curvlinops._hidden import HiddenUses, refuse_reentrant
from curvlinops._identity import Identity, checked_owner
from curvlinops._interrupts import isolated
from curvlinops._isolation import with_gradients, without_autocast
from curvlinops._joining import joined_batch, joining_pays
from curvlinops._ledger import Ledger
from curvlinops._linearization import GraphFreedError, Linearization
from curvlinops._locks import new_lock
from curvlinops._loss_state import unchanged
from curvlinops._memory import checked_cache, raise_if_out_of_memory
from curvlinops._model import Model, Parameters, named_parameters
from curvlinops._passes import one_pass
from curvlinops._plan import (
    GRADIENT,
    Data,
    Fit,
    Loop,
    Probe,
    check_parts,
    fitted,
    loops_over,
    number_of_parts,
    numel,
)
from curvlinops._policy import POLICY, Policy
from curvlinops._reach import CopyLeaksError, Reach
from curvlinops._reading import PLAIN, ClassesElsewhereError
from curvlinops._rows import LEAST_COLUMNS, DataRows, ProductOfRows, Wanted
from curvlinops._shuffling import shuffles, warn_about_shuffling, why_nothing_is_kept
from curvlinops._spaces import TensorSpace, numeric_array, to_numpy
from curvlinops._status import Status, status_of
from curvlinops._structure import own_names, require_same_parameters
from curvlinops._terms import Terms
from curvlinops._watch import Watch
from curvlinops.losses import Loss, LossFunction

T = TypeVar("T")
#: Attributes of a risk that are pickled and copied; all others are made from them.
_KEPT = (
    "model_func",
    "reading",
    "loss_func",
    "loss_options",
    "params",
    "data",
    "progressbar",
    "batch_size_fn",
    "terms_per_datum",
    "cache",
    "max_memory",
    "policy",
    "plain",
    "_checks_modes",
    "_own",
    "_repeats",
    "_shuffled",
)


class EmpiricalRisk:
    r"""Loss of a model on data as a function of its parameters.

    Operators build one from their first four arguments. Pass a risk in place of those
    four to let several operators share its checks and its recordings.

    Parameters
    ----------
    model_func : nn.Module or callable
        The model: a module, or a function ``(params_dict, X) -> prediction``. The
        prediction is one tensor, or the tensor ``.logits`` of an object; for anything
        else see :func:`~curvlinops.as_model`. A module must be in the mode
        (``train``/``eval``) that is meant. Of a module that ``torch.compile`` has
        wrapped the one behind it is evaluated, and compiled functions run as they were
        written, since compiled code has no second derivatives; parameters are known
        with and without ``_orig_mod.`` in their names.
    loss_func : nn.Module, callable, or None
        Loss ``(prediction, y) -> scalar`` with reduction ``"mean"`` or ``"sum"``. See
        :mod:`curvlinops.losses` for those that are known in closed form. Any other
        callable is differentiated automatically, and whether it is a sum or a mean over
        data is found by evaluating it, see the notes. It may depend on
        the parameters through the prediction only: a weight decay, or a second call of
        the model, in the loss is refused in the check. ``None`` if only the model is
        differentiated (Jacobians).
    params : dict of str to Tensor, list of nn.Parameter, or str
        What to differentiate by. Their order defines the layout of vectors: each
        tensor is flattened row by row, and all are concatenated. The values given
        here count, also where the module's own differ. A string is the name of one
        parameter of the module, or a pattern such as ``"encoder.*"`` for several.
    data : iterable of (X, y)
        Batches, the same in every pass: a list, a ``DataLoader``, any iterable that
        can be iterated repeatedly. Of a loader that shuffles, nothing can be kept from
        one product to the next: each evaluates the model anew, several times as slow;
        set ``shuffle=False`` or pass ``list(loader)``. ``X`` is a tensor, a mapping or
        tuple of tensors, or an object with tensors among its attributes (a dataclass, a
        batch of graphs),
        which needs ``batch_size_fn`` wherever the number of data points counts. All
        are moved to the parameters' device, objects with a method ``to`` by it. A
        batch that is a mapping has its targets under ``labels`` (or ``label``,
        ``targets``, ``target``, ``y``); modules get mappings by keyword if they want
        that, see :func:`~curvlinops.as_model`.
    progressbar : bool, optional
        Whether to show a progress bar over batches for every product; matrices that
        are computed once and kept (of KFAC and its kin, and the GGN's diagonal) show
        one for every pass over the data.
    check_deterministic : bool, optional
        Whether to evaluate loss and gradient twice (two passes over the data) and
        raise if they differ, and to refuse modules in a mode that makes the result
        random or dependent on the batches, now and in later products.
    num_data : int, optional
        Number of data points; compared with the data if ``check_deterministic``.
        Nothing else needs it.
    num_per_example_loss_terms : int, optional
        Terms per data point of a loss that is not known in closed form.
    batch_size_fn : callable, optional
        Maps ``X`` to the number of data points in it. By default the length of ``X``
        or of the first tensor in it that is not inside of an object.
    num_terms_fn : callable, optional
        Maps ``(prediction, y)`` to the number of terms that a loss not known in closed
        form averages over. Default: data points times ``num_per_example_loss_terms``.
    reduction : "mean" or "sum", optional
        What a loss not known in closed form is, where that cannot be found. It changes
        nothing about the loss. Default: its attribute ``reduction``, if it has one.
    sampler : callable, optional
        Sampler of would-be gradients for Monte-Carlo matrices of a loss not known in
        closed form, see :func:`curvlinops.losses.as_loss_function`.
    cache : "auto", "off", or int, optional
        Bytes that recorded autograd graphs may take up between products. ``"auto"``
        is 40 % of the device's free memory at the time of the first product. Batches
        are recorded in order as long as they fit; the others are recomputed in each
        product. A graph takes about what one gradient evaluation of that batch takes,
        and 1.8 times that for the Hessian. Sensitivities, which halve the work of a
        GGN's or Fisher matrix's products, take the layers' outputs times the number of
        a datum's outputs (or samples), and are left out where they do not fit.
    max_memory : int, optional
        Bytes that a product may allocate beyond model, parameters, and data: kept
        recordings, vectors and results, and what it creates and drops. Batches that
        take more are multiplied in as few parts as will do, less is kept, and fewer
        columns are multiplied at once. No matrix depends on it.
    policy : Policy, optional
        Numbers of products after which they are recorded or materialised, see
        :class:`~curvlinops._policy.Policy`. No matrix depends on them.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, the data is empty or can be read only
        once, the loss or its gradient is not finite, two passes differ, or parameters
        are used where the output's graph does not show them (in a reentrant activation
        checkpoint, or another autograd function that is not given them); the message
        names the cause and the cure.
    RuntimeError
        In a product, if model or loss have no second derivative.

    Warns
    -----
    UserWarning
        Once for a model, if parameters are not used; once for data, at the first
        product, if they are shuffled.
    RuntimeWarning
        At the first product with a batch, if that is not finite: with the parameters,
        and whether first or second derivatives are to blame.
    MemoryError
        In a product (or in the check), if it does not fit into ``max_memory``, before
        it starts; the message says how many bytes would do.

    Notes
    -----
    Recordings are redone when parameters, buffers, hooks, listed data, or a module's
    mode change. A checksum of all tensors and arrays of numbers is compared in every
    product, so that writes through ``.data`` or NumPy are seen, too, down to the last
    bit of an entry and to entries that change places. Listed data are looked into:
    mappings, sequences, and objects with attributes; an object whose content cannot be
    looked at raises. Not seen are Python attributes of the model or loss, what a plain
    callable closes over, caches of your own (``functools.lru_cache``), and the data
    behind a loader: call :meth:`refresh` after changing these. A loader's batches are
    kept on the device, within the budget, if the check has found that they repeat.

    Of ``params`` the tensors count that were given. Where these were the module's own,
    and the module gets others in their place (by ``load_state_dict(..., assign=True)``,
    ``prune.remove``, a parametrization, tying), the next product raises: build a new
    operator. Of a module whose parameters are given as copies, only names and shapes
    must stay.

    A loss that is not known in closed form, and comes without ``num_terms_fn``, is
    evaluated on the model's outputs in the check: those of each batch, the batch twice,
    its halves, and it together with the first batch. That takes about ten gradients of
    the loss per batch, and no evaluation of the model. If all of it says that the loss
    is a sum, or that it is a mean over data, this counts, whatever its attribute says.
    If a batch twice gives the same, but the others do not weigh by data (class weights,
    ignored or padded targets, lengths that differ), that is an error, with several
    batches or for a matrix that needs the number of terms (the empirical Fisher, and
    sampled ones). If the loss couples data, outputs are 0-d, or targets cannot be cut,
    ``reduction`` decides, else each batch is weighted by its number of data, with a
    warning. With ``check_deterministic=False``, the first two batches are looked at
    before the first product, and again after loss or data have changed.

    What is recorded or kept is used only where it agrees, for random vectors and those
    of the user, with products that are computed plainly, up to
    :math:`\varepsilon^{3/4}` (:math:`\varepsilon` is the rounding error of the dtype;
    6e-6 in single, 2e-12 in double precision), several columns at once up to
    :math:`\varepsilon^{1/2}`. That rules out work which is not torch's or couples data.
    What would take data apart or put batches together is compared entry by entry, each
    parameter in its own scale: units of outputs, features and parameters may differ.
    The products themselves agree up to rounding.

    What fits into ``max_memory`` is predicted from products with two and three data
    of the first batch, made before the first product of each kind and number of
    columns, again after a change of parameters. Trying them takes as long as dozens of
    products of that size, and stops with the largest tensor so far below the bound;
    only what a single datum takes, and whether two contribute apart, is found out in
    any case. A first product may be above a bound for one or two data by a few tensors
    of three data.

    Batches are cut only if data contribute apart and the loss is known in closed form
    or has ``num_terms_fn``. Before the first product that cuts them, and after every
    change, all parts' outputs are compared with those of whole batches, which costs two
    evaluations of the model without gradients (twice as many where some parameter is
    zero, which might hide a difference); and :math:`J^\top u` of every batch's first
    part with that of its halves. So evaluating a whole batch without gradients has to
    fit. A tensor is cut if it is as long as the batch in all batches. Counted are all
    tensors, in the check, too. Not counted are what operations of torch use inside,
    NumPy vectors of another dtype than the operator's, which are converted, the matrix
    that ``to_dense()`` returns, and estimating Kronecker factors, which takes whole
    batches. Products in several threads take their bytes each. No sensitivities are
    kept, and no factors of small matrices.

    Several small batches, with a few MiB of graphs in all, are multiplied with the
    Hessian as one where that gives the same, from the second product on; unless
    ``cache``, ``max_memory`` or ``progressbar`` is given. Hundreds of tiny batches are
    put together from the beginning, if data contribute apart, the loss is known in
    closed form, and the module has no hooks. Every batch's outputs are compared with
    those of the few hundred that it is put together with, and their :math:`J^\top u`
    with that of halves. This costs one evaluation of the model without gradients (two
    where some parameter is zero), and six backward passes for a few hundred batches.

    Where data contribute apart and columns are many (``A.to_dense()``, wide blocks),
    the rows :math:`J_n` of every datum :math:`n` are computed by ``torch.func.vmap``,
    and the GGN, Fisher matrices and the Jacobian are made of these: as many backward
    passes as a datum has outputs (or samples), and one product of large matrices, in
    chunks of 64 MiB. That is so where it costs less, by counted operations, and where a
    random combination of the rows agrees with a backward pass of every batch; not with
    ``max_memory``, in half precision, or for models with hooks. A matrix that was asked
    for as a whole is kept within the budget until parameters or data change.

    Matrices that are built from one risk share its recordings. The Hessian minus the
    GGN, say, is a plain difference for which the model is evaluated once per batch.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import EmpiricalRisk, GGNLinearOperator, HessianLinearOperator
    >>> net, loss = torch.nn.Linear(3, 2).double(), torch.nn.CrossEntropyLoss()
    >>> data = [(torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0]))]
    >>> risk = EmpiricalRisk(net, loss, dict(net.named_parameters()), data)
    >>> remainder = HessianLinearOperator(risk) - GGNLinearOperator(risk)
    >>> bool(remainder.to_dense().abs().max() < 1e-12)  # the model is linear
    True
    """

    @isolated()
    def __init__(
        self,
        model_func: Callable[..., Any],
        loss_func: Callable[..., Any] | None,
        params: Parameters,
        data: Iterable[Any],
        *,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        num_per_example_loss_terms: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        num_terms_fn: Callable[[Tensor, Any], int] | None = None,
        sampler: Callable[..., Any] | None = None,
        reduction: str | None = None,
        cache: str | int = "auto",
        max_memory: int | None = None,
        policy: Policy = POLICY,
    ) -> None:
        _require_callable(model_func)
        #: How batches and the model's results are read.
        self.reading = PLAIN
        given: Any = model_func
        if isinstance(given, AsModel):
            given, self.reading = given.module, given.reading
        self.model_func = model_func = module_behind(given)
        self.loss_func = module_behind(loss_func)
        self.loss_options: dict[str, Any] = {
            "num_terms_fn": num_terms_fn,
            "sampler": sampler,
            "reduction": reduction,
        }
        self.terms = Terms(self.loss_func, self.loss_options, data)
        self.params = named_parameters(model_func, params)
        self.data = checked_data(data, lambda *b: require_numbers(self._pair(*b), b[1]))
        self.progressbar = progressbar
        self.batch_size_fn = batch_size_fn
        terms = optional_count("num_per_example_loss_terms", num_per_example_loss_terms)
        self.terms_per_datum = terms or 1
        self.cache = checked_cache(cache)
        self.max_memory = _checked_bytes(max_memory)
        self.policy = policy
        #: How many times products were asked to be plain; see `fix_route`.
        self.plain = 0
        #: Whether the data is known to give the same batches in every pass, ...
        self._repeats = isinstance(self.data, (list, tuple))
        #: ... or known not to.
        self._shuffled = False
        #: Whether modules must not be random, which the check looks for, and every
        #: product after a change.
        self._checks_modes = check_deterministic
        self._start()
        num_data = optional_count("num_data", num_data)
        if check_deterministic:
            with self.terms.supposed():
                self._fit(GRADIENT)
                same_batches = passes_agree(self, num_data)
            self._repeats = self._repeats or same_batches
            self._shuffled = not same_batches

    # -- state ------------------------------------------------------------------

    def _start(self) -> None:
        """Create everything that is rebuilt rather than pickled."""
        self._lock = new_lock(self._forked)
        self.model = Model(self.model_func, self.params, self.reading)
        with self.model.exclusive():
            if "_own" not in vars(self):
                #: Names of the parameters that are the module's own.
                self._own = own_names(self.model_func, self.params)
            require_same_parameters(self.model_func, self.params, self._own)
        self.space = self.model.space
        self._watch = Watch(self.model_func, self.loss_func, self.params, self.data)
        self._seen = self._watch.state()  # what the model's private copy is made of
        self._known_input = False
        #: Whether evaluating the loss is known to draw some.
        self._loss_draws: dict[Any, bool] = {}
        #: Index of a batch that holds nested tensors.
        self._nested: int | None = None
        self._reach = Reach(self.model_func, self.params)
        self._columns = Columns(self.space, self.policy)
        #: Which part of a larger batch the only batch stands for.
        self._share: Share | None = None
        #: Whether sensitivities may be kept, which the plan of a bound leaves out.
        self._may_fold = self.max_memory is None
        #: Whether a plan tries out products: nothing changes between them, no matrix
        #: is materialised, and Jacobians are kept as soon as the plan says so.
        self._rehearses = False
        self._forget()

    @isolated()
    def refresh(self) -> None:
        """Drop all recordings; the next product evaluates model and data anew.

        Needed only after changes that cannot be seen: Python attributes of the model
        or the loss, what a callable closes over, and the data behind a loader.
        """
        with self.model.exclusive(), self._lock:
            self.terms.restore(None)
            before = self.model
            self.model = Model(self.model_func, self.params, self.reading)
            self.model.by_datum &= before.by_datum
            self.model.may_free &= before.may_free
            if before._held is not None:
                self.model.evaluate_in_place()
            self._forget()

    def _forked(self) -> None:
        """See to it that all is made anew: a thread that is gone may have half done so.

        In a process that was forked meanwhile.
        """
        self._seen = ()

    def _forget(self) -> None:
        with self._lock:
            self.terms.read()
            self._unwritten: set[tuple[int, Share | None]] = set()
            # Batches in which nothing was found that the graph does not show.
            self._examined: set[tuple[int, Share | None]] = set()
            self._recordings: dict[int, Linearization] = {}
            bounded, policy = self.max_memory is not None, self.policy
            self._ledger = Ledger(bounded, policy.cache_fraction)
            self._dense = Dense(self.space, self._columns, self._ledger)
            # By key, the one batch that stands for all, if it may.
            self._joined: dict[Hashable, Linearization | None] = {}
            # What keeps products within `max_memory`: for each, and in force.
            self._fits: dict[Hashable, Fit] = {}
            self._entries: float | None = None
            self._tables = Tables()
            self._grouping = Grouping()
            self._rows = DataRows(self.space, self._ledger)
            self._columns.most = None
            self._num_batches: int | None = None
            self._output_shapes: tuple[torch.Size, ...] | None = None
            self._results: dict[Any, Any] = {}
            self._admitted: dict[tuple[Any, ...], Identity] = {}

    def admitted(self, marks: tuple[Any, ...], held: list[Any]) -> Identity | None:
        """Return the name of a matrix that is recorded, if there are not too many.

        A body that counts its products, say, has another name in each. Equal names are
        one object, which is fast to look up.
        """
        known = self._admitted.get(marks)
        if known is None and len(self._admitted) < self.policy.matrices:
            known = self._admitted[marks] = Identity(marks, held)
        return known

    @property
    def loss_function(self) -> LossFunction | None:
        """The loss, as the package knows it; ``None`` if there is none."""
        return self.terms.loss

    @isolated()
    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """Return ``compute()``, kept under ``key`` until recordings are redone.

        The key is a tuple that begins with the class or function it belongs to.
        """
        checked_owner(key)
        self._refresh_if_changed()
        results = self._results
        if key not in results:
            results.setdefault(key, compute())  # of several threads' the first counts
        return results[key]

    def _refresh_if_changed(self) -> None:
        """Redo recordings if what they depend on has changed."""
        if self._rehearses:
            return
        with self.model.exclusive(), self._lock:
            seen = self._watch.state()
            if seen != self._seen:
                self._check_space()
                if seen[:2] != self._seen[:2]:  # there are other objects
                    require_same_parameters(self.model_func, self.params, self._own)
                    if self._checks_modes:
                        check_modes(self.model_func)
                    self._known_input = False
                known = self.terms.known
                self.refresh()
                self.terms.restore(known)
                self._seen = seen
            if self.terms.unknown:
                find_terms(self)

    @isolated()
    def require_terms(self, what: str) -> None:
        """Raise, or warn, if it is not known what one batch's loss averages over."""
        self._refresh_if_changed()
        self.terms.require(what)

    def _check_space(self) -> None:
        first = next(iter(self.params.values()))
        now = TensorSpace(
            (p.shape for p in self.params.values()), first.dtype, first.device
        )
        if now != self.space:
            raise ValueError(
                f"The parameters were {self.space} at construction and are {now} now. "
                "Build a new operator after converting or moving the model."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without recordings, private copies, and locks."""
        state = {name: getattr(self, name) for name in _KEPT}
        return {**state, "reduction": self.terms.known}

    @isolated()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and rebuild what was left out."""
        reduction = state["reduction"]
        self.__dict__.update({n: value for n, value in state.items() if n in _KEPT})
        self.terms = Terms(self.loss_func, self.loss_options, self.data, reduction)
        self._start()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle, naming the part of the user's that cannot be."""
        for name in _KEPT:
            try:
                pickle.Pickler(BytesIO(), protocol).dump(getattr(self, name))
            except Exception as error:
                raise_if_out_of_memory(error)
                raise pickle.PicklingError(
                    f"This operator cannot be pickled because its {name} cannot: "
                    f"{error}. Use functions defined at the top level of a module "
                    "instead of lambdas and local functions."
                ) from error
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> Self:
        """Share what is the user's, but no recordings."""
        return self.twin()

    def __deepcopy__(self, memo: dict[int, Any]) -> EmpiricalRisk:
        """Copy model, parameters and data along; recordings are redone."""
        require_same_parameters(self.model_func, self.params, self._own)
        new = object.__new__(type(self))
        memo[id(self)] = new
        state = copy.deepcopy(self.__getstate__(), memo)
        del state["_own"]  # a module may copy its parameters as it likes
        new.__setstate__(state)
        if self._reach.names is None:
            new._reach.say_no_more()
        return new

    def twin(self, **changes: Any) -> Self:
        """Return a risk that shares the user's objects, but no recordings.

        Parameters
        ----------
        **changes
            New values of attributes, e.g. ``data`` or ``cache``.
        """
        new = object.__new__(type(self))
        new.__setstate__({**self.__getstate__(), **changes})
        new._reach.say_no_more()  # unused parameters are this risk's to warn about
        return new

    # -- the loop over data -----------------------------------------------------

    @isolated()
    def apply(
        self,
        forms: Form | Sequence[Form],
        V: Tensor,
        title: str = "_matmat",
        rows: int | None = None,
    ) -> Tensor:
        r"""Multiply by forms, one after the other.

        Parameters
        ----------
        forms : Form or sequence of Form
            What is multiplied, the first form first.
        V : Tensor
            Of shape ``(M, K)``, with as many rows as there are parameters, or entries
            of all outputs, on the risk's device.
        title : str, optional
            Description of the progress bar.
        rows : int, optional
            Number of entries of all outputs, if it is known and must not change.

        Returns
        -------
        Tensor
            Of shape ``(N, K)``.

        Notes
        -----
        Products are recorded and replayed, and small matrices materialised, once that
        pays. What fits into ``max_memory`` is chosen for all forms together.
        """
        forms = [forms] if isinstance(forms, Form) else forms
        loops = loops_over(self, forms, title)
        self._fit(*loops, K=V.shape[1])
        for loop in loops:
            V = self.run(loop, V, rows)
        return V

    def run(self, loop: Loop, V: Tensor, rows: int | None = None) -> Tensor:
        """Multiply by one form that has been fitted into what memory there may be.

        Parameters
        ----------
        loop : Loop
            The form with its name.
        V, rows
            As for :meth:`apply`.
        """
        form, title, key = loop
        if form.middle and form.mean and V.shape[1] >= LEAST_COLUMNS:
            product = self.by_rows(form.middle, ProductOfRows(V), title, key)
            if product is not None:
                return product
        if form.is_square:
            return self._product(loop, V)
        if form.cols is Side.OUTPUTS:
            known = len(V)
        elif rows is None:
            known = sum(map(torch.Size.numel, self.output_shapes))
        else:
            known = rows
        return self.session(lambda: self._crossed(loop, V, known), key)

    def _multiply(self, loop: Loop, V: Tensor) -> Tensor:
        """Multiply by what is kept of the batches (within :meth:`session`)."""
        form, title, key = loop
        if form.may_join and self._may_join(key):
            self._join(loop)
        jacobians = None if form.middle is None else self._small_jacobians(key)
        if form.middle is None or jacobians is None:
            return self._sum(loop, V)
        total: Any = 0
        count: Any = 0
        with with_gradients():
            rows = V.T if V.shape[1] > 1 else V[:, 0]
            for batch, J in self._shown(jacobians, title, len(jacobians)):
                f = batch.output_space
                U = (rows @ J.T).reshape((*rows.shape[:-1], *f.shapes[0]))
                U = form.middle(batch, U.to(f.dtype)).to(J.dtype)
                total = total + U.reshape(*rows.shape[:-1], -1) @ J
                count = count + batch.count
            return (total / self._divisor(form, count)).reshape(-1, len(V)).T

    @isolated()
    def by_rows(
        self, middle: Middle | None, wanted: Wanted, title: str, key: Hashable
    ) -> Tensor | None:
        r"""Return what is made of the rows of single data, if these pay and are right.

        Parameters
        ----------
        middle : Middle or None
            The matrix :math:`M_b` between them, in which case the result is divided by
            :math:`\sum_b D_b`; ``None`` for the Jacobian's rows.
        wanted : Wanted
            What is made of them.
        title : str
            Description of the progress bar.
        key : hashable
            Name of the matrix, under which it is kept if it is wanted as a whole.

        Returns
        -------
        Tensor or None
            The result.
        """

        def run() -> Tensor | None:
            if self.plain or self._rehearses or self.max_memory is not None:
                return None
            rows, count = self._rows, list[Any]()

            def counted() -> Iterator[Linearization]:
                for batch in self.batches(title):
                    count.append(0 if middle is None else batch.count)
                    yield batch
                    del batch

            def divide(total: Tensor) -> Tensor:
                D = 1 if middle is None else self._denominator(sum(count))
                return total.div_(D)

            width_of = partial(self._columns.at_once, key)
            options = self.model, self._size_or_none, width_of
            return rows.make(wanted, key, middle, counted(), divide, *options)

        return self.session(run)

    def _left_factor(self, form: Form, jacobians: Jacobians) -> Tensor:
        r"""Return :math:`M J / D` of all batches, their rows stacked."""
        middle, sizes = form.middle, [len(J) for _, J in jacobians]
        assert middle is not None
        D = self._divisor(form, sum(batch.count for batch, _ in jacobians))
        with torch.enable_grad():
            result = jacobians[0][1].new_empty(sum(sizes), self.space.dim)
            for (batch, J), part in zip(jacobians, result.split(sizes), strict=True):
                U = J.T.reshape(-1, *batch.output_space.shapes[0])
                U = middle(batch, U).detach().reshape(J.shape[1], -1)
                torch.div(U.T, D, out=part)
            return result

    def _divisor(self, form: Form, count: Any) -> Any:
        """Return what a form's sum over batches is divided by."""
        return self._denominator(count) if form.mean else 1

    def _sum(self, loop: Loop, V: Tensor, one: Linearization | None = None) -> Tensor:
        """Return a sum, or mean, over batches of products (within :meth:`session`).

        Over ``one`` batch that holds all data, if there is one.
        """
        form, title, key = loop
        one = one or self._joined_batch(key)
        batches = self.batches(title) if one is None else [one]
        count: Any = 0
        if V.shape[1] == 1:
            vectors = self.space.split(V.T[0].contiguous())
            sum_ = cache(lambda: V.new_empty(len(V)))
            rows = cache(lambda: self.space.split(sum_()))
            first = True
            for batch in batches:
                count = count + batch.count if form.mean else count
                self._add_product(form.body, batch, vectors, rows, key, first)
                first = False
                del batch
            return sum_().div_(self._divisor(form, count)).unsqueeze(1)
        total = cache(lambda: V.new_zeros(V.shape[1], V.shape[0]))
        for batch in batches:
            count = count + batch.count if form.mean else count
            self._add_products(form.body, batch, V, total, key=key)
            del batch
        return total().div_(self._divisor(form, count)).T

    def _may_join(self, key: Hashable) -> bool:
        """Whether all data may be put into one batch, and that pays."""
        if key in self._joined or not self._may_be_dense(key):
            return False
        if not self._may_put_together():
            return False
        with self._lock:
            batches = list(self._recordings.values())
            ledger, nbytes = self._ledger, self._ledger.used()
            complete = self._num_batches == len(batches)
        return complete and joining_pays(batches, nbytes, ledger, self.policy)

    def _may_put_together(self) -> bool:
        """Whether nothing the user has asked for speaks against one batch for all."""
        if self.progressbar or self.cache != "auto" or self.max_memory is not None:
            return False
        return self.model.keeps_to_itself()  # hooks see the user's batches only

    def _join(self, loop: Loop) -> None:
        """Put all data into one batch if that gives the same product."""
        key, untitled = loop.key, loop._replace(title="")
        known, recordings = self._joined, dict(self._recordings)

        def multiply(V: Tensor, one: Linearization | None) -> Tensor:
            return self._sum(untitled, V, one)

        batches = [batch for _, batch in sorted(recordings.items())]
        known[key] = one = joined_batch(self, batches, multiply)
        if one is not None:
            self._ledger.enter_other(("joined", key), 3 * one.nbytes)

    def _joined_batch(self, key: Hashable) -> Linearization | None:
        """Return the one batch that is multiplied instead of all others."""
        return None if self.plain else self._joined.get(key)

    def _multiplied(self, key: Hashable) -> list[Linearization]:
        """Return the batches that products are made of."""
        one = self._joined_batch(key)
        return list(self._recordings.values()) if one is None else [one]

    def _product(self, loop: Loop, V: Tensor) -> Tensor:
        """Multiply by a square form, by its matrix once that is known."""
        self._refresh_if_changed()
        device = self.space.device.type
        with self._alone(), without_autocast(device), with_gradients():
            if (factors := self._materialised(loop, V)) is None:
                return self._session(lambda: self._multiply(loop, V), loop.key)
            if self.progressbar:  # which is full at once
                all(self._shown([True] * len(self._recordings), loop.title))
            if V.shape[1] == 1:
                for factor in factors:
                    V = factor @ V
                return V
            rows = V.T.contiguous()  # faster to multiply than columns
            for factor in factors:
                rows = rows @ factor.T
            return rows.T

    def _materialised(self, loop: Loop, V: Tensor) -> Factors | None:
        """Return the matrix, or its factors, if known, or paying from now on."""
        form, _, key = loop
        if self._rehearses or not self._may_be_dense(key):
            return None

        with self._lock:
            if (factors := self._dense.settled(key)) is not None:
                return factors

            def run(V: Tensor) -> Tensor:
                untitled = loop._replace(title="")
                return self._session(lambda: self._multiply(untitled, V), key)

            def left_factor(jacobians: Jacobians) -> Tensor:
                return self._session(lambda: self._left_factor(form, jacobians), key)

            factored = form.middle is not None and self.max_memory is None
            complete = self._num_batches == len(self._recordings)
            batches = self._multiplied(key)
            return self._dense.matrix(
                key, V, batches, complete, run, left_factor if factored else None
            )

    def _may_be_dense(self, key: Hashable) -> bool:
        """Whether a product's matrix, or Jacobians, may be kept if that pays."""
        usual = key is not None and not self.plain and self._repeats
        return usual and may_be_dense(self.space, self.policy)

    def _small_jacobians(self, key: Hashable) -> Jacobians | None:
        """Return the batches with their Jacobians as matrices if that pays.

        From the second product on.
        """
        if not self._may_be_dense(key):
            return None
        with self._lock:
            # Those of the state that is known to be fresh: later, `_forget` may have
            # replaced both, and nobody looks at these any more.
            dense, batches = self._dense, list(self._recordings.values())
            kept = dense.jacobians
            complete = self._num_batches == len(batches)
        if kept:
            return kept
        if not complete or not dense.spent.get(key):
            return None
        return dense.keep_jacobians(self, kept, batches, self._rehearses)

    def _crossed(self, loop: Loop, V: Tensor, rows: int) -> Tensor:
        """Multiply to or from the space of outputs (within :meth:`session`).

        That has so many ``rows``.
        """
        (form, title, key), count = loop, 0
        pulls = form.cols is Side.OUTPUTS
        length = self.space.dim if pulls else rows
        total = cache(lambda: V.new_zeros(V.shape[1], length))

        def part_of_total(place: slice) -> Tensor:
            return total() if pulls else total()[:, place]

        for batch, place, outputs in self._with_places(title, rows):
            count = count + batch.count if form.mean else count
            part = V[place].to(outputs.dtype) if pulls else V
            spaces = (outputs, self.space) if pulls else (self.space, outputs)
            add_to = cache(partial(part_of_total, place))
            self._add_products(form.body, batch, part, add_to, spaces, key)
            del batch
        return total().div_(self._divisor(form, count)).T

    def vjps(self, batch: Linearization, U: Tensor) -> Iterator[list[Tensor]]:
        r"""Yield :math:`J_b^\top u` for vectors ``[K, *output.shape]``, in chunks.

        Yields
        ------
        list of Tensor
            The next ``k`` products, in the shapes ``[k, *shape]`` of the parameters.
        """

        def body(b: Linearization, u: list[Tensor]) -> list[Tensor]:
            return b.vjp(u[0])

        columns, start = U.reshape(len(U), -1).T, 0
        while start < len(U):
            f = batch.output_space
            width = self._columns.width(VJPS, body, batch, columns, f, self.plain > 0)
            part = U[start : start + width]
            try:
                chunk = batch.vjp(part) if len(part) > 1 else batch.vjp(part[0])
            except RuntimeError as error:
                raise_if_out_of_memory(error)
                if len(part) == 1:
                    raise
                self._columns.refuse(VJPS)
                continue
            yield chunk if len(part) > 1 else [g.unsqueeze(0) for g in chunk]
            start += len(part)

    def _with_places(
        self, title: str, rows: int
    ) -> Iterator[tuple[Linearization, slice, TensorSpace]]:
        """Yield batches with the place and the space of their outputs."""
        stop = 0
        for batch in self.batches(title):
            start, stop = stop, stop + batch.output_space.dim
            if stop > rows:
                break
            yield batch, slice(start, stop), batch.output_space
            del batch
        if stop != rows:
            raise ValueError(
                f"The model's outputs had {rows} entries when the operator was built, "
                "and have another number now. Build a new operator after changing the "
                "data."
            )

    @property
    @isolated()
    def output_shapes(self) -> tuple[torch.Size, ...]:
        """Shape of the model's output for every batch.

        Known from the check for determinism, else from one forward pass.
        """
        if self._output_shapes is None:
            self._fit(GRADIENT)
            self.session(lambda: [None for _ in self.batches("output_shapes")])
        assert self._output_shapes is not None
        return self._output_shapes

    @isolated()
    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """Return gradient (in parameter shapes) and loss of the whole data."""
        self._fit(GRADIENT)
        seen = self.session(lambda: look(self, self.batches("gradient_and_loss")))
        return [g.clone() for g in self.space.split(seen.gradient)], seen.loss

    @isolated()
    def loss(self) -> Tensor:
        r"""Compute the loss of the whole data, :math:`L(\theta)`.

        Returns
        -------
        Tensor
            Of shape ``()``, as it is: infinite where it overflows.

        Raises
        ------
        ValueError
            If there is no loss function.

        Notes
        -----
        Costs one pass over the data, and a forward pass of the batches that are not
        recorded.
        """
        self._require_loss("loss")
        self._fit(GRADIENT)

        def run() -> Tensor:
            value = torch.zeros((), dtype=self.space.dtype, device=self.space.device)
            count: Any = 0
            for batch in self.batches("loss"):
                value += batch.loss.value().detach()
                count = count + batch.count
                del batch
            return value / self._denominator(count)

        return self.session(run)

    @isolated()
    def gradient_vector(self, *, numpy: bool = False) -> Any:
        r"""Compute the gradient of the loss as one vector, :math:`\nabla L(\theta)`.

        Parameters
        ----------
        numpy : bool, optional
            Whether to return an array, as SciPy takes it, in place of a tensor.

        Returns
        -------
        Tensor or numpy.ndarray
            Of shape ``(P,)``, in the layout of the operators' vectors.

        Raises
        ------
        ValueError
            If there is no loss function.
        """
        self._require_loss("gradient")
        self._fit(GRADIENT)
        seen = self.session(lambda: look(self, self.batches("gradient_vector")))
        return to_numpy(seen.gradient) if numpy else seen.gradient

    def parameters_vector(self, *, numpy: bool = False) -> Any:
        r"""Return a copy of the parameters as one vector, :math:`\theta`.

        Parameters
        ----------
        numpy : bool, optional
            Whether to return an array, as SciPy takes it, in place of a tensor.

        Returns
        -------
        Tensor or numpy.ndarray
            Of shape ``(P,)``, in the layout of the operators' vectors.
        """
        vector = self.space.pack([*self.params.values()])
        return to_numpy(vector) if numpy else vector

    @isolated()
    def set_parameters(self, x: Any) -> None:
        r"""Write a vector into the parameters, in place.

        Into the tensors that were given as ``params``: the module's own, or the copies
        that were passed. Operators of this risk are those of the new values from now
        on.

        Parameters
        ----------
        x : numpy.ndarray or Tensor
            The parameters :math:`\theta`, of shape ``(P,)``, in the layout of the
            operators' vectors. Real numbers of any type, on any device.

        Raises
        ------
        ValueError
            If the shape is another one.
        TypeError
            If it holds anything else than real numbers.

        Examples
        --------
        >>> import torch
        >>> from scipy.optimize import minimize
        >>> from curvlinops import EmpiricalRisk, HessianLinearOperator
        >>> net = torch.nn.Linear(2, 1, dtype=torch.float64)
        >>> data = [(torch.eye(2).double(), torch.ones(2, 1).double())]
        >>> risk = EmpiricalRisk(net, torch.nn.MSELoss(), "weight", data)
        >>> H = HessianLinearOperator(risk)
        >>> def loss(x):
        ...     risk.set_parameters(x)
        ...     return float(risk.loss())
        >>> def gradient(x):
        ...     risk.set_parameters(x)
        ...     return risk.gradient_vector(numpy=True)
        >>> def product(x, v):
        ...     risk.set_parameters(x)
        ...     return H @ v
        >>> x0 = risk.parameters_vector(numpy=True)
        >>> found = minimize(loss, x0, jac=gradient, hessp=product, method="trust-ncg")
        >>> bool(found.fun < 1e-12)
        True
        """
        if isinstance(x, (list, tuple)) and any(
            torch.is_tensor(t) and t.ndim for t in x
        ):
            raise TypeError(
                "The parameters are one vector, got a list with tensors. Pass "
                "`torch.cat([t.flatten() for t in tensors])`."
            )
        given = x if torch.is_tensor(x) else torch.from_numpy(numeric_array(x).copy())
        if given.is_complex():
            raise TypeError(
                f"Parameters are real numbers, got {given.dtype}. Pass `x.real`."
            )
        if given.shape != (self.space.dim,):
            raise ValueError(
                f"The parameters are a vector of shape ({self.space.dim},), got one of "
                f"shape {tuple(given.shape)}."
            )
        flat = given.detach().to(self.space.device, self.space.dtype)
        with torch.no_grad(), self.model.exclusive(), self._lock:
            parts = self.space.split(flat)
            for value, part in zip(self.params.values(), parts, strict=True):
                value.copy_(part)

    def _require_loss(self, what: str) -> None:
        if self.loss_function is None:
            raise ValueError(
                f"There is no {what}: this risk was built without a loss function. "
                "Pass one to `EmpiricalRisk(...)`."
            )

    @isolated()
    def session(self, run: Callable[[], T], key: Hashable = None) -> T:
        """Return ``run()``, with the model ready for :meth:`batches`.

        Unless the product named ``key`` needs nothing but its recordings.
        """
        self._refresh_if_changed()
        with self._alone():
            return self._session(run, key)

    def _alone(self) -> AbstractContextManager[Any]:
        """Lock a module that is, or might turn out to be, evaluated in place.

        To be entered before this risk's own lock is taken.
        """
        if self._known_input and self.model._held is None:
            return nullcontext()
        return self.model.exclusive()

    def _session(self, run: Callable[[], T], key: Hashable = None) -> T:
        if self._replays(key):
            return run()  # needs neither the model nor the data
        if key is not None and self._loses_by_shuffling():
            warn_about_shuffling(self.data)
        loss = self.loss_function
        known = loss is None or not loss.loss.opaque  # and not called
        loss_func = None if known else self.loss_func
        draws = nullcontext() if known else draws_outside_torch(self._loss_draws)
        wide = may_draw(self.data)
        with preserved_rng(self.space.device, wide), draws, unchanged(loss_func):
            while True:  # each cause is found once, and removed
                model, may_free = self.model, self.model.may_free
                try:
                    return model.run(run)
                except CopyLeaksError:
                    model.evaluate_in_place()
                except ClassesElsewhereError as error:
                    self._read_anew(model, error.axis)
                except GraphFreedError as error:
                    if not may_free:  # it is none of ours
                        raise RuntimeError(str(error)) from error
                    self._replace_copy(model)
                except Exception as error:  # whatever torch raises for nested tensors
                    raise_if_out_of_memory(error)
                    ours = isinstance(error, (TypeError, ValueError))
                    if self._nested is None or (ours and error.__cause__ is None):
                        raise
                    raise nested_failure(self._nested) from error

    def _replace_copy(self, model: Model) -> None:
        """Give up a private copy that keeps parts of graphs, which have been freed.

        With it go its recordings, but no bounds.
        """
        with model.exclusive(), self._lock:
            model.may_free = False
            if self.model is not model:  # another thread was faster
                return
            self.model = Model(self.model_func, self.params, self.reading)
            self.model.may_free = False
            self.model.by_datum &= model.by_datum
            self._drop_recordings()
            for key in self._joined:
                self._ledger.strike_other(("joined", key))
            self._joined = {}

    def _drop_recordings(self) -> None:
        """Drop the batches' recordings, and what is made from these."""
        self._recordings, self._num_batches = {}, None
        self._ledger.strike_recordings()
        self._dense.drop_jacobians()

    def _replays(self, key: Hashable) -> bool:
        """Whether all batches' products need nothing but a recording."""
        recordings = self._recordings
        batches = [batch for batch, _ in self._dense.jacobians]
        known = self.loss_function is not None and not self.loss_function.loss.opaque
        known &= bool(batches)  # Jacobians and losses are all that is needed
        return (
            key is not None
            and not self.plain
            and self._num_batches == len(recordings)
            and not torch.is_autocast_enabled(self.space.device.type)
            and (
                (known and all("loss" in vars(b) for b in batches))
                or all(b.replays(key) for b in self._multiplied(key))
            )
        )

    def batches(self, title: str) -> Iterator[Linearization]:
        """Yield every batch's linearization in order (within :meth:`session`)."""
        self._group()
        recordings, groups = self._recordings, self._grouping.groups
        kept = dict(recordings)  # another thread may drop some
        complete = len(kept) == self._num_batches
        known = [(batch.index, None, batch.share) for _, batch in sorted(kept.items())]
        items: Iterable[Any] = known
        if not complete:
            items = ahead(self._parts(), self.space.device, kept.keys())
        if self.progressbar:
            total = self._num_batches or length_of(self.data)
            items = self._shown(items, title, total)
        place, first_row = -1, 0
        shapes: list[torch.Size] = []
        for place, (index, item, share) in enumerate(items):
            batch = kept.pop(place, None) or self._linearize(index, item, place, share)
            shape = batch.output_space.shapes[0]
            batch.first_row, first_row = first_row, first_row + (shape or [1])[0]
            if share is None or share.start == 0:
                shapes.append(shape)
            else:  # goes on where the part before it ended
                shapes[-1] = torch.Size([shapes[-1][0] + shape[0], *shape[1:]])
            yield batch
            self._record(recordings, batch)
            del batch  # and its graphs, before the next one is evaluated
        if place < 0:
            raise ValueError("The data is empty: there is no batch to work on.")
        if recordings is self._recordings:  # no other thread has begun anew
            self._num_batches = place + 1
            shapes = shapes if groups is None else groups.output_shapes(shapes)
            self._output_shapes = tuple(shapes)
        self._reach.warn_about_unused()

    def _group(self) -> None:
        """Put very many tiny batches together, before anything is known of them."""
        grouping, loss = self._grouping, self.loss_function
        whole = self._repeats and not self._rehearses and self._share is None
        if whole and grouping.pays(self.data):
            if self._may_put_together() and not (loss and loss.loss.opaque):
                grouping.find(self.pairs, self.batch_size, self.model, self._loss_maker)
            with self._lock:
                if grouping.close():
                    self._drop_recordings()

    def _shown(
        self, items: Iterable[T], title: str, total: int | None = None
    ) -> Iterable[T]:
        """Return what is iterated over, with a progress bar if that is asked for.

        Work of the package's own has no title, and shows none.
        """
        if not self.progressbar or not title:
            return items
        return tqdm(items, f"{title} (on {self.space.device})", total)

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Read the data, each batch as inputs and targets."""
        if may_draw(self.data):
            drawn()
        for index, item in enumerate(one_pass(self.data)):
            yield self._pair(item, index)

    def _pair(self, item: Any, index: int) -> tuple[Any, Any]:
        return self.reading.pair(item, index, targets=self.loss_func is not None)

    def _parts(self) -> Iterator[tuple[int, Any, Share | None]]:
        """Read the data, in parts of batches where whole ones would not fit."""
        entries, tables = self._entries, self._tables
        if (groups := self._grouping.groups) is not None:
            yield from groups.read(self.pairs())
            return
        for index, item in enumerate(self.pairs()):
            if entries is None:
                yield index, item, self._share
                continue
            X, y = item
            size = self._size_or_none(X)
            number = number_of_parts(size, numel(X), entries)
            if size is None or number == 1:
                yield index, item, None
                continue
            for share in shares(size, number):
                part = part_of((X, y), share, tables)
                # A part that is kept must not keep a loader's batch alive.
                listed = isinstance(self.data, (list, tuple))
                yield index, part if listed else cloned(part), share

    def _linearize(
        self, index: int, item: Any, place: int, share: Share | None
    ) -> Linearization:
        device = self.space.device
        if protect := (index, share) not in self._unwritten:
            require_numbers(item, index)
            self._nested = index if holds_nested(item) else self._nested
        X, y = (moved(side, device) for side in item)
        make_loss = self._loss_maker(X)
        examined = self._examined
        uses = None if (index, share) in examined else HiddenUses(self.model)
        try:
            see = None if uses is None else uses.see
            batch = Linearization(
                self.model, X, y, make_loss, index, protect, see, self.policy
            )
            batch.place, batch.share = place, share
        except (RuntimeError, TypeError) as error:
            raise_if_out_of_memory(error)
            if (explained := self._failure(error, X, index)) is None:
                raise
            raise explained from error
        if uses is not None:
            refuse_reentrant(batch.output, f"the model's output for batch {index}")
            uses.refuse(f"batch {index}")
        if self._repeats and not batch.writes:
            self._unwritten.add((index, share))
        if not self._known_input:
            self._check_classes(batch)
            self._reach.check(self.model, batch)
            self._known_input = True
        self._reach.note(self.model, batch)
        examined.add((index, share))
        return batch

    def _failure(self, error: Exception, X: Any, index: int) -> Exception | None:
        """Return what explains why the model failed, if that can be said."""
        if isinstance(error, TypeError) and tensors_in(X) and not meets_numpy(error):
            return None
        return model_failure(error, X, index, self.space)

    def _check_classes(self, batch: Linearization) -> None:
        """Raise if a first batch's classes are not where the loss looks for them."""
        if self.loss_function is not None:
            axes = self.loss_function.class_axes(batch.output, batch.y)
            taken = self.model.takes_apart
            self.reading.check_classes(axes, batch.output.shape, taken)

    def _read_anew(self, model: Model, axis: int) -> None:
        """Move the axis of classes from now on."""
        with model.exclusive(), self._lock:
            if self.model is model:  # else another thread was faster
                self.reading = replace(self.reading, class_axis=axis)
                self.model = Model(self.model_func, self.params, self.reading)

    def _loss_maker(self, X: Any) -> Callable[[Tensor, Any], Loss] | None:
        """Return what builds a batch's loss, without a reference to this risk."""
        if self.loss_function is None:
            return None
        size = self._size_or_none(X)
        return partial(
            self.loss_function, num_terms=size and size * self.terms_per_datum
        )

    def _record(
        self, recordings: dict[int, Linearization], batch: Linearization
    ) -> None:
        """Keep a batch's graphs if they fit into the budget."""
        if not self._may_keep(batch):
            return
        stage = batch.stage
        with self._lock:
            place, ledger = batch.place, self._ledger
            if recordings is not self._recordings or ledger.stage(place) == stage:
                return
            ledger.open(self.cache, self.space.device)
            fits = ledger.enter(place, stage, batch.nbytes)
            if not fits and place in recordings and batch.unfold():
                ledger.full = False
                fits = ledger.enter(place, batch.stage, batch.nbytes)
            if fits:
                recordings[place] = batch
            elif recordings.pop(place, None) is not None:
                self._dense.drop_jacobians()

    def room(self) -> float:
        """Return how many bytes may still be kept, by the setting of ``cache``."""
        with self._lock:
            self._ledger.open(self.cache, self.space.device)
            return max(self._ledger.room(), 0)

    def _may_keep(self, batch: Linearization) -> bool:
        """Whether a batch's graphs may still be of use after a product."""
        if not self._repeats or self.cache == "off":
            return False
        return not self._ledger.full or batch.place in self._recordings

    def _has_room(self, batch: Linearization) -> bool:
        """Whether a batch may be kept, and its output's graph at least would fit."""
        known = batch.place in self._recordings or batch.is_small
        if self._may_keep(batch) and not known:
            with self._lock:
                self._ledger.open(self.cache, self.space.device)
                self._ledger.full |= batch.nbytes > self._ledger.room()
        return self._may_keep(batch)

    def _fit(self, *products: Loop, K: int = 1) -> None:
        """Choose parts, columns and budget with which a product fits `max_memory`.

        Its loops are given. Later calls with one of them find the choice.
        """
        if self.max_memory is None:
            return
        self._refresh_if_changed()
        first = products[0]
        if first.key in self._dense.matrices:
            return
        names = [(product is GRADIENT, product.key, K) for product in products]
        once = first.key is None and first is not GRADIENT
        with self.model.exclusive(), self._lock:
            known = {self._fits.get(name) for name in names}
            fit = known.pop()
            if known or fit is None or once:
                # Beside what is kept, trying out would take more than the bound.
                self._drop_recordings()
                self._dense.drop_matrices()
                data, bound = Data.of(self), self.max_memory
                probe = Probe(self, data, products, K, limit=bound)
                fit = fitted(probe)[0]
                if fit.entries is not None and fit.entries < (self._entries or inf):
                    check_parts(probe, fit)
                self._fits.update(dict.fromkeys(names, fit))
            if fit.entries is not None and fit.entries < (self._entries or inf):
                self._entries, self._tables = fit.entries, fit.tables
                self._drop_recordings()
            self._columns.most = fit.width
            if self._ledger.limit(fit.budget, self.cache, self.space.device):
                self._drop_excess()

    def _drop_excess(self) -> None:
        """Drop Jacobians, recordings and matrices until the rest is in the budget."""
        kept = dict(self._recordings)  # another thread may be using these
        if self._ledger.exceeded:
            self._dense.drop_jacobians()
        while kept and self._ledger.exceeded:
            place, _ = kept.popitem()
            self._ledger.strike(place)
        self._recordings = kept
        if self._ledger.exceeded:
            self._dense.drop_matrices()

    def _add_product(
        self,
        body: Body,
        batch: Linearization,
        vectors: list[Tensor],
        total: Callable[[], list[Tensor]],
        key: Hashable,
        first: bool,
    ) -> None:
        """Add ``body(batch, vectors)``, with one vector, to ``total()``.

        Or write it there if it is the first. Where nothing is kept, a keyed product
        drops its graph, and the sum is allocated after that.
        """
        # Within a bound, products are made as those that were measured.
        batch.multiplied |= self.plain > 0 or not self._may_fold
        batch.final = key is not None and not self._has_room(batch)
        name = None if self.plain else key
        self._fold_if_due(name, body, batch, 1)
        products = list(batch.multiply(name, body, vectors))
        write = torch._foreach_copy_ if first else torch._foreach_add_
        write(total(), products)

    def _fold_if_due(
        self, key: Hashable, body: Body, batch: Linearization, columns: int
    ) -> None:
        """Keep a batch's sensitivities once that pays, if it is kept itself.

        The product may be one that only replays, outside of :meth:`session`.
        """
        if key is None or not self._may_fold or self.model._held is not None:
            return
        if self._recordings.get(batch.place) is not batch:
            return
        if batch.fold_due(key, body, columns):
            assert isinstance(body, Congruence)
            fold = partial(batch.fold, key, body, self._ledger.room())
            with preserved_rng(self.space.device):
                self.model.run(fold)

    def _add_products(
        self,
        body: Body,
        batch: Linearization,
        V: Tensor,
        total: Callable[[], Tensor],
        spaces: tuple[TensorSpace, TensorSpace] | None = None,
        key: Hashable = None,
    ) -> None:
        """Add ``body(batch, V)`` to the rows of ``total()``, in chunks of columns.

        ``V`` and the products are vectors of the two ``spaces``, by default those of
        the parameters. Where nothing is kept, the last of a keyed body's products
        drops its graph, and the sum is allocated after that.
        """
        inputs, outputs = spaces or (self.space, self.space)
        # Within a bound, products are made as those that were measured.
        batch.multiplied |= self.plain > 0 or not self._may_fold
        K = V.shape[1]
        start = 0
        while start < K:
            width = self._columns.width(key, body, batch, V, inputs, self.plain > 0)
            width = min(width, K - start)
            columns: Any = slice(start, start + width) if width > 1 else start
            part = V.T[columns].contiguous()
            # A recording that is made for one product only must pay within it.
            pays = width == 1 or batch.place in self._recordings or 4 * width <= K
            name = key if pays and not self.plain else None
            self._fold_if_due(name, body, batch, width)
            last = width == 1 and start == K - 1 and key is not None
            batch.final = last and not self._may_keep(batch)
            try:
                products = batch.multiply(name, body, inputs.split(part), width > 1)
            except RuntimeError as error:
                raise_if_out_of_memory(error)
                if width == 1:
                    raise
                self._columns.refuse(key)
                continue
            parts = outputs.split(total()[columns])
            torch._foreach_add_(parts, list(products))  # on a GPU, one launch
            start += width

    def _denominator(self, count: Any) -> Any:
        """Return what the sum over batches is divided by."""
        if self.loss_function is None or self.loss_function.reduction == "sum":
            return 1
        if float(count) == 0.0:
            if self._rehearses:  # a few data may have no target that counts
                return 1
            raise ValueError(
                "No target counts: every one is `ignore_index` (or has weight zero), "
                "so the mean loss is 0/0."
            )
        return count

    def batch_size(self, X: Any) -> int:
        """Return the number of data points in ``X``."""
        if self.batch_size_fn is not None:
            return self.batch_size_fn(X)
        tensors = tensors_in(X, inside=False)
        if not tensors or tensors[0].ndim == 0:
            raise ValueError(
                "Cannot tell the number of data points in a batch: pass "
                "`batch_size_fn`, which maps X to it."
            )
        return tensors[0].shape[0]

    def _size_or_none(self, X: Any) -> int | None:
        try:
            return self.batch_size(X)
        except ValueError:
            return None

    # -- determinism ------------------------------------------------------------

    def _loses_by_shuffling(self) -> bool:
        """Whether something would be kept if the data came in a fixed order."""
        if self._repeats or self._rehearses or self.cache == "off":
            return False
        return self._shuffled or shuffles(self.data)

    def why_nothing_is_kept(self) -> str:
        """Say why products keep nothing for later ones; nothing if they may."""
        return why_nothing_is_kept(self.data, self._shuffled, self._repeats, self.cache)

    @isolated()
    def status(self, keys: Iterable[Hashable] = ()) -> Status:
        """Return what is kept for products named by ``keys``."""
        self._refresh_if_changed()
        with self._lock:
            return status_of(
                self._recordings,
                self._num_batches,
                keys,
                {**self._dense.matrices, **self._rows.matrices},
                self._ledger.used(),
                self._ledger.full,
                self.why_nothing_is_kept(),
            )

    def require_fixed_order(self, what: str) -> None:
        """Raise if the batches are known to differ between passes."""
        if self._shuffled:
            raise ValueError(
                f"{what} depends on which data comes when, but the data's batches "
                "differ from pass to pass. Set `shuffle=False`, or pass "
                "`list(loader)`."
            )

    def _fresh_batches(self, title: str) -> Iterator[Linearization]:
        """Yield batches that are evaluated now, whatever is recorded."""
        title = f"{type(self).__name__}.{title}"
        self._fit(GRADIENT)
        self._group()
        recordings, self._recordings = self._recordings, {}
        full, self._ledger.full = self._ledger.full, True
        try:
            yield from self.batches(title)
        finally:
            self._recordings, self._ledger.full = recordings, full


def _require_callable(model_func: Any) -> None:
    if not callable(model_func):
        raise TypeError(
            "The model must be a module or a callable `(params, X) -> prediction`, "
            f"got {type(model_func).__name__}."
        )


def _checked_bytes(max_memory: int | None) -> int | None:
    number = as_count(max_memory)
    if max_memory is None or (number is not None and number > 0):
        return number
    raise ValueError(
        f"`max_memory` must be a number of bytes > 0 or None, got {max_memory!r}."
    )
