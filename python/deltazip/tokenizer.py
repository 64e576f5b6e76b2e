"""Text to token ids and back, for `tokenizer.json` and SentencePiece `tokenizer.model` folders."""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

__all__ = ["Detokenizer", "Tokenizer", "has_tokenizer", "load_tokenizer", "read_json"]

_MAX_JSON_BYTES = 64 * 1024 * 1024
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
_NAMED_SPECIALS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SPACE_MARK = "\u2581"
# Belongs to no piece, so it never merges with what follows it.
_PRIVATE_MARK = "\ue000"
_PROBE = 'Hello, world!  Two\n\ttabs "q" — Ünïcödé, 你好, नमस्ते, 👩\u200d👩\u200d👧 x1 <|y|>.'
# A window detokeniser gives up on an unfinished character after this many tokens.
_MAX_HELD_TOKENS = 16


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} when the file is not there.

    Raises:
        ValueError: the file is too large, is not JSON or is not an object.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"'{path}': expected at most {_MAX_JSON_BYTES} bytes of JSON")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}': not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"'{path}': expected a JSON object, got {type(value).__name__}")
    return value


def _content(value: object) -> str | None:
    """A special token is written as a string or as {"content": string, ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _special_tokens(folder: Path) -> dict[str, str]:
    config = read_json(folder / "tokenizer_config.json")
    table = read_json(folder / "special_tokens_map.json")
    found = {
        name: _content(config.get(name)) or _content(table.get(name)) for name in _NAMED_SPECIALS
    }
    return {name: token for name, token in found.items() if token is not None}


class Detokenizer(ABC):
    """Turns a growing list of ids into text, piece by piece; a piece is never taken back."""

    @abstractmethod
    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids add. Bytes of an unfinished character are kept for later."""

    @abstractmethod
    def flush(self) -> str:
        """What was still kept; an unfinished character is U+FFFD."""


