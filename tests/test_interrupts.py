"""Interrupts at the ends of torch's contexts leave nothing of them behind."""

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops import (
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    hutchinson_trace,
)
from curvlinops._interrupts import hidden_interrupt, isolated
from curvlinops._memory import raise_if_out_of_memory

#: Where torch's contexts are entered and left: files with their functions.
SPOTS = {
    ("grad_mode.py", "__enter__"),
    ("grad_mode.py", "__exit__"),
    ("overrides.py", "_push_mode"),
    ("overrides.py", "_pop_mode"),
    ("vmap.py", "vmap_increment_nesting"),
    ("predispatch.py", "_vmap_increment_nesting"),
    ("predispatch.py", "_vmap_decrement_nesting"),
    ("_python_dispatch.py", "__enter__"),
    ("_python_dispatch.py", "__exit__"),
    ("forward_ad.py", "__enter__"),
    ("forward_ad.py", "__exit__"),
    ("forward_ad.py", "enter_dual_level"),
    ("forward_ad.py", "exit_dual_level"),
    ("predispatch.py", "_enter_dual_level"),
    ("predispatch.py", "_exit_dual_level"),
    ("graph.py", "disable_saved_tensors_hooks"),
    ("autocast_mode.py", "__enter__"),
    ("autocast_mode.py", "__exit__"),
    ("contextlib.py", "__enter__"),
    ("contextlib.py", "__exit__"),
    ("_draws.py", "add"),
    ("_draws.py", "remove"),
    ("_isolation.py", "make"),
    ("_isolation.py", "undo"),
}


class Struck:
    """Calls a function, and interrupts it at the n-th visit to one of the spots.

    Attributes
    ----------
    visits : dict
        How often every spot has been visited, by the spot and the event.
    """

    def __init__(self, spot: tuple[str, str] = ("", ""), event: str = "", n: int = 0):
        self.spot, self.event, self.n = spot, event, n
        self.visits: dict[Any, int] = {}

    def __call__(self, function: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return function()
        finally:
            sys.settrace(before)

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        spot = code.co_filename.rpartition("/")[2], code.co_name
        if spot not in SPOTS:
            return None
        self._visit(spot, event)
        return lambda frame, event, _: self._visit(spot, event)

    def _visit(self, spot: tuple[str, str], event: str) -> Any:
        if event == "line":
            return None
        key = spot, event
        self.visits[key] = self.visits.get(key, 0) + 1
        if key == (self.spot, self.event) and self.visits[key] == self.n:
            sys.settrace(None)
            raise KeyboardInterrupt
        return None


def in_forward_mode() -> bool:
    try:
        torch._C._enter_dual_level()
    except RuntimeError:
        return True
    torch._C._exit_dual_level(level=0)
    return False


def state() -> dict[str, Any]:
    """Return what of a thread's, and the process's, an operation must leave."""
    C = torch._C
    functions = range(C._len_torch_function_stack())
    vmapmode = [C._vmapmode_increment_nesting(), C._vmapmode_decrement_nesting()]
    autocast = [torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()]
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "layers": C._functorch.get_dynamic_layer_stack_depth(),
        "functions": [id(C._get_function_stack_at(i)) for i in functions],
        "in dispatch": torch.utils._python_dispatch._is_in_torch_dispatch_mode,
        "forward": (forward_ad._current_level, in_forward_mode()),
        "hooks": (
            C._autograd._saved_tensors_hooks_is_enabled(),
            C._autograd._top_saved_tensors_default_hooks(True),
        ),
        "nesting": (vmapmode, autocast),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "forward gradients": C._is_fwd_grad_enabled(),
        "attention": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ],
        "torch's numbers": torch.get_rng_state().numpy().tobytes(),
        "NumPy's": np.random.get_state()[1].tobytes(),  # noqa: NPY002
        "filters": id(warnings.filters),
        "modes": modes(),
    }


def modes() -> list[Any]:
    """Return the modes for dispatch, and what kinds of kernels are tried and not."""
    C = torch._C
    entered = [
        C._get_dispatch_stack_at(i) for i in range(C._len_torch_dispatch_stack())
    ]
    tried = C._dispatch_tls_local_include_set(), C._dispatch_tls_local_exclude_set()
    return [*map(id, entered), *map(str, tried)]


