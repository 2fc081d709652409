#!/usr/bin/env bash
# A supervised run, then reinforcement from its end: launch/sft_then_rl.sh SCALE METHOD [key=value ...] [-- key=value ...]
# For example: launch/sft_then_rl.sh tiny rest_tuned -- seed=1 name=tuned-1
# Words before `--` go to both runs, words after it to the second alone. Run again, it resumes where it was stopped; a
# finished supervised run is kept, and shared by all methods with the same SCALE and output.
# A run that ends because another host was told to stop ends with 75, too. DRY_RUN=1 prints the commands.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 SCALE METHOD [key=value ...] [-- key=value ...]" >&2
  exit 2
fi
scale=$1 method=$2 output=runs
shift 2
shared=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in output=*) output=${1#output=} ;; esac
  shared+=("$1")
  shift
done
[ $# -eq 0 ] || shift

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/stage.bash
source "$here/stage.bash"

start=$scale-sft
run_stage sft "scale/${scale}_sft" method/sft "${shared[@]}" "name=$start"
# one command line gives a key one value: the last of these
words=("${shared[@]}" "name=$start-$method" "$@" "model.source=$output/$start")
given=()
for ((i = 0; i < ${#words[@]}; i++)); do
  case "$(printf ' %s' "${words[@]:i+1}")" in *" ${words[i]%%=*}="*) ;; *) given+=("${words[i]}") ;; esac
done
run_stage train "scale/$scale" "method/$method" "${given[@]}"
