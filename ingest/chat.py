"""How do records that hold conversations become records that hold text, and who wrote which characters of it?

Each record's list of messages is rendered with a chat template; the text takes the place of the list, and a column `roles`
tells which characters are whose (FORMAT.md, section 7). Contents that hold a special token of the template's tokenizer would
be read as the template's own markers, so they are refused unless that is asked for.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from actstore.corpus import ROLES, ROLES_TYPE
from actstore.errors import ErrorKind, InvalidInputError

from .chat_spans import RenderError, SpansNotProvedError, find_spans
from .chat_template import ChatTemplate
from .documents import missing_column
from .records import BadDocuments, Records, Source

MAX_ROLES = 1_000
"""Different roles in a corpus: beyond it they are data rather than roles."""

_MAX_ROLE_CHARS = 64
_FROM_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
"""Roles of the `from`/`value` convention (ShareGPT) that have another name in chat templates."""

_ADVICE = "repair the record"

Message = dict[str, Any]


class _BadChatError(ValueError):
    """A record's messages cannot be a document: what was found, and what the user can do."""


@dataclass(frozen=True, slots=True)
class Chat:
    """How conversations become text."""

    template: ChatTemplate
    column: str
    """The source's column of messages."""

    allow_special_tokens: bool
    """Whether contents may hold special tokens, which then are read as such."""

    @property
    def config(self) -> dict[str, Any]:
        """What a corpus's configuration says of it."""
        return {"allow_special_tokens": self.allow_special_tokens}

    @property
    def info(self) -> dict[str, Any]:
        """What a corpus remembers of where its text came from."""
        return {"chat_template": self.template.name, "chat_template_sha256": self.template.sha256}


def parse_messages(value: Any) -> list[Message]:
    """Return a record's messages with a `role` and, where they have one, a `content` that is a string.

    Raises:
        _BadChatError: it is no list of messages.

    >>> parse_messages([{"from": "human", "value": "Hi"}, {"role": "tool", "content": [{"type": "text", "text": "4"}]}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'tool', 'content': '4'}]
    """
    if not isinstance(value, list | tuple):
        raise _BadChatError(f"the messages are a {type(value).__name__}, not a list")
    if not value:
        raise _BadChatError("the conversation has no message")
    return [_parse_message(message, i) for i, message in enumerate(value)]


def _parse_message(value: Any, i: int) -> Message:
    if not isinstance(value, Mapping):
        raise _BadChatError(f"message {i} is a {type(value).__name__}, not an object")
    message: Message = {str(key): item for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:
        sender = message.pop("from")
        message = {"role": _FROM_ROLES.get(sender, sender) if isinstance(sender, str) else sender, **message}
        if "value" in message:
            message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str) or not 0 < len(role) <= _MAX_ROLE_CHARS:
        raise _BadChatError(f"message {i} has the role {role!r:.80}, not a short name such as 'user'")
    if "content" in message:
        message["content"] = _parse_content(message["content"], i)
    return message


