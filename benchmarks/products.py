"""Measure curvature matrices' products, solvers and spectra against other packages.

Run ``python benchmarks/products.py --other 3.0.1=PYTHON --output DIR`` with an
interpreter that has this package; ``PYTHON`` is one that has another contender
(another version of curvlinops, or pytorch-hessian-eigenthings). Every contender works
in a process of its own, on the same weights and data, with one thread; they take turns
in rotating order, one repetition at a time. Results are compared before they are
timed. Process CPU time counts, with ``--device cuda`` the time of day. Writes
``products.json`` and ``products.png``; ``tables.py`` makes tables of the former.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
from problems import MATRICES, PROBLEMS
from tasks import Products
from tqdm import tqdm

TIMED = [name for name in vars(Products) if name.startswith("time_")]
#: Calls shorter than this are repeated within one measurement.
SHORTEST = 0.1
#: Seconds of CPU time beyond which one further turn is enough.
LONG = 3.0
#: Largest error, relative to the norm, of a result that counts as right.
TOLERANCE = {"product": 1e-4, "block": 1e-4, "cg": 5e-2, "eigsh": 1e-2, "density": 0.1}
#: Name, interpreter, and options for the operators.
Contender = tuple[str, str, dict[str, Any]]


class Worker:
    """A contender's process."""

    def __init__(
        self, name: str, python: str, frees_at_once: bool = False, **options: Any
    ) -> None:
        self.name = name
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if frees_at_once:
            # What glibc keeps for later would count as used, by chance.
            env["MALLOC_MMAP_THRESHOLD_"] = "65536"
        if python != sys.executable:
            env.pop("PYTHONPATH", None)
        script = Path(__file__).with_name("tasks.py")
        self.process = subprocess.Popen(
            [python, str(script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr if os.environ.get("VERBOSE") else subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return {"error": f"the process of {self.name} has ended"}

    def __enter__(self) -> Self:
        """Return the worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the computer, and how busy it is."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((n.split(": ")[1] for n in lines if n.startswith("model name")), cpu)
    if device != "cpu":
        import torch

        cpu = f"{torch.cuda.get_device_name(device)} beside {cpu}"
    return {
        "device": device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()}, {platform.machine()}",
        "load": os.getloadavg(),
        "threads": 1,
    }


def relative_error(result: Path, reference: Path) -> float:
    """Return the relative distance of two saved arrays."""
    a, b = np.load(result).ravel(), np.load(reference).ravel()
    if a.shape != b.shape:
        return float("nan")
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class Case:
    """One matrix of one problem: the workers that have it, and what they answered."""

    def __init__(self, workers: list[Worker], name: str, matrix: str, dir: Path):
        self.name, self.matrix, self.dir = name, matrix, dir
        self.replies = {w.name: w.ask(setup=[name, matrix]) for w in workers}
        self.workers = [w for w in workers if "error" not in self.replies[w.name]]
        known = {r["checksum"] for r in self.replies.values() if "checksum" in r}
        if len(known) != 1:
            raise RuntimeError(f"{name}: weights or data differ: {self.replies}")
        self.rows: list[dict[str, Any]] = []
        self.failed = False

    def reference(self, task: str) -> Path:
        """Return the file that a task's results are compared with."""
        kind = task.split("_")[1]
        path = self.dir / f"{kind if kind in ('cg', 'eigsh', 'density') else 'v'}.npy"
        if path.exists():
            return path
        if kind == "density":
            np.save(path, [1.0])
        elif path.name == "v.npy":
            self.workers[0].ask(reference=True, save=str(path))
        else:
            checked = "check_cg" if kind == "cg" else task
            self.workers[0].ask(task=checked, number=1, save=str(path))
        return path

    def measure(self, task: str, repeats: int, limit: float) -> None:
        """Check a task's results, then time it in rotating order."""
        gradient = task == "time_gradient"
        reference = None if gradient else self.reference(task)
        tolerance = TOLERANCE[task.split("_")[1].rstrip("s")] if not gradient else 0
        rows, workers, total = {}, list(self.workers), 0.0
        for worker in list(workers):
            if worker.name == "cache off" and not task.startswith("time_product"):
                workers.remove(worker)
                continue
            if gradient and worker is not self.workers[0]:
                workers.remove(worker)
                continue
            save = self.dir / "result.npy"
            # Many steps of CG amplify rounding errors: ten are compared.
            checked = "check_cg" if "cg" in task else task
            first = worker.ask(task=checked, number=1, save=str(save))
            if checked != task and "error" not in first:
                first = worker.ask(task=task, number=1)
            row = {
                "problem": self.name,
                "matrix": self.matrix,
                "task": task,
                "contender": worker.name,
            }
            self.rows.append(row)
            if "error" in first:
                row["failed"] = first["error"]
                workers.remove(worker)
                if worker.name == "ours" and "too many columns" not in first["error"]:
                    tqdm.write(f"Our own task failed: {row}", file=sys.stderr)
                    self.failed = True
                continue
            if reference is not None:
                row["error"] = relative_error(save, reference)
                row["right"] = bool(row["error"] <= tolerance)
                if not row["right"] and worker.name == "ours":
                    tqdm.write(f"Our own result is wrong: {row}", file=sys.stderr)
                    self.failed = True
                    workers.remove(worker)
                    continue
            # A long call that has been checked counts as a turn.
            long = first["time"] > LONG
            row |= {key: [first[key]] if long else [] for key in ("time", "wall")}
            row["laps"] = []
            row["number"] = max(1, min(500, int(SHORTEST / max(first["time"], 1e-6))))
            rows[worker.name] = row
            total += max(first["time"], SHORTEST)
        affordable = max(int(limit / total), 1 if total > LONG else 2) if rows else 0
        for turn in range(min(repeats, affordable)):
            start = turn % len(workers)
            for worker in workers[start:] + workers[:start]:
                row = rows[worker.name]
                reply = worker.ask(task=task, number=row["number"])
                for key in ("time", "wall"):
                    row[key].append(reply[key])
                if reply["laps"] and task == "time_products_20":
                    row["laps"].append(reply["laps"])


def set_bounds(case: Case) -> None:
    """Tell everybody the bounds of the spectrum, with some room for the kernel."""
    save = case.dir / "eigsh.npy"
    if not save.exists():
        case.workers[0].ask(task="time_eigsh_10", number=1, save=str(save))
    top = 1.05 * float(np.abs(np.load(save)).max())
    for worker in case.workers:
        worker.ask(bounds=[-top if case.matrix == "hessian" else -0.1 * top, top])


def memory(
    contenders: list[Contender], name: str, matrix: str, columns: int = 1
) -> list[dict[str, Any]]:
    """Return the peak memory of building an operator and multiplying repeatedly."""
    rows = []
    task, arguments = "peakmem_products", []
    if columns > 1:
        task, arguments = "peakmem_block", [columns]
    jobs = [(task, arguments, *c) for c in contenders]
    jobs.append(("peakmem_gradient", [], *contenders[0]))
    for task, arguments, contender, python, options in jobs:
        with Worker(contender, python, True, **options) as worker:
            worker.ask(setup=[name, matrix])
            reply = worker.ask(task=task, number=1, arguments=arguments)
        row = {"problem": name, "matrix": matrix, "task": task, "contender": contender}
        failed = {"failed": reply["error"]} if "error" in reply else {}
        rows.append({**row, "bytes": reply.get("bytes"), **failed})
    return rows


def save_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw how many times as fast the first contender is as the second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    times = {
        (r["problem"], r["matrix"], r["task"], r["contender"]): median(r["time"])
        for r in rows
        if r.get("time")
    }
    others = list(dict.fromkeys(k[3] for k in times if k[3] not in ("ours",)))
    others = [name for name in others if name != "cache off"]
    problems = list(dict.fromkeys(k[0] for k in times))
    tasks = [t for t in TIMED if t != "time_gradient"]
    if not others:
        return
    figure, axes = plt.subplots(
        len(MATRICES), len(others), figsize=(7 * len(others), 9), squeeze=False
    )
    for i, matrix in enumerate(MATRICES):
        for j, other in enumerate(others):
            axis = axes[i, j]
            for n, name in enumerate(problems):
                gains = [
                    times.get((name, matrix, t, other), np.nan)
                    / times.get((name, matrix, t, "ours"), np.nan)
                    for t in tasks
                ]
                width = 0.8 / len(problems)
                axis.bar(np.arange(len(tasks)) + n * width, gains, width, label=name)
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set_yscale("log")
            axis.set_title(f"{matrix}: time of {other} / ours")
            axis.set_xticks(np.arange(len(tasks)) + 0.4)
            names = [t.removeprefix("time_") for t in tasks]
            axis.set_xticklabels(names, rotation=35, ha="right", fontsize=8)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def others_of(values: list[str], **options: Any) -> list[Contender]:
    """Split ``NAME=PYTHON`` (or just ``PYTHON``)."""
    pairs = [v.split("=", 1) if "=" in v else ["other", v] for v in values]
    return [(name, python, options) for name, python in pairs]


def arguments() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--problems", nargs="+", default=list(PROBLEMS), metavar="NAME")
    add("--tasks", nargs="+", default=[*TIMED, "peakmem"], metavar="NAME")
    add("--matrices", nargs="+", default=list(MATRICES), choices=list(MATRICES))
    add("--repeats", type=int, default=9, help="turns of every contender")
    add(
        "--limit",
        type=float,
        default=90.0,
        help="seconds per task that set the number of turns",
    )
    add("--quick", action="store_true", help="two turns, no more than 5 s per task")
    add("--device", default="cpu", help="cpu, or a GPU such as cuda")
    add("--other", action="append", default=[], metavar="NAME=PYTHON")
    add("--output", type=Path, default=Path("."), metavar="DIR")
    return parser


def main() -> int:
    """Measure everything; return 1 if a result of ours was wrong or absent."""
    options = arguments().parse_args()
    repeats, limit = (2, 5.0) if options.quick else (options.repeats, options.limit)
    contenders: list[Contender] = [
        ("ours", sys.executable, {"device": options.device}),
        *others_of(options.other, device=options.device),
    ]
    everybody = list(contenders)
    if options.device == "cpu":
        everybody.append(("cache off", sys.executable, {"cache": "off"}))
    options.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(options.device),
        "versions": {},
        "problems": {},
        "results": [],
    }
    wanted = {"time_" + t.removeprefix("time_") for t in options.tasks}
    if options.device == "cpu":
        wanted.discard("time_product_numpy")  # what `time_product` is there
    timed = [t for t in TIMED if t in wanted]
    if unknown := wanted - {*TIMED, "time_peakmem"}:
        raise SystemExit(f"There are no tasks {unknown}; known: {TIMED} and peakmem.")
    cases = [(p, m) for p in options.problems for m in options.matrices]
    failed = False
    with tqdm(total=len(cases) * (len(timed) + 1)) as bar:
        for name, matrix in cases:
            workers = [Worker(n, p, **o) for n, p, o in everybody]
            with tempfile.TemporaryDirectory(dir=options.output) as folder:
                case = Case(workers, name, matrix, Path(folder))
                first = case.replies["ours"]
                about = PROBLEMS[name].about if name in PROBLEMS else name
                report["problems"][name] = {"about": about, "dim": first["dim"]}
                for contender, reply in case.replies.items():
                    report["versions"].setdefault(contender, reply.get("versions"))
                for task in timed:
                    bar.set_description(f"{name} {matrix} {task}")
                    if task == "time_density":
                        set_bounds(case)
                    case.measure(task, repeats, limit)
                    bar.update()
            for worker in workers:
                worker.__exit__()
            report["results"] += case.rows
            failed |= case.failed
            bar.set_description(f"{name} {matrix} memory")
            if "peakmem" in options.tasks:
                report["results"] += memory(everybody, name, matrix)
            bar.update()
            path = options.output / "products.json"
            path.write_text(json.dumps(report, indent=1) + "\n")
    save_picture(report["results"], options.output / "products.png")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
