"""Scores that are no numbers are refused, not reported."""
from types import SimpleNamespace

import pytest
import torch

from minillm.errors import UserError
from minillm.validation import score


@pytest.mark.parametrize("loss, of_target", [("inf", -torch.inf), ("nan", torch.nan)])
def test_a_loss_that_is_not_finite_is_refused(loss, of_target):
    targets = torch.tensor([[1, 2, 0]])
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = of_target                  # one token of three
    model = SimpleNamespace(logits_and_stats=lambda x, mask: (logits, None))
    data = SimpleNamespace(folder="pre", n_windows=1, windows=lambda rows: (targets, targets))

    with pytest.raises(UserError, match=f"the loss on pre is {loss}: the model's weights"):
        score(model, data, False, 1, 0, torch.device("cpu"), torch.float32)
