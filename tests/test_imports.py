"""What is imported: nothing heavy with the package, no compiler with a product.

By what is imported, in fresh processes: times differ between machines.
"""

import subprocess
import sys

#: Packages that take longer to import than all of this one.
HEAVY = ["matplotlib", "mpmath", "pandas", "scipy.stats", "sklearn", "sympy"]
#: Torch's compiler.
COMPILER = ["torch._dynamo", "torch._export", "torch._inductor", "torch.fx"]

#: What a fresh process has imported in any case.
START = "import sys, torch, scipy.sparse.linalg; known = set(sys.modules)"
#: Names what has been imported since, on a line.
NEWS = "print(*sorted(set(sys.modules) - known))"

#: A first product with every kind of matrix, each followed by what it has imported.
PRODUCTS = """
import numpy as np
from torch import nn
import curvlinops
known |= set(sys.modules)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
data = [(torch.rand(6, 4), torch.arange(6) % 3), (torch.rand(2, 4), torch.arange(2))]
params = list(model.parameters())
def error(f, y):
    return (f.logsumexp(1) - f[:, 0] * y).mean()
for name in sys.argv[1:]:
    loss = [] if "Jacobian" in name else [nn.CrossEntropyLoss()]
    name, *of_ones_own = name.split()
    loss = [error] if of_ones_own else loss
    A = getattr(curvlinops, name + "LinearOperator")(model, *loss, params, data)
    assert (A @ np.ones(A.shape[1])).any()
    print(*sorted(set(sys.modules) - known))
"""
MATRICES = [
    *["GGN", "Hessian", "FisherMC", "EF", "GGNDiagonal", "Jacobian"],
    *["TransposedJacobian", "Gram", "KFAC", "EKFAC", "KFOC"],
    *["GGN (own loss)", "Hessian (own loss)"],
]


def run(*lines, arguments=()):
    """Run code in a fresh process; return the words of every line that it prints."""
    command = [sys.executable, "-c", "\n".join(lines), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def within(modules, packages):
    """Return the modules that are some packages, or inside of them."""
    return [m for m in modules if any(f"{m}.".startswith(f"{p}.") for p in packages)]


def test_package_imports_nothing_heavy():
    (found,) = run(START, "import curvlinops", NEWS)
    assert "curvlinops.risk" in found
    assert within(found, [*HEAVY, *COMPILER]) == []
    others = {m.split(".")[0] for m in found} - {"curvlinops"} - sys.stdlib_module_names
    assert others <= {"tqdm", "scipy"}


def test_first_products_import_no_compiler():
    found = run(START, PRODUCTS, arguments=MATRICES)
    heavy = [within(modules, [*HEAVY, *COMPILER]) for modules in found]
    assert dict(zip(MATRICES, heavy, strict=True)) == {name: [] for name in MATRICES}


def test_rules_bite():
    compiler = "x = torch.ones(2, requires_grad=True)"
    compiler += "; torch.autograd.grad(x**2, x, torch.ones(2))"
    first, second = run(START, "import scipy.stats", NEWS, compiler, NEWS)
    assert "scipy.stats" in within(first, HEAVY)
    assert within(first, COMPILER) == []
    assert "torch.fx.experimental.symbolic_shapes" in within(second, COMPILER)
