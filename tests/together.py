"""Several ranks of one run, as torchrun starts them: each a forked child, which has nothing to import again."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, negative for a signal, and what it wrote on stderr and stdout."""

    code: int
    err: str
    out: str


def on_ranks(size: int, work: Callable[[int], int], folder: Path) -> list[Ended]:
    """`work` (rank -> exit code) on each of `size` ranks at the same time; what they write goes through `folder`."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's own, which outlives them all
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                for number, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
                os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
                code = work(rank)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    texts = [[(folder / f"{name}-{rank}").read_text() for name in ("err", "out")] for rank in range(size)]
    return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]
