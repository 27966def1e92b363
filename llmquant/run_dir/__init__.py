"""The only folder that writes. A run fills `<out>.partial` and appears under its own name in one step at the end.

    <out>.partial/job.json        what the run is: its fingerprint
    <out>.partial/journal         finished blocks, one chained line each (`journal.py`)
    <out>.partial/streams-N       all streams after block N (`stream_files.py`), once the journal names it
    <out>.partial/output/         the checkpoint; its shards have their full size from the start (`tensor_files.py`)

A block is committed once its tensors are on the disk (fsync) and then its journal line is (fsync): a kill at any
instant loses the block at work and nothing else. A folder is locked while its run lives. Every change of a file is one
call of `disk.py`.
"""

from llmquant.run_dir.disk import write_json_file
from llmquant.run_dir.folder import RunDir

__all__ = ["RunDir", "write_json_file"]
