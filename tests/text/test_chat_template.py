"""Conversations become text by the model's own chat template, which is a stranger's program."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import ARCHITECTURES, build

from llmquant.errors import CalibrationError
from llmquant.source.resolve import open_source
from llmquant.text.corpus import DATASETS, Text
from llmquant.text.tokenizer import as_text, load_tokenizer
from llmquant.text.windows import calibration_windows

CHATS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"A number: {n}. " * 20}]
    for n in range(8)
]
TEXT = Text("ultrachat", [json.dumps(chat) for chat in CHATS], "r" * 40, chats=True)
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"


def tokenizer_with(template: str | None) -> Any:
    tokenizer = load_tokenizer(open_source("demo"))
    tokenizer.chat_template = template
    return tokenizer


def test_the_template_of_the_model_is_applied_to_every_conversation() -> None:
    wanted = ["".join(f"<|{m['role']}|>{m['content']}\n" for m in chat) for chat in CHATS]
    assert as_text(tokenizer_with(TEMPLATE), TEXT) == "\n\n".join(wanted)
    assert as_text(tokenizer_with(TEMPLATE), Text("t", ["a", "b"])) == "a\n\nb"


def test_calibration_windows_are_cut_from_the_rendered_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "ultrachat", lambda split, limit: TEXT)
    tokenizer = tokenizer_with(TEMPLATE)
    windows = calibration_windows(tokenizer, "ultrachat", 4, 64, seed=0)
    rendered = as_text(tokenizer, TEXT)
    for ids in windows.ids:
        inside = tokenizer.decode(ids[2:-2])
        assert inside in rendered
    assert (windows.dataset, windows.revision) == ("ultrachat", "r" * 40)


HOSTILE = {
    "reads files by subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaches globals": "{{ messages.append.__self__.__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    "formats an attribute": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "changes the messages": "{% set _ = messages.append({'role': 'x', 'content': 'y'}) %}",
    "imports": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch OWNED') }}",
    "raises": "{{ raise_exception('roles must alternate') }}",
    "is no template": "{% for %}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_or_broken_template_is_stopped(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CalibrationError, match=r"^ultrachat: the model's chat template fails \((Security|Template|Undef)"
    ):
        as_text(tokenizer_with(template), TEXT)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"no chat template.*wikitext2"):
        as_text(tokenizer_with(None), TEXT)


# -- tekken.json ---------------------------------------------------------------------------------------
def test_a_tekken_alone_is_called_by_name_or_read_by_mistral_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(tmp_path / "m", ARCHITECTURES["llama"])
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tekken.json").write_text("{}")
    source = open_source(folder)
    assert source.side_files() == ["generation_config.json", "tekken.json"]
    monkeypatch.setattr("llmquant.text.tokenizer.find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"its tokenizer is tekken\.json; .*; pip install mistral-common"):
        load_tokenizer(source)
    monkeypatch.setattr("llmquant.text.tokenizer.find_spec", lambda name: True)
    import transformers

    stand_in = SimpleNamespace(from_pretrained=lambda folder: f"of {folder}")  # the package is not installed here
    monkeypatch.setattr(transformers, "MistralCommonBackend", stand_in, raising=False)
    assert load_tokenizer(source) == f"of {folder}"
    (folder / "tokenizer.model").write_text("of another vocabulary, so of that one's reader")
    with pytest.raises(CalibrationError, match="tokenizer cannot be loaded"):
        load_tokenizer(open_source(folder))
