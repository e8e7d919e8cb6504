"""Text in, text out: conversations over one KV cache. The chat template is in tokenizer.py.

    conversation = Conversation(model, system="你是一个助手。")
    for piece in conversation.ask("你好", temperature=0.8, top_k=20):
        print(piece, end="", flush=True)
    conversation.last                    # tokens, seconds, why it ended ...

The conversation keeps the ids of each turn (for an answer, the ids that were sampled), so the next
turn finds all but its own message in the cache. When the context is full, the oldest exchanges (a
question and its answer) are dropped until a quarter of the context is free; the system prompt
stays. Dropping more than needed makes the model forget a little more, but saves a full prefill on
nearly every later turn.
"""
import random
import time
from dataclasses import asdict, dataclass

from minillm.answer import STOP_IDS, Answer
from minillm.errors import UserError
from minillm.sampling_params import DEFAULTS, SamplingParams


def chat(model, messages, seed=None, stop=(), compile=False, **sampling):
    """The iterator over the pieces of the answer to `messages`; GPT.chat documents the options.

    Raises UserError at once for messages that cannot be answered. The cache of the previous call is
    taken out of the model while in use: a second stream beside this one makes its own.
    """
    sampling = asdict(DEFAULTS) | sampling
    SamplingParams(**sampling)                   # raises UserError if one is out of range
    check_messages(messages)
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the last message must be the user's")
    cache = model._chat_cache or model.new_cache()
    model._chat_cache = None
    conversation = Conversation(model, cache=cache)
    conversation.load(messages[:-1])
    if isinstance(stop, str):
        stop = (stop,)
    question = messages[-1]["content"]
    pieces = conversation.ask(question, seed=seed, stop=stop, compile=compile, **sampling)

    def texts():
        try:
            yield from (piece for piece in pieces if piece)
        finally:
            model._chat_cache = cache
    return texts()


def check_messages(messages):
    """Raise UserError unless `messages` is a list of messages."""
    if not isinstance(messages, (list, tuple)):
        raise UserError(f"a conversation is a list of messages, not {str(messages)[:80]}")
    for message in messages:
        fine = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not fine or message.get("role") not in ("system", "user", "assistant"):
            raise UserError('a message is '
                            '{"role": "system", "user" or "assistant", "content": text}, '
                            f"not {str(message)[:80]}")


@dataclass
class Turn:
    role: str                              # user, assistant or system
    content: str
    ids: list[int]                         # from <|im_start|> to the line end


