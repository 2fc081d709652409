# shellcheck shell=bash
# For scripts that run one command of rest-jax after the other: source it, then `run_stage COMMAND ...`. A run that is told to
# stop saves and ends with 75, or with 0 after its last step; what comes after it must not begin then.
stopped='' child=''
trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
run_stage() {
  rest-jax "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child"
  [ -z "$stopped" ] || exit 75
}
