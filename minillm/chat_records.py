"""One JSON record in, one clean conversation out, for any of the names that files use.

    messages = clean_conversation(record, report, "chats.jsonl:7")
    # [{"role": "user", "content": "…"}, …]: perhaps system, then user and assistant in turn

The names of keys and roles stand in the tables of chat_names.py.

A turn that is context, which the model does not learn, has "supervised": False. Whatever is left
out and could change the meaning is counted in the report.
"""
import math
import re

from minillm.chat_names import FLAGS, LEFT_OUT, METADATA, NAMES
from minillm.json_stream import are_messages, are_texts, is_message, parsed
from minillm.loss_flags import is_supervised, unforked, with_flags
from minillm.report import Skip

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_BESIDE = METADATA.union(FLAGS)      # keys that are no part of what is said
TRANSCRIPT = re.compile(r"(?:^|\n)(Human|Assistant):")       # of Belle's multi-turn files


class _LeftOut:
    """What one record holds and nothing uses: keys, roles, and other reasons."""

    def __init__(self, names):
        self._names = names
        self.known = set()               # keys with a meaning, and other reasons
        self.unknown = set()
        self.unknown_roles = set()

    def add(self, reason):
        self.known.add(reason)

    def count(self, record, used):
        """Count the keys of a record, turn or part whose values are not among those used."""
        for key in record.keys() - _BESIDE:
            value = record[key]
            if value in used or _holds_nothing(value) or parsed(value) in used:
                continue
            if key in LEFT_OUT or key in self._names.known:
                self.known.add(key)
            else:
                self.unknown.add(key)


def clean_conversation(record, report, place, names=NAMES):
    """The messages of one JSON record, or None where nothing can be learned from it.

    Turns stand under `conversations`, `messages` …, or in pairs (`instruction`, `input`, `output`;
    `prompt`, `response` …; a text each, or a list of turns each), or as texts in turn under `data`,
    with `history` before them and `system` on top. A conversation is cut before an empty turn, a
    tool's turn and a later system turn. It is skipped without turns, without a known role, or
    without an answer. Two turns in a row of one role are joined; answers without a question and
    questions without an answer are dropped.
    """
    report.records += 1
    left_out = _LeftOut(names)
    try:
        return _alternating(_all_turns(record, names, left_out), report, place)
    except Skip as reason:
        by_name = str(reason) == "no conversation" or left_out.unknown   # else a value is at fault
        if by_name and isinstance(record, dict):
            report.see_keys(record)
        return report.skip(str(reason), place)
    finally:
        report.left_out.update(sorted(left_out.known))
        report.unknown.update(sorted(left_out.unknown))
        report.unknown_roles.update(left_out.unknown_roles)


def _all_turns(record, names, left_out):
    """[(role, text or None, supervised)] of a record, in order, as they stand there."""
    keys = names.keys
    turns = _messages_in(record, keys)
    if turns is None and record.keys().isdisjoint(names.answer_keys):
        record = {str(key).casefold(): value for key, value in record.items()}
        turns = _messages_in(record, keys)
    system = _filled(record, keys["system"])
    used = [turns, system]
    text = _text(system, left_out)
    made = [] if text is None else [("system", text, True)]
    for key in keys["history"]:
        made += _history(record.get(key), names, left_out)
        used.append(record.get(key))
    before = len(made)
    if turns is not None:
        for turn in unforked(turns):
            made += _turns_in(turn, names, left_out)
        used += [text for _, text, _ in made]
    elif not record.keys().isdisjoint(names.answer_keys):
        questions = [record.get(key) for key in (*keys["user"], "input")]
        answer = _filled(record, keys["assistant"])
        asked = [value for value in questions if not _empty(value)]
        if len(asked) == 1 and are_messages(asked[0]) and are_messages(answer):
            made += _prompt_and_completion(asked[0], answer, names, left_out)
        else:
            made += _question_and_answer(questions, answer, left_out)
        used += [*questions, answer]
    elif are_texts(data := parsed(record.get("data"))):     # UltraChat's
        made += _history(data, names, left_out)
        used.append(data)
    else:
        empty = any(_holds_nothing(record.get(key, 0)) for key in keys["messages"])
        raise Skip("no turns" if empty else "no conversation")
    left_out.count(record, used)
    return with_flags(record, made, before, left_out)


