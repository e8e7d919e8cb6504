"""Multiple choice by likelihood: the choice that the model finds likeliest after the question.

    questions = read_questions("ceval.csv")
    result = score(model, questions, "text", "chat", batch_size=16, device=device, dtype=dtype)

A question has `question`, `choices` and `answer` (JSON lines), or C-Eval's and CMMLU's columns
question, A, B, C, D and answer (CSV or JSON lines). Two forms:

    text     the choice itself is the continuation. A small model knows more than it can point at.
    letters  the choices stand in the prompt, and the continuation is A, B, C ...

Nothing is generated. As in lm-evaluation-harness, `accuracy` takes the choice of the largest
log-probability, `accuracy_norm` divides it by the choice's number of characters first.
scripts/lm_eval_choices.yaml is the same task for that program, on an exported model.
"""
import csv
import io
import json
import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from minillm.device import autocast
from minillm.encodings import guess_encoding, known_encoding, marked_encoding, refuse_utf8
from minillm.errors import UserError
from minillm.tokenizer import END_OF_TEXT

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Question(NamedTuple):
    location: str                # file:line
    question: str
    choices: list
    answer: int                  # index into choices


def read_questions(path, encoding="utf-8"):
    """The questions of a .jsonl or .csv file. UserError names the file and line of a bad one."""
    lines = io.StringIO(read_text(path, known_encoding(encoding)), newline="")
    try:
        if path.lower().endswith(".csv"):
            reader = csv.DictReader(lines)
            records = [(f"{path}:{reader.line_num}", record) for record in reader
                       if any(record.values())]          # spreadsheets write ",,," for no row
        else:
            records = [(f"{path}:{number}", parse_line(f"{path}:{number}", line))
                       for number, line in enumerate(lines, 1) if line.strip()]
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    if not records:
        raise UserError(f"{path} holds no questions")
    return [parse_record(location, record) for location, record in records]


def read_text(path, encoding):
    """The text of a file, without its byte order mark. UserError if it is in another encoding."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    length, marked = marked_encoding(data)
    if not marked:
        refuse_utf8(path, data, encoding)
    encoding = marked or encoding
    try:
        return data[length:].decode(encoding)
    except UnicodeDecodeError:
        fits, hint = guess_encoding(data), ""
        if fits and fits != encoding:
            hint = f": it looks like {fits}, so try --encoding={fits}"
        raise UserError(f"{path} is not {encoding} text{hint}") from None


def parse_line(location, line):
    """The dict in a line of JSON. UserError if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{location}: not a line of JSON") from None
    if not isinstance(record, dict):
        raise UserError(f"{location}: not a JSON object with question, choices and answer")
    return record


def parse_record(location, record):
    """A Question, of either shape. UserError says what is missing."""
    fields = {str(key).lower(): value for key, value in record.items()}
    question, choices = fields.get("question"), fields.get("choices")
    named = choices is None              # the columns A, B, C ... instead
    if named:
        columns = [fields.get(letter.lower()) for letter in LETTERS]
        choices = columns[: columns.index(None)] if None in columns else columns
        while choices and choices[-1] == "":
            choices.pop()                # a column that only questions with more choices fill
    if not isinstance(question, str) or not question.strip():
        found = ", ".join(fields)[:200]
        raise UserError(f"{location}: no question under `question` (it has {found})")
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{location}: fewer than two choices (a list `choices`, or A, B, C ...)")
    if len(choices) > len(LETTERS):
        raise UserError(f"{location}: more than {len(LETTERS)} choices")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise UserError(f"{location}: a choice that is not text, or empty")
    if fields.get("answer") in (None, ""):
        raise UserError(f"{location}: no answer under `answer`; a test split has none: take val")
    answer = find_answer(fields.get("answer"), choices, named)
    if answer is None:
        raise UserError(f"{location}: answer {fields.get('answer')!r} is none of its choices")
    return Question(location, question, choices, answer)