class Block(nn.Module):
    """Attention, in autocast, and dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.embed(X).unsqueeze(1).expand(-1, 2, -1).unsqueeze(1)
        h = nn.functional.scaled_dot_product_attention(h, h, h)
        return self.out(nn.functional.dropout(h.mean((1, 2)), 0.5, False))


def problem(kind: str) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = Block() if kind == "attention" else nn.Sequential(nn.Linear(3, 4))
    if kind != "attention":
        model.extend([nn.Tanh(), nn.Linear(4, 2)])
    model = model.double()
    data = [(torch.rand(n, 3).double(), torch.randint(2, (n,))) for n in (4, 3)]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


BUILT = {kind: problem(kind) for kind in ("mlp", "attention")}
SIZE = sum(p.numel() for p in BUILT["mlp"][2].values())
v = np.linspace(-1, 1, SIZE)
V = np.stack([v, -v, v**2], 1)


def replayed(cls: type, times: int = 12) -> Callable[[], Any]:
    A = cls(*BUILT["mlp"])
    for _ in range(times):
        A @ v
    return lambda: A @ v


def first(cls: type, kind: str = "mlp", X: Any = v, **options: Any) -> Any:
    A = cls(*BUILT[kind], **options)
    return A @ (X if kind == "mlp" else np.ones(A.shape[1]))


#: Every kind of product, by name; what is called with no argument.
JOBS: dict[str, Callable[[], Callable[[], Any]]] = {
    "ggn": lambda: lambda: first(GGNLinearOperator),
    "ggn, nothing kept": lambda: lambda: first(GGNLinearOperator, cache="off"),
    "hessian": lambda: lambda: first(HessianLinearOperator),
    "hessian block": lambda: lambda: first(HessianLinearOperator, X=V, cache="off"),
    "empirical fisher": lambda: lambda: first(EFLinearOperator),
    "attention": lambda: lambda: first(HessianLinearOperator, "attention"),
    "kfac": lambda: lambda: first(KFACLinearOperator),
    "diagonal": lambda: lambda: first(GGNDiagonalLinearOperator),
    "jacobian": lambda: (
        lambda: (
            JacobianLinearOperator(BUILT["mlp"][0], BUILT["mlp"][2], BUILT["mlp"][3])
            @ v
        )
    ),
    "recording": lambda: (
        lambda: [
            A @ v for A in [HessianLinearOperator(*BUILT["mlp"])] for _ in range(5)
        ]
    ),
    "settled": lambda: replayed(GGNLinearOperator, 20),
    "dense": lambda: lambda: GGNLinearOperator(*BUILT["mlp"]).to_dense().numpy(),
    "verify": lambda: (
        lambda: float(GGNLinearOperator(*BUILT["mlp"]).verify().ok) * np.ones(1)
    ),
    "plan": lambda: lambda: GGNLinearOperator(*BUILT["mlp"]).plan().peak * np.ones(1),
    "trace": lambda: (
        lambda: np.array(
            float(hutchinson_trace(GGNLinearOperator(*BUILT["mlp"]), 2, rng=0))
        )
    ),
}


def strike(job: str, most: int) -> None:
    """Strike a job at the first few visits to all spots, entering and leaving them."""
    run = JOBS[job]()
    expected, before = run(), state()
    count = Struck()
    count(run)
    assert count.visits or job == "settled"
    for (spot, event), visits in count.visits.items():
        for n in {*range(1, min(visits, most) + 1), visits}:
            struck = Struck(spot, event, n)
            with pytest.raises(KeyboardInterrupt):
                struck(run)
            gc.collect() if n == 1 else None
            after = state()
            assert after == before, f"{spot}, {event}, visit {n}"
    np.testing.assert_allclose(run(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("job", ["ggn, nothing kept", "hessian block", "settled"])
def test_interrupts_at_the_ends_of_contexts(job: str):
    strike(job, 1)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_interrupts_at_the_ends_of_contexts_of_all_kinds(job: str):
    strike(job, 3)


class Recorder(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def inside_vmap() -> Iterator[None]:
    C = torch._C._functorch
    C._vmap_increment_nesting(2, "error")
    try:
        yield
    finally:
        C._vmap_decrement_nesting()


USERS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "function mode": Recorder,
    "dispatch mode": Dispatched,
    "vmap": inside_vmap,
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", USERS)
def test_the_users_own_contexts_stay_entered(name: str):
    A = HessianLinearOperator(*BUILT["mlp"], cache="off")
    outside = state()
    for spot in ("grad_mode.py", "__exit__"), ("overrides.py", "_pop_mode"):
        with USERS[name]():
            inside = state()
            assert inside != outside
            with pytest.raises(KeyboardInterrupt):
                Struck(spot, "call", 1)(lambda: A @ v)
            assert state() == inside
        assert state() == outside


def test_what_lacks_of_the_users_contexts_is_entered_again():
    """As after an interrupt between taking a mode away and putting it back."""

    @isolated(evaluates=True)
    def operation() -> None:
        torch._C._pop_torch_function_stack()
        torch._C._pop_torch_dispatch_stack(None)
        torch._C._functorch.pop_dynamic_layer_stack()
        torch._C._autograd._pop_saved_tensors_default_hooks()
        raise KeyboardInterrupt

    with USERS["hooks"](), Recorder(), Dispatched(), inside_vmap():
        before = state()
        with pytest.raises(KeyboardInterrupt):
            operation()
        assert state() == before


def test_a_mode_with_a_place_of_its_own_stays():
    """What it holds is left after its own code has ended, hence out of order."""
    operation, outside = isolated()(torch.from_numpy), state()
    with FakeTensorMode(), Dispatched():
        inside = modes()
        with pytest.raises(KeyboardInterrupt):
            Struck(("grad_mode.py", "__exit__"), "call", 1)(lambda: operation(v))
        gc.collect()
        assert modes() == inside
    assert state() == outside


def test_other_exceptions_leave_nothing_either():
    """Handlers of signals may raise what they like."""

    @isolated(evaluates=True)
    def operation() -> None:
        torch.no_grad().__enter__()
        Recorder().__enter__()
        torch.autocast("cpu").__enter__()
        torch.autograd.graph.saved_tensors_hooks(abs, abs).__enter__()
        torch._C._functorch._vmap_increment_nesting(2, "error")
        raise TimeoutError

    before = state()
    with pytest.raises(TimeoutError):
        operation()
    assert state() == before


def on_top() -> None:
    """Raise an error as torch's contexts do that clean up what is not there."""
    try:
        raise KeyboardInterrupt
    finally:
        torch._C._functorch._vmap_decrement_nesting()


