"""Batches that are mappings, and models that return objects, as some libraries have."""

import re
from collections import OrderedDict, UserDict
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pickle import dumps, loads
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

import references
from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    as_model,
)
from curvlinops.examples import gradient_and_loss
from tolerances import assert_close

# Stand-ins for a library's classes


class ModelOutput(OrderedDict):
    """A result whose entries are attributes, too, and can be taken by position."""

    def __init__(self, **entries: Tensor | None) -> None:
        super().__init__((n, t) for n, t in entries.items() if t is not None)
        self.__dict__.update(entries)

    def __getitem__(self, key: Any) -> Any:
        return (
            super().__getitem__(key) if isinstance(key, str) else [*self.values()][key]
        )


class BatchEncoding(UserDict):
    """What a tokenizer returns: a mapping that moves itself."""

    def to(self, device: Any) -> "BatchEncoding":
        return BatchEncoding({n: t.to(device) for n, t in self.items()})


T, V, D = 5, 3, 4


class Classifier(nn.Module):
    """Classifies tokens or, by their mean, sequences; next tokens, if it is causal."""

    def __init__(
        self, each: bool = True, causal: bool = False, classes: int = V
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        self.each, self.causal = each, causal

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        h = self.embed(input_ids)
        mask = torch.ones_like(h[..., 0]) if attention_mask is None else attention_mask
        h = torch.tanh(self.mix(h)) * mask.unsqueeze(-1).to(h.dtype)
        h = h.cumsum(1) if self.causal else h
        logits = self.head(h if self.each else h.mean(1))
        loss = None
        if labels is not None:
            f, y = (logits[:, :-1], labels[:, 1:]) if self.causal else (logits, labels)
            loss = F.cross_entropy(f.reshape(-1, f.shape[-1]), y.reshape(-1))
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return ModelOutput(loss=loss, logits=logits, hidden_states=h)


class Peft(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class Raw(nn.Module):
    """The same as a module with one tensor argument, and classes on axis 1."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, X: dict[str, Tensor]) -> Tensor:
        logits = self.inner(**X).logits
        return logits.transpose(1, 2) if logits.ndim == 3 else logits


def batch(n: int, each: bool = True, length: int = T) -> dict:
    y = torch.randint(V, (n, length) if each else (n,))
    if each:
        y[0, -1] = -100
    mask = torch.ones(n, length, dtype=torch.int64)
    mask[0, -1] = 0
    return {
        "input_ids": torch.randint(7, (n, length)),
        "attention_mask": mask,
        "labels": y,
    }


@pytest.fixture
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


pytestmark = pytest.mark.usefixtures("seed")
LOSS = nn.CrossEntropyLoss()


def pairs(data: list) -> list:
    return [({k: b[k] for k in b if k != "labels"}, b["labels"]) for b in data]


def reference(model: nn.Module, data: list) -> tuple[Any, ...]:
    """Return the same problem as everybody understands it."""
    raw = Raw(model)
    return raw, LOSS, dict(raw.named_parameters()), pairs(data)


def shapes_of_data(data: list) -> dict[str, Any]:
    return {
        "mappings": data,
        "encodings": [BatchEncoding(b) for b in data],
        "pairs": pairs(data),
        "pairs of encodings": [(BatchEncoding(X), y) for X, y in pairs(data)],
        "loader": DataLoader(data, batch_size=None),
    }


MATRICES = {
    HessianLinearOperator: references.hessian,
    GGNLinearOperator: references.ggn,
    EFLinearOperator: references.empirical_fisher,
}


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("cls", MATRICES)
def test_batches_and_results_of_a_library(cls: type, each: bool):
    model = Classifier(each).double()
    data = [batch(n, each) for n in (2, 3)]
    expected = MATRICES[cls](*reference(model, data))
    for given in shapes_of_data(data).values():
        A = cls(model, LOSS, dict(model.named_parameters()), given)
        for _ in range(3):
            assert_close(A @ np.eye(A.shape[0]), expected)
    assert [*data[0]] == ["input_ids", "attention_mask", "labels"]  # as they were


@pytest.mark.parametrize("each", [True, False])
def test_all_operators_read_alike(each: bool):
    model = Classifier(each).double()
    data = [batch(n, each) for n in (2, 3)]
    raw, _, params, split = reference(model, data)
    own = dict(model.named_parameters())
    J = JacobianLinearOperator(as_model(model, class_axis=-1), own, data)
    assert_close(J.to_dense(), references.jacobian(raw, params, split))
    pairs_of_operators = [
        (cls(model, LOSS, own, data, **o), cls(raw, LOSS, params, split, **o))
        for cls, o in (
            (GGNDiagonalLinearOperator, {}),
            (FisherMCLinearOperator, {}),
            (KFACLinearOperator, {"fisher_type": "type-2"}),
            (KFACLinearOperator, {"kfac_approx": "reduce"}),
            (EKFACLinearOperator, {"fisher_type": "empirical"}),
        )
    ]
    for A, B in pairs_of_operators:
        assert_close(A.to_dense(), B.to_dense())
    expected, value = gradient_and_loss(raw, LOSS, params, split)
    found, its = gradient_and_loss(model, LOSS, own, data)
    assert_close(
        torch.cat([g.flatten() for g in found]),
        torch.cat([g.flatten() for g in expected]),
    )
    assert_close(its, value)
    A = GGNLinearOperator(model, LOSS, own, data)
    assert A.verify().ok
    assert len(A.plan().batches) == 2
    bounded = GGNLinearOperator(model, LOSS, own, data, max_memory=1 << 16)
    x = np.ones(A.shape[0])
    assert_close(bounded @ x, A @ x)
    for twin in (loads(dumps(A)), deepcopy(A)):
        assert_close(twin.to_dense(), A.to_dense())


def test_classes_are_moved_for_every_loss_of_classes():
    model = Classifier().double()
    data = [batch(2), batch(3)]
    own = dict(model.named_parameters())
    weight = torch.tensor([0.3, 1.0, 2.0]).double()
    log = as_model(model, output=lambda out: out.logits.log_softmax(-1))
    for loss, tagger in (
        (nn.CrossEntropyLoss(weight, label_smoothing=0.1), model),
        (partial(F.cross_entropy, reduction="sum"), model),
        (nn.NLLLoss(), log),
    ):
        raw = Logged(model) if tagger is log else Raw(model)
        params = dict(raw.named_parameters())
        expected = references.hessian(raw, loss, params, pairs(data))
        A = HessianLinearOperator(tagger, loss, own, data)
        assert_close(A.to_dense(), expected)


class Logged(Raw):
    def forward(self, X: Any) -> Tensor:
        return super().forward(X).log_softmax(1)


@pytest.mark.parametrize("check", [True, False])
def test_plain_tensors_with_classes_last(check: bool):
    """A module with a tensor argument that returns logits [B, T, V]."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, V)).double()
    data = [
        (torch.rand(n, t, 2).double(), torch.randint(V, (n, t)))
        for n, t in ((2, 5), (3, V), (1, 4))  # clear, unclear, clear
    ]
    params = dict(net.named_parameters())

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, X: Tensor) -> Tensor:
            return self.net(X).movedim(-1, 1)

    moved = Moved()
    expected = references.ggn(moved, LOSS, dict(moved.named_parameters()), data)
    A = GGNLinearOperator(net, LOSS, params, data, check_deterministic=check)
    assert_close(A.to_dense(), expected)
    K = KFACLinearOperator(
        net, LOSS, params, data, fisher_type="type-2", check_deterministic=check
    )
    own = dict(moved.named_parameters())
    same = KFACLinearOperator(moved, LOSS, own, data, fisher_type="type-2")
    assert_close(K.to_dense(), same.to_dense())
    with pytest.raises(ValueError, match=r"class_axis=-1"):  # not taken for two things
        GGNLinearOperator(net, LOSS, params, data[1:]).to_dense()


def test_torch_decides_where_a_tensor_s_shape_does_not():
    """[B, C, T] with C = T, as for segmentation, is what torch takes it for."""
    net = nn.Conv1d(2, V, 1).double()
    data = [(torch.rand(n, 2, V).double(), torch.randint(V, (n, V))) for n in (2, 3)]
    params = dict(net.named_parameters())
    A = GGNLinearOperator(net, LOSS, params, data)
    assert_close(A.to_dense(), references.ggn(net, LOSS, params, data))


def test_the_class_axis_of_logits_is_never_guessed():
    model = Classifier().double()
    data = [batch(n, length=V) for n in (2, 3)]
    own = dict(model.named_parameters())
    for tagger in (model, as_model(model)):
        with pytest.raises(ValueError, match=r"axis 1 as well.*class_axis=-1"):
            GGNLinearOperator(tagger, LOSS, own, data)
    A = GGNLinearOperator(as_model(model, class_axis=-1), LOSS, own, data)
    assert_close(A.to_dense(), references.ggn(*reference(model, data)))


def test_segmentation_keeps_its_axis():
    class Segmenter(nn.Conv2d):
        def forward(self, pixel_values: Tensor) -> Any:
            return ModelOutput(loss=None, logits=super().forward(pixel_values))

    net = Segmenter(2, V, 1).double()
    plain = nn.Conv2d(2, V, 1).double()
    plain.load_state_dict(net.state_dict())
    data = [
        {"pixel_values": torch.rand(n, 2, 4, 5).double(),
         "labels": torch.randint(V, (n, 4, 5))}
        for n in (1, 2)
    ]  # fmt: skip
    A = GGNLinearOperator(net, LOSS, list(net.parameters()), data)
    params = dict(plain.named_parameters())
    split = [(b["pixel_values"], b["labels"]) for b in data]
    assert_close(A.to_dense(), references.ggn(plain, LOSS, params, split))


@pytest.mark.parametrize("wrap", [Peft, as_model, lambda m: as_model(Peft(m))])
def test_wrappers_that_hand_arguments_on(wrap: Any):
    model = Classifier().double()
    data = [batch(2), batch(3)]
    wrapped = wrap(model)
    A = GGNLinearOperator(wrapped, LOSS, list(wrapped.parameters()), data)
    assert_close(A.to_dense(), references.ggn(*reference(model, data)))


def test_single_keyword_and_single_argument_are_told_apart():
    """`forward(x)` with a batch {"x": ...} may want the mapping, or the tensor."""

    class WantsTensor(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class WantsMapping(nn.Linear):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return super().forward(x["x"])

    X, y = torch.rand(4, 3).double(), torch.randint(2, (4,))
    plain = nn.Linear(3, 2).double()
    expected = references.ggn(plain, LOSS, dict(plain.named_parameters()), [(X, y)])
    for kind in (WantsTensor, WantsMapping):
        net = kind(3, 2).double()
        net.load_state_dict(plain.state_dict())
        A = GGNLinearOperator(net, LOSS, list(net.parameters()), [({"x": X}, y)])
        assert_close(A.to_dense(), expected)


def test_plain_callables_get_the_mapping():
    model = Classifier().double()
    data = [batch(2), batch(3)]
    params = {n: p.detach().clone() for n, p in model.named_parameters()}

    def evaluate(params: dict[str, Tensor], X: dict[str, Tensor]) -> Any:
        return functional_call(model, params, (), X)

    expected = references.ggn(*reference(model, data))
    for f in (evaluate, as_model(evaluate, class_axis=-1)):
        A = GGNLinearOperator(f, LOSS, params, data)
        assert_close(A.to_dense(), expected)
    inputs = pairs(data)[0][0]
    f = as_model(evaluate, class_axis=-1)(params, inputs)
    assert_close(f, model(**inputs).logits.transpose(1, 2))


# The model's own loss


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_the_models_own_loss(causal: bool, inside: bool):
    """The mean over tokens that count, of all data."""
    model = Classifier(causal=causal).double()
    data = [batch(2), batch(3)]
    for b in data:
        b["labels"][-1, 2:] = -100
    given = data if inside else [(b, b["labels"]) for b in data]

    def number(loss: Tensor, y: Tensor) -> int:
        return int(((y[:, 1:] if causal else y) != -100).sum())

    together = {k: torch.cat([b[k] for b in data]) for k in data[0]}
    params = list(model.parameters())
    expected = dense_hessian(model(**together).loss, params)
    with pytest.warns(UserWarning, match="`num_terms_fn`"):  # the rule is said
        EmpiricalRisk(as_model(model, "loss"), lambda f, y: f, params, given)
    A = HessianLinearOperator(
        EmpiricalRisk(
            as_model(model, output="loss"),
            lambda f, y: f,
            params,
            given,
            num_terms_fn=number,
        )
    )
    assert_close(A.to_dense(), expected)


def dense_hessian(loss: Tensor, params: list[Tensor]) -> Tensor:
    """Differentiate the gradient, entry by entry."""
    grads = torch.autograd.grad(loss, params, create_graph=True)
    rows = [
        torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)
        for g in torch.cat([g.flatten() for g in grads])
    ]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


def test_the_reduction_of_the_models_own_loss_may_be_said():
    model = Classifier(each=False).double()
    data = [batch(2, False), batch(3, False)]
    together = {k: torch.cat([b[k] for b in data]) for k in data[0]}
    params = list(model.parameters())
    expected = dense_hessian(model(**together).loss, params)
    risk = EmpiricalRisk(
        as_model(model, "loss"), lambda f, y: f, params, data, reduction="mean"
    )
    assert_close(HessianLinearOperator(risk).to_dense(), expected)


# What to take


@pytest.mark.parametrize(
    "output", ["logits", 0, lambda out: out[0], lambda out: (out[0] * 2) / 2]
)
def test_parts_of_tuples(output: Any):
    class Tuple(Classifier):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = super().forward(*args, **kwargs)
            return result if output == "logits" else (result.logits, result)

    model = Tuple(each=False).double()
    data = [batch(2, False)]
    A = GGNLinearOperator(
        as_model(model, output), LOSS, dict(model.named_parameters()), data
    )
    plain = Classifier(each=False).double()
    plain.load_state_dict(model.state_dict())
    assert_close(A.to_dense(), references.ggn(*reference(plain, data)))


def test_other_attributes():
    model = Classifier().double()
    data = [(pairs([batch(2)])[0][0], None)]
    J = JacobianLinearOperator(
        as_model(model, "hidden_states"), [model.mix.weight], data
    )

    class Hidden(Raw):
        def forward(self, X: Any) -> Tensor:
            return self.inner(**X).hidden_states

    raw = Hidden(model)
    params = {"inner.mix.weight": model.mix.weight}
    assert_close(J.to_dense(), references.jacobian(raw, params, data))


def test_changes_are_seen():
    model = Classifier().double()
    data = [batch(2), batch(3)]
    A = GGNLinearOperator(model, LOSS, dict(model.named_parameters()), data)
    A.to_dense()
    data[0]["labels"][1, 0] = (data[0]["labels"][1, 0] + 1) % V
    data[1]["attention_mask"][0, 0] = 0
    data.append(batch(1))
    with torch.no_grad():
        model.head.weight.mul_(1.1)
    assert_close(A.to_dense(), references.ggn(*reference(model, data)))


# What is not clear


def test_mistakes():
    model, data = Classifier(each=False), [batch(2, False)]
    own = dict(model.named_parameters())
    make = partial(GGNLinearOperator, model, LOSS, own)
    lines = r"\n +pairs = \[.*\n.*as_model\(module\).*\n.*GGNLinearOperator"
    without = {k: v for k, v in data[0].items() if k != "labels"}
    with pytest.raises(ValueError, match=rf"none of them.*?{lines}"):
        make([without])
    with pytest.raises(ValueError, match=rf"several of them.*{lines}"):
        make([{**data[0], "label": data[0]["labels"]}])
    with pytest.raises(TypeError, match=rf"(?s)'idx'.*keywords.*idx.*{lines}"):
        make([{**data[0], "idx": torch.arange(2)}])
    named = {**without, "next_labels": data[0]["labels"]}
    with pytest.raises(ValueError, match="'next_labels'"):
        make([named])
    JacobianLinearOperator(as_model(model), own, [without])  # needs no targets


def test_mappings_without_a_keyword_of_the_model():
    net, lines = nn.Linear(3, 2), r"(?s)\['x'\].*pairs = .*as_model"
    batches = [({"x": torch.rand(4, 3)}, torch.zeros(4, dtype=torch.long))]
    with pytest.raises(TypeError, match="must be Tensor, not dict") as caught:
        GGNLinearOperator(net, LOSS, list(net.parameters()), batches)
    assert re.search(lines, "".join(caught.value.__notes__))


def test_class_axes_that_are_none():
    model, X = Classifier(), {"input_ids": batch(2)["input_ids"]}
    for wrong in ("last", 1.5, True):
        with pytest.raises(ValueError, match="`class_axis` must be a whole number"):
            as_model(model, class_axis=wrong)
    with pytest.raises(ValueError, match=r"no axis 7.*as_model"):
        as_model(model, class_axis=7)(X)
    moved = as_model(model, np.int64(1), class_axis=np.int64(-1))(X)
    assert torch.equal(moved, model(**X).hidden_states.movedim(-1, 1))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("logit", r"no tensor 'logit'.*ModelOutput.*'logits', 'hidden_states'"),
        ("loss", r"no tensor 'loss'.*only if the batch has labels"),
        (1.5, "1.5"),
    ],
)
def test_what_is_not_there(output: Any, message: str):
    model = Classifier(each=False)
    with pytest.raises(TypeError, match=message):
        GGNLinearOperator(
            as_model(model, output), LOSS, list(model.parameters()), pairs([batch(2)])
        )


