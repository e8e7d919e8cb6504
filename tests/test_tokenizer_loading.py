"""What Tokenizer.load makes of a tokenizer.json: what it refuses, switches off and keeps."""
import json
import pickle

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from minillm import tokenizer as tokenizer_module
from minillm.errors import UserError
from minillm.tokenizer import (MAX_VOCAB, SPECIAL_TOKENS, Tokenizer, pack_ids, pre_token_pattern,
                               save, untrained)
from support.tiny_tokenizer import make_tokenizer, tokenizer


def changed(folder, change):
    """A tokenizer in a new folder, whose tokenizer.json, a dict, went through `change`."""
    path = folder / "t" / "tokenizer.json"
    make_tokenizer(folder / "t")
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder / "t"


def with_dropout(data):
    data["model"]["dropout"] = 0.1


def with_tokens(count):
    def change(data):
        vocab = data["model"]["vocab"]
        vocab |= {f"x{i}": i for i in range(len(vocab), count)}
    return change


@pytest.mark.parametrize("change", [with_dropout, with_tokens(MAX_VOCAB + 1)],
                         ids=["dropout", "too many tokens"])
def test_what_token_files_could_not_hold_is_refused(tmp_path, change):
    """Dropout gives a text other ids each time; an id above 65,534 may not fit into 16 bits."""
    with pytest.raises(UserError, match="was not trained by train_tokenizer.py"):
        Tokenizer.load(changed(tmp_path, change))


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    def lowering(data):
        data["normalizer"] = {"type": "Lowercase"}

    with pytest.raises(UserError, match="it loses text"):
        Tokenizer.load(changed(tmp_path, lowering))


def test_an_older_tokenizer_gets_a_template_that_escapes_nothing(tmp_path):
    """Its tokenizer.json has no step that would take the escape out again."""
    def without_normalizer(data):
        data["normalizer"] = None
    old = Tokenizer.load(changed(tmp_path, without_normalizer))

    templates = [t.transformers_config()["chat_template"] for t in (old, tokenizer())]

    assert ["\ufdd0" in template for template in templates] == [False, True]


def test_padding_is_switched_off(tmp_path):
    def with_padding(data):
        data["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0,
                           "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "x"}

    padded = Tokenizer.load(changed(tmp_path, with_padding))

    assert padded.encode_batch(["天", "天气很好"]) == tokenizer().encode_batch(["天", "天气很好"])


def folding(folder):
    """The tests' tokenizer as `train_tokenizer.py --nfkc` writes it."""
    make_tokenizer(folder / "plain")
    data = json.loads((folder / "plain" / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [tuple(merge) for merge in data["model"]["merges"]]
    backend = untrained(nfkc=True)
    backend.model = models.BPE(data["model"]["vocab"], merges)
    backend.add_special_tokens(SPECIAL_TOKENS)
    (folder / "nfkc").mkdir()
    save(backend, folder / "nfkc")
    return folder / "nfkc"


def test_a_tokenizer_that_folds_characters_still_does_once_loaded(tmp_path):
    loaded = Tokenizer.load(folding(tmp_path))

    assert loaded.decode(loaded.encode("ＡＢ １２ ﬁ")) == "AB 12 fi"


def test_a_process_that_opens_another_tokenizer_than_its_parent_says_so(tmp_path):
    """Which a process that encodes does by the folder's name."""
    folder = make_tokenizer(tmp_path / "t")
    pickled = pickle.dumps(Tokenizer.load(folder))
    assert pickle.loads(pickled).encode("天气") == tokenizer().encode("天气")

    with open(f"{folder}/tokenizer.json", "a") as file:
        file.write("\n")

    with pytest.raises(UserError, match="has changed meanwhile"):
        pickle.loads(pickled)


def test_ids_are_packed_little_endian():
    assert pack_ids([1, 0x1234]) == b"\x01\x00\x34\x12"


def test_the_last_of_several_spaces_goes_with_the_word_behind_it():
    split = pre_tokenizers.Split(tokenizers.Regex(pre_token_pattern()), "isolated")

    words = [word for word, _ in split.pre_tokenize_str("a   bc  \n 天")]

    assert words == ["a", "  ", " bc", "  ", "\n", " ", "天"]


@pytest.mark.parametrize("length", [9, 10, 11])
def test_a_text_of_just_the_length_of_a_piece_is_encoded_like_others(monkeypatch, length):
    texts = ["天气", "x" * length, "很好"]
    expected = [tokenizer().encode(text) for text in texts]

    monkeypatch.setattr(tokenizer_module, "MAX_PIECE", 10)

    assert tokenizer().encode_batch(texts) == expected
    assert tokenizer().encode_packed(texts) == list(map(pack_ids, expected))


def test_what_asks_for_an_answer_is_not_supervised():
    ids, mask = tokenizer().encode_chat([], add_generation_prompt=True)

    assert mask == [0] * len(ids) and tokenizer().decode(ids) == "assistant\n"


def test_an_answer_may_be_left_unsupervised():
    said = {"role": "assistant", "content": "好"}

    ids, mask = tokenizer().encode_chat([said | {"supervised": False}, said])

    half = len(ids) // 2
    assert ids[:half] == ids[half:] and not any(mask[:half]) and sum(mask[half:]) == 2
