import json
import sys

import pytest

from primer_fast.data import tokenizers
from primer_fast.data.tokenizers import ByteTokenizer, CharacterTokenizer, HuggingFaceTokenizer

TEXT = "Grüße, 世界!\n\tnaïve 🙂"


@pytest.fixture(scope="module")
def hugging_face():
    """The JSON of a byte-level BPE with an end-of-text token, as GPT-2's, learned from a few words."""
    package = pytest.importorskip("tokenizers")
    bpe = package.Tokenizer(package.models.BPE())
    bpe.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(["the cat and the hat and the bat"] * 5, trainer)
    return bpe.to_str()


def test_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 256 and tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_bytes_cut_inside_a_character_are_replaced():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a🙂b")  # 1 + 4 + 1 bytes
    assert tokenizer.decode(ids[:3]) == "a�"
    assert tokenizer.decode(ids[3:]).endswith("b") and "�" in tokenizer.decode(ids[3:])


def test_characters_are_sorted():
    tokenizer = CharacterTokenizer("banana!")
    assert tokenizer.characters == ["!", "a", "b", "n"] and tokenizer.vocab_size == 4
    assert tokenizer.encode("nab") == [3, 1, 2] and tokenizer.decode([3, 1, 2]) == "nab"
    whole = CharacterTokenizer(TEXT)
    assert whole.decode(whole.encode(TEXT)) == TEXT


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"made of the 3 characters of the training text; got 'X', 'é'$"):
        CharacterTokenizer("abc").encode("aXbéX")
    with pytest.raises(ValueError, match=r"got '0', '1', .*'9' and 2 more$"):
        CharacterTokenizer("abc").encode("0123456789xy")
    with pytest.raises(ValueError, match="at least one character"):
        CharacterTokenizer("")


def test_hugging_face(hugging_face):
    tokenizer = HuggingFaceTokenizer(hugging_face)
    end = tokenizer.tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.stop_tokens == (end,) and tokenizer.vocab_size == tokenizer.tokenizer.get_vocab_size()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert tokenizer.encode("a<|endoftext|>")[-1] == end and tokenizer.decode([end]) == "<|endoftext|>"


def test_ids_may_have_gaps(hugging_face):
    """Embeddings need a row up to the largest id, of which there may be more than tokens."""
    values = json.loads(hugging_face)
    values["model"] = {"type": "WordLevel", "vocab": {"a": 0, "b": 900}, "unk_token": "a"}
    values["added_tokens"] = []
    assert HuggingFaceTokenizer(json.dumps(values)).vocab_size == 901


def word_level(**changes):
    """The JSON of a tokenizer of the words a, b and c; changes: to its top level."""
    package = pytest.importorskip("tokenizers")
    words = package.Tokenizer(package.models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = package.pre_tokenizers.Whitespace()
    return json.dumps(json.loads(words.to_str()) | changes)


CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDED = {
    "strategy": {"Fixed": 12}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 3, "pad_type_id": 0,
    "pad_token": "?",
}  # fmt: skip
WRAPPED = {  # what a post-processor would add
    "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    "single": [{"SpecialToken": {"id": "?", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"?": {"id": "?", "ids": [3], "tokens": ["?"]}},
}  # fmt: skip


@pytest.mark.parametrize("text", ["a b c a b c a b", "b", ""])
@pytest.mark.parametrize(
    "stored",
    [
        {"truncation": CUT}, {"truncation": CUT | {"direction": "Left", "stride": 1}}, {"padding": PADDED},
        {"padding": PADDED | {"strategy": "BatchLongest"}}, {"truncation": CUT, "padding": PADDED},
        {"post_processor": WRAPPED, "truncation": CUT},
    ],
    ids=["cut", "cut on the left", "padded", "padded to a multiple", "both", "wrapped"],
)  # fmt: skip
def test_what_a_file_says_of_lengths_changes_no_text(stored, text):
    tokenizer = tokenizers.from_json(word_level(**stored))
    want = [{"a": 0, "b": 1, "c": 2}[word] for word in text.split()]
    assert tokenizer.encode(text) == want
    again = tokenizers.from_json(tokenizer.to_json())  # as a run's folder keeps it
    assert again.encode(text) == want
    assert json.loads(tokenizer.to_json())["truncation"] is None and json.loads(tokenizer.to_json())["padding"] is None


def test_words_are_not_cut_at_random(hugging_face):
    values = json.loads(hugging_face)
    values["model"]["dropout"] = 0.5
    tokenizer = HuggingFaceTokenizer(json.dumps(values))
    text = "the cat and the hat and the bat " * 20
    assert tokenizer.encode(text) == HuggingFaceTokenizer(hugging_face).encode(text)
    assert HuggingFaceTokenizer(tokenizer.to_json()).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["bytes", "characters", "file"])
def test_json_round_trip(name, hugging_face, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(hugging_face, encoding="utf-8")
    tokenizer = tokenizers.make(str(file) if name == "file" else name, TEXT)
    saved = tmp_path / "saved.json"
    saved.write_bytes(tokenizer.to_json().encode())
    again = tokenizers.load(saved)
    assert type(again) is type(tokenizer) and again.vocab_size == tokenizer.vocab_size
    assert again.stop_tokens == tokenizer.stop_tokens
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.decode(again.encode(TEXT)) == TEXT


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("abc")], ids=lambda t: t.name)
@pytest.mark.parametrize("wrong", [-1, 256])
def test_tokens_outside_the_vocabulary_are_named(tokenizer, wrong):
    with pytest.raises(ValueError, match=f"decode: tokens must be 0 to {tokenizer.vocab_size - 1}; got {wrong}"):
        tokenizer.decode([0, wrong])


