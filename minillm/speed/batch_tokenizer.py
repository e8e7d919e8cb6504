"""BPE of a whole batch at once, in numpy: the same ids as the library's, for preparation.

    tokenizer = BatchTokenizer.load("data/tokenizer")
    tokenizer.encode_packed(texts)                   # what Tokenizer.encode_packed gives

1. Text is cut into words: where one pre-token ends and the next begins, and inside a pre-token
   between two characters that stand side by side in no token. No merge joins those, so BPE does the
   same on both sides alone. In Chinese, which has no spaces, this cuts every third place.
2. Each character becomes its token. BPE comes by here too: it merges the bytes of a character
   before anything that holds the character. characters_first() leaves out those where it does not.
3. In rounds, every word merges the pair of the lowest rank, the first of several, until no word has
   one. A round is a dozen numpy calls for all words that still merge.

The library encodes the words that this does not fit: with a rare character, which is more than one
token; with a token of parts of two characters; or long, as rounds are. And it encodes whole texts
with runs longer than a pre-token, or with characters that fit two kinds of pre-token. A tokenizer
with other pre-tokens or a normalizer is left to the library altogether.
"""
import itertools
import json

import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from minillm.speed.merge_table import MergeTable, merges_of
from minillm.tokenizer import LONGEST, MAX_PIECE, SPECIAL_TOKENS, Tokenizer, cut

# The kinds of characters of which pre_token_pattern() makes its runs
UNKNOWN, SPACE, LINE, NUMBER, HAN, LETTER, OTHER, UNCLEAR = range(8)
PATTERNS = {
    SPACE: r"[^\S\n]",
    LINE: r"\n",
    NUMBER: r"\p{N}",
    HAN: r"\p{Han}",
    LETTER: r"[[\p{L}\p{M}]&&[^\p{Han}]]",
    OTHER: r"[^\s\p{L}\p{M}\p{N}]",
}
# pre_token_pattern() as this file cuts: a literal, so that a change of the function is seen
PRE_TOKEN = "|".join([
    r"\n", r"\p{N}", r"\p{Han}{1,1024}", r" ?[[\p{L}\p{M}]&&[^\p{Han}]]{1,1024}",
    r" ?[^\s\p{L}\p{M}\p{N}]{1,1024}", r"[^\S\n]{1,1024}(?!\S)", r"[^\S\n]{1,1024}",
])
POINTS = 0x110000                    # of Unicode
LONG_WORD = 32                       # characters
PART = 500                           # words that the library encodes as one text


