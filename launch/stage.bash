# shellcheck shell=bash
# For scripts that run one command of rest-jax after the other: source it, then `run_stage COMMAND ...`. A run that is told to
# stop saves and ends with 75, or with 0 after its last step; what comes after it must not begin then. `run COMMAND ...` (run.bash) is
# for other commands. Under DRY_RUN=1 both print and run nothing.
stopped='' child=''
trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
# shellcheck source=launch/run.bash
source "${BASH_SOURCE[0]%/*}/run.bash"
run_stage() {
  if [ -n "${DRY_RUN:-}" ]; then
    run rest-jax "$@"
    return
  fi
  rest-jax "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child"
  [ -z "$stopped" ] || exit 75
}
