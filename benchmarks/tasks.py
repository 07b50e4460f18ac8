"""What is measured, and the process that does it when told to.

Run by ``products.py`` and ``growth.py``, one process per contender, in whichever
interpreter has that contender's package; every line on standard input is a command,
every line on standard output its answer, both JSON. Methods of :class:`Products` are
named as in asv: ``time_*`` is timed, ``peakmem_*`` measured in a fresh process.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import resource
import sys
import time
import traceback
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy
import torch
from problems import MATRICES, PROBLEMS, mean_gradient, problem, reference_product
from scipy.sparse.linalg import LinearOperator, cg, eigsh

DAMPING = 1e-2
LANCZOS_STEPS = 32


class Curvlinops:
    """Operators of a package named curvlinops: this one, or another version.

    Where they are SciPy operators, operands are NumPy arrays and SciPy gets the
    operator itself; else operands are tensors (that package's fastest road) and SciPy
    gets what ``to_scipy()`` returns.
    """

    distributions = ("curvlinops-scipy", "curvlinops-for-pytorch")

    def __init__(self, **options: Any) -> None:
        import curvlinops

        self.module, self.options = curvlinops, options

    def operator(self, matrix: str, model: Any, params: Any, data: Any) -> Any:
        """Build an operator, without the check for determinism."""
        cls = getattr(self.module, MATRICES[matrix])
        loss = torch.nn.CrossEntropyLoss()
        return cls(model, loss, params, data, check_deterministic=False, **self.options)

    def scipy(self, A: Any) -> Any:
        """Return the operator for SciPy."""
        return A if isinstance(A, LinearOperator) else A.to_scipy()

    def operand(self, A: Any, x: np.ndarray, device: str) -> Any:
        """Return an operand of the kind that the operator multiplies fastest."""
        if device == "cpu" and isinstance(A, LinearOperator):
            return x
        return torch.from_numpy(x).to(device)

    def eigsh(self, A: Any, k: int, v0: np.ndarray) -> Any:
        """Return the eigenvalues of largest magnitude."""
        S = self.scipy(A)
        v0 = v0.astype(S.dtype)
        return eigsh(S, k=k, v0=v0, tol=1e-4, return_eigenvectors=False)

    def cg(self, A: Any, b: np.ndarray, iterations: int) -> np.ndarray:
        """Solve with a damped matrix."""
        S = self.scipy(A)
        delta = S.dtype.type(DAMPING)
        damped = LinearOperator(S.shape, lambda x: S @ x + delta * x, dtype=S.dtype)
        return cg(damped, b.astype(S.dtype), rtol=0.0, maxiter=iterations)[0]

    def density(self, A: Any, bounds: tuple[float, float]) -> Any:
        """Return a spectral density and its grid."""
        from curvlinops.papyan2020traces import spectrum

        return spectrum.lanczos_approximate_spectrum(
            A, LANCZOS_STEPS, boundaries=bounds, kappa=1.04
        )


class Eigenthings(Curvlinops):
    """Operators of pytorch-hessian-eigenthings, which are not SciPy's."""

    distributions = ("hessian-eigenthings",)

    def __init__(self, **options: Any) -> None:
        import hessian_eigenthings

        self.module, self.options = hessian_eigenthings, options

    def operator(self, matrix: str, model: Any, params: Any, data: Any) -> Any:
        """Build an operator."""
        h, loss = self.module, torch.nn.CrossEntropyLoss()
        if matrix == "hessian":
            return h.HessianOperator(model, data, h.supervised_loss(loss))
        if matrix == "ef":
            terms = h.supervised_per_sample_loss(loss)
            return h.EmpiricalFisherOperator(model, data, terms)
        of_output = h.supervised_loss_of_output(loss)
        return h.GGNOperator(model, data, h.supervised_forward, of_output)

    def eigsh(self, A: Any, k: int, v0: np.ndarray) -> Any:
        """Run the package's own Lanczos method."""
        return self.module.lanczos(A, k=k, tol=1e-4).eigenvalues

    def density(self, A: Any, bounds: tuple[float, float]) -> Any:
        """Run the package's own density."""
        result = self.module.spectral_density(
            A, num_runs=1, lanczos_steps=LANCZOS_STEPS, num_grid_points=1024
        )
        return result.grid, result.density


class Products:
    """Tasks for one matrix of one problem."""

    params = (list(PROBLEMS), list(MATRICES))
    param_names = ("problem", "matrix")

    def __init__(self, contender: Curvlinops, device: str = "cpu") -> None:
        self.contender, self.device = contender, device

    def setup(self, name: str, matrix: str) -> None:
        """Build the problem and operands; no operator yet."""
        self.A = self.model = self.data = None
        gc.collect()
        self.name, self.matrix = name, matrix
        self.problem = problem(name)
        self.model, self.data = self.problem.build()
        self.model.to(self.device)
        self.data = [(X.to(self.device), y.to(self.device)) for X, y in self.data]
        self.parameters = list(self.model.parameters())
        self.dim = sum(p.numel() for p in self.parameters)
        self.x = vector(self.dim)
        self.bounds = (-1.0, 1.0)
        self.laps: list[float] = []

    def clock(self) -> float:
        """Return this process's CPU time in seconds; with a GPU, the time of day."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def fresh(self) -> Any:
        """Return an operator that has not multiplied anything yet."""
        return self.contender.operator(
            self.matrix, self.model, self.parameters, self.data
        )

    def settled(self) -> Any:
        """Return one operator that has multiplied enough, for warm tasks."""
        if self.A is None:
            self.A = self.fresh()
            self.settle(self.A)
        return self.A

    def settle(self, A: Any) -> Any:
        """Multiply until nothing changes any more; return the last product."""
        risk = getattr(A, "risk", None)
        keeps = risk is not None and risk.cache != "off"
        for number in range(self.problem.warmup if keeps else 3):
            result = self.multiply(A)
            if number < 2 or not self.problem.settles_by_itself or not keeps:
                continue
            batches = risk._recordings.values()
            if all(b.settled(key) for b in batches for key in b._routes):
                return self.multiply(A)
        return result

    def multiply(self, A: Any) -> Any:
        return A @ self.contender.operand(A, self.x, self.device)

    def block(self, K: int) -> Any:
        """Multiply ``K`` columns, of which the last is the usual vector."""
        if self.problem.max_columns < K:
            raise ValueError(f"{K} columns are too many for this problem")
        if getattr(self, "X", np.empty((0, 0))).shape != (self.dim, K):
            rng = np.random.default_rng(2)
            self.X = rng.standard_normal((self.dim, K), dtype=np.float32)
            self.X[:, -1] = self.x
        A = self.settled()
        return (A @ self.contender.operand(A, self.X, self.device))[:, -1]

    def time_gradient(self) -> Any:
        grads = mean_gradient(self.model, self.data, self.parameters)
        return torch.cat([g.flatten() for g in grads])

    def time_product(self) -> Any:
        return self.multiply(self.settled())

    def time_product_numpy(self) -> Any:
        """Multiply an array, as SciPy does."""
        S = self.contender.scipy(self.settled())
        return S @ self.x.astype(S.dtype, copy=False)

    def time_product_cold(self) -> Any:
        return self.multiply(self.fresh())

    def time_products_20(self) -> Any:
        """Build an operator and multiply 20 times; notes the time of every step."""
        times = [self.clock()]
        A = self.fresh()
        for _ in range(20):
            times.append(self.clock())
            result = self.multiply(A)
        times.append(self.clock())
        self.laps = np.diff(times).tolist()
        return result

    def time_block_4(self) -> Any:
        return self.block(4)

    def time_block_16(self) -> Any:
        return self.block(16)

    def time_block_64(self) -> Any:
        return self.block(64)

    def check_cg(self) -> Any:
        return self.contender.cg(self.settled(), self.x, 10)

    def time_cg_50(self) -> Any:
        return self.contender.cg(self.settled(), self.x, 50)

    def time_cg_50_cold(self) -> Any:
        return self.contender.cg(self.fresh(), self.x, 50)

    def time_eigsh_10(self) -> Any:
        return np.sort(self.contender.eigsh(self.settled(), 10, self.x))

    def time_eigsh_10_cold(self) -> Any:
        return np.sort(self.contender.eigsh(self.fresh(), 10, self.x))

    def time_density(self) -> Any:
        """Return the density's integral, which is one whatever the start vectors."""
        grid, density = self.contender.density(self.settled(), self.bounds)
        return [float(torch.trapezoid(torch.as_tensor(density), torch.as_tensor(grid)))]

    def peakmem_gradient(self) -> Any:
        return self.time_gradient()

    def peakmem_products(self) -> Any:
        return self.settle(self.fresh())

    def peakmem_block(self, K: int) -> Any:
        return self.block(K)


def vector(dim: int) -> np.ndarray:
    """Return the operand of all single products."""
    return np.random.default_rng(1).standard_normal(dim, dtype=np.float32)


def peak_bytes() -> int:
    """Return the largest resident memory since the last :func:`reset_peak`."""
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read()).group(1))


