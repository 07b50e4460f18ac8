"""What is said of parameters whose layers are not understood, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

_IN_GRAPH = (
    "(`...Backward` is a node of the output's graph that no call of a torch function "
    "explains: of a custom function, or of a derivative by the input that the model "
    "itself takes.) "
)
_USE_ITSELF = (
    "Use parameters themselves: scale a layer's input or result in place of its weight "
    "(`2 * F.linear(x, W)`), add results in place of weights (`F.linear(x, W) + "
    "F.linear(F.linear(x, A), B)`), and make parametrized weights (weight or spectral "
    "normalisation, pruning) parameters again, e.g. with "
    "`torch.nn.utils.parametrize.remove_parametrizations`. "
)


def refusal(
    unknown: Mapping[str, str], reasons: Mapping[str, str], functions: Mapping[str, str]
) -> ValueError:
    """Return the error that says which parameters are not understood, and why.

    Parameters
    ----------
    unknown : mapping of str to str
        What uses a parameter, by its name.
    reasons : mapping of str to str
        Why a use was not understood after all.
    functions : mapping of str to str
        What computes something of a parameter before it meets any data.
    """
    made = [n for n in unknown if n in functions or "parametrizations." in n]
    said = {name: f"in `{use}`" for name, use in unknown.items()}
    said |= {name: f"({why})" for name, why in reasons.items() if name in said}
    said |= {name: f"in `{functions.get(name) or unknown[name]}`" for name in made}
    cause = (
        f"In place of {made}, the model uses a function of the weight that no data "
        "enter, such as `2 * W`, `W + B @ A` or a normalised one. "
    )
    return ValueError(
        "No Kronecker-factored form is known for the use of "
        f"{'; '.join(f'{name!r} {what}' for name, what in said.items())}. "
        + (cause + _USE_ITSELF) * bool(made)
        + _IN_GRAPH * any("Backward" in what for what in said.values())
        + "Leave these parameters out of `params`, or approximate their blocks by the "
        "diagonal of the matrix with `unsupported='diagonal'`."
    )