class Conversation:
    """The turns of a conversation, and the cache of the part that the model sees.

    turns: every Turn so far, without the system prompt. first: index of the oldest turn that the
    model still sees. last: a dict about the newest answer, see `answer`.
    """

    def __init__(self, model, system="", context=0, cache=None):
        """context: at most that many tokens (0: block_size). cache: used instead of a new one."""
        self.model, self.tokenizer = model, model.tokenizer
        self.cache = cache or model.new_cache(size=context)
        self.context = min(context or self.cache.size, self.cache.size)
        self.generation_prompt, _ = self.tokenizer.encode_chat([], add_generation_prompt=True)
        self.last = {}
        self.turns, self.first = [], 0
        self.set_system(system)

    def set_system(self, text):
        """Set the system prompt ('': none). Raises UserError if no room is left for a question."""
        ids = self._turn("system", text).ids if text else []
        if len(self.generation_prompt) >= self.context:
            raise UserError(f"a context of {self.context} tokens holds no question: the answer's "
                            f"beginning alone takes {len(self.generation_prompt)}")
        if len(ids) + len(self.generation_prompt) >= self.context:
            raise UserError(f"a system prompt of {len(ids)} tokens does not fit: "
                            f"the context holds {self.context}")
        self.system, self.system_ids = text, ids

    def add(self, role, content):
        """Append a message without answering it."""
        self.turns.append(self._turn(role, content))

    def clear(self):
        self.turns, self.first = [], 0

    def undo(self):
        """Take back the last question and what follows it; return it, or None if there is none."""
        for i in reversed(range(len(self.turns))):
            if self.turns[i].role == "user":
                question = self.turns[i].content
                del self.turns[i:]
                self.first = 0                   # there may be room again for what was forgotten
                return question
        return None

    def load(self, messages):
        """Replace the conversation by `messages`, in the form that `messages()` returns.

        Raises UserError, and changes nothing, if they have another form, or their system prompt
        does not fit.
        """
        check_messages(messages)
        system = ""
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        turns = [self._turn(message["role"], message["content"]) for message in messages]
        self.set_system(system)
        self.turns, self.first = turns, 0

    def messages(self):
        """The whole conversation, also what the model no longer sees: [{"role", "content"}, ...]"""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{"role": turn.role, "content": turn.content} for turn in self.turns]

    def prompt(self):
        """The ids that the next answer continues."""
        ids = list(self.system_ids)
        for turn in self.turns[self.first:]:
            ids += turn.ids
        return ids + self.generation_prompt

    def next_prompt(self, ids):
        """The prompt to continue with after `ids` of the answer.

        Makes room if the context is full. None if nothing is left to drop.
        """
        if ids and not self._second_exchange():
            return None
        self._make_room(len(ids))
        return self.prompt() + ids

    def ask(self, text, **options):
        """Add the user's message `text`, return the iterator over the answer's pieces.

        options: see `answer`. Raises UserError, and adds nothing, if the message alone is longer
        than the context.
        """
        before = self.turns[:], self.first
        self.add("user", text)
        return self._answer_or_restore(before, options)

    def retry(self, **options):
        """Drop the last answer, return the iterator over the pieces of another one.

        Raises UserError, and drops nothing, if there is no answer, or if a longer system prompt has
        left no room.
        """
        if not self.turns or self.turns[-1].role != "assistant":
            raise UserError("there is no answer to retry")
        before = self.turns[:], self.first
        self.turns.pop()
        return self._answer_or_restore(before, options)

    def _answer_or_restore(self, before, options):
        try:
            self._make_room(0)
        except UserError:
            self.turns, self.first = before
            raise
        return self.answer(**options)

    def answer(self, max_new_tokens=256, seed=None, stop=(), **sampling):
        """Yield the answer in pieces of text, one per token, '' where a token completes nothing.

        If you stop early and close the generator, what was yielded so far is the answer. seed:
        None draws one. sampling: temperature, top_k, top_p, repetition_penalty, compile, as
        model.generate takes them. `last` then tells tokens, seconds, first_token_seconds,
        prompt_tokens (computed, not found in the cache), context_tokens, seed and finish: stop,
        length (max_new_tokens), context (no room left), interrupt.
        """
        seed = random.SystemRandom().getrandbits(31) if seed is None else seed
        last = dict(tokens=0, seconds=0.0, first_token_seconds=0.0, prompt_tokens=0,
                    context_tokens=0, seed=seed, finish="interrupt")
        self.last = last
        start, before, text = time.perf_counter(), self.cache.n_prefilled, ""
        params = SamplingParams(max_new_tokens)
        answer = Answer(self.tokenizer, self.next_prompt, params, seed, stop)
        try:
            while not answer.finish:
                room = min(max_new_tokens - len(answer.ids), self.context - len(answer.prompt))
                tokens = self.model.generate(
                    answer.prompt, room, cache=self.cache, seed=answer.segment_seed,
                    stop_ids=STOP_IDS, **sampling)
                for token in tokens:
                    if not answer.tokens:
                        last["first_token_seconds"] = time.perf_counter() - start
                        last["prompt_tokens"] = self.cache.n_prefilled - before
                    answer.push(token)
                    piece = answer.take()
                    text += piece
                    yield piece
                    if answer.finish:
                        break
                if not answer.finish:
                    answer.begin_segment()
            piece = answer.take()                # the end of a text that the context cut
            text += piece
            yield piece
        finally:
            last["tokens"], last["finish"] = answer.tokens, answer.finish or "interrupt"
            # keep the sampled ids, unless they hold more than was shown: a stop string, or half a
            # character
            ids = answer.ids
            if self.tokenizer.decode(ids) != text:
                ids = self.tokenizer.encode(text)
            ids = self.generation_prompt + ids + self.tokenizer.suffix
            self.turns.append(Turn("assistant", text, ids))
            last["seconds"] = time.perf_counter() - start
            # tokens that the next prompt begins with; the end of the answer may find no room
            history = len(self.prompt()) - len(self.generation_prompt)
            last["context_tokens"] = min(history, self.context)

    def _turn(self, role, content):
        ids, _ = self.tokenizer.encode_chat([{"role": role, "content": content}])
        return Turn(role, content, ids)

    def _second_exchange(self):
        """Index of the turn that begins the second exchange that the model sees; 0: there is none.

        The exchange before it can be dropped.
        """
        for i in range(self.first + 1, len(self.turns)):
            if self.turns[i].role == "user":
                return i
        return 0

    def _make_room(self, n_answered):
        """Forget the oldest exchanges if prompt and n_answered tokens fill the context."""
        length = len(self.prompt()) + n_answered
        if length < self.context:
            return
        while length > self.context * 3 // 4 and (second := self._second_exchange()):
            length -= sum(len(turn.ids) for turn in self.turns[self.first:second])
            self.first = second
        if length >= self.context:
            raise UserError(f"the message is {len(self.turns[-1].ids)} tokens long: "
                            f"with the rest of the prompt that makes {length}, "
                            f"and the context holds {self.context}")
