"""Publishing a finished checkpoint on the Hub.

Files of weights are sent first, one by one, and belong to no commit. Then one commit makes everything visible at once,
config and index included. If a push is killed, the repository stays as it was, and the next push sends only what is
missing. A new repository is private; `--public` opens it after all files in it have been compared.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmquant.errors import HubError, VerifyError, option
from llmquant.hub.errors import AGAIN, clean, told
from llmquant.hub.target import check_target
from llmquant.log import SILENT, Log, Progress, progress_of
from llmquant.output.check import verify_folder
from llmquant.output.check_files import CARD, read_json
from llmquant.paths import expanded
from llmquant.report.card import make_card
from llmquant.report.data import RunReport
from llmquant.report.plain import parse_file
from llmquant.run_dir.manifest import COST, MANIFEST, json_bytes, sha256

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

_THEIRS = (".gitattributes",)  # what the Hub itself puts into a new repository


@dataclass(frozen=True)
class Item:
    """A file to be published: `data` is its path or its bytes."""

    data: Path | bytes
    bytes: int
    sha256: str

    @property
    def blob_id(self) -> str:
        """Git's SHA-1 of the content, by which the Hub knows files outside of LFS."""
        content = self.data if isinstance(self.data, bytes) else self.data.read_bytes()
        return hashlib.sha1(b"blob %d\0" % self.bytes + content).hexdigest()

    def is_at(self, there: "RepoFile | None") -> bool:
        if there is None:
            return False
        return there.lfs.sha256 == self.sha256 if there.lfs is not None else there.blob_id == self.blob_id


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    base_model: str | None = None,
    keep_card: bool = False,
    log: Log = SILENT,
) -> str:
    """Publish what `llmquant` wrote to `folder` as the model `repo`, and return its address.

    The folder is verified first, and compared with the repository afterwards. The card is made for the repository's
    name from report.json; the other files of the manifest are sent as they are. `keep_card` sends README.md as it is
    in the folder. `base_model` names the original on the Hub where the folder was made from a local one. `private`: see
    `check_target`.
    Raises VerifyError, RecipeError or HubError; after a HubError nothing is visible, and the same call continues.
    """
    from huggingface_hub import HfApi

    progress = progress_of(log)
    root = expanded(folder, VerifyError)
    report = _finished_report(root)
    target = check_target(repo, private=private, create_pr=create_pr, tag=tag)
    found = verify_folder(root)
    if found.card_changed and not keep_card:
        raise VerifyError(
            str(root / CARD),
            "is not as the run wrote it, and would be replaced",
            remedy=f"{option('keep_card')} publishes it as it is",
        )
    progress.line(f"{root}: {found.files} files are right")
    if found.added:
        progress.line(f"not of the run, and not published: {', '.join(found.added)}")
    items = _items(root, (root / CARD).read_bytes() if keep_card else make_card(repo, report, base_model).encode())
    api = HfApi()
    with told(repo):
        if not target.exists:
            api.create_repo(repo, private=True)
            progress.line(f"{repo}: made, private")
        change = _compared(api, repo, items)
        if tag is not None:
            _check_tag(api, repo, tag, change)
        url, revision = _upload(api, repo, change, create_pr, progress)
        _refuse_differences(_tree(api, repo, revision), items, repo)
        progress.line(f"{len(items)} files compared with those of the repository: all are equal")
        if tag is not None:
            api.create_tag(repo, tag=tag, revision=revision, exist_ok=True)
        if private is False and not target.public and not create_pr:
            api.update_repo_settings(repo, private=False)
            progress.line(f"{repo}: is public now")
    return url


def _finished_report(root: Path) -> RunReport:
    """The report of a finished folder, with all that the card needs."""
    if not (root / MANIFEST).is_file():
        got = "no manifest.json" if root.is_dir() else "no such folder"
        raise VerifyError(str(root), got, expected="a folder that `llmquant run` or `llmquant export` finished")
    report = parse_file(RunReport, root / "report.json")
    if not report.runtimes or not report.files:
        raise VerifyError(str(root / "report.json"), "is an earlier version's", remedy="quantize or export again")
    return report


def _items(root: Path, repository_card: bytes) -> dict[str, Item]:
    """Every file of the manifest and the manifest, with the card of the repository in place of the folder's."""
    items, manifest = {}, read_json(root, MANIFEST)
    for name, entry in manifest["files"].items():
        path = root / name
        items[name] = Item(path, path.stat().st_size, sha256(path) if name == COST else entry["sha256"])
    card = _of_bytes(repository_card)
    manifest["files"][CARD] = {"bytes": card.bytes, "sha256": card.sha256}
    return items | {CARD: card, MANIFEST: _of_bytes(json_bytes(manifest))}


def _of_bytes(data: bytes) -> Item:
    return Item(data, len(data), hashlib.sha256(data).hexdigest())


