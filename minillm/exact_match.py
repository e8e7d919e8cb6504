"""Questions answered greedily; an answer counts if it is the expected one to the character."""
from typing import NamedTuple

from tqdm import tqdm

from minillm.answer import STOP_IDS
from minillm.chat_names import NAMES
from minillm.chat_records import clean_conversation
from minillm.errors import UserError
from minillm.generation import round_up
from minillm.report import Report
from minillm.text_files import Source
from minillm.text_reader import conversations

SHAPES = ('; a question is {"instruction": …, "output": …} or {"messages": […]}; '
          "--map=KEY:user,KEY:assistant says which other keys hold it")


class Question(NamedTuple):
    location: str                # file:line
    messages: list
    expected: str


def read_questions(path, encoding="utf-8", names=NAMES):
    """(questions, lines that say what was skipped) of a file of chats that end with the answer."""
    report = Report(hint=SHAPES, encoding=encoding)
    chats = conversations(Source([path], report, encoding), names)
    questions = questions_of(chats)
    if not questions:
        reasons = report.in_a_line() or "the file is empty"
        raise UserError(f"{path} holds no chat that ends with an answer ({reasons})")
    return questions, report.lines()


def demo_questions(records):
    """The questions among the demo town's conversations, in Belle's format."""
    chats = ((f"demo:{i}", clean_conversation(record, Report(), f"demo:{i}"))
             for i, record in enumerate(records, 1))
    return questions_of(chats)


def questions_of(chats):
    """The questions among (location, messages) pairs."""
    questions = []
    for location, messages in chats:
        if len(messages) > 1 and messages[-1]["role"] == "assistant":
            questions.append(Question(location, messages[:-1], messages[-1]["content"]))
    return questions


def answer_all(model, questions, batch_size, max_new_tokens):
    """A list of greedy answers (text), None where the question is longer than the context."""
    prompts = [model.tokenizer.encode_chat(question.messages, add_generation_prompt=True)[0]
               for question in questions]
    answers = [None] * len(questions)
    fit = [i for i, prompt in enumerate(prompts) if len(prompt) < model.config.block_size]
    longest = max((len(prompts[i]) for i in fit), default=0)
    cache = None
    for start in tqdm(range(0, len(fit), batch_size), unit="batch", disable=None):
        batch = fit[start: start + batch_size]
        if cache is None or len(cache.tokens) != len(batch):
            # one cache for all batches but a smaller last one: it records CUDA graphs once
            cache = model.new_cache(len(batch), round_up(longest + max_new_tokens, 256))
        texts = answer(model, [prompts[i] for i in batch], max_new_tokens, cache)
        for i, text in zip(batch, texts):
            answers[i] = text
    return answers


def answer(model, prompts, max_new_tokens, cache):
    """Greedy answers to a batch of prompts: a list of texts."""
    cache.tokens = [[] for _ in prompts]         # an answer does not depend on the batch before
    ids = [[] for _ in prompts]
    for row in model.generate(prompts, max_new_tokens, temperature=0, stop_ids=STOP_IDS,
                              cache=cache):
        for made, token in zip(ids, row):
            if token is not None:            # special tokens have no text
                made.append(token)
    return [model.tokenizer.decode(made) for made in ids]
