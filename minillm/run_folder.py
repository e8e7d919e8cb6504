"""out_dir, the folder of a run: lock, config.py, tokenizer, and whether a run may resume.

    out_dir/ckpt_00001000.pt, best.pt    see checkpoint.py
    out_dir/tokenizer/                   a copy, so that the folder opens on its own
    out_dir/config.py                    the settings, as a config file that train.py takes
    out_dir/metrics.jsonl                one record per logged step, see run_log.py

Nothing in out_dir changes before the first step of a run is done: a run that cannot start leaves
the one before it as it was. What does not fit together (shape, tokenizer, data, order of the data)
is refused with one line that names the difference. One process at a time writes to an out_dir.
"""
import ast
import math
import os
import re
import shutil
from dataclasses import asdict

from minillm import checkpoint
from minillm.atomic_folder import hold, refuse_strangers
from minillm.configurator import field_comments
from minillm.distributed import launch_id, print0
from minillm.errors import UserError
from minillm.run_tokenizer import copy_tokenizer
from minillm.token_files import fingerprint

NOT_SAVED = ("overwrite", "inspect_step", "allow_other_data", "checkpoint")     # in config.py
MADE_OF_A_RUN = ("hf", "gguf", "loss.png", "load.png")  # by export.py and scripts/plot.py
# settings that a resumed run takes from its checkpoint unless the command gives them; and their
# values in a checkpoint that is older than the setting
KEPT = {"keep_checkpoints": 2, "keep_every": 0, "optimizer": "adamw", "doc_mask": False}
DECIDES_VALIDATION = ("data", "block_size", "batch_size", "eval_iters", "doc_mask")


# ---- may a run start or resume here

def data_identity(s, data):
    """What must not change between a checkpoint and its resumption: the data, and their order."""
    return {"data": fingerprint(data.meta), "seed": s.seed, "block_size": s.block_size,
            "windows in a step": s.batch_size * s.gradient_accumulation_steps}


def open_resumed(s, data):
    """The checkpoint of out_dir to resume from, or None to start a new run.

    With init_from=resume it is the newest whole one, or that of the step in `checkpoint`; settings
    in KEPT that the command does not give are taken from it. Raises UserError if the run may not
    start or resume.
    """
    if s.overwrite and s.init_from == "resume":
        raise UserError("--init_from=resume continues a run, --overwrite=True starts over: "
                        "leave one of them out")
    # torchrun --max-restarts starts the same command again: that time it resumes what this
    # launch has saved
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") not in ("", "0")
    steps = checkpoint.saved_steps(s.out_dir)
    resumed = None
    if restarted and steps:
        newest = _load_to_resume(s, steps, "newest")
        if newest["settings"].get("job") == launch_id():
            resumed, s.checkpoint = newest, "newest"     # it does not roll back a second time
    if resumed is None and s.init_from == "resume":
        resumed = _load_to_resume(s, steps, s.checkpoint)
    if resumed is None:
        if steps and not s.overwrite:
            raise UserError(f"{s.out_dir} already holds a run at step {steps[0]}: "
                            "--init_from=resume continues it, --overwrite=True starts over")
        if not steps:
            _check_new(s.out_dir)
        return None
    for key, default in KEPT.items():
        if key not in s.given:
            value = resumed["settings"].get(key)
            setattr(s, key, value if type(value) is type(default) else default)
    _check_identity(s, data, resumed)
    _report_changes(s, resumed)
    return resumed


