from __future__ import annotations

from finetune.export.shard_writer import in_shards


def test_pieces_are_shared_out_to_files_in_their_order():
    assert in_shards([None] * 5, [3, 3, 9, 1, 2], 6) == [[0, 1], [2], [3, 4]]
    assert in_shards([None], [9], 1) == [[0]]
