#!/usr/bin/env bash
# Fetch the corpora: seq-monkey (pretraining text, from modelscope) and Belle 3.5M (conversations, from hf-mirror).
#
#   scripts/download_data.sh                     both, into data/raw/
#   scripts/download_data.sh belle               one of them: seq-monkey or belle
#   scripts/download_data.sh seq-monkey --part   its first 800 MB (--part=MB: as many), unpacked
#   scripts/download_data.sh --huggingface       Belle from huggingface.co, where hf-mirror.com is not the nearer one
#   scripts/download_data.sh --out=/disk/raw     elsewhere
#
# A transfer that breaks goes on from where it broke, at once or when the script is started again. A file gets
# its name only when its size is what the server says; then its first records are read, to see that they parse.
# MODELSCOPE_ENDPOINT and HF_ENDPOINT name other servers; RETRIES and RETRY_DELAY (seconds) bound the patience
# with one that gives nothing at all.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
out=data/raw
modelscope=${MODELSCOPE_ENDPOINT:-https://www.modelscope.cn}
hf=${HF_ENDPOINT:-https://hf-mirror.com}
retries=${RETRIES:-20} delay=${RETRY_DELAY:-5}
wanted=() part_mb=

die() { printf 'download_data.sh: %s\n' "$*" >&2; exit 2; }

for argument in "$@"; do
    case $argument in
        --huggingface) hf=https://huggingface.co ;;
        --part) part_mb=800 ;;
        --part=[1-9]*) part_mb=${argument#--part=} ;;
        --out=?*) out=${argument#--out=} ;;
        seq-monkey | belle) wanted+=("$argument") ;;
        '#') break ;;                            # a comment, pasted into zsh, arrives here
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"; exit ;;
        *) die "unknown argument $argument: seq-monkey, belle, --part, --huggingface and --out=DIR are known" ;;
    esac
