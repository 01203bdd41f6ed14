# The toy's settings: iterate.sh reads them when no path is set. A file of your own: `set -a; . my.sh; bash iterate.sh`.
# shellcheck shell=bash disable=SC2034,SC2154 # iterate.sh has set $here and reads what is set here
case $METHOD in
  raft) : "${OUT:=runs/toy}" && toy_flags="--learning_rate 1e-3" ;;
  csft) toy_flags="--learning_rate 3e-3 --max_epochs 4" ;;
  *) toy_flags="--learning_rate 2e-4" ;;
esac
toy=${OUT:=runs/toy_$METHOD}/toy
make_toy=(python "$here/examples/toy.py" --out "$toy")
[[ $METHOD != distill ]] || make_toy+=(--teacher)
truth=(--score_fn "$here/examples/toy.py:true_score")
POLICY_MODEL_PATH=$toy/policy RM_MODEL_PATH=$toy/rm TEACHER_MODEL_PATH=$toy/teacher
PROMPT_DATASET=$toy/prompts.jsonl SFT_DATASET=$toy/sft.jsonl
BF16=0
GENERATE_FLAGS="--input_key prompt --max_new_tokens 64 --prompt_max_len 64 $GENERATE_FLAGS"
TRAIN_FLAGS="--max_len 160 --train_batch_size 32 --micro_train_batch_size 32 $toy_flags $TRAIN_FLAGS"
