"""Time and memory of Kronecker factors and their products, and what is asked of them.

    python benchmarks/kfac_speed.py [--other PYTHON] [mlp gpt cnn] [--repeats 3]

Times are in units of one gradient that is measured right before, as process CPU time on
one thread: medians of rounds in a process, then of processes. With ``--other``, an
interpreter that has ``curvlinops-for-pytorch``, processes of both packages alternate.
Memory is the growth of the largest resident set in a fresh process.

An EKFAC operator is computed at its first product. Its set-up is that minus the second
product, minus what ``torch.linalg.eigh`` takes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)


class Residual(nn.Module):
    """Two convolutions with batch normalisation and a shortcut."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.short = nn.Identity()
        if (before, stride) != (after, 1):
            self.short = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        return (self.path(x) + self.short(x)).relu()


class Attention(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        B, T, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / (d / self.heads) ** 0.5
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        attended = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, d))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """A small causal language model; classes are on axis 1 of the output."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(1000, 256), nn.Embedding(128, 256)
        self.blocks = nn.Sequential(*(Attention(256, 4) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(256), nn.Linear(256, 1000, bias=False)

    def forward(self, ids):
        places = torch.arange(ids.shape[1]).expand_as(ids)
        h = self.blocks(self.tokens(ids) + self.positions(places))
        return self.head(self.norm(h)).flatten(0, 1)


def problem(name):
    """Return model, data, and the parameters of linear layers and convolutions."""
    torch.manual_seed(0)
    if name == "mlp":
        widths = (784, 512, 512, 10)
        layers = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        data = [(torch.rand(512, 784), torch.randint(10, (512,)))]
    elif name == "cnn":
        body, width = [], 32
        for stage in range(4):
            after = 32 * 2**stage
            body += [Residual(width, after, 1 + (stage > 0)), Residual(after, after, 1)]
            width = after
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, 1, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            *body,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 10),
        ).eval()
        data = [(torch.rand(32, 3, 32, 32), torch.randint(10, (32,)))]
    else:
        model = GPT()
        ids = torch.randint(1000, (4, 128))
        data = [(ids, torch.randint(1000, (512,)))]
    kinds = (nn.Linear, nn.Conv2d)
    modules = [m for m in model.modules() if isinstance(m, kinds)]
    return model, data, [p for m in modules for p in m.parameters()]


def gradient(model, data):
    """Evaluate one gradient."""
    (X, y) = data[0]
    loss = F.cross_entropy(model(X), y)
    torch.autograd.grad(loss, list(model.parameters()))


#: What is asked for: at most a number of gradients, or a part of the other's figure.
#: Of products the other's may be exceeded by the noise of such measurements.
NOISE = 1.02
REQUIRED = {
    ("mlp", "KFAC mc"): 1.75,
    ("gpt", "KFAC mc"): 1.9,
    ("cnn", "KFAC mc"): 2.2,
    ("mlp", "KFAC type-2"): 7.0,
    "EKFAC mc without eigh": lambda other: other / 2,
    "EKFAC type-2 without eigh": lambda other: other / 2,
    "product, vector": lambda other: NOISE * other,
    "product, list": lambda other: NOISE * other,
    "inverse applied": lambda other: NOISE * other,
    "MB, KFAC mc": lambda other: other,
    "MB, KFAC type-2": lambda other: other,
    "MB, EKFAC mc": lambda other: other,
    "MB, EKFAC type-2": lambda other: other,
}
FACTORS = [("KFAC", "mc"), ("KFAC", "type-2"), ("EKFAC", "mc"), ("EKFAC", "type-2")]
#: Too slow where there are many classes or many large factors.
SKIPPED = {
    ("gpt", "KFAC", "type-2"),
    ("gpt", "EKFAC", "type-2"),
    ("cnn", "EKFAC", "type-2"),
}


def operator(name, cls, fisher_type, problem):
    """Return an operator whose factors are not computed yet."""
    import curvlinops

    model, data, params = problem
    options = {"check_deterministic": False, "fisher_type": fisher_type}
    if name == "gpt":
        options["batch_size_fn"] = len
    make = getattr(curvlinops, f"{cls}LinearOperator")
    return make(model, nn.CrossEntropyLoss(), params, data, **options)


def seconds(function):
    """Return the CPU time of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def watch_eigh():
    """Replace ``torch.linalg.eigh`` wherever it was imported; return its times."""
    import curvlinops  # noqa: F401

    eigh, inside = torch.linalg.eigh, []

    def timed(*args, **kwargs):
        start = time.process_time()
        result = eigh(*args, **kwargs)
        inside.append(time.process_time() - start)
        return result

    for module_name, module in list(sys.modules.items()):
        if module_name == "torch.linalg" or module_name.startswith("curvlinops"):
            for key, value in list(vars(module).items()):
                if value is eigh:
                    setattr(module, key, timed)
    return inside


def setup_of_ekfac(name, fisher_type, its_problem, inside):
    """Return the CPU time of an EKFAC set-up, and of its decompositions."""
    inside.clear()
    v = torch.rand(sum(p.numel() for p in its_problem[2]))
    start = time.process_time()
    E = operator(name, "EKFAC", fisher_type, its_problem)
    E @ v
    first = time.process_time() - start
    decompositions = sum(inside)
    return first - seconds(lambda: E @ v), decompositions


