"""The version of llmquant, and of the libraries that compute its output."""

VERSION = "0.1.0"


def installed(package: str) -> str | None:
    """The version of an installed package, None where it is missing; ours also in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return VERSION if package == "llmquant" else None


def versions() -> dict[str, str]:
    """Versions of what computed the output."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "safetensors")} | {"llmquant": VERSION}
