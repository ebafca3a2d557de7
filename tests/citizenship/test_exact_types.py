"""Tools that look for torch's modules by their exact type, or by isinstance, on models that hold ours."""

import copy
import pickle
import warnings

import pytest
import torch
from parity import OneStatement
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune

import primer_fast
from primer_fast import nn
from primer_fast.models.transformer import Transformer, TransformerConfig

T = torch.nn
pytestmark = [
    pytest.mark.usefixtures("plain_path"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="torch cannot quantize here"),
]
DYNAMIC = "torch.ao.nn.quantized.dynamic.modules.linear"


def written_with_ours():
    """As a user's file makes it whose import line was changed: no replacing has taken place."""
    return T.Sequential(nn.Linear(6, 8), T.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))


def replaced():
    model = T.Sequential(T.Linear(6, 8), T.ReLU(), T.LayerNorm(8), T.Linear(8, 3))
    primer_fast.replace_modules(model)
    return model


def as_torchs(model):
    twin = T.Sequential(T.Linear(6, 8), T.ReLU(), T.LayerNorm(8), T.Linear(8, 3))
    twin.load_state_dict(model.state_dict())
    return twin


SPECS = {
    "torch's class": {T.Linear},
    "our class": {nn.Linear},
    "nothing": None,
    "names": {"0", "3"},
    "configurations": {T.Linear: quantization.default_dynamic_qconfig},
}


@pytest.mark.parametrize("make", [replaced, written_with_ours])
@pytest.mark.parametrize("spec", SPECS)
def test_dynamic_quantization_is_of_torchs_modules(make, spec):
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 6)
    kinds = [type(m) for m in model.modules()]
    ours = quantization.quantize_dynamic(model, SPECS[spec])
    theirs_spec = {T.Linear} if spec == "our class" else SPECS[spec]
    theirs = quantization.quantize_dynamic(as_torchs(model), theirs_spec)
    assert type(ours[0]).__module__ == DYNAMIC and isinstance(ours[2], T.LayerNorm)
    assert [type(ours[i]) for i in (0, 1, 3)] == [type(theirs[i]) for i in (0, 1, 3)]
    assert torch.equal(ours(x), theirs(x))
    assert [type(m) for m in model.modules()] == kinds, "what was handed over is not changed"


def test_dynamic_quantization_of_embeddings_and_of_a_chain_of_calls():
    model = T.Sequential(T.Embedding(9, 6), OneStatement())
    primer_fast.replace_modules(model)
    ids = torch.randint(9, (2, 3))
    spec = {
        T.Embedding: quantization.float_qparams_weight_only_qconfig,
        OneStatement: quantization.default_dynamic_qconfig,  # for what it contains, by its type before
    }
    quantized = quantization.quantize_dynamic(model, spec, inplace=True)
    assert quantized is model and type(model[1]) is OneStatement
    assert type(model[0]) is torch.ao.nn.quantized.Embedding
    assert type(model[1].fc1).__module__ == DYNAMIC
    assert model(ids).shape == (2, 3, 6)


def calibrated(model, x):
    model.eval()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    prepared = quantization.prepare(quantization.QuantWrapper(model))
    prepared(x)
    return quantization.convert(prepared)


def test_static_quantization():
    torch.manual_seed(0)
    model = T.Sequential(T.Conv2d(2, 4, 3), T.ReLU(), T.MaxPool2d(2), T.Flatten(), T.Linear(16, 3))
    before, x = copy.deepcopy(model), torch.randn(3, 2, 6, 6)
    primer_fast.replace_modules(model)
    quantized, wanted = calibrated(model, x), calibrated(before, x)
    assert [type(m) for m in quantized.modules()] == [type(m) for m in wanted.modules()]
    assert torch.equal(quantized(x), wanted(x))


def test_a_configuration_set_by_hand():
    model = replaced()
    model[0].qconfig = quantization.default_dynamic_qconfig
    mapping = quantization.get_default_dynamic_quant_module_mappings()
    converted = quantization.convert(model, mapping)
    assert type(converted[0]).__module__ == DYNAMIC and type(converted[3]) is nn.Linear


def test_training_that_knows_of_quantization():
    model = replaced().train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    assert type(quantization.prepare_qat(model)[0]) is torch.ao.nn.qat.Linear


def test_what_cannot_be_torchs_is_named():
    model = T.Sequential(nn.Linear(4, 4, activation="gelu"), nn.Linear(4, 4), nn.Linear(4, 2))
    parametrizations.weight_norm(model[1])
    wanted = (
        r"does not know these modules of primer_fast, and leaves them as they are: "
        r"0 \(its activation is gelu, which Linear lacks\), 1 \(a subclass of primer_fast.nn.Linear\)$"
    )
    with pytest.warns(UserWarning, match=wanted):
        quantized = quantization.quantize_dynamic(model, {T.Linear})
    assert [type(m).__module__ == DYNAMIC for m in quantized] == [False, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantization.quantize_dynamic(as_torchs(replaced()), {T.Linear})


def test_what_is_not_quantized_stays_ours():
    """A model that hands ours what torch's do not take: positions to the table, the residual to the norm."""
    config = TransformerConfig(vocab=11, context=8, width=16, layers=1, heads=2)
    model, ids = Transformer(config).eval(), torch.randint(11, (2, 5))
    with pytest.warns(UserWarning, match=r"as they are: blocks.0.up \(its activation is gelu"):
        quantized = quantization.quantize_dynamic(model, {T.Linear})
    kinds = {name: type(m) for name, m in quantized.named_modules()}
    assert kinds["blocks.0.down"].__module__ == DYNAMIC and nn.LayerNorm in kinds.values()
    want = model(ids)
    assert 0 < (quantized(ids) - want).abs().max() < 0.05 * want.abs().max()


def test_pruning_finds_ours():
    from torch.ao.pruning import WeightNormSparsifier

    model = replaced()
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, None)
    sparsifier.step()
    assert [group["tensor_fqn"] for group in sparsifier.groups] == ["0.weight", "3.weight"]
    assert (model[0].weight == 0).float().mean() == 0.5


def test_restore_modules_needs_no_report():
    model = pickle.loads(pickle.dumps(replaced()))
    weights, x = list(model.parameters()), torch.randn(4, 6)
    y = model(x)
    report = primer_fast.restore_modules(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in as_torchs(model).modules()]
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True)) and "activation" not in vars(model[0])
    torch.testing.assert_close(model(x), y)
    assert primer_fast.restore_modules(model).swapped == ()
    report.restore()
    assert [type(m) for m in model] == [nn.Linear, T.ReLU, nn.LayerNorm, nn.Linear]
    torch.testing.assert_close(model(x), y)
    assert primer_fast.restore_modules(nn.Linear(2, 2, activation="relu")).left[0].reason.startswith("its activation")
    with pytest.raises(TypeError, match=r"restore_modules: model must be a torch.nn.Module; got int"):
        primer_fast.restore_modules(3)


def test_tools_that_ask_isinstance():
    model = T.Sequential(*replaced())
    seen = []
    model.apply(lambda m: seen.append(m) if isinstance(m, T.Linear | T.LayerNorm) else None)
    assert len(seen) == 3
    before = as_torchs(model)
    for m in (model, before):
        parametrizations.weight_norm(m[0])
        parametrizations.orthogonal(m[3])
        prune.random_unstructured(m[2], "weight", 2)
    before.load_state_dict(model.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), before(x))
