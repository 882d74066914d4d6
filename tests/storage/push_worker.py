"""Pushes data sets: a JSON line of arguments on standard input, a JSON line with the URL or the error on the output.
With "read", it says which captions a data set has for those who train on it; with "fetch" it downloads a model, with
"upload" it uploads one.

A process of its own, because the clients read the address of the Hub when they are imported.
"""

import json
import os
import sys
from pathlib import Path

from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.errors import UserError
from mlxmm.storage import dataset_push, hub, retries

retries.WAITS = (0.01,) * 5  # seconds
retries.READ_WAITS = (0.01,) * 3


def captions(**settings) -> dict:
    rows = open_source(CaptionDataConfig(**settings), seed=0).rows
    return {split: [[row["image"].size, row["captions"]] for row in part] for split, part in rows.items()}


answers, sys.stdout = sys.stdout, sys.stderr  # what a try says is no answer
for line in sys.stdin:
    job = json.loads(line)
    token = job.pop("token")
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {"HF_TOKEN": token} if token else {}
    try:
        if "read" in job:
            answer = captions(**job["read"])
        elif "fetch" in job:
            answer = {"folder": str(hub.local_folder(job["fetch"]))}
        elif "upload" in job:
            answer = {"url": hub.upload(Path(job["upload"]), job["repo_id"])}
        else:
            answer = {"url": dataset_push.push_dataset(Path(job.pop("folder")), **job)}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