class BatchTokenizer(Tokenizer):
    """Fast version of Tokenizer, with the same ids.

    encode_packed makes 20 MB/s of Chinese on one core instead of 5.3 (AMD EPYC,
    `RAYON_NUM_THREADS=1 python -m bench.data corpus.jsonl chats.jsonl`).
    """

    def __init__(self, data, path):
        super().__init__(data, path)
        state = json.loads(self._backend.to_str())
        self._is_ours = _is_ours(state)
        if not self._is_ours:
            return
        self._line_end = self.encode("\n")[0]
        self._merges = MergeTable(state["model"])
        self._pairs, self._parts = pairs_in_tokens(self.token_bytes)
        # [code point] -> its kind; filled in as characters come
        self._kinds = np.zeros(POINTS, np.uint8)
        # … bit b: a token may join a part of it to a character before it of which & 63 is b
        self._glue = np.zeros(POINTS, np.uint64)
        # … its token; -1: more than one
        self._tokens = np.full(POINTS, -1, np.int32)
        for character, token in characters_first(state["model"], self.token_bytes):
            self._tokens[ord(character)] = token

    def encode_packed(self, texts):
        """The ids of each text as they stand in token files: bytes, little-endian uint16."""
        if not self._is_ours:
            return super().encode_packed(texts)
        parts_of_texts = [cut(text) for text in texts]   # one, unless it exceeds MAX_PIECE
        packed, batch, length = [], [], 0
        for part in itertools.chain.from_iterable(parts_of_texts):
            batch.append(part)
            length += len(part)
            if length > MAX_PIECE:
                packed += self._encode_parts(batch)
                batch, length = [], 0
        if batch:
            packed += self._encode_parts(batch)
        in_order = iter(packed)
        return [b"".join(next(in_order) for _ in parts) for parts in parts_of_texts]

    def _encode_parts(self, texts):
        """encode_packed of texts of at most MAX_PIECE characters."""
        text = "\n".join([*texts, ""])
        points = _code_points(text)
        cuts = None if points is None else self._cuts(points)
        if cuts is not None:
            ids, offsets = self._encode_words(text, points, *cuts)
            lengths = np.array([len(part) for part in texts])
            stops = np.cumsum(lengths + 1) - 1           # a line end follows each
            bounds = zip(offsets[stops - lengths].tolist(), offsets[stops].tolist())
            id_bytes = ids.tobytes()
            return [id_bytes[2 * start: 2 * stop] for start, stop in bounds]
        if len(texts) == 1:
            return super().encode_packed(texts)
        half = len(texts) // 2                           # one of the halves may be as usual
        return self._encode_parts(texts[:half]) + self._encode_parts(texts[half:])

    def _cuts(self, points):
        """(where words begin, where a token may hold a part of a character and the one before).

        Arrays of bool, one per character. None if the text must be encoded whole.
        """
        kinds = self._kinds[points]
        if not kinds.all():
            self._learn(np.unique(points[kinds == UNKNOWN]).tolist())
            kinds = self._kinds[points]
        first, second = points[:-1], points[1:]          # of each pair of neighbours
        before, kind = kinds[:-1], kinds[1:]
        changes = np.flatnonzero(before != kind)
        longest_run = np.diff(changes, prepend=-1, append=len(kind)).max()
        if longest_run > LONGEST or kinds.max() == UNCLEAR:
            return None
        is_glued = self._glue[second] >> (first & 63) & 1 > 0
        is_joined = self._pairs[_slot(first, second)] | is_glued
        in_text = (before != kind) | (kind == NUMBER) | (kind == LINE) | ~is_joined
        # of several spaces, the last goes with a word behind it, or stands alone
        after = np.append(kind[1:], LINE)
        is_last = (kind == SPACE) & (after != SPACE) & (after != LINE)
        goes_with = (first == ord(" ")) & ((kind == LETTER) | (kind == OTHER))
        behind_space = np.where(kind == SPACE, is_last, ~goes_with)
        is_cut = np.append(True, np.where(before == SPACE, behind_space, in_text))
        return is_cut, np.append(False, is_glued) & ~is_cut

    def _learn(self, points):
        """Ask the library of what kind some characters are."""
        characters = "".join(map(chr, points))
        kinds_of = {}
        for kind, pattern in PATTERNS.items():
            split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
            for character, _ in split.pre_tokenize_str(characters):
                kinds_of.setdefault(character, []).append(kind)
        for point, character in zip(points, characters):
            found = kinds_of.get(character)
            if found == [NUMBER, HAN]:                   # 〇: for the library, with what is before
                self._tokens[point] = -1
                self._glue[point] = 2**64 - 1
                self._kinds[point] = HAN
                continue
            encoded, bits = character.encode("utf-8"), 0
            for length in range(1, len(encoded) + 1):
                bits |= self._parts.get(encoded[:length], 0)
            self._glue[point] = bits
            self._kinds[point] = found[0] if found and len(found) == 1 else UNCLEAR

    def _encode_words(self, text, points, is_cut, is_glued):
        """(ids of a text as uint16, where the ids of each character begin among them)."""
        tokens = self._tokens[points]
        word_of = np.cumsum(is_cut, dtype=np.int32) - 1  # [character] -> the number of its word
        bounds = np.append(np.flatnonzero(is_cut), len(text))
        length = np.diff(bounds)

        # 1) the words that the library encodes
        is_hard = length > LONG_WORD
        is_hard[word_of[(tokens < 0) | is_glued]] = True
        tokens[is_hard[word_of]] = -1
        hard = np.flatnonzero(is_hard)
        bounds_of_hard = zip(bounds[hard].tolist(), bounds[hard + 1].tolist())
        words = [text[start:stop] for start, stop in bounds_of_hard]
        ids_of = self._encode_by_library(set(words))

        # 2) all others: merged until nothing is left to merge
        self._merge(tokens, word_of, np.flatnonzero((~is_hard & (length > 1))[word_of]))

        # 3) both in their order
        is_token = tokens >= 0
        counts = is_token.astype(np.int64)
        counts[bounds[hard]] = [len(ids_of[word]) for word in words]
        offsets = np.append(0, np.cumsum(counts))
        is_merged = np.repeat(is_token, counts)
        ids = np.empty(offsets[-1], "<u2")
        ids[is_merged] = tokens[is_token]
        ids[~is_merged] = [token for word in words for token in ids_of[word]]
        return ids, offsets

    def _merge(self, tokens, word_of, index):
        """Merge the tokens at `index`; one that is merged into the token before it becomes -1."""
        none = np.int32(self._merges.none)
        while len(index):
            ids, words = tokens[index], word_of[index]
            is_new = words[1:] != words[:-1]
            rank = self._merges.rank(ids[:-1], ids[1:])
            rank = np.append(np.where(is_new, none, rank), none)
            starts = np.append(0, np.flatnonzero(is_new) + 1)
            sizes = np.diff(starts, append=len(index))
            lowest = np.repeat(np.minimum.reduceat(rank, starts), sizes)     # of each one's word
            goes_on = lowest < none
            hits = np.flatnonzero((rank == lowest) & goes_on)
            hits = hits[np.diff(words[hits], prepend=-1) > 0]        # the first in its word
            tokens[index[hits]] = self._merges.merged[rank[hits]]
            tokens[index[hits + 1]] = -1
            goes_on[hits + 1] = False
            index = index[goes_on]

    def _encode_by_library(self, words):
        """{word: its ids} of a set of words."""
        in_order, ids_of = list(words), {}
        parts = [in_order[first: first + PART] for first in range(0, len(in_order), PART)]
        encoded = self._encode(["\n".join([*part, ""]) for part in parts])
        for part, ids in zip(parts, encoded):
            start = 0
            for word in part:
                stop = ids.index(self._line_end, start)
                ids_of[word] = ids[start:stop]
                start = stop + 1
        return ids_of


