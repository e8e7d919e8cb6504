"""A conversation at the edges of its context: what just fits, and what is kept of it."""
import pytest

from minillm.conversation import Conversation
from minillm.errors import UserError
from model import GPT
from support.tiny_models import talkative, tiny_model
from support.tiny_tokenizer import tokenizer


def ask(conversation, text, **options):
    return "".join(conversation.ask(text, **dict(max_new_tokens=12, seed=1) | options))


def talkative_conversation(block_size=100, **options):
    return Conversation(talkative(tiny_model(block_size=block_size)), **options)


def length_of(role, text):
    return len(tokenizer().encode_chat([{"role": role, "content": text}])[0])


def test_a_system_prompt_may_leave_one_token_and_no_less():
    text = "a" * 30
    needed = length_of("system", text) + len(talkative_conversation().generation_prompt)

    assert talkative_conversation(system=text, context=needed + 1).system == text
    with pytest.raises(UserError, match="a system prompt of .* tokens does not fit"):
        talkative_conversation(system=text, context=needed)


def test_a_question_may_leave_one_token_and_no_less():
    """One that leaves none is refused, and is not in the conversation afterwards."""
    text = "a" * 30
    needed = length_of("user", text) + len(talkative_conversation().generation_prompt)
    roomy, full = (talkative_conversation(context=n) for n in (needed + 1, needed))

    ask(roomy, text)
    with pytest.raises(UserError, match="tokens long"):
        ask(full, text)

    assert (roomy.last["tokens"], roomy.last["finish"]) == (1, "context")
    assert full.turns == []


@pytest.mark.parametrize("context, expected", [(1000, 100), (60, 60), (0, 100)])
def test_a_context_is_bounded_by_the_models(context, expected):
    """And of a larger cache, that somebody hands in, no more than the context is used."""
    model = talkative(tiny_model(block_size=100))
    conversation = Conversation(model, context=context, cache=model.new_cache())

    for turn in range(6):
        ask(conversation, f"你好{turn}")
        assert conversation.last["context_tokens"] <= expected
        assert len(conversation.cache.tokens[0]) < expected
    ask(conversation, "说", max_new_tokens=1000)

    assert conversation.context == expected and conversation.first > 0
    assert conversation.last["context_tokens"] == expected
    assert expected - 2 <= len(conversation.cache.tokens[0]) <= expected


def test_undo_gives_back_what_the_question_had_displaced():
    conversation = talkative_conversation()
    ask(conversation, "一")
    before = conversation.prompt()
    ask(conversation, "a" * 60)
    assert conversation.first > 0

    conversation.undo()

    assert conversation.prompt() == before


def test_an_answer_that_goes_on_in_a_new_prompt_draws_new_numbers(monkeypatch):
    seeds, generate = [], GPT.generate

    def spy(self, prompt, n, seed, **options):
        seeds.append(seed)
        return generate(self, prompt, n, seed, **options)
    monkeypatch.setattr(GPT, "generate", spy)
    conversation = talkative_conversation()
    for turn in range(3):
        ask(conversation, f"你好{turn}", seed=100 + turn)
    seeds.clear()

    ask(conversation, "说", max_new_tokens=1000, seed=7)

    assert seeds[0] == 7 and len(set(seeds)) == len(seeds) > 1


def test_what_only_began_like_a_stop_string_is_shown_at_the_end():
    whole = ask(talkative_conversation(), "你好")

    stopped = ask(talkative_conversation(), "你好", stop=(whole[-1] + "never said",))

    assert stopped == whole


def test_the_first_prompt_is_there_also_where_nothing_could_be_dropped():
    conversation = talkative_conversation()
    conversation.add("user", "你好")

    assert conversation.next_prompt([]) == conversation.prompt()
    assert conversation.next_prompt([5]) is None
