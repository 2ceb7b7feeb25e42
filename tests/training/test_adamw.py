"""Compact weights and states train as full ones do: nothing is lost on average, and nothing when a run resumes."""

from collections.abc import Iterator

import pytest
import torch

from elmo_stream.config import OptimizerConfig
from elmo_stream.training.adamw import BLOCK, CompactAdamW, _decode, _encode
from elmo_stream.training.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors

SIZE = 3 * BLOCK + 57


def _model(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(48, 37), torch.nn.Tanh(), torch.nn.Linear(37, 5)).to(dtype)


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    generator = torch.Generator().manual_seed(9)
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    x, y = (torch.randn(64, size, generator=generator).to(device) for size in (48, 5))
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small tensors are not worth a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


VARIANTS = [
    (torch.float32, "8bit", "kahan", 2 * 1.05),
    (torch.float32, "bf16", "kahan", 4),
    (torch.bfloat16, "fp32", "stochastic", 8),
    (torch.bfloat16, "bf16", "stochastic", 4),
    (torch.bfloat16, "8bit", "stochastic", 2 * 1.05),
    (torch.bfloat16, "8bit", "kahan", 2 * 1.05 + 2),
]


@pytest.mark.parametrize(("dtype", "states", "rounding", "most_bytes"), VARIANTS)
def test_compact_training_fits_as_well_as_full_training_in_the_promised_bytes(
    dtype: torch.dtype, states: str, rounding: str, most_bytes: float
) -> None:
    full = _model(torch.float32)
    reference = _train(full, torch.optim.AdamW(full.parameters(), lr=3e-3, betas=(0.9, 0.99)), range(150))
    model = _model(dtype)
    optimizer = build_optimizer(model, OptimizerConfig(encoder_lr=3e-3, states=states), rounding=rounding)
    assert isinstance(optimizer, CompactAdamW)
    first = _train(model, optimizer, range(1))
    last = _train(model, optimizer, range(1, 150))
    assert reference < 0.1 * first
    assert last < 0.13 * first
    tensors, _ = optimizer_tensors(optimizer)
    weights = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= most_bytes * weights


@pytest.mark.parametrize(("dtype", "states", "rounding", "most_bytes"), VARIANTS)
def test_a_restored_optimizer_goes_on_with_the_same_bits(
    dtype: torch.dtype, states: str, rounding: str, most_bytes: float
) -> None:
    config = OptimizerConfig(encoder_lr=3e-3, states=states)
    whole, stopped = _model(dtype), _model(dtype)
    optimizer = build_optimizer(whole, config, rounding=rounding)
    assert optimizer is not None
    _train(whole, optimizer, range(7))
    tensors, counters = optimizer_tensors(optimizer)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    stopped.load_state_dict(whole.state_dict())
    _train(whole, optimizer, range(7, 12))
    restored = build_optimizer(stopped, config, rounding=rounding)
    assert restored is not None
    load_optimizer_tensors(restored, saved, counters)
    _train(stopped, restored, range(7, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))
    ends = [optimizer_tensors(each) for each in (optimizer, restored)]
    assert ends[0][1] == ends[1][1]
    for name, tensor in ends[0][0].items():
        assert tensor.dtype == ends[1][0][name].dtype and torch.equal(tensor, ends[1][0][name])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("dtype", "states", "rounding"), [(torch.float32, "8bit", "kahan"), (torch.bfloat16, "bf16", "stochastic")]
)
def test_offloaded_states_lie_in_host_memory_and_train_to_the_same_bits(
    dtype: torch.dtype, states: str, rounding: str, device: str
) -> None:
    ends = []
    for offload in (False, True):
        model = _model(dtype).to(device)
        config = OptimizerConfig(encoder_lr=3e-3, states=states, offload=offload)
        optimizer = build_optimizer(model, config, rounding=rounding)
        assert optimizer is not None
        _train(model, optimizer, range(5))
        tensors, counters = optimizer_tensors(optimizer)
        assert all(tensor.device.type == ("cpu" if offload else device) for tensor in tensors.values())
        load_optimizer_tensors(optimizer, tensors, counters)
        _train(model, optimizer, range(5, 9))
        ends.append([*model.parameters(), *optimizer_tensors(optimizer)[0].values()])
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_eight_bits_are_exact_at_the_codes_and_unbiased_between(signed: bool) -> None:
    torch.manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8)
    values = _decode(codes.int(), signed)
    assert float(values.max()) == 1 and float(values.abs()[values != 0].min()) < (2e-5 if signed else 3e-10)
    exact = values[(codes & 127 if signed else codes + 1) != 0] if signed else values
    assert torch.equal(_decode(_encode(exact, signed).int(), signed), exact)
    between = torch.tensor([0.9, 0.301, 0.0123] + ([-0.77, -0.055] if signed else [1e-7]))
    drawn = torch.stack([_decode(_encode(between, signed).int(), signed) for _ in range(2000)])
    torch.testing.assert_close(drawn.mean(0), between, rtol=0.006, atol=0)
    assert bool((drawn.std(0) > 0).all())


def test_bf16_weights_follow_changes_far_below_their_distance() -> None:
    weight = torch.nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16))
    optimizer = CompactAdamW(
        [{"params": [weight]}], lr=2**-13, betas=(0.9, 0.99), eps=1e-12, states="8bit", kahan=False
    )
    for step in range(64):
        torch.manual_seed(step)
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
    # Adam's step is lr in the direction of a constant gradient; a bfloat16 below 1 has a distance of 2^-8.
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 64 * 2**-13, abs=5e-4)


def test_the_second_moment_in_eight_bits_falls_when_gradients_do() -> None:
    weight = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = CompactAdamW([{"params": [weight]}], lr=0.0, betas=(0.9, 0.99), eps=1e-6, states="8bit", kahan=False)
    large = torch.zeros(SIZE)
    large[::BLOCK] = 1.0  # keeps the scale of its block
    for step in range(400):
        torch.manual_seed(step)
        weight.grad = torch.where(large > 0, 1.0, 1.0 if step < 100 else 1e-3)
        optimizer.step()
    square = optimizer.state[weight]["square"].int()
    others = _decode(square, False)[large == 0].mean()
    expected = 0.99**300 * (1 - 0.99**100)
    assert float(others) == pytest.approx(expected, rel=0.15)
