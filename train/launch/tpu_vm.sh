#!/bin/bash
# Run from a checkout: makes the TPU if it is not there, copies the last commit to all hosts and starts the run on them.
# DRY_RUN=1 prints the commands. The run is a service of the hosts: it outlives this shell, is started again when it
# fails (but not after code 2, which is for a person to mend), and saves when it is stopped or the host shuts down:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='sudo systemctl stop jattn'
set -euo pipefail
name=%%{name}
zone=%%{zone}
share=%%{share}
workdir=%%{workdir}
arguments=$(cat <<'ARGUMENTS'
%%{arguments}
ARGUMENTS
)

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@" </dev/null
  fi
}

on_all() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

state=MISSING
if [[ -z ${DRY_RUN:-} ]]; then
  state=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null) || state=MISSING
fi
if [[ $state == PREEMPTED || $state == TERMINATED ]]; then
  run gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet
  state=MISSING
fi
if [[ $state == MISSING ]]; then
  run gcloud compute tpus tpu-vm create "$name" --zone="$zone" \
    --accelerator-type=%%{accelerator_type} --version=%%{runtime} %%{spot}
fi

code=$(mktemp -d)
trap 'rm -r "$code"' EXIT
run git archive --format=tar.gz --output="$code/jattn.tar.gz" HEAD
run gcloud compute tpus tpu-vm scp "$code/jattn.tar.gz" "$name":jattn.tar.gz --zone="$zone" --worker=all
on_all "mkdir -p jattn && tar -xzf jattn.tar.gz -C jattn"
# Their Python is older than 3.12.
on_all "cd jattn && curl -LsSf https://astral.sh/uv/install.sh | sh && PATH=\$HOME/.local/bin:\$PATH && \
uv venv --quiet --allow-existing --python 3.12 .venv && \
uv pip install --quiet --constraint constraints.txt --editable '.[train,tpu]'"
on_all "sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/share && \
(mountpoint -q /mnt/share || sudo mount -t nfs $(printf %q "$share") /mnt/share) && \
sudo mkdir -p $(printf %q "$workdir") && sudo chown \"\$(id -u)\" $(printf %q "$workdir")"
on_all "sudo systemctl reset-failed jattn 2>/dev/null; systemctl is-active --quiet jattn || \
sudo systemd-run --unit=jattn --uid=\"\$(id -u)\" --property=WorkingDirectory=\"\$HOME/jattn\" \
--property=Restart=on-failure --property=RestartSec=10 --property=RestartPreventExitStatus=2 \
--property=TimeoutStopSec=120 \"\$HOME/jattn/.venv/bin/python\" -m train run $arguments"
run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command="sudo journalctl --follow --unit=jattn"
