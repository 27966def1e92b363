"""Errors: their parts, across processes; secrets are masked and paths are not; options are named by their field."""

import ast
import importlib
import pickle
import pkgutil
import re
import string
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import llmquant
from llmquant.errors import LLMQuantError, RecipeError, SourceError, option
from llmquant.recipe import from_mapping, make_recipe, parse_size

PACKAGE = Path(llmquant.__file__).parent
LETTERS = string.ascii_letters + string.digits
TEXTS = st.text(max_size=40) | st.sampled_from([option("eval_tokens"), f"use {option('group_size')} 32", "two\nlines"])
TOKENS = st.text(LETTERS, min_size=30, max_size=40).map(lambda letters: f"hf_{letters}")
PATHS = st.lists(st.text(LETTERS + "._-+=~ @,:hf", min_size=1, max_size=50), min_size=1, max_size=5).map("/".join)


def kinds(base: type[LLMQuantError] = LLMQuantError) -> Iterator[type[LLMQuantError]]:
    """The base and all that inherits from it, in every module of the package."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "llmquant."):
        if module.name != "llmquant.__main__":
            importlib.import_module(module.name)
    yield base
    for child in base.__subclasses__():
        yield from kinds(child)


KINDS = sorted(set(kinds()), key=lambda kind: kind.__name__)


def make(kind: type[LLMQuantError], where: str, got: str, expected: str, remedy: str) -> LLMQuantError:
    if kind.__init__ is LLMQuantError.__init__:
        return kind(where, got, expected=expected, remedy=remedy)
    own: Any = kind
    return own(SimpleNamespace(name=where), [got])


@pytest.mark.parametrize("kind", KINDS)
@given(where=TEXTS, got=TEXTS, expected=TEXTS, remedy=TEXTS)
def test_a_pickled_error_is_the_same_error(
    kind: type[LLMQuantError], where: str, got: str, expected: str, remedy: str
) -> None:
    error = make(kind, where, got, expected, remedy)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert vars(copy).keys() == vars(error).keys()
    for name in vars(error).keys() - {"source"}:  # which is of its own process
        assert getattr(copy, name) == getattr(error, name)
    assert copy.message(str.upper) == error.message(str.upper)
    assert len(str(error).splitlines()) <= 1
    assert str(error).isprintable()


def test_there_are_errors_of_every_kind_and_one_with_arguments_of_its_own() -> None:
    assert len(KINDS) > 9
    assert {kind.__name__ for kind in KINDS if kind.__init__ is not LLMQuantError.__init__} == {"OnlyGGUFError"}


def test_an_error_has_its_parts() -> None:
    error = RecipeError(option("bits"), "5", expected="2, 3, 4 or 8", remedy=f"or {option('ignore')} it")
    assert (error.where, error.got, error.expected, error.remedy) == ("--bits", "5", "2, 3, 4 or 8", "or --ignore it")
    assert error.field == "bits"
    assert str(error) == "--bits: 5; expected 2, 3, 4 or 8; or --ignore it"
    assert error.message(lambda field: f"`{field}`") == "`bits`: 5; expected 2, 3, 4 or 8; or `ignore` it"
    assert SourceError("file", "is gone").field is None


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"bits": 5}, "bits"),
        ({"eval_tokens": 1}, "eval_tokens"),
        ({"seed": "x"}, "seed"),
        ({"ignore": ["("]}, "ignore"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"format": "gguf,awq"}, "format"),
        ({"bitz": 4}, None),
    ],
)
def test_an_error_of_a_recipe_names_its_field(values: dict[str, Any], field: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        from_mapping(values)
    assert caught.value.field == field


def test_other_options_are_fields_too() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_size("max_ram", "much")
    assert caught.value.field == "max_ram"
    with pytest.raises(RecipeError, match="--recipe: no recipe 'gone'") as caught:
        make_recipe("x", "gone")
    assert caught.value.field == "recipe"


# -- secrets -------------------------------------------------------------------------------------------
@given(path=PATHS)
def test_a_path_is_shown_as_it_is(path: str) -> None:
    assume(not re.search(r"hf_[A-Za-z0-9]{30}", path))
    error = SourceError(path, "no such folder", remedy=f"look at {path}")
    assert error.where == " ".join(path.split())
    assert "***" not in str(error)


@given(token=TOKENS, before=st.sampled_from(["", "a/", "x_", "token=", "%3D", "Bearer ", "https://user:"]), after=PATHS)
def test_a_token_is_never_shown(token: str, before: str, after: str) -> None:
    for text in (f"{before}{token}", f"{before}{token} {after}", f"{before}{token}@host/{after}"):
        error = SourceError(text, text, expected=text, remedy=text)
        parts = (str(error), error.where, error.got, error.expected, error.remedy, pickle.dumps(error).decode("latin1"))
        assert not any(token in part for part in parts)
        assert "***" in error.where


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("models/hf_backup_final/x", "models/hf_backup_final/x"),
        ("./hf_quantized/model-00001-of-00002.safetensors", "./hf_quantized/model-00001-of-00002.safetensors"),
        ("https://user:p@ss@proxy:8080/x", "https://***@proxy:8080/x"),
        ("https://cdn/x?X-Amz-Date=1&X-Amz-Signature=abc", "https://cdn/x?***"),
        ("https://cdn/x?Policy=abc&Key-Pair-Id=K", "https://cdn/x?***"),
        ("https://cdn/x?sv=1&sig=abc%3D next", "https://cdn/x?*** next"),
        ("https://cdn/x?access_token=abc", "https://cdn/x?***"),
        ("https://huggingface.co/a/b?revision=main", "https://huggingface.co/a/b?revision=main"),
    ],
)
def test_secrets_in_addresses_are_masked(text: str, shown: str) -> None:
    assert str(SourceError(text, "x")) == f"{shown}: x"


# -- options -------------------------------------------------------------------------------------------
# Flags of other programs, and commands that are written out.
WRITTEN_OUT = re.compile(r"(llmquant run|export|llama-gguf-split|hf auth login)( --?[a-z-]+( [a-z]+)?)+")


@pytest.mark.parametrize("file", [f for f in PACKAGE.rglob("*.py") if f.parent.name != "cli"], ids=lambda f: f.stem)
def test_no_error_outside_the_command_line_is_written_with_a_flag(file: Path) -> None:
    for call in ast.walk(ast.parse(file.read_text("utf-8"))):
        called = getattr(call, "func", None)
        if not str(getattr(called, "id", "") or getattr(called, "attr", "")).endswith("Error"):
            continue
        for node in ast.walk(call):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"--[a-z]", WRITTEN_OUT.sub("", node.value)), f"{file.name}: {node.value}"
