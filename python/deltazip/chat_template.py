"""Chat messages to prompt text by a model's own Jinja template, which nobody has to trust.

Means the same as `apply_chat_template` in transformers, inside an immutable sandbox with limits on
time, on the size of every string and on the size of the output.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deltazip.tokenizer import read_json

__all__ = ["ChatTemplate", "ChatTemplateError", "find_chat_template"]

MAX_TEMPLATE_CHARS: Final = 256 * 1024
MAX_OUTPUT_CHARS: Final = 4 * 1024 * 1024
# Characters that all string operations of one rendering may make together.
_MAX_WORK_CHARS: Final = 16 * MAX_OUTPUT_CHARS
_MAX_INT_BITS: Final = 256
_MAX_REPEAT: Final = 100_000
# What no template of a model needs and what takes a width or a count from the template.
_NO_FILTERS = """batch center filesizeformat format pprint random slice truncate urlize wordwrap
    xmlattr"""
_TEXT_METHODS = """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal
    isdigit isidentifier islower isnumeric isspace istitle isupper join lower lstrip partition
    removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper"""
_RESERVED = """messages tools documents add_generation_prompt bos_token eos_token unk_token
    pad_token sep_token cls_token mask_token raise_exception strftime_now range dict cycler joiner
    namespace"""


class ChatTemplateError(ValueError):
    """The template refused the messages, is not valid, or went over a limit."""


class _Budget(threading.local):
    """What the rendering on this thread may still use."""

    deadline = 0.0
    chars = 0


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only passes through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, where loops, calls and string operations are metered too."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        self.budget = _Budget()
        self.filters = {k: v for k, v in self.filters.items() if k not in _NO_FILTERS.split()}
        self.filters["tojson"] = _to_json
        for name in ("join", "replace", "indent"):
            self.filters[name] = self._bounded_filter(name)
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    # Jinja calls this with every template's syntax tree before it makes code of it.
    def _generate(
        self,
        source: nodes.Template,
        name: str | None,
        filename: str | None,
        defer_init: bool = False,
    ) -> str:
        for loop in list(source.find_all(nodes.For)):
            loop.iter = _method("metered", [loop.iter])
        for concat in list(source.find_all(nodes.Concat)):
            parts = nodes.List(list(concat.nodes), lineno=concat.lineno)
            concat.nodes = [_method("joined", [parts])]
        return super()._generate(source, name, filename, defer_init)

    def tick(self) -> None:
        if time.monotonic() > self.budget.deadline:
            raise SecurityError("the template took too long")

    def charge(self, num_chars: int) -> None:
        self.budget.chars -= num_chars
        if num_chars > MAX_OUTPUT_CHARS or self.budget.chars < 0:
            raise SecurityError("the template made too much text")

    def metered(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self.tick()
            yield item

    def joined(self, values: Sequence[object]) -> str:
        parts = [value if isinstance(value, str) else self._text(value) for value in values]
        self.charge(sum(map(len, parts)))
        return "".join(parts)

    def _text(self, value: object) -> str:
        self.tick()
        text = str(value)
        self.charge(len(text))
        return text

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * right}
            if bits.get(operator, 0) > _MAX_INT_BITS:
                raise SecurityError(f"'{operator}': the number is too large")
        elif operator == "*":
            count, sized = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and hasattr(sized, "__len__"):
                self.charge(max(count, 0) * len(sized))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.charge(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("'%' on text is not available; use '~'")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            __self._check_text_method(owner, getattr(__obj, "__name__", ""), args)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner, name = getattr(value, "__self__", None), getattr(value, "__name__", "")
        if isinstance(owner, str) and name in ("format", "format_map"):
            raise SecurityError(f"str.{name} is not available; use '~'")
        return None

    def _check_text_method(self, text: str, name: str, args: Sequence[Any]) -> None:
        if name not in _TEXT_METHODS.split():
            raise SecurityError(f"str.{name} is not available")
        if name == "replace" and len(args) >= 2:
            self._charge_replace(text, *args[:2])
        elif name == "join" and args:
            self._charge_join(text, args[0])
        else:
            self.charge(len(text))

    def _charge_replace(self, text: str, old: object, new: object) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.charge(len(text) + text.count(old) * len(new))

    def _charge_join(self, separator: str, items: object) -> None:
        if isinstance(items, (list, tuple)):
            total = sum(len(item) for item in items if isinstance(item, str))
            self.charge(total + len(separator) * len(items))
        else:
            raise SecurityError("join: expected a list")

    def _bounded_filter(self, name: str) -> Callable[..., Any]:
        plain = self.filters[name]
        if name == "indent":

            def indent(
                s: str, width: int | str = 4, first: bool = False, blank: bool = False
            ) -> Any:
                size = width if isinstance(width, int) else len(width)
                text = self._text(s)
                self.charge(len(text) + max(size, 0) * (text.count("\n") + 1))
                return plain(text, width, first, blank)

            return indent
        if name == "replace":

            def replace(value: object, old: str, new: str, count: int = -1) -> str:
                text = self._text(value)
                self._charge_replace(text, old, new)
                return text.replace(str(old), str(new), -1 if count is None else count)

            return replace

        def join(value: Iterable[object], d: str = "", attribute: str | None = None) -> str:
            items = self.metered(value)
            if attribute is not None:
                items = (self.getitem(item, attribute) for item in items)
            parts = [self._text(item) for item in items]
            self.charge(len(str(d)) * len(parts))
            return str(d).join(parts)

        return join


def _method(name: str, args: Sequence[nodes.Node]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and not 0 <= indent <= 16:
        raise SecurityError(f"tojson: expected an indent of 0 to 16, got {indent}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(str(pattern)) > 256:
        raise SecurityError("strftime_now: expected at most 256 characters")
    return datetime.now().strftime(str(pattern))


class ChatTemplate:
    """One compiled template. Rendering may be called from any thread, but blocks: up to
    `timeout_s`, so not on an event loop.

    Args:
        source: the Jinja text.
        special_tokens: bos_token, eos_token, ... as the template sees them.
        timeout_s: the most time one rendering may take.

    Raises:
        ChatTemplateError: the text is too long or not valid Jinja.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, timeout_s: float = 2.0
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(
                f"chat template: expected at most {MAX_TEMPLATE_CHARS} characters, "
                f"got {len(source)}"
            )
        self._environment = _Sandbox()
        self._special_tokens = dict(special_tokens or {})
        self._timeout_s = timeout_s
        try:
            names = meta.find_undeclared_variables(self._environment.parse(source))
            self._environment.budget.deadline = math.inf
            self._environment.budget.chars = _MAX_WORK_CHARS
            self._template = self._environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError) as error:
            raise ChatTemplateError(f"chat template: {error or type(error).__name__}") from None
        # The only names a request may set: those that the template itself reads.
        self.argument_names = frozenset(names).difference(_RESERVED.split())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: each with 'role' and 'content'.
            add_generation_prompt: end with the opening of the assistant's turn.
            arguments: further variables, of `argument_names` only.

        Raises:
            ChatTemplateError: the template refused, failed or went over a limit.
        """
        unknown = sorted(set(arguments or {}) - self.argument_names)
        if unknown:
            raise ChatTemplateError(
                f"chat template: expected arguments of {sorted(self.argument_names)}, got {unknown}"
            )
        budget = self._environment.budget
        budget.deadline = time.monotonic() + self._timeout_s
        budget.chars = _MAX_WORK_CHARS
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(
                {
                    **self._special_tokens,
                    **(arguments or {}),
                    "messages": [dict(message) for message in messages],
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            ):
                num_chars += len(piece)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise SecurityError("the template made too much text")
                self._environment.tick()
                pieces.append(piece)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template can raise anything that Python can
            detail = str(error)[:500] or type(error).__name__
            raise ChatTemplateError(f"chat template: {detail}") from None
        return "".join(pieces)


def find_chat_template(folder: str | Path) -> str | None:
    """The template of a model folder: chat_template.jinja, chat_template.json, or the
    'chat_template' of tokenizer_config.json (of several, the one named 'default').

    Raises:
        ValueError: a file is there but does not hold a template.
    """
    folder = Path(folder)
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
            raise ValueError(f"'{path}': expected at most {MAX_TEMPLATE_CHARS} characters")
        return path.read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = read_json(folder / name).get("chat_template")
        if isinstance(value, list):
            named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
            value = named.get("default")
        if isinstance(value, str):
            return value
        if value is not None:
            raise ValueError(
                f"'{folder / name}': chat_template: expected text or a list with 'default'"
            )
    return None
