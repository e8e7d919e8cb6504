"""The tokenizer: lossless byte-level BPE with ChatML, a thin layer over the `tokenizers` library.

    tokenizer = Tokenizer.load("data/tokenizer")
    ids = tokenizer.encode("你好 <|im_start|>")           # no control token, whatever the text spells
    ids, mask = tokenizer.encode_chat([{"role": "user", "content": "你好"}], add_generation_prompt=True)

`decode(encode(s)) == s` for every str that UTF-8 can hold (a lone surrogate, which it cannot, becomes
U+FFFD). The folder also opens with transformers' AutoTokenizer, whose apply_chat_template gives the
ids of `encode_chat`. train_tokenizer.py makes the folder; neither torch nor transformers is imported.
"""
import codecs
import hashlib
import json
import os
import re

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from minillm.errors import UserError

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, IM_START, IM_END = range(3)
MAX_VOCAB = 65535                    # token files are uint16
MAX_PIECE = 1 << 18                  # characters encoded at once: the library takes some 100 bytes for each

# Pre-tokens, which no token crosses. Every line end is one, and every digit; so text may be cut at a
# line end and encoded in pieces ("assistant\n" + content) with the ids of the whole. Han has no spaces,
# so nearly each run of it is a new word, and a trainer keeps all the words it meets: train_tokenizer.py
# gives it shorter runs. Encoding has no need of that, and cut runs would give a name other tokens
# wherever it stands: uncut they also take 7 % fewer tokens. The other caps serve odd input.
HAN_RUN = 1024


def pre_token_pattern(han_run=HAN_RUN):
    return "|".join([
        r"\n",
        r"\p{N}",
        rf"\p{{Han}}{{1,{han_run}}}",
        r" ?[[\p{L}\p{M}]&&[^\p{Han}]]{1,24}",       # a word, with the space before it
        r" ?[^\s\p{L}\p{M}\p{N}]{1,16}",             # punctuation, symbols, control characters
        r"[^\S\n]{1,16}(?!\S)",                      # spaces, but the last one goes with the word
        r"[^\S\n]{1,16}",
    ])


# The markers {% generation %} tell transformers which tokens are learned.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# tokenizer_config.json, for transformers
TRANSFORMERS_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": SPECIAL_TOKENS[IM_END], "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
    "clean_up_tokenization_spaces": False,
    # transformers 4 adds token_type_ids, which no decoder takes
    "model_input_names": ["input_ids", "attention_mask"],
    "chat_template": CHAT_TEMPLATE,
}


def untrained(nfkc=False, han_run=HAN_RUN):
    """A tokenizers.Tokenizer without vocabulary, ready for a BpeTrainer. `nfkc` folds compatibility
    characters (full-width letters, ligatures …) before all else, and gives up losslessness."""
    backend = tokenizers.Tokenizer(models.BPE())
    if nfkc:
        backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pre_token_pattern(han_run)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = decoders.ByteLevel()
    return backend


def save(backend, folder):
    """Write tokenizer.json and tokenizer_config.json (for transformers) into `folder`."""
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as file:
        file.write(backend.to_str(pretty=True))
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(TRANSFORMERS_CONFIG, file, ensure_ascii=False, indent=2)


