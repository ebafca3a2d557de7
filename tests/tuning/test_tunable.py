"""The look-up: the settings of exactly the bucket, where they fit, else the default; a broken file breaks no run."""

import json
import warnings

import pytest
import torch
from tuning.problems import PROBLEMS

from primer_fast import functional as F
from primer_fast.kernels import tunable
from primer_fast.kernels.device import CHIPS
from primer_fast.kernels.linear import backward_choice
from primer_fast.kernels.matmul import operands_choice
from primer_fast.kernels.product import MatmulSettings, Product, matmul_choice
from primer_fast.kernels.tunable import Variant, bucket_of, watching
from primer_fast.tuning.registry import SPACES

H100, A100 = CHIPS["sm_90"], CHIPS["sm_80"]
PRODUCT = Product(1024, 1024, 4096, 2, descriptors=True)
MINE = MatmulSettings(64, 64, 32, 4, 3, SPLITS=5, GROUP_M=4)


BUCKET = matmul_choice.bucket(PRODUCT)


@pytest.mark.parametrize("name", SPACES)
def test_every_choice_reads_the_file_of_its_gpu(tuned, name):
    choice, (problem, mine) = SPACES[name].choice, PROBLEMS[name]
    before = choice(H100, problem)
    assert before == choice.default(H100, problem) != mine and choice.fits(H100, problem, mine)
    written = mine._asdict() | {"seconds": 1e-4, "default_seconds": 2e-4}
    tuned(H100, {name: {choice.bucket(problem): written}})
    assert choice(H100, problem) == mine
    assert choice(A100, problem._replace()) == choice.default(A100, problem)


def test_every_choice_is_searched():
    assert {choice.name for choice in tunable._choices} == set(SPACES) == set(PROBLEMS)


def test_every_launcher_asks_its_choice(device):
    """One small run of each op, forward and backward, on a CPU in the interpreter."""
    seen = set()

    def watch(choice, gpu, problem):
        seen.add(choice.name)
        return choice.chosen(gpu, problem)

    def tensor(*shape):
        return torch.randn(shape, device=device, requires_grad=True)

    ids = torch.tensor([0, 2, 1, 2], device=device)
    with watching(watch):
        F.linear(tensor(4, 8), tensor(8, 8), activation="relu").sum().backward()
        F.conv2d(tensor(1, 16, 4, 4), tensor(16, 16, 3, 3)).sum().backward()
        F.conv2d(tensor(1, 4, 4, 4), tensor(4, 1, 3, 3), groups=4).sum().backward()
        F.max_pool2d(tensor(1, 2, 4, 4), 2).sum().backward()
        F.layer_norm(tensor(4, 8), 8, tensor(8), tensor(8)).sum().backward()
        F.embedding(ids, tensor(3, 8)).sum().backward()
        F.linear_log_prob(tensor(4, 8), tensor(3, 8), ids.clamp(max=2)).sum().backward()
        F.scaled_dot_product_attention(tensor(1, 1, 4, 16), tensor(1, 1, 4, 16), tensor(1, 1, 4, 16)).sum().backward()
        torch.use_deterministic_algorithms(False)  # which the tests' own fixture asks for, and restores
        with F.fast_attention_backward():
            half = [tensor(1, 1, 16, 16).detach().bfloat16().requires_grad_() for _ in range(3)]
            F.scaled_dot_product_attention(*half).sum().backward()
        with torch.no_grad():
            F.scaled_dot_product_attention(tensor(1, 1, 1, 16), tensor(1, 1, 512, 16), tensor(1, 1, 512, 16))
    assert seen == set(SPACES)


@pytest.mark.parametrize("change", [{"M": 1000}, {"M": 1400, "N": 800}], ids=str)
def test_an_entry_serves_its_bucket(tuned, change):
    tuned(H100, {"matmul": {BUCKET: MINE._asdict()}})
    assert matmul_choice(H100, PRODUCT._replace(**change)) == MINE


@pytest.mark.parametrize(
    "change", [{"M": 2048}, {"N": 600}, {"itemsize": 4}, {"fused": True}, {"vector": False}, {"count": 2}], ids=str
)
def test_an_entry_serves_no_other_bucket(tuned, change):
    tuned(H100, {"matmul": {BUCKET: MINE._asdict()}})
    other = PRODUCT._replace(**change)
    assert matmul_choice(H100, other) == matmul_choice.default(H100, other) != MINE