def factors_again(A):
    """Compute factors anew, in either package."""
    for attribute in ("_input_covariances", "_gradient_covariances"):
        if isinstance(vars(A).get(attribute), dict):
            vars(A)[attribute] = {}
    A.compute_kronecker_factors()


def measure_times(name, rounds):
    """Print ``[label, median of ratios to the gradient]``, line by line."""
    import curvlinops

    its_problem = problem(name)
    model, data, params = its_problem
    inside = watch_eigh()
    jobs = {}
    for cls, fisher_type in FACTORS:
        if (name, cls, fisher_type) in SKIPPED:
            continue
        label = f"{cls} {fisher_type}"
        if cls == "EKFAC":
            jobs[label] = lambda f=fisher_type: setup_of_ekfac(
                name, f, its_problem, inside
            )
            continue
        A = operator(name, cls, fisher_type, its_problem)
        A.compute_kronecker_factors()
        jobs[label] = lambda A=A: seconds(lambda: factors_again(A))
    K = operator(name, "KFAC", "mc", its_problem)
    inverse = curvlinops.KFACInverseLinearOperator(K, damping=1.0)
    v, parts = torch.rand(K.shape[1]), [torch.rand(p.shape) for p in params]
    jobs["product, vector"] = lambda: seconds(lambda: K @ v)
    jobs["product, list"] = lambda: seconds(lambda: K @ parts)
    jobs["inverse applied"] = lambda: seconds(lambda: inverse @ v)
    ratios = defaultdict(list)
    failed = {}
    for step in range(rounds + 1):
        for label, job in jobs.items():
            if label in failed:
                continue
            unit = seconds(lambda: gradient(model, data))
            try:
                result = job()
            except Exception as error:
                failed[label] = type(error).__name__
                continue
            if step == 0:  # warms up
                continue
            if isinstance(result, tuple):
                total, decompositions = result
                ratios[f"{label} without eigh"].append((total - decompositions) / unit)
                result = total
            ratios[label].append(result / unit)
    for label, values in ratios.items():
        print(json.dumps([label, statistics.median(values)]), flush=True)
    for label, error in failed.items():
        print(json.dumps([label, error]))


def measure_memory(name, cls, fisher_type):
    """Print ``[label, MB]``: by how much the largest resident set grows."""
    its_problem = problem(name)
    torch.linalg.eigh(nn.Linear(3, 3).weight.detach())

    def largest():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    import curvlinops  # noqa: F401

    before = largest()
    A = operator(name, cls, fisher_type, its_problem)
    if cls == "EKFAC":
        A @ torch.zeros(A.shape[1])
    else:
        A.compute_kronecker_factors()
    print(json.dumps([f"MB, {cls} {fisher_type}", largest() - before]))


def results_of(python, *arguments):
    """Yield what a process with one interpreter prints."""
    # PYTHONPATH may lead to this package
    environment = dict(os.environ)
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    command = [python, __file__, "--worker", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        yield json.loads(line)
    if done.returncode:
        print(done.stderr, file=sys.stderr)


def compare(name, pythons, repeats, rounds):
    """Print a table of one problem, one column per interpreter."""
    values = defaultdict(lambda: [[] for _ in pythons])
    for _ in range(repeats):
        for place, python in enumerate(pythons):
            for label, value in results_of(python, "times", name, rounds):
                values[label][place].append(value)
        for cls, fisher_type in FACTORS:
            if (name, cls, fisher_type) in SKIPPED:
                continue
            for place, python in enumerate(pythons):
                for label, value in results_of(
                    python, "memory", name, cls, fisher_type
                ):
                    values[label][place].append(value)
    for label, columns in values.items():
        errors = [next((v for v in c if isinstance(v, str)), None) for c in columns]
        medians = [
            error or (statistics.median(column) if column else None)
            for error, column in zip(errors, columns, strict=True)
        ]
        ours, *others = medians
        other = others[0] if others else None
        bound = REQUIRED.get((name, label), REQUIRED.get(label))
        if callable(bound):
            bound = bound(other) if isinstance(other, float) else None
        verdict = ""
        if bound is not None and isinstance(ours, float):
            verdict = f"<= {bound:.2f}: {'met' if ours <= bound else 'MISSED'}"
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v or "-") for v in medians]
        print(f"{name:4} {label:26}", *(f"{c:>12}" for c in cells), verdict, flush=True)


def main():
    """Parse arguments; measure here and, if asked for, there."""
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--worker"]:
        kind, name, *rest = sys.argv[2:]
        if kind == "times":
            measure_times(name, int(rest[0]))
        else:
            measure_memory(name, *rest)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", default=["mlp", "gpt", "cnn"])
    parser.add_argument("--other", help="interpreter with curvlinops-for-pytorch")
    parser.add_argument("--rounds", type=int, default=5, help="in one process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    args = parser.parse_args()
    pythons = [sys.executable] + ([args.other] if args.other else [])
    print(f"{'':31}", *(f"{c:>12}" for c in ("here", "there")[: len(pythons)]))
    for name in args.problems:
        compare(name, pythons, args.repeats, args.rounds)


if __name__ == "__main__":
    sys.exit(main())
