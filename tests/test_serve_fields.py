"""The fields of a request to serve.py: one that would change the answer is used or refused."""
import json
from typing import NamedTuple

import pytest

from minillm.openai_api import Service, read_chat, read_completion
from minillm.request_fields import NOT_OFFERED, READ, ApiError
from minillm.sampling_params import SamplingParams
from support.tiny_models import tiny_model

HELLO = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def service():
    model = tiny_model()
    return Service(model, model.new_cache(), "tiny", SamplingParams(), 64)


def chat(service, **fields):
    return read_chat(json.dumps({"messages": HELLO} | fields).encode(), service)


def complete(service, **fields):
    return read_completion(json.dumps({"prompt": "从前"} | fields).encode(), service)


def refused(read, service, **fields):
    """(param, message) of the error."""
    with pytest.raises(ApiError) as error:
        read(service, **fields)
    assert error.value.status == 400
    body = error.value.body["error"]
    return body["param"], body["message"]


@pytest.mark.parametrize("read", [chat, complete])
@pytest.mark.parametrize("name", sorted(NOT_OFFERED))
def test_a_field_that_is_not_offered_is_refused_unless_it_asks_for_nothing(service, read, name):
    for value in [None, *NOT_OFFERED[name]]:
        read(service, **{name: value})

    param, message = refused(read, service, **{name: "something else"})

    assert param == name and message == f"{name} is not offered by this server"


class Field(NamedTuple):
    name: str
    value: object


CHANGING = [
    Field("min_tokens", 5), Field("min_p", 0.1), Field("stop_token_ids", [5]),
    Field("ignore_eos", True), Field("repeat_penalty", 1.3), Field("continue_final_message", True),
    Field("add_generation_prompt", False), Field("logprobs", 0), Field("logprobs", 1),
    Field("echo", 0), Field("best_of", True), Field("presence_penalty", False),
    Field("do_sample", False), Field("n_predict", 8), Field("tools", [{"type": "function"}]),
]


@pytest.mark.parametrize("field", CHANGING, ids=str)
@pytest.mark.parametrize("read", [chat, complete])
def test_values_that_change_the_answer(service, read, field):
    param, _ = refused(read, service, **{field.name: field.value})

    assert param == field.name


USUAL = {
    "user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "seed": 3, "n": 1,
    "parallel_tool_calls": True, "frequency_penalty": 0.0, "presence_penalty": 0, "tools": [],
    "logit_bias": {}, "min_p": 0.0, "repeat_penalty": 1.0, "stream": False, "stream_options": None,
    "stop": None, "safety_identifier": "x", "prompt_cache_key": "k", "reasoning_effort": "low",
    "verbosity": "medium", "max_tool_calls": 3, "keep_alive": "5m", "session_id": "s", "models": None,
    "provider": {}, "cache_prompt": True, "priority": 0, "request_id": "r", "mm_processor_kwargs": {},
    "return_token_ids": False, "chat_id": "c", "id": "i", "features": {}, "custom_option": 1,
}


@pytest.mark.parametrize("read", [chat, complete])
def test_what_clients_send_anyway_is_accepted(service, read):
    usual = read(service, **USUAL)
    plain = read(service, seed=3)

    assert usual.answers[0].params == plain.answers[0].params
    assert usual.answers[0].prompt == plain.answers[0].prompt


MISSPELLED = {
    "temprature": "temperature", "Temperature": "temperature", "topp": "top_p", "top-k": "top_k",
    "max_token": "max_tokens", "maxTokens": "max_tokens", "stops": "stop", "sead": "seed",
    "repetition_penality": "repetition_penalty", "steam": "stream", "message": "messages",
    "max_completions_tokens": "max_completion_tokens",
}


@pytest.mark.parametrize("name, meant", MISSPELLED.items())
@pytest.mark.parametrize("read", [chat, complete])
def test_a_misspelled_name_is_told(service, read, name, meant):
    param, message = refused(read, service, **{name: 1})

    assert (param, message) == (name, f"unknown field {name!r}: did you mean {meant}?")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_new_tokens"])
