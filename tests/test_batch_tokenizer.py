"""BPE in numpy gives the ids of the library, whatever the text and whoever made the tokenizer."""
import itertools
import json
import pickle
import random

import pytest
from tokenizers import AddedToken, models, pre_tokenizers, trainers

import train_tokenizer
from minillm import tokenizer as tokenizer_module
from minillm.errors import UserError
from minillm.speed.batch_tokenizer import BatchTokenizer, pairs_in_tokens
from minillm.tokenizer import LONGEST, MAX_PIECE, SPECIAL_TOKENS, Tokenizer, pack_ids

UNICODE = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
# all but what is alike: Han, Hangul, private use, unassigned
UNALIKE = UNICODE[:0x3400] + UNICODE[0xA000:0xAC00] + [chr(p) for p in range(0xF900, 0x10000)]
UNALIKE += [chr(point) for point in range(0x1D000, 0x20000)]
# what pre-tokens depend on: spaces, line ends, digits, two kinds at once (〇 ⺀ ⼀), marks, quotes
MARKS = " \n\t\r\u3000\u00a0〇〡⺀⼀中国的，。“”!<|a1é\u0301'٣ⅷ½"
OF_TWO_KINDS = ["人〇二", "国〇二", "的〇二", "二〇", "人〇中", "国〇中", "中⼀", "⼀国", "!⼀", "⼀!"]


def corpus():
    """Text of many scripts, with many rare characters so that parts of them become tokens."""
    rng = random.Random(0)
    words = ["中国", "人民", "的", "二〇二四年", "hello", "world", "été", "мир", "“你好”", "1984"]
    for _ in range(300):
        line = rng.choices(words, k=20)
        line += rng.choices(UNICODE[0x4E00:0x5200], k=20) + rng.choices(UNICODE[0x2010:0x2060], k=9)
        yield "".join(rng.choice(["", "", " ", "，", "  "]) + word for word in line)
    for word in OF_TWO_KINDS:
        yield f"{word}a" * 50


def train(vocab_size, nfkc=False):
    counts = train_tokenizer.count_pieces(corpus(), nfkc)
    return train_tokenizer.train_on(counts, vocab_size, nfkc)


@pytest.fixture(scope="module")
def backend():
    return train(1500)


def open_both(backend, folder):
    """(the plain tokenizer, its twin) of a tokenizers.Tokenizer."""
    folder.mkdir(exist_ok=True)
    tokenizer_module.save(backend, folder)
    return Tokenizer.load(folder), BatchTokenizer.load(folder)


@pytest.fixture(scope="module")
def both(backend, tmp_path_factory):
    return open_both(backend, tmp_path_factory.mktemp("tokenizer"))


def assert_same(both, texts):
    plain, fast = both
    expected = [pack_ids(plain.encode(text)) for text in texts]
    assert plain.encode_packed(texts) == expected
    assert fast.encode_packed(texts) == expected


def assert_library_encodes_less_than(fast, monkeypatch, texts, characters):
    """So that a test of the twin is one of the twin."""
    encoded = []
    encode = Tokenizer._encode

    def watched(self, texts):
        encoded.extend(texts)
        return encode(self, texts)
    monkeypatch.setattr(Tokenizer, "_encode", watched)
    fast.encode_packed(texts)
    assert sum(map(len, encoded)) < characters


def test_text_like_that_of_the_training(both, monkeypatch):
    texts = list(corpus())[:-len(OF_TWO_KINDS)]

    assert_same(both, texts)

    assert_library_encodes_less_than(both[1], monkeypatch, texts, 0.2 * sum(map(len, texts)))


def test_this_vocabulary_has_tokens_of_parts_of_characters(both):
    """Else the tests here would not see whether they are minded."""
    _, parts = pairs_in_tokens(both[0].token_bytes)

    assert len(parts) > 5


def test_every_character_beside_others(both):
    rng = random.Random(1)
    characters = UNALIKE + rng.sample(UNICODE, 20_000)
    rng.shuffle(characters)
    texts = []
    for first in range(0, len(characters), 5000):
        part = characters[first: first + 5000]
        texts.append("".join(character + rng.choice(MARKS) for character in part))

    assert_same(both, texts)


def test_random_text(both):
    rng = random.Random(2)
    tokens = [content.decode("utf-8", "ignore") for content in both[0].token_bytes]
    texts = []
    for _ in range(3000):
        source = rng.choice([UNICODE, MARKS, tokens, [*tokens, *MARKS * 20]])
        texts.append("".join(rng.choices(source, k=rng.randrange(60))))

    for first in range(0, len(texts), 60):
        assert_same(both, texts[first: first + 60])


