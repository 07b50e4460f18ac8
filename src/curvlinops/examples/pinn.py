r"""A physics-informed network by Gauss-Newton steps.

Run it as ``python -m curvlinops.examples.pinn``.

*Question.* Networks that are to solve a differential equation train badly with Adam:
the loss falls slowly, and the solution stays at a few digits. Is it the network, or the
optimiser?

*Formula.* Poisson's equation on the unit square, with zero boundary values and a known
solution:

.. math::

    -\Delta u = 2 \pi^2 \sin(\pi x_1) \sin(\pi x_2) , \qquad
    u = \sin(\pi x_1) \sin(\pi x_2) .

The model's *outputs* are the residuals :math:`r_\theta(x) = \Delta u_\theta(x) + \dots`
at random points, the loss is their mean square. Its generalised Gauss-Newton matrix
is :math:`G = \frac{2}{N} J^\top J`, with the residuals' Jacobian :math:`J`. A step of
Levenberg and Marquardt solves

.. math::

    (G + \delta I) \, d = \nabla L(\theta) , \qquad \theta \leftarrow \theta - d ,

and makes :math:`\delta` smaller if the loss fell, larger and tries again if not.

*Call.* ``d = CGInverseLinearOperator(G.damped(delta), rtol=1e-3) @ gradient``, where
``G = GGNLinearOperator(risk)``. The model differentiates by its input inside its
forward pass, which the operators differentiate like anything else.

*What is seen.* Both optimisers start from the same network and spend the same number of
units (a gradient, or a product in a solve). Adam stops at a loss several orders of
magnitude higher. It was the optimiser.

References: J. Müller, M. Zeinhofer, "Achieving high accuracy with PINNs via energy
natural gradient descent", arXiv:2302.13163. D. Marquardt, "An algorithm for
least-squares estimation of nonlinear parameters", SIAM Journal 11 (1963),
doi:10.1137/0111030.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from curvlinops import CGInverseLinearOperator, EmpiricalRisk, GGNLinearOperator
from curvlinops.examples._page import Page, command, relative_error
from curvlinops.examples.functorch import functorch_ggn


class PoissonResiduals(nn.Module):
    """The residuals of Poisson's equation for a network that is zero at the boundary.

    Parameters
    ----------
    hidden : int
        Number of hidden units.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        layers = nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        self.network = nn.Sequential(*layers).double()

    def u(self, x: Tensor) -> Tensor:
        """Return the solution at one point of shape ``(2,)``."""
        return (x * (1 - x)).prod() * self.network(x).squeeze(-1)

    def forward(self, X: Tensor) -> Tensor:
        """Return the residuals at points, of shape ``(N, 1)``."""
        second = vmap(jacrev(jacrev(self.u)))(X)
        laplacian = second.diagonal(dim1=1, dim2=2).sum(1)
        return (laplacian + 2 * np.pi**2 * solution(X)).unsqueeze(1)


def solution(X: Tensor) -> Tensor:
    """Return the exact solution at points of shape ``(N, 2)``."""
    return (np.pi * X).sin().prod(1)


@dataclass
class History:
    """Units spent, loss, and error of the solution, after every step."""

    units: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def add(self, units: int, loss: float, error: float) -> None:
        """Note a step that cost some units."""
        self.units.append(units + (self.units[-1] if self.units else 0))
        self.losses.append(loss)
        self.errors.append(error)


def grid(side: int) -> Tensor:
    """Return the points of a grid on the unit square, of shape ``(side**2, 2)``."""
    ticks = torch.linspace(0, 1, side, dtype=torch.float64)
    return torch.cartesian_prod(ticks, ticks)


def error_of(model: PoissonResiduals) -> float:
    """Return the relative error of the solution on a grid."""
    X = grid(31)
    with torch.no_grad():
        return relative_error(vmap(model.u)(X), solution(X))


def gauss_newton(
    model: PoissonResiduals, risk: EmpiricalRisk, steps: int
) -> tuple[History, float]:
    """Minimise by Levenberg's and Marquardt's method; return the last damping, too."""
    G, history, damping = GGNLinearOperator(risk), History(), 1.0
    theta, loss = risk.parameters_vector(numpy=True), float(risk.loss())
    for _ in range(steps):
        gradient = risk.gradient_vector(numpy=True)
        inverse = CGInverseLinearOperator(G.damped(damping), rtol=1e-3, maxiter=300)
        step = inverse @ gradient
        risk.set_parameters(theta - step)
        new_loss = float(risk.loss())
        if new_loss < loss:
            theta, loss, damping = theta - step, new_loss, damping / 3
        else:
            risk.set_parameters(theta)
            damping *= 4
        # A gradient, two losses at most, and the products of the solve
        assert inverse.statistics is not None
        products = int(inverse.statistics.iterations[0]) + 1
        history.add(2 + products, loss, error_of(model))
    return history, damping


