import pytest
import torch

from primer_fast.data.drawn_digits import draw_digits
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import supervised
from primer_fast.train.supervised import SupervisedConfig


def test_the_same_seed_draws_the_same_digits():
    first, again, other = (draw_digits(40, 20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.train_images, again.train_images) and torch.equal(first.test_labels, again.test_labels)
    assert not torch.equal(first.train_images, other.train_images)


def test_digits_are_bytes_and_balanced():
    digits = draw_digits(50, 20)
    assert digits.train_images.shape == (50, 28, 28) and digits.train_images.dtype == torch.uint8
    assert digits.train_labels.bincount().tolist() == [5] * 10 and digits.test_labels.bincount().tolist() == [2] * 10
    assert digits.test_images.amin() < 20 and digits.test_images.amax() > 100
    assert len({image.numpy().tobytes() for image in digits.train_images}) == 50, "no image twice"


@pytest.mark.parametrize("counts", [(15, 10), (10, 0), (-10, 10)])
def test_counts_that_cannot_be_balanced_are_refused(counts):
    with pytest.raises(ValueError, match="must be a positive multiple of 10; got"):
        draw_digits(*counts)


def test_a_linear_model_does_worse_than_a_cnn(plain_path):
    torch.manual_seed(3)  # of the first weights
    digits = draw_digits(2000, 500)
    config = SupervisedConfig(epochs=6, batch_size=100, warmup_steps=10, lr=5e-3)
    right = []
    for model in (MLP(MLPConfig((784, 10))), CNN(CNNConfig(channels=(8, 16), hidden=(32,)))):
        state = supervised.start(model, config)
        for _ in supervised.train(state, digits.train_images, digits.train_labels, config):
            pass
        right.append(supervised.evaluate(model, digits.test_images, digits.test_labels, config)[1])
    linear, cnn = right
    assert 0.5 < linear < 0.93 and cnn > linear + 0.03