def test_results_without_a_clear_part():
    model = Classifier(each=False)

    class Tuple(Classifier):
        def forward(self, **kwargs: Any) -> Any:
            return super().forward(**kwargs, return_dict=False)

    class Base(Classifier):
        def forward(self, **kwargs: Any) -> Any:
            h = super().forward(**kwargs).hidden_states
            return ModelOutput(last_hidden_state=h, pooler_output=h[:, 0])

    for kind, found in ((Tuple, "tuple"), (Base, "'last_hidden_state', 'pooler_outp")):
        model = kind(each=False)
        with pytest.raises(TypeError, match=rf"{found}.*as_model\(module, output"):
            GGNLinearOperator(model, LOSS, list(model.parameters()), [batch(2, False)])
    with pytest.raises(TypeError, match="a callable"):
        as_model(3)
    with pytest.raises(TypeError, match="no parameters of its own"):
        as_model(lambda params, X: X).parameters()
    with pytest.raises(TypeError, match="no place 3"):
        A = as_model(Tuple(each=False), 3)
        GGNLinearOperator(A, LOSS, list(A.parameters()), [batch(2, False)])


def test_mappings_as_only_argument_stay():
    """A module that takes the mapping, and raises an error of its own."""

    class Failing(nn.Linear):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            raise IndexError("out of order")

    net = Failing(3, 2)
    with pytest.raises(IndexError, match="out of order"):
        GGNLinearOperator(
            net, LOSS, list(net.parameters()), [({"x": torch.rand(2, 3)}, None)]
        )


def test_repr_and_names():
    model = as_model(Classifier(), class_axis=-1)
    assert "Classifier" in repr(model)
    assert "class_axis=-1" in repr(model)
    assert dict(model.named_parameters()) == dict(model.module.named_parameters())
    assert as_model(model, "loss").reading.with_labels