def find_answer(answer, choices, named):
    """The index that `answer` means: an index, a choice's text, or a letter; None if nothing fits.

    A letter comes first where the choices are columns named A, B, C ..., the text first elsewhere.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str):
        return None
    letters = list(LETTERS[: len(choices)])
    for names in (letters, choices) if named else (choices, letters):
        if answer in names:
            return names.index(answer)
    letter = answer.strip().upper()
    return letters.index(letter) if letter in letters else None


def encode(tokenizer, question, form, template):
    """[(prompt ids, continuation ids)], one for each choice."""
    text, continuations = question.question, question.choices
    if form == "letters":
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices)]
        text = "\n".join([text, *lines])
        continuations = list(LETTERS[: len(question.choices)])
    if template == "chat":
        messages = [{"role": "user", "content": text}]
        prompt, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
        return [(prompt, tokenizer.encode(continuation)) for continuation in continuations]
    prompt = f"{text}\n答案："
    start = len(tokenizer.encode(prompt))
    pairs = []
    for continuation in continuations:
        # encoded together: a token may begin before the border, and then counts for the prompt
        whole = tokenizer.encode(prompt + continuation)
        border = min(start, len(whole) - 1)
        pairs.append(([END_OF_TEXT, *whole[:border]], whole[border:]))
    return pairs


def score(model, questions, form, template, batch_size, device, dtype):
    """Score all choices of all questions; returns a dict of numbers, and the indices chosen.

    form: text or letters; template: chat (ChatML) or plain. A question with a choice that does not
    fit into the context counts as wrong: its index is None.
    """
    pairs = [encode(model.tokenizer, question, form, template) for question in questions]
    # one token less: the last one is only predicted
    fits = [all(len(prompt) + len(rest) - 1 <= model.config.block_size for prompt, rest in choices)
            for choices in pairs]
    rows = []
    for i, choices in enumerate(pairs):
        if fits[i]:
            rows += [((i, j), *pair) for j, pair in enumerate(choices)]
    rows.sort(key=lambda row: len(row[1]) + len(row[2]), reverse=True)       # little padding
    sums = log_probabilities(model, rows, batch_size, device, dtype)

    chosen, right, right_norm = [], 0, 0
    for i, question in enumerate(questions):
        if not fits[i]:
            chosen.append(None)
            continue
        values = [sums[i, j] for j in range(len(question.choices))]
        lengths = [1 if form == "letters" else len(choice) for choice in question.choices]
        norms = [value / length for value, length in zip(values, lengths)]
        chosen.append(values.index(max(values)))
        right += chosen[i] == question.answer
        right_norm += norms.index(max(norms)) == question.answer
    count = len(questions)
    chance = sum(1 / len(question.choices) for question in questions) / count
    result = {"questions": count, "too_long": fits.count(False), "chance": chance}
    result |= rate("accuracy", right, count) | rate("accuracy_norm", right_norm, count)
    return result, chosen


def rate(name, right, count):
    """A share and its standard error (of a sample; 0 for a single question)."""
    share = right / count
    error = math.sqrt(share * (1 - share) / max(count - 1, 1))
    return {name: share, f"{name}_stderr": error}


@torch.inference_mode()
def log_probabilities(model, rows, batch_size, device, dtype):
    """{key: log-probability of `rest` after `prompt`, in nats} of rows (key, prompt, rest)."""
    vocab_size = model.tokenizer.vocab_size
    sums = {}
    for start in tqdm(range(0, len(rows), batch_size), unit="batch", disable=None):
        batch = rows[start: start + batch_size]
        width = max(len(prompt) + len(rest) for _, prompt, rest in batch)
        # padding stands behind, where causal attention doesn't look
        idx = torch.full((len(batch), width), END_OF_TEXT)
        for row, (_, prompt, rest) in zip(idx, batch):
            row[: len(prompt) + len(rest)] = torch.tensor(prompt + rest)
        idx = idx.to(device)
        with autocast(device, dtype):
            logits = model(idx[:, :-1])
        logs = logits[..., :vocab_size].float().log_softmax(-1)
        values = logs.gather(2, idx[:, 1:, None])[..., 0].double().cpu()      # (B, width - 1)
        for row, (key, prompt, rest) in zip(values, batch):
            sums[key] = row[len(prompt) - 1: len(prompt) + len(rest) - 1].sum().item()
    return sums
