"""Paths as people write them: the only place where a ~ is replaced by a home folder."""

from pathlib import Path

from llmquant.errors import LLMQuantError


def expanded(path: str | Path, kind: type[LLMQuantError]) -> Path:
    """`path` with the home folder in place of a leading ~ or ~user; an error of this `kind` where there is none.

    >>> from llmquant.errors import SourceError
    >>> expanded("models/~x", SourceError).as_posix()
    'models/~x'
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise kind(str(path), f"no home folder for {user}", remedy=f"a folder of this name is ./{user}") from None


def shown_name(path: Path) -> str:
    r"""The last part of `path` as text that can be written: bytes that are no UTF-8 are escaped.

    >>> shown_name(Path("models/a\udcff"))
    'a\\udcff'
    """
    return path.name.encode("utf-8", "backslashreplace").decode()
