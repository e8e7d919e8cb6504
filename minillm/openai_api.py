"""OpenAI's API as data: what a request asks, and the JSON that answers it. No web framework is needed here.

    job = read_chat(body, service)           # bytes of /v1/chat/completions; ApiError for what is wrong
    job.answers                              # one Answer per choice, for BatchDecoder.submit
    job.whole()                              # the response, once all answers have ended
    job.chunk(index, text), job.last_chunk(index), job.usage_chunk()       # the same as a stream

A field that would change the text and is not offered (tools, logprobs, penalties by frequency ...) is an
error; other unknown fields are ignored. Text never becomes a control token, whatever it spells.
"""
import itertools
import json
import random
import secrets
import time
from dataclasses import dataclass, field

from minillm.batch_decoder import Answer
from minillm.conversation import Conversation, check_messages
from minillm.errors import UserError
from minillm.tokenizer import END_OF_TEXT

# fields that are refused, each with the values that ask for nothing
NOT_OFFERED = {
    "audio": (), "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "function_call": ("none",),
    "functions": ([],), "logit_bias": ({},), "logprobs": (False,), "modalities": (["text"],), "prediction": (),
    "presence_penalty": (0,), "response_format": ({"type": "text"},), "suffix": ("",), "tool_choice": ("none", "auto"),
    "tools": ([],), "top_logprobs": (0,), "web_search_options": (),
}
MOST_STOPS, LONGEST_STOP, MOST_CHOICES = 16, 256, 16
INFINITY = float("inf")


class ApiError(Exception):
    """An error in OpenAI's shape, with its HTTP status."""

    def __init__(self, status, message, param=None, code=None, type="invalid_request_error", headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


@dataclass
class Service:
    """What requests are read against. defaults: the sampling of a request that does not say."""
    model: object
    cache: object
    name: str
    defaults: dict
    most_tokens: int                       # the largest max_tokens
    created: int = field(default_factory=lambda: int(time.time()))

    def card(self):
        """The model as /v1/models lists it. max_model_len and defaults are ours, not OpenAI's."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "mini-llm",
                "max_model_len": self.cache.size, "max_tokens": self.most_tokens, "defaults": self.defaults}


def to_json(value):
    """UTF-8. A lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def parse_object(body):
    """The dict in `body`, bytes of JSON. Raises ApiError."""
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} begins no character") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "too many brackets inside each other"
        raise ApiError(400, f"the body is not JSON: {reason[:200]}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object, such as {\"messages\": [...]}")
    return data


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


class Fields:
    """The fields of a request, read with their types and bounds. null counts as not given."""

    def __init__(self, data):
        self.data = {key: value for key, value in data.items() if value is not None}
        for key, nothing in NOT_OFFERED.items():
            if key in self.data and self.data[key] not in nothing:
                raise ApiError(400, f"{key} is not offered by this server", key, "unsupported_parameter")

    def number(self, key, default, low, high, kind=float, above=False):
        """A number from low to high; above: low itself is too small."""
        value = self.data.get(key, default)
        whole = type(value) is int or type(value) is float and value.is_integer()
        good = whole if kind is int else type(value) in (int, float)
        if not good:
            name = "a whole number" if kind is int else "a number"
            raise ApiError(400, f"{key} must be {name}, not {brief(value)}", key)
        if not low <= value <= high or above and value == low:
            start = "above" if above else "at least"
            end = f" and at most {high}" if high < INFINITY else ""
            raise ApiError(400, f"{key}={brief(value)} must be {start} {low}{end}", key)
        return kind(value)

    def flag(self, key):
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise ApiError(400, f"{key} must be true or false, not {brief(value)}", key)
        return value

    def seed(self):
        """A random one where none is given."""
        seed = self.data.get("seed", random.SystemRandom().getrandbits(31))
        if type(seed) is not int or not -2**63 <= seed < 2**63:
            raise ApiError(400, f"seed must be a whole number of 64 bits, not {brief(seed)}", "seed")
        return seed

    def stops(self):
        stop = self.data.get("stop", [])
        stops = [stop] if isinstance(stop, str) else stop
        good = isinstance(stops, list) and len(stops) <= MOST_STOPS
        if not good or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stops):
            raise ApiError(400, f"stop must be a text, or a list of at most {MOST_STOPS} texts, "
                                f"each of 1 to {LONGEST_STOP} characters", "stop")
        return tuple(stops)

    def sampling(self, service):
        """The options of an Answer."""
        defaults = service.defaults
        limit = "max_completion_tokens" if "max_completion_tokens" in self.data else "max_tokens"
        vocab_size = service.model.tokenizer.vocab_size
        return {
            "max_new_tokens": self.number(limit, defaults["max_new_tokens"], 1, service.most_tokens, int),
            "temperature": self.number("temperature", defaults["temperature"], 0, 100),
            "top_k": min(self.number("top_k", defaults["top_k"], 0, INFINITY, int), vocab_size),
            "top_p": self.number("top_p", defaults["top_p"], 0, 1, above=True),
            "repetition_penalty": self.number("repetition_penalty", defaults["repetition_penalty"], 0, 100, above=True),
            "stop": self.stops(),
        }

    def check_model(self, service):
        name = self.data.get("model", service.name)
        if name != service.name:
            raise ApiError(404, f"the model {brief(name)} does not exist; this server has {service.name!r}",
                           "model", "model_not_found")

    def include_usage(self, stream):
        options = self.data.get("stream_options", {})
        if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
            raise ApiError(400, "stream_options must be an object such as {\"include_usage\": true}", "stream_options")
        if options and not stream:
            raise ApiError(400, "stream_options goes with stream=true only", "stream_options")
        return options.get("include_usage", False)


