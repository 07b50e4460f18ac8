"""Data whose batches differ from pass to pass, and what that costs."""

from __future__ import annotations

import warnings
from typing import Any

from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from curvlinops._once import told_before


def described(data: Any) -> str:
    """Say what the data are, as far as that tells why their batches differ."""
    sampler = _sampler(data)
    if isinstance(sampler, RandomSampler) and not sampler.replacement:
        return "a `DataLoader` with `shuffle=True`"
    if sampler is not None:
        return f"a `DataLoader` with a `{type(sampler).__name__}`"
    return f"a `{type(data).__name__}`"


def shuffles(data: Any) -> bool:
    """Whether data are a loader that is known to give them in random order."""
    return isinstance(_sampler(data), (RandomSampler, WeightedRandomSampler))


def why_passes_differ(data: Any) -> str:
    """Say why passes over some data have other losses, and what to do about it."""
    sampler = _sampler(data)
    if _draws(sampler):
        return (
            f"the data differs between the passes: its `{type(sampler).__name__}` draws"
            " other data in each. Pass `list(loader)`, or a loader without it."
        )
    if isinstance(sampler, RandomSampler) and (left := _left_out(data)):
        return (
            "the data differs between the passes: a `DataLoader` with `shuffle=True` "
            f"and `drop_last=True` leaves out {left} data in each, never the same. Set "
            "`shuffle=False`, or `drop_last=False`, or pass `list(loader)`."
        )
    return (
        "the data differs between the passes. Is this a shuffling `DataLoader` with "
        "`drop_last=True`, or random augmentation? Set `shuffle=False`, or pass "
        "`list(loader)`."
    )


def warn_about_shuffling(data: Any) -> None:
    """Warn, once for these data, of what it costs that their batches differ."""
    if told_before(data, warn_about_shuffling):
        return
    warnings.warn(
        f"The batches of {described(data)} differ from pass to pass, so nothing can be "
        "kept from one product to the next: each reads the data, evaluates the model "
        "and builds its graphs anew, which takes several times as long as a product "
        f"that reuses them. {_cure(data)}; or larger batches, of which there are fewer "
        "to start.",
        stacklevel=2,
    )


def why_nothing_is_kept(data: Any, shuffled: bool, repeats: bool, cache: Any) -> str:
    """Say why products keep nothing for later ones; nothing if they may."""
    if cache == "off":
        return 'Nothing is kept, since `cache` is "off".'
    if shuffled or (not repeats and shuffles(data)):
        return (
            f"Nothing is kept, since the batches of {described(data)} differ from pass "
            f"to pass. {_cure(data)}."
        )
    if not repeats:
        return (
            f"Nothing is kept, since it is not known whether {described(data)} gives "
            "the same batches in every pass: leave `check_deterministic` on, or pass "
            "`list(loader)`."
        )
    return ""


def _cure(data: Any) -> str:
    """Say what gives the same batches in every pass."""
    if _draws(sampler := _sampler(data)):
        what = f"The `{type(sampler).__name__}` draws other data in each, of which the "
        return what + "matrix is: pass `list(loader)`, or a loader without it"
    if sampler is not None and (left := _left_out(data)):
        return (
            f"The last {left} data are left out, others in each, so the matrix differs,"
            " too: pass `shuffle=False`, `drop_last=False`, or `list(loader)`"
        )
    return (
        "The matrix does not depend on their order, so pass `shuffle=False`, or "
        "`list(loader)` if all batches fit into memory"
    )


def _draws(sampler: Any) -> bool:
    """Whether a sampler may give a datum several times, and another never."""
    return isinstance(sampler, WeightedRandomSampler) or (
        isinstance(sampler, RandomSampler) and sampler.replacement
    )


def _sampler(data: Any) -> Any:
    """Return what decides on the order of a loader's data, if there is anything."""
    if not isinstance(data, DataLoader):
        return None
    batches = data.batch_sampler
    return data.sampler if batches is None else getattr(batches, "sampler", batches)


def _left_out(loader: DataLoader[Any]) -> str:
    """Say how many data a loader leaves out, if it does."""
    batches = loader.batch_sampler
    size = getattr(batches, "batch_size", None)
    if not size or not getattr(batches, "drop_last", False):
        return ""
    try:
        number = len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:
        return ""
    return f"{number % size} of {number}" if number % size else ""
