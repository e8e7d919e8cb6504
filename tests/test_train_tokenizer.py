"""Training the tokenizer: the vocabulary, the sample, and how rare pieces are counted."""
import bz2
import json
import random
import re

import pytest
from tokenizers import pre_tokenizers, trainers

import train_tokenizer
from bench.prose import write_documents
from minillm import tokenizer as tokenizer_module
from minillm.report import Report
from minillm.text_files import Source
from minillm.tokenizer import END_OF_TEXT, IM_END, IM_START, SPECIAL_TOKENS, Tokenizer
from support.preparation_runs import command, finish, peak_memory, text_line


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents that name their own number, so that a sample tells where it comes from."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rng = random.Random(2)
    with open(path, "wb") as file:
        for number in range(4000):
            han = [chr(0x4E00 + int(rng.paretovariate(1)) % 3000) for _ in range(300)]
            file.write(text_line(f"第{number}篇" + "".join(han)))
    return path


def texts_of(corpus, count):
    with open(corpus, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(count))]


def train(out, *argv):
    """(what train_tokenizer prints, the tokenizer)."""
    output = finish("train_tokenizer", *argv, f"--out_dir={out}")
    return output, Tokenizer.load(out)


# ---- the vocabulary

@pytest.mark.parametrize("size", [259, 700])
def test_vocabulary_is_what_was_asked_for(corpus, tmp_path, size):
    _, tokenizer = train(tmp_path / "t", corpus, f"--vocab_size={size}", "--max_bytes=300_000")

    assert tokenizer.vocab_size == size
    assert tokenizer.decode(tokenizer.encode("从未见过 🦄")) == "从未见过 🦄"
    for id, token in zip((END_OF_TEXT, IM_START, IM_END), SPECIAL_TOKENS):
        assert tokenizer.decode([id], skip_special=False) == token


def test_vocabulary_of_a_small_corpus_is_smaller_and_says_so(tmp_path):
    (tmp_path / "c.txt").write_text("天地玄黄天地玄黄", encoding="utf-8")

    output, tokenizer = train(tmp_path / "t", tmp_path / "c.txt", "--vocab_size=5000")

    assert "fewer than the 5,000 asked for" in output and 259 < tokenizer.vocab_size < 300


def test_same_input_same_tokenizer(corpus, tmp_path):
    """As a user runs it, on many threads."""
    for name in "ab":
        command("train_tokenizer", corpus, "--vocab_size=900", "--max_bytes=300_000",
                f"--out_dir={tmp_path}/{name}")

    assert Tokenizer.load(tmp_path / "a").hash == Tokenizer.load(tmp_path / "b").hash


def test_nfkc_is_an_option(tmp_path):
    (tmp_path / "c.txt").write_text("ＡＢＣ ABC 中文", encoding="utf-8")

    _, tokenizer = train(tmp_path / "t", tmp_path / "c.txt", "--vocab_size=300", "--nfkc=True")

    assert tokenizer.decode(tokenizer.encode("ＡＢＣ①")) == "ABC1"


# ---- the sample

def sample_of(path, max_bytes, **more):
    """(texts, the Sample)."""
    report = Report()
    settings = train_tokenizer.Settings(max_bytes=max_bytes, **more)
    sample = train_tokenizer.Sample(Source([str(path)], report), settings, report)
    return list(sample), sample


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.bz2"])
def test_sample_has_the_size_asked_for(corpus, tmp_path, suffix):
    content = corpus.read_bytes()
    most = len(content) // 4
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(content if suffix == "jsonl" else bz2.compress(content))

    texts, sample = sample_of(path, most)

    size = sum(len(text.encode()) for text in texts)
    assert size == sample.bytes and 0.9 * most < size <= most


def test_conversations_under_other_names_are_in_the_sample(tmp_path):
    """As prepare_sft.py takes them."""
    turns = [{"role": "客官", "content": "问"}, {"role": "assistant", "content": "答"}]
    records = [{"messages": turns}, {"题": "甲", "解": "乙"}, {"data": [{"题": "丙", "解": "丁"}]}]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))

    texts, _ = sample_of(path, 1000, map="客官:user,题:user,解:assistant")

    assert texts == ["问\n答", "甲\n乙", "丙\n丁"]


