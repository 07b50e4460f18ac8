"""Backward passes are torch's, by the same engine without its compiler."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvlinops._backward import grad


@pytest.fixture
def graph():
    """Return two outputs, three inputs (the last one unused), a vector per output."""
    torch.manual_seed(0)
    inputs = [torch.randn(n, dtype=torch.float64).requires_grad_() for n in (3, 4, 2)]
    outputs = [inputs[0].outer(inputs[1]).sin(), inputs[0].exp() + inputs[1].sum()]
    return outputs, inputs, [torch.randn_like(f) for f in outputs]


def compare(outputs, inputs, vectors=None, **options):
    """Compare with torch, bit by bit, and return what it gives."""
    options = {"retain_graph": True, "allow_unused": True} | options
    expected = torch.autograd.grad(outputs, inputs, vectors, **options)
    found = grad(outputs, inputs, vectors, **options)
    assert isinstance(found, tuple)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    return found


def test_tensors(graph):
    found = compare(*graph)
    assert found[2] is None
    assert not any(g.requires_grad for g in found[:2])


def test_edges(graph):
    outputs, inputs, vectors = graph
    edges = list(map(get_gradient_edge, outputs))
    compare(edges, inputs, vectors)
    compare(outputs, list(map(get_gradient_edge, inputs)), vectors)


def test_single_tensors(graph):
    (f, _), (x, _, _), (v, _) = graph
    compare(f, x, v)
    compare(get_gradient_edge(f), get_gradient_edge(x), v)


def test_scalar_without_a_vector(graph):
    outputs, inputs, _ = graph
    compare([outputs[0].sum()], inputs, [None])
    compare(outputs[0].sum(), inputs)


def test_inputs_without_a_part_in_the_outputs(graph):
    outputs, inputs, vectors = graph
    options = {"retain_graph": True}
    for function in grad, torch.autograd.grad:
        with pytest.raises(RuntimeError, match="not have been used"):
            function(outputs, inputs, vectors, **options)
    assert not grad(outputs, inputs, vectors, materialize_grads=True)[2].any()


def test_no_inputs(graph):
    with pytest.raises(RuntimeError, match="cannot be empty"):
        grad(graph[0], [], graph[2])


def test_blocks_of_vectors(graph):
    outputs, inputs, _ = graph
    vectors = [torch.randn(5, *f.shape, dtype=f.dtype) for f in outputs]
    found = compare(outputs, inputs, vectors, is_grads_batched=True)
    assert found[0].shape == (5, 3)


def test_graph_of_the_result(graph):
    outputs, inputs, vectors = graph
    vectors = [v.requires_grad_() for v in vectors]
    first = grad(outputs, inputs[:2], vectors, create_graph=True)
    # J^T v is linear in v, with the derivative J^T, here times a vector of ones.
    found = grad(first[0], vectors, torch.ones(3).double())
    u = torch.ones(3, dtype=torch.float64)
    for f, Ju in zip(outputs, found, strict=True):
        jacobian = torch.stack(
            [
                torch.autograd.grad(e, inputs[0], retain_graph=True)[0]
                for e in f.flatten()
            ]
        )
        assert torch.allclose(Ju.flatten(), jacobian @ u, rtol=1e-13)


def test_graph_is_freed(graph):
    outputs, inputs, vectors = graph
    grad(outputs, inputs, vectors, allow_unused=True)
    with pytest.raises(RuntimeError, match="a second time"):
        grad(outputs, inputs, vectors, allow_unused=True)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), "Mismatch in shape"),
        (torch.zeros(2, 3, 4, dtype=torch.float64), "Mismatch in shape"),
        (torch.zeros(3, 4, dtype=torch.complex128), "Mismatch in dtype"),
    ],
)
def test_what_does_not_fit_is_refused_by_torch(graph, vector, message):
    outputs, inputs, _ = graph
    for output in outputs[0], get_gradient_edge(outputs[0]):
        with pytest.raises(RuntimeError, match=message):
            grad([output], inputs, [vector], retain_graph=True, allow_unused=True)


def test_modes_see_the_call(graph):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        grad(*graph, allow_unused=True)
    assert torch.autograd.grad in seen


def test_subclasses_see_the_call(graph):
    seen = []

    class Seeing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    x = nn.Parameter(torch.ones(2).as_subclass(Seeing))
    (g,) = grad((x**2).sum(0, keepdim=True), x, torch.ones(1))
    assert torch.autograd.grad in seen
    assert g.tolist() == [2.0, 2.0]