def characters_first(model, token_bytes):
    """Yield (character, its token) where BPE may as well begin with the character.

    That is where its bytes become one token, by merges that come before all those of that token. A
    token that two merges make need not be like that.
    """
    vocabulary, rank_of, earliest = model["vocab"], {}, {}
    for rank, (left_text, right_text) in enumerate(merges_of(model)):
        left, right = vocabulary[left_text], vocabulary[right_text]
        rank_of[left, right] = rank
        earliest.setdefault(left, rank)
        earliest.setdefault(right, rank)
    of_bytes = {content: token for token, content in enumerate(token_bytes)}
    for content, token in of_bytes.items():
        character = content.decode("utf-8", "replace")
        if len(character) != 1 or character == "\ufffd":
            continue
        ids, last = [of_bytes[bytes([byte])] for byte in content], -1
        while ranked := [(rank_of[pair], place) for place, pair in enumerate(zip(ids, ids[1:]))
                         if pair in rank_of]:
            rank, place = min(ranked)
            merged = token_bytes[ids[place]] + token_bytes[ids[place + 1]]
            ids[place: place + 2] = [of_bytes[merged]]
            last = max(last, rank)
        if ids == [token] and last < earliest.get(token, last + 1):
            yield character, token


def _is_ours(state):
    """Whether all but the vocabulary is what this file encodes: train_tokenizer.py's, no --nfkc.

    Whoever changes tokenizer.py gets tokenizers of other rules, which the library encodes.
    """
    ours = tokenizers.Tokenizer(models.BPE())
    ours.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    ours = json.loads(ours.to_str())
    same = all(state["model"][key] == value for key, value in ours["model"].items()
               if key not in ("vocab", "merges"))
    added = [token["content"] for token in state["added_tokens"]]
    return (same and added == SPECIAL_TOKENS and state["normalizer"] is None
            and state["pre_tokenizer"] == ours["pre_tokenizer"])


def _code_points(text):
    try:
        return np.frombuffer(text.encode("utf-32-le"), "<u4")
    except UnicodeEncodeError:                           # a lone surrogate
        return None


SLOTS = 1 << 20                      # of the table of pairs; two pairs in one slot cost a cut


def _slot(first, second):
    """Where a pair of characters stands in the table of pairs."""
    return (first * 4099 + second) % SLOTS


def pairs_in_tokens(token_bytes):
    """(table of the neighbours inside tokens, those of which one is there in part).

    The latter, which the table cannot hold, are {first bytes of the second: a set of bits}. Bit b
    is set if the byte before them, & 63, is b. The last byte of a character and its code point
    agree in & 63.
    """
    whole, parts = [], {}
    for token in token_bytes:
        try:
            whole.append(token.decode("utf-8"))
        except UnicodeDecodeError:
            leads = [place for place, byte in enumerate(token) if not 0x80 <= byte < 0xC0]
            for place, stop in zip(leads, [*leads[1:], len(token)]):
                if place:
                    part, bit = token[place:stop], 1 << (token[place - 1] & 63)
                    parts[part] = parts.get(part, 0) | bit
    points = np.frombuffer("\n".join(whole).encode("utf-32-le"), "<u4")
    pairs = np.zeros(SLOTS, bool)
    pairs[_slot(points[:-1], points[1:])] = True
    return pairs, parts
