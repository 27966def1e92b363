"""A checkpoint on the Hub: one pinned commit, headers by range requests, shards downloaded one ahead."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from llmquant.errors import LLMQuantError, SourceError, option
from llmquant.source.base import Source, relative
from llmquant.source.header import header_length

T = TypeVar("T")
TIMEOUT = 30.0  # seconds without a byte from the Hub


def open_hub(repo: str, revision: str | None, trust_remote_code: bool) -> Source:
    """The repository at its commit. Offline: what an earlier download left in the local cache."""
    from huggingface_hub import is_offline_mode, snapshot_download

    if not is_offline_mode():
        return HubSource(repo, revision, trust_remote_code=trust_remote_code)
    folder = Path(_hub(repo, lambda: snapshot_download(repo, revision=revision, local_files_only=True)))
    return Source(repo, folder, folder.name, trust_remote_code=trust_remote_code)


def dataset_commit(repo: str) -> str | None:
    """The current commit of a dataset on the Hub. Raises what huggingface_hub raises."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repo, timeout=TIMEOUT).sha


def reach_hub(limit: float = 2.0) -> float:
    """Seconds that the Hub at HF_ENDPOINT takes to answer a small request without a token.

    SourceError, with the reason, where there is no answer of a Hub within `limit` seconds.
    """
    from huggingface_hub import constants, get_session

    found: Future[Any] = Future()
    url, session = f"{constants.ENDPOINT}/api/models?limit=1", get_session()

    def ask() -> None:
        try:
            found.set_result(session.get(url, timeout=limit))
        except Exception as error:  # any failure is the answer
            found.set_exception(error)

    begin = time.perf_counter()
    threading.Thread(target=ask, daemon=True).start()  # looking a name up has no timeout of its own
    try:
        response = found.result(limit)
    except TimeoutError:
        raise SourceError("Hub", f"no answer within {limit:g} s") from None
    except Exception as error:
        raise SourceError("Hub", _brief(error)) from None
    kind = response.headers.get("content-type", "")
    if response.status_code >= 500 or kind.startswith("text/html"):  # a web page is a proxy's
        raise SourceError("Hub", f"status {response.status_code} {kind}".rstrip(), expected="an answer of a Hub")
    return time.perf_counter() - begin


class HubSource(Source):
    """A repository on the Hub at one pinned commit.

    Headers come by range requests. A shard is downloaded whole when its first tensor is read or `prefetch` names it;
    one thread downloads one file at a time, while blocks of the shard before are quantized.
    """

    def __init__(self, repo: str, revision: str | None, *, trust_remote_code: bool = False) -> None:
        from huggingface_hub import HfApi

        self._api = HfApi()
        self._repo = repo
        self._fetched: dict[str, Future[str]] = {}
        self._waiting: deque[str] = deque()
        self._fetching = False
        self._lock = threading.Lock()
        info = _hub(repo, lambda: self._api.model_info(repo, revision=revision, timeout=TIMEOUT, files_metadata=True))
        if info.sha is None or info.siblings is None:
            raise SourceError(repo, "the Hub names no commit for it")
        self._sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
        self.revision = info.sha
        super().__init__(repo, Path(), info.sha, trust_remote_code=trust_remote_code)
        self.folder = self.local("config.json").parent

    def files(self) -> list[str]:
        return sorted(self._sizes)

    def size_of(self, file: str) -> int | None:
        return self._sizes[file]

    def local(self, file: str) -> Path:
        return Path(_hub(f"{self._repo}/{file}", self._future(relative(file)).result))

    def prefetch(self, names: Iterable[str]) -> None:
        for file in dict.fromkeys(self.tensors[name].file for name in names):
            self._future(file)

    def is_local(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self._repo, self.tensors[name].file, revision=self.revision), str)

    def download_bytes(self) -> int:
        return sum(info.nbytes for name, info in self.tensors.items() if not self.is_local(name))

    def _future(self, file: str) -> "Future[str]":
        """The download of a file; a new one where the last has failed."""
        with self._lock:
            future = self._fetched.get(file)
            if future is None or (future.done() and future.exception() is not None):
                self._fetched[file] = Future()
                self._waiting.append(file)
                if not self._fetching:
                    self._fetching = True
                    # A daemon, unlike the threads of an executor: nobody waits for a shard after Ctrl-C.
                    threading.Thread(target=self._fetch, name="llmquant-fetch", daemon=True).start()
            return self._fetched[file]

    def _fetch(self) -> None:
        from huggingface_hub import hf_hub_download

        while True:
            with self._lock:
                if not self._waiting:
                    self._fetching = False
                    return
                file = self._waiting.popleft()
            try:
                self._fetched[file].set_result(hf_hub_download(self._repo, file, revision=self.revision))
            except BaseException as error:
                self._fetched[file].set_exception(error)

    def _header(self, file: str) -> tuple[bytes, int]:
        from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status

        if isinstance(try_to_load_from_cache(self._repo, file, revision=self.revision), str):
            return super()._header(file)
        url = hf_hub_url(self._repo, file, revision=self.revision)

        def first(count: int) -> bytes:
            # The Hub's file servers ignore ranges unless compression is refused; other servers always ignore them.
            headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
            data = bytearray()
            with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
                hf_raise_for_status(response)
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) >= count:
                        break
            return bytes(data[:count])

        size = _hub(url, lambda: get_hf_file_metadata(url)).size
        if size is None:
            raise SourceError(f"{self._repo}/{file}", "the Hub gives no size")
        start = _hub(url, lambda: first(min(size, 256 * 1024))) if size else b""
        length = header_length(file, start, size)
        if len(start) < 8 + length:
            start = _hub(url, lambda: first(8 + length))
        return start[8 : 8 + length], size


def _hub(where: str, call: Callable[[], T]) -> T:
    """The result of `call()`. Every way in which the Hub can fail becomes a SourceError with a line of its own."""
    from huggingface_hub import errors as hub

    try:
        return call()
    except hub.GatedRepoError:
        got, remedy = "access is gated", "accept its terms on the Hub, then `hf auth login` or set HF_TOKEN"
    except hub.RevisionNotFoundError:
        got, remedy = "no such revision", f"check {option('revision')}"
    except hub.RepositoryNotFoundError:
        got, remedy = "no such model on the Hub, or it is private", "check the id, or log in with `hf auth login`"
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        got, remedy = (
            f"not in the local cache, and the Hub cannot be reached ({_brief(error)})",
            "check HF_HUB_OFFLINE and the network, or name a local folder",
        )
    except hub.EntryNotFoundError:
        got, remedy = "no such file in the repository", "check the revision"
    except hub.HFValidationError:
        got, remedy = "neither a local folder nor a Hub id", "check the path, or use owner/name"
    except hub.HfHubHTTPError as error:
        got, remedy = f"the Hub answered with an error ({_brief(error)})", "try again later"
    except ValueError as error:
        got, remedy = f"not an answer of a Hub ({_brief(error)})", "check the network and HF_ENDPOINT"
    except OSError as error:  # the connection, or the disk of the cache
        got, remedy = f"cannot be fetched ({_brief(error)})", "check the network and the disk, or name a local folder"
    except Exception as error:  # the HTTP client's own connection errors; their class depends on its version
        if isinstance(error, LLMQuantError) or not type(error).__module__.startswith("httpx"):
            raise
        got, remedy = f"the Hub cannot be reached ({_brief(error)})", "check the network, or name a local folder"
    raise SourceError(where, got, remedy=remedy)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
