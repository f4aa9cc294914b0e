"""Online linear probe: classes of scans by a logistic regression with one penalty that nothing chooses."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot

from dinov2.eval.measures.dense_readout import fit_logistic
from dinov2.eval.online.classes import ClassEvaluator

PENALTY = 1e-2  # of the squared weights of standardised features


class LinearProbe(ClassEvaluator):
    """A linear map of standardised features, fitted to its optimum: no rate, no seed."""

    def probabilities(self, train: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
        return fit_logistic(train, one_hot(labels, num_classes).float(), PENALTY)(queries).softmax(-1)