done
[ ${#wanted[@]} -gt 0 ] || wanted=(seq-monkey belle)
[[ $part_mb =~ ^[0-9]*$ ]] || die "--part=$part_mb is not a number of megabytes"
command -v curl >/dev/null || die "curl is needed"
python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || die "python3 is needed"
mkdir -p "$out" || die "cannot write to $out"

size_of() { if [ -e "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# The size of what is at a URL, or nothing. One byte is asked for by GET, since servers that redirect to a signed
# address refuse HEAD there; `head` hangs up on one that ignores the range and sends everything.
remote_size() {
    { curl -sSL --connect-timeout 30 --max-time 120 -r 0-0 -D - -o /dev/stderr "$1" 2> >(head -c 1 >/dev/null) || true; } |
        tr -d '\r' | awk 'tolower($1) ~ /^http\// { size = ""; ranged = ($2 == 206); ok = ($2 ~ /^2/) }
                          tolower($1) == "content-range:" && ranged { n = split($0, part, "/"); size = part[n] }
                          tolower($1) == "content-length:" && ok && !ranged { size = $2 }
                          END { if (size ~ /^[0-9]+$/) print size }'
}

# fetch URL FILE [BYTES]: the whole of it, or its first BYTES, however often the connection breaks
fetch() {
    local url=$1 file=$2 most=${3:-} part=$2.part size had have idle=0 status
    exec 9>"$part.lock"
    if command -v flock >/dev/null && ! flock -n 9; then die "another download of $file is under way"; fi
    while size=$(remote_size "$url"); [ -z "$size" ]; do
        idle=$((idle + 1))
        [ "$idle" -lt "$retries" ] || die "no answer with a size from $url: check the network; --help says how to name another server"
        echo "  no answer, trying again ($idle of $retries)"
        sleep "$delay"
    done
    if [ -n "$most" ] && [ "$most" -lt "$size" ]; then size=$most; fi
    have=$(size_of "$part")
    if [ "$have" -gt "$size" ]; then
        echo "  what was fetched before is larger than the file on the server: starting over"
        rm -f "$part"
        have=0
    fi
    local free
    free=$(($(df -Pk "$out" | awk 'NR == 2 { print $4 }') * 1024))
    [ "$free" -gt $((size - have)) ] || die "$out has $free bytes free, $((size - have)) more are needed for $file"
    idle=0
    while have=$(size_of "$part"); [ "$have" -lt "$size" ]; do
        [ "$have" = 0 ] || echo "  going on at byte $have of $size"
        had=$have status=0
        # a connection that gives less than 1 kB/s for a minute is taken for dead
        curl -fL -C "$have" --connect-timeout 30 --speed-limit 1000 --speed-time 60 --progress-bar "$url" |
            head -c $((size - have)) >>"$part" || status=$?
        if [ "$status" = 33 ] || [ "$status" = 36 ]; then
            echo "  the server cannot resume: starting over"
            rm -f "$part"
        fi
        if [ "$(size_of "$part")" -gt "$had" ]; then
            idle=0
        elif idle=$((idle + 1)); [ "$idle" -ge "$retries" ]; then
            die "$url gives nothing more (curl says $status); what is there stays in $part, so start again later"
        else
            sleep "$delay"
        fi
    done
    [ "$have" = "$size" ] || { rm -f "$part"; die "$file came out larger ($have) than it is ($size): start again"; }
    mv "$part" "$file"
    rm -f "$part.lock"
    exec 9>&-
}

# unpack ARCHIVE FILE: the whole lines of a tar.bz2 that may end in the middle
unpack() {
    "$python" - "$@" <<'END'
import sys, tarfile
archive, path = sys.argv[1:]
with tarfile.open(archive, "r|bz2") as tar, open(path + ".new", "wb") as file:
    member = next(member for member in tar if member.isfile())
    try:
        file.writelines(tar.extractfile(member))
    except (EOFError, tarfile.ReadError):
        pass                     # the part ends here; the line that it cuts is left out
END
    mv "$2.new" "$2"
}

# check KIND FILE: read its first records as the preparation will
check() {
    PYTHONPATH=$root "$python" - "$@" <<'END'
import itertools, sys
from minillm.errors import UserError
from minillm.report import Report
from minillm.text_files import Source
from minillm.text_reader import conversations, documents
kind, path = sys.argv[1:]
report = Report()
try:
    records = list(itertools.islice((documents if kind == "text" else conversations)(Source([path], report)), 3))
except UserError as error:
    sys.exit(f"  {error}")
if len(records) < 3:
    sys.exit("\n".join(["  it does not hold what it should", *report.lines()]))
for place, record in records:
    text = record if kind == "text" else " / ".join(message["content"] for message in record)
    print(f"  {' '.join(text[:60].split())} …")
END
}

part=$out/seq_monkey_part.jsonl          # what --part fetches; part.mb says how much that was
for name in "${wanted[@]}"; do
    case $name in
        seq-monkey) kind=text url=$modelscope/datasets/ddzhu123/seq-monkey/resolve/master/mobvoi_seq_monkey_general_open_corpus.jsonl.tar.bz2 ;;
        belle) kind=chats url=$hf/datasets/BelleGroup/train_3.5M_CN/resolve/main/train_3.5M_CN.json ;;
    esac
    file=$out/${url##*/}
    if [ "$name" = seq-monkey ] && [ -n "$part_mb" ]; then file=$part; fi
    if [ -e "$file" ]; then
        if [ "$file" = "$part" ] && [ "$(cat "$part.mb" 2>/dev/null || echo "$part_mb")" != "$part_mb" ]; then
            die "$file holds the first $(cat "$part.mb") MB, $part_mb asked for: remove it first"
        fi
        echo "$name: $file is there"
    else
        echo "$name: $url"
        if [ "$name" = seq-monkey ] && [ -n "$part_mb" ]; then
            fetch "$url" "$file.tar.bz2" $((part_mb * 1000000))
            echo "$part_mb" >"$file.mb"
            unpack "$file.tar.bz2" "$file"
            rm "$file.tar.bz2"
        else
            fetch "$url" "$file"
        fi
    fi
    if ! check "$kind" "$file"; then
        mv "$file" "$file.damaged"
        die "the first records of $file cannot be read; it is now $file.damaged: look at it, then start again"
    fi
    echo "  $(size_of "$file") bytes in $file"
done

text=$out/mobvoi_seq_monkey_general_open_corpus.jsonl.tar.bz2
[ -z "$part_mb" ] || text=$part
chats=$out/train_3.5M_CN.json
echo
echo "next:"
if [ -e "$text" ]; then
    printf '  python train_tokenizer.py %q\n' "$text"
    printf '  python prepare_pretrain.py %q\n' "$text"
fi
[ ! -e "$chats" ] || printf '  python prepare_sft.py %q\n' "$chats"
[ ! -e "$text" ] || echo "  python train.py config/pretrain.py"
[ ! -e "$chats" ] || echo "  python train.py config/sft.py"
