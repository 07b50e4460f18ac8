"""Data of several lengths, how they are put together, and models that work on them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

R = torch.randn


def packed(data):
    """Put data of several lengths one after the other."""
    lengths = torch.tensor([len(x) for x in data])
    return {"x": torch.cat(data), "lengths": lengths}


def listed(data):
    return {"x": torch.cat(data), "lengths": [len(x) for x in data]}


def padded(data):
    """Fill data of several lengths up, with a mask."""
    x = nn.utils.rnn.pad_sequence(data, batch_first=True)
    x = F.pad(x, (0, 0, 0, 3 - x.shape[1]))
    lengths = torch.tensor([len(x) for x in data])
    return {"x": x, "lengths": lengths, "mask": torch.arange(3) < lengths[:, None]}


def pairs(data):
    return tuple(torch.stack(each) for each in zip(*data, strict=True))


def with_table(data):
    """Add tensors that are as long as three data, and are none."""
    x = torch.stack(data)
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    return {"x": x, "places": torch.arange(3), "causal": causal}


def tokens(number, length=3, size=5):
    return [torch.randint(size, (length,)) for _ in range(number)]


def sequences(number, length=3):
    return [R(length, 4) for _ in range(number)]


def marked(number):
    """Make sequences with a first entry above zero somewhere."""
    data = sequences(number)
    for x in data:
        x[0, 0].abs_()
    return data


def ragged(*lengths):
    return [R(n, 4) for n in lengths]


def of_lengths(X):
    return len(X["lengths"])


def owners(X):
    return torch.arange(len(X["lengths"])).repeat_interleave(X["lengths"])


def summed(X, h):
    return torch.zeros(len(X["lengths"]), h.shape[1]).to(h).index_add(0, owners(X), h)


def attend(h, mask=None):
    scores = h @ h.transpose(-1, -2)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ h).tanh()


def experts(p, h, chosen, number=2):
    out = h.new_zeros(len(h), 3)
    for i in range(number):
        mask = chosen == i
        out = out.index_put((mask,), (h[mask] @ p[f"e{i}"] + p["b"]).tanh())
    return out


def routed(threshold):
    """Send every datum to one of two experts."""
    return lambda p, X: experts(p, X, (X[:, 0] > threshold).long()) @ p["v"]


def time_major(X):
    return X.transpose(0, 1).reshape(-1, X.shape[-1])


def dispatched(p, X):
    """Send rows to experts by products with matrices of zeros and ones."""
    h = X.reshape(-1, 4)
    chosen = F.one_hot((h[:, 0] > 0).long(), 2).to(h)
    slot = ((chosen.cumsum(0) - 1) * chosen).long()
    D = F.one_hot(slot, len(h)) * chosen.unsqueeze(-1)
    x = torch.einsum("nec,nd->ecd", D, h)
    y = torch.stack([(x[i] @ p[f"e{i}"]).tanh() for i in (0, 1)])
    return torch.einsum("nec,ecd->nd", D, y).reshape(len(X), -1, 3).sum(1) @ p["v"]


def top2(p, X):
    h = X.reshape(-1, 4)
    weights, chosen = (h @ p["gate"]).softmax(-1).topk(2)
    out = h.new_zeros(len(h), 3)
    for i in range(3):
        rows, slot = torch.where(chosen == i)
        y = h[rows] @ p[f"e{i}"] + p["b"]
        out = out.index_add(0, rows, y * weights[rows, slot, None])
    return out.tanh().reshape(len(X), -1, 3).cumsum(1).flatten(0, 1) @ p["v"]


def sequence_of(p, X):
    """Go through packed rows sorted by time, as recurrent layers do."""
    x = nn.utils.rnn.pack_padded_sequence(
        X["x"], X["lengths"], batch_first=True, enforce_sorted=False
    )
    h = x._replace(data=(x.data @ p["w"] + p["b"]).tanh())
    out, _ = nn.utils.rnn.pad_packed_sequence(h, batch_first=True, total_length=3)
    return out.sum(1) @ p["v"]


def differences_of_sums(p, X):
    """Sum up rows of every datum by the sum of all rows before, as rounding allows."""
    h, lengths = (X["x"] @ p["w"] + p["b"]).tanh(), X["lengths"]
    sums, ends = F.pad(h.cumsum(0), (0, 0, 1, 0)), lengths.cumsum(0)
    return (sums[ends] - sums[ends - lengths]) @ p["v"]


def rnn(p, X):
    h, out = X.new_zeros(len(X), 3), []
    for x in X.transpose(0, 1):
        h = (x @ p["w"] + h @ p["u"]).tanh()
        out.append(h @ p["v"])
    return torch.cat(out)


def raising(least, function):
    def model(p, X):
        if len(X) < least:
            raise RuntimeError("Too few.")
        return function(p, X)

    return model


ATTENTION = nn.MultiheadAttention(4, 2).double()
PROJECTIONS = {n: tuple(p.shape) for n, p in ATTENTION.named_parameters()}


def attention(p, X):
    own = {n: p[n] for n in PROJECTIONS}
    x = X.transpose(0, 1)
    y, _ = functional_call(ATTENTION, own, (x, x, x), {"need_weights": False})
    return y.mean(0) @ p["v"]


def language_model(p, ids):
    """Everything as long as everything else: data, positions, width."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    h = F.embedding(ids, p["tokens"]) + F.embedding(places, p["places"])
    z = F.layer_norm(h, (4,), p["g"], p["h"])
    h = h + F.linear(attend(z, torch.ones(4, 4).bool().tril()), p["W"], p["b"])
    return F.linear(h, p["tokens"]).flatten(0, 1)
