from __future__ import annotations

import pytest
import torch

from preceptor.errors import ShapeError
from preceptor.objectives import (
    against_baseline,
    aggregate,
    kl_exact,
    kl_k1,
    masked_mean,
    masked_variance,
    reinforce_loss,
    reward_to_go,
    selection_log_probs,
    whiten,
)
from preceptor.objectives.statistics import check_same_shape

TRUE = torch.ones(2, 3, dtype=torch.bool)


def test_message_names_both_tensors_and_the_remedy():
    with pytest.raises(
        ShapeError, match=r"mask has shape \(2,\) and rewards \(2, 3\); .*expand the smaller one"
    ) as caught:
        check_same_shape(rewards=torch.zeros(2, 3), values=torch.zeros(2, 3), mask=torch.zeros(2))
    assert isinstance(caught.value, ValueError)


# Outside the tests nobody checks the annotations, and these would broadcast in silence. __wrapped__ is the function
# without the check of these tests.
@pytest.mark.parametrize(
    ("function", "arguments", "keywords"),
    [
        (masked_mean, (torch.zeros(2, 1), TRUE), {}),
        (whiten, (torch.zeros(2, 1), TRUE), {}),
        (aggregate, (torch.zeros(2, 1), TRUE), {"aggregation": "token_mean"}),
        (against_baseline, (torch.zeros(2, 3), torch.zeros(2, 1)), {}),
        (reward_to_go, (torch.zeros(2, 1), TRUE), {}),
        (reinforce_loss, (torch.zeros(2, 3), torch.zeros(2, 1)), {"mask": TRUE}),
        (kl_k1, (torch.zeros(2, 3), torch.zeros(3)), {}),
        (kl_exact, (torch.zeros(2, 3, 4), torch.zeros(4)), {}),
        (kl_exact, (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), {"mask": TRUE[0]}),
        (selection_log_probs, (torch.zeros(2, 4), torch.zeros(3, 5)), {"available_mask": TRUE, "temperature": 1.0}),
        (selection_log_probs, (torch.zeros(2, 4), torch.zeros(3, 4)), {"available_mask": TRUE[0], "temperature": 1.0}),
    ],
)
def test_silent_broadcasting_is_refused(function, arguments, keywords):
    with pytest.raises(ShapeError):
        function.__wrapped__(*arguments, **keywords)


def test_variance_refuses_too():
    with pytest.raises(Exception, match="shape"):
        masked_variance.__wrapped__(torch.zeros(2, 1), TRUE)
