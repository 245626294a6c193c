#!/usr/bin/env bash
# What can only be checked on a GPU, in one call of at most eight minutes. It needs `python` and no network.
#
#   scripts/gpu_check.sh          # on a GPU; several cores help
#   scripts/gpu_check.sh --small  # the same parts at their smallest on a CPU, to try this script
#   scripts/gpu_check.sh loops train  # only these parts, also after --small
#   BENCHMARK=--compile PATIENCE=2 scripts/gpu_check.sh  # compiled steps are timed too, and deadlines are twice as long
#
# Each part has a deadline, and no part stops another. When a part ends it leaves PART.log, PART.status and, where it
# measured something, PART.json in $OUT, by default outputs/gpu_check. The exit status says whether all have passed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export OUT=${OUT:-outputs/gpu_check} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} NCCL_DEBUG=VERSION
export SMALL="" DEVICE=cuda EPOCHS=15 FLOOR=0.85 BENCHMARK=${BENCHMARK:-} PROCESSES=1 PATIENCE=${PATIENCE:-1}
export FSDP="accelerate.commands.launch --config_file scripts/accelerate/fsdp2_8gpu.yaml --num_processes 1"
if [ "${1:-}" = --small ]; then  # FSDP's configuration is for GPUs alone; a slow machine may take its time
  SMALL=--small DEVICE=cpu EPOCHS=1 FLOOR=0.05 BENCHMARK="--batch-sizes 1 --repeats 1" PROCESSES=2 PATIENCE=10
  FSDP="torch.distributed.run --standalone --nproc_per_node 2"
  shift
fi
PARTS=$* ALL="captions labels bf16 fp16 distributed sharded loops classify caption train"
for name in $PARTS; do
  [[ " $ALL " == *" $name "* ]] || { echo "There is no part $name. There are: $ALL" >&2; exit 2; }
done
mkdir -p "$OUT"
export WORK; WORK=$(mktemp -d); trap 'rm -rf "$WORK"' EXIT

# resume NAME PRECISION [MODULE ARGUMENTS]: trains until SIGTERM at the first checkpoint, and on by the same command
resume() {
  local folder=$WORK/$1 precision=$2; shift 2
  set -- python ${1:+-m "$@"} scripts/train.py scripts/recipes/digits.yaml --output-dir "$folder" \
    --set "training.num_train_epochs=$EPOCHS" "training.mixed_precision=$precision" \
    training.{save_steps=0.25,eval_strategy=no,logging_steps=1,ema_decay=0.9,report_to=none,disable_tqdm=true} \
    training.dataloader_num_workers=0 'evaluation.num_inference_steps=[10]' 'evaluation.guidance_scale=[1.0]'
  "$@" &
  until compgen -G "$folder/*/checkpoint-*/trainer_state.json"; do kill -0 $! && sleep 0.1 || return; done
  kill -TERM $!
  wait $! && echo "The training was not stopped." && return 1
  "$@" | tee "$folder.txt" && grep "Resuming from" "$folder.txt" && grep "on $DEVICE, $precision" "$folder.txt" &&
    judge "$folder" "$precision"
}

# judge FOLDER PRECISION: the accuracy, and the steps that were not finite. In fp16 the search for a scale has some
judge() {
  cp "$1/tdd-seed0/result.json" "$OUT/$(basename "$1").json"
  python - "$1/tdd-seed0" "$2" <<'PYTHON'
import json, os, sys
top1 = json.load(open(f"{sys.argv[1]}/result.json"))["scores"][-1]["top1"]
log = json.load(open(f"{sys.argv[1]}-training/trainer_state.json"))["log_history"]
skipped = max(line.get("skipped_steps", 0) for line in log)
print(f"top1 {top1}, {skipped} steps were not finite")
sys.exit(top1 < float(os.environ["FLOOR"]) or skipped > {"bf16": 0, "fp16": 10}[sys.argv[2]])
PYTHON
}

# shard: two epochs with sharded weights, which the program asserts, and three more from their checkpoint
shard() {
  for epochs in 2 5; do
    python -m $FSDP tests/tiny_training.py "$WORK/sharded" "{\"fsdp\": true, \"num_train_epochs\": $epochs}" || return
  done
}

# part NAME SECONDS COMMAND: runs a command, writes what it prints to NAME.log, and how it ended to NAME.status
part() {
  [[ -z $PARTS || " $PARTS " == *" $1 "* ]] || return 0
  local start=$SECONDS status=passed
  rm -f "$OUT/$1".{json,md}; echo "did not end" > "$OUT/$1.status"
  timeout --kill-after=5 $(($2 * PATIENCE)) bash -o pipefail -c "$3" > "$OUT/$1.log" 2>&1 || status="failed ($?)"
  echo "$status, $((SECONDS - start)) s" > "$OUT/$1.status"
}
# beside NAME SECONDS COMMAND: on a GPU at once with other parts, since small networks leave most of it idle
beside() { if [ $DEVICE = cuda ]; then part "$@" & else part "$@"; fi; }
export -f resume judge shard

beside captions 200 "python scripts/gpu_check.py captions --output $OUT/captions.json $SMALL"
beside labels 200 "python scripts/gpu_check.py labels --output $OUT/labels.json $SMALL"
beside bf16 200 "resume bf16 bf16"
beside fp16 200 "resume fp16 fp16"
distributed="resume distributed bf16 torch.distributed.run --standalone --nproc_per_node $PROCESSES"
[ $DEVICE = cpu ] || distributed+=" && grep -q 'NCCL version' $OUT/distributed.log"
beside distributed 200 "$distributed"
beside sharded 200 shard
wait
# One by one, since they are timed
rm -f "$OUT/others.txt"
[ $DEVICE = cpu ] || others=$(nvidia-smi --query-compute-apps=pid,name --format=csv,noheader)
[ -z "${others:-}" ] || echo "The GPU is not idle, and times are too long. It runs: $others" | tee "$OUT/others.txt"
part loops 60 "python scripts/gpu_check.py loops --output $OUT/loops.json $SMALL"
for benchmark in classify caption train; do
  [ $benchmark != train ] || BENCHMARK=${BENCHMARK/--compile/}  # which has no compiled job
  part $benchmark 65 "python scripts/benchmark.py $benchmark $BENCHMARK --output $OUT"
done

python -c "import torch; print('torch', torch.__version__)"; [ $DEVICE = cpu ] || nvidia-smi -L
(cd "$OUT" && grep . ./*.status) | sed 's/^..//; s/\.status:/\t/' | expand -t 16 | tee "$OUT/summary.txt"
! grep -Eq "failed|did not end" "$OUT/summary.txt"
