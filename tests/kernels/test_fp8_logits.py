"""Logits from FP8 embeddings are those of the rounded embeddings, and rounding loses what the documents say."""

from collections.abc import Callable

import elmo_kernels as ek
import pytest
import torch


def test_rounding_an_instance_loses_a_sixteenth_of_an_element_at_most(cpu_backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x_BD = torch.randn(50, 144, generator=generator) * 2.0 ** torch.randint(-12, 3, (50, 144), generator=generator)
    x_BD *= 2.0 ** torch.randint(-90, 12, (50, 1), generator=generator)
    value_BD, code_BD, exponent_B = ek.fp8_operand(x_BD)
    decoded_BD = code_BD.view(torch.float8_e4m3fn).double() * 2.0 ** exponent_B[:, None].double()
    assert value_BD.double().equal(decoded_BD)
    largest_B1 = x_BD.abs().amax(1, keepdim=True).double()
    error_BD = (decoded_BD - x_BD.double()).abs()
    assert (error_BD <= torch.maximum(2.0**-4 * x_BD.double().abs(), 2.0**-17 * largest_B1)).all()
    assert (error_BD / x_BD.abs()).max() > 2.0**-5, "nothing was rounded"
    assert (code_BD & 0x7F < 0x7E).all(), "something saturated"
    scaled_BD = x_BD.double() * 2.0 ** -exponent_B[:, None].double()
    assert code_BD.equal(scaled_BD.float().to(torch.float8_e4m3fn).view(torch.uint8)), "not the nearest"


def test_a_logit_is_usually_wrong_by_three_hundredths_of_the_spread_of_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BD, w_LD = torch.randn(128, 768, generator=generator), torch.randn(512, 768, generator=generator)
    error_BL = (ek.fp8_operand(x_BD).value_BD - x_BD) @ w_LD.T
    spread_BL = x_BD.square() @ w_LD.square().T
    assert 0.02 < (error_BL.square().mean() / spread_BL.mean()).sqrt() < 0.027


def test_what_is_not_finite_stays_visible(cpu_backend: str) -> None:
    x_BD = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    x_BD[0, 3], x_BD[1, 5] = torch.nan, -torch.inf
    value_BD, _, exponent_B = ek.fp8_operand(x_BD)
    assert value_BD[0, 3].isnan() and value_BD.isfinite().sum() == x_BD.numel() - 1
    assert value_BD[1, 5] == -28672 and exponent_B[1] == 6 and exponent_B[0] < 0


@pytest.mark.parametrize("loss", list(ek.LOSSES))
def test_gradients_are_exact_for_the_rounded_embeddings(cpu_backend: str, loss: str, make_batch: Callable) -> None:
    batch = make_batch(1100, 37, 144, soft=True)
    w = ek.make_chunk("fp8", 1100, 144, 0, seed=3, std=0.2)
    x = ek.fp8_operand(batch.x_BD)
    g_LB, value = ek.logit_grad(w, x, batch, loss=loss, prior=-1.25, want_loss=True)
    z_LB = (ek.dequantize(w).double() @ x.value_BD.double().T - 1.25).requires_grad_()
    y_LB = batch.targets(1100)
    if loss == "bce":
        gold = torch.nn.functional.binary_cross_entropy_with_logits(z_LB, y_LB, reduction="sum")
    else:
        gold = (y_LB * (1 - z_LB).clamp(min=0) ** 2 + (1 - y_LB) * (1 + z_LB).clamp(min=0) ** 2).sum()
    gold.backward()
    assert value is not None and z_LB.grad is not None
    torch.testing.assert_close(value, gold.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(g_LB.double(), z_LB.grad, rtol=1e-4, atol=1e-4)
    exact_LB, _ = ek.logit_grad(w, batch.x_BD, batch, loss=loss, prior=-1.25)
    assert (g_LB - exact_LB).abs().max() > 1e-3, "embeddings were not rounded"


@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
def test_weights_of_other_formats_have_no_product_with_fp8_embeddings(fmt: str, make_batch: Callable) -> None:
    batch = make_batch(10, 2, 16)
    w = ek.make_chunk(fmt, 10, 16, 0, seed=0, std=0.1)
    with pytest.raises(ValueError, match=f"embeddings in FP8 and weights in {fmt}"):
        ek.logit_grad(w, ek.fp8_operand(batch.x_BD), batch, loss="bce")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 128, 768), (1013, 37, 80)], ids=str)
def test_fp8_tensor_cores_give_the_logits_of_the_rounded_embeddings(shape: tuple, make_batch: Callable) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 tensor cores begin with sm_89")
    labels, size, dim = shape
    batch = make_batch(labels, size, dim)
    positives = type(batch)(*(getattr(batch, name).cuda() for name in batch.__dataclass_fields__))
    w = ek.make_chunk("fp8", labels, dim, 0, seed=3, std=0.05, device="cuda")
    x = ek.fp8_operand(ek.operand(positives.x_BD, "fp8"))
    g_LB, _ = ek.logit_grad(w, x, positives, loss="squared_hinge")
    w_LD = ek.dequantize(w).double()
    z_LB = w_LD @ x.value_BD.double().T
    gold_LB = 2 * (1 + z_LB).clamp(min=0)
    gold_LB[positives.label_P, positives.instance_P] = (
        -2 * (1 - z_LB).clamp(min=0)[positives.label_P, positives.instance_P]
    )
    # Tensor cores keep 14 bits or more of the sum over a group; g_LB is bf16.
    allowed_LB = 2.0**-12 * (w_LD.abs() @ x.value_BD.double().abs().T) + 2.0**-8 * gold_LB.abs()
    assert ((g_LB.double() - gold_LB).abs() <= allowed_LB).all()
