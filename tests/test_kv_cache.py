"""The KV cache: with it a model says, token for token, what it says without."""
import random

import pytest
import torch

from minillm.errors import UserError
from support.tiny_models import tiny_model
from support.uncached import DENSE, GREEDY, MOE, SAMPLED, random_ids, rows, uncached

KINDS = [
    pytest.param(DENSE, id="dense"),
    pytest.param(MOE, id="MoE"),
    pytest.param(dict(n_kv_head=4), id="one query per group"),
    pytest.param(dict(n_kv_head=1), id="one group"),
]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_cached_equals_uncached(kind, options):
    """To the end of the context, for prompts of 1 to block_size - 1 tokens."""
    model = tiny_model(**kind)
    for length in (1, 2, 17, 46, 47):
        prompt = random_ids(length, seed=length)

        answer = list(model.generate(prompt, 60, seed=length, **options))

        assert answer == uncached(model, prompt, 60, seed=length, **options)
        assert len(answer) == 48 - length


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS[:2])
@torch.inference_mode()
def test_batch_equals_its_rows_alone(kind, options):
    """Eight prompts; the long ones reach the end of the context while the others continue."""
    model = tiny_model(**kind)
    prompts = [random_ids(length, seed=length) for length in (1, 47, 5, 30, 2, 46, 12, 40)]

    batch = rows(model, prompts, 25, seed=3, **options)

    for b, prompt in enumerate(prompts):
        alone = list(model.generate(prompt, 25, seed=3 + b, **options))
        assert batch[b] == alone == uncached(model, prompt, 25, seed=3 + b, **options)


def n_shared(prompt, tokens):
    """How many tokens at the prompt's beginning are in the cache; the last is always computed."""
    n = 0
    while n < min(len(prompt) - 1, len(tokens)) and prompt[n] == tokens[n]:
        n += 1
    return n


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", KINDS[:2])
@torch.inference_mode()
def test_five_turns_with_trimming(kind, batch):
    """One cache over five turns; each row drops its oldest tokens at a turn of its own."""
    model = tiny_model(**kind)
    cache = model.new_cache(batch)
    draw = random.Random(5)
    prompts = [[] for _ in range(batch)]
    n_trimmed = 0
    for turn in range(5):
        for prompt in prompts:
            prompt += random_ids(draw.randrange(1, 9), seed=draw.getrandbits(32))
            if len(prompt) > 36:
                del prompt[4:20]                 # a system prompt stays, the oldest exchange goes
                n_trimmed += 1
        lengths = [len(prompt) for prompt in prompts]
        shared = [n_shared(prompt, tokens) for prompt, tokens in zip(prompts, cache.tokens)]
        before = cache.n_prefilled

        answers = rows(model, prompts, 8, seed=turn, cache=cache, **SAMPLED)

        assert cache.n_prefilled - before == sum(lengths) - sum(shared)
        for b, (prompt, answer) in enumerate(zip(prompts, answers)):
            assert answer == uncached(model, prompt, 8, seed=turn + b, **SAMPLED), (turn, b)
            prompt += answer
    assert n_trimmed >= batch


@torch.inference_mode()
def test_an_interrupted_prefill_leaves_no_stale_cache():
    """Ctrl-C between two layers: one holds keys of the new prompt, the other of the old one."""
    model = tiny_model()
    cache = model.new_cache()
    old, new = random_ids(30, seed=1), random_ids(20, seed=2)
    expected = uncached(model, old, 5, **GREEDY)

    def interrupt(module, inputs):
        raise KeyboardInterrupt
    list(model.generate(old, 5, cache=cache, **GREEDY))
    hook = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(model.generate(old[:10] + new, 5, cache=cache, **GREEDY))
    hook.remove()

    assert list(model.generate(old, 5, cache=cache, **GREEDY)) == expected


@torch.inference_mode()
def test_leaving_a_generation_early_keeps_the_cache_sound():
    model = tiny_model()
    cache, prompt = model.new_cache(), random_ids(10, seed=1)
    answer = []
    for token in model.generate(prompt, 30, seed=1, cache=cache):
        answer.append(token)
        if len(answer) == 7:
            break
    prompt += answer + random_ids(3, seed=2)

    second = list(model.generate(prompt, 9, seed=2, cache=cache))

    assert second == uncached(model, prompt, 9, seed=2)
    # the seventh was shown, but the model had not read it yet
    assert cache.n_prefilled == 10 + 4


@pytest.mark.parametrize("lengths", [[250], [5, 300]])
def test_a_cache_is_made_as_large_as_prompt_and_answer_need(lengths):
    """In steps of 256 slots: one step alone would cut these answers short."""
    model = tiny_model(block_size=512)
    prompts = [random_ids(length, seed=length) for length in lengths]

    answers = rows(model, prompts, 20, **GREEDY)

    assert [len(answer) for answer in answers] == [20] * len(lengths)


def test_prompts_may_be_tuples():
    model = tiny_model()

    assert rows(model, [(5, 6), (7,)], 3, **GREEDY) == rows(model, [[5, 6], [7]], 3, **GREEDY)


def test_an_answer_has_256_tokens_unless_told_otherwise():
    assert len(list(tiny_model(block_size=512).generate([5]))) == 256


@pytest.mark.parametrize("prompts, length", [
    ([5] * 48, 48),
    ([[5], [5] * 48], 48),
    ([[5], []], 0),
    ([], 0),
], ids=["alone", "in a batch", "an empty one", "empty"])
def test_prompts_that_do_not_fit_are_refused(prompts, length):
    says = f"a prompt of {length} tokens does not fit: the context holds 48"
    with pytest.raises(UserError, match=says):
        list(tiny_model().generate(prompts, 3))


def test_a_cache_of_another_number_of_rows_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="2 prompts, but the cache has 1 rows"):
        list(model.generate([[5], [6]], 3, cache=model.new_cache(1)))