def _messages_in(record, keys):
    """The first list of turns that is not empty; None if there is none."""
    for key in keys["messages"]:
        value = parsed(record.get(key))
        if isinstance(value, list) and value:
            if key != "data" or key == keys["messages"][0] or any(map(is_message, value)):
                return value                             # first: --map says so
            if isinstance(value[0], dict) and _filled(record, keys["assistant"]) is None:
                if not value[0].keys().isdisjoint(keys["assistant"]):
                    raise Skip("data holds pairs, records or turns (turns: --map=data:messages)")
                return value
    return None


def _prompt_and_completion(prompt, completion, names, left_out):
    """The turns of TRL's two lists. The completion is learned, the prompt is context, as in TRL."""
    made = []
    for turn in prompt:
        made += [(role, text, False) for role, text, _ in _turns_in(turn, names, left_out)]
    if "assistant" in [role for role, _, _ in made]:
        left_out.add("answers of a prompt (context, not learned)")
    for turn in completion:
        made += _turns_in(turn, names, left_out)
    return made


def _question_and_answer(questions, answer, left_out):
    """The turns of a record of pairs."""
    question = [_text(part, left_out) for part in questions]
    question = [part for part in dict.fromkeys(question) if part is not None]
    if isinstance(answer, list) and len(answer) > 1:
        raise Skip("several answers")
    answer = _text(answer, left_out)
    is_transcript = (len(question) == 1 and question[0].startswith("Human:")
                     and question[0].endswith("Assistant:"))
    if is_transcript:
        parts = TRANSCRIPT.split(question[0])[1:]
        said = zip(parts[::2], parts[1::2])
        turns = [(NAMES.role(name), text.strip(), True) for name, text in said]
        return turns[:-1] + [("assistant", answer, True)]
    return [("user", "\n".join(question) or None, True), ("assistant", answer, True)]


def _history(value, names, left_out):
    """The turns before: [[question, answer], …], records of both, or messages."""
    value = parsed(value)
    if _holds_nothing(value):
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Skip("history is not a list")
    if are_texts(value):                                 # question, answer, question, answer …
        if len(value) % 2:                               # the first may be no question
            raise Skip("an odd number of texts without roles")
        value = [value[start: start + 2] for start in range(0, len(value), 2)]
    turns = []
    for item in value:
        if isinstance(item, list) and len(item) == 2:
            if turns or not _empty(item[0]):             # else the assistant greets
                turns.append(("user", _text(item[0], left_out), True))
            turns.append(("assistant", _text(item[1], left_out), True))
        else:
            turns += _turns_in(item, names, left_out)
    return turns


def _turns_in(turn, names, left_out):
    """One turn {"role": …, "content": …}, or the two of {"human": …, "assistant": …}."""
    if not isinstance(turn, dict):
        raise Skip('a turn is no object such as {"role": "user", "content": "…"}')
    keys = names.keys
    name = _filled(turn, keys["role"])
    if name is None or turn.keys().isdisjoint(keys["content"]):
        turn = {key.casefold(): value for key, value in turn.items()}
        name = _filled(turn, keys["role"])
    supervised = is_supervised(turn, left_out)
    if name is None:
        ordered = sorted(filter(names.role_of_key, turn), key=names.place_in_pair)
        if not ordered:
            left_out.unknown.update(turn.keys() - names.known - _BESIDE)
            raise Skip("a turn without a role")
        left_out.count(turn, [turn[key] for key in ordered])
        said = []
        for key in ordered:
            role, text = names.role_of_key(key), _text(turn[key], left_out)
            if said and said[-1][0] == role == "user":   # an instruction, then its input
                text = "\n".join(dict.fromkeys(filter(None, (said.pop()[1], text)))) or None
            said.append((role, text, supervised))
        return said
    role = names.role(name)
    if role is None:
        left_out.unknown_roles.add(" ".join(str(name).split())[:40])
        raise Skip("unknown role")
    value = _filled(turn, keys["content"])
    if len(turn) > 2 or _empty(value):                   # as a rule not, so at once
        left_out.count(turn, (name, value))
    if isinstance(value, list):
        supervised = supervised and all(is_supervised(part, left_out) for part in value
                                        if isinstance(part, dict))
    text = _text(value, left_out)
    if text is None and role == "assistant" and not _holds_nothing(turn.get("tool_calls")):
        role = "tool"
    return [(role, text, supervised)]