def test_an_interrupt_comes_out_on_top_of_which_torch_raised():
    with pytest.raises(KeyboardInterrupt):
        isolated()(on_top)()


def test_an_interrupt_is_not_taken_for_something_that_cannot_be_done():
    @isolated()
    def operation() -> str:
        try:
            on_top()
        except RuntimeError as error:
            raise_if_out_of_memory(error)
        return "went on"

    with pytest.raises(KeyboardInterrupt):
        operation()


def test_an_interrupt_that_the_user_handles_is_none_of_an_operations():
    A = GGNLinearOperator(*BUILT["mlp"])

    def fail() -> None:
        raise RuntimeError("no")

    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(ValueError, match="Dimension"):
            A @ np.ones(SIZE + 1)
        with pytest.raises(RuntimeError, match="no"):
            isolated()(fail)()
        try:
            fail()
        except RuntimeError as error:
            assert hidden_interrupt(error) is None
            raise_if_out_of_memory(error)  # outside of any operation


def test_a_product_within_a_handler_of_an_interrupt_may_be_interrupted():
    A = HessianLinearOperator(*BUILT["mlp"], cache="off")
    before = state()
    with nullcontext(), pytest.raises(KeyboardInterrupt) as caught:
        try:
            raise KeyboardInterrupt("first")
        except KeyboardInterrupt:
            Struck(("grad_mode.py", "__enter__"), "return", 1)(lambda: A @ v)
    assert str(caught.value) == ""
    assert state() == before


@pytest.mark.parametrize("kind", ["attention", "anomaly"])
def test_switches_that_a_models_own_code_turns_are_turned_back(kind):
    """The interrupt strikes where the code has turned them, and nobody knows yet."""

    def read():
        flash = torch.backends.cuda.flash_sdp_enabled()
        return flash, torch.is_anomaly_enabled()

    class Struck(nn.Linear):
        def forward(self, x):
            if kind == "attention":
                torch.backends.cuda.enable_flash_sdp(False)
            else:
                torch.autograd.set_detect_anomaly(True, check_nan=False)
            raise KeyboardInterrupt

    before, model = read(), Struck(4, 3)
    data = [(torch.ones(2, 4), torch.ones(2, 3))]
    try:
        with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            G = GGNLinearOperator(model, nn.MSELoss(), "weight", data)
            G @ torch.ones(12)
        assert read() == before
    finally:
        torch.backends.cuda.enable_flash_sdp(before[0])
        torch.autograd.set_detect_anomaly(before[1])
