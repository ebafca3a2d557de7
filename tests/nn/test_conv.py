import pytest
import torch

from primer_fast.nn import Conv2d

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def test_module_is_torchs_with_an_activation(device):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(3, 4, (3, 2), 2, (1, 0), device=device)
    ours = Conv2d(3, 4, (3, 2), 2, (1, 0), device=device, activation="relu")
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 7, 6, device=device)
    torch.testing.assert_close(ours(x), torch.relu(plain(x)), rtol=1e-5, atol=1e-5)
    assert repr(ours) == "Conv2d(3, 4, kernel_size=(3, 2), stride=(2, 2), padding=(1, 0), activation=relu)"
    with pytest.raises(ValueError, match="Conv2d: activation must be None or one of relu"):
        Conv2d(3, 4, 3, activation="swish")


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_module_pads_as_torch(mode, padding, device):
    plain = torch.nn.Conv2d(2, 3, (4, 3), padding=padding, padding_mode=mode, device=device)
    ours = Conv2d(2, 3, (4, 3), padding=padding, padding_mode=mode, device=device)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 6, 5, device=device)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
