"""A folder with a Chinese name, where the system's encoding is GBK."""
import os
import shutil
import subprocess
import sys

import pytest

from support import ROOT
from support.training_runs import TINY, make_data

SHORT = [*TINY, "--max_iters=6", "--eval_interval=3"]


def test_a_folder_with_a_chinese_name_under_gbk(tmp_path):
    """Its bytes on the disk are GBK: trained, read and sampled by a program whose names are GBK."""
    data = make_data(tmp_path / "data")
    code = ("import sys, importlib\n"
            "name = sys.argv.pop(1)\n"
            "sys.argv[0] = name + '.py'\n"
            "from minillm.errors import run\n"
            "run(importlib.import_module(name).main)\n")
    env = os.environ | {"LC_ALL": gbk_locale(tmp_path), "LOCPATH": str(tmp_path),
                        "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    folder = f"{tmp_path}/模型".encode("gbk")
    for argv in ([b"train", *map(str.encode, SHORT), f"--data_dir={data}".encode(),
                  b"--out_dir=" + folder], [b"sample", b"--out_dir=" + folder, b"--device=cpu"]):

        done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, env=env,
                              capture_output=True)

        assert done.returncode == 0, done.stderr.decode("gbk", "replace")
    assert b"ckpt_00000006.pt" in os.listdir(folder)


def gbk_locale(folder):
    """The name of a GBK locale, made below `folder`."""
    made = subprocess.run(["localedef", "-i", "zh_CN", "-f", "GBK", f"{folder}/zh_CN.GBK"],
                          capture_output=True) if shutil.which("localedef") else None
    if made is None or made.returncode > 1:
        pytest.skip("no GBK locale can be made here")
    return "zh_CN.GBK"
