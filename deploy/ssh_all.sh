#!/usr/bin/env bash
# Runs a command on all hosts of a managed instance group at the same time; each line of the output
# begins with the name of its host. The other API has this built in (tpu-vm ssh --worker=all).
#
#   PROJECT=… ZONE=… NAME=GROUP deploy/ssh_all.sh COMMAND
set -euo pipefail

if [ "$#" -ne 1 ] || [ -z "${PROJECT:-}" ] || [ -z "${ZONE:-}" ] || [ -z "${NAME:-}" ]; then
  echo "usage: PROJECT=PROJECT ZONE=ZONE NAME=GROUP $0 COMMAND" >&2
  exit 2
fi
where=(--project="$PROJECT" --zone="$ZONE")
hosts=$(gcloud compute instance-groups managed list-instances "$NAME" "${where[@]}" --format='value(name)')
if [ -z "$hosts" ]; then
  echo "NAME=$NAME: the managed instance group has no hosts yet; try again later" >&2
  exit 1
fi

pids=()
for host in $hosts; do
  (gcloud compute ssh "$host" "${where[@]}" --command="$1" < /dev/null 2>&1 | sed -u "s/^/$host: /") &
  pids+=("$!")
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
