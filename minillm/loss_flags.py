"""Which turns are learned, by the flags of a file: weight, loss, train, trainable, loss_mask.

    is_supervised({"role": "assistant", "weight": 0}, left_out) # False: it is context
    with_flags({"loss_mask": [0, 1]}, turns, 0, left_out)       # one flag for each answer

A flag that is not understood is an error: nothing is learned against what its file says. Rejected
answers (KTO's label) and trees of rival answers (OASST's parent_id) are refused.
"""
from minillm.chat_names import FLAGS
from minillm.json_stream import parsed
from minillm.report import Skip


def is_supervised(record, left_out):
    """False if a flag of a turn, of a part of it or of a whole record says that it is context."""
    if record.keys().isdisjoint(FLAGS):                  # as a rule, so at once
        return True
    supervised = True
    for key in FLAGS:
        value = record.get(key)
        if value is None or value == []:
            continue
        if isinstance(parsed(value), list):
            raise Skip(f"{key} of a turn is a list")
        if value in (0, False) or str(value).strip().casefold() in ("0", "0.0", "false", "no"):
            supervised = False
        elif (value not in (1, True)
              and str(value).strip().casefold() not in ("1", "1.0", "true", "yes")):
            left_out.add(f"{key} other than 0 and 1 (taken as 1)")
    return supervised


def with_flags(record, turns, before, left_out):
    """The turns of a record, (role, text, supervised), without those that its own flags exclude.

    A flag stands for all turns, or is a list: one for each turn, with or without the system prompt
    that stands beside them, or one for each answer. The first `before` turns are the system prompt
    and the history; a list for the others alone leaves open what the history is.
    """
    if record.get("label") is False:
        raise Skip("label is false: a rejected answer")
    if record.keys().isdisjoint(FLAGS):
        return turns
    places = list(range(len(turns)))
    readings = [places, [place for place in places if turns[place][0] == "assistant"]]
    if before and turns[0][0] == "system":
        readings.append(places[1:])
    turns = list(turns)
    for key in FLAGS:
        flags = parsed(record.get(key))
        if flags in (None, []):
            continue
        if not isinstance(flags, list):
            flags = [flags] * len(turns)
        fitting = [reading for reading in readings if len(reading) == len(flags)]
        unclear = len(flags) == len(turns) - before and places[before:] not in fitting
        if unclear or not fitting:
            raise Skip(f"{key} has neither a flag for each turn nor one for each answer")
        for place, flag in zip(fitting[0], flags):
            role, text, supervised = turns[place]
            turns[place] = (role, text, is_supervised({key: flag}, left_out) and supervised)
    return turns


def unforked(turns):
    """The turns of a record. Raises Skip where two of them answer the same one: they are rivals."""
    parents = [str(turn["parent_id"]) for turn in turns
               if isinstance(turn, dict) and turn.get("parent_id") is not None]
    if len(set(parents)) < len(parents):
        raise Skip("a tree of turns (a parent_id stands twice)")
    return turns
