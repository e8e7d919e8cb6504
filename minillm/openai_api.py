"""OpenAI's API as data: what a request asks, and the JSON that answers it. No web framework here.

    job = read_chat(body, service)           # the bytes of a request; ApiError for what is wrong
    job.answers                              # one Answer per choice, for BatchDecoder.submit
    job.whole()                              # the response, once all answers have ended
    job.first_chunk(i), job.chunk(i, text), job.last_chunk(i), job.usage_chunk()      # as a stream

A field that would change the text and is not offered (tools, logprobs, logit_bias ...) is an error,
and so is a misspelled one; other unknown fields are ignored. Text never becomes a control token,
whatever it spells.
"""
import itertools
import secrets
import time
from dataclasses import asdict, dataclass, field

from minillm.answer import Answer
from minillm.conversation import Conversation, check_messages
from minillm.errors import UserError, brief
from minillm.request_fields import ApiError, Fields, check_names, parse_object
from minillm.sampling_params import SamplingParams
from minillm.tokenizer import END_OF_TEXT

MOST_CHOICES = 16                # of one request
NOT_IN_MESSAGES = ("audio", "function_call", "images", "tool_calls")


@dataclass
class Service:
    """What requests are read against."""
    model: object
    cache: object                          # of the BatchDecoder
    name: str                              # of the model, for clients
    defaults: SamplingParams               # where a request does not say
    most_tokens: int                       # the largest max_tokens
    created: int = field(default_factory=lambda: int(time.time()))

    def card(self):
        """The model as /v1/models lists it; what follows owned_by is not OpenAI's."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "mini-llm",
                "max_model_len": self.cache.size, "max_tokens": self.most_tokens,
                "defaults": asdict(self.defaults)}


def read_chat(body, service):
    """The Job of a chat completion."""
    fields = read_fields(body, service, "prompt", "/v1/completions")
    messages = read_messages(fields.data.get("messages"))
    return make_job("chat", fields, service, [lambda: ChatPrompt(service, messages)])


def read_completion(body, service):
    """The Job of a completion: as sample.py, a prompt is continued from the start of a document."""
    fields = read_fields(body, service, "messages", "/v1/chat/completions")
    texts = fields.data.get("prompt", "")
    if isinstance(texts, str):
        texts = [texts]
    good = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    if not good or len(texts) > MOST_CHOICES:
        raise ApiError(400, f"prompt must be a text or a list of at most {MOST_CHOICES} texts",
                       "prompt")
    prompts = [lambda text=text: TextPrompt(service, text) for text in texts]
    return make_job("text", fields, service, prompts)


def read_fields(body, service, foreign, its_path):
    """The Fields of a request, with names that are checked; `foreign` is for another path."""
    fields = Fields(parse_object(body))
    if foreign in fields.data:
        raise ApiError(400, f"{foreign} is for {its_path}", foreign)
    check_names(fields.data)
    name = fields.data.get("model", service.name)
    if name != service.name:
        raise no_such_model(name, service)
    return fields


def read_params(fields, service):
    """The SamplingParams of a request."""
    default, most = service.defaults, service.most_tokens
    top_k = fields.number("top_k", default.top_k, 0, 2**31, int)
    top_k = min(top_k, service.model.tokenizer.vocab_size)       # beyond it top_k changes nothing
    max_new_tokens = fields.length(min(default.max_new_tokens, most), most)
    temperature = fields.number("temperature", default.temperature, 0, 100)
    top_p = fields.number("top_p", default.top_p, 0, 1, above=True)
    penalty = fields.number("repetition_penalty", default.repetition_penalty, 0.01, 100)
    return SamplingParams(max_new_tokens, temperature, top_k, top_p, penalty)


def no_such_model(name, service):
    message = f"the model {brief(name)} does not exist; this server has {service.name!r}"
    return ApiError(404, message, "model", "model_not_found")


def make_job(kind, fields, service, prompts):
    """prompts: functions that make the prompt of an answer. There are n answers to each."""
    params = read_params(fields, service)
    seeds = itertools.count(fields.seed())       # choice i draws from seed + i, as in sample.py
    stop = fields.stops()
    stream = fields.flag("stream")
    include_usage = fields.include_usage(stream)
    count = fields.number("n", 1, 1, MOST_CHOICES // len(prompts), int)
    answers = []
    try:
        for prompt in prompts:
            for _ in range(count):
                answers.append(Answer(service.model.tokenizer, prompt(), params, next(seeds), stop))
    except UserError as error:
        param = "messages" if kind == "chat" else "prompt"
        raise ApiError(400, str(error), param, "context_length_exceeded") from None
    return Job(kind, service, answers, count, stream, include_usage)


def read_messages(messages):
    """Messages as model.chat takes them. Content may be a text or OpenAI's list of text parts."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    try:
        plain = [plain_message(message) for message in messages]
        check_messages(plain)
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None
    if plain[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", "messages")
    return plain


def plain_message(message):
    if not isinstance(message, dict):
        return message                           # check_messages says what is wrong with it
    for key in NOT_IN_MESSAGES:
        if message.get(key):
            raise UserError(f"{key} of a message is not offered by this server")
    role, content = message.get("role"), message.get("content")
    if role == "developer":
        role = "system"
    if isinstance(content, list):
        content = "".join(map(part_text, content))
    return {"role": role, "content": content}


def part_text(part):
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise UserError('content must be a text or a list of {"type": "text", "text": ...}: '
                    "this model reads nothing else")


class ChatPrompt:
    """The prompts of an answer in a conversation: when the context is full, the oldest go."""

    def __init__(self, service, messages):
        self.conversation = Conversation(service.model, cache=service.cache)
        self.conversation.load(messages)

    def __call__(self, ids):
        return self.conversation.next_prompt(ids)

    @property
    def forgotten(self):
        """How many of the messages the model did not see."""
        return self.conversation.first


class TextPrompt:
    """The one prompt of a text, which continues until the context is full."""
    forgotten = 0

    def __init__(self, service, text):
        self.ids = [END_OF_TEXT, *service.model.tokenizer.encode(text)]
        if len(self.ids) >= service.cache.size:
            raise UserError(f"the prompt is {len(self.ids)} tokens long; the context holds "
                            f"{service.cache.size}, and the answer must fit in too")

    def __call__(self, ids):
        return None if ids else self.ids


NOT_ENDED = {"finish_reason": None}


class Job:
    """A request that was understood, and the JSON of its response. There are n answers a prompt."""

    def __init__(self, kind, service, answers, n, stream, include_usage):
        self.kind, self.service, self.answers, self.n = kind, service, answers, n
        self.stream, self.include_usage = stream, include_usage
        prefix = "chatcmpl-" if kind == "chat" else "cmpl-"
        self.head = {"id": prefix + secrets.token_hex(12), "object": "",
                     "created": int(time.time()), "model": service.name}

    def whole(self):
        """The response in one piece."""
        choices = []
        for index, answer in enumerate(self.answers):
            text = answer.take()
            content = {"text": text}
            if self.kind == "chat":
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": index} | content | {"logprobs": None} | ending(answer))
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self.head | {"object": name, "choices": choices, "usage": self.usage()}

    def first_chunk(self, index):
        """What begins the stream of a chat: who speaks."""
        return self._choice_chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def chunk(self, index, text):
        """A piece of the stream."""
        content = {"text": text}
        if self.kind == "chat":
            content = {"delta": {"content": text}}
        return self._choice_chunk(index, content)

    def last_chunk(self, index):
        """What ends it."""
        content = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return self._choice_chunk(index, content, ending(self.answers[index]))

    def _choice_chunk(self, index, content, end=NOT_ENDED):
        return self._chunk([{"index": index} | content | {"logprobs": None} | end])

    def usage_chunk(self):
        return self._chunk([]) | {"usage": self.usage()}

    def _chunk(self, choices):
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        chunk = self.head | {"object": name, "choices": choices}
        if self.include_usage:
            chunk["usage"] = None                # OpenAI's last chunk alone has numbers
        return chunk

    def usage(self):
        # a prompt counts once, however many answers it got
        prompt = sum(answer.prompt_tokens for answer in self.answers[::self.n])
        completion = sum(answer.tokens for answer in self.answers)
        cached = sum(answer.cached_tokens for answer in self.answers[::self.n])
        return {"prompt_tokens": prompt, "completion_tokens": completion,
                "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": cached}}


def ending(answer):
    """Why an answer ended; seed and forgotten_messages are ours, not OpenAI's."""
    reason = "stop" if answer.finish == "stop" else "length"
    return {"finish_reason": reason, "seed": answer.seed,
            "forgotten_messages": answer.next_prompt.forgotten}
