from __future__ import annotations

from finetune.export.shard_writer import assign_shards


def test_tensors_are_assigned_to_files_in_order():
    assert assign_shards([3, 3, 9, 1, 2], 6) == [[0, 1], [2], [3, 4]]
    assert assign_shards([9], 1) == [[0]]