def test_settings_that_do_not_fit_the_problem_at_hand_are_passed_over(tuned):
    """Shares that one problem of the bucket has work for and another has not; a tile that shared memory cannot hold."""
    shares = MatmulSettings(64, 64, 64, 4, 3, SPLITS=32)
    tuned(H100, {"matmul": {BUCKET: shares._asdict()}})
    short = PRODUCT._replace(K=2900)  # the same bucket, but 46 steps for 32 shares
    assert matmul_choice.bucket(short) == BUCKET and matmul_choice(H100, PRODUCT) == shares
    assert matmul_choice(H100, short) == matmul_choice.default(H100, short)
    too_large = MatmulSettings(128, 256, 64, 8, 5)  # 5 stages of 48 KiB are 240 KiB, and there are 227
    tuned(H100, {"matmul": {BUCKET: too_large._asdict()}})
    assert matmul_choice(H100, PRODUCT) == matmul_choice.default(H100, PRODUCT)


def test_a_default_that_nothing_beat_stays(tuned):
    tuned(H100, {"matmul": {BUCKET: {"seconds": 1e-3, "default_seconds": 1e-3}}})
    assert matmul_choice(H100, PRODUCT) == matmul_choice.default(H100, PRODUCT)


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"settings": {"matmul": {',
        "[1, 2]",
        '{"settings": []}',
        '{"settings": {"matmul": 3}}',
        json.dumps({"settings": {"matmul": {BUCKET: [1]}}}),
        json.dumps({"settings": {"matmul": {BUCKET: {"BLOCK_M": 64}}}}),
        json.dumps({"settings": {"matmul": {BUCKET: MINE._asdict() | {"SPLITS": "5"}}}}),
        json.dumps({"settings": {"matmul": {BUCKET: MINE._asdict() | {"of another version": 1}}}}),
    ],
)
def test_a_broken_file_is_ignored_with_one_warning(tuned, content):
    path = tuned(H100, content)
    with pytest.warns(UserWarning, match=str(path)) as seen:
        assert matmul_choice(H100, PRODUCT) == matmul_choice.default(H100, PRODUCT)
        matmul_choice(H100, PRODUCT._replace(M=77))
    assert len(seen) == 1


def test_a_way_is_chosen_by_its_name(tuned):
    """Where it cannot compute a problem, the default does."""
    problem = PROBLEMS["matmul_operands"][0]
    tuned(A100, {"matmul_operands": {operands_choice.bucket(problem): {"variant": "descriptors"}}})
    assert operands_choice(A100, problem) == Variant("pointers"), "there are no descriptors"
    tuned(H100, {"matmul_operands": {operands_choice.bucket(problem): {"variant": "pointers"}}})
    assert operands_choice(H100, problem).variant == "pointers"


@pytest.mark.parametrize("name", ["a way of another version", 1, ["prepass"], None])
def test_an_unknown_way_is_ignored_with_one_warning(tuned, name):
    problem = PROBLEMS["linear_backward"][0]
    path = tuned(H100, {"linear_backward": {backward_choice.bucket(problem): {"variant": name}}})
    with pytest.warns(UserWarning, match=f"{path} are ignored: .*must be variant, one of fused, prepass; got") as seen:
        assert backward_choice(H100, problem) == backward_choice.default(H100, problem)
        backward_choice(H100, problem._replace(M=77))
    assert len(seen) == 1


def test_bytes_that_are_no_text_are_ignored(tuned):
    path = tuned(H100, {})
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="ignored"):
        assert matmul_choice(H100, PRODUCT) == matmul_choice.default(H100, PRODUCT)


def test_choices_of_another_version_are_not_looked_at(tuned):
    tuned(H100, {"matmul": {BUCKET: MINE._asdict()}, "fft": {"8": {"RADIX": 4}}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matmul_choice(H100, PRODUCT) == MINE


def test_a_look_up_is_made_once(tuned, monkeypatch):
    tuned(H100, {"matmul": {BUCKET: MINE._asdict()}})
    assert matmul_choice(H100, PRODUCT) == MINE
    monkeypatch.setattr(matmul_choice, "fits", lambda *_: 1 / 0)
    monkeypatch.setattr(matmul_choice, "bucket", lambda *_: 1 / 0)
    assert matmul_choice(H100, PRODUCT) == MINE


def test_a_bucket_is_rounded_sizes_and_flags():
    assert bucket_of(1000, 3, 5000, item=2, desc=True) == "1024x4x4096 item2 desc1" and bucket_of(7) == "8"


def test_watching_ends_with_its_block():
    with pytest.raises(KeyError), watching(lambda *_: MINE):
        assert matmul_choice(H100, PRODUCT) == MINE
        raise KeyError
    assert matmul_choice(H100, PRODUCT) == matmul_choice.default(H100, PRODUCT)