def adam(
    model: PoissonResiduals, X: Tensor, units: int, every: int, lr: float
) -> History:
    """Minimise by Adam, with one gradient a step."""
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, units)
    history = History()
    for step in range(1, units + 1):
        optimiser.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % every == 0 or step == units:
            history.add(every if step % every == 0 else step % every, loss.item(), 0.0)
            history.errors[-1] = error_of(model)
    return history


def body(page: Page) -> None:
    """Solve with both optimisers, compare with the solution, draw."""
    hidden, number, steps = (16, 100, 22) if page.quick else (24, 300, 40)
    X = torch.rand(number, 2, dtype=torch.float64)
    model = PoissonResiduals(hidden)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    params, loss = dict(model.named_parameters()), nn.MSELoss()
    data = [(X, torch.zeros(number, 1, dtype=torch.float64))]
    risk = EmpiricalRisk(model, loss, params, data)

    dense = functorch_ggn(model, loss, params, data).numpy()
    v = np.random.default_rng(page.seed).standard_normal(len(dense))
    G = GGNLinearOperator(risk)
    page.check("GGN @ v, vs dense", relative_error(G @ v, dense @ v), 1e-10)
    damped = dense + 1e-3 * np.eye(len(dense))
    d = CGInverseLinearOperator(G.damped(1e-3)) @ v
    truth = np.linalg.solve(damped, v)
    page.check("a solve with it, vs dense", relative_error(d, truth), 1e-5)

    newton, damping = gauss_newton(model, risk, steps)
    other = PoissonResiduals(hidden)
    other.load_state_dict(start)
    slow = adam(other, X, newton.units[-1], max(newton.units[-1] // 40, 1), 1e-2)
    print(f"{'':<14}{'units':>7}{'loss':>11}{'error of u':>12}")
    for name, history in (("Gauss-Newton", newton), ("Adam", slow)):
        numbers = f"{history.losses[-1]:>11.1e}{history.errors[-1]:>12.1e}"
        print(f"{name:<14}{history.units[-1]:>7}{numbers}")
    print(f"{steps} Gauss-Newton steps; the damping was {damping:.1e} at last")
    bound = 2e-2 if page.quick else 5e-4
    page.check("Gauss-Newton, error vs the exact solution", newton.errors[-1], bound)
    ratio = newton.losses[-1] / slow.losses[-1]
    page.check("its loss over Adam's", ratio, 0.1)
    draw(page, {"Gauss-Newton": newton, "Adam": slow}, model, other)


def draw(
    page: Page,
    histories: dict[str, History],
    model: PoissonResiduals,
    other: PoissonResiduals,
) -> None:
    """Draw loss and error by units, and the errors of both solutions."""
    with page.figure("convergence", 9, 3.5, ncols=2) as axes:
        quantities = {"loss": "losses", "relative error of u": "errors"}
        for ax, (label, key) in zip(axes, quantities.items(), strict=True):
            for (name, history), style in zip(histories.items(), "-:", strict=True):
                ax.semilogy(history.units, getattr(history, key), style, label=name)
            ax.set(xlabel="gradients and products", ylabel=label)
            ax.grid(alpha=0.3)
            ax.legend()
    side = 41
    X = grid(side)
    with page.figure("solutions", 10.5, 3.2, ncols=3) as axes:
        with torch.no_grad():
            errors = [(vmap(m.u)(X) - solution(X)).abs() for m in (model, other)]
        images = {
            "exact solution": solution(X),
            "error, Gauss-Newton": errors[0],
            "error, Adam": errors[1],
        }
        for ax, (title, values) in zip(axes, images.items(), strict=True):
            image = ax.imshow(values.view(side, side).T.numpy(), extent=(0, 1, 0, 1))
            ax.set(title=title, xlabel="$x_1$", ylabel="$x_2$")
            ax.figure.colorbar(image, ax=ax, shrink=0.9)


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
