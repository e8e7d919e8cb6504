"""Many answers at once: one thread decodes all active rows of one KV cache.

    decoder = BatchDecoder(model, rows=8, max_waiting=64, notify=lambda answers: ...)
    decoder.submit([Answer(model.tokenizer, next_prompt, seed=1)])     # Busy where no place is left
    decoder.cancel(answer)                                              # frees the row before the next step
    decoder.close()

Answers join and leave between two steps. A prompt is read in pieces of READ_TOKENS, one piece between two
steps, so a long prompt does not hold up the others. A row keeps the keys and values of its last answer:
the next prompt that begins alike goes there and reads only what is new.

Each row draws from its own seed, so an answer has the text that it has alone, whoever decodes beside it.
Sums over a batch round differently than those of one row, in the last digits; a random draw that falls
between the two is the one exception, about once in a million tokens in float32.
"""
import collections
import math
import sys
import threading
import time
import traceback

import torch

from minillm.conversation import TextStream
from minillm.sampling import sample
from minillm.tokenizer import END_OF_TEXT, IM_END, IM_START

STOP_IDS = (END_OF_TEXT, IM_START, IM_END)
READ_TOKENS = 256                # of a prompt, between two steps
SEGMENT_SEED = 1_000_003         # as in Conversation.answer: the seed of what follows a full context


class Busy(Exception):
    """No row is free and no place in the queue. retry_after: seconds until one probably is."""

    def __init__(self, active, waiting, retry_after):
        super().__init__(f"the model is busy: {active} requests are running and {waiting} are waiting; "
                         f"try again in {retry_after} s")
        self.retry_after = retry_after


class Answer:
    """One answer: what to decode, and what has been decoded so far.

    next_prompt(ids) returns the prompt that follows after the answer `ids` so far: first with [], then
    whenever the context is full. It returns None where nothing can be dropped to make room.
    `pieces` collects text for the reader. `finish` stays None until the answer ends: then "stop",
    "length" (max_new_tokens), "context" (no room left), "cancelled" or "error".
    """

    def __init__(self, tokenizer, next_prompt, max_new_tokens=256, temperature=1.0, top_k=0, top_p=1.0,
                 repetition_penalty=1.0, seed=0, stop=()):
        self.next_prompt, self.prompt = next_prompt, next_prompt([])
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.sampling = (temperature, top_k, top_p, repetition_penalty)
        self.stream = TextStream(tokenizer, stop)
        self.ids, self.segment = [], 0
        self.pieces = collections.deque()
        self.prompt_tokens, self.cached_tokens, self.tokens = len(self.prompt), 0, 0
        self.finish, self.cancelled, self.started = None, False, None

    def push(self, token):
        """Add the next token."""
        self.tokens += 1
        if token in STOP_IDS:
            return self.end("stop")
        self.ids.append(token)
        self.pieces.append(self.stream.push(token))
        if self.stream.stopped:
            self.end("stop")
        elif len(self.ids) == self.max_new_tokens:
            self.end("length")

    def end(self, reason):
        self.pieces.append(self.stream.flush())
        self.finish = reason

    def take(self):
        """The text that has come since the last call."""
        text = ""
        while self.pieces:
            text += self.pieces.popleft()
        return text


class CacheRows:
    """Rows first to last - 1 of a KVCache, as a cache of their own over the same memory."""

    def __init__(self, cache, first, last):
        self.size = cache.size
        self.k = [k[first:last] for k in cache.k]
        self.v = [v[first:last] for v in cache.v]
        self.tokens = [[] for _ in range(first, last)]
        self.prefilled = 0
        self.loops = {}


class Row:
    """One row of the cache, and the answer that it makes at present."""

    def __init__(self, cache, number):
        self.number, self.cache = number, CacheRows(cache, number, number + 1)
        self.answer = None

    def start(self, answer, vocab_size):
        """Get ready to read answer.prompt."""
        self.answer = answer
        room = self.cache.size - len(answer.prompt)
        self.limit = min(answer.max_new_tokens - len(answer.ids), room)
        self.read = min(self.shared(answer.prompt), len(answer.prompt) - 1)
        self.step = 0
        generator = torch.Generator().manual_seed((answer.seed + SEGMENT_SEED * answer.segment) % 2**63)
        self.u = torch.rand(self.limit, generator=generator)
        self.seen = None
        if answer.sampling[3] != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[answer.prompt] = True
            self.seen[list(STOP_IDS)] = False

    def shared(self, prompt):
        """How many of the first tokens of `prompt` are in the cache already."""
        count = 0
        for new, old in zip(prompt, self.cache.tokens[0]):
            if new != old:
                break
            count += 1
        return count

    @property
    def reading(self):
        return self.read < len(self.answer.prompt)


