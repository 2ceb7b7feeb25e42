"""What a weight format costs in accuracy: one linear classifier, trained in each format on the same batches.

    python -m tools.bench_formats DATASET --seeds 4

DATASET holds ``trn_X_Y.txt`` and ``tst_X_Y.txt`` (header ``N L``, then ``label:1.0`` entries a line), and either
``trn_X_Xf.txt`` and ``tst_X_Xf.txt`` (header ``N V``, ``feature:value`` entries), or ``raw/trn_X.txt`` and
``raw/tst_X.txt`` (a text a line; words and pairs of words are hashed). TF-IDF is projected on its main directions
once. So the problem is convex, and formats differ by their rounding alone. Needs scikit-learn (extra ``demo``).

Columns: P@k and PSP@1 in percent, means over the seeds; differences to fp32 with the 95 % interval of a bootstrap over
test instances, paired; ``distance``, that of the weights from those of fp32 relative to their norm. Exponents
that live elsewhere than in groups of 128 features, and the published arithmetic (Zhang et al., ICML 2025: no
exponents, 20 random bits, then a cast to nearest), are simulated here on the product's own rounding functions.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from elmo_kernels import GROUP_FEATURES, LOSSES
from elmo_kernels import rounding as rd
from elmo_kernels import rounding_numba as rn
from torch import Tensor

from tools.format_data import Dataset, load
from tools.measuring import finish, parser
from tools.tables import Row

STD, DROPOUT, WARM_UP, RESAMPLES, KS = 0.02, 0.3, 0.05, 2000, (1, 3, 5)
FP32, BF16, FP8, PUBLISHED = range(4)
COLUMNS = ("format", "P@1", "P@3", "P@5", "PSP@1", "P@1 - fp32", "P@3 - fp32", "P@5 - fp32", "PSP@1 - fp32", "distance")


@dataclass(frozen=True)
class Format:
    """How weights are kept.

    Attributes:
        kind: one of the rounding rules above. group: features of a label that share an exponent; 0 for one in
            the whole classifier, -1 for none. follows: exponents follow the largest new weight; else they only rise.
        kahan: share of the labels, the most frequent, with a compensation.
    """

    kind: int
    group: int = -1
    follows: bool = True
    kahan: float = 0.0


ROW = 1 << 16
FORMATS = {
    "fp32": Format(FP32),
    "bf16": Format(BF16),
    "fp8": Format(FP8, GROUP_FEATURES),
    "fp8, Kahan 0.2": Format(FP8, GROUP_FEATURES, kahan=0.2),
    "fp8, Kahan 0.5": Format(FP8, GROUP_FEATURES, kahan=0.5),
    "fp8, Kahan 1": Format(FP8, GROUP_FEATURES, kahan=1.0),
    "fp8, group of 16": Format(FP8, 16),
    "fp8, row": Format(FP8, ROW),
    "fp8, row, rising": Format(FP8, ROW, follows=False),
    "fp8, classifier": Format(FP8, 0),
    "fp8, no exponent": Format(FP8),
    "fp8, published": Format(PUBLISHED),
}


@numba.njit(cache=True)
def _round(v, comp, power, group, kind, stream, feature, head, out):  # type: ignore[no-untyped-def]
    """Round rows of ``v`` to the values that a format can hold; the first ``head`` to nearest, with their rest kept."""
    for row in range(v.shape[0]):
        key = rn.row_key(stream, row)
        for j in range(v.shape[1]):
            scale = rn.power_of_two(-power[min(row, power.shape[0] - 1), j // group])
            x, word = v[row, j] * scale, rn.weight_bits(key, feature[j])
            if kind == BF16:
                y = rn.bf16_value(rn.bf16_nearest(x) if row < head else rn.bf16_stochastic(x, word))
            elif kind == FP8:
                y = rn.fp8_value(rn.fp8_nearest(x) if row < head else rn.fp8_stochastic(x, word))
            else:
                kept = np.uint32(np.uint32(rn.fp32_bits(x) + (word >> np.uint32(12))) & np.uint32(0xFFF00000))
                y = rn.fp8_value(rn.fp8_nearest(rn.fp32_value(kept)))
            out[row, j] = y / scale
            if row < head:
                comp[row, j] = rn.bf16_value(rn.bf16_nearest(v[row, j] - out[row, j]))


class Weights:
    """Classifier weights, as float32 values that the format can hold."""

    def __init__(self, form: Format, labels: int, dim: int, seed: int) -> None:
        self._form, self._seed, self._head = form, seed, int(form.kahan * labels)
        self._group = form.group if 0 < form.group < dim else dim
        self._comp_HD = torch.zeros(self._head, dim)
        self._power: Tensor | None = None
        self._feature = rd.feature_key(torch.arange(dim)).to(torch.uint32).numpy()
        self.value_LD = torch.empty(labels, dim)
        self._store(torch.randn(labels, dim, generator=torch.Generator().manual_seed(seed)) * STD, -1)

    def step(self, g_LB: Tensor, x_BD: Tensor, lr: float, step: int) -> None:
        """One step of gradient descent."""
        v_LD = torch.addmm(self.value_LD, g_LB, x_BD, alpha=-lr)
        v_LD[: self._head] += self._comp_HD
        self._store(v_LD, step)

    def _store(self, v_LD: Tensor, step: int) -> None:
        if self._form.kind == FP32:
            self.value_LD = v_LD
            return
        power = self._exponents(v_LD).to(torch.int32).numpy()
        stream = rd.stream_key(self._seed, step)
        out = self.value_LD.numpy()
        _round(
            v_LD.numpy(),
            self._comp_HD.numpy(),
            power,
            self._group,
            self._form.kind,
            stream,
            self._feature,
            self._head,
            out,
        )

    def _exponents(self, v_LD: Tensor) -> Tensor:
        if self._form.group < 0:
            return torch.zeros(1, 1)
        if self._form.group == 0:
            largest = v_LD.abs().max()[None, None]
        else:
            padded_LD = F.pad(v_LD.abs(), (0, -v_LD.shape[1] % self._group))
            largest = padded_LD.unflatten(1, (-1, self._group)).amax(2)
        power = rd.fp8_exponent(largest)
        if not self._form.follows:
            # One binade of room at first; then exponents rise with the largest weight, and never fall.
            power = power + 1 if self._power is None else torch.maximum(self._power, power)
            self._power = power
        return power


def train(form: Format, data: Dataset, seed: int, options: argparse.Namespace) -> Tensor:
    """The trained weights, float32 (L, D)."""
    instances, dim = data.train_ND.shape
    weights = Weights(form, data.labels, dim, seed)
    torch.manual_seed(seed)
    share = float(data.frequency_L.sum()) / (instances * data.labels)
    prior = LOSSES["bce"].prior(share)
    steps = options.epochs * (instances // options.batch)
    for step in range(steps):
        epoch, place = divmod(step, instances // options.batch)
        order = np.random.default_rng((seed, epoch)).permutation(instances)
        chosen = order[place * options.batch : (place + 1) * options.batch]
        x_BD = F.dropout(data.train_ND[torch.from_numpy(chosen)], DROPOUT)
        z_LB = weights.value_LD @ x_BD.T + prior
        g_LB = z_LB.sigmoid()
        label_P = np.concatenate([data.train_labels[i] for i in chosen])
        instance_P = np.repeat(np.arange(len(chosen)), [len(data.train_labels[i]) for i in chosen])
        g_LB[label_P, instance_P] = -torch.sigmoid(-z_LB[label_P, instance_P])
        factor = min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + np.cos(np.pi * step / steps))
        weights.step(g_LB, x_BD, options.lr * factor, step)
    return weights.value_LD


def scores(weights_LD: Tensor, data: Dataset) -> dict[str, np.ndarray]:
    """Percent of each test instance by metric; the gain of PSP@1 is divided by the mean best gain."""
    ids = torch.cat([(x_BD @ weights_LD.T).topk(max(KS)).indices for x_BD in data.test_ND.split(512)]).numpy()
    hit = np.array([np.isin(row, truth) for row, truth in zip(ids, data.test_labels, strict=True)])
    q_L = data.inverse_propensity()
    best = np.array([q_L[truth].max(initial=0) for truth in data.test_labels])
    found = {f"P@{k}": 100 * hit[:, :k].mean(1) for k in KS}
    return found | {"PSP@1": 100 * hit[:, 0] * q_L[ids[:, 0]] / best.mean()}


def difference(mine: np.ndarray, theirs: np.ndarray) -> str:
    """Mean of paired differences with its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    gap = mine - theirs
    means = gap[rng.integers(0, len(gap), (RESAMPLES, len(gap)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{gap.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, print."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.tiny:
        options.instances, options.seeds, options.epochs = 512, 1, 1
    data = load(options.dataset, options.dim, options.instances)
    rows: list[Row] = []
    base: list[tuple[Tensor, dict[str, np.ndarray]]] = []
    for name in ["fp32", *(name for name in options.formats if name != "fp32")]:
        runs = []
        for seed in range(options.seeds):
            value_LD = train(FORMATS[name], data, seed, options)
            runs.append((value_LD, scores(value_LD, data)))
        base = base or runs
        mean, reference = (_mean_scores(some) for some in (runs, base))
        distances = [
            float((mine - exact).norm() / exact.norm()) for (mine, _), (exact, _) in zip(runs, base, strict=True)
        ]
        row: Row = {"format": name} | {metric: f"{value.mean():.2f}" for metric, value in mean.items()}
        row |= {f"{metric} - fp32": difference(value, reference[metric]) for metric, value in mean.items()}
        rows.append(row | {"distance": float(np.mean(distances))})
        print(row, file=sys.stderr, flush=True)
    return finish(options, rows, COLUMNS)


def _mean_scores(runs: list[tuple[Tensor, dict[str, Any]]]) -> dict[str, np.ndarray]:
    return {metric: np.mean([found[metric] for _, found in runs], 0) for metric in runs[0][1]}


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, tiny="512 instances, one epoch: tries the code")
    made.set_defaults(device=torch.device("cpu"))
    made.add_argument("dataset", type=Path)
    made.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), metavar="FORMAT")
    made.add_argument("--instances", type=int, default=0, help="of the training split; 0: all")
    made.add_argument("--seeds", type=int, default=4)
    made.add_argument("--dim", type=int, default=256)
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--threads", type=int, default=1)
    return made


if __name__ == "__main__":
    sys.exit(main())
