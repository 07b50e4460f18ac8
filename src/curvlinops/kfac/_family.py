"""What KFAC, EKFAC and KFOC share: the user's choice, factors, algebra, files."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from enum import StrEnum
from os import PathLike, fspath
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from curvlinops._counts import count
from curvlinops._model import Parameters
from curvlinops._operand import to_json
from curvlinops.kfac._blocks import BlockwiseLinearOperator, Factors, load
from curvlinops.kfac._estimation import Settings
from curvlinops.kfac._following import Represented
from curvlinops.kfac._layers import Fisher
from curvlinops.risk import EmpiricalRisk
from curvlinops.risk_operator import as_risk

#: Largest factor that is kept as a matrix: 256 MiB in single precision.
MAX_FACTOR = 8192


class FisherType(StrEnum):
    """What is sent back through the model; plain strings are accepted."""

    TYPE2 = "type-2"
    MC = "mc"
    EMPIRICAL = "empirical"
    FORWARD_ONLY = "forward-only"


class KFACType(StrEnum):
    """How positions that share a weight are treated; plain strings are accepted."""

    EXPAND = "expand"
    REDUCE = "reduce"


class Matrices(dict[Any, BlockwiseLinearOperator]):
    """The matrices of one state of a risk's parameters and data, by their keys."""


class KroneckerFactored(Represented):
    """What KFAC, EKFAC and KFOC share: a block-diagonal matrix computed at first use.

    Parameters
    ----------
    settings : Settings
        What is estimated.
    model_func, loss_func, params, data, **options
        What :func:`~curvlinops.risk_operator.as_risk` takes.
    """

    def __init__(
        self,
        settings: Settings,
        model_func: Callable[..., Any] | EmpiricalRisk,
        loss_func: Callable[..., Any] | None,
        params: Parameters | None,
        data: Iterable[Any] | None,
        **options: Any,
    ) -> None:
        risk = as_risk(model_func, loss_func, params, data, **options)
        super().__init__(risk)
        if risk.loss_function is None:
            raise ValueError("Kronecker factors need a loss, got a risk without one.")
        if settings.fisher.fisher_type == FisherType.MC:
            risk.require_fixed_order("A Monte-Carlo Fisher")
        if settings.fisher.fisher_type == FisherType.TYPE2:
            risk.terms.warn_if_flat("the GGN that is approximated", stacklevel=3)
        if settings.fisher.fisher_type in (FisherType.MC, FisherType.EMPIRICAL):
            risk.require_terms("sampled and empirical Fisher matrices")
        self.settings = settings
        #: This operator's own matrix, with the state that it belongs to.
        self._own: tuple[ReferenceType[Matrices], BlockwiseLinearOperator] | None = None

    def _estimate(self, title: str) -> list[Any]:
        """Return blocks with their layouts."""
        raise NotImplementedError

    def _recipe(self) -> tuple[Any, ...]:
        """Return all that :meth:`_estimate` depends on, except for the risk.

        Operators of a class that defines this itself share a risk's factors if they
        return equal values. What a subclass adds is not known, so it shares none.
        """
        raise NotImplementedError

    # -- factors ----------------------------------------------------------------------

    @property
    def representation(self) -> BlockwiseLinearOperator:
        """The matrix as block-diagonal operator, without model and data.

        Computed at the first use, and again when parameters, buffers, modes or listed
        data have changed since.
        """
        if (matrix := self._found()) is not None:
            return matrix
        with self._alone():
            matrix = self._found()  # another thread may have been faster
            return self._compute() if matrix is None else matrix

    def compute_kronecker_factors(self) -> None:
        """Compute the factors anew, also if nothing is known to have changed."""
        with self._alone():
            self._state().pop(self._key, None)
            self._compute()

    def _state(self) -> Matrices:
        """Return the matrices of the present parameters and data, by their keys."""
        return self.risk.once((KroneckerFactored,), Matrices)

    @property
    def _key(self) -> tuple[Any, ...] | None:
        """What names this matrix among those of the risk; ``None`` if nothing does."""
        cls = type(self)
        return (cls, *self._recipe()) if "_recipe" in vars(cls) else None

    def _found(self) -> BlockwiseLinearOperator | None:
        """Return the matrix if it is known for the present parameters and data."""
        state, own = self._state(), self._own
        if own is not None and own[0]() is state:
            return own[1]
        if own is not None:  # of another state, so nobody needs it any more
            with self._alone():
                self._own = None if self._own is own else self._own
        return state.get(self._key)

    def _compute(self) -> BlockwiseLinearOperator:
        """Compute the matrix, with the locks held, and keep it."""
        self._own, state = None, self._state()
        blocks = self._estimate(self._title("compute_kronecker_factors"))
        order = {name: i for i, name in enumerate(self.risk.params)}
        blocks.sort(key=lambda block: order[block[0].names[0]])
        layouts, operators = zip(*blocks, strict=True)
        matrix = BlockwiseLinearOperator(self._in_space, layouts, operators, self._kind)
        if self._key is None:
            self._own = ref(state), matrix
        else:
            state[self._key] = matrix
        return matrix

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the matrix if that is known and fresh."""
        return {**vars(self), "_own": self._found()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; the matrix counts until something changes."""
        vars(self).update(state)
        if (matrix := state["_own"]) is not None:
            self._own = ref(self._state()), matrix

    def _depends_on_batches(self) -> str:
        sampled = self.settings.fisher.fisher_type == FisherType.MC
        return "the samples depend on the batches" if sampled else ""

    def factors(self) -> dict[str, Factors]:
        """Return every layer's input and output factor.

        Returns
        -------
        dict of str to Factors
            By the name of the layer's module, or that of the weight if a module has
            several or there is no module.
        """
        factors = self.representation.factors()
        names = _layer_names(factors)
        return {names[weight]: f for weight, f in factors.items()}

    @property
    def _input_covariances(self) -> dict[str, Tensor]:
        return {name: f.input for name, f in self.factors().items()}

    @property
    def _gradient_covariances(self) -> dict[str, Tensor]:
        return {name: f.output for name, f in self.factors().items()}

    @property
    def _mapping(self) -> dict[str, dict[str, int]]:
        names = _layer_names(name for name, _ in self.representation.layers())
        places = list(self.risk.params)
        mapping: dict[str, dict[str, int]] = {}
        for weight, layer in names.items():
            for name in places:
                prefix, _, last = name.rpartition(".")
                if name == weight or (prefix == layer and name.endswith("bias")):
                    mapping.setdefault(layer, {})[last] = places.index(name)
        return mapping

    # -- files ------------------------------------------------------------------------

    @property
    def _kind(self) -> dict[str, Any]:
        """What makes this matrix, of the same parameters, another one than others."""
        settings, loss = self.settings, self.risk.loss_function
        fisher, approx = settings.fisher, ["expand", "reduce"][settings.reduce]
        draws = {"mc_samples": fisher.mc_samples, "seed": fisher.seed}
        return {
            "class": type(self).__name__,
            "fisher_type": fisher.fisher_type,
            **(draws if fisher.fisher_type == FisherType.MC else {}),
            "kfac_approx": approx,
            "biases": settings.bias,
            "unsupported": settings.unsupported,
            "max_factor": settings.max_factor,
            "loss": None if loss is None else loss.title,
        }

    def load(self, path: str | PathLike[str]) -> None:
        """Read factors that were saved, for the same parameters, on any device.

        They count as those of the present parameters and data, until these change or
        :meth:`refresh` is called; then factors are computed. The function
        :func:`load <curvlinops.kfac.load>` returns a matrix that stays.

        Parameters
        ----------
        path : str or path
            The file.

        Raises
        ------
        ValueError
            If the operator's class, settings or loss, or names, shapes or dtype of the
            parameters differ; or if the file is another one, of another version, cut
            off, or damaged.
        OSError
            If there is no such file, or it cannot be read.

        Warns
        -----
        UserWarning
            If the factors were computed with other values of the parameters.

        Notes
        -----
        A loss of your own counts by its name. The model between the parameters, and
        the data, are not compared.
        """
        matrix = load(path, self.device, **json.loads(to_json(self._kind)))
        mine, its = self._in_space, matrix._in_space
        for what in ("names", "shapes", "dtype"):
            if getattr(mine, what) != getattr(its, what):
                raise ValueError(
                    f"{fspath(path)} was saved for parameters with the {what} "
                    f"{getattr(its, what)}, these have {getattr(mine, what)}. Build "
                    "the operator for those."
                )
        if matrix.parameters not in (None, self.parameters_fingerprint()):
            warnings.warn(
                f"The factors in {fspath(path)} were computed with other values of the "
                "parameters. Set these first, or call `refresh()` for factors of the "
                "present ones.",
                stacklevel=2,
            )
        with self._alone():
            self._own = ref(self._state()), matrix