def _text(value, left_out):
    """The text of a turn, None if empty: a string, or the parts of a list that are text."""
    if _empty(value):
        return None
    if isinstance(value, list):
        parts = []
        for part in value:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                left_out.count(part, (part["text"],))
                part = part["text"]
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, dict) and isinstance(part.get("type"), str):
                left_out.add(part["type"])               # an image, a sound …
            else:
                raise Skip("a turn is not text")
        value = "".join(parts)
    if not isinstance(value, str):
        raise Skip("a turn is not text")
    return value if value.strip() else None


def _filled(record, keys):
    """The value of the first of the keys under which something stands; None if there is none."""
    for key in keys:
        if not _empty(record.get(key)):
            return record[key]
    return None


def _empty(value):
    """Whether nothing is said: null, NaN (pandas' null), blank text, an empty list or object."""
    if value is None or value == [] or value == {}:
        return True
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, str) and not value.strip()


def _holds_nothing(value):
    """Whether a list or an object is empty, also one that was written as text."""
    return _empty(value) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null"))


def _alternating(turns, report, place):
    """The messages of some turns: perhaps system, then user and assistant in turn."""
    messages = []
    for role, text, supervised in turns:
        started = bool(messages) and messages[-1]["role"] != "system"
        if role == "tool":
            report.repair("cut before a tool turn", place)
            break
        if text is None and role == "system":
            report.repair("empty system turn dropped", place)
            continue
        if text is None and role == "assistant" and not started:
            report.repair("empty first assistant turn dropped", place)
            continue
        if text is None:
            report.repair("cut before an empty turn", place)
            break
        if role == "system" and started:
            report.repair("cut before a later system turn", place)
            break
        if role == "assistant" and not started:
            report.repair("assistant turn before any user turn dropped", place)
            continue
        text = mend(text, report, place)
        if messages and messages[-1]["role"] == role:
            _join(messages[-1], text, supervised, report, place)
            continue
        message = {"role": role, "content": text}
        if role == "assistant" and not supervised:
            message["supervised"] = False
        messages.append(message)
    if messages and messages[-1]["role"] == "user":
        if len(messages) > 2:
            report.repair("user turn without an answer dropped", place)
        messages.pop()
    if not messages or messages[-1]["role"] != "assistant":
        roles = [role for role, _, _ in turns]
        if "assistant" not in roles and "system" in roles[1:]:
            raise Skip("no assistant turn; if system answers: --map=NAME:assistant")
        raise Skip("no assistant turn")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(message.get("supervised", True) for message in answers):
        raise Skip("no turn to learn: all have weight 0")
    return messages


def _join(message, text, supervised, report, place):
    """Add a turn to the one before, which has the same role."""
    role = message["role"]
    if role == "system" and message["content"] == text:
        return
    report.repair(f"two {role} turns running joined", place)
    message["content"] += "\n" + text
    if role == "assistant" and supervised != message.get("supervised", True):
        report.repair("joined with a turn of weight 0: not learned", place)
        supervised = False
    if role == "assistant" and not supervised:
        message["supervised"] = False


def mend(text, report, place):
    """Replace lone surrogates, which no UTF-8 can hold (JSON's \\ud800 makes them), by U+FFFD."""
    try:
        text.encode("utf-8")                             # ten times as fast as a search
        return text
    except UnicodeEncodeError:
        pass
    report.repair("lone surrogate replaced by U+FFFD", place)
    return LONE_SURROGATE.sub("\ufffd", text)
