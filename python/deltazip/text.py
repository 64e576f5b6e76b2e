"""What stands between a variant's text and its token ids: tokenizer, template, ends, stop texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltazip.chat_template import ChatTemplate, ChatTemplateError, find_chat_template
from deltazip.tokenizer import Detokenizer, Tokenizer, has_tokenizer, load_tokenizer, read_json

__all__ = ["TEXT_FILES", "ChoiceText", "StopTexts", "VariantText", "message_text"]

# Every file that VariantText.load may read.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def _digest(folder: Path) -> str:
    sha = hashlib.sha256()
    for name in TEXT_FILES[:5]:
        path = folder / name
        if path.is_file():
            sha.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def _eos_ids(folder: Path) -> tuple[int, ...]:
    value = read_json(folder / "generation_config.json").get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids):
        raise ValueError(
            f"'{folder / 'generation_config.json'}': eos_token_id: expected ids, got {value!r}"
        )
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class VariantText:
    """The text side of one variant; parts that its folder does not bring are the base's.

    Attributes:
        stop_token_ids: ends beyond those the engine reads from the base's config.json.
    """

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    stop_token_ids: tuple[int, ...]
    digest: str = ""

    @classmethod
    def load(cls, path: str | Path, base: VariantText | None = None) -> VariantText:
        """Reads a model folder, or the folder of a delta file.

        Raises:
            ValueError: a file is there but is not valid, or the base has no tokenizer.
        """
        folder = Path(path)
        folder = folder if folder.is_dir() else folder.parent
        brings_tokenizer = base is None or has_tokenizer(folder)
        digest = _digest(folder) if brings_tokenizer else ""
        if base is not None and (not brings_tokenizer or digest == base.digest):
            tokenizer, digest = base.tokenizer, base.digest
        else:
            tokenizer = load_tokenizer(folder)
        source = find_chat_template(folder)
        template = (
            ChatTemplate(source, tokenizer.special_tokens)
            if source is not None
            else base.chat_template
            if base is not None
            else None
        )
        ends = _eos_ids(folder) or (base.stop_token_ids if base is not None else ())
        if base is not None and tokenizer is not base.tokenizer:
            ends = (*ends, *_own_eos(tokenizer, base.tokenizer))
        return cls(tokenizer, template, tuple(sorted(set(ends))), digest)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Slow: not on an event loop.

        Raises:
            ChatTemplateError: there is no template, or it refused.
        """
        if self.chat_template is None:
            raise ChatTemplateError("this model has no chat template; use completions")
        text = self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, arguments=arguments
        )
        return self.tokenizer.encode(text, add_special_tokens=False)


def _own_eos(tokenizer: Tokenizer, base: Tokenizer) -> tuple[int, ...]:
    """A fine-tune may end its turns with another token than its base."""
    token = tokenizer.special_tokens.get("eos_token")
    if token is None or token == base.special_tokens.get("eos_token"):
        return ()
    token_id = tokenizer.token_to_id(token)
    return () if token_id is None else (token_id,)


def message_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message's content: a string, or text parts, one a line."""
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content)


class StopTexts:
    """Finds stop texts in a stream, and holds back what may yet become one."""

    __slots__ = ("_held", "_include", "_stops", "is_stopped")

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include = include_stop
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that is now certain. After a stop: nothing more."""
        if self.is_stopped:
            return ""
        text = self._held + text
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        if best is not None:
            self.is_stopped = True
            self._held = ""
            return text[: best[0] if self._include else best[1]]
        num_held = self._num_to_hold(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def _num_to_hold(self, text: str) -> int:
        most = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), most, -1):
                if text.endswith(stop[:length]):
                    most = length
                    break
        return most

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class ChoiceText:
    """One answer on its way from tokens to text."""

    __slots__ = ("_detokenizer", "_stops", "num_tokens")

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str] = (), include_stop: bool = False
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopTexts(stops, include_stop) if stops else None
        self.num_tokens = 0

    @property
    def is_stopped(self) -> bool:
        return self._stops is not None and self._stops.is_stopped

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """New text, and how many of the tokens belong to the answer: those up to a stop text."""
        if self._stops is None:
            self.num_tokens += len(tokens)
            return self._detokenizer.push(tokens), len(tokens)
        pieces = []
        num_used = 0
        for token in tokens:  # one by one: where it stops must not depend on how tokens arrive
            if self._stops.is_stopped:
                break
            num_used += 1
            pieces.append(self._stops.push(self._detokenizer.push((token,))))
        self.num_tokens += num_used
        return "".join(pieces), num_used

    def finish(self) -> str:
        """The rest of the text, once no token will follow."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            return rest
        if self._stops.is_stopped:
            return ""
        rest = self._stops.push(rest)
        return rest if self._stops.is_stopped else rest + self._stops.flush()
