"""Other threads, forked processes and loaders go on as if nothing was multiplied."""

import gc
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cases import Uncopied
from curvlinops import GGNLinearOperator, HessianLinearOperator
from curvlinops._interrupts import FORWARD_MODE
from curvlinops._isolation import _GOING, Changes, Owner
from curvlinops._locks import new_lock

LOSS = nn.CrossEntropyLoss()
#: Seconds after which a thread or a process counts as one that hangs.
LIMIT = 60


def mlp() -> tuple[nn.Module, Any, dict, list]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(torch.rand(n, 4).double(), torch.randint(3, (n,))) for n in (5, 4)]
    return model, LOSS, dict(model.named_parameters()), data


@contextmanager
def beside(work: Callable[[], Any]) -> Iterator[None]:
    """Repeat something in another thread."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LIMIT)
        assert not thread.is_alive()


def in_fork(work: Callable[[], bool]) -> bool:
    """Return what a function returns in a forked process, or fail if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks besides threads
        pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    pytest.fail("the forked process hangs")


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# ------------------------------------------------------------------ forks


@contextmanager
def held_elsewhere(lock: Any) -> Iterator[None]:
    """Have another thread hold a lock."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(LIMIT)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(LIMIT)
    try:
        yield
    finally:
        done.set()
        thread.join()


class Owned:
    def __init__(self) -> None:
        self.renewed = 0
        self.lock = new_lock(self.renew)

    def renew(self) -> None:
        self.renewed += 1


@forks
def test_locks_that_other_threads_hold_are_free_in_a_forked_process():
    owned, own = Owned(), Owned()
    with held_elsewhere(owned.lock), own.lock:

        def work() -> bool:
            free = owned.lock.acquire(blocking=False)
            own.lock.release()  # still held by the thread that forked
            return free and owned.renewed == 1 and own.renewed == 0

        assert in_fork(work)
        assert owned.renewed == 0
        own.lock.acquire()
        own.lock.release()


@forks
def test_products_in_forked_processes_wait_for_nobody():
    """All locks that a product takes are held by a thread that the copy lacks."""
    A = GGNLinearOperator(*mlp(), cache="off")
    v = np.ones(A.shape[1])
    expected = A @ v
    for lock in (A.risk._lock, A.risk.model.exclusive(), FORWARD_MODE):
        with held_elsewhere(lock):
            assert in_fork(lambda: np.allclose(A @ v, expected))


@forks
def test_forked_processes_have_no_changes_of_other_threads():
    model, _, params, _ = mlp()
    weight, flash = model[0].weight, torch.backends.cuda.flash_sdp_enabled
    before, made, done = flash(), threading.Event(), threading.Event()

    def change() -> None:
        owner = Owner()
        changes = Changes(owner)
        changes.make(model, {n: nn.Parameter(p.detach()) for n, p in params.items()})
        made.set()
        done.wait(LIMIT)
        changes.undo()

    thread = threading.Thread(target=change)
    thread.start()
    made.wait(LIMIT)
    try:
        assert model[0].weight is not weight
        assert in_fork(
            lambda: model[0].weight is weight and flash() == before and not _GOING
        )
    finally:
        done.set()
        thread.join()
    assert model[0].weight is weight


def fork_while_multiplying(times: int) -> None:
    A = GGNLinearOperator(*mlp())
    H = HessianLinearOperator(*mlp(), cache="off")
    v = np.ones(A.shape[1])
    expected = A @ v, H @ v

    def work() -> bool:
        found = A @ v, H @ v
        return bool(np.allclose(found, expected))

    with beside(lambda: (A @ v, H @ v)):
        for _ in range(times):
            assert in_fork(work)


@forks
def test_forks_while_another_thread_multiplies():
    fork_while_multiplying(5)


@forks
@pytest.mark.slow
def test_many_forks_while_another_thread_multiplies():
    fork_while_multiplying(100)


@pytest.mark.slow
def test_operators_are_sent_to_spawned_processes(tmp_path):
    A = GGNLinearOperator(*mlp())
    x = np.arange(A.shape[1]) / 10.0
    path = tmp_path / "operator"
    path.write_bytes(pickle.dumps((A, x, A @ x)))
    code = (
        "import pickle, sys, numpy as np\n"
        "A, x, y = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert np.allclose(A @ x, y)\n"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=LIMIT)


# ------------------------------------------------------------------ loaders


def persistent(**options: Any) -> DataLoader:
    X = torch.rand(12, 4).double()
    data = TensorDataset(X, torch.randint(3, (12,)))
    options = {"batch_size": 4, "num_workers": 1, "persistent_workers": True} | options
    context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return DataLoader(data, multiprocessing_context=context, **options)


fork_warnings = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@fork_warnings
def test_two_threads_on_a_loader_whose_workers_persist():
    model, loss, params, _ = mlp()
    loader = persistent()
    operators = [GGNLinearOperator(model, loss, params, loader, cache="off")] * 2
    v = np.ones(operators[0].shape[1])
    expected = GGNLinearOperator(model, loss, params, list(loader)) @ v
    found: list[np.ndarray] = []

    def work(A: GGNLinearOperator) -> None:
        found.extend(A @ v for _ in range(3))

    threads = [threading.Thread(target=work, args=(A,), daemon=True) for A in operators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    assert len(found) == 6
    for y in found:
        np.testing.assert_allclose(y, expected)


@fork_warnings
def test_a_pass_of_the_users_goes_on_while_its_loader_is_read():
    model, loss, params, _ = mlp()
    loader = persistent()
    expected = [X.clone() for X, _ in loader]
    seen = []
    for X, _ in loader:
        seen.append(X.clone())
        if len(seen) == 1:
            A = GGNLinearOperator(model, loss, params, loader, cache="off")
            A @ np.ones(A.shape[1])
    assert len(seen) == len(expected)
    assert all(map(torch.equal, seen, expected))


@fork_warnings
def test_workers_end_with_the_loader():
    model, loss, params, _ = mlp()
    before = len(multiprocessing.active_children())
    loader = persistent()
    A = GGNLinearOperator(model, loss, params, loader, cache="off")
    A @ np.ones(A.shape[1])
    assert len(multiprocessing.active_children()) == before + 1
    del A, loader
    gc.collect()
    assert len(multiprocessing.active_children()) == before


# ------------------------------------------------------------------ random numbers


class Random(nn.Module):
    """Adds nothing, but draws for that."""

    def __init__(self, draw: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(4, 3), draw

    def forward(self, X: Tensor) -> Tensor:
        self.draw(X)
        return self.layer(X)


def seeded(X: Tensor) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        torch.rand(2)


DRAWS = {
    "torch": lambda X: torch.rand(2),
    "dropout": lambda X: nn.functional.dropout(X),
    "method": lambda X: X.clone().bernoulli_(),
    "like": lambda X: torch.randn_like(X),
    "distribution": lambda X: torch.distributions.Gamma(2.0, 1.0).sample(),
    "attention": lambda X: nn.functional.scaled_dot_product_attention(
        *[X.reshape(1, 1, -1, 4)] * 3, dropout_p=0.5
    ),
    "recurrent": lambda X: nn.LSTM(4, 2, 2, dropout=0.5).double()(X),
    "NumPy": lambda X: np.random.rand(),  # noqa: NPY002
    "Python": lambda X: random.random(),
    "seeded": seeded,
    "seed": lambda X: (torch.manual_seed(1), torch.rand(1)),
}


def random_states() -> list[Any]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return [
        torch.get_rng_state().tolist(),
        [numpy_state[1].tolist(), numpy_state[2]],
        random.getstate(),
    ]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", DRAWS)
def test_random_states_are_as_before(name: str, alone: bool):
    _, loss, _, data = mlp()
    model = Random(DRAWS[name]).double()
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    if not alone:
        other.start()
    try:
        params = dict(model.named_parameters())
        before = random_states()
        A = HessianLinearOperator(model, loss, params, data, cache="off")
        assert random_states() == before
        for _ in range(2):
            A @ np.ones(A.shape[1])
            assert random_states() == before
    finally:
        done.set()
        if not alone:
            other.join()


@pytest.mark.parametrize("dropout", [False, True])
def test_draws_of_another_thread_are_not_repeated(dropout: bool):
    model, loss, params, data = mlp()
    if dropout:
        model.append(nn.Dropout(0.5).eval())
        model.append(nn.RReLU().eval())
    A = HessianLinearOperator(model, loss, params, data, cache="off")
    v = np.ones(A.shape[1])
    A @ v
    seen: list[Any] = []

    def draw() -> None:
        seen.append((*torch.rand(2).tolist(), np.random.rand(), random.random()))  # noqa: NPY002
        time.sleep(0.0003)

    with beside(draw):
        for _ in range(40):
            A @ v
    assert len(seen) > 20
    for column in zip(*seen, strict=True):
        assert len({*column}) == len(seen)


# ------------------------------------------------------------------ attention


class Attention(nn.Module):
    """Attention by a function, or by a module of torch's, within its own context."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.seen: list[bool] = []

    def forward(self, X: Tensor) -> Tensor:
        h = self.layer(X).unsqueeze(1).expand(-1, 2, -1)
        if self.kind == "module":
            return self.attention(h, h, h, need_weights=False)[0].mean(1)
        h = h.unsqueeze(1)
        if self.kind == "context":
            with torch.nn.attention.sdpa_kernel(
                torch.nn.attention.SDPBackend.FLASH_ATTENTION
            ):
                h = nn.functional.scaled_dot_product_attention(h, h, h)
        else:
            h = nn.functional.scaled_dot_product_attention(h, h, h)
        return h.mean((1, 2))


