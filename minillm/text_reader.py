"""Blocks of raw records in, documents and conversations out, one clean one at a time.

    report = Report()
    source = Source(["raw/", "corpus.tar.bz2"], report)
    for place, text in documents(source): ...           # place: "file:line"
    for place, messages in conversations(source): ...   # [{"role": "user", "content": "…"}, …]

What cannot be used is skipped, what can be put right is repaired; both are counted in the Report by
reason, with the first file:line of each. The preparation calls block_documents() and
block_conversations() in other processes.
"""
from minillm.chat_names import ABOUT_A_FILE, ANSWERS, IDS, MESSAGES, NAMES, QUESTIONS
from minillm.chat_records import clean_conversation, mend
from minillm.errors import UserError
from minillm.json_stream import BETWEEN, LENIENT, WRAPPERS, are_messages, is_message
from minillm.tokenizer import SPECIAL_TOKENS

TEXT_KEY_HINT = "; --text_key=KEY says which of them holds the text"

# what has one of these, or a name that the user gave, is a record itself
OWN_KEYS = {"text", "content", *IDS, *QUESTIONS, *ANSWERS, *MESSAGES} - set(WRAPPERS)


def documents(source, text_key="text"):
    """Yield (place, text) of each document; text is never blank."""
    for block in source.blocks():
        yield from block_documents(block, source.report, text_key)


def conversations(source, names=NAMES):
    """Yield (place, messages) of each conversation; see clean_conversation()."""
    source.leave_out_txt()
    for block in source.blocks():
        yield from block_conversations(block, source.report, names)


def block_documents(block, report, text_key="text", names=None):
    """Yield (place, text) of each document of a block.

    In JSON the text stands under `text_key`, and is kept to the letter; under several keys
    ("title,content") it is joined by line ends. A record that is a string is a text itself. With
    `names`, a record without text may hold a conversation; its turns are then the text.
    """
    for place, text in _block_texts(block, report, text_key, names):
        note_control_tokens([text], report, place)
        yield place, text


def _block_texts(block, report, text_key, names):
    if block.kind == "texts":
        yield from block.data
        return
    keys = split_keys(text_key)
    own_keys = OWN_KEYS.union(keys, names.mapped if names else ())
    for place, record in block_records(block, report, own_keys, turns=names is not None):
        if isinstance(record, str):
            text = record
        else:
            text = _joined_text(record, keys, report, place)
        if text is None and names:
            messages = clean_conversation(record, report, place, names)
            if messages:
                yield place, "\n".join(message["content"] for message in messages)
        elif text is None:
            report.see_keys(record)
            report.skip(f"no text under {' or '.join(map(repr, keys))}", place)
        elif not text.strip():
            report.skip("empty text", place)
        else:
            yield place, mend(text, report, place)


def split_keys(text_key):
    """ "title,content" as a list."""
    return [key.strip() for key in text_key.split(",")]


def check_text_keys(text_key, report):
    """UserError if some records held a text under one of several keys, and none under another."""
    for key in split_keys(text_key):
        if report.text_keys and key not in report.text_keys:
            raise UserError(f"--text_key={text_key}: no record holds a text under {key!r}")


def _joined_text(record, keys, report, place):
    """The texts under the keys; None if there is none, "" if all are blank."""
    if len(keys) == 1:
        text = record.get(keys[0])
        return text if isinstance(text, str) else None
    texts = {key: record[key] for key in keys if isinstance(record.get(key), str)}
    if not texts:
        return None
    report.text_keys.update(texts)
    for key in keys:
        if key not in texts:
            report.repair(f"no text under {key!r}, the other keys used", place)
    return "\n".join(text for text in texts.values() if text.strip())


def block_conversations(block, report, names=NAMES):
    """Yield (place, messages) of each conversation of a block."""
    for place, record in block_records(block, report, OWN_KEYS | names.mapped, turns=True):
        if isinstance(record, str):
            report.skip("a text, and nothing says whose: conversations are JSON objects", place)
            continue
        messages = clean_conversation(record, report, place, names)
        if messages:
            note_control_tokens([message["content"] for message in messages], report, place)
            yield place, messages


