"""Conversations in the columns that people have them in -> one form, lists of {"role", "content"}.

messages, conversations   lists of {"role", "content"}, or ShareGPT's {"from", "value"}
Alpaca                    instruction, input (may be empty), output
pairs                     prompt and response, or prompt and completion
"""

from collections.abc import Mapping
from typing import Any

Chat = list[dict[str, str]]
_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (("instruction", "output"), ("prompt", "response"), ("prompt", "completion"))
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def chat_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a row that hold a conversation; () where none do.

    >>> chat_columns({"id": 1, "conversations": [{"from": "human", "value": "Hi"}]})
    ('conversations',)
    >>> chat_columns({"instruction": "Say hi.", "input": "", "output": "Hi"})
    ('instruction', 'output')
    >>> chat_columns({"text": "Hi"})
    ()
    """
    for name in _LISTS:
        if isinstance(row.get(name), list):
            return (name,)
    return next((pair for pair in _PAIRS if all(isinstance(row.get(name), str) for name in pair)), ())


def read_chat(row: Mapping[str, Any], columns: tuple[str, ...]) -> Chat | None:
    """The conversation in these columns of a row; None where there is none that is text.

    >>> read_chat({"instruction": "Add.", "input": "1, 2", "output": "3"}, ("instruction", "output"))
    [{'role': 'user', 'content': 'Add.\\n\\n1, 2'}, {'role': 'assistant', 'content': '3'}]
    """
    if len(columns) == 1:
        messages = row.get(columns[0])
        read = [_message(message) for message in messages] if isinstance(messages, list) else []
        return [message for message in read if message is not None] if read and None not in read else None
    asked, answered = (row.get(name) for name in columns)
    if not isinstance(asked, str) or not isinstance(answered, str):
        return None
    more = row.get("input") if columns[0] == "instruction" else None
    asked = f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _message(message: Any) -> dict[str, str] | None:
    if not isinstance(message, Mapping):
        return None
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list):  # parts, of which those of text are taken where there is nothing else
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": _ROLES.get(role.lower(), role), "content": content}