def test_characters_of_two_kinds(both):
    """〇 is Han and a number, ⼀ is Han and a symbol; what they are depends on what is before."""
    texts = ["".join(characters) for characters in itertools.product("〇⼀二中! ", repeat=5)]

    assert {"〇二", "〇中", "⼀国", "!⼀"} <= {both[0].decode([id]) for id in range(both[0].vocab_size)}
    for first in range(0, len(texts), 50):
        assert_same(both, texts[first: first + 50])


@pytest.mark.parametrize("count", [LONGEST - 1, LONGEST, LONGEST + 1, 2 * LONGEST + 3])
def test_runs_longer_than_a_pre_token(both, count):
    texts = []
    for unit in ("中", "人民", "a", "!", " ", "\n", "5", "\u3000", "〇", "a\u0301", "⺀", "二〇"):
        texts.append("x中" + unit * count + "国 y")

    assert_same(both, texts)


def test_long_and_empty_texts(both):
    line = "人民 hello，二〇二四年\n"
    texts = ["", "\n", line * (2 * MAX_PIECE // len(line)), "", "中" * (MAX_PIECE + 5), " "]

    assert_same(both, texts)


def test_lone_surrogates_are_replaced(both):
    assert_same(both, ["中国", "a\ud800b", "的"])


def test_tokenizers_of_another_kind_are_left_to_the_library(backend, tmp_path):
    texts = ["ﬁ ＡＢＣ <think>中国", "人民1984  的"]
    added = train(400)
    added.add_tokens([AddedToken("<think>", normalized=False)])
    other = train(400)
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    nfkc = train(400, nfkc=True)

    for name, changed in (("added", added), ("other", other), ("nfkc", nfkc)):
        assert_same(open_both(changed, tmp_path / name), texts)


def test_a_character_that_is_made_late(tmp_path):
    """Two merges make ก. The one that BPE comes by is later than that of xก, and wx is between."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    first, second, third = byte_level.pre_tokenize_str("ก")[0][0]
    merges = [(first, second), (second, third), (first, second + third),
              ("x", first + second + third), ("w", "x"), (first + second, third)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *dict.fromkeys(map("".join, merges))]
    late = tokenizer_module.untrained()
    late.model = models.BPE({token: id for id, token in enumerate(tokens)}, merges)
    late.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])

    both = open_both(late, tmp_path / "late")

    assert len(both[0].encode("wxก")) == 2 and len(both[0].encode("xก")) == 1
    assert_same(both, ["wxก", "xก", "ก"])


def test_text_that_spells_the_escape_stays_what_it_is(both):
    """<U+FDD0| is "<|" for transformers alone."""
    plain, _ = both

    assert plain.decode(plain.encode("a<\ufdd0|b")) == "a<\ufdd0|b"


def test_a_process_is_given_the_folder_and_not_the_vocabulary(backend, tmp_path):
    _, fast = open_both(backend, tmp_path)
    pickled = pickle.dumps(fast)

    again = pickle.loads(pickled)

    assert len(pickled) < 1000
    assert type(again) is BatchTokenizer and again.hash == fast.hash


def test_a_tokenizer_that_has_changed_meanwhile_is_refused(backend, tmp_path):
    _, fast = open_both(backend, tmp_path)
    pickled = pickle.dumps(fast)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8"))), "utf-8")

    with pytest.raises(UserError, match="has changed meanwhile"):
        pickle.loads(pickled)


@pytest.mark.parametrize("old, new", [(r"|\p{N}|", r"|\p{N}{1,3}|"), (r"\n|", r"\n+|")],
                         ids=["digits in groups", "line ends together"])
def test_a_changed_pre_token_pattern_is_encoded_as_it_says(old, new, monkeypatch, tmp_path):
    changed = tokenizer_module.pre_token_pattern().replace(old, new)
    monkeypatch.setattr(tokenizer_module, "pre_token_pattern", lambda *caps: changed)
    text = "In 1957 and 1958, 沈琴明 was 12345 and 123 and 195 years old.\n\n"
    backend = tokenizer_module.untrained()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([text] * 20, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet,
        show_progress=False))

    both = open_both(backend, tmp_path / "changed")

    assert_same(both, [text])


def test_the_unchanged_pattern_is_encoded_in_batches(both):
    _, fast = both

    assert fast._is_ours
