"""Chunks that nobody sized keep a GPU busy and stay in its cache."""

import importlib.util

import elmo_kernels as ek
import pytest
import torch
from elmo_kernels.chunk_size import CPU_BLOCKS, gpu_chunk_blocks

MIB = 1 << 20
GPUS = {
    "A100": (108, 40),
    "H100": (132, 50),
    "B200": (148, 126),
    "RTX 4090": (128, 72),
    "RTX 3090": (82, 6),
    "L4": (58, 48),
}


@pytest.mark.parametrize("dim", [16, 80, 128, 384, 768, 1024, 4096])
@pytest.mark.parametrize("gpu", GPUS)
def test_a_chunk_stays_in_half_of_the_cache_and_no_smaller_one_leaves_fewer_processors_idle(gpu: str, dim: int) -> None:
    processors, cache = GPUS[gpu][0], GPUS[gpu][1] * MIB
    chosen, groups = gpu_chunk_blocks(processors, cache, dim), ek.num_groups(dim)
    one_wave = max(1, processors // groups)
    assert chosen <= one_wave or chosen * ek.BLOCK_LABELS * dim <= cache // 2
    assert chosen * groups >= 0.75 * processors

    def idle(blocks: int) -> float:
        return -(blocks * groups) % processors / (processors * -(-blocks * groups // processors))

    assert idle(chosen) == min(idle(blocks) for blocks in range(1, chosen + 1))


def test_at_768_features_large_gpus_get_whole_waves() -> None:
    for gpu, blocks in (("A100", 18), ("H100", 22), ("B200", 74), ("L4", 29)):
        processors, cache = GPUS[gpu][0], GPUS[gpu][1] * MIB
        assert gpu_chunk_blocks(processors, cache, 768) == blocks, gpu
        assert blocks * 6 % processors == 0
    assert gpu_chunk_blocks(82, 6 * MIB, 768) == 13  # no cache of an RTX 3090 would hold enough for its processors


def test_a_cpu_has_a_fixed_size() -> None:
    assert ek.preferred_chunk_labels(torch.device("cpu"), 768) == CPU_BLOCKS * ek.BLOCK_LABELS


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux only")
def test_the_memory_planned_for_a_gpu_is_bounded_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # stands for a GPU whose capability need not be asked for
    from elmo_kernels import triton_ops

    for labels in (1, 22528, 160 * 1024):
        for dim, batch in ((80, 16), (768, 128), (768, 4096)):
            slab = max(triton_ops.SLAB_BYTES, 4 * batch * dim)
            marks = 1024 * ek.num_groups(dim) * -(-labels // 1024)
            assert 0 < triton_ops.topk_bytes(labels, dim, batch) <= max(slab, 8 * batch * 1024)
            temporaries = triton_ops.update_bytes("fp8", labels, dim, batch, torch.device("cpu"))
            assert 4 * batch * dim < temporaries <= slab + marks


@pytest.mark.gpu
def test_what_a_step_and_a_top_k_take_is_what_was_planned() -> None:
    device, labels, dim, batch = torch.device("cuda"), 5000, 384, 130
    for fmt in ek.FORMATS:
        w = ek.make_chunk(fmt, labels, dim, 0, seed=1, std=0.1, device=device)
        x_BD = ek.operand(torch.randn(batch, dim, device=device), fmt)
        dx_BD, flags = torch.zeros(batch, dim, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        g_LB = torch.zeros(labels, batch, dtype=x_BD.dtype, device=device)
        gradients, temporaries = ek.step_bytes(fmt, labels, dim, batch, device)
        assert g_LB.nbytes == gradients
        rest = {"lr": 0.1, "weight_decay": 0.0, "rounding": "nearest", "seed": 0, "step": 0, "flags": flags}
        ek.update_(w, g_LB, x_BD, dx_BD, **rest)  # type: ignore[arg-type]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ek.update_(w, g_LB, x_BD, dx_BD, **rest)  # type: ignore[arg-type]
        assert temporaries <= torch.cuda.max_memory_allocated() - before <= temporaries + 2 * MIB
        scores_BK, ids_BK = torch.full((batch, 7), -torch.inf, device=device), torch.full((batch, 7), -1, device=device)
        torch.cuda.reset_peak_memory_stats()
        ek.topk_merge_(scores_BK, ids_BK, w, x_BD)
        expected = ek.topk_bytes(labels, dim, batch, device)
        assert expected <= torch.cuda.max_memory_allocated() - before <= expected + MIB