class BatchDecoder:
    """Decodes answers in a thread of its own.

    rows: answers decoded at the same time. max_waiting: answers that may wait for a row.
    notify(answers) is called in that thread after each step, with the answers that have news.
    """

    def __init__(self, model, cache, prefill, decode, max_waiting, notify):
        self.model, self.cache, self.prefill, self.decode = model, cache, prefill, decode
        self.vocab_size = model.tokenizer.vocab_size
        self.rows = [Row(cache, number) for number in range(len(cache.tokens))]
        self.max_waiting, self.notify = max_waiting, notify
        self.waiting, self.active = collections.deque(), 0
        self.changed = threading.Condition()
        self.closing = False
        self.mean_seconds = 1.0                  # of the last answers, from row to end
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self.thread.start()

    # ---- called from other threads

    def submit(self, answers):
        """Queue all of `answers`, or raise Busy."""
        with self.changed:
            self._check_room(len(answers))
            self.waiting.extend(answers)
            self.changed.notify()

    def check_room(self, count=1):
        """Raise Busy where submit would."""
        with self.changed:
            self._check_room(count)

    def _check_room(self, count):
        places = len(self.rows) + self.max_waiting - self.active - len(self.waiting)
        if count > places:
            seconds = self.mean_seconds * (1 + len(self.waiting) / len(self.rows))
            raise Busy(self.active, len(self.waiting), min(max(math.ceil(seconds), 1), 60))

    def cancel(self, answer):
        """Nobody wants `answer` any more. One that has ended already stays as it is."""
        with self.changed:
            answer.cancelled = True
            if answer in self.waiting:
                self.waiting.remove(answer)
                answer.finish = "cancelled"

    def close(self):
        """End the thread; what is not done by now never will be."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    # ---- the thread

    @torch.inference_mode()
    def _run(self):
        while self._take_work():
            news = [row.answer for row in self.rows if row.answer]
            try:
                self._turn()
            except Exception:                    # of one step; the next request may fare better
                traceback.print_exc(file=sys.stderr)
                self._fail()
            self.notify(news)

    def _take_work(self):
        """Wait for something to do. Free the rows that are done, give free rows to those who wait. False: the end."""
        with self.changed:
            while True:
                for row in self.rows:
                    if row.answer and (row.answer.finish or row.answer.cancelled):
                        self._free(row)
                while self.waiting and self.active < len(self.rows):
                    self._join(self.waiting.popleft())
                if self.closing or self.active:
                    return not self.closing
                self.changed.wait()

    def _free(self, row):
        answer, row.answer = row.answer, None
        answer.finish = answer.finish or "cancelled"
        self.active -= 1
        self.mean_seconds += 0.1 * (time.monotonic() - answer.started - self.mean_seconds)

    def _join(self, answer):
        """Give `answer` the free row that holds most of its prompt, of equal ones the first."""
        free = [row for row in self.rows if row.answer is None]
        row = max(free, key=lambda row: (row.shared(answer.prompt), -row.number))
        answer.started = time.monotonic()
        row.start(answer, self.vocab_size)
        answer.cached_tokens = row.read
        self.active += 1

    def _fail(self):
        for row in self.rows:
            row.cache.tokens = [[]]              # nobody knows what is there now
            if row.answer:
                row.answer.finish = "error"

    def _turn(self):
        """Read a piece of one prompt, then make one token for every row that has read its own."""
        decoding = [row for row in self.rows if row.answer and not row.reading]
        reading = [row for row in self.rows if row.answer and row.reading]
        if reading:
            self._read(min(reading, key=lambda row: row.answer.started))
        if decoding:
            self._step(decoding)

    def _read(self, row):
        prompt = row.answer.prompt
        row.read = min(row.read + READ_TOKENS, len(prompt))
        logits = self.prefill(self.model, row.cache, [prompt[: row.read]])
        if not row.reading:
            self._choose([row], logits)

    def _step(self, decoding):
        """One token for each of `decoding`. Rows between them that are idle write to the padding slot."""
        first, last = decoding[0].number, decoding[-1].number + 1
        token = torch.zeros(last - first, 1, dtype=torch.long)
        position = torch.full_like(token, self.cache.size)
        for row in decoding:
            tokens = row.cache.tokens[0]
            token[row.number - first] = row.token
            position[row.number - first] = len(tokens)
            tokens.append(row.token)
        end = max(len(row.cache.tokens[0]) for row in decoding)
        cache = CacheRows(self.cache, first, last)
        device = self.model.wte.weight.device
        logits = self.decode(self.model, cache, token.to(device), position.to(device), end)
        self._choose(decoding, logits[[row.number - first for row in decoding]])

    def _choose(self, rows, logits):
        """Draw the next token of each row from its logits (len(rows), V): those of equal sampling together."""
        logits = logits[:, : self.vocab_size]
        groups = collections.defaultdict(list)
        for place, row in enumerate(rows):
            groups[row.answer.sampling].append(place)
        for (temperature, top_k, top_p, penalty), places in groups.items():
            group = [rows[place] for place in places]
            scores = logits[places]
            if penalty != 1:                     # CTRL, arXiv 1909.05858
                seen = torch.stack([row.seen for row in group]).to(scores.device)
                damped = torch.where(scores > 0, scores / penalty, scores * penalty)
                scores = torch.where(seen, damped, scores)
            u = torch.stack([row.u[row.step] for row in group]).to(scores.device)
            for row, token in zip(group, sample(scores, u, temperature, top_k, top_p).tolist()):
                self._push(row, token)

    def _push(self, row, token):
        answer = row.answer
        row.token = token
        row.step += 1
        if row.seen is not None:
            row.seen[token] = True
        answer.push(token)
        if answer.finish is None and row.step == row.limit:
            self._make_room(row)

    def _make_room(self, row):
        """The row is full: read what is left of the conversation anew, or end."""
        answer = row.answer
        prompt = answer.next_prompt(answer.ids)
        if prompt is None:
            return answer.end("context")
        answer.prompt = prompt
        answer.segment += 1
        row.start(answer, self.vocab_size)