def forms() -> list[bool]:
    backends = torch.backends.cuda
    return [backends.flash_sdp_enabled(), backends.math_sdp_enabled()]


@pytest.mark.parametrize("kind", ["function", "module", "context"])
def test_attention_is_differentiated_twice_and_left_as_it_was(kind: str):
    torch.manual_seed(0)
    model = Attention(kind).double()
    _, _, _, data = mlp()
    params = {n: p for n, p in model.named_parameters() if n.startswith("layer")}
    before = forms()
    A = HessianLinearOperator(model, LOSS, params, data)
    assert forms() == before

    def risk(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in params.values()])
        named = {
            name: part.view_as(p)
            for (name, p), part in zip(params.items(), parts, strict=True)
        }
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            plain = Attention("module" if kind == "module" else "function").double()
            plain.load_state_dict(model.state_dict())
            X, y = (torch.cat(side) for side in zip(*data, strict=True))
            return LOSS(torch.func.functional_call(plain, named, (X,)), y)

    flat = torch.cat([p.detach().flatten() for p in params.values()])
    expected = torch.autograd.functional.hessian(risk, flat)
    torch.testing.assert_close(A.to_dense(), expected)
    assert forms() == before


def test_attentions_switches_are_left_alone_without_attention():
    seen: list[list[bool]] = []
    _, loss, _, data = mlp()
    model = Random(lambda X: seen.append(forms())).double()
    before = forms()
    A = GGNLinearOperator(model, loss, dict(model.named_parameters()), data)
    A @ np.ones(A.shape[1])
    assert seen
    assert all(found == before for found in seen)