def _tree(api: "HfApi", repo: str, revision: str) -> dict[str, "RepoFile"]:
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


@dataclass(frozen=True)
class Change:
    """What a push has to do: files to send, files of an earlier checkpoint to remove, at the commit `head`."""

    items: Mapping[str, Item]
    stale: tuple[str, ...]
    head: str | None


def _compared(api: "HfApi", repo: str, items: Mapping[str, Item]) -> Change:
    """Only what differs is sent. Files of an earlier checkpoint of ours go; strangers' files are refused."""
    head = api.model_info(repo).sha
    there = _tree(api, repo, head or "main")
    stale = sorted(there.keys() - items.keys() - set(_THEIRS))
    earlier = _files_of_manifest(api, repo, head) if stale and MANIFEST in there else set()
    if strange := [name for name in stale if name not in earlier]:
        some = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
        raise HubError(
            repo,
            f"holds files that are not of this checkpoint ({some})",
            remedy=f"delete them, or use another {option('repo')}",
        )
    return Change({n: item for n, item in items.items() if not item.is_at(there.get(n))}, tuple(stale), head)


def _files_of_manifest(api: "HfApi", repo: str, revision: str | None) -> set[str]:
    """What an earlier push put there; nothing where the manifest is not one of ours."""
    path = api.hf_hub_download(repo, MANIFEST, revision=revision)
    try:
        return set(json.loads(Path(path).read_bytes())["files"])
    except (ValueError, TypeError, KeyError):
        return set()


def _check_tag(api: "HfApi", repo: str, tag: str, change: Change) -> None:
    """A tag may be there already only where it points at the very commit that would be tagged."""
    for known in api.list_repo_refs(repo).tags:
        if known.name == tag and (change.items or change.stale or known.target_commit != change.head):
            raise HubError(repo, f"its tag {tag} is at another commit", remedy=f"choose another {option('tag')}")


def _upload(api: "HfApi", repo: str, change: Change, create_pr: bool, log: Progress) -> tuple[str, str]:
    """Weights one by one, then one commit of all that differs. The address and the revision of it."""
    from huggingface_hub import CommitOperationDelete, constants

    address = f"{_endpoint(constants.ENDPOINT)}/{repo}"
    if not change.items and not change.stale:
        log.line(f"{repo}: all files are there already")
        return address, change.head or "main"
    if isinstance(card := getattr(change.items.get(CARD), "data", None), bytes):
        _check_card(card, repo)
    new = {name: _operation(name, item) for name, item in change.items.items()}
    weights = [name for name in new if name.endswith((".safetensors", ".gguf"))]
    for number, name in enumerate(weights, 1):
        log.line(f"{name}: {change.items[name].bytes / 1e6:.1f} MB, file {number} of {len(weights)}")
        api.preupload_lfs_files(repo, [new[name]], create_pr=create_pr, free_memory=False)
    log.line(f"committing {len(new)} files" + (f", removing {len(change.stale)}" if change.stale else ""))
    with warnings.catch_warnings(record=True) as notes:  # the Hub's about the card
        done = api.create_commit(
            repo,
            [*new.values(), *(CommitOperationDelete(name) for name in change.stale)],
            commit_message="Upload a checkpoint quantized with llmquant",
            create_pr=create_pr,
            parent_commit=change.head,
        )
    for note in notes:
        log.line(f"the Hub notes: {clean(str(note.message))}")
    if not create_pr:
        return address, done.oid
    if done.pr_num is None or done.pr_revision is None:
        raise HubError(repo, "the Hub names no pull request", remedy="look for it there")
    return f"{address}/discussions/{done.pr_num}", done.pr_revision


def _operation(name: str, item: Item) -> "CommitOperationAdd":
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, item.data if isinstance(item.data, bytes) else str(item.data))
    operation.upload_info.sha256 = bytes.fromhex(item.sha256)  # known: spares reading the file once more
    return operation


def _check_card(card: bytes, repo: str) -> None:
    """HubError for a card whose head the Hub does not accept; one that a user wrote may be no UTF-8 or no YAML."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        ModelCard(card.decode()).validate()
    except (ValueError, YAMLError) as error:
        raise HubError(f"{repo}: {CARD}", f"the Hub does not accept its head ({clean(str(error))})") from None


def _refuse_differences(there: Mapping[str, "RepoFile"], items: Mapping[str, Item], repo: str) -> None:
    """VerifyError unless the repository holds exactly these bytes."""
    for name, item in items.items():
        if not item.is_at(there.get(name)):
            got = "is not what was sent" if name in there else "is missing after the upload"
            raise VerifyError(f"{repo}/{name}", got, remedy=f"do not use it; {AGAIN}")


def _endpoint(url: str) -> str:
    """Without a user's name and password, which a proxy's address may hold."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
