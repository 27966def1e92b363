"""May we publish there? Asked of the Hub before any long work; nothing is changed by it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmquant.errors import HubError, RecipeError, option
from llmquant.hub.errors import told

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Target:
    """A repository that we may write to. `exists` and `public` are as they were when it was asked for."""

    repo: str
    exists: bool
    public: bool


def check_target(repo: str, *, private: bool | None = None, create_pr: bool = False, tag: str | None = None) -> Target:
    """HubError or RecipeError unless the token may publish to `repo`. Changes nothing; asked before any long work.

    private   True: only into a private repository; False: it becomes public; None: a new one is private, and a public
              one is refused
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils._validators import validate_repo_id

    if create_pr and tag is not None:
        raise RecipeError(
            option("tag"), f"beside {option('create_pr')}", remedy="tag the repository once the pull request is merged"
        )
    if not re.fullmatch(r"[^/]+/[^/]+", repo):
        raise RecipeError(repr(repo), "no name of a repository", expected="owner/name")
    with told(repo):
        validate_repo_id(repo)
    _refuse_offline(repo)
    if get_token() is None:
        raise HubError(repo, "no token of the Hub", remedy="log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with told("whoami"):
        me = api.whoami()
    if not create_pr:
        _check_rights(repo, me)
    with told(repo):
        target = _find(api, repo)
        if target.exists and not create_pr:
            api.auth_check(repo, write=True)
    _check_visibility(target, private, create_pr)
    return target


def _refuse_offline(repo: str) -> None:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise HubError(repo, "HF_HUB_OFFLINE is set", remedy="unset it to publish")


def _check_rights(repo: str, me: Mapping[str, Any]) -> None:
    """What whoami says of the token: the owner's name, the role in an organization, the token's own scope."""
    owner = repo.partition("/")[0]
    orgs = {str(org.get("name")): org for org in me.get("orgs") or []}
    if owner != me.get("name") and owner not in orgs:
        names = ", ".join([str(me.get("name")), *orgs])
        raise HubError(
            repo,
            f"{owner} is not yours",
            expected=f"an owner of {names}",
            remedy=f"check {option('repo')}, or use {option('create_pr')}",
        )
    token = (me.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped") or []
    cannot = bool(scopes) and not any("repo.write" in (scope.get("permissions") or []) for scope in scopes)
    if cannot or token.get("role") == "read" or orgs.get(owner, {}).get("roleInOrg") == "read":
        raise HubError(repo, "the token may only read", remedy="make one with write access and `hf auth login` again")


def _find(api: "HfApi", repo: str) -> Target:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return Target(repo, exists=False, public=False)
    if info.id != repo:
        raise HubError(repo, f"has been renamed to {info.id}", remedy="name it so")
    return Target(repo, exists=True, public=not info.private)


def _check_visibility(target: Target, private: bool | None, create_pr: bool) -> None:
    if create_pr and not target.exists:
        raise HubError(target.repo, "no such repository", remedy=f"a pull request needs one; check {option('repo')}")
    if target.public and private is not False:
        got, remedy = "is public", f"pass {option('public')} to publish there, or name another repository"
        raise HubError(target.repo, got, expected="a private repository", remedy=remedy)
    if create_pr and target.exists and not target.public and private is False:
        raise HubError(
            target.repo, "is private", remedy=f"a pull request does not change that; leave {option('public')} out"
        )
