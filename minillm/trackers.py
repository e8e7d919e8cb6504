"""Watching a run with TensorBoard, Weights & Biases or SwanLab: --tracker=tensorboard,wandb.

Each is a package of its own (pip install tensorboard, wandb or swanlab) and gets the numbers of
metrics.jsonl. A resumed run continues the same curves. W&B and SwanLab also work offline:
WANDB_MODE=offline, SWANLAB_MODE=offline. If a tracker fails during a run, one line reports it and
the training continues.
"""
import importlib.util
import os
from dataclasses import asdict

from minillm.distributed import print0
from minillm.errors import UserError


def names(s):
    """The trackers that the settings ask for, checked: known, and installed."""
    chosen = [name.strip() for name in s.tracker.split(",") if name.strip()]
    if s.wandb_log and "wandb" not in chosen:
        chosen.append("wandb")
    for name in chosen:
        if name not in TRACKERS:
            raise UserError(f"tracker={name!r} is not one of {', '.join(TRACKERS)}")
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:        # a folder of that name: W&B makes one
            raise UserError(f"tracker={name} needs the package {name}: pip install {name}")
    return list(dict.fromkeys(chosen))


def start(s, resumed, facts):
    """The trackers of a run. resumed: its checkpoint, or {}. UserError if one cannot start."""
    ids = {"wandb": resumed.get("wandb_id")}
    if isinstance(resumed.get("trackers"), dict):
        ids |= resumed["trackers"]
    config = asdict(s) | facts
    started = []
    for name in names(s):
        try:
            started.append(TRACKERS[name](s, ids.get(name), config, resumed.get("step", 0)))
        except (Exception, SystemExit) as error:     # what these packages raise is their own
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"tracker={name} cannot start: {reason}; "
                            f"{TRACKERS[name].advice}leave {name} out") from None
    return started


class _Tracker:
    """Common to all: a failure is reported once, and never ends the training.

    self.run takes the numbers, as W&B and SwanLab offer it.
    """
    id = None
    advice = ""
    failed = False

    def log(self, values, step):
        self._attempt(lambda: self._log(values, step))

    def close(self):
        self._attempt(self._close)

    def _log(self, values, step):
        self.run.log(values, step=step)

    def _close(self):
        self.run.finish()

    def _attempt(self, action):
        try:
            action()
        except Exception as error:                   # a full disk, a server that has gone
            if not self.failed:
                reason = " ".join(str(error).split())[:160]
                print0(f"{self.name} failed, training continues: {reason}")
            self.failed = True


class TensorBoard(_Tracker):
    """Event files in out_dir/tensorboard. View: tensorboard --logdir out"""
    name = "tensorboard"

    def __init__(self, s, run_id, config, step):
        # an optional package
        from torch.utils.tensorboard import SummaryWriter
        # what an earlier session wrote from this step on is hidden: it comes again
        self.writer = SummaryWriter(os.path.join(s.out_dir, "tensorboard"), purge_step=step)

    def _log(self, values, step):
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def _close(self):
        self.writer.close()


class WandB(_Tracker):
    name = "wandb"
    advice = "run `wandb login`, set WANDB_MODE=offline, or "

    def __init__(self, s, run_id, config, step):
        import wandb                                 # an optional package
        self.run = wandb.init(project=s.wandb_project, name=s.wandb_run_name or s.out_dir,
                              id=run_id, resume="allow", config=config)
        self.id = self.run.id


class SwanLab(_Tracker):
    name = "swanlab"
    advice = "run `swanlab login`, set SWANLAB_MODE=offline, or "

    def __init__(self, s, run_id, config, step):
        import swanlab                               # an optional package
        self.run = swanlab.init(project=s.wandb_project,
                                experiment_name=s.wandb_run_name or s.out_dir,
                                id=run_id, resume="allow", config=config)
        # swanlab 0.10 has run.id, earlier ones had run.public.run_id
        self.id = self.run.id if hasattr(self.run, "id") else self.run.public.run_id


TRACKERS = {tracker.name: tracker for tracker in (TensorBoard, WandB, SwanLab)}
