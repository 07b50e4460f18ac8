"""The sharpness from inside of training loops, against dense Hessians at each step."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from curvlinops import GGNLinearOperator, HessianLinearOperator, training_callback
from curvlinops.plots import plot_tracking


class Setting:
    """A network with dropout, its optimiser, and the sharpness by another road."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            *(torch.nn.Linear(4, 6), torch.nn.Tanh()),
            *(torch.nn.Dropout(0.5), torch.nn.Linear(6, 2)),
        ).double()
        self.loss = torch.nn.CrossEntropyLoss()
        self.X, self.y = torch.randn(30, 4).double(), torch.randint(2, (30,))
        self.params = dict(self.net.named_parameters())
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.5, momentum=0.9)
        self.net.eval()
        data = [(self.X, self.y)]
        self.H = HessianLinearOperator(self.net, self.loss, self.params, data)
        self.net.train()
        self.exact = {}

    def step(self, number):
        self.optimizer.zero_grad()
        loss = self.loss(self.net(self.X), self.y)
        loss.backward()
        self.optimizer.step()
        self.exact[number] = self.sharpness()
        return loss.detach()

    def sharpness(self):
        def risk(flat):
            parts = flat.split([p.numel() for p in self.params.values()])
            W, b, V, c = (
                part.view(p.shape)
                for part, p in zip(parts, self.params.values(), strict=True)
            )
            return self.loss(torch.tanh(self.X @ W.T + b) @ V.T + c, self.y)

        flat = torch.cat([p.detach().flatten() for p in self.params.values()])
        hessian = torch.func.jacrev(torch.func.grad(risk))(flat)
        return float(torch.linalg.eigvalsh(hessian)[-1])

    def agrees(self, track, steps):
        assert track["step"].tolist() == steps
        found = track["eigenvalue_0"]
        assert np.allclose(found, [self.exact[step] for step in steps], rtol=1e-8)
        assert np.isnan(track["overlap"][0]) and (track["overlap"][1:] > 0).all()
        assert self.net.training and self.net[2].training


class LightningTrainer:
    """Calls the hooks of its callbacks as Lightning's trainer does."""

    def __init__(self, callbacks, setting, accumulate=1):
        self.callbacks, self.setting = callbacks, setting
        self.optimizers, self.global_step = [setting.optimizer], 0
        self.accumulate = accumulate

    def call(self, hook, *args):
        for callback in self.callbacks:
            getattr(callback, hook)(self, self.setting.net, *args)

    def fit(self, batches):
        self.call("on_fit_start")
        self.call("on_train_start")
        for index in range(batches):
            self.call("on_train_batch_start", None, index)
            loss = torch.tensor(1.0)
            if (index + 1) % self.accumulate == 0:
                self.global_step += 1
                loss = self.setting.step(self.global_step)
            self.call("on_train_batch_end", {"loss": loss}, None, index)
        self.call("on_train_end")


class HuggingFaceTrainer:
    """Calls the events of its callbacks as HuggingFace's trainer does."""

    def __init__(self, callbacks, setting):
        self.callbacks, self.setting = callbacks, setting
        self.state = SimpleNamespace(global_step=0)
        self.control = SimpleNamespace(should_training_stop=False)

    def call(self, event):
        parts = {"model": self.setting.net, "optimizer": self.setting.optimizer}
        for callback in self.callbacks:
            hook = getattr(callback, event)
            result = hook(SimpleNamespace(), self.state, self.control, **parts)
            assert result is None or result is self.control

    def train(self, steps):
        self.call("on_init_end")
        self.call("on_train_begin")
        for _ in range(steps):
            self.call("on_step_begin")
            self.setting.step(self.state.global_step + 1)
            self.state.global_step += 1
            self.call("on_step_end")
        self.call("on_train_end")


