"""Where a chunk lives changes memory and time, not a bit; what goes wrong on a disk is said in one sentence."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from elmo_kernels import BLOCK_LABELS

from elmo_stream.config import ClassifierConfig
from elmo_stream.data.batch import Positives, sort_positives
from elmo_stream.errors import CorruptError
from elmo_stream.model.classifier import ChunkedClassifier
from elmo_stream.model.placement import DEVICE, MAPPED, PINNED, ChunkPlan, plan_chunks

LABELS, DIM, BATCH, CHUNK = 4700, 16, 7, 1024
CHUNKS = 5
CPU = torch.device("cpu")
FORMATS = [
    {"format": "fp32"},
    {"format": "bf16"},
    {"format": "fp8"},
    {"format": "bf16", "rounding": "kahan"},
    {"format": "fp8", "kahan_head": 0.3},
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The chunks are tiny; threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _batch(step: int) -> tuple[torch.Tensor, Positives]:
    rng = np.random.default_rng(step)
    rows = [np.sort(rng.choice(LABELS, rng.integers(0, 6), replace=False)) for _ in range(BATCH)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    x_BD = torch.from_numpy(rng.standard_normal((BATCH, DIM)).astype(np.float32))
    return x_BD, sort_positives(np.concatenate(rows), offsets, num_labels=LABELS, block_labels=BLOCK_LABELS)


def _placed(config: ClassifierConfig, places: dict[str, int]) -> ChunkPlan:
    """So many chunks pinned and mapped, taken in turn from both ends, the rest resident."""
    layouts = plan_chunks(LABELS, DIM, config).layouts
    order = [i for pair in zip(range(len(layouts)), reversed(range(len(layouts))), strict=True) for i in pair]
    numbers = iter(dict.fromkeys(order))
    where = dict.fromkeys(range(len(layouts)), DEVICE)
    for place, count in places.items():
        where.update(dict.fromkeys(itertools.islice(numbers, count), place))
    return ChunkPlan(layouts, tuple(where.values()))


class _Run:
    """A classifier on a device with its chunks at some places."""

    def __init__(self, keys: dict[str, object], places: dict[str, int], scratch: Path, device: torch.device = CPU,
                 weights: object = None) -> None:  # fmt: skip
        config = ClassifierConfig(chunk_labels=CHUNK, **keys)  # type: ignore[arg-type]
        self.device = device
        self.classifier = ChunkedClassifier(
            LABELS, DIM, config, prior=0.01, seed=3, device=device, plan=_placed(config, places), scratch=scratch,
            weights=weights,  # type: ignore[arg-type]
        )  # fmt: skip

    def steps(self, first: int, last: int) -> "_Run":
        for step in range(first, last):
            x_BD, positives = _batch(step)
            if self.device.type == "cuda":
                moved = [getattr(positives, f).to(self.device) for f in Positives.__slots__]
                x_BD, positives = x_BD.to(self.device), Positives(*moved)
            self.classifier.train_step(x_BD, positives, lr=0.1, step=step)
            if step % 50 == 7:  # evaluations between steps
                self.classifier.topk(x_BD, 5)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {}
        for _, _, tensors in self.classifier.state_chunks():
            for name, tensor in tensors.items():
                found.setdefault(name, []).append(tensor.clone())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def close(self) -> dict[str, torch.Tensor]:
        kept = self.weights()
        self.classifier.close()
        return kept


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("keys", FORMATS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_placement_changes_no_bit_nor_does_a_change_of_it_at_a_resume(keys: dict[str, object], tmp_path: Path) -> None:
    steps, stop = (200, 90) if "kahan_head" in keys else (20, 9)
    reference = _Run(keys, {}, tmp_path).steps(0, steps).close()
    for mapped in (1, CHUNKS // 2, CHUNKS):
        assert _same(_Run(keys, {MAPPED: mapped}, tmp_path).steps(0, steps).close(), reference), f"{mapped} mapped"
    saved = _Run(keys, {MAPPED: CHUNKS // 2}, tmp_path).steps(0, stop).close()
    for mapped in (0, CHUNKS):
        later = _Run(keys, {MAPPED: mapped}, tmp_path, weights=lambda name, first, last: saved[name][first:last])
        assert _same(later.steps(stop, steps).close(), reference), f"{mapped} mapped after a resume"
    assert list(tmp_path.iterdir()) == [], "scratch files stay behind"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "places", [{PINNED: 2}, {PINNED: CHUNKS}, {MAPPED: 2}, {MAPPED: CHUNKS}, {PINNED: 2, MAPPED: 2}]
)
def test_placement_changes_no_bit_on_a_gpu(places: dict[str, int], tmp_path: Path) -> None:
    device = torch.device("cuda")
    for keys in FORMATS:
        reference = _Run(keys, {}, tmp_path, device).steps(0, 200).close()
        assert _same(_Run(keys, places, tmp_path, device).steps(0, 200).close(), reference), keys


def test_topk_is_the_same_from_disk(tmp_path: Path) -> None:
    x_BD, _ = _batch(1)
    one, other = (_Run({}, {MAPPED: mapped}, tmp_path) for mapped in (0, CHUNKS))
    for _ in range(3):
        expected, found = one.classifier.topk(x_BD, 9), other.classifier.topk(x_BD, 9)
        assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


def test_a_pass_that_was_broken_off_does_not_disturb_the_next(tmp_path: Path) -> None:
    run = _Run({}, {MAPPED: 4}, tmp_path)
    expected = run.weights()
    pieces: Iterator[object] = run.classifier.state_chunks()
    for _ in range(2):
        next(pieces)
    del pieces
    assert _same(run.weights(), expected)


def test_scratch_files_have_no_holes_and_go_with_the_classifier(tmp_path: Path) -> None:
    run = _Run({}, {MAPPED: CHUNKS}, tmp_path)
    files = sorted(tmp_path.glob("*/chunk-*"))
    assert len(files) == CHUNKS
    for path, layout in zip(files, run.classifier.plan.layouts, strict=True):
        assert path.stat().st_size == layout.bytes
        assert path.stat().st_blocks * 512 >= layout.bytes
    del run
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "removed", "altered"])
def test_a_scratch_file_that_someone_cut_removed_or_altered_ends_training_and_is_named(
    tmp_path: Path, damage: str
) -> None:
    run = _Run({}, {MAPPED: CHUNKS}, tmp_path).steps(0, 2)
    for _ in run.classifier.state_chunks():  # so that all are written, and no more than the first are read ahead
        pass
    path = sorted(tmp_path.glob("*/chunk-*"))[4]
    if damage == "removed":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, 4096)
    else:
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    with pytest.raises(CorruptError, match=f"{path}.*elmo-stream resume"):
        run.steps(2, 5)
    run.classifier.close()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    alive = _Run({}, {MAPPED: CHUNKS}, tmp_path)
    before = set(tmp_path.iterdir())
    (tmp_path / "elmo-stream-scratch-killed").mkdir()
    (tmp_path / "elmo-stream-scratch-killed" / "chunk-00000").write_bytes(b"x" * 4096)
    (tmp_path / "mine.txt").write_text("a file of the user")
    other = _Run({}, {MAPPED: CHUNKS}, tmp_path)
    assert before < set(tmp_path.iterdir()) and not (tmp_path / "elmo-stream-scratch-killed").exists()
    assert (tmp_path / "mine.txt").exists()
    assert _same(alive.steps(0, 3).close(), other.steps(0, 3).close())


def test_chunks_cover_all_labels_in_whole_blocks() -> None:
    for labels in (1, 1023, 1024, 1025, 100_000_000):
        for wanted in (0, 1, 1000, 4096, labels):
            if labels // (wanted or labels) > 50_000:
                continue
            layouts = plan_chunks(labels, 16, ClassifierConfig(chunk_labels=wanted)).layouts
            assert layouts[0].first == 0 and layouts[-1].last == labels
            assert all(a.last == b.first and a.last % BLOCK_LABELS == 0 for a, b in itertools.pairwise(layouts))


@pytest.mark.parametrize("keys", FORMATS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_as_many_chunks_as_fit_stay_on_the_device(keys: dict[str, object]) -> None:
    config = ClassifierConfig(chunk_labels=CHUNK, **keys)  # type: ignore[arg-type]
    everything = plan_chunks(LABELS, DIM, config)
    total, largest = everything.bytes_at(DEVICE), max(layout.bytes for layout in everything.layouts)
    assert plan_chunks(LABELS, DIM, config, device_room=total).at(DEVICE) == everything.at(DEVICE)
    for room in range(4 * largest, total, 1500):
        plan = plan_chunks(LABELS, DIM, config, device_room=room)
        used = plan.bytes_at(DEVICE) + plan.staging_bytes(MAPPED)
        assert used <= room
        assert not plan.at(PINNED) and plan.at(MAPPED)
        assert used + 2 * largest > room, "a chunk more would have fitted"
        on_gpu = plan_chunks(LABELS, DIM, config, device_room=room, host_room=total)
        assert on_gpu.at(PINNED) == plan.at(MAPPED) and not on_gpu.at(MAPPED)
    both = plan_chunks(LABELS, DIM, config, device_room=4 * largest - 1, host_room=3 * largest)
    assert both.bytes_at(PINNED) + both.staging_bytes(MAPPED) <= 3 * largest
