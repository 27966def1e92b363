"""The version of llmquant, and of the libraries that compute its output."""

VERSION = "0.1.0"


def installed(package: str) -> str | None:
    """The version of an installed package, None where it is missing; ours also in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return VERSION if package == "llmquant" else None


def versions(*more: str) -> dict[str, str]:
    """Versions of what computed the output; `more` names packages that not every run uses."""
    from importlib.metadata import version

    always = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return always | {name: installed(name) or "of unknown version" for name in more} | {"llmquant": VERSION}