def test_sample_is_spread_over_the_input(corpus):
    """Not of a tiny .bz2, which is a single block."""
    texts, _ = sample_of(corpus, corpus.stat().st_size // 4)

    quarters = [0, 0, 0, 0]
    for text in texts:
        number = int(re.match("第(.*?)篇", text)[1])
        quarters[number // 1000] += 1
    assert max(quarters) - min(quarters) < 0.2 * len(texts), quarters


@pytest.mark.parametrize("times", [1, 10])
def test_input_that_fits_is_taken_whole(corpus, tmp_path, times):
    texts, path = texts_of(corpus, 400), tmp_path / "c.jsonl"
    path.write_bytes(b"".join(map(text_line, texts)))
    size = sum(len(text.encode()) for text in texts)

    output, _ = train(tmp_path / "t", path, "--vocab_size=300", f"--max_bytes={times * size}")

    assert "from 400 documents," in output


# ---- counting pieces

def test_counting_pieces_is_what_the_trainer_does(corpus):
    """Below the limit the vocabulary is that of the library's trainer on the same pre-tokens."""
    texts = texts_of(corpus, 500) + ["The quick brown fox, 1986!\n\n  x"] * 9
    referee = tokenizer_module.untrained()
    referee.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=800, min_frequency=2, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))

    counts = train_tokenizer.count_pieces(texts, han_run=tokenizer_module.LONGEST)
    found = train_tokenizer.train_on(counts, 800)

    assert found.get_vocab() == referee.get_vocab()


@pytest.fixture(scope="module")
def noise():
    """A thousand texts of characters at random, each with one phrase at its end."""
    rng = random.Random(3)
    texts = []
    for _ in range(1000):
        han = [chr(0x4E00 + rng.randrange(500)) for _ in range(160)]
        texts.append("".join(han) + "。万里长城永不倒。")
    return texts


def test_rare_pieces_are_counted_in_halves(noise):
    def size(counts):
        return sum(len(piece.encode()) for piece in counts)

    def characters(counts):
        return sum(len(piece) * count for piece, count in counts.items())

    whole = train_tokenizer.count_pieces(noise, limit=1 << 30)
    halved = train_tokenizer.count_pieces(noise, limit=50_000)

    assert size(whole) > 400_000 and size(halved) <= 50_000
    # nothing goes uncounted
    assert characters(whole) == characters(halved) == sum(map(len, noise))
    assert whole["万里长城永不倒"] == halved["万里长城永不倒"] == 1000


@pytest.mark.parametrize("limit", [1, 1000])
def test_single_characters_are_counted_whatever_the_limit(noise, limit):
    counts = train_tokenizer.count_pieces(noise, limit=limit)
    assert set(map(len, counts)) == {1}


def test_a_large_sample_is_cut_where_it_is_counted(noise, tmp_path, monkeypatch):
    """The same counts on one process and on two, of which each cuts what it found."""
    path = tmp_path / "noise.jsonl"
    path.write_bytes(b"".join(map(text_line, noise)))
    monkeypatch.setattr(train_tokenizer, "LARGE", 100_000)
    monkeypatch.setattr(train_tokenizer, "LARGE_BATCH", 20_000)
    monkeypatch.setattr(train_tokenizer, "PIECES_BYTES", 60_000)
    limits = set()
    count_pieces = train_tokenizer.count_pieces

    def recorded(texts, nfkc, han_run, special, limit):
        limits.add(limit)
        return count_pieces(texts, nfkc, han_run, special, limit)
    monkeypatch.setattr(train_tokenizer, "count_pieces", recorded)

    def counts(processes):
        s = train_tokenizer.Settings([str(path)], processes=processes)
        source = Source(s.files, Report(), s.encoding, s.document)
        sample = train_tokenizer.Sample(source, s, Report())
        return train_tokenizer.count_sample(sample, source, s, ())
    one, two = counts(1), counts(2)

    assert one == two and limits == {30_000}
    assert sum(len(piece) * count for piece, count in one.items()) == sum(map(len, noise))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prose", "noise"])
def test_memory_of_training(tmp_path, kind):
    """200 MB of Chinese without a space, in prose or in characters at random: under 4 GiB."""
    path = tmp_path / "c.jsonl"
    if kind == "prose":
        write_documents(path, 200)
    else:
        rng = random.Random(4)
        characters = [chr(0x4E00 + i) for i in range(6000)]
        with open(path, "wb") as file:
            for _ in range(66_000):
                file.write(text_line("".join(rng.choices(characters, k=1000))))

    peak = peak_memory("train_tokenizer", path, "--max_bytes=200_000_000",
                       f"--out_dir={tmp_path}/t")

    print(f"{kind}: peak {peak:.2f} GiB")
    assert peak < 4