class _ByteDetokenizer(Detokenizer):
    """For vocabularies where every token is a fixed run of bytes: constant work per token."""

    def __init__(
        self, pieces: Callable[[int], bytes], hidden: frozenset[int], strip_first_space: bool
    ) -> None:
        self._pieces = pieces
        self._hidden = hidden
        self._strip = strip_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        hidden, pieces = self._hidden, self._pieces
        return self._tidy(self._utf8.decode(b"".join([pieces(i) for i in ids if i not in hidden])))

    def flush(self) -> str:
        return self._tidy(self._utf8.decode(b"", True))

    def _tidy(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text[1:] if text[0] == " " else text
        return text


class _WindowDetokenizer(Detokenizer):
    """For any other decoder: decodes a short window and yields what is new in it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(context)
        self._num_read = len(self._ids)
        self._known = decode(self._ids) if self._ids else ""

    def push(self, ids: Sequence[int]) -> str:
        text = []
        for token in ids:
            self._ids.append(token)
            text.append(self._advance(final=False))
        return "".join(text)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        if self._num_read == len(self._ids):
            return ""
        whole = self._decode(self._ids)
        held = len(self._ids) - self._num_read
        if whole.endswith("\ufffd") and held < _MAX_HELD_TOKENS and not final:
            return ""
        new = whole[len(self._known) :] if whole.startswith(self._known) else ""
        kept = self._ids[self._num_read :]
        known = self._decode(kept)
        if known or len(self._ids) > 2 * _MAX_HELD_TOKENS:
            self._ids, self._known = kept, known
        else:  # tokens that show nothing are no context: a decoder may take the next for the first
            self._known = whole
        self._num_read = len(self._ids)
        return new


class Tokenizer(ABC):
    """One vocabulary. Immutable after loading; every method may be called from any thread.

    Attributes:
        special_tokens: bos_token, eos_token, ... as the folder's configuration names them.
        special_ids: ids that decoding skips when asked to.
        vocab_size: one more than the largest id.
    """

    special_tokens: dict[str, str]
    special_ids: frozenset[int]
    vocab_size: int
    _pieces: dict[int, bytes]
    _is_byte_exact = True
    _strips_first_space = False

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with what the tokenizer puts around every text (often a BOS), if asked."""

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole list of ids."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it; None if there is no such token."""

    @abstractmethod
    def _piece(self, token_id: int) -> bytes:
        """The bytes one token stands for; empty for an id outside the vocabulary."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, special tokens included; empty for an unknown id."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._piece(token_id)
        return piece

    def token_text(self, token_id: int) -> str:
        """One token by itself as text; a part of a character is U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def detokenizer(
        self, context: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A fresh incremental decoder.

        Args:
            context: the ids the text goes on from; empty for a text of its own. It decides whether
                the first word keeps its space.
            skip_special_tokens: leave special tokens out of the text.
        """
        hidden = self.special_ids if skip_special_tokens else frozenset[int]()
        if self._is_byte_exact:
            return _ByteDetokenizer(
                self.token_bytes, hidden, self._strips_first_space and not context
            )
        return _WindowDetokenizer(
            lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens), context[-8:]
        )

    def _choose_strategy(self) -> None:
        # Trust the byte table only if it says the same as the library on a hard text.
        ids = self.encode(_PROBE, add_special_tokens=False)
        stream = self.detokenizer(skip_special_tokens=False)
        text = stream.push(ids) + stream.flush()
        self._is_byte_exact = text == self.decode(ids, skip_special_tokens=False)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins byte-level BPE uses for the 256 bytes (Radford et al., GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_ALPHABET = _byte_alphabet()


def _decoder_steps(decoder: object) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [step for step in decoder.get("decoders", []) if isinstance(step, dict)]
    return [decoder]


class _JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, by the `tokenizers` library."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise ValueError(f"'{path}': expected at most {_MAX_TOKENIZER_BYTES} bytes")
        text = path.read_text("utf-8")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"'{path}': not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pieces = {}
        self.special_tokens = _special_tokens(folder)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1

        steps = _decoder_steps(json.loads(text).get("decoder"))
        kinds = [step.get("type") for step in steps]
        self._is_byte_level = "ByteLevel" in kinds
        self._strips_first_space = not self._is_byte_level and any(
            step.get("type") == "Strip" and step.get("content") == " " and step.get("start") == 1
            for step in steps
        )
        if self._is_byte_level or "ByteFallback" in kinds:
            self._choose_strategy()
        else:
            self._is_byte_exact = False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _piece(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            if all(char in _BYTE_ALPHABET for char in token):
                return bytes(_BYTE_ALPHABET[char] for char in token)
            return token.encode()
        if match := _BYTE_PIECE.match(token):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE_MARK, " ").encode()


class _SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model`, with the added tokens of `tokenizer_config.json`."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        if path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise ValueError(f"'{path}': expected at most {_MAX_TOKENIZER_BYTES} bytes")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except Exception as error:  # RuntimeError or others, by version
            raise ValueError(f"'{path}': not a SentencePiece model: {error}") from None
        config = read_json(folder / "tokenizer_config.json")
        self._pieces = {}
        self.special_tokens = _special_tokens(folder)
        num_pieces = int(self._model.vocab_size())
        self._added = self._added_tokens(folder, config)
        self._added_text = {i: text for text, (i, _) in self._added.items()}
        self.special_ids = frozenset(
            [i for i in range(num_pieces) if self._model.is_control(i)]
            + [i for i, is_special in self._added.values() if is_special]
        )
        self.vocab_size = max([num_pieces - 1, *self._added_text]) + 1
        for name, piece_id in (
            ("bos_token", self._model.bos_id()),
            ("eos_token", self._model.eos_id()),
        ):
            if piece_id >= 0:
                self.special_tokens.setdefault(name, self._model.id_to_piece(piece_id))
        self._bos = self._id_if(config.get("add_bos_token", True), "bos_token")
        self._eos = self._id_if(config.get("add_eos_token", False), "eos_token")
        self._is_legacy = config.get("legacy", True) is not False
        longest_first = sorted(self._added, key=len, reverse=True)
        self._splitter = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
            if longest_first
            else None
        )
        self._mark_ids = list(self._model.encode(_PRIVATE_MARK))
        # A model that puts a space before every text takes it away again when it decodes.
        first = self._model.id_to_piece(self._model.encode("a")[0])
        self._strips_first_space = str(first).startswith(_SPACE_MARK)

    def _added_tokens(self, folder: Path, config: dict[str, Any]) -> dict[str, tuple[int, bool]]:
        """Text -> (id, is special), from both places that name them."""
        added: dict[str, tuple[int, bool]] = {}
        for name, token_id in read_json(folder / "added_tokens.json").items():
            if isinstance(token_id, int) and name:
                added[name] = (token_id, True)
        table = config.get("added_tokens_decoder")
        for key, value in (table if isinstance(table, dict) else {}).items():
            text = _content(value)
            if text is None or not key.isdecimal():
                raise ValueError(
                    f"'{folder / 'tokenizer_config.json'}': added_tokens_decoder: expected an id "
                    f"and a token with 'content', got {key!r}"
                )
            added[text] = (int(key), isinstance(value, dict) and value.get("special") is True)
        return added

    def _id_if(self, wanted: object, name: str) -> list[int]:
        token = self.special_tokens.get(name)
        token_id = self.token_to_id(token) if wanted and token else None
        return [] if token_id is None else [token_id]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        parts = self._splitter.split(text) if self._splitter else [text]
        ids = list(self._bos) if add_special_tokens else []
        after_token = False
        for part in parts:
            known = self._added.get(part)
            if known is not None:
                ids.append(known[0])
                after_token = True
            elif part:
                ids += self._encode_plain(part, bare=after_token and not self._is_legacy)
        return ids + self._eos if add_special_tokens else ids

    def _encode_plain(self, text: str, bare: bool) -> list[int]:
        if bare:  # without the space that the model puts before a text
            ids = list(self._model.encode(_PRIVATE_MARK + text))
            if ids[: len(self._mark_ids)] == self._mark_ids:
                return ids[len(self._mark_ids) :]
        return list(self._model.encode(text))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return stream.push(ids) + stream.flush()

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token][0]
        token_id = int(self._model.piece_to_id(token))
        return token_id if self._model.id_to_piece(token_id) == token else None

    def _piece(self, token_id: int) -> bytes:
        if token_id in self._added_text:
            return self._added_text[token_id].encode()
        if not 0 <= token_id < self._model.vocab_size():
            return b""
        piece = str(self._model.id_to_piece(token_id))
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(token_id):
            return str(self._model.decode([token_id])).encode()
        return piece.replace(_SPACE_MARK, " ").encode()


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder brings a tokenizer of its own."""
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads `tokenizer.json`, or else `tokenizer.model`.

    Raises:
        ValueError: neither is there, or it cannot be read; the file is named.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return _JsonTokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        return _SentencePieceTokenizer(folder)
    raise ValueError(f"'{folder}': expected tokenizer.json or tokenizer.model, found neither")
