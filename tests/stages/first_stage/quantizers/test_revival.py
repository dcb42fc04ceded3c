"""Dead codes are revived at times, but not at the end."""

import pytest

from stages.first_stage.quantizers.revival import is_time_to_revive
from stages.options import TokenizerTrainOptions


@pytest.mark.parametrize(
    "every, share, expected",
    [
        (30, None, [30, 60, 90]),
        (19, None, [19, 38, 57, 76]),  # 95 of 100 is too late
        (25, 0.5, [25]),
        (25, 1.0, [25, 50, 75]),
        (10, 0.0, []),
        (0, None, []),
    ],
)
def test_the_end_of_a_training_is_not_disturbed(every, share, expected):
    options = TokenizerTrainOptions(revive_every_steps=every, revive_share=share)
    assert [num_done for num_done in range(1, 101) if is_time_to_revive(options, num_done, 100)] == expected