def _parse_content(content: Any, i: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise _BadChatError(f"message {i} has a content of type {type(content).__name__}, not text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise _BadChatError(f"message {i} has a part of type {kind!r:.40}, and only text is read")
        texts.append(text)
    return "".join(texts)


def render_chat(messages: Sequence[Message], template: ChatTemplate) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of a conversation, and role, start and end of each message that has a content.

    Raises:
        RenderError: the template refuses the messages.
        SpansNotProvedError: the template changes a content so that its place is unknown.
    """
    with_content = [i for i, message in enumerate(messages) if "content" in message]

    def render(contents: list[str]) -> str:
        changed = list(messages)
        for i, content in zip(with_content, contents, strict=True):
            changed[i] = {**messages[i], "content": content}
        return template.render(changed)

    text = template.render(messages)
    spans = find_spans([messages[i]["content"] for i in with_content], text, render)
    return text, [
        {"role": messages[i]["role"], "start": start, "end": end}
        for i, (start, end) in zip(with_content, spans, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class ChatSource:
    """A source of conversations, read as one of text."""

    inner: Source
    chat: Chat
    keeps_roles: bool
    """Whether a column `roles` of the source's own was asked for, which there is no room for."""

    seen_roles: set[str] = field(default_factory=set)

    @property
    def description(self) -> str:
        """The inner source's."""
        return self.inner.description

    @property
    def warnings(self) -> tuple[str, ...]:
        """The inner source's, and whether the template writes the date."""
        if not self.chat.template.tells_time:
            return self.inner.warnings
        return (
            *self.inner.warnings,
            "the chat template may write today's date into every document, so that importing on another day gives another "
            "corpus: set it, where the template allows, with chat_variables={'date_string': ...}",
        )

    @property
    def schema(self) -> pa.Schema | None:
        """The inner source's with text and roles instead of messages.

        Raises:
            InvalidInputError: no column of messages.
        """
        inner = self.inner.schema
        if inner is None:
            return None
        self._check_names(inner.names)
        fields = [pa.field(f.name, pa.large_string()) if f.name == self.chat.column else f for f in inner]
        return pa.schema([f for f in fields if f.name != ROLES])

    def read(self, bad: BadDocuments) -> Iterator[Records]:
        """Yield the inner source's records with text and roles instead of messages."""
        for records in self.inner.read(bad):
            self._check_names(_names(records))
            found = [
                self._render(value, place, bad) for value, place in zip(*self._messages(records), strict=True)
            ]
            kept = [i for i, rendered in enumerate(found) if rendered is not None]
            if kept:
                yield _replaced(records, self.chat.column, [found[i] for i in kept], kept)

    def _check_names(self, names: Sequence[str]) -> None:
        if self.chat.column not in names:
            raise missing_column(
                "messages column", "messages_column", self.chat.column, names, where=self.description
            )
        if self.keeps_roles and ROLES in names:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{self.description} has a column {ROLES!r} of its own, where a corpus of conversations keeps who wrote what: "
                "leave it out with columns=",
            )

    def _messages(self, records: Records) -> tuple[list[Any], list[str]]:
        if isinstance(records.rows, list):
            return [row.get(self.chat.column) for row in records.rows], records.places
        return records.rows.column(self.chat.column).to_pylist(), records.places

    def _render(self, value: Any, place: str, bad: BadDocuments) -> tuple[str, list[dict[str, Any]]] | None:
        try:
            messages = parse_messages(value)
            self._check_special(messages)
            rendered = render_chat(messages, self.chat.template)
        except RenderError as error:
            bad.reject(place, f"the chat template refuses the conversation ({error})", _ADVICE)
        except SpansNotProvedError as error:
            bad.reject(place, str(error), "use another template, or one of its variables")
        except _BadChatError as error:
            bad.reject(place, str(error), _ADVICE)
        else:
            self._note_roles(messages, place)
            return rendered
        return None

    def _check_special(self, messages: list[Message]) -> None:
        tokens = self.chat.template.special_tokens
        if not tokens or self.chat.allow_special_tokens:
            return
        pattern = re.compile("|".join(map(re.escape, tokens)))  # the re module keeps the compiled one
        for i, message in enumerate(messages):
            for text in _strings(message):
                if match := pattern.search(text):
                    raise _BadChatError(
                        f"message {i} holds {match[0]!r}, which the tokenizer takes for a special token: it would forge the "
                        "template's own (allow_special_tokens=True lets it)"
                    )

    def _note_roles(self, messages: list[Message], place: str) -> None:
        self.seen_roles.update(message["role"] for message in messages)
        if len(self.seen_roles) > MAX_ROLES:
            raise InvalidInputError(
                ErrorKind.TOO_LARGE,
                f"{place}: more than {MAX_ROLES} different roles up to here: give messages roles that the template knows",
            )


def _names(records: Records) -> list[str]:
    if isinstance(records.rows, list):
        return [str(name) for name in dict.fromkeys(name for row in records.rows for name in row)]
    names: list[str] = records.rows.schema.names
    return names


def _strings(value: Any) -> Iterator[str]:
    """Yield every string inside a message, keys too: a template may write any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _replaced(records: Records, column: str, rendered: list[Any], kept: list[int]) -> Records:
    """Return the kept records with their text and roles."""
    places = [records.places[i] for i in kept]
    keys = None if records.keys is None else [records.keys[i] for i in kept]
    texts = [text for text, _ in rendered]
    roles = [spans for _, spans in rendered]
    if isinstance(records.rows, list):
        rows = [
            {**records.rows[i], column: text, ROLES: spans}
            for i, text, spans in zip(kept, texts, roles, strict=True)
        ]
        return Records(rows, places, keys)
    batch = records.rows.take(pa.array(kept, pa.int64()))
    arrays = {name: batch.column(name) for name in batch.schema.names}
    arrays |= {column: pa.array(texts, pa.large_string()), ROLES: pa.array(roles, ROLES_TYPE)}
    return Records(pa.RecordBatch.from_pydict(arrays), places, keys)
