"""The tests' tokenizer: bytes and a few merges, set by hand, so that it depends on no trainer."""
import functools
import os
import tempfile

import tokenizers
from tokenizers import models, pre_tokenizers

from minillm.tokenizer import SPECIAL_TOKENS, Tokenizer, save, untrained

VOCAB = 300
# Most characters stay several tokens, and random ids are mostly broken UTF-8
WORDS = ["的", "是", "在", "一", "人", "，", "。", "th", "the"]
WORDS += ["天", "气", "很", "好", "我", "问", "答", "晴", "散", "步", "天气", "qu", "fo"]


def make_tokenizer(folder):
    """A tokenizer of VOCAB tokens in a new folder. Returns the folder's path."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(SPECIAL_TOKENS + alphabet)}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    for word in WORDS:
        written = byte_level.pre_tokenize_str(word)[0][0]
        for end in range(1, len(written)):
            left, right = written[:end], written[end]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    assert len(vocabulary) == VOCAB, len(vocabulary)
    backend = untrained()
    backend.model = models.BPE(vocabulary, merges)
    special = [tokenizers.AddedToken(token, special=True) for token in SPECIAL_TOKENS]
    backend.add_special_tokens(special)
    os.makedirs(folder)
    save(backend, folder)
    return str(folder)


@functools.cache
def tokenizer():
    """The same, loaded."""
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(make_tokenizer(os.path.join(folder, "tokenizer")))
