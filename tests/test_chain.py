"""Where a product and the activation after it may be one kernel: what chain.py can prove, and looks at again."""

import pytest
import torch
from parity import OneStatement, assert_as_before, both, fused

from primer_fast.chain import Chain, activation_of, children_in_order
from primer_fast.functional.activation import ACTIVATIONS

T = torch.nn


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_after_a_product_is_computed_with_it(name, device):
    activation = ACTIVATIONS[name].module()
    if hasattr(activation, "inplace"):
        activation.inplace = True
    model = T.Sequential(T.Conv2d(3, 4, 3), activation, T.Flatten(), T.Linear(64, 5), activation)
    model, before, report = both(model.to(device))
    assert [(s.name, s.activation) for s in report.swapped] == [("0", name), ("3", name)]
    assert [place.name for place in report.left] == ["2"]
    x = torch.randn(2, 3, 6, 6, device=device)
    assert_as_before(model, before, lambda m: m(x.to(m[0].weight.dtype)))
    ran = []
    model[1].forward = lambda x: ran.append(1) or x  # a forward of its own: it is no longer what it was
    model(x)
    assert ran


def test_what_happens_later_is_seen(plain_path):
    model, before, _ = both(T.Sequential(T.Linear(6, 6), T.ReLU(), T.Linear(6, 6), T.GELU()))
    x = torch.randn(4, 6)
    assert type(model[1]) is T.ReLU and fused(model, x) == ["relu", "gelu"]

    def same(names):
        torch.testing.assert_close(model(x), before(x))
        assert fused(model, x) == names

    handles = [m[0].register_forward_hook(lambda module, args, y: y * 2) for m in (model, before)]
    same([None, "gelu"])
    for handle in handles:
        handle.remove()
    handles = [m[3].register_forward_pre_hook(lambda module, args: (args[0] - 1,)) for m in (model, before)]
    same(["relu", None])
    for handle in handles:
        handle.remove()
    for m in (model, before):
        m[1] = T.ReLU6()
    same([None, "gelu"])
    torch.testing.assert_close(model[:3](x), before[:3](x))
    torch.testing.assert_close(model[2](x), before[2](x))
    torch.testing.assert_close(model[2:](x), before[2:](x))
    for m in (model, before):
        m.append(T.Tanh())
    same([None, "gelu"])
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: y * 2)
    same([None, None])
    handle.remove()
    torch.testing.assert_close(model(input=x), before(input=x))


class Statements(OneStatement):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same."""
        inner = self.act(self.fc1(hidden))  # a comment
        return self.fc2(inner)


class Residual(OneStatement):
    def forward(self, x):
        y = self.act(self.fc1(x))
        return x + self.fc2(y)


class Again(OneStatement):
    def forward(self, x):
        y = self.fc1(x)
        z = self.act(y)  # noqa: F841
        return self.fc2(y)


class Branch(OneStatement):
    def forward(self, x):
        x = self.fc1(x)
        if self.training:
            x = self.act(x)
        return self.fc2(x)


class Optional(OneStatement):
    def forward(self, x, again=None):
        return self.fc2(self.act(self.fc1(x)))


class Decorated(OneStatement):
    @torch.no_grad()
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Sequence(T.Sequential):
    def extra_repr(self):
        return "of its own class"


@pytest.mark.parametrize("kind", [OneStatement, Statements, lambda: Sequence(*OneStatement().children())])
def test_a_forward_that_is_a_chain_of_calls(kind, plain_path):
    model, before, report = both(kind())
    assert [s.activation for s in report.swapped] == ["silu", None]
    assert isinstance(model, Chain) and isinstance(model, type(before)) and repr(type(model)) == repr(type(before))
    x = torch.randn(3, 6)
    assert fused(model, x) == ["silu", None]
    assert_as_before(model, before, lambda m: m(x.to(next(m.parameters()).dtype)))


@pytest.mark.parametrize("kind", [Residual, Again, Branch, Optional, Decorated])
def test_any_other_forward_is_left(kind, plain_path):
    model, before, report = both(kind())
    assert type(model) is kind and children_in_order(model) is None
    assert "forward is not known to call it" in {p.name: p.reason for p in report.left}["act"]
    x = torch.randn(3, 6)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), before.train(mode)(x))


def test_source_that_is_not_what_runs_proves_nothing(monkeypatch):
    monkeypatch.setattr(
        "inspect.getsource", lambda function: "def forward(self, x):\n    return self.act(self.fc1(x))\n"
    )

    class Other(OneStatement):
        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    assert children_in_order(Other()) is None
    monkeypatch.setattr("inspect.getsource", lambda function: (_ for _ in ()).throw(OSError))

    class Sourceless(OneStatement):
        def forward(self, x):
            return self.act(self.fc1(x))

    assert children_in_order(Sourceless()) is None


def test_activations_that_ours_are_not():
    for module in (T.LeakyReLU(0.2), T.ReLU6(), T.ELU(), T.Softplus(), T.PReLU(), T.Dropout()):
        assert activation_of(module) is None
        model, _, report = both(T.Sequential(T.Linear(2, 2), module))
        assert type(model) is T.Sequential and report.left[0].reason == "no op of ours"


def test_one_product_before_two_activations(plain_path):
    shared = T.Linear(4, 4)
    model = T.ModuleList([T.Sequential(shared, T.ReLU()), T.Sequential(shared, T.Tanh()), shared])
    model, before, _ = both(model)
    x = torch.randn(3, 4)
    for ours, theirs in zip(model, before, strict=True):
        torch.testing.assert_close(ours(x), theirs(x))
