"""Time of Kronecker factors and their products, in units of one gradient.

    python benchmarks/kfac_speed.py [--other PYTHON] [mlp cnn gpt] [--rounds 5]

Alternatives are interleaved, and process CPU time on one thread is compared. With
``--other``, an interpreter that has ``curvlinops-for-pytorch``, the same figures of
that package follow, each in units of the gradient that its own process measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
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


def build(name, cls, fisher_type):
    """Return a function that computes all factors, and the operator."""
    import curvlinops

    model, data, params = problem(name)
    options = {"check_deterministic": False, "fisher_type": fisher_type}
    if name == "gpt":
        options["batch_size_fn"] = len
    operator = getattr(curvlinops, cls)
    A = operator(model, nn.CrossEntropyLoss(), params, data, **options)

    def compute():
        if cls == "EKFACLinearOperator":  # all of it is computed at the first product
            E = operator(model, nn.CrossEntropyLoss(), params, data, **options)
            return E @ torch.zeros(E.shape[1])
        for attribute in ("_input_covariances", "_gradient_covariances"):
            if isinstance(vars(A).get(attribute), dict):
                vars(A)[attribute] = {}
        A.compute_kronecker_factors()

    return compute, A


def seconds(function):
    """Return the CPU time of a call, and that without ``torch.linalg.eigh``."""
    eigh, inside = torch.linalg.eigh, []

    def timed(*args, **kwargs):
        start = time.process_time()
        result = eigh(*args, **kwargs)
        inside.append(time.process_time() - start)
        return result

    torch.linalg.eigh = timed
    try:
        start = time.process_time()
        function()
        total = time.process_time() - start
    finally:
        torch.linalg.eigh = eigh
    return total, total - sum(inside)


def measure(names, rounds, jobs):
    """Print medians of ratios to the gradient next to them."""
    for name in names:
        model, data, _ = problem(name)
        rows = {}
        for label, cls, fisher_type in jobs:
            if fisher_type == "type-2" and name == "gpt":
                continue
            compute, A = build(name, cls, fisher_type)
            try:
                compute()
            except Exception as error:
                print(json.dumps([name, label, type(error).__name__]), flush=True)
                continue
            rows[label] = compute
            if label == "KFAC mc":
                v = torch.rand(A.shape[1])
                rows["product"] = lambda A=A, v=v: A @ v
                A @ v
        gradient(model, data)
        ratios = {label: [] for label in rows}
        for _ in range(rounds):
            for label, function in rows.items():
                unit, _ = seconds(lambda m=model, d=data: gradient(m, d))
                total, rest = seconds(function)
                ratios[label].append(total / unit)
                if "EKFAC" in label:
                    ratios.setdefault(f"{label} without eigh", []).append(rest / unit)
        for label, values in ratios.items():
            result = [name, label, round(statistics.median(values), 3)]
            print(json.dumps(result), flush=True)


JOBS = {
    "kfac": ("KFAC mc", "KFACLinearOperator", "mc"),
    "type-2": ("KFAC type-2", "KFACLinearOperator", "type-2"),
    "ekfac": ("EKFAC mc", "EKFACLinearOperator", "mc"),
}


def main():
    """Parse arguments; measure here and, if asked for, there."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", default=["mlp", "gpt", "cnn"])
    parser.add_argument("--other", help="interpreter with curvlinops-for-pytorch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", default="kfac,type-2", help=f"of {', '.join(JOBS)}")
    args = parser.parse_args()
    measure(args.problems, args.rounds, [JOBS[job] for job in args.jobs.split(",")])
    if args.other:
        print(f"-- {args.other}", flush=True)
        rest = [*args.problems, "--rounds", str(args.rounds), "--jobs", args.jobs]
        # PYTHONPATH may lead to this package
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run([args.other, __file__, *rest], check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())
