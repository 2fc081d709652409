# shellcheck shell=bash
# For launchers: `run COMMAND ...` runs it, or prints it under DRY_RUN=1.
run() {
  if [ -z "${DRY_RUN:-}" ]; then "$@"; else (PS4=''; set -x; : "$@") 2>&1 | sed '1s/^: //'; fi
}
