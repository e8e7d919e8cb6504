"""The tokenizer: lossless byte-level BPE with ChatML, a thin layer over the `tokenizers` library.

    tokenizer = Tokenizer.load("data/tokenizer")
    ids = tokenizer.encode("你好 <|im_start|>")           # no control token, whatever the text spells
    messages = [{"role": "user", "content": "你好"}]
    ids, mask = tokenizer.encode_chat(messages, add_generation_prompt=True)

`decode(encode(s)) == s` for every str that UTF-8 can hold (a lone surrogate, which it cannot,
becomes U+FFFD). The folder also opens with transformers' AutoTokenizer, whose apply_chat_template
gives the ids of `encode_chat`, also where a message spells a control token. But AutoTokenizer reads
control tokens in plain text, unless you pass split_special_tokens=True. train_tokenizer.py makes
the folder; neither torch nor transformers is imported.
"""
import functools
import hashlib
import itertools
import json
import os
import re
import struct

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from minillm.errors import UserError
from minillm.token_bytes import bytes_of_tokens

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, IM_START, IM_END = range(3)
MAX_VOCAB = 65535                    # token files are uint16
# characters encoded at once: the library takes 100 bytes for each
MAX_PIECE = 1 << 18
PROBE = "\n Ab 12\n天气"          # a foreign tokenizer loses case, spaces or what it has no token for
ROLES = ("system", "user", "assistant")

# Pre-tokens are pieces of text whose borders no token crosses. Every line end is one, and every
# digit; so text may be cut at a line end and encoded in parts ("assistant\n" + content) with the
# ids of the whole. Han is written without spaces, so nearly every run of it is a new word, and the
# trainer keeps every word that it meets: for training, runs are cut shorter (HAN_RUN). For encoding
# they are not: a name would get different tokens in different places, and text 7% more tokens.
# LONGEST bounds the memory for odd input.
LONGEST = 1024


def pre_token_pattern(han_run=LONGEST, word=LONGEST, other=LONGEST):
    """The regular expression of a pre-token. han_run, word, other: the most characters of each."""
    return "|".join([
        r"\n",
        r"\p{N}",
        rf"\p{{Han}}{{1,{han_run}}}",
        rf" ?[[\p{{L}}\p{{M}}]&&[^\p{{Han}}]]{{1,{word}}}",     # a word, with the space before it
        # punctuation, symbols, control characters
        rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]{{1,{other}}}",
        # spaces, but the last goes with the word
        rf"[^\S\n]{{1,{other}}}(?!\S)",
        rf"[^\S\n]{{1,{other}}}",
    ])


# transformers reads control tokens in any text. So where a message spells "<|", the template puts a
# noncharacter between: "<U+FDD0|". The normalizer, which runs after control tokens are found, takes
# it out again, so the ids are those of the text. Our load() drops that step of the normalizer.
ESCAPE, ESCAPED = "<|", "<\ufdd0|"
UNESCAPE = normalizers.Replace(ESCAPED, ESCAPE)

ESCAPING = f" | replace('{ESCAPE}', '{ESCAPED}')"

# What encode_chat() computes, for transformers; export_gguf.py has it in two more dialects. The
# markers {% generation %} tell transformers which tokens are supervised.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% set content = message['content']" + ESCAPING + " %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# tokenizer_config.json, for transformers
TRANSFORMERS_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": SPECIAL_TOKENS[IM_END],
    "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
    "padding_side": "left",                      # else a batch generates from padding
    "clean_up_tokenization_spaces": False,
    # transformers 4 adds token_type_ids, which no decoder takes
    "model_input_names": ["input_ids", "attention_mask"],
    "chat_template": CHAT_TEMPLATE,
}


