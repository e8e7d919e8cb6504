"""The tokenizer's ids out of a dictionary: the same ids, for preparation.

    tokenizer = CachedTokenizer.load("data/tokenizer")
    tokenizer.encode_packed(texts)                   # what Tokenizer.encode_packed gives

Text repeats itself, the library encodes every word of it anew. Here text is cut into pieces short
enough to come again, 5 bytes on average, and the library sees each piece once. A cut may stand

* where one pre-token ends and the next begins: both are encoded alone anyway;
* inside a pre-token, between two characters that stand side by side in no token. No merge joins
  them, so what BPE does on one side does not depend on the other. This cuts every third place in
  Chinese, which has no spaces.

All else is left to Tokenizer: tokenizers with other pre-tokens or a normalizer, runs longer than a
pre-token, and text with characters that may belong to two kinds of pre-token.
"""
import json

import numpy as np
from tokenizers import Regex, pre_tokenizers

from minillm.tokenizer import LONGEST, MAX_PIECE, SPECIAL_TOKENS, Tokenizer, cut, untrained

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
POINTS = 0x110000                    # of Unicode
SLOTS = 1 << 20                      # of the table of pairs; two pairs in one slot cost a cut
PART = 500                           # pieces that the library encodes as one text
CACHE_BYTES = 64 << 20               # of the dictionary, about; then it starts anew


class CachedTokenizer(Tokenizer):
    """Twin of Tokenizer whose encode_packed is twice as fast on one core: 5.4 → 11 MB/s of Chinese
    (AMD EPYC, `python -m bench.data`)."""

    def __init__(self, data, path="tokenizer.json"):
        super().__init__(data, path)
        self._cache = {}                                 # piece -> its ids, packed
        self._cache_bytes = 0
        self._line_end = self.encode("\n")[0]
        self._kinds = np.zeros(POINTS, np.uint8)         # filled in as characters come
        self._glued = np.zeros(POINTS, bool)             # no cut before these
        self._pairs, self._glued_starts = _pairs(self.token_bytes)
        self._is_ours = _is_ours(self._backend)

    def encode_packed(self, texts):
        """The ids of each text as they stand in token files: bytes, little-endian uint16."""
        if not self._is_ours:
            return super().encode_packed(texts)
        pieces = [cut(text) for text in texts]           # one, unless it is longer than MAX_PIECE
        packed, batch, length = [], [], 0
        for piece in (piece for parts in pieces for piece in parts):
            batch.append(piece)
            length += len(piece)
            if length > MAX_PIECE:
                packed += self._encode_pieces(batch)
                batch, length = [], 0
        packed = iter(packed + self._encode_pieces(batch))
        return [b"".join(next(packed) for _ in parts) for parts in pieces]

    def _encode_pieces(self, texts):
        """encode_packed of texts up to MAX_PIECE."""
        if not texts:
            return []
        text = "\n".join([*texts, ""])
        places = self._cuts(text)
        if places is None:
            if len(texts) == 1:
                return super().encode_packed(texts)
            half = len(texts) // 2                       # the other half may be as usual
            return self._encode_pieces(texts[:half]) + self._encode_pieces(texts[half:])
        pieces = [text[start:stop] for start, stop in zip(places, places[1:])]
        ids = self._look_up(pieces)
        ends = np.cumsum([len(text) + 1 for text in texts]) - 1
        packed, first = [], 0
        for line_end in np.searchsorted(places, ends).tolist():
            packed.append(b"".join(ids[first:line_end]))
            first = line_end + 1
        return packed

    def _cuts(self, text):
        """Where the pieces of a text begin, and its length; None if it must be encoded whole."""
        try:
            points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        except UnicodeEncodeError:                       # a lone surrogate
            return None
        kinds = self._kinds[points]
        if not kinds.all():
            self._learn(np.unique(points[kinds == UNKNOWN]).tolist())
            kinds = self._kinds[points]
        before, kind = kinds[:-1], kinds[1:]             # of each place between two characters
        changes = np.flatnonzero(before != kind)
        longest_run = np.diff(changes, prepend=-1, append=len(kind)).max()
        if longest_run > LONGEST or kinds.max() == UNCLEAR:
            return None
        is_joined = self._pairs[_slot(points[:-1], points[1:])] | self._glued[points[1:]]
        is_cut = (before != kind) | (kind == NUMBER) | (kind == LINE) | ~is_joined
        # of several spaces, the last goes with a word behind it, or stands alone
        after = np.append(kind[1:], LINE)
        is_last = (kind == SPACE) & (after != SPACE) & (after != LINE)
        goes_with = (points[:-1] == ord(" ")) & ((kind == LETTER) | (kind == OTHER))
        behind_space = np.where(kind == SPACE, is_last, ~goes_with)
        is_cut = np.where(before == SPACE, behind_space, is_cut)
        return [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(text)]

    def _learn(self, points):
        """Ask the library of what kind some characters are."""
        characters = "".join(map(chr, points))
        kinds = {}
        for kind, pattern in PATTERNS.items():
            split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
            for character, _ in split.pre_tokenize_str(characters):
                kinds.setdefault(character, []).append(kind)
        for character in characters:
            point = ord(character)
            found = kinds.get(character)
            # 〇: a part of a run of Han, else a number
            self._glued[point] = (found == [NUMBER, HAN]
                                  or character.encode("utf-8").startswith(self._glued_starts))
            if found == [NUMBER, HAN]:
                self._kinds[point] = HAN
            elif found and len(found) == 1:
                self._kinds[point] = found[0]
            else:
                self._kinds[point] = UNCLEAR

    def _look_up(self, pieces):
        """The packed ids of each piece; what is new goes through the library once."""
        ids = list(map(self._cache.get, pieces))
        new = list({piece for piece, packed in zip(pieces, ids) if packed is None})
        if not new:
            return ids
        fresh = {}
        parts = [new[first: first + PART] for first in range(0, len(new), PART)]
        encoded = self._encode(["\n".join([*part, ""]) for part in parts])
        for part, tokens in zip(parts, encoded):
            packed, first = np.array(tokens, "<u2").tobytes(), 0
            for piece in part:
                if piece == "\n":
                    stop = first + 1
                else:
                    stop = tokens.index(self._line_end, first)
                fresh[piece] = packed[2 * first: 2 * stop]
                first = stop + 1
        if self._cache_bytes > CACHE_BYTES:
            self._cache, self._cache_bytes = {}, 0
        self._cache.update(fresh)
        self._cache_bytes += sum(200 + 4 * len(piece) for piece in fresh)
        return [fresh[piece] if packed is None else packed for piece, packed in zip(pieces, ids)]


