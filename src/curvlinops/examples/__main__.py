"""List the pages of the gallery: ``python -m curvlinops.examples``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from curvlinops.examples._gallery import PAGES, Seconds, listing, measure


def main(argv: Sequence[str] | None = None) -> None:
    """List all pages, or measure how long some take."""
    parser = argparse.ArgumentParser(
        prog="python -m curvlinops.examples", description=__doc__
    )
    parser.add_argument(
        "--measure",
        nargs="*",
        metavar="NAME",
        help="run these pages (default: all) and print how long they take",
    )
    names = parser.parse_args(argv).measure
    if names is None:
        print(listing())
        return
    if unknown := sorted(set(names) - set(PAGES)):
        parser.error(f"no pages: {', '.join(unknown)}; there are {', '.join(PAGES)}")
    for name in names or PAGES:
        seconds = Seconds(measure(name), measure(name, "--quick"))
        row = f'"{name}": Seconds({seconds.full:.0f}, {seconds.quick:.1f}),'
        print(row, flush=True)


if __name__ == "__main__":
    main()
