"""Records of conversations as files hold them, and the messages that come out of them."""
import json

from minillm.text_reader import conversations
from support.reading import read

ROLES = {"u": "user", "a": "assistant", "-": "assistant", "s": "system"}


def said(*turns):
    """Messages: "u问" of the user, "a答" of the assistant, "-答" not supervised, "s善" of system."""
    messages = []
    for turn in turns:
        message = {"role": ROLES[turn[0]], "content": turn[1:]}
        if turn[0] == "-":
            message["supervised"] = False
        messages.append(message)
    return messages


def turn(role, content, **keys):
    return {"role": role, "content": content, **keys}


def record(*turns, **keys):
    """A record that holds turns, and `keys` beside them."""
    return {"messages": list(turns), **keys}


QUESTION, ANSWER = turn("user", "问"), turn("assistant", "答")
QA = (QUESTION, ANSWER)
PAIR = {"instruction": "问", "input": "", "output": "答"}
PLAIN = said("u问", "a答")           # what all of these mean


def read_record(folder, record, **options):
    """What is found in a file of one record, which is JSON or what json.dumps() takes."""
    if not isinstance(record, str):
        record = json.dumps(record)
    path = folder / "record.jsonl"
    path.write_text(record + "\n")
    return read(path, conversations, **options)
