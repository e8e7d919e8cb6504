"""Many answers at once: one thread decodes all active rows of one KV cache.

    decoder = BatchDecoder(model, cache, max_waiting=64)
    decoder.start(notify=lambda answers: ...)
    decoder.submit([Answer(model.tokenizer, conversation.next_prompt, SamplingParams(), seed=1)])
    decoder.cancel(answer)                   # frees the row before the next step
    decoder.close()

Answers join and leave between two steps. A prompt is read in pieces of READ_TOKENS, one piece
between two steps, so a long prompt does not stop the others. A row keeps the keys and values of its
last answer: the next prompt with the same beginning goes there, and only what is new is read.

Each row draws from its own seed, so an answer is the same alone and beside others. Sums over a
batch round differently in the last digits; a random draw that falls between the two values gives
another token, which is rare in float32 and less rare in bfloat16.
"""
import collections
import math
import sys
import threading
import time
import traceback
from dataclasses import replace

import torch

from minillm.answer import STOP_IDS, Answer
from minillm.generation import cached_forward, common_length, decode_one_token, prefill
from minillm.report import counted
from minillm.sampling import penalize, sample
from minillm.tokenizer import END_OF_TEXT

READ_TOKENS = 256                # of a prompt, between two steps
NEWS_PER_SECOND = 1000           # to all readers together: sending costs more than decoding


class Busy(Exception):
    """No row is free and no place in the queue. retry_after: seconds until one probably is."""

    def __init__(self, requests, retry_after):
        super().__init__(f"the model is busy with {counted(requests, 'answers')}; "
                         f"try again in {retry_after} s")
        self.retry_after = retry_after


class CacheRows:
    """Rows first to last - 1 of a KVCache, as a cache over the same memory."""

    def __init__(self, cache, first, last):
        self.size = cache.size
        self.k = [k[first:last] for k in cache.k]
        self.v = [v[first:last] for v in cache.v]
        self.tokens = [[] for _ in range(first, last)]
        self.n_prefilled = 0
        self.graph = None                        # of minillm/speed: a step recorded over these rows


class Row:
    """One row of the cache, and the answer that it makes at present."""

    def __init__(self, cache, number):
        self.number, self.cache = number, CacheRows(cache, number, number + 1)
        self.answer = None

    def start(self, answer, vocab_size):
        """Get ready to read answer.prompt."""
        self.answer, prompt, params = answer, answer.prompt, answer.params
        self.n_read = self.shared(prompt)        # tokens of the prompt that are in the cache
        self.limit = min(params.max_new_tokens - len(answer.ids), self.cache.size - len(prompt))
        self.step = 0
        generator = torch.Generator().manual_seed(answer.segment_seed % 2**63)
        self.u = torch.rand(self.limit, generator=generator).tolist()
        self.seen = None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[prompt] = True
            self.seen[list(STOP_IDS)] = False

    def shared(self, prompt):
        """How many tokens of `prompt` need not be read; its last one always must."""
        return common_length(prompt[:-1], self.cache.tokens[0])

    @property
    def reading(self):
        return self.n_read < len(self.answer.prompt)