def brief(value):
    return repr(value)[:80]


def read_chat(body, service):
    """The Job of a chat completion."""
    fields = Fields(parse_object(body))
    fields.check_model(service)
    messages = read_messages(fields.data.get("messages"))
    return make_job("chat", fields, service, [lambda: ChatPrompt(service, messages)])


def read_completion(body, service):
    """The Job of a completion: as sample.py, a prompt is continued from the start of a document."""
    fields = Fields(parse_object(body))
    fields.check_model(service)
    prompts = fields.data.get("prompt", "")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ApiError(400, "prompt must be a text or a list of texts", "prompt")
    if len(prompts) > MOST_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts; at most {MOST_CHOICES} go into one request", "prompt")
    return make_job("text", fields, service, [lambda text=text: TextPrompt(service, text) for text in prompts])


def make_job(kind, fields, service, prompts):
    """prompts: functions without arguments, which make the prompt of one answer. There are n answers to each."""
    sampling, seed, stream = fields.sampling(service), fields.seed(), fields.flag("stream")
    count = fields.number("n", 1, 1, MOST_CHOICES // len(prompts), int)
    include_usage = fields.include_usage(stream)
    # choice i draws from seed + i, as in sample.py
    seeds = itertools.count(seed)
    try:
        answers = [Answer(service.model.tokenizer, prompt(), seed=next(seeds), **sampling)
                   for prompt in prompts for _ in range(count)]
    except UserError as error:
        param, code = ("messages", "context_length_exceeded") if kind == "chat" else ("prompt", "context_length_exceeded")
        raise ApiError(400, str(error), param, code) from None
    return Job(kind, service, answers, stream, include_usage)


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
    role, content = message.get("role"), message.get("content")
    role = "system" if role == "developer" else role
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise UserError("content may be a text or a list of {\"type\": \"text\", \"text\": ...}; "
                            "this model reads nothing else")
        content = "".join(texts)
    return {"role": role, "content": content}


class ChatPrompt:
    """The prompts of an answer in a conversation: when the context is full, the oldest exchanges go."""

    def __init__(self, service, messages):
        self.conversation = conversation = Conversation(service.model, cache=service.cache)
        if messages[0]["role"] == "system":
            conversation.set_system(messages[0]["content"])
            messages = messages[1:]
        for message in messages:
            conversation.add(message["role"], message["content"])
        conversation._make_room(0)

    def __call__(self, ids):
        if ids and not self.conversation._droppable():
            return None
        self.conversation._make_room(len(ids))
        return self.conversation.prompt() + ids

    @property
    def forgotten(self):
        """How many of the messages the model did not see."""
        return self.conversation.first


class TextPrompt:
    """The one prompt of a text, which is continued until the context is full."""
    forgotten = 0

    def __init__(self, service, text):
        self.ids = [END_OF_TEXT, *service.model.tokenizer.encode(text)]
        if len(self.ids) >= service.cache.size:
            raise UserError(f"the prompt is {len(self.ids)} tokens long; the context holds {service.cache.size}, "
                            "and the answer must fit in too")

    def __call__(self, ids):
        return None if ids else self.ids


class Job:
    """A request that was understood, and the JSON of its response."""

    def __init__(self, kind, service, answers, stream, include_usage):
        self.kind, self.service, self.answers = kind, service, answers
        self.stream, self.include_usage = stream, include_usage
        self.head = {"id": ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12), "object": "",
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

    def chunk(self, index, text, **more):
        """A piece of the stream."""
        content = {"text": text}
        if self.kind == "chat":
            content = {"delta": more.pop("delta", {"content": text})}
        return self._chunk([{"index": index} | content | {"logprobs": None, "finish_reason": None} | more])

    def first_chunk(self, index):
        return self.chunk(index, "", delta={"role": "assistant", "content": ""})

    def last_chunk(self, index):
        return self.chunk(index, "", delta={}, **ending(self.answers[index]))

    def usage_chunk(self):
        return self._chunk([]) | {"usage": self.usage()}

    def _chunk(self, choices):
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        chunk = self.head | {"object": name, "choices": choices}
        return chunk | {"usage": None} if self.include_usage else chunk

    def usage(self):
        prompt = sum(answer.prompt_tokens for answer in self.answers)
        completion = sum(answer.tokens for answer in self.answers)
        cached = sum(answer.cached_tokens for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": cached}}


def ending(answer):
    """Why an answer ended; seed and forgotten_messages are ours, not OpenAI's."""
    reason = "stop" if answer.finish == "stop" else "length"
    return {"finish_reason": reason, "seed": answer.seed, "forgotten_messages": answer.next_prompt.forgotten}
