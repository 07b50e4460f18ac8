"""What a fresh process pays: for importing the package, and for a first product.

    python benchmarks/fresh_process.py [--repeats 7]

Prints the shortest times of several fresh processes, also relative to ``import torch,
scipy.sparse.linalg``, and how many modules are imported. Python's compiled files must
be there: where ``PYTHONDONTWRITEBYTECODE`` is set, and they are not, compiling the
package's source comes on top.
"""

import argparse
import json
import subprocess
import sys

#: Code in a process, step by step; what is timed has a name.
STEPS = {
    "import torch, scipy.sparse.linalg": "import torch, scipy.sparse.linalg",
    "import curvlinops": "import curvlinops",
    "": """
import numpy as np
torch.manual_seed(0)
net = torch.nn.Sequential(
    torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 10)
)
X, y, v = torch.rand(50, 20), torch.arange(50) % 10, np.ones(940, np.float32)
problem = net, torch.nn.CrossEntropyLoss(), list(net.parameters()), [(X, y)]
torch.nn.functional.cross_entropy(net(X), y).backward()
""",
    "first product, MATRIX": "A = curvlinops.MATRIXLinearOperator(*problem); A @ v",
    "second product, MATRIX": "A @ v",
}
MATRICES = "GGN", "Hessian", "KFAC"

#: Runs steps from standard input; writes seconds and numbers of modules.
WORKER = """
import json, sys, time
found, space = {}, {}
for name, code in json.load(sys.stdin).items():
    before, start = len(sys.modules), time.perf_counter()
    exec(code, space)
    found[name] = time.perf_counter() - start, len(sys.modules) - before
print(json.dumps(found))
"""


def measure(matrix: str) -> dict[str, tuple[float, int]]:
    """Return seconds and imported modules of every step, in a process of its own."""
    steps = {k.replace("MATRIX", matrix): v for k, v in STEPS.items()}
    steps = {k: v.replace("MATRIX", matrix) for k, v in steps.items()}
    command = [sys.executable, "-c", WORKER]
    done = subprocess.run(
        command, input=json.dumps(steps), capture_output=True, text=True, check=True
    )
    found: dict[str, tuple[float, int]] = json.loads(done.stdout)
    found.pop("")
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    table: dict[str, tuple[float, int]] = {}
    for matrix in MATRICES:
        for _ in range(repeats):
            for name, (seconds, modules) in measure(matrix).items():
                known, _ = table.get(name, (seconds, modules))
                table[name] = min(known, seconds), modules
    unit, _ = next(iter(table.values()))
    print(f"{'':36}{'seconds':>9}{'ratio':>8}{'modules':>9}")
    for name, (seconds, modules) in table.items():
        print(f"{name:36}{seconds:9.4f}{seconds / unit:8.3f}{modules:9}")
    if sys.dont_write_bytecode:
        print("Compiled files are not written here.")


if __name__ == "__main__":
    main()
