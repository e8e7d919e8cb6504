"""What a corpus may come as: folders, compressed files, tars, parquet; whole, or cut short."""
import io
import os
import shutil
import sys
import tarfile

import pytest

from minillm.errors import UserError
from minillm.report import Report
from minillm.text_files import Source, batches_of
from minillm.text_reader import conversations
from support.preparation_runs import chats, refused, text_line, texts, write_texts
from support.reading import Found, compress, places, read, tar

A, B = text_line("甲乙"), text_line("丙丁")
COMPRESSED = ["gz", "bz2", "xz", "zst"]


# ---- folders

def test_a_folder_is_its_files_in_the_order_of_their_paths(tmp_path):
    for name in ("b/c.jsonl", "a.json", "b/d.ndjson"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_texts(tmp_path / name, [name])
    (tmp_path / "a2.txt").write_text("a2.txt")

    assert read(tmp_path).items == ["a.json", "a2.txt", "b/c.jsonl", "b/d.ndjson"]


def test_hidden_files_and_unknown_kinds_are_not_read(tmp_path):
    for name in (".ipynb_checkpoints/a.jsonl", ".b.jsonl", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_texts(tmp_path / name, [name])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")

    assert read(tmp_path).items == ["c.jsonl"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "txt.gz", "parquet"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")

    with pytest.raises(UserError, match=f"a.{suffix} is a pointer of Git LFS.*git lfs pull"):
        read(tmp_path)


def test_files_of_another_kind_are_counted(small_corpus, tmp_path):
    """In a folder and in a tar: how many of each, and the first."""
    raw = tmp_path / "raw"
    (raw / "more").mkdir(parents=True)
    write_texts(raw / "a.jsonl", texts(30))
    for name in ("b.csv", "c.CSV", "d.jsonl.lz4", "LICENSE", "more/.hidden.csv"):
        (raw / name).write_bytes(b"x")
    (raw / "z.tar").write_bytes(tar({"b.jsonl": A, "inner.tar": tar({}), "e.csv": b"x"}))

    output, made = small_corpus.pretrain(tmp_path / "p", files=[raw])

    assert (f"  left out: 6 files (no suffix 1, .csv 3, .lz4 1, .tar 1; "
            f"the first: {raw}/LICENSE)") in output.splitlines()
    assert made["other_files"] == {
        "no suffix": {"count": 1, "first": f"{raw}/LICENSE"},
        ".csv": {"count": 3, "first": f"{raw}/b.csv"},
        ".lz4": {"count": 1, "first": f"{raw}/d.jsonl.lz4"},
        ".tar": {"count": 1, "first": f"{raw}/z.tar/inner.tar"},
    }


def test_a_link_in_a_tar_is_counted(tmp_path):
    buffer, link = io.BytesIO(), tarfile.TarInfo("b.jsonl")
    link.type, link.linkname = tarfile.SYMTYPE, "elsewhere/b.jsonl"
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty.jsonl"))
        archive.addfile(link)
    (tmp_path / "c.tar").write_bytes(buffer.getvalue())

    _, report = places(tmp_path / "c.tar")

    assert report.other_files == {"link": {"count": 1, "first": f"{tmp_path}/c.tar/b.jsonl"}}


def test_texts_beside_conversations_are_counted(small_corpus, tmp_path):
    """README.txt of a dataset; one that was named, or that is all there is, is a mistake."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "README.txt").write_text("about")
    argv = small_corpus.argv(tmp_path / "s", [folder], "--val_fraction=0")
    assert "not as .txt" in refused("prepare_sft", *argv)
    shutil.copy(small_corpus.folder / "chats.jsonl", folder)

    output, made = small_corpus.sft(tmp_path / "s", files=[folder])

    assert "left out: 1 file (.txt 1; the first: " in output
    assert made["splits"]["train"]["documents"] > 50
    named = small_corpus.argv(tmp_path / "t", [folder, folder / "README.txt"])
    assert "not as .txt" in refused("prepare_sft", *named)


def test_links_to_folders_are_followed_and_none_is_read_twice(tmp_path):
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    for name in ("raw/real/a.jsonl", "elsewhere/deep/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_texts(tmp_path / name, [name])
    (raw / "there").symlink_to(elsewhere)
    (raw / "again").symlink_to(elsewhere / "deep")
    (raw / "twice").symlink_to(raw / "real")
    (raw / "real" / "loop").symlink_to(raw)
    (elsewhere / "loop").symlink_to(elsewhere)

    assert read(raw).items == ["elsewhere/deep/b.jsonl", "raw/real/a.jsonl"]


def test_a_file_and_links_to_it_are_read_once(tmp_path):
    """The links are counted; of several to a file elsewhere, the first is read."""
    raw = tmp_path / "raw"
    raw.mkdir()
    write_texts(raw / "file.jsonl", ["甲"])
    write_texts(tmp_path / "blob", ["乙"])
    (raw / "before.txt").symlink_to("file.jsonl")
    (raw / "z.jsonl").symlink_to(raw / "before.txt")
    (raw / "link1.jsonl").symlink_to(tmp_path / "blob")
    (raw / "link2.jsonl").symlink_to(tmp_path / "blob")

    found, report = places(raw)

    assert found == [f"{raw}/file.jsonl:1", f"{raw}/link1.jsonl:1"]
    assert report.other_files == {"link": {"count": 3, "first": f"{raw}/before.txt"}}


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    """By its own name, by another one for it, and by its folder; the report says so."""
    for name in ("a.jsonl", "b.jsonl"):
        write_texts(tmp_path / name, [name])
    report = Report()

    source = Source([f"{tmp_path}/b.jsonl", f"{tmp_path}", f"{tmp_path}/./b.jsonl"], report)

    assert source.files == [f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"]
    assert report.other_files == {
        "named twice": {"count": 2, "first": f"{tmp_path}/b.jsonl"}}


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    write_texts(tmp_path / "a.jsonl", ["甲"])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)

    with pytest.raises(UserError, match="cannot read .*closed: Permission denied"):
        read(tmp_path)


class Watched(Source):
    """Notes every position that the thread of a progress bar could see."""

    def __init__(self, *args):
        self.positions = []
        super().__init__(*args)

    def __setattr__(self, name, value):
        if name == "position":
            self.positions.append(value)
        super().__setattr__(name, value)


def test_the_position_goes_forward_to_the_size_of_all(tmp_path):
    for number in range(100):
        (tmp_path / f"{number:03}.jsonl").write_bytes(A * 3)
    source = Watched([str(tmp_path)], Report())

    blocks = list(source.blocks(len(A)))

    assert source.positions == sorted(source.positions)
    assert source.positions[0] == 0 and source.positions[-1] == source.size
    assert len(blocks) >= 100 and len(set(source.positions)) >= 100


def test_the_position_moves_inside_a_file(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(A * 50_000)
    source = Watched([str(tmp_path)], Report())

    blocks = list(source.blocks(1 << 16))

    assert len(blocks) > 10 and len(set(source.positions)) >= 5


def test_small_files_are_encoded_together(tmp_path):
    """Nothing but the calls changes: all blocks come, in their order."""
    for number in range(100):
        suffix = ("txt", "json", "jsonl")[number % 3]
        (tmp_path / f"{number:03}.{suffix}").write_bytes(A)
    blocks = list(Source([str(tmp_path)], Report()).blocks())

    batches = list(batches_of(blocks, 20 * len(A)))

    assert [block for batch in batches for block in batch] == blocks and len(blocks) == 100
    sizes = [sum(block.size for block in batch) for batch in batches]
    assert all(size >= 10 * len(A) for size in sizes[:-1]) and len(batches) > 5


def test_a_damaged_file_does_not_hide_what_was_read_before(tmp_path):
    (tmp_path / "a.txt").write_bytes(A)
    (tmp_path / "b.txt.gz").write_bytes(compress("gz", A)[:-9])
    batches = batches_of(Source([str(tmp_path)], Report()).blocks(), 1 << 20)

    [block] = next(batches)

    assert block.name.endswith("a.txt")
    with pytest.raises(UserError, match="b.txt.gz is damaged"):
        next(batches)


# ---- compressed

@pytest.mark.parametrize("suffix", COMPRESSED)
def test_streams_one_after_the_other(tmp_path, suffix):
    """What pbzip2, pigz and `cat a.gz b.gz` make."""
    path = tmp_path / f"c.jsonl.{suffix}"
    path.write_bytes(compress(suffix, A[:5]) + compress(suffix, A[5:] + B))

    assert read(path).items == ["甲乙", "丙丁"]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compression_is_told_by_the_bytes(tmp_path, suffix):
    (tmp_path / "compressed.jsonl").write_bytes(compress(suffix, A + B))
    (tmp_path / f"plain.jsonl.{suffix}").write_bytes(A + B)

    assert read(tmp_path / "compressed.jsonl").items == ["甲乙", "丙丁"]
    assert read(tmp_path / f"plain.jsonl.{suffix}").items == ["甲乙", "丙丁"]


MEMBERS = {
    "corpus/mobvoi_seq_monkey_general_open_corpus.jsonl": A + B,
    "corpus/._x.jsonl": b"\x00\x05\x16\x07",
    "README.md": b"# read me",
    "corpus/more.jsonl.gz": compress("gz", text_line("戊")),
    "z.txt": "己\r\n".encode(),
}


TARS = {"tar": "", "tar.bz2": "bz2", "tar.gz": "gz", "tgz": "gz", "tar.xz": "xz", "tar.zst": "zst"}


@pytest.mark.parametrize("suffix", TARS)
def test_tar_as_downloaded(tmp_path, suffix):
    path = tmp_path / f"corpus.{suffix}"
    path.write_bytes(compress(TARS[suffix], tar(MEMBERS)))

    assert read(path) == Found(["甲乙", "丙丁", "戊", "己\n"], {}, {"CRLF line end made LF": 1})
    found, _ = places(path)
    assert found[1] == f"{path}/corpus/mobvoi_seq_monkey_general_open_corpus.jsonl:2"


CUT_SHORT = ["jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "tar.bz2", "tar.gz", "tar"]


@pytest.mark.parametrize("suffix", CUT_SHORT)
def test_a_file_cut_short_is_an_error(small_corpus, tmp_path, suffix):
    """A broken download is not taken for a small corpus."""
    kind, _, compression = suffix.partition(".")
    content = b"".join(map(text_line, texts(3000)))
    if kind == "tar":
        content = tar({"c.jsonl": content})
    whole, path = compress(compression, content), tmp_path / f"c.{suffix}"
    path.write_bytes(whole)
    assert len(read(path).items) == 3000

    for share in (0.1, 0.5, 0.98):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="damaged or cut short.*fetch it again"):
            read(path)

    line = refused("prepare_pretrain", *small_corpus.argv(tmp_path / "o", [path]))
    assert "fetch it again" in line and os.listdir(tmp_path) == [path.name]


# ---- parquet, and packages that are not there

def write_parquet(path, columns, **options):
    table = pytest.importorskip("pyarrow").table(columns)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, **options)


def test_parquet_of_texts(tmp_path):
    (tmp_path / "p").mkdir()
    for number, items in enumerate((texts(250), texts(250, 250))):
        write_parquet(tmp_path / "p" / f"{number}.parquet", {"text": items}, row_group_size=100)

    assert read(tmp_path / "p").items == texts(500)


def test_parquet_of_conversations(tmp_path):
    path = tmp_path / "c.parquet"
    write_parquet(path, {"messages": chats(30), "tools": [None] * 30})

    assert read(path, conversations) == Found(chats(30))


def test_parquet_cut_short(tmp_path):
    path = tmp_path / "c.parquet"
    write_parquet(path, {"text": texts(30)})
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(UserError, match="damaged or cut short"):
        read(path)


def hide_packages():
    sys.modules.update({"pyarrow": None, "compression": None, "backports": None})


@pytest.mark.parametrize("name, package", [("c.parquet", "pyarrow"),
                                           ("c.jsonl.zst", "backports.zstd")])
def test_a_missing_package_is_named(small_corpus, tmp_path, name, package):
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    argv = small_corpus.argv(tmp_path / "o", [tmp_path / name])

    assert f"pip install {package}" in refused("prepare_sft", *argv, before=hide_packages)