def note_control_tokens(texts, report, place):
    """Note a record whose texts spell a control token: it stays text, which few want to learn."""
    for text in texts:
        spelled = [token for token in SPECIAL_TOKENS if token in text] if "<|" in text else []
        if spelled:
            report.note(f"{spelled[0]} in a text is learned as characters, not as a control token: "
                        "take it out if a template put it there", place)
            return


def block_records(block, report, own_keys, turns):
    """Yield (place, record) of a block of JSON; a record is a dict, or a str.

    What has one of `own_keys` is a record itself, whatever lists it holds. turns: a list of what
    looks like turns is one conversation.
    """
    values = _line_values(block, report) if block.kind == "lines" else block.data
    for place, value in values:
        for record in _records(value, report, own_keys, turns):
            if record is None:
                report.skip("not a JSON object", place)
            else:
                yield place, record


def _line_values(block, report):
    """Yield (place, value) of each JSON value of some lines."""
    for number, line in enumerate(_decoded_lines(block, report), block.first):
        if line is None:
            continue
        place = f"{block.name}:{number}"
        text = line.strip(" \t\r\n\ufeff")
        if not text:
            report.skip("blank line", place)
            continue
        if line.startswith("\ufeff"):
            report.repair("byte order mark removed", place)
        try:
            yield place, LENIENT.decode(text)
        except RecursionError:
            report.skip("malformed JSON", place)
        except ValueError:
            values = _several_values(text)
            if values is None:
                report.skip("malformed JSON", place)
            for value in values or ():
                yield place, value


def _decoded_lines(block, report):
    """Yield the lines of a block as text; None for one that does not decode."""
    try:
        lines = block.data.decode(block.encoding).split("\n")
    except UnicodeDecodeError:
        lines = block.data.split(b"\n")
    if not lines[-1]:                                    # behind the last line end
        lines.pop()
    for number, line in enumerate(lines, block.first):
        if isinstance(line, str):
            yield line
            continue
        try:
            yield line.decode(block.encoding)
        except UnicodeDecodeError:
            report.undecodable_line(line, block.encoding, f"{block.name}:{number}")
            yield None


def _several_values(text):
    """The JSON values of a line with several, or with a comma after one; None if malformed."""
    values, at = [], 0
    while at < len(text):
        try:
            value, at = LENIENT.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        at = BETWEEN.match(text, at).end()
    return values


def _records(value, report, own_keys, turns):
    """Yield the records of one JSON value; None for one that is neither an object nor a text."""
    if isinstance(value, dict):
        inner = _wrapped(value, report, own_keys, turns)
        if inner is None:
            yield value
            return
        value = inner
    if isinstance(value, str):
        yield value
    elif not isinstance(value, list):
        yield None
    elif turns and are_messages(value):
        yield {"messages": value}
    else:
        for element in value:
            if isinstance(element, (dict, str, list)):
                yield from _records(element, report, own_keys, turns)
            else:
                yield None


def _wrapped(record, report, own_keys, turns):
    """The records in the lists of {"data": […]}; None if this is a record itself."""
    if not record.keys().isdisjoint(own_keys):
        return None
    for key, value in record.items():
        if isinstance(value, str) and value.strip() and key.casefold() not in ABOUT_A_FILE:
            return None                                  # its text would be lost
    lists = {key: value for key, value in record.items() if _holds_records(value, turns)}
    wrapped = [element for key in WRAPPERS for element in lists.pop(key, ())]
    if wrapped:
        report.left_out.update({key: len(value) for key, value in lists.items() if value})
    return wrapped or None


def _holds_records(value, turns):
    return (isinstance(value, list) and not (turns and any(map(is_message, value)))
            and all(isinstance(element, (dict, list)) for element in value))
