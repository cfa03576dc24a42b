#!/bin/bash
# Trains a recipe on the GPUs of this machine, or of several, without a scheduler.
#
#   recipes/torchrun.sh pixelsnail_gpu --data.root /path/to/data
#   NODES=2 RANK=0 ADDRESS=node0 recipes/torchrun.sh pixelsnail_gpu --data.root /path/to/data   # on node0
#   NODES=2 RANK=1 ADDRESS=node0 recipes/torchrun.sh pixelsnail_gpu --data.root /path/to/data   # on node1
#
# The first argument is the name of a recipe, or a file; what follows are options of `genmodels fit`. PROCESSES is the
# number of processes on each node: by default one for each GPU.
set -euo pipefail

exec torchrun --nnodes="${NODES:-1}" --node-rank="${RANK:-0}" --nproc-per-node="${PROCESSES:-gpu}" \
    --master-addr="${ADDRESS:-127.0.0.1}" --master-port="${PORT:-29500}" \
    "$(command -v genmodels)" fit --config "$1" --ckpt_path auto "${@:2}"