def untrained(nfkc=False):
    """A tokenizers.Tokenizer without vocabulary, ready for a BpeTrainer.

    `nfkc` folds compatibility characters (full-width letters, ligatures …) before all else; the
    tokenizer is then no longer lossless.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    if nfkc:
        backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pre_token_pattern()), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = decoders.ByteLevel()
    return backend


def save(backend, folder):
    """Write tokenizer.json and tokenizer_config.json (for transformers) into `folder`."""
    data = json.loads(backend.to_str())
    if backend.normalizer:
        steps = [UNESCAPE, backend.normalizer]
    else:
        steps = [UNESCAPE]
    data["normalizer"] = json.loads(normalizers.Sequence(steps).__getstate__())
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(data, file, ensure_ascii=False, indent=2)
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(TRANSFORMERS_CONFIG, file, ensure_ascii=False, indent=2)


class Tokenizer:
    """A trained tokenizer. Ids are below `vocab_size`; `hash`: SHA-256 of tokenizer.json."""

    def __init__(self, data, path):
        """data: the bytes of the tokenizer.json at `path`; see load()."""
        self.hash = hashlib.sha256(data).hexdigest()
        self._folder = os.path.abspath(os.path.dirname(path))
        self._backend = _open_backend(data, path)
        # an older version's tokenizer has no step that takes ESCAPED out again
        self._unescapes = ESCAPED in data.decode("utf-8")
        self.vocab_size = self._backend.get_vocab_size()
        # [id] -> the bytes it stands for; b"" for special tokens
        self.token_bytes, self._special = bytes_of_tokens(self._backend, path)
        self._prefixes = {}
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(f"{path} was not trained by train_tokenizer.py: it loses text")

    @classmethod
    def load(cls, folder):
        """Open `folder`/tokenizer.json. UserError if it is missing, damaged or foreign."""
        path = os.path.join(folder, "tokenizer.json")
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; "
                            "train_tokenizer.py makes it, train.py copies it to a model") from None
        return cls(data, path)

    def __reduce__(self):
        # for the processes that encode: 3 MB through a pipe would make one wait for another's start
        return _load_again, (type(self), self._folder, self.hash)

    def transformers_config(self):
        """What tokenizer_config.json says for transformers, beside this tokenizer.json."""
        config = dict(TRANSFORMERS_CONFIG)
        if not self._unescapes:
            config["chat_template"] = CHAT_TEMPLATE.replace(ESCAPING, "")
        return config

    def encode(self, text):
        """The ids of `text`; never a special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """A list of ids for each text, on all cores (RAYON_NUM_THREADS bounds them)."""
        return [list(itertools.chain.from_iterable(pieces)) for pieces in self._pieces(texts)]

    def encode_packed(self, texts):
        """The ids of each text as they stand in token files: bytes, little-endian uint16."""
        return [b"".join(map(pack_ids, pieces)) for pieces in self._pieces(texts)]

    def _pieces(self, texts):
        """Yield the ids of each text, an iterable of lists: one, or one for each piece of it."""
        short = iter(self._encode([text for text in texts if len(text) <= MAX_PIECE]))
        for text in texts:
            yield [next(short)] if len(text) <= MAX_PIECE else self._encode_long(text)

    def _encode_long(self, text):
        """Yield the ids of each piece, a few encoded at once: the memory does not grow with them.

        A piece ends after a line end, which changes no id. Only where none is in reach it ends
        anywhere, which may split one token into two.
        """
        pieces = cut(text)
        for first in range(0, len(pieces), 4):
            yield from self._encode(pieces[first: first + 4])

    def _encode(self, texts):
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:                                # a lone surrogate
            texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids, skip_special=True):
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD."""
        if skip_special:
            pieces = [self.token_bytes[token] for token in ids]
        else:
            pieces = [self.token_bytes[token] or self._special[token] for token in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_text(self, token):
        """One token for display, on one line; parts of characters are shown as bytes."""
        data = self.token_bytes[token] or self._special[token]
        try:
            return repr(data.decode("utf-8"))[1:-1]
        except UnicodeDecodeError:
            return repr(data)[2:-1]

    def encode_chat(self, messages, add_generation_prompt=False):
        """ChatML ids and loss mask of a conversation, two lists.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, …]. The mask is 1 on
        what the assistant says and its <|im_end|>, unless the message has "supervised": False; else
        0. With `add_generation_prompt` the ids end where the assistant's next answer begins. Raises
        UserError for another role.
        """
        ids, mask = [], []
        contents = self.encode_batch([message["content"] for message in messages])
        for message, content in zip(messages, contents):
            ids += self.prefix(message["role"]) + content + self.suffix
            mask += self.loss_mask(message, len(content))
        if add_generation_prompt:
            prefix = self.prefix("assistant")
            ids += prefix
            mask += [0] * len(prefix)
        return ids, mask

    def loss_mask(self, message, n_content):
        """A byte per token of a message whose content has n_content tokens: 1 if supervised."""
        prefix, suffix = len(self.prefix(message["role"])), len(self.suffix)
        supervised = bytes([is_supervised(message)])
        # + 1 and - 1: the <|im_end|> that begins the suffix is supervised like the content
        return bytes(prefix) + supervised * (n_content + 1) + bytes(suffix - 1)

    def prefix(self, role):
        """The ids before the content of a message: <|im_start|>role\\n."""
        if role not in ROLES:
            raise UserError(f"unknown role {role!r}: "
                            f"{', '.join(ROLES[:-1])} and {ROLES[-1]} are known")
        if role not in self._prefixes:
            self._prefixes[role] = [IM_START, *self.encode(role + "\n")]
        return self._prefixes[role]

    @functools.cached_property
    def suffix(self):
        """The ids after the content of a message: <|im_end|>\\n."""
        return [IM_END, *self.encode("\n")]


def pack_ids(ids):
    """Ids as they stand in token files: bytes, little-endian uint16."""
    return struct.pack(f"<{len(ids)}H", *ids)


def _load_again(kind, folder, hash_of_data):
    """The tokenizer that another process has loaded."""
    tokenizer = kind.load(folder)
    if tokenizer.hash != hash_of_data:
        raise UserError(f"{folder}/tokenizer.json has changed meanwhile: start again")
    return tokenizer


def is_supervised(message):
    """Whether a message's tokens are supervised: the assistant's, unless it says otherwise."""
    return message["role"] == "assistant" and message.get("supervised", True)


def cut(text):
    """Pieces of at most MAX_PIECE characters, cut after a line end where there is one."""
    pieces, start = [], 0
    while len(text) - start > MAX_PIECE:
        stop = text.rfind("\n", start, start + MAX_PIECE) + 1 or start + MAX_PIECE
        pieces.append(text[start:stop])
        start = stop
    return pieces + [text[start:]]


def _open_backend(data, path):
    """The library's tokenizer, checked. Tokens that somebody added after ours are accepted."""
    try:
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        table = [backend.id_to_token(token) for token in range(backend.get_vocab_size())]
    except Exception as error:                           # the library raises bare Exception
        why = " ".join(str(error).split())[:80]
        raise UserError(f"{path} is damaged ({why}): train the tokenizer again") from None
    if not isinstance(backend.model, models.BPE) or backend.model.dropout:
        raise UserError(f"{path} was not trained by train_tokenizer.py: it must be BPE, which "
                        "gives a text the same ids each time (no dropout)")
    if table[:3] != SPECIAL_TOKENS or None in table or not 259 <= len(table) <= MAX_VOCAB:
        raise UserError(f"{path} was not trained by train_tokenizer.py: the ids 0, 1, 2 must be "
                        f"{' '.join(SPECIAL_TOKENS)}, "
                        f"and all ids run on from there to at most {MAX_VOCAB}")
    # text that spells <|im_start|> is text: control tokens are set by id, in encode_chat only
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    if backend.normalizer:
        # not json.loads(data): its 64,000 lists take Python 0.1 s once torch is imported
        normalizer = json.loads(backend.normalizer.__getstate__())
        if ESCAPED in json.dumps(normalizer, ensure_ascii=False):
            # without the step that is for transformers alone
            nfkc = any(step["type"] == "NFKC" for step in normalizer["normalizers"])
            backend.normalizer = normalizers.NFKC() if nfkc else None
    return backend