def reset_peak() -> int:
    """Forget the peak where the system allows it; return resident memory."""
    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        return peak_bytes()
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def versions(contender: Curvlinops) -> dict[str, str]:
    """Return the versions of everything that matters."""
    found = {"python": platform.python_version()}
    found |= {m.__name__: str(m.__version__) for m in (np, scipy, torch)}
    for name in contender.distributions:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
            return found
    module = contender.module
    found[module.__name__] = getattr(module, "__version__", "unknown")
    return found


def answer(suite: Products, command: dict[str, Any]) -> dict[str, Any]:
    """Execute a command."""
    if "setup" in command:
        suite.setup(*command["setup"])
        tensors = [*suite.parameters, *(t for pair in suite.data for t in pair)]
        sums = [float(t.detach().cpu().double().sum()) for t in tensors]
        return {
            "dim": suite.dim,
            "checksum": sum(sums),
            "versions": versions(suite.contender),
        }
    if "bounds" in command:
        suite.bounds = tuple(command["bounds"])
        return {}
    if "reference" in command:
        v, build = torch.from_numpy(suite.x), suite.problem.build
        with open(command["save"], "wb") as file:
            np.save(file, reference_product(suite.matrix, build, v).numpy())
        return {}
    work = getattr(suite, command["task"])
    arguments = command.get("arguments", ())
    if command["task"].startswith("peakmem_"):
        # Libraries load code when first used.
        rehearsal = Products(suite.contender, suite.device)
        rehearsal.setup(suite.name, suite.matrix)
        getattr(rehearsal, command["task"])(*arguments)
        del rehearsal
    task = command["task"]
    if task in ("time_product", "time_product_numpy") or "block" in task:
        suite.settled()  # not timed
    peak = reset_peak() if command["task"].startswith("peakmem_") else 0
    start, wall = suite.clock(), time.perf_counter()
    for _ in range(command["number"]):
        result = work(*arguments)
    spent, wall = suite.clock() - start, time.perf_counter() - wall
    if peak:
        peak = peak_bytes() - peak
    if "save" in command:
        array = result.detach().cpu().numpy() if torch.is_tensor(result) else result
        with open(command["save"], "wb") as file:
            np.save(file, np.asarray(array))
    n = command["number"]
    return {"time": spent / n, "wall": wall / n, "bytes": peak, "laps": suite.laps}


def main() -> None:
    """Answer commands until the input ends."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # results are compared
    # What libraries print must not end up between the answers.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    device = options.pop("device", "cpu")
    kind = Eigenthings if find_spec("hessian_eigenthings") else Curvlinops
    suite = Products(kind(**options), device)
    for line in sys.stdin:
        try:
            reply = answer(suite, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        out.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
