"""Problems as users write them: functions in a file, without arguments."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import EmpiricalRisk, as_model

GENERATOR = torch.Generator().manual_seed(0)


def network(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def numbers(dtype=torch.float64, size=24):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(size, 4, generator=generator, dtype=dtype)
    return X, torch.randint(3, (size,), generator=generator)


def small():
    X, y = numbers()
    return network(), nn.CrossEntropyLoss(), [(X[:16], y[:16]), (X[16:], y[16:])]


def with_params():
    model, loss, data = small()
    return model, loss, dict(model[2].named_parameters(prefix="2")), data


def functional():
    model, loss, data = small()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}

    def function(params, X):
        return torch.func.functional_call(model, params, (X,))

    return function, loss, params, data


def loader():
    model = network(torch.float32)
    data = TensorDataset(*numbers(torch.float32))
    return model, nn.CrossEntropyLoss(), DataLoader(data, batch_size=8)


def shuffled():
    model, loss, data = loader()
    return model, loss, DataLoader(data.dataset, batch_size=8, shuffle=True)


def risk():
    model, loss, data = small()
    return EmpiricalRisk(model, loss, dict(model.named_parameters()), data)


class Reader(nn.Module):
    """Attention over tokens, called with keywords, as in HuggingFace's models."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.read = nn.Linear(4, 7)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        mask = None if attention_mask is None else attention_mask == 0
        x = x + self.attend(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return SimpleNamespace(logits=self.read(x))


def tokens():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Reader().double()
        batches = [
            {
                "input_ids": torch.randint(7, (4, 5)),
                "attention_mask": torch.ones(4, 5).long(),
                "labels": torch.randint(7, (4, 5)),
            }
            for _ in range(2)
        ]
    return as_model(model, class_axis=-1), nn.CrossEntropyLoss(), batches


def dead_layer():
    """Nothing passes the first layer's weight."""
    model, loss, data = small()
    return model, loss, [(torch.zeros_like(X), y) for X, y in data]


# -- what cannot be used ---------------------------------------------------------------

NOT_A_FUNCTION = 3


def raises():
    raise ZeroDivisionError("no data today")


def two_things():
    return small()[:2]


def a_number():
    return 5


def nan_data():
    model, loss, data = small()
    X, y = data[0]
    return model, loss, [(X * float("nan"), y)]


def no_params():
    return functional()[0], *functional()[1::2]


def wide():
    """Some hundred parameters, so that few probes are fewer than those."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        X = torch.randn(40, 8).double()
    return model, nn.CrossEntropyLoss(), [(X, torch.arange(40) % 4)]