def test_plain_loop():
    setting = Setting()
    callback = training_callback(setting.H, every=3, rng=0)
    measured = []
    for number in range(1, 10):
        loss = setting.step(number)
        measured.append(callback(loss=loss, learning_rate=0.5))
    assert measured == [False, False, True] * 3
    setting.agrees(callback.track, [3, 6, 9])
    assert callback.track["loss"][-1] == float(loss)
    assert (callback.track["learning_rate"] == 0.5).all()
    assert not callback(9) and callback(12)  # a step counts once


def test_it_is_drawn():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    setting = Setting()
    callback = training_callback(setting.H, every=1, rng=0)
    LightningTrainer([callback], setting).fit(3)
    track, ax = callback.track, figure.add_subplot()
    plot_tracking(track, ax, lr=track["learning_rate"], loss=track["loss"])
    sharpness, bound = ax.lines
    assert np.array_equal(sharpness.get_ydata(), track["eigenvalue_0"])
    assert (bound.get_ydata() == 4).all() and len(figure.axes) == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate):
    setting = Setting()
    callback = training_callback(setting.H, every=2, rng=0)
    LightningTrainer([callback], setting, accumulate).fit(8)
    steps = [2, 4, 6, 8] if accumulate == 1 else [2, 4]
    setting.agrees(callback.track, steps)
    assert (callback.track["learning_rate"] == 0.5).all()
    assert (callback.track["loss"] != 1.0).all()


def test_lightning_wants_its_own_class(monkeypatch):
    """Where it has been imported; hooks that are not ours are its own."""

    class Callback:
        def state_dict(self):
            return {}

    module = ModuleType("lightning.pytorch")
    module.Callback = Callback
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    setting = Setting()
    callback = training_callback(setting.H, every=2, rng=0)
    assert isinstance(callback, Callback) and callback.state_dict() == {}
    LightningTrainer([callback], setting).fit(4)
    setting.agrees(callback.track, [2, 4])


def test_hugging_face():
    setting = Setting()
    callback = training_callback(setting.H, every=2, rng=0)
    HuggingFaceTrainer([callback], setting).train(5)
    setting.agrees(callback.track, [2, 4])
    assert "loss" not in callback.track.columns
    with pytest.raises(AttributeError, match="no attribute 'step'"):
        _ = callback.step


def test_builders_composites_and_other_quantities():
    setting = Setting()
    args = setting.net, setting.loss, setting.params, [(setting.X, setting.y)]
    built = []

    def build():
        built.append(GGNLinearOperator(*args, check_deterministic=False))
        return 2 * built[-1] - setting.H

    callback = training_callback(build, 1, ["trace", "eigenvalues"], k=3, rng=0)
    for number in (1, 2):
        setting.step(number)
        callback()
    setting.net.eval()
    dense = 2 * built[-1].to_dense() - setting.H.to_dense()
    track = callback.track
    top = torch.linalg.eigvalsh(dense).flip(0)[:3].numpy()
    found = [track[f"eigenvalue_{i}"][1] for i in range(3)]
    assert len(built) == len(track) == 2 and np.allclose(found, top)
    assert np.allclose(track["trace"][1], dense.trace())


def test_warm_starts_save_products():
    """And a failing measurement leaves the model's modes as they were."""
    n = 300
    matrix = np.diag(np.r_[np.linspace(0, 1, n - 2), 1.05, 1.1])

    class Counted:
        shape, dtype, count = (n, n), matrix.dtype, 0

        def __matmul__(self, x):
            self.count += 1 if x.ndim == 1 else x.shape[1]
            return matrix @ x

        matvec = matmat = __matmul__

    counted = Counted()
    callback = training_callback(counted, 1, rng=0)
    callback()
    cold = counted.count
    callback()
    assert counted.count - cold < cold

    setting = Setting()

    def broken():
        raise RuntimeError("no matrix")

    with pytest.raises(RuntimeError, match="no matrix"):
        training_callback(broken, 1)()
    with torch.no_grad():
        setting.params["0.weight"].fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        training_callback(setting.H, 1)()
    assert setting.net.training and setting.net[2].training


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"every": 0}, "every"), ({"quantities": ["x"]}, "quantity is one of")],
)
def test_wrong_input_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        training_callback(np.eye(3), **kwargs)
