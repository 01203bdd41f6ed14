#!/usr/bin/env bash
# Generate -> score -> train, again and again. Every stage is a process of its own; its files lie in OUT/iter_k, never
# overwritten. The same command again continues where it stopped; a changed one stops and says what changed.
#
#   bash iterate.sh                                  # the toy: a tiny policy, reward model and prompts, no download
#   POLICY_MODEL_PATH=Qwen/Qwen2.5-0.5B-Instruct RM_MODEL_PATH=./my-rm PROMPT_DATASET=prompts.jsonl NUM_GPUS=8 \
#   GENERATE_FLAGS="--input_key prompt --apply_chat_template --dp_size 8" TRAIN_FLAGS="--zero_stage 3" bash iterate.sh
#
# METHOD=raft (arXiv:2304.06767): the best of n samples of each prompt become the rows that sft.py trains on.
# METHOD=iter_dpo (arXiv:2405.07863): the best against the worst of n samples become the pairs that dpo.py trains on.
# METHOD=distill (arXiv:2306.13649): kd.py moves the policy towards a teacher on the policy's own samples.
# METHOD=csft: SFT rows carry their own reward in the prompt; afterwards the policy is asked for several rewards.
# N iterations leave N + 1 measurements of the policy's own samples: iter_0 is the start policy, iter_N the last.
set -euo pipefail

# --- settings: environment variables
: "${METHOD:=raft}"
: "${OUT:=}"                # default: runs/METHOD; the toy: runs/toy[_METHOD]
: "${POLICY_MODEL_PATH:=}"  # where the loop starts: a folder or a hub name
: "${RM_MODEL_PATH:=}"      # the reward model; not needed with --reward_fn in RM_FLAGS, nor by distill
: "${PROMPT_DATASET:=}"     # the prompts, as batch_infer.py --dataset takes them
: "${TEACHER_MODEL_PATH:=}" # distill: the teacher
: "${SFT_DATASET:=}"        # csft: prompts with responses, which are scored and trained on
: "${DATA_FLAGS:=}"         # csft: more flags for batch_infer.py when it scores SFT_DATASET
: "${CSFT_PROMPTS:=-1.5 -0.75 0 0.75 1.5}" # csft: the rewards to ask for, 0 = the mean of SFT_DATASET, in its std
: "${REF_MODEL_PATH:=}"     # the reference of methods that have one: a model, ...
: "${REF:=}"                # ... or init (POLICY_MODEL_PATH, the default) or prev (the policy of the iteration)
: "${TRAINING_ITERS:=3}"
: "${ROLLOUT_BATCH_SIZE:=2048}" # prompts per iteration: the next slice each time, wrapping around
: "${BEST_OF_N:=4}"             # samples per prompt
: "${GENERATE_FLAGS:=}"     # more flags for batch_infer.py when it generates; quotes work as in a shell
: "${RM_FLAGS:=}"           # more flags for batch_infer.py when it scores
: "${KL:=1}"                # 0: the report goes without KL divergences, and the models are not run for them
: "${LOGPS_FLAGS:=}"        # more flags for batch_infer.py when it takes log-probs of samples, for the report's KL
: "${TRAIN_FLAGS:=}"        # more flags for the trainer
: "${NUM_GPUS:=1}"          # processes that score and train; vLLM is told by --dp_size and --tp_size in GENERATE_FLAGS
: "${DRY_RUN:=0}"           # 1: print the commands, run nothing
: "${GENERATE_OUTPUT:=}"    # when set, these three become links to the newest samples, ...
: "${RM_OUTPUT:=}"          # ... selected rows ...
: "${MODEL_OUTPUT_PATH:=}"  # ... and model (a folder of links)

die() { echo "error: $*" >&2; exit 2; }
notice() { echo "notice $*" >&2; }