def _layer_names(weights: Iterable[str]) -> dict[str, str]:
    """Map weights to the names of their modules where these are unique."""
    modules = {weight: weight.rpartition(".")[0] for weight in weights}
    counts = Counter(modules.values())
    plain = {w for w in modules if "." not in w and w not in ("weight", "bias")}
    return {
        w: w if counts[module] > 1 or w in plain else module
        for w, module in modules.items()
    }


def checked_settings(
    fisher_type: str,
    mc_samples: int,
    seed: int,
    kfac_approx: str,
    bias: str,
    unsupported: str,
    max_factor: int,
    backend: str = "hooks",
) -> Settings:
    """Return the user's choice, checked; a backend is none, both names mean the same.

    Raises
    ------
    ValueError
        If an argument has an unknown value.
    """
    if backend not in ("hooks", "make_fx"):
        raise ValueError(f"`backend` must be 'hooks' or 'make_fx', got {backend!r}.")
    for value, name, allowed in (
        (fisher_type, "fisher_type", list(FisherType)),
        (kfac_approx, "kfac_approx", list(KFACType)),
        (unsupported, "unsupported", ["raise", "diagonal"]),
    ):
        if value not in allowed:
            listing = ", ".join(repr(str(v)) for v in allowed)
            raise ValueError(f"`{name}` must be one of {listing}, got {value!r}.")
    exact = "The exact matrix has `fisher_type='type-2'`."
    least = int(fisher_type == FisherType.MC)
    samples = count("mc_samples", mc_samples, least, exact)
    fisher = Fisher(str(fisher_type), samples, count("seed", seed, None))
    max_factor = count("max_factor", max_factor, 1)
    return Settings(
        fisher, kfac_approx == KFACType.REDUCE, bias, unsupported, max_factor
    )
