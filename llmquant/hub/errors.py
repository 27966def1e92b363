"""Every way in which the Hub, or the way to it, can fail while publishing: one line each, without secrets.

Told are our own text, the status, and the server's message without anything that looks like a token.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmquant.errors import HubError, LLMQuantError, RecipeError, option

AGAIN = "start the same command again: what is there already is not sent again"

_STATUS: dict[int, tuple[str, str]] = {
    401: ("the Hub does not accept the token", "log in again with `hf auth login --force`; HF_TOKEN goes before it"),
    403: ("the token may not do this", f"use a token with write access to it, or {option('create_pr')}"),
    404: ("no such repository, or it is not yours to see", "check owner/name and the token"),
    412: ("the repository was changed in the meantime", AGAIN),
    409: ("the repository is being changed by somebody else", AGAIN),
    413: ("too large for the Hub", f"use a smaller {option('max_shard_size')}"),
    429: ("too many requests", f"wait some minutes, then {AGAIN}"),
}


@contextmanager
def told(where: str) -> Iterator[None]:
    """Every way in which the Hub or the way to it can fail, as a HubError of one line without secrets."""
    from huggingface_hub import errors as hub

    try:
        yield
        return
    except LLMQuantError:
        raise
    except hub.HFValidationError:
        failure: LLMQuantError = RecipeError(
            repr(where), "no name of a repository", expected="owner/name in letters, digits, - _ and ."
        )
    except Exception as error:
        known = _failure(where, error)
        if known is None:
            raise
        failure = known
    raise failure from None  # the client's own error may quote the request, and a traceback would show it


def _failure(where: str, error: BaseException) -> LLMQuantError | None:
    """None for what is not the Hub's doing: a bug of ours."""
    from huggingface_hub import errors as hub

    for cause in _chain(error):
        if isinstance(cause, hub.OfflineModeIsEnabled):
            return HubError(where, "HF_HUB_OFFLINE is set", remedy="unset it to publish")
        if isinstance(cause, hub.LocalTokenNotFoundError):
            return HubError(where, "no token of the Hub", remedy="log in with `hf auth login`, or set HF_TOKEN")
        if isinstance(cause, hub.HfHubHTTPError):
            return _refusal(where, cause)
        kind = type(cause)
        if kind.__module__.startswith("httpx"):  # the client's own; its name depends on the version
            if "Timeout" in kind.__name__:
                return HubError(where, f"the Hub did not answer in time ({kind.__name__})", remedy=AGAIN)
            if kind.__name__ != "HTTPStatusError":
                return HubError(where, f"the connection failed ({kind.__name__})", remedy=f"check it, then {AGAIN}")
        if kind.__module__.startswith("hf_xet"):
            return HubError(where, f"the upload failed ({clean(str(cause))})", remedy=AGAIN)
    if isinstance(error, ConnectionError | TimeoutError):
        return HubError(where, f"the connection failed ({type(error).__name__})", remedy=f"check it, then {AGAIN}")
    if isinstance(error, RuntimeError):  # what hf_xet raises
        return HubError(where, f"the upload failed ({clean(str(error))})", remedy=AGAIN)
    if isinstance(error, OSError):
        return HubError(where, f"a file cannot be read ({error.strerror or type(error).__name__})")
    if isinstance(error, ValueError):  # an answer that the client cannot read
        return HubError(where, f"not an answer of a Hub ({type(error).__name__})", remedy="check HF_ENDPOINT")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: uploads wrap the reason."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _refusal(where: str, error: Any) -> HubError:
    """By status, with what the server says itself: it knows of quotas and terms that we do not."""
    from huggingface_hub.errors import RepositoryNotFoundError

    status = error.response.status_code
    said = clean(error.server_message or "")
    got, remedy = _STATUS.get(status, (f"the Hub answered {status}", "see what it says"))
    if status >= 500:
        got, remedy = f"the Hub has a failure of its own ({status})", f"later {AGAIN}"
    elif status in _STATUS:
        if isinstance(error, RepositoryNotFoundError):  # also said with 401
            got, remedy = _STATUS[404]
        got = f"{got} ({status})"
    return HubError(where, f"{got}: {said}" if said else got, remedy=remedy)


def clean(text: str) -> str:
    """A server's words, short and without anything that is or looks like a token."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "***")
    text = re.sub(r"hf_\w+|Bearer \S+|https?://\S+", "***", text)
    return " ".join(text.split())[:200]
