"""What was skipped, repaired, noted or left out of the input: counted, and reported.

    report = Report()
    report.skip("malformed JSON", "corpus.jsonl:17")      # with strict=True this raises UserError
    report.merge(report_of_another_process)               # in the order of the input
    print(*report.lines(), sep="\\n")
"""
import os
from collections import Counter

from minillm.encodings import guess_encoding
from minillm.errors import UserError

KEYS_KEPT = 1000             # unknown keys that are counted; a file may have any number of them
KEYS_SAVED = 100             # … and those in meta.json, the most frequent
ROLES_NAMED = 8              # unknown roles that are printed, the most frequent
SAMPLE_BYTES = 1 << 14       # of undecodable lines, from which guess_encoding() proposes an encoding


class Skip(Exception):
    """Nothing of this record can be used; the reason."""


class Report:
    """Tables of what happened to the input: {reason: {"count", "first"}}, the first by file:line.

    A note is about what is used as it stands, but was perhaps meant otherwise.

    `left_out` counts, for each key that has a meaning and is left out nevertheless, the records
    that have it. `unknown` does so for keys that no rule knows, `unknown_roles` for such roles.
    """

    def __init__(self, strict=False, hint="", encoding="utf-8"):
        self.strict = strict
        self.hint = hint                 # what to do about keys that no rule knows
        self.encoding = encoding         # of the input, as the user says
        self.skipped = {}
        self.repaired = {}
        self.noted = {}
        self.other_files = {}            # by suffix, in place of a reason
        self.left_out = Counter()
        self.unknown = Counter()
        self.unknown_roles = Counter()
        self.records = 0
        self.text_keys = set()           # of several keys of a text, those that held one
        self.undecodable = b""
        self.keys_seen = ()              # of the first record in which nothing was understood

    def skip(self, reason, place):
        if self.strict:
            hint = "without --strict such lines are skipped and counted"
            raise UserError(f"{place}: {reason}; {hint}")
        _count(self.skipped, reason, place)

    def repair(self, reason, place):
        _count(self.repaired, reason, place)

    def note(self, reason, place):
        _count(self.noted, reason, place)

    def other_file(self, path, kind=None):
        """Count a file in a folder or a tar that is passed over, by `kind`, or by its suffix."""
        suffix = os.path.splitext(path)[1].lower()
        _count(self.other_files, kind or suffix or "no suffix", path)

    def see_keys(self, record):
        """Remember the keys of a record in which nothing was understood, if it is the first."""
        self.keys_seen = self.keys_seen or tuple(map(str, list(record)[:8]))

    def undecodable_line(self, line, encoding, place):
        self.skip(f"not {encoding}", place)
        self.undecodable = (self.undecodable + line)[:SAMPLE_BYTES]

    def merge(self, other):
        """Add what `other` counted, which comes later in the input."""
        for mine, theirs in ((self.skipped, other.skipped), (self.repaired, other.repaired),
                             (self.noted, other.noted), (self.other_files, other.other_files)):
            for reason, entry in theirs.items():
                _count(mine, reason, entry["first"], entry["count"])
        self.left_out.update(other.left_out)
        for mine, theirs in ((self.unknown, other.unknown),
                             (self.unknown_roles, other.unknown_roles)):
            for name, count in theirs.items():
                if name in mine or len(mine) < KEYS_KEPT:
                    mine[name] += count
        self.records += other.records
        self.text_keys |= other.text_keys
        self.undecodable = (self.undecodable + other.undecodable)[:SAMPLE_BYTES]
        self.keys_seen = self.keys_seen or other.keys_seen

    def in_a_line(self):
        """The report for an error message, "" where all was well."""
        return "; ".join(line.strip() for line in self.lines())

    def lines(self):
        """The report and what to do, as lines for the terminal; none where all was well."""
        lines = []
        tables = ("repaired", self.repaired), ("skipped", self.skipped), ("noted", self.noted)
        for verb, table in tables:
            for reason, entry in sorted(table.items(), key=lambda item: -item[1]["count"]):
                lines.append(f"  {verb} {entry['count']:,}: {reason} (first: {entry['first']})")
        if self.other_files:
            lines.append(f"  left out: {self._other_files()}")
        for key, count in self.left_out.most_common():
            lines.append(f"  left out: {key} in {counted(count, 'records')}")
        if self.unknown:
            lines.append(f"  not used, because no rule knows these keys: {self._unknown_keys()}")
        if self.unknown_roles:
            lines.append(f"  roles that no rule knows: {self._unknown_roles()}; "
                         "--map=NAME:user (or assistant, system, tool) says what one is")
        fits = guess_encoding(self.undecodable) if self.undecodable else None
        if fits and fits != self.encoding:
            lines.append(f"  what is not {self.encoding} looks like {fits}: try --encoding={fits} "
                         "if all of the input is, else convert those files "
                         f"(`iconv -f {fits} -t utf-8 OLD > NEW`)")
        if self.keys_seen:
            lines.append("  the keys of the first record that was not understood: "
                         f"{', '.join(self.keys_seen)}{self.hint}")
        return lines

    def _other_files(self):
        total = sum(entry["count"] for entry in self.other_files.values())
        kinds = [f"{kind} {entry['count']:,}" for kind, entry in self.other_files.items()]
        first = next(iter(self.other_files.values()))["first"]
        return f"{counted(total, 'files')} ({', '.join(kinds)}; the first: {first})"

    def _unknown_keys(self):
        """Those in more than 1% of the records, and how many others there are."""
        keys = self.unknown.most_common()
        named = [key for key, count in keys[:20] if count > 0.01 * self.records]
        rare = len(keys) - len(named)
        if rare:
            named.append(f"{counted(rare, 'rarer ones')} such as {keys[len(named)][0]}")
        return ", ".join(named)

    def _unknown_roles(self):
        named = [f"{role} in {counted(count, 'records')}"
                 for role, count in self.unknown_roles.most_common(ROLES_NAMED)]
        others = len(self.unknown_roles) - len(named)
        if others:
            named.append(counted(others, "others"))
        return ", ".join(named)

    def summary(self):
        """What meta.json says of it."""
        return {
            "skipped": self.skipped,
            "repaired": self.repaired,
            "noted": self.noted,
            "other_files": self.other_files,
            "left_out": dict(self.left_out),
            "unknown_keys": dict(self.unknown.most_common(KEYS_SAVED)),
            "unknown_roles": dict(self.unknown_roles.most_common(KEYS_SAVED)),
        }


def counted(n, nouns):
    """ "1 row", "2,000 rows"; nouns: a plural that ends in s."""
    return f"{n:,} {nouns.removesuffix('s') if n == 1 else nouns}"


def _count(table, reason, place, count=1):
    table.setdefault(reason, {"count": 0, "first": place})["count"] += count
