"""FP8 products are refused where there are none, and change no name of a weight."""

import pytest
import torch
from torch import nn

from elmo_stream.config import load_config
from elmo_stream.errors import UserError
from elmo_stream.model.fp8_linear import require_fp8, use_fp8_


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 5)).to(torch.bfloat16)


def test_a_cpu_is_refused_with_what_to_do() -> None:
    encoder = ["encoder.format=fp8", "encoder.kind=transformer", "encoder.name=any"]
    logits = ["classifier.fp8_logits=true"]
    for keys, message in (
        (encoder, r"encoder\.format: fp8 needs a GPU .* set it to bf16"),
        (logits, r"classifier\.fp8_logits needs a GPU .* set it to false"),
    ):
        with pytest.raises(UserError, match=message):
            require_fp8(load_config(None, keys), torch.device("cpu"))
    require_fp8(load_config(None, []), torch.device("cpu"))
    with pytest.raises(UserError, match=r"classifier\.fp8_logits needs classifier\.format fp8"):
        load_config(None, [*logits, "classifier.format=bf16"])
    with pytest.raises(UserError, match=r"encoder\.format: fp8 is for transformers"):
        load_config(None, ["encoder.format=fp8"])


def test_weights_keep_their_names_and_gradients_those_of_bf16_but_for_rounding() -> None:
    pytest.importorskip("torchao")
    plain, model = _model(), _model()
    use_fp8_(model, emulate=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(24, 48, dtype=torch.bfloat16)
    for each in (plain, model):
        each(x).float().square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        difference = (mine.grad.float() - theirs.grad.float()).norm() / theirs.grad.float().norm()
        assert float(difference) < 0.15, name
        if name == "0.weight":
            assert float(difference) > 1e-3, "no product was rounded to FP8"


@pytest.mark.gpu
def test_products_on_a_gpu_are_those_of_the_emulation_but_for_summation() -> None:
    pytest.importorskip("torchao")
    device = torch.device("cuda")
    require_fp8(load_config(None, ["encoder.format=fp8", "encoder.kind=transformer", "encoder.name=any"]), device)
    real, emulated = _model().to(device), _model().to(device)
    use_fp8_(real)
    use_fp8_(emulated, emulate=True)
    x = torch.randn(24, 48, dtype=torch.bfloat16, device=device)
    torch.testing.assert_close(real(x), emulated(x), rtol=0.05, atol=0.05)