FILES = {
    "no JSON": (b"{", "not JSON"),
    "not UTF-8": (b"\xff\xfe{}", "utf-8"),
    "a list": (b"[1]", "a tokenizer is a JSON object; got list"),
    "another version": (b'{"primer_fast": "words"}', "not a tokenizer of this version: primer_fast is 'words'"),
    "no alphabet": (b'{"primer_fast": "characters"}', "not a tokenizer of this version"),
    "something else": (b'{"a": 1}', "not a file of the tokenizers package"),
    "deep": (b"[" * 100_000, "not JSON"),
    "half a character": (
        b'{"primer_fast": "characters", "characters": "a\\ud800"}',
        "whole characters; got '.ud800' alone",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_tokenizer_is_named(name, tmp_path):
    content, message = FILES[name]
    file = tmp_path / "t.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        tokenizers.make(str(file), "")
    assert str(error.value).startswith(f"{file}: ")


def test_wrong_names(tmp_path):
    with pytest.raises(ValueError, match=r"must be bytes, characters or a \.json file; got 'words'"):
        tokenizers.make("words", "")
    with pytest.raises(ValueError, match=r"nowhere\.json: no such file"):
        tokenizers.make("nowhere.json", "")
    folder = tmp_path / "a.json"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"a\.json: a folder"):
        tokenizers.make(str(folder), "")


def test_the_missing_package_names_its_extra(monkeypatch, hugging_face):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'primer-fast\[cli\]'"):
        tokenizers.from_json(hugging_face)


def test_ids_that_stand_for_no_token():
    gaps = tokenizers.from_json(word_level(model={"type": "WordLevel", "vocab": {"a": 1, "b": 4}, "unk_token": "a"}))
    added = {"content": "[END]", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    more = tokenizers.from_json(word_level(added_tokens=[added | {"id": 4, "normalized": False}]))
    cases = ((gaps, 5, [0, 2, 3]), (gaps, 7, [0, 2, 3, 5, 6]), (more, 6, [5]), (CharacterTokenizer("abc"), 5, [3, 4]))
    for tokenizer, vocab, want in (*cases, (CharacterTokenizer("abc"), 3, []), (ByteTokenizer(), 257, [256])):
        assert tokenizers.without_token(tokenizer, vocab).tolist() == want
    for tokenizer, vocab in ((gaps, 4), (ByteTokenizer(), 255)):
        with pytest.raises(ValueError, match=f"at most the model's {vocab} tokens; got {vocab + 1}"):
            tokenizers.without_token(tokenizer, vocab)


def test_the_token_of_a_line_end(hugging_face):
    bpe = HuggingFaceTokenizer(hugging_face)
    assert bpe.decode([tokenizers.line_end(bpe)]) == "\n"
    assert tokenizers.line_end(ByteTokenizer()) == 10 and tokenizers.line_end(CharacterTokenizer("a\n")) == 0
    unknown = word_level(pre_tokenizer=None)  # a line end is the token of unknown words
    for none in (CharacterTokenizer("ab"), tokenizers.from_json(word_level()), tokenizers.from_json(unknown)):
        assert tokenizers.line_end(none) is None


@pytest.mark.parametrize("half", ["\ud800", "\udcff", "a\udfff"])
def test_half_a_character_is_refused(half, hugging_face):
    """What is not UTF-8 on a command line becomes such a character."""
    whole = "must hold whole characters; got '.ud[0-9a-f]{3}' alone"
    for tokenizer in (ByteTokenizer(), HuggingFaceTokenizer(hugging_face)):
        with pytest.raises(ValueError, match=whole):
            tokenizer.encode("abc" + half)
    with pytest.raises(ValueError, match="made of the 3 characters"):
        CharacterTokenizer("abc").encode("abc" + half)
    with pytest.raises(ValueError, match=whole):
        CharacterTokenizer("abc" + half)


class Panic(BaseException):
    """As the package's, which are no Exception."""


@pytest.mark.parametrize("error", [Exception("no\n  [UNK]"), TypeError("no [UNK]"), Panic("no [UNK]")], ids=repr)
def test_whatever_the_package_refuses_is_one_line(error, monkeypatch):
    class Refusing:
        def encode(self, *_, **__):
            raise error

        decode = encode

    tokenizer = tokenizers.from_json(word_level())
    tokenizer.tokenizer = Refusing()
    for call, what in (
        (lambda: tokenizer.encode("a"), "encode the text"),
        (lambda: tokenizer.decode([0]), "decode the"),
    ):
        with pytest.raises(ValueError, match=rf"the tokenizer cannot {what}.* \(no \[UNK\]\)$"):
            call()


def test_unknown_words_of_a_tokenizer_that_has_no_token_for_them():
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    with pytest.raises(ValueError, match=r"cannot encode the text \(WordLevel error: Missing \[UNK\] token"):
        tokenizers.from_json(word_level(model=model)).encode("a q")