class BatchDecoder:
    """Decodes answers in a thread of its own.

    Each row of `cache` holds one answer; max_waiting more may wait for a row. read, decode, span,
    sample: faster ones from minillm/speed.
    """

    def __init__(self, model, cache, max_waiting, read=cached_forward, decode=decode_one_token,
                 span=lambda *rows: rows, sample=sample):
        self.model, self.cache, self.max_waiting = model, cache, max_waiting
        self.read, self.decode, self.span, self.sample = read, decode, span, sample
        self.vocab_size = model.tokenizer.vocab_size
        self.rows = [Row(cache, number) for number in range(len(cache.tokens))]
        self.spans = {}                          # (first, last) → CacheRows
        self.waiting, self.active = collections.deque(), 0
        self.changed = threading.Condition()
        self.closing = False
        self.mean_seconds = 1.0                  # of the last answers, from joining to the end
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    @torch.inference_mode()
    def warm_up(self, params):
        """Read prompts of all widths, and make a token for each span of rows, before start().

        What compiles or is recorded does so now, in the calling thread. What goes wrong is raised.
        """
        self._set_device()
        params = replace(params, max_new_tokens=len(self.rows) + 1)

        def read(row, length):
            """A new prompt, and the first token after it."""
            row.cache.tokens = [[]]
            prompt = [END_OF_TEXT] * length
            # nothing to go on with in a full context
            row.start(Answer(self.model.tokenizer, lambda ids: None if ids else prompt, params),
                      self.vocab_size)
            self._read(row)
        first = self.rows[0]
        for n in range(READ_TOKENS.bit_length()):
            read(first, min(2**n, self.cache.size - 1))
        for row in self.rows:
            read(row, 1)
        for last in range(1, len(self.rows) + 1):
            if self.span(0, last) not in self.spans and first.step < first.limit:
                self._step(self.rows[:last])
        for row in self.rows:
            row.answer, row.cache.tokens = None, [[]]

    def start(self, notify):
        """Begin to decode what is submitted.

        notify(answers) is called in the thread after a step, with the answers that have news: the
        first text and the end at once, what comes between them at most NEWS_PER_SECOND times.
        """
        self.notify = notify
        self.thread.start()

    # ---- called from other threads

    def submit(self, answers):
        """Queue all of `answers`, or raise Busy."""
        with self.changed:
            self._check_room(len(answers))
            self.waiting.extend(answers)
            self.changed.notify()

    def check_room(self):
        """Raise Busy where submit would for one answer."""
        with self.changed:
            self._check_room(1)

    def _check_room(self, count):
        places = len(self.rows) + self.max_waiting - self.active - len(self.waiting)
        if count > places:
            seconds = self.mean_seconds * (1 + len(self.waiting) / len(self.rows))
            raise Busy(self.active + len(self.waiting), min(max(math.ceil(seconds), 1), 60))

    def cancel(self, answer):
        """Stop `answer`; if it has ended already, nothing changes."""
        with self.changed:
            answer.cancelled = True
            if answer in self.waiting:
                self.waiting.remove(answer)
                answer.finish = "cancelled"

    def close(self):
        """End the thread; answers that have not ended stay unfinished."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    # ---- the thread

    @torch.inference_mode()
    def _run(self):
        self._set_device()
        while True:
            try:
                if not self._take_work():
                    return
                self._turn()
            except Exception:                    # of these answers; other requests may still work
                traceback.print_exc(file=sys.stderr)
                self._fail()
            if news := self._news([row.answer for row in self.rows if row.answer]):
                self.notify(news)

    def _set_device(self):
        if self.model.wte.weight.is_cuda:        # each thread has a current device of its own
            torch.cuda.set_device(self.model.wte.weight.device)

    def _news(self, answers):
        """Those of `answers` whose readers are to hear of it now."""
        now, pause = time.monotonic(), len(answers) / NEWS_PER_SECOND
        news = []
        for answer in answers:
            if answer.finish or (answer.pieces and now >= answer.next_news):
                answer.next_news = now + pause
                news.append(answer)
        return news

    def _take_work(self):
        """Free the rows that are done, give them to those who wait, wait for something to do.

        Returns False when the decoder closes.
        """
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
        self.active += 1
        row.start(answer, self.vocab_size)
        answer.cached_tokens = row.n_read

    def _fail(self):
        for row in self.rows:
            row.cache.tokens = [[]]              # its content is unknown now, and may be NaN
            for tensor in row.cache.k + row.cache.v:
                tensor.zero_()
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
        row.n_read = min(row.n_read + READ_TOKENS, len(prompt))
        logits = prefill(self.model, row.cache, [prompt[: row.n_read]], self.read)
        if not row.reading:
            self._choose([row], logits)

    def _step(self, decoding):
        """One token for each of `decoding`. Idle rows between them write to the padding slot."""
        first, last = self.span(decoding[0].number, decoding[-1].number + 1)
        if (first, last) not in self.spans:
            self.spans[first, last] = CacheRows(self.cache, first, last)
        token, position = [0] * (last - first), [self.cache.size] * (last - first)
        for row in decoding:
            tokens = row.cache.tokens[0]
            token[row.number - first] = row.token
            position[row.number - first] = len(tokens)
            tokens.append(row.token)
        end = max(len(row.cache.tokens[0]) for row in decoding)
        logits = self.decode(self.model, self.spans[first, last], torch.tensor(token)[:, None],
                             torch.tensor(position)[:, None], end)
        if len(decoding) < last - first:
            logits = logits[[row.number - first for row in decoding]]
        self._choose(decoding, logits)

    def _choose(self, rows, logits):
        """Draw the next token of each row from its logits (len(rows), V)."""
        logits = logits[:, : self.vocab_size]
        groups = collections.defaultdict(list)   # rows of equal sampling are drawn together
        for i, row in enumerate(rows):
            groups[row.answer.params.without_length].append(i)
        for params, places in groups.items():
            group = [rows[i] for i in places]
            scores = logits if len(group) == len(rows) else logits[places]
            if params.repetition_penalty != 1:
                seen = torch.stack([row.seen for row in group]).to(scores.device)
                scores = penalize(scores, seen, params.repetition_penalty)
            # non_blocking: a copy that waits would wait for the logits first
            u = torch.tensor([row.u[row.step] for row in group]).to(scores.device,
                                                                    non_blocking=True)
            tokens = self.sample(scores, u, *params.for_sample()).tolist()
            for row, token in zip(group, tokens):
                self._push(row, token)

    def _push(self, row, token):
        answer = row.answer
        row.token = token
        row.step += 1
        if row.seen is not None:
            row.seen[token] = True
        answer.push(token)
        if answer.finish is None and row.step == row.limit:
            answer.begin_segment()
            if answer.finish is None:
                row.start(answer, self.vocab_size)
