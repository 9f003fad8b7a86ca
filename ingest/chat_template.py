"""Which chat template is meant, and what text does it make of a conversation?

Templates are programs from the hub: transformers renders them in its sandbox (no access to Python's objects, and nothing but
plain data to see), and no code of a model repository is ever run.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore._lazy import lazy_import
from actstore.errors import ErrorKind, InvalidInputError

from .chat_spans import RenderError
from .tokenizers import load_from_hub, special_texts

_SUFFIXES = (".jinja", ".jinja2", ".j2")
_MAX_TEMPLATE = 1 << 20
_TOKEN_VARIABLE = re.compile(r"\b(?:bos|eos|pad|unk|sep|cls)_token\b")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template with everything it needs beside the messages."""

    text: str
    """Jinja source."""

    variables: Mapping[str, Any]
    """Names that it may use: the tokenizer's special tokens and the user's own."""

    special_tokens: tuple[str, ...]
    """Texts that the template's tokenizer reads as special tokens; none if only a file is known."""

    name: str
    """Where it came from; for people."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the Jinja source, 64 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def tells_time(self) -> bool:
        """Whether it may write today's date, so that another day's import differs."""
        return "strftime_now" in self.text and "date_string" not in self.variables

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the conversation as text, without the beginning of an answer.

        Raises:
            RenderError: the template refuses the messages or cannot handle them.
        """
        module = lazy_import(
            "transformers.utils.chat_template_utils", needed_for="rendering chat templates", extra="ingest"
        )
        try:
            rendered, _ = module.render_jinja_template(
                conversations=[messages], chat_template=self.text, **self.variables
            )
        except ImportError:
            raise
        except Exception as error:
            # Templates raise errors of their own making, and Python's where they meet what they did not expect.
            raise RenderError(f"{type(error).__name__}: {error}") from error
        return str(rendered[0])


def load_chat_template(
    template: Any,
    *,
    tokenizer: Any = None,
    variables: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """Return a chat template.

    Args:
        template: A `.jinja` file; or the folder, hub name (`name@revision` for a branch, tag or commit) or tokenizer object
            of transformers whose template is meant.
        tokenizer: Where the special tokens come from if `template` is a file: folder, hub name or tokenizer object.
        variables: Values of the template's own switches (`{"enable_thinking": False}`, `{"date_string": "26 Jul 2024"}`).

    Raises:
        InvalidInputError: nothing there, a tokenizer without a template, or a template that is no Jinja.
    """
    is_path = isinstance(template, str | os.PathLike)
    name = os.fspath(template) if is_path else f"a {type(template).__name__}"
    if is_path and name.endswith(_SUFFIXES):
        text = _read(name)
        source = _load(os.fspath(tokenizer)) if isinstance(tokenizer, str | os.PathLike) else tokenizer
    elif tokenizer is not None:
        raise _bad(
            f"chat_tokenizer= is for a template in a file ({', '.join(_SUFFIXES)}), and {name!r} has its own"
        )
    else:
        source = _load(name) if is_path else template
        text = _template_of(source, name)
    known = dict(getattr(source, "special_tokens_map", {})) | dict(variables or {})
    missing = sorted(set(_TOKEN_VARIABLE.findall(text)) - set(known)) if source is None else []
    if missing:
        raise _bad(
            f"chat template {name!r} writes {', '.join(missing)}, and a file does not say what that is: name the tokenizer "
            "with chat_tokenizer="
        )
    loaded = ChatTemplate(text, known, () if source is None else special_texts(source), name)
    _check_syntax(loaded)
    return loaded


def _load(name: str) -> Any:
    hub_name, _, revision = name.partition("@")
    return (
        load_from_hub(name, None)
        if os.path.exists(name) or not revision
        else load_from_hub(hub_name, revision)
    )


def _read(path: str) -> str:
    try:
        if Path(path).stat().st_size > _MAX_TEMPLATE:
            raise _bad(f"chat template {path!r} has more than {_MAX_TEMPLATE} bytes: is it a template?")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(f"chat template {path!r} cannot be read ({error}): give a Jinja file in UTF-8") from error


def _template_of(tokenizer: Any, name: str) -> str:
    if not hasattr(tokenizer, "get_chat_template"):
        raise _bad(f"{name!r} is no tokenizer of transformers: give a folder, a hub name, or a .jinja file")
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise _bad(
            f"tokenizer {name!r} has no chat template ({str(error).splitlines()[0]}): give one of a model that was trained on "
            "conversations, or a .jinja file"
        ) from error


def _check_syntax(template: ChatTemplate) -> None:
    jinja = lazy_import("jinja2.exceptions", needed_for="rendering chat templates", extra="ingest")
    try:
        template.render([{"role": "user", "content": "x"}])
    except RenderError as error:
        if isinstance(error.__cause__, jinja.TemplateSyntaxError):
            raise _bad(f"chat template {template.name!r} is not valid Jinja ({error.__cause__})") from error


def _bad(message: str) -> InvalidInputError:
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, message)
