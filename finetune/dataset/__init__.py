"""Data: files -> validated conversations -> prepared examples on disk -> sampler, packing, collator, dataloader.

A row of this project's own format is

    {"id": 0, "conversations": [{"from": "human", "value": "..."}, {"from": "model", "value": "..."}]}

A row may begin with a system turn; human and model turns alternate and the last one is the model's. Rows and turns
count from 0. All faults of all files are found, and nothing that a row holds is left out or changed without a message.
"""