class Tokenizer:
    """A trained tokenizer. `vocab_size`: ids are below it; `hash`: sha256 of tokenizer.json, in hex."""

    def __init__(self, backend, hash):
        self._backend, self.hash = backend, hash
        # text that spells <|im_start|> is text: control tokens are set by id, in encode_chat only
        backend.encode_special_tokens = True
        self.vocab_size = backend.get_vocab_size()
        self.token_bytes = _token_bytes(backend)         # [id] -> the bytes it stands for; b"" for special tokens
        self._frames = {}

    @classmethod
    def load(cls, folder):
        """Open `folder`/tokenizer.json. Raises UserError if it is missing, damaged, or of another make."""
        path = os.path.join(folder, "tokenizer.json")
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; train_tokenizer.py makes it") from None
        try:
            backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            table = [backend.id_to_token(id) for id in range(backend.get_vocab_size())]
        except Exception as error:                       # the library raises bare Exception
            raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:80]}): train the tokenizer again") from None
        if table[:3] != SPECIAL_TOKENS or None in table or not 259 <= len(table) <= MAX_VOCAB:
            raise UserError(f"{path} is no tokenizer of ours: the ids 0, 1, 2 must be {' '.join(SPECIAL_TOKENS)}, "
                            f"and all ids run on from there to at most {MAX_VOCAB}")
        return cls(backend, hashlib.sha256(data).hexdigest())

    def encode(self, text):
        """The ids of `text`; never a special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """A list of ids for each text, on all cores (the environment's RAYON_NUM_THREADS bounds them)."""
        short = iter(self._encode([text for text in texts if len(text) <= MAX_PIECE]))
        return [next(short) if len(text) <= MAX_PIECE else [id for ids in self.encode_pieces(text) for id in ids]
                for text in texts]

    def encode_pieces(self, text):
        """Yield the ids of a text of any length, piece by piece, in memory that does not grow with it.

        A text over MAX_PIECE characters is cut after a line end, which changes no id; only where none
        is in reach it is cut anywhere, which may part one token into two.
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
        """The text of `ids`. Bytes that are no UTF-8 (a sequence cut inside a character) become U+FFFD."""
        pieces = (self.token_bytes[id] or (b"" if skip_special else SPECIAL_TOKENS[id].encode()) for id in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def encode_chat(self, messages, add_generation_prompt=False):
        """ChatML ids and mask of a conversation.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, …]. The mask is 1 on what
        the assistant says and its <|im_end|>, else 0. With `add_generation_prompt` the ids end where
        the assistant's next answer begins. Raises UserError for another role.
        """
        ids, mask = [], []
        for message, content in zip(messages, self.encode_batch([message["content"] for message in messages])):
            before, behind = self.frame(message["role"])
            learned = int(message["role"] == "assistant")
            ids += before + content + behind
            mask += [0] * len(before) + [learned] * (len(content) + 1) + [0] * (len(behind) - 1)
        if add_generation_prompt:
            before, _ = self.frame("assistant")
            ids += before
            mask += [0] * len(before)
        return ids, mask

    def frame(self, role):
        """The ids before and behind the content of a message: <|im_start|>role\\n and <|im_end|>\\n."""
        if role not in ("system", "user", "assistant"):
            raise UserError(f"unknown role {role!r}: system, user and assistant are known")
        if role not in self._frames:
            self._frames[role] = [IM_START, *self.encode(role + "\n")], [IM_END, *self.encode("\n")]
        return self._frames[role]


def cut(text):
    """Pieces of at most MAX_PIECE characters, cut after a line end where there is one."""
    pieces, start = [], 0
    while len(text) - start > MAX_PIECE:
        stop = text.rfind("\n", start, start + MAX_PIECE) + 1 or start + MAX_PIECE
        pieces.append(text[start:stop])
        start = stop
    return pieces + [text[start:]]


def _token_bytes(backend):
    """The bytes of each id. Byte-level BPE writes a byte as a printable character: those of Latin-1 for
    themselves, the 68 others (controls, space …) as U+0100 and on (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    table = [bytes(byte_of[char] for char in backend.id_to_token(id))
             for id in range(len(SPECIAL_TOKENS), backend.get_vocab_size())]
    return [b""] * len(SPECIAL_TOKENS) + table


class StreamDecoder:
    """Text out of tokens as they come, whole characters only.

    `push(id)` gives the text that is complete by now, `flush()` ends. Bytes that cannot become a
    character are dropped, so no U+FFFD appears that the tokens do not spell; special tokens say nothing.
    """

    def __init__(self, tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def push(self, id):
        return self._decoder.decode(self._token_bytes[id])

    def flush(self):
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
