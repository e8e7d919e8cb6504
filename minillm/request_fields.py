"""The fields of a JSON request, read with their types and bounds; errors in OpenAI's shape."""
import difflib
import json
import random

from minillm.errors import brief

# the fields that are read, and the names that other servers give to max_tokens
LENGTHS = ("max_completion_tokens", "max_tokens", "max_new_tokens")
READ = {"messages", "model", "n", "prompt", "repetition_penalty", "seed", "stop", "stream",
        "stream_options", "temperature", "top_k", "top_p", *LENGTHS}
# fields that would change the answer, each with the values that ask for nothing
NOT_OFFERED = {
    # OpenAI's
    "audio": [], "best_of": [1], "echo": [False], "frequency_penalty": [0],
    "function_call": ["none", "auto"], "functions": [[]], "logit_bias": [{}], "logprobs": [False],
    "modalities": [["text"]], "prediction": [], "presence_penalty": [0],
    "response_format": [{"type": "text"}], "suffix": [""], "tool_choice": ["none", "auto"],
    "tools": [[]], "top_logprobs": [0], "web_search_options": [],
    # of vLLM, transformers, llama.cpp, Ollama and others
    "add_generation_prompt": [True], "allowed_token_ids": [[]], "bad_words": [[]],
    "chat_template": [""], "chat_template_kwargs": [{}], "continue_final_message": [False],
    "do_sample": [True], "documents": [[]], "dry_multiplier": [0], "dynatemp_range": [0],
    "format": [""], "grammar": [""], "guided_choice": [[]], "guided_grammar": [""],
    "guided_json": [], "guided_regex": [""], "ignore_eos": [False],
    "include_stop_str_in_output": [False], "json_schema": [], "length_penalty": [1],
    "max_length": [], "max_tokens_to_sample": [], "min_length": [0], "min_new_tokens": [0],
    "min_p": [0], "min_tokens": [0], "mirostat": [0], "n_predict": [-1], "n_probs": [0],
    "no_repeat_ngram_size": [0], "num_beams": [1], "num_predict": [-1], "options": [{}],
    "prompt_logprobs": [], "repeat_penalty": [1], "skip_special_tokens": [True],
    "stop_sequences": [[]], "stop_token_ids": [[]], "structured_outputs": [{}], "system": [""],
    "tfs_z": [1], "top_a": [0], "top_n_sigma": [-1, 0], "truncate_prompt_tokens": [],
    "typical_p": [1], "use_beam_search": [False], "xtc_probability": [0],
}
MOST_STOPS, LONGEST_STOP = 16, 256
INFINITY = float("inf")


class ApiError(Exception):
    """An error in OpenAI's shape, with its HTTP status."""

    def __init__(self, status, message, param=None, code=None, type="invalid_request_error",
                 headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


def to_json(value):
    """UTF-8. A lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def parse_object(body):
    """The dict in `body`, bytes of JSON. Raises ApiError."""
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8, from byte {error.start} on") from None
    except RecursionError:
        raise ApiError(400, "the body is not JSON: its brackets are nested too deep") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object, such as {\"messages\": [...]}")
    return data


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


def check_names(data):
    """Raise ApiError for a field that would change the answer, or that is one of ours misspelled.

    Other unknown fields are left alone: clients send many that ask for nothing.
    """
    for key, value in data.items():
        if key in READ:
            continue
        if key in NOT_OFFERED:
            if not any(is_same(value, nothing) for nothing in NOT_OFFERED[key]):
                raise ApiError(400, f"{key} is not offered by this server", key,
                               "unsupported_parameter")
            continue
        near = difflib.get_close_matches(key.lower(), READ, 1, cutoff=0.75)
        if near:
            raise ApiError(400, f"unknown field {brief(key)}: did you mean {near[0]}?", key,
                           "unknown_parameter")


def is_same(value, other):
    """Whether two JSON values are the same; in Python, 0 == False."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


class Fields:
    """The fields of a request, read with their types and bounds. null counts as not given."""

    def __init__(self, data):
        self.data = {key: value for key, value in data.items() if value is not None}

    def number(self, key, default, low, high, kind=float, above=False):
        """A number from low to high; above: low itself is too small."""
        value = self.data.get(key, default)
        if type(value) not in (int, float):
            raise ApiError(400, f"{key} must be a number, not {brief(value)}", key)
        if not low <= value <= high or (above and value == low):
            start = "above" if above else "at least"
            rule = f"{start} {low}"
            if high < INFINITY:
                rule += f" and at most {high}"
            raise ApiError(400, f"{key}={brief(value)} must be {rule}", key)
        if kind is int and value != int(value):
            raise ApiError(400, f"{key} must be a whole number, not {brief(value)}", key)
        return kind(value)

    def length(self, default, most):
        """The most tokens of the answer, by any of its names."""
        given = [key for key in LENGTHS if key in self.data]
        for key in given[1:]:
            if self.data[key] != self.data[given[0]]:
                raise ApiError(400, f"{given[0]} and {key} differ: give one of them", key)
        return self.number(given[0] if given else "max_tokens", default, 1, most, int)

    def flag(self, key):
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise ApiError(400, f"{key} must be true or false, not {brief(value)}", key)
        return value

    def seed(self):
        """A random one where none is given."""
        seed = self.data.get("seed", random.SystemRandom().getrandbits(31))
        if type(seed) is not int or not -2**63 <= seed < 2**63:
            raise ApiError(400, f"seed must be a whole number of 64 bits, not {brief(seed)}",
                           "seed")
        return seed

    def stops(self):
        stop = self.data.get("stop", [])
        stops = [stop] if isinstance(stop, str) else stop
        good = isinstance(stops, list) and len(stops) <= MOST_STOPS
        if not good or not all(map(is_stop, stops)):
            raise ApiError(400, f"stop must be a text, or a list of at most {MOST_STOPS} texts, "
                                f"each of 1 to {LONGEST_STOP} characters", "stop")
        return tuple(stops)

    def include_usage(self, stream):
        options = self.data.get("stream_options", {})
        if not isinstance(options, dict):
            raise ApiError(400, 'stream_options must be an object: {"include_usage": true}',
                           "stream_options")
        if options and not stream:
            raise ApiError(400, "stream_options goes with stream=true only", "stream_options")
        return Fields(options).flag("include_usage")


def is_stop(text):
    return isinstance(text, str) and 0 < len(text) <= LONGEST_STOP
