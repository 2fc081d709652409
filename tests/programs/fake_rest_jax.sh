#!/usr/bin/env bash
# Stands in for rest-jax: writes its words to $LOG, takes $SECONDS_EACH, saves on SIGTERM, and ends with the code in $CODE.
echo "$@" >> "$LOG"
trap 'echo saved >> "$LOG"; exit 0' TERM
for _ in $(seq 20); do sleep "$(echo "$SECONDS_EACH" | awk '{print $1 / 20}')"; done
exit "$CODE"