def test_the_length_has_three_names(service, name):
    assert chat(service, **{name: 5}).answers[0].params.max_new_tokens == 5
    assert refused(chat, service, **{name: 65})[0] == name
    both = {"max_tokens": 5, name: 5}
    assert chat(service, **both).answers[0].params.max_new_tokens == 5


def test_two_lengths_that_differ(service):
    param, message = refused(chat, service, max_tokens=5, max_new_tokens=6)

    assert param == "max_new_tokens" and "max_tokens and max_new_tokens differ" in message


def test_each_path_has_its_own_input(service):
    assert refused(chat, service, prompt="从前") == ("prompt", "prompt is for /v1/completions")
    assert refused(complete, service, messages=HELLO)[0] == "messages"


def test_sixteen_answers_to_a_request_at_most(service):
    """Of all its prompts together."""
    assert len(complete(service, prompt=["a"] * 16).answers) == 16
    assert len(complete(service, prompt=["a"] * 5, n=3).answers) == 15
    assert refused(complete, service, prompt=["a"] * 5, n=4)[0] == "n"
    assert refused(complete, service, prompt=["a"] * 17)[0] == "prompt"


def test_a_prompt_leaves_room_for_one_token(service):
    """It begins with the token that begins a document."""
    text = "a"
    while len(service.model.tokenizer.encode(text)) < service.cache.size - 2:
        text += "a"

    [answer] = complete(service, prompt=text).answers
    _, message = refused(complete, service, prompt=text + "a")

    assert len(answer.prompt) == service.cache.size - 1
    assert message.startswith(f"the prompt is {service.cache.size} tokens long")


def test_a_developer_is_the_system(service):
    prompts = [chat(service, messages=[{"role": role, "content": "诗"}, *HELLO]).answers[0].prompt
               for role in ("developer", "system", "user")]

    assert prompts[0] == prompts[1] != prompts[2]


def test_tokens_of_a_prompt_count_once_however_many_answers_it_gets(service):
    job = complete(service, prompt=["从前", "山"], n=2)
    for number, answer in enumerate(job.answers):
        answer.cached_tokens, answer.tokens = number, 10

    usage = job.usage()

    lengths = [len(answer.prompt) for answer in job.answers]
    assert usage["prompt_tokens"] == lengths[0] + lengths[2]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0 + 2
    assert usage["completion_tokens"] == 40


@pytest.mark.parametrize("key, value", [
    ("tool_calls", [{"id": "1"}]), ("function_call", {"name": "f"}), ("images", ["data:"]),
    ("audio", {"id": "1"})])
def test_parts_of_a_message_that_the_model_would_not_see(service, key, value):
    def messages(value):
        answer = {"role": "assistant", "content": "x", key: value, "refusal": None, "name": "a"}
        return [*HELLO, answer, *HELLO]

    chat(service, messages=messages(None))
    chat(service, messages=messages([]))
    param, message = refused(chat, service, messages=messages(value))

    assert param == "messages" and message == f"{key} of a message is not offered by this server"


def test_a_length_may_be_spelled_as_a_fraction_that_is_none(service):
    """JSON has one kind of number."""
    assert chat(service, max_tokens=5.0).answers[0].params.max_new_tokens == 5


def test_answers_without_a_seed_draw_each_from_another(service):
    assert len({chat(service).answers[0].seed for _ in range(20)}) == 20


def test_pieces_of_a_stream_have_no_usage_before_the_last(service):
    """null, as OpenAI's have, and nothing where nobody asked for it."""
    asked = chat(service, stream=True, stream_options={"include_usage": True})

    assert asked.chunk(0, "a")["usage"] is None and asked.usage_chunk()["usage"]
    assert "usage" not in chat(service, stream=True).chunk(0, "a")


def test_the_card_says_what_a_request_may_have_and_what_it_gets(service):
    card = service.card()

    assert (card["id"], card["max_tokens"], card["max_model_len"]) == ("tiny", 64, 48)
    assert card["defaults"]["top_k"] == SamplingParams().top_k


def test_no_name_is_both_read_and_refused():
    assert not READ & NOT_OFFERED.keys()
