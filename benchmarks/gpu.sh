#!/usr/bin/env bash
# Everything that only a GPU can say, in at most nine minutes and without a network: the tests of tests/cuda, the
# trainers' speeds, and a rehearsal of Llama-2-7b on its real sizes. Writes one JSON.
#
#   bash benchmarks/gpu.sh [gpu.json]
set -uo pipefail
output=$(realpath "${1:-gpu.json}")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
device=${SFC_TEST_DEVICE:-cuda}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export SFC_CACHE="$scratch/cache"

part() { # name, seconds, command …: its output and how it ended
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "== $name: $*" >&2
    timeout "$limit" "$@" >"$scratch/$name.out" 2>"$scratch/$name.err"
    echo "$? $((SECONDS - began))" >"$scratch/$name.ended"
    tail -n 3 "$scratch/$name.err" >&2
}

part tests 150 "$python" -m pytest tests/cuda -p no:cacheprovider
part trainers 150 "$python" benchmarks/sae_training.py --device "$device" --rounds 3 --burst 3 --steps 30 --seeds 1 --json
part rehearsal 230 "$python" benchmarks/rehearsal.py --preset llama2-7b-chat --device "$device" --layers 8 --sites 2 \
    --scale 0.005 --json

"$python" - "$scratch" "$output" <<'PYTHON'
import json, pathlib, sys
scratch, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
parts = {}
for name in ("tests", "trainers", "rehearsal"):
    status, seconds = map(int, (scratch / f"{name}.ended").read_text().split())
    lines = (scratch / f"{name}.out").read_text().splitlines() or [""]
    errors = (scratch / f"{name}.err").read_text().splitlines()
    figures = json.loads(lines[-1]) if lines[-1].startswith("{") else None
    parts[name] = {"status": status, "seconds": seconds, "figures": figures, "last_lines": (lines + errors)[-12:] if status else lines[-1:]}
output.write_text(json.dumps(parts, indent=1) + "\n")
print(output)
sys.exit(any(part["status"] for part in parts.values()))
PYTHON