def _check_new(folder):
    """Raise UserError if `folder` holds other things than what a run left that saved nothing."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    strangers = sorted(name for name in names if not name.startswith(".")
                       and not name.endswith(".log"))       # of the shell that starts the run
    if not {".lock", "metrics.jsonl", "best.pt"}.intersection(names):
        refuse_strangers(folder, strangers, "--out_dir")


def _load_to_resume(s, steps, which):
    keys = checkpoint.MODEL_KEYS | checkpoint.RESUME_KEYS
    if which == "best":
        raise UserError("checkpoint=best holds weights alone, which nothing can resume from: "
                        f"--init_from={s.out_dir} --checkpoint=best --out_dir=NEW starts from them")
    if not steps:
        raise UserError(f"no checkpoint in {s.out_dir}: nothing to resume")
    if which != "newest":
        return checkpoint.load_first(checkpoint.paths_of(s.out_dir, which), keys)
    paths = [checkpoint.step_path(s.out_dir, step) for step in steps]
    try:
        return checkpoint.load_first(paths, keys, print0)
    except checkpoint.Damaged as error:
        print0(str(error))
        raise UserError(f"every checkpoint in {s.out_dir} is damaged: "
                        "--overwrite=True starts over") from None


def check_tokenizer(start, data):
    """Raise UserError if a checkpoint and the data are not of the same tokenizer."""
    if start["tokenizer_hash"] != data.meta["tokenizer_hash"]:
        beside = os.path.join(os.path.dirname(start["path"]), "tokenizer")
        folder = start.get("tokenizer_dir", beside)
        raise UserError(f"{data.folder} was prepared with another tokenizer than {start['path']} "
                        f"was trained with: prepare the data with --tokenizer={folder}")


def fill_in(s, config, meta):
    """Make the settings state the model's shape. A 0 stays where it stands for the same number."""
    stands_for = {"n_inner": 4 * config.n_embd, "vocab_size": meta["vocab_size"]}
    for key, value in asdict(config).items():
        # None: somebody's new field of GPTConfig that is no setting
        if getattr(s, key, None) != 0 or stands_for.get(key) != value:
            setattr(s, key, value)
    if s.doc_mask is None:                       # rows of SFT data hold several conversations
        s.doc_mask = meta["kind"] == "sft"
        print0(f"doc_mask={s.doc_mask}, because {s.data_dir} holds {meta['kind']} data")


def _check_identity(s, data, resumed):
    """Raise UserError for other data than the checkpoint's; forget a best loss of other windows."""
    for key, value in data_identity(s, data).items():
        old = resumed["identity"].get(key)
        if old == value or s.allow_other_data:
            continue
        if key == "data":
            raise UserError(_other_data(s, resumed["settings"].get("data_dir")))
        raise UserError(f"the checkpoint in {s.out_dir} was trained with {key} {old}, "
                        f"now it is {value}: put {s.out_dir}/config.py before your flags, or add "
                        "--allow_other_data=True")
    old, now = KEPT | resumed["settings"] | resumed["identity"], asdict(s) | data_identity(s, data)
    if any(old.get(key) != now[key] for key in DECIDES_VALIDATION):
        resumed["best_val_loss"] = math.inf      # of other windows or masks: not comparable
    if checkpoint.best_step(s.out_dir) > resumed["step"]:
        resumed["best_val_loss"] = math.inf      # best.pt will be set aside with what is newer


def _other_data(s, folder):
    """What to say of data that are not those of the checkpoint, which were in `folder`."""
    anyway = "--allow_other_data=True resumes with the new data"
    if not isinstance(folder, str) or os.path.realpath(folder) == os.path.realpath(s.data_dir):
        return (f"{s.data_dir} was prepared again, and differs from what the checkpoint in "
                f"{s.out_dir} was trained on: prepare it as before, or {anyway}")
    return (f"{s.data_dir} is not what the checkpoint in {s.out_dir} was trained on, which was "
            f"{folder}: give --data_dir={folder}, or {anyway}")


def _report_changes(s, resumed):
    # the shape comes from the checkpoint; another optimizer is refused where its state is read
    skip = {*NOT_SAVED, "init_from", "data_dir", "out_dir", "tokenizer", "wandb_log", "optimizer"}
    skip |= resumed["model_config"].keys() - {"block_size", "dropout"}
    changed = []
    for key, value in asdict(s).items():
        old = resumed["settings"].get(key, "not there")
        # a setting newer than the checkpoint, unless it is 0, False or empty
        if key not in skip and old != value and (value or key in resumed["settings"]):
            changed.append(f"{key} {old!r} → {value!r}")
    if changed:
        print0(f"changed since the checkpoint: {', '.join(changed)}")


# ---- the folder itself

