"""What train.py sets up before its first step, as the settings and the environment say."""
import json
import os
import shutil

import torch

import train
from minillm import checkpoint, run_folder
from model import GPT
from support.training_runs import TINY, finish, make_data, newest, on_step, ranks, refused

SHORT = [*TINY, "--max_iters=2", "--eval_interval=0"]


def test_a_process_takes_the_gpu_of_its_local_rank(data, tmp_path):
    """Its number on its machine: rank 8 of two machines with eight GPUs takes the first one."""
    def before():
        def pick_device(name, local_rank, world):
            print(f"GPU {local_rank} of {name}")
            return torch.device("cpu")
        train.pick_device = pick_device

    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before,
                    env={"LOCAL_RANK": "3"})

    assert "GPU 3 of cpu" in output


def test_deterministic_is_what_torch_hears(data, tmp_path):
    argv = [*SHORT, f"--data_dir={data}"]

    def before():
        inner = train.make_optimizer

        def make(*args):
            print(f"deterministic: {torch.are_deterministic_algorithms_enabled()}")
            return inner(*args)
        train.make_optimizer = make

    for flags, heard in (([], False), (["--deterministic"], True)):
        output = finish([*argv, *flags, f"--out_dir={tmp_path}/{heard}"], before=before)
        assert f"deterministic: {heard}" in output


def test_without_validation_no_validation_split_is_needed(tmp_path):
    """What prepare_pretrain.py --val_fraction=0 leaves: too few tokens for a window."""
    data = make_data(tmp_path / "data")
    with open(os.path.join(data, "meta.json")) as file:
        meta = json.load(file)
    meta["splits"]["val"] = {"documents": 0, "tokens": 0, "bytes": 0}
    with open(os.path.join(data, "meta.json"), "w") as file:
        json.dump(meta, file)
    os.truncate(os.path.join(data, "val.bin"), 0)

    finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"])

    assert newest(tmp_path / "out")["step"] == 2


def test_embeddings_that_collapsed_are_drawn_anew_for_other_data(data, tmp_path):
    """By the seed; the others stay."""
    base, same = tmp_path / "base", slice(100, 200)
    finish([*SHORT, f"--data_dir={data}", f"--out_dir={base}"])
    path = checkpoint.step_path(base, 2)
    state = checkpoint.load(path)
    old = state["model"]["wte.weight"]
    old[same] = old[same.start].clone()
    checkpoint.save(path, state)

    rows = []
    for seed in (1, 2):
        finish([*SHORT, "--learning_rate=0", "--min_lr=0", f"--seed={seed}", f"--init_from={base}",
                f"--data_dir={data}", f"--out_dir={tmp_path}/{seed}"])
        rows.append(newest(tmp_path / str(seed))["model"]["wte.weight"])

    for new in rows:
        changed = (new != old).any(1)
        assert changed[same].all() and changed.sum() == 100
    assert not torch.equal(*rows)


def test_weights_are_drawn_by_the_seed(data, tmp_path):
    def weights(seed, name):
        finish([*SHORT, "--learning_rate=0", "--min_lr=0", f"--seed={seed}", f"--data_dir={data}",
                f"--out_dir={tmp_path}/{name}"])
        return newest(tmp_path / name)["model"]["wte.weight"]

    first = weights(1, "first")

    assert torch.equal(weights(1, "again"), first)
    assert not torch.equal(weights(2, "other"), first)


def test_the_fast_versions_are_chosen_for_what_will_be_compiled(data, tmp_path):
    """Without a word they would not be, and training would be slower. Nothing is compiled here."""
    def before():
        def use_fast(model, compiled):
            print(f"fast versions, compiled: {compiled}")
            return model
        GPT.use_fast = use_fast
        train.compile_for_training = lambda model, device: model
        inner = train.make_optimizer

        def make(model, s, compile, shard):
            print(f"optimizer, compiled: {compile}")
            return inner(model, s, compile, shard)
        train.make_optimizer = make

    for flags, compiled in (([], False), (["--compile"], True)):
        output = finish([*SHORT, *flags, f"--data_dir={data}", f"--out_dir={tmp_path}/{compiled}"],
                        before=before)
        assert f"fast versions, compiled: {compiled}\noptimizer, compiled: {compiled}\n" in output


def test_8_bits_need_16_tokens_in_all_the_windows_of_a_product(data, tmp_path):
    argv = [*SHORT, "--fp8", "--dtype=bfloat16", "--block_size=24", f"--data_dir={data}"]

    finish([*argv, "--batch_size=2", f"--out_dir={tmp_path}/out"])

    line = refused([*argv, "--batch_size=1", f"--out_dir={tmp_path}/other"])
    assert "multiples of 16: batch_size * block_size is 24" in line


def test_processes_that_see_different_checkpoints_are_refused(data, tmp_path):
    """As where out_dir is on a disk of each machine's own. They would train different weights."""
    argv = [*TINY, "--eval_interval=0", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--max_iters=10"])
    shutil.copytree(tmp_path / "out", tmp_path / "disk")
    os.remove(checkpoint.step_path(tmp_path / "disk", 10))

    def no_step():                               # where it is not noticed, they would wait for ever
        on_step(lambda step: os._exit(0))

    def other_disk():
        no_step()
        inner = run_folder.open_resumed

        def open_resumed(s, data):
            s.out_dir = str(tmp_path / "disk")
            return inner(s, data)
        run_folder.open_resumed = open_resumed

    children = ranks(2, [*argv, "--init_from=resume", "--max_iters=12"], [no_step, other_disk])

    assert [child.wait() for child in children] == [2, 2]
    assert "the processes see different checkpoints" in children[0].err
    assert newest(tmp_path / "out")["step"] == newest(tmp_path / "disk")["step"] + 5 == 10


def test_one_process_writes_for_all(data, tmp_path):
    """Others start no tracker, and print no window that is inspected."""
    def before():
        train.trackers.start = lambda *args: print("a tracker starts") or []
    argv = [*SHORT, f"--data_dir={data}"]

    training = ranks(2, [*argv, f"--out_dir={tmp_path}/out"], [before] * 2)
    inspecting = ranks(2, [*argv, "--inspect_step=0"])

    for children, word in ((training, "a tracker starts"), (inspecting, "--- window")):
        assert [child.wait() for child in children] == [0, 0]
        assert word in children[0].output and word not in children[1].output


def test_a_resumed_run_knows_the_best_loss_before_it(data, tmp_path):
    """Here one that is never reached again: best.pt stays."""
    argv = [*TINY, "--eval_interval=5", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--max_iters=5"])
    path = checkpoint.step_path(tmp_path / "out", 5)
    checkpoint.save(path, checkpoint.load(path) | {"best_val_loss": 0.0})

    finish([*argv, "--max_iters=15", "--init_from=resume"])

    assert checkpoint.best_step(tmp_path / "out") == 5
    assert newest(tmp_path / "out")["best_val_loss"] == 0