def _is_ours(backend):
    """Whether all but the vocabulary is as train_tokenizer.py makes it, without --nfkc."""
    state, ours = json.loads(backend.to_str()), json.loads(untrained().to_str())
    for model in (state["model"], ours["model"]):
        del model["vocab"], model["merges"]
    added = [token["content"] for token in state["added_tokens"]]
    return (added == SPECIAL_TOKENS and state["normalizer"] is None
            and all(state[key] == ours[key] for key in ("model", "pre_tokenizer")))


def _slot(first, second):
    """Where a pair of characters stands in the table of pairs."""
    return (first * 4099 + second) & (SLOTS - 1)


def _pairs(token_bytes):
    """(table of the pairs of characters inside tokens, how characters that may be joined begin).

    The latter stand in tokens that hold a part of a character, beside one more.
    """
    whole, starts = [], set()
    for token in token_bytes:
        try:
            whole.append(token.decode("utf-8"))
        except UnicodeDecodeError:
            leads = [place for place, byte in enumerate(token) if not 0x80 <= byte < 0xC0]
            for place, stop in zip(leads, [*leads[1:], len(token)]):
                if place:
                    starts.add(token[place:stop])
    points = np.frombuffer("\n".join(whole).encode("utf-32-le"), "<u4")
    pairs = np.zeros(SLOTS, bool)
    pairs[_slot(points[:-1], points[1:])] = True
    return pairs, tuple(starts)