def lock(folder):
    """Make `folder` if need be and hold it until this process ends. Returns the lock to keep.

    Raises UserError if another run is at work in it, or if it cannot be written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir={folder!r} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"no permission to write to {folder}")
    return hold(os.path.join(folder, ".lock"), f"another run is at work in {folder}")


def lock_existing(folder):
    """lock() if `folder` holds a run, so that no other process writes before this one resumes."""
    return lock(folder) if checkpoint.saved_steps(folder) else None


def lock_for_writing(s):
    """lock() of out_dir, for a run that is about to begin there.

    Raises UserError if another run has begun and ended there since open_resumed() looked.
    """
    held = lock(s.out_dir)
    steps = checkpoint.saved_steps(s.out_dir)
    if steps and s.init_from != "resume" and not s.overwrite:
        raise UserError(f"another run has reached step {steps[0]} in {s.out_dir} meanwhile: "
                        "choose another --out_dir")
    return held


def begin(s, log, resumed_at, tokenizer, facts):
    """Make out_dir this run's own, and let `log` write there, once the first step is done.

    resumed_at: a step, or None for a new run, which removes the files of an older one.
    """
    try:
        _remove_temporary(s.out_dir)
        if resumed_at is None:
            _remove_older_run(s.out_dir)
        else:
            _set_aside_newer(s.out_dir, resumed_at, rolled_back=s.checkpoint != "newest")
        copy_tokenizer(tokenizer, s.out_dir)
        if resumed_at is None or resumed_at < s.steps:   # else nothing is trained with these
            write_settings(s.out_dir, s, facts)
        log.begin()
    except OSError as error:
        path = error.filename2 or error.filename
        raise UserError(f"cannot write to {s.out_dir}: {path}: {error.strerror}") from None


def _remove_older_run(folder):
    """Remove its checkpoints and results; what was made of its model is named, and stays."""
    old = [checkpoint.step_path(folder, step) for step in checkpoint.saved_steps(folder)]
    for path in (*old, checkpoint.best_path(folder), os.path.join(folder, "eval.json")):
        checkpoint.remove(path)
    left = [name for name in MADE_OF_A_RUN if os.path.exists(os.path.join(folder, name))]
    if left:
        print0(f"{folder} still holds {', '.join(left)} of the model before this one")


def _remove_temporary(folder):
    """Remove what a killed run left half-written."""
    for name in os.listdir(folder):
        if re.fullmatch(r"((ckpt_\d+|best)\.pt|config\.py|metrics\.jsonl)\.tmp", name):
            checkpoint.remove(os.path.join(folder, name))
    shutil.rmtree(os.path.join(folder, "tokenizer.tmp"), ignore_errors=True)


def _set_aside_newer(folder, step, rolled_back):
    """Rename the checkpoints after `step`: under their own names they would count as the newest."""
    newer = [checkpoint.step_path(folder, at) for at in checkpoint.saved_steps(folder) if at > step]
    for path in newer:
        os.replace(path, path + (".rolled_back" if rolled_back else ".damaged"))
    if checkpoint.best_step(folder) > step:
        os.replace(checkpoint.best_path(folder), checkpoint.best_path(folder) + ".rolled_back")


def save(path, state, s):
    """Write a checkpoint and remove old ones. Returns False after a failure, which is reported."""
    try:
        checkpoint.save(path, state)
        prune(s.out_dir, s.keep_checkpoints, s.keep_every)
        return True
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        print0(f"could not save {path}: {reason}; the checkpoints before it are untouched, "
               "training continues")
        return False


def prune(folder, keep, keep_every=0):
    """Remove all but the newest `keep` checkpoints and those at multiples of `keep_every`."""
    for step in checkpoint.saved_steps(folder)[keep:]:
        if not keep_every or step % keep_every:
            checkpoint.remove(checkpoint.step_path(folder, step))


# ---- config.py

def read_settings(folder, **needed):
    """The settings of the run that left `folder`, a dict, from its config.py. Nothing is executed.

    needed: keys and their types. UserError if the file cannot be read, or lacks one of them.
    """
    path = os.path.join(folder, "config.py")
    try:
        with open(path, encoding="utf-8-sig") as file:
            tree = ast.parse(file.read())
        settings = {node.targets[0].id: ast.literal_eval(node.value)
                    for node in tree.body if isinstance(node, ast.Assign)}
    except (OSError, SyntaxError, ValueError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from None
    if missing := needed.keys() - settings.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: it is not what train.py wrote")
    for key, kind in needed.items():
        if type(settings[key]) is not kind:
            raise UserError(f"{path} has {key} = {settings[key]!r}, which is not of type "
                            f"{kind.__name__}: it is not what train.py wrote")
    return settings


def write_settings(folder, settings, facts):
    """Write config.py: what was asked, as a config file, and what came of it, as comments."""
    comments, path = field_comments(type(settings)), os.path.join(folder, "config.py")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        for key, value in asdict(settings).items():
            if key not in NOT_SAVED:
                file.write(f"{key} = {value!r}  # {comments.get(key, '')}\n")
        file.write("\n# what came of it\n")
        for key, value in facts.items():
            file.write(f"# {key}: {value}\n")
    os.replace(path + ".tmp", path)
