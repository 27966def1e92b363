"""The only room that writes. A run fills `<out>.partial`; at the end its output gets the name `<out>` in one step.

    <out>.partial/job.json        what the run is: its fingerprint
    <out>.partial/journal         finished blocks, one line each, chained by hashes (`journal.py`)
    <out>.partial/streams-N       all streams after block N (`stream_files.py`), valid once the journal names it
    <out>.partial/curvature-N     what the predictions depend on in block N (`curvature_files.py`), likewise
    <out>.partial/output/         the checkpoint; its shards have their full size from the start (`tensor_files.py`)

A block is committed in two steps: first its tensors are synced to the disk, then its line in the journal. So a kill at
any instant loses the block in progress and nothing else. The folder is locked while its run lives. Every change of a
file is one call of `disk.py`.
"""

from llmquant.run_dir.disk import write_json_file
from llmquant.run_dir.folder import RunDir
from llmquant.run_dir.follower import FollowedRun

__all__ = ["FollowedRun", "RunDir", "write_json_file"]