# --- checks, all of them before the first stage
case $METHOD in
  raft) trainer=sft.py post_processor=rs ;;
  iter_dpo) trainer=dpo.py post_processor=iter_dpo ;;
  distill) trainer=kd.py post_processor= ;;
  csft) trainer=sft.py post_processor=csft ;;
  *) die "METHOD=$METHOD: choose raft, iter_dpo, distill or csft" ;;
esac
toy=
if [[ -z $POLICY_MODEL_PATH$RM_MODEL_PATH$PROMPT_DATASET$TEACHER_MODEL_PATH$SFT_DATASET ]]; then
  suffix=_$METHOD
  toy=${OUT:=runs/toy${suffix#_raft}}/toy
  POLICY_MODEL_PATH=$toy/policy RM_MODEL_PATH=$toy/rm PROMPT_DATASET=$toy/prompts.jsonl
  TEACHER_MODEL_PATH=$toy/teacher SFT_DATASET=$toy/sft.jsonl
  GENERATE_FLAGS="--input_key prompt --no-bf16 --max_new_tokens 64 --prompt_max_len 64 $GENERATE_FLAGS"
  RM_FLAGS="--no-bf16 --max_len 160 $RM_FLAGS" LOGPS_FLAGS="--no-bf16 --max_len 160 $LOGPS_FLAGS"
  TRAIN_FLAGS="--no-bf16 --max_len 160 --train_batch_size 32 --micro_train_batch_size 32 \
    --learning_rate $(case $METHOD in raft) echo 1e-3 ;; csft) echo 3e-3 --max_epochs 4 ;; *) echo 2e-4 ;; esac) $TRAIN_FLAGS"
fi
: "${OUT:=runs/$METHOD}"
OUT=${OUT%/}
for name in TRAINING_ITERS ROLLOUT_BATCH_SIZE BEST_OF_N NUM_GPUS; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name=${!name} is not a whole number above 0"
done
[[ $DRY_RUN$KL == [01][01] ]] || die "DRY_RUN=$DRY_RUN, KL=$KL: 0 or 1"
needed=" POLICY_MODEL_PATH PROMPT_DATASET "
[[ $METHOD == distill || $RM_FLAGS == *--reward_fn* ]] || needed+="RM_MODEL_PATH "
[[ $METHOD != distill ]] || needed+="TEACHER_MODEL_PATH "
[[ $METHOD != csft ]] || needed+="SFT_DATASET "
for name in POLICY_MODEL_PATH RM_MODEL_PATH PROMPT_DATASET TEACHER_MODEL_PATH SFT_DATASET REF_MODEL_PATH; do
  [[ -n ${!name} || $needed != *" $name "* ]] || die "$name is not set (the toy runs when no path is set)"
  paths=("${!name}")
  [[ $name != *_DATASET ]] || IFS=, read -ra paths <<<"${!name}"
  for path in "${paths[@]}"; do # a path of ours, or OWNER/NAME on the hub (data: with an optional @FOLDER)
    [[ -z $path || -n $toy || -e $path ]] && continue
    [[ ${path%%@*} =~ ^[[:alnum:]][[:alnum:]_.-]*/[[:alnum:]_.-]+$ && $path != *.@(json|jsonl|csv|parquet|arrow) ]] ||
      die "$name: $path does not exist"
  done
done
for number in $CSFT_PROMPTS; do
  [[ $number =~ ^[-+]?[0-9]*\.?[0-9]+$ ]] || die "CSFT_PROMPTS: $number is no number"
done
[[ $REF == @(|init|prev) ]] || die "REF=$REF: init or prev; another model is REF_MODEL_PATH"
[[ -z $REF_MODEL_PATH || $REF != prev ]] || die "REF_MODEL_PATH and REF=prev contradict each other: set one of them"
[[ $METHOD == iter_dpo || -z $REF_MODEL_PATH$REF ]] || notice "REF_MODEL_PATH, REF: METHOD=$METHOD has no reference model"
[[ -z ${ITER_LOG_PATH:-} ]] || notice "ITER_LOG_PATH is not used: OUT=$OUT knows which stages are done"
for path in "$GENERATE_OUTPUT" "$RM_OUTPUT" "${MODEL_OUTPUT_PATH:+$MODEL_OUTPUT_PATH/config.json}"; do
  [[ ! -e $path || -L $path ]] || die "$path is there and not a link of ours: choose another name for our link"
done

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ $here != "$PWD" ]] || here=.
split() { # split VARIABLE SCRIPT: its words -> the array `words`; SCRIPT must know the flags, and we not set them
  local script=$here/$2 flag
  [[ -f $script ]] || die "$script is missing"
  xargs -r true <<<"${!1}" 2>/dev/null || die "$1: a quote is not closed: ${!1}"
  mapfile -t -d '' words < <(xargs -r printf '%s\0' <<<"${!1}")
  for flag in "${words[@]}"; do
    [[ $flag == --* ]] || continue
    flag=${flag#--} flag=${flag%%=*} flag=${flag//-/_}
    case $flag in
      pretrain | dataset | output_path | scored_path | save_path | iter | rollout_batch_size | best_of_n | post_processor | \
        csft_prompt | ref_pretrain | teacher_model)
        die "$1: --$flag is set by iterate.sh; use its variables" ;;
    esac
    grep -qE "^    ($flag|${flag#no_}):|--$flag\b" "$script" || die "$1: $2 has no flag --$flag"
  done
}
split GENERATE_FLAGS batch_infer.py && generate_flags=("${words[@]}")
split RM_FLAGS batch_infer.py && rm_flags=("${words[@]}")
rewards=$RM_MODEL_PATH; [[ $RM_FLAGS != *--reward_fn* ]] || rewards+=" reward_fn" # where rewards come from, if at all
[[ -z $RM_MODEL_PATH ]] || rm_flags=(--pretrain "$RM_MODEL_PATH" "${rm_flags[@]}")
split DATA_FLAGS batch_infer.py && data_flags=("${words[@]}")
split LOGPS_FLAGS batch_infer.py && logps_flags=("${words[@]}")
split TRAIN_FLAGS "$trainer" && train_flags=("${words[@]}")
[[ $METHOD != distill ]] || train_flags=(--kd_loss reverse_kl --kd_coef 1 "${train_flags[@]}")
ranks=(python)
if ((NUM_GPUS > 1)); then
  ranks=(deepspeed --num_gpus "$NUM_GPUS" ${MASTER_PORT:+--master_port "$MASTER_PORT"})
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}" # --num_gpus would ignore it
  ((${#gpus[@]} == 0 || ${#gpus[@]} >= NUM_GPUS)) || die "NUM_GPUS=$NUM_GPUS, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
  ((${#gpus[@]} == 0)) || ranks[1]=--include ranks[2]=localhost:$(IFS=,; echo "${gpus[*]:0:NUM_GPUS}")
fi
for tool in python flock "${ranks[0]}"; do command -v "$tool" >/dev/null || die "$tool is not on PATH"; done
task=generate_vllm generate=(python) # one command with --dp_size, --tp_size; without vLLM: Hugging Face on all ranks
python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)' || task=generate
[[ ! " ${generate_flags[*]} " =~ .*--eval_task[=\ ]([a-z_]+) ]] || task=${BASH_REMATCH[1]}
[[ $task != generate ]] || generate=("${ranks[@]}")

if ((!DRY_RUN)); then # one run per OUT. Stages inherit the lock: one that outlives us keeps it
  mkdir -p "$OUT" 2>/dev/null && [[ -w $OUT ]] || die "OUT=$OUT cannot be written"
  exec {lock}>>"$OUT/.lock"
  flock -w 1 "$lock" || die "another run is working in OUT=$OUT"
fi

# --- running
set -m # each stage is a process group: its ranks and engines end with it
run() { # run COMMAND...: in a group of its own; DRY_RUN: prints it
  local line
  printf -v line ' %q' "$@"
  if ((DRY_RUN)); then echo "${line:1}"; return; fi
  "$@" </dev/null &
  wait $!
}
stop() { # stop NUMBER-OF-SIGNAL: ends the stage and whatever it started; a second signal does so at once
  local group
  for group in $(jobs -p); do
    trap 'kill -KILL -- "-$group"' INT TERM HUP
    if kill -TERM -- "-$group" 2>/dev/null; then wait "$group" 2>/dev/null || true; fi
    kill -KILL -- "-$group" 2>/dev/null || true
  done
  echo "stopped; the same command continues" >&2
  exit $((128 + $1))
}
trap 'stop 2' INT; trap 'stop 15' TERM; trap 'stop 1' HUP

describe() { # describe COMMAND...: a flag per line; free of launcher and place of OUT; inputs from elsewhere stamped
  local word line part parts
  while [[ $1 != *.py ]]; do shift; done
  line=${1##*/}
  for word in "${@:2}"; do
    if [[ $word == --* ]]; then
      echo "$line"
      line=$word
      [[ $word != --use[_-]wandb=* ]] || line=--use_wandb # a key is a secret
      [[ $word == *=* ]] || continue
      word=${word#*=}
    else
      line+=" ${word/#"$OUT"\//OUT/}"
    fi
    [[ $line != --use[_-]wandb* ]] || { line=--use_wandb; continue; }
    [[ $word != "$OUT"/* && $word == *[[:alnum:]]* ]] || continue
    IFS=, read -ra parts <<<"$word"
    for part in "${parts[@]}"; do # a file or folder, FILE.py:NAME=WEIGHT, FOLDER@SUBSET
      [[ -e $part ]] || part=${part%%[:@]*}
      [[ ! -e $part ]] ||
        line+=" ($(find -L "$part" -samefile "$OUT" -prune -o -type f -printf '%P %s %T@\n' | sort | cksum))"
    done
  done
  echo "$line"
}
ran=0 # 1 from the first stage that runs: what follows must run too (where nothing changed, the scripts do nothing)
stage() { # stage FOLDER NAME RESULT COMMAND...: runs a command once, FOLDER/NAME.done then describes it
  local folder=$1 name=$2 result=$3 record=$1/$2.done now code=0
  shift 3
  if ((DRY_RUN)); then run "$@"; return; fi
  now=$(describe "$@")
  if [[ -f $record ]]; then
    [[ $(<"$record") == "$now" ]] || die "$folder: $name was another command: $(diff "$record" - <<<"$now" |
      sed -n 's/^< /was: /p; s/^> /now: /p' | paste -sd ' '); set it back, or choose another OUT"
    if ((!ran)) && [[ -e $result ]]; then echo "$folder  $name: done before"; return; fi
  fi
  echo "$folder  $name -> $result"
  ran=1
  mkdir -p "$folder" && rm -f "$record"
  run "$@" || code=$?
  ((code == 0)) || { echo "error: $folder: $name ended with code $code" >&2; exit "$code"; }
  echo "$now" >"$record.partial" && mv "$record.partial" "$record"
}
publish() { # publish TARGET LINK: LINK, when set, shows TARGET; a folder becomes a folder of links
  [[ -n $2 ]] && ((!DRY_RUN)) || return 0
  if [[ -d $1 ]]; then mkdir -p "$2" && ln -sfn "$(realpath "$1")"/* "$2/"; return; fi
  mkdir -p "$(dirname "$2")" && ln -sfn "$(realpath "$1")" "$2"
}

generate() { # generate FOLDER POLICY FLAGS...: the policy's samples -> FOLDER/generate.jsonl
  stage "$1" generate "$1/generate.jsonl" "${generate[@]}" "$here/batch_infer.py" --eval_task "$task" \
    --pretrain "$2" --dataset "$PROMPT_DATASET" "${@:3}" --rollout_batch_size "$ROLLOUT_BATCH_SIZE" \
    --best_of_n "$BEST_OF_N" --output_path "$1/generate.jsonl" "${generate_flags[@]}"
  publish "$1/generate.jsonl" "$GENERATE_OUTPUT"
}
score() { # score FOLDER ROWS [--post_processor X] FLAGS...: rewards -> FOLDER/scored.jsonl, X's choice -> FOLDER/rm.jsonl
  local output=$1/scored.jsonl choice=()
  [[ ${3:-} != --post_processor ]] || output=$1/rm.jsonl choice=(--scored_path "$1/scored.jsonl")
  stage "$1" rm "$output" "${ranks[@]}" "$here/batch_infer.py" --eval_task rm --dataset "$2" "${@:3}" "${choice[@]}" \
    --output_path "$output" "${rm_flags[@]}"
  publish "$output" "$RM_OUTPUT"
}
train() { # train FOLDER POLICY ROWS FLAGS...: trained on the rows, the policy becomes FOLDER/model
  stage "$1" train "$1/model" "${ranks[@]}" "$here/$trainer" --pretrain "$2" --dataset "$3" --save_path "$1/model" \
    "${@:4}" "${train_flags[@]}"
  publish "$1/model" "$MODEL_OUTPUT_PATH"
}
measure() { # measure FOLDER NAME MODEL: log-probs of the samples under MODEL -> FOLDER/logps_NAME.jsonl, for the report
  stage "$1" "logps_$2" "$1/logps_$2.jsonl" "${ranks[@]}" "$here/batch_infer.py" --eval_task logps --pretrain "$3" \
    --dataset "$1/generate.jsonl" --output_path "$1/logps_$2.jsonl" \
    --max_len 1000000 --max_drop_ratio 1 --micro_batch_size 4 "${logps_flags[@]}"
}

extras=()
[[ $METHOD != distill ]] || extras=(--teacher)
[[ -z $toy ]] || stage "$OUT" toy "$toy/toy.json" python "$here/examples/toy.py" --out "$toy" "${extras[@]}"
policy=$POLICY_MODEL_PATH
if [[ $METHOD == csft ]]; then
  score "$OUT" "$SFT_DATASET" --post_processor csft --normalize_reward "${data_flags[@]}"
  train "$OUT" "$policy" "$OUT/rm.jsonl"
  for asked in $CSFT_PROMPTS; do
    generate "$OUT/asked_$asked" "$OUT/model" --iter 0 --csft_prompt="$asked"
    score "$OUT/asked_$asked" "$OUT/asked_$asked/generate.jsonl"
  done
  TRAINING_ITERS=-1 # there is no loop
fi
for ((k = 0; k <= TRAINING_ITERS; k++)); do
  dir=$OUT/iter_$k rows=$OUT/iter_$k/rm.jsonl flags=()
  generate "$dir" "$policy" --iter "$k"
  case $METHOD in
    distill) flags=(--teacher_model "$TEACHER_MODEL_PATH") rows=$dir/generate.jsonl ;;
    iter_dpo) ((k == 0)) && [[ -z $REF_MODEL_PATH ]] || [[ $REF == prev ]] ||
      flags=(--ref_pretrain "${REF_MODEL_PATH:-$POLICY_MODEL_PATH}") ;;
  esac
  [[ -z $rewards ]] || score "$dir" "$dir/generate.jsonl" ${post_processor:+--post_processor "$post_processor"}
  if ((KL)); then
    ((k == 0)) || measure "$dir" first "$POLICY_MODEL_PATH"
    [[ $METHOD != distill ]] || measure "$dir" teacher "$TEACHER_MODEL_PATH"
    [[ $METHOD$k == raft0 || $METHOD$k == iter_dpo0 ]] || measure "$dir" policy "$policy"
  fi
  ((k < TRAINING_ITERS)) || break # the last policy is only measured
  train "$dir" "$policy" "$rows" "${flags[@]}"
  policy=$dir/model
done
report=(python "$here/examples/plot.py" --out "$OUT" --pretrain "$POLICY_MODEL_PATH")
[[ -z $toy ]] || report+=(--score_fn "$here/examples/toy.py:true_score")
run "${report[@]}"
