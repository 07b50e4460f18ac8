"""Refuse to run from a folder that two distributions share.

``curvlinops-scipy`` (this package) and ``curvlinops-for-pytorch`` install the same
import name. In one site-packages folder the later one overwrites files of the earlier,
and what remains is a mixture that fails far from its cause. Importing this module runs
the check; it must be the first thing the package imports.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import Distribution
from pathlib import Path

OURS = "curvlinops-scipy"
THEIRS = "curvlinops-for-pytorch"

#: A module of every release of the other package, and of none of this one.
FOREIGN_FILE = "gradient_moments.py"


def check(
    package_dir: Path,
    distributions: Callable[..., Iterable[Distribution]],
) -> None:
    """Check that the files of the running package are of one distribution.

    Parameters
    ----------
    package_dir :
        Folder of the running package.
    distributions :
        Finds the installed distributions of a name, called as
        ``distributions(name=...)``, like :func:`importlib.metadata.distributions`.

    Raises
    ------
    ImportError
        If the other package is, or has left files, in ``package_dir``.

    Warns
    -----
    ImportWarning
        If both distributions are installed in one environment, in different folders
        (an editable install of one of them): the order of ``sys.path`` decides which
        one an ``import curvlinops`` finds.

    Notes
    -----
    Costs one file lookup and one search of ``sys.path`` for the other distribution.
    The same name in different environments (a virtual environment over the system's
    packages) is no conflict: the inner one always comes first.
    """
    theirs = list(distributions(name=THEIRS))
    mixed = any(_installs_into(package_dir, other) for other in theirs)
    if mixed or (package_dir / FOREIGN_FILE).exists():
        raise ImportError(
            f"{package_dir} holds files of two distributions: {OURS} and {THEIRS} "
            "both install the package 'curvlinops', and the later one has overwritten "
            "files of the earlier. Uninstall both, then reinstall this one:\n"
            f"    pip uninstall -y {THEIRS} {OURS}\n"
            f"    pip install {OURS}\n"
            f"If {package_dir} is still there after the first command, delete it."
        )
    if not theirs:
        return
    shared = {_root(d) for d in theirs} & {_root(d) for d in distributions(name=OURS)}
    for environment in shared:
        warnings.warn(
            f"{OURS} and {THEIRS} are both installed in {environment}. This process "
            f"runs {package_dir}, but the order of sys.path decides which of the two "
            f"'import curvlinops' finds: pip uninstall -y {THEIRS}",
            ImportWarning,
            stacklevel=2,
        )


def _root(distribution: Distribution) -> Path:
    """Return the folder that a distribution was installed into."""
    return Path(str(distribution.locate_file(""))).resolve()


def _installs_into(package_dir: Path, distribution: Distribution) -> bool:
    """Whether a distribution's files lie in ``package_dir``.

    An editable install records no file of the package; a distribution without a record
    is taken to have installed it.
    """
    record = distribution.read_text("RECORD")
    return _root(distribution) == package_dir.resolve().parent and (
        record is None or f"{package_dir.name}/__init__.py" in record
    )


check(Path(__file__).parent, importlib.metadata.distributions)
