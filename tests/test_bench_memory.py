"""bench.memory: which entries of its table are tried, and what a try computes."""
import re

import pytest
import torch

from bench.memory import CARDS, DRIVER, Row, fill_row
from minillm.errors import UserError
from support.preparation_runs import command
from support.processes import refused


class Memory:
    """Attempts on a model whose step needs base + slope × batch size, and `waste` on a card."""

    def __init__(self, base, slope, waste=0.0):
        self.base, self.slope, self.waste, self.tried = base, slope, waste, []

    def attempt(self, model, checkpointed, batch_size, card):
        peak = self.base + self.slope * batch_size
        if not card:
            return peak
        self.tried.append((batch_size, card))
        return peak if peak + self.waste <= card - DRIVER else None


def fill(memory, in_time=lambda: True):
    row = Row("moe", False)
    return row, fill_row(row, memory.attempt, in_time)


def test_the_largest_that_fits_is_tried_once():
    """7, 11, 15, 23 and 47 GiB to spend: 1 fits no card of 8 GB, 64 needs 42."""
    memory = Memory(base=10.0, slope=0.5)

    row, entries = fill(memory)

    assert (row.base, row.slope) == pytest.approx((10.0, 0.5))
    assert entries == {8: (0, True), 12: (2, True), 16: (8, True), 24: (16, True), 48: (64, True)}
    assert memory.tried == [(2, 12), (8, 16), (16, 24), (64, 48)]


def test_what_fits_a_smaller_card_is_not_tried_again():
    memory = Memory(base=1.0, slope=0.1)

    _, entries = fill(memory)

    assert entries == {card: (64, True) if card > 8 else (32, True) for card in CARDS}
    assert memory.tried == [(32, 8), (64, 12)]


def test_a_prediction_that_does_not_hold_steps_down():
    memory = Memory(base=10.0, slope=0.5, waste=1.5)

    _, entries = fill(memory)

    assert [entries[card][0] for card in CARDS] == [0, 0, 4, 16, 64]
    assert memory.tried[:3] == [(2, 12), (1, 12), (8, 16)]


def test_late_entries_are_predicted():
    memory = Memory(base=10.0, slope=0.5)

    _, entries = fill(memory, in_time=lambda: len(memory.tried) < 2)

    assert entries[16] == (8, True) and entries[24] == (16, False) and entries[48] == (64, False)


def test_what_was_predicted_of_a_smaller_card_stays_a_prediction():
    _, entries = fill(Memory(base=1.0, slope=0.01), in_time=lambda: False)

    assert entries == dict.fromkeys(CARDS, (64, False))


def test_a_gpu_that_is_too_small_for_the_table_is_refused():
    with pytest.raises(UserError, match="moe with --batch_size=32 does not fit this GPU"):
        fill_row(Row("moe", False), lambda *entry: None, lambda: True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures here")
@pytest.mark.parametrize("flags", [[], ["--model=dense", "--batch_size=1"]], ids=str)
def test_without_a_gpu_it_is_refused(flags):
    assert "needs a GPU; --device=cpu measures tiny models" in refused("bench.memory", flags)


@pytest.mark.parametrize("flags", [[], ["--world=8", "--shard=True"],
                                   ["--activation_checkpointing=True"]], ids=" ".join)
def test_an_entry_is_a_training_step(flags):
    output = command("bench.memory", "--model=moe", "--batch_size=2", "--device=cpu",
                     "--compile=False", *flags)

    assert re.fullmatch(r"peak \d+\.\d{3} GiB\n", output)
