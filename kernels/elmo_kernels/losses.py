"""Losses per (label, instance) pair, written for a negative; a positive is its mirror image.

With the logit z and the target y in [0, 1] (0 for negatives), both losses of the table have the form

    loss(z, y) = (1 - y) * value(z) + y * value(-z)
    gradient   = (1 - y) * slope(z) - y * slope(-z)

A plain positive (y = 1) of the binary cross-entropy gets ``-sigmoid(-z)``, never ``sigmoid(z) - 1``, which
cancels: in bfloat16 it is exactly 0 beyond z = 6.5. The reduction is the sum over all pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """Value and slope of the loss of a negative as functions of float32 logits, and what logits mean.

    ``prior`` gives the logit at which a label with a share p of positives starts, so that the first steps need
    not push all labels down (as in Lin et al., ICCV 2017, section 4.1); ``probability`` that of a logit.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    prior: Callable[[float], float]
    probability: Callable[[Tensor], Tensor]


LOSSES = {
    "bce": Loss(
        value=F.softplus,
        slope=lambda z: z.sigmoid(),
        prior=lambda p: math.log(p / (1 - p)),
        probability=lambda z: z.sigmoid(),
    ),
    "squared_hinge": Loss(
        value=lambda z: F.relu(1 + z).square(),
        slope=lambda z: 2 * F.relu(1 + z),
        prior=lambda p: -1.0,
        probability=lambda z: ((z + 1) / 2).clamp(0, 1),
    ),
}


def target_value(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """Loss of pairs with logits ``z`` and targets ``y``, float32 of their shape."""
    return (1 - y) * loss.value(z) + y * loss.value(-z)


def target_slope(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """Gradient with respect to the logits ``z`` of pairs with targets ``y``, float32 of their shape."""
    return (1 - y) * loss.slope(z) - y * loss.slope(-z)