# ------------------------------------------------------------------ in place


def test_what_cannot_be_copied_is_named_once():
    model, loss, params, data = mlp()
    model[1].helper = Uncopied()
    with pytest.warns(UserWarning, match=r"attribute `1.helper`, a `Uncopied`") as told:
        A = GGNLinearOperator(model, loss, params, data)
    assert len(told) == 1
    assert "`p.grad is None`" in str(told[0].message)
    assert A.risk.model._held is model
    GGNLinearOperator(model, loss, params, data)  # says no more


def test_a_module_that_has_no_copies_is_named():
    class Alone(nn.Linear):
        def __deepcopy__(self, memo: dict) -> Any:
            raise TypeError("only one")

    model, loss, params, data = mlp()
    model.append(Alone(3, 3).double())
    with pytest.warns(UserWarning, match="submodule `3`, a `Alone`, cannot be copied"):
        GGNLinearOperator(model, loss, params, data)


class Helper:
    def __init__(self) -> None:
        self.lock, self.event = threading.RLock(), threading.Event()


def test_locks_are_shared_with_copies():
    model, loss, params, data = mlp()
    expected = GGNLinearOperator(model, loss, params, data).to_dense()
    model.lock, model[1].helper, model[0].os = threading.Lock(), Helper(), os
    weight = model[0].weight
    A = HessianLinearOperator(model, loss, params, data, cache="off")
    assert A.risk.model._held is None
    found = []
    with beside(lambda: found.append(model[0].weight is weight)):
        for _ in range(10):
            A @ np.ones(A.shape[1])
    assert all(found)
    G = GGNLinearOperator(model, loss, params, data)
    torch.testing.assert_close(G.to_dense(), expected)
