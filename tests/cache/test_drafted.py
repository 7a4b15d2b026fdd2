from __future__ import annotations

import torch

from server.cache.drafted import known_ids, stored_ids
from server.core.unread import unread


def test_unread_ids_are_taken_from_the_device() -> None:
    drafted = torch.tensor([40, -1, 42])
    ids = torch.tensor([[7, unread(0), unread(2)], [0, unread(1), 9]])
    assert stored_ids(ids, drafted).tolist() == [[7, 40, 42], [0, -1, 9]]
    assert known_ids(ids, drafted).tolist() == [[7, 40, 42], [0, 0, 9]], "some token or other"
    assert known_ids(ids, None) is ids
