"""The helpers themselves, where they must not fail."""

from __future__ import annotations

import torch


def test_a_forked_process_does_not_stand_still_where_this_one_has_used_two_threads(small):
    """It inherits the record of PyTorch's threads and none of them: an operation that is shared out waits for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).sum()
        assert small.in_a_fork(lambda: torch.zeros(1 << 20)) == 0
    finally:
        torch.set_num_threads(before)
