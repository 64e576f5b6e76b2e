"""Both kinds of tokenizer, the incremental decoder, stop texts and chat templates."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent / "server"))

from deltazip.text import ChoiceText, StopTexts, VariantText
from deltazip.tokenizer import Tokenizer, load_tokenizer
from serving_support import tiny

TEXTS = [
    "hello",
    " leading and trailing ",
    "two  spaces\n\nlines\ttabs",
    "Ünïcödé: 你好 世界, नमस्ते",
    "👩‍👩‍👧 and 🚀🚀 and 🇩🇪",
    "SELECT * FROM t WHERE x >= 10;",
    "mark \ufffd replacement",
    "",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte")
    tiny.write_byte_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def piece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    tiny.write_sentencepiece_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pieces(piece_folder: Path) -> Tokenizer:
    return load_tokenizer(piece_folder)


def _llama_json(folder: Path) -> Tokenizer:
    """tokenizer.json as converted from a SentencePiece model: byte fallback, one space stripped."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        limit_alphabet=40,
    )
    tokenizer.train_from_iterator([*tiny.CORPUS, *byte_tokens], trainer)
    saved = json.loads(tokenizer.to_str())
    # Byte tokens are ordinary entries of the vocabulary, not added ones.
    vocab = saved["model"]["vocab"]
    for token in byte_tokens:
        vocab.setdefault(token, len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return load_tokenizer(folder)


def _metaspace_json(folder: Path) -> Tokenizer:
    """A decoder without a byte table: the window decoder's case."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(tiny.CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def _wordpiece_json(folder: Path) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(tiny.CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], sizes: random.Random | None = None) -> str:
    """The text of ids that come in runs of random length."""
    stream = tokenizer.detokenizer()
    text, position = "", 0
    while position < len(ids):
        size = sizes.randrange(1, 4) if sizes else 1
        text += stream.push(ids[position : position + size])
        position += size
    return text + stream.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(byte_level: Tokenizer, pieces: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, pieces):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert streamed(tokenizer, ids) == text


@pytest.mark.parametrize("make", [_llama_json, _metaspace_json, _wordpiece_json])
def test_streams_equal_whole_decodes(make: object, tmp_path: Path) -> None:
    tokenizer: Tokenizer = make(tmp_path)  # type: ignore[operator]
    rng = random.Random(1)
    for text in tiny.CORPUS[:6]:
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids, rng) == tokenizer.decode(ids)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_random_ids_of_a_byte_vocabulary(byte_level: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(byte_level.vocab_size) for _ in range(rng.randrange(1, 30))]
        for skip in (True, False):
            stream = byte_level.detokenizer(skip_special_tokens=skip)
            text = "".join(stream.push([token]) for token in ids) + stream.flush()
            assert text == byte_level.decode(ids, skip_special_tokens=skip)


def test_real_tokenizer_streams(test_models: Path) -> None:
    tokenizer = load_tokenizer(test_models / "base")
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(20)]
        assert streamed(tokenizer, ids, rng) == tokenizer.decode(ids)


def test_no_piece_is_ever_half_a_character(byte_level: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (byte_level, pieces):
        ids = tokenizer.encode("a 🦜 b 漢字 c", add_special_tokens=False)
        assert any(len(tokenizer.token_bytes(i).decode("utf-8", "ignore")) == 0 for i in ids)
        stream = tokenizer.detokenizer()
        assert all("\ufffd" not in stream.push([token]) for token in ids)
        cut = tokenizer.detokenizer()
        text = cut.push(tokenizer.encode("🦜", add_special_tokens=False)[:-1])
        assert "\ufffd" in text + cut.flush()


def test_streaming_decodes_short_windows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = _metaspace_json(tmp_path)
    ids = tokenizer.encode("the quick brown fox 🦜 " * 200)
    plain, windows = tokenizer.decode, []

    def decode(ids: list[int], *, skip_special_tokens: bool = True) -> str:
        windows.append(len(ids))
        return plain(ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", decode)
    assert streamed(tokenizer, ids) == plain(ids)
    assert max(windows) <= 32


def test_an_answer_keeps_its_space_only_after_a_prompt(pieces: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (pieces, _llama_json(tmp_path)):
        prompt = tokenizer.encode("the quick", add_special_tokens=False)
        whole = tokenizer.encode("the quick brown fox", add_special_tokens=False)
        assert whole[: len(prompt)] == prompt
        rest = whole[len(prompt) :]
        goes_on = tokenizer.detokenizer(prompt)
        assert goes_on.push(rest) + goes_on.flush() == " brown fox"
        of_its_own = tokenizer.detokenizer()
        assert of_its_own.push(rest) + of_its_own.flush() == "brown fox"


def test_sentencepiece_against_the_library(pieces: Tokenizer, piece_folder: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(
        model_proto=(piece_folder / "tokenizer.model").read_bytes()
    )
    for text in [*TEXTS, *tiny.CORPUS]:
        ids = pieces.encode(text, add_special_tokens=False)
        assert ids == library.encode(text)
        assert pieces.decode(ids) == library.decode(ids)
    assert pieces.encode("hello")[0] == library.bos_id()
    assert pieces.special_tokens["bos_token"] == "<s>"


def test_sentencepiece_added_tokens(pieces: Tokenizer) -> None:
    ids = pieces.encode("<|im_start|>the fox<|im_end|>the<tab>x", add_special_tokens=False)
    assert ids[0] == 400 and 401 in ids and 402 in ids
    assert pieces.decode(ids, skip_special_tokens=False) == "<|im_start|>the fox<|im_end|>the<tab>x"
    assert pieces.decode(ids) == "the foxthe<tab>x"
    assert pieces.token_to_id("<|im_end|>") == 401
    assert pieces.token_to_id("nobody") is None


def test_chat_with_a_sentencepiece_folder(piece_folder: Path) -> None:
    text = VariantText.load(piece_folder)
    ids = text.encode_chat([{"role": "user", "content": "the fox"}])
    shown = text.tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"


def test_variants_bring_their_own_parts(tmp_path: Path) -> None:
    base_folder, same, other = tmp_path / "base", tmp_path / "same", tmp_path / "other"
    for folder in (base_folder, same):
        tiny.write_byte_tokenizer(folder)
    (base_folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    base = VariantText.load(base_folder)
    assert base.stop_token_ids == (2, 7)
    assert VariantText.load(same, base).tokenizer is base.tokenizer
    assert VariantText.load(tmp_path, base).chat_template is base.chat_template
    tiny.write_byte_tokenizer(other, chat_template="{{ messages[0]['content'] }}!")
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|im_start|>"}')
    (other / "generation_config.json").write_text('{"eos_token_id": 5}')
    own = VariantText.load(other / "delta.safetensors", base)  # a file: its folder counts
    assert own.tokenizer is not base.tokenizer
    assert own.stop_token_ids == (1, 5)
    ids = own.encode_chat([{"role": "user", "content": "go"}])
    assert own.tokenizer.decode(ids) == "go!"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", "[]", "tokenizer.json"),
        ("tokenizer.model", "nonsense", "tokenizer.model"),
        ("tokenizer_config.json", "{]", "tokenizer_config.json"),
        ("tokenizer_config.json", "[1]", "expected a JSON object, got list"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
        ("chat_template.jinja", "{% for %}", "chat template"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [-1]}', "eos_token_id"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    if name != "tokenizer.model":
        tiny.write_byte_tokenizer(tmp_path, chat_template=None)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        VariantText.load(tmp_path)


def test_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found neither"):
        load_tokenizer(tmp_path)


def test_stop_texts_however_the_text_is_cut() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(30)))
        stops = [
            "".join(rng.choice("ab") for _ in range(rng.randrange(1, 5)))
            for _ in range(rng.randrange(1, 4))
        ]
        # The match that is complete first counts; of several, the longest.
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        expected = text[: min(ends)[1]] if ends else text
        matcher, got, position = StopTexts(stops), "", 0
        while position < len(text):
            size = rng.randrange(1, 6)
            piece = matcher.push(text[position : position + size])
            got += piece
            assert text.startswith(got)
            position += size
        assert matcher.is_stopped == bool(ends)
        assert got + matcher.flush() == expected, (text, stops)


def test_tokens_after_a_stop_do_not_count(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("one two three four")
    for size in (1, 2, 100):
        choice = ChoiceText(byte_level.detokenizer(), ["two"])
        text, used = "", 0
        for start in range(0, len(ids), size):
            piece, count = choice.push(ids[start : start + size])
            text, used = text + piece, used + count
        assert text + choice.finish() == "one "
        assert byte_level.decode(ids[:used]).endswith("two")
        assert choice.num_tokens == used
