"""One answer: what is to be decoded, what has been so far, and why it ended.

    answer = Answer(model.tokenizer, conversation.next_prompt, SamplingParams(), seed=1)
    answer.push(token)                       # by the decoder
    text = answer.take()                     # by the reader, whenever it likes
"""
import collections

from minillm.text_stream import TextStream
from minillm.tokenizer import END_OF_TEXT, IM_END, IM_START

STOP_IDS = (END_OF_TEXT, IM_START, IM_END)       # each ends an answer
SEGMENT_SEED = 1_000_003                         # added to the seed for each further prompt


class Answer:
    """The prompts and the settings of an answer, its tokens, and its text for the reader.

    next_prompt(ids) returns the prompt to continue with after `ids` of the answer: at first with
    [], then whenever the context is full. It returns None where nothing can be dropped.
    `pieces` collects text for the reader. `finish` stays None until the answer ends: then "stop",
    "length" (max_new_tokens), "context" (no room left), "cancelled" or "error".
    """

    def __init__(self, tokenizer, next_prompt, params, seed=0, stop=()):
        self.next_prompt = next_prompt
        self.params = params
        self.seed = seed
        self.prompt = next_prompt([])
        self.stream = TextStream(tokenizer, stop)
        self.ids = []
        self.segment = 0                         # how often the prompt was replaced
        self.pieces = collections.deque()
        self.next_news = 0.0                     # when the reader is to hear of it again
        self.prompt_tokens = len(self.prompt)    # of the first prompt
        self.cached_tokens = 0                   # of those, how many need not be read
        self.tokens = 0                          # made so far, with the one that ends it
        self.finish = None
        self.cancelled = False
        self.started = None                      # when it got its row

    def push(self, token):
        """Add the next token."""
        self.tokens += 1
        if token in STOP_IDS:
            self.end("stop")
            return
        self.ids.append(token)
        self._show(self.stream.push(token))
        if self.stream.stopped:
            self.end("stop")
        elif len(self.ids) == self.params.max_new_tokens:
            self.end("length")

    @property
    def segment_seed(self):
        """The seed from the current prompt on."""
        return self.seed + SEGMENT_SEED * self.segment

    def begin_segment(self):
        """The context is full: continue with a shorter prompt, or end where there is none."""
        prompt = self.next_prompt(self.ids)
        if prompt is None:
            self.end("context")
            return
        self.prompt = prompt
        self.segment += 1

    def end(self, reason):
        self._show(self.stream.flush())
        self.finish = reason

    def _show(self, text):
        if text:
            self.pieces.append(text)

    def take(self):
        """The text that has come since the last call."""
        text = ""
        while self.pieces:
            text += self.pieces.popleft()
        return text
