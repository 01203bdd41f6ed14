#!/usr/bin/env bash
# Generate -> score -> train, again and again. Every stage is one command, whose result appears in OUT/iter_k when it is
# whole. The same command again skips what is there and goes on; with other settings it stops and says what changed.
# Without settings it runs a toy, which needs no download; README.md has whole commands for models of your own.
set -euo pipefail
die() { echo "error: $*" >&2; exit 2; }

# --- settings: environment variables
case ${METHOD:=raft} in # what is trained, on what; in brackets the paper on arXiv
  raft) trainer=sft.py choose=rs rows=rm.jsonl needed=RM_MODEL_PATH ;;           # the best of n samples (2304.06767)
  iter_dpo) trainer=dpo.py choose=iter_dpo rows=rm.jsonl needed=RM_MODEL_PATH ;; # best against worst (2405.07863)
  distill) trainer=kd.py choose=null rows=generate.jsonl needed=TEACHER_MODEL_PATH ;; # all, to a teacher (2306.13649)
  csft) trainer=sft.py needed=RM_MODEL_PATH,SFT_DATASET ;; # SFT_DATASET, each prompt with its reward; there is no loop
  *) die "METHOD=$METHOD: choose raft, iter_dpo, distill or csft" ;;
esac
: "${OUT:=}"                # default: runs/METHOD; the toy: runs/toy or runs/toy_METHOD
: "${POLICY_MODEL_PATH:=}"  # where the loop starts: a folder or a hub name
: "${RM_MODEL_PATH:=}"      # the reward model; not needed with --reward_fn in RM_FLAGS, nor by distill
: "${TEACHER_MODEL_PATH:=}" # distill: the teacher
: "${PROMPT_DATASET:=}"     # the prompts, as batch_infer.py --dataset takes them
: "${SFT_DATASET:=}"        # csft: prompts with responses, which are scored and trained on
: "${CSFT_PROMPTS:=-1.5 -0.75 0 0.75 1.5}" # csft: then ask for these rewards; 0 = the mean of SFT_DATASET, in its std
: "${REF:=init}" "${REF_MODEL_PATH:=}" # iter_dpo: the reference is POLICY_MODEL_PATH; prev: the policy; or a model
: "${TRAINING_ITERS:=3}"    # may be raised later: the loop goes on
: "${ROLLOUT_BATCH_SIZE:=2048}" "${BEST_OF_N:=4}" # prompts per iteration (then the next ones); samples of each
: "${GENERATE_FLAGS:=}"     # more flags for batch_infer.py when it generates; quotes work as in a shell
: "${RM_FLAGS:=}" "${DATA_FLAGS:=}" # ... when it scores; besides these, when it scores SFT_DATASET
: "${TRAIN_FLAGS:=}"        # more flags for the trainer
: "${BF16:=1}" "${KL:=1}" "${DRY_RUN:=0}" # BF16=0: all in fp32; KL=0: a report without KL; DRY_RUN=1: print commands
: "${NUM_GPUS:=1}"          # processes that score and train; vLLM is told by --dp_size and --tp_size in GENERATE_FLAGS
: "${GENERATE_OUTPUT:=}" "${RM_OUTPUT:=}" "${MODEL_OUTPUT_PATH:=}" # when set: links to the newest samples, rows, model
here=$(dirname "${BASH_SOURCE[0]}") toy="" make_toy=() truth=()
# shellcheck source=/dev/null
[[ -n $POLICY_MODEL_PATH$RM_MODEL_PATH$TEACHER_MODEL_PATH$PROMPT_DATASET$SFT_DATASET ]] || . "$here/examples/toy.sh"
OUT=${OUT:-runs/$METHOD}

# --- checks, all of them before the first stage
check() { [[ ${!1} =~ ^($2)$ ]] || die "$1=${!1}: $3"; }
check CSFT_PROMPTS "( *[-+]?[0-9]*\.?[0-9]+)+ *" "numbers with blanks between them"
for name in BF16 KL DRY_RUN; do check $name "0|1" "0 or 1"; done
for name in TRAINING_ITERS ROLLOUT_BATCH_SIZE BEST_OF_N NUM_GPUS; do check $name "[1-9][0-9]*" "a number above 0"; done
[[ $METHOD$BEST_OF_N != iter_dpo1 ]] || die "BEST_OF_N=1: METHOD=iter_dpo needs two samples or more of each prompt"
[[ $REF == init || $REF$REF_MODEL_PATH == prev ]] || die "REF=$REF: init, or prev without a REF_MODEL_PATH"
[[ -z $(find "$GENERATE_OUTPUT" "$RM_OUTPUT" "$MODEL_OUTPUT_PATH/config.json" -type f 2>/dev/null) ]] ||
  die "GENERATE_OUTPUT, RM_OUTPUT, MODEL_OUTPUT_PATH become links, but one of them is a file: choose other names"
[[ $RM_FLAGS != *--reward_fn* ]] || needed=${needed/RM_MODEL_PATH/}
inputs=() paths=() # inputs: files and folders that decide the result; when they change, a rerun stops
for name in {POLICY,RM,TEACHER,REF}_MODEL_PATH {PROMPT,SFT}_DATASET; do
  [[ -n ${!name} || POLICY_MODEL_PATH,PROMPT_DATASET,$needed != *$name* ]] || die "$name is not set"
  [[ -n $toy ]] || IFS=, read -ra paths <<<"${!name}" # the toy is made later
  for path in "${paths[@]}"; do
    [[ -e $path ]] || path=${path%%@*} # NAME@SUBSET
    [[ $name == *_DATASET ]] && file=$path || file=$path/config.json
    [[ -s $file || $path =~ ^[[:alnum:]][^/]*/[^/]+$ && ! -d ${path%%/*} ]] || die "$name: $file is not there, or empty"
    [[ ! -e $path ]] || inputs+=("$path")
  done
done
ours="pretrain dataset output_path scored_path save_path iter rollout_batch_size best_of_n post_processor csft_prompt"
add_flags() { # add_flags COMMAND SETTING SCRIPT: checked, the words of the setting are added to the array COMMAND
  local -n command=$1; local flag=""
  local bind="import inspect, runpy, sys; inspect.signature(runpy.run_path(sys.argv[1])[sys.argv[2]]).bind(1, 2, 3)"
  xargs -r true <<<"${!2}" 2>/dev/null || die "$2: a quote is not closed: ${!2}"
  mapfile -t words < <(xargs -r printf '%s\n' <<<"${!2}")
  command+=("${words[@]}")
  printf -v "$2" %s "${words[*]}" # for OUT/settings
  for word in "${words[@]}"; do
    if [[ $word == --* ]]; then
      flag=${word#--} flag=${flag%%=*} flag=${flag//-/_}
      [[ " $ours ref_pretrain teacher_model " != *" $flag "* ]] || die "$2: --$flag is set by iterate.sh itself"
      grep -qE "^    ($flag|${flag#no_}):" "$here/$3" || die "$2: $3 has no flag --$flag"
    fi
    IFS=, read -ra parts <<<"${word#--*=}" # each is perhaps a FILE, or FILE.py:NAME=WEIGHT of --reward_fn
    for part in "${parts[@]# }"; do
      file=${part%%:*} name=${part##*:} name=${name%%=*}
      [[ $flag$part != reward_fn*.py* ]] ||
        why=$(PYTHONPATH=${file%/*}:${PYTHONPATH-} python -c "$bind" "$file" "$name" 2>&1) ||
        die "$2: $part: ${why##*$'\n'}; it must be FILE.py:NAME, a function of (prompt, response, row)"
      [[ ! -f $file ]] || inputs+=("$file")
    done
  done
}

# --- commands
ranks=(python) bf16=(--no-bf16 --bf16) policy=$POLICY_MODEL_PATH
if ((NUM_GPUS > 1)); then
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null | grep -oP "^GPU \K\d+" | paste -sd,)}"
  ((${#gpus[@]} == 0 || ${#gpus[@]} >= NUM_GPUS)) || die "NUM_GPUS=$NUM_GPUS, but there are ${#gpus[@]}: ${gpus[*]}"
  ((${#gpus[@]} > 0)) || echo "notice there is no GPU: NUM_GPUS=$NUM_GPUS processes run on the CPU" >&2
  which=(--num_gpus "$NUM_GPUS") # the first of all GPUs, visible or not
  [[ -z ${CUDA_VISIBLE_DEVICES:-} ]] || which=(--include "localhost:$(IFS=,; echo "${gpus[*]:0:NUM_GPUS}")")
  ranks=(deepspeed "${which[@]}" ${MASTER_PORT:+--master_port "$MASTER_PORT"}) # a port per loop on the same machine
fi
infer=("$here/batch_infer.py" "${bf16[BF16]}" --eval_task)
generate=(python "${infer[@]}" generate_vllm)
if [[ $GENERATE_FLAGS =~ --eval_task[=[:space:]]+generate([[:space:]]|$) ]] || # by Hugging Face
  ! python -c "import importlib.util as u; exit(not u.find_spec('vllm'))"; then
  generate=("${ranks[@]}" "${infer[@]}" generate)
fi
generate+=(--dataset "$PROMPT_DATASET" --rollout_batch_size "$ROLLOUT_BATCH_SIZE" --best_of_n "$BEST_OF_N")
score=("${ranks[@]}" "${infer[@]}" rm ${RM_MODEL_PATH:+--pretrain "$RM_MODEL_PATH"})
logps=("${ranks[@]}" "${infer[@]}" logps --max_len 1000000 --max_drop_ratio 1)
train=("${ranks[@]}" "$here/$trainer" "${bf16[BF16]}") reference=${REF_MODEL_PATH:-$POLICY_MODEL_PATH}
[[ $METHOD != distill ]] || train+=(--teacher_model "$TEACHER_MODEL_PATH" --kd_loss reverse_kl --kd_coef 1)
[[ $METHOD$REF != iter_dpoinit || $TRAIN_FLAGS == *simpo* ]] || train+=(--ref_pretrain "$reference") # SimPO has none
add_flags generate GENERATE_FLAGS batch_infer.py
add_flags score RM_FLAGS batch_infer.py
add_flags train TRAIN_FLAGS "$trainer"
score_data=("${score[@]}" --post_processor csft --normalize_reward)
add_flags score_data DATA_FLAGS batch_infer.py
run() { # run COMMAND...: DRY_RUN prints it
  if ((DRY_RUN)); then printf '%q ' "$@" && echo && return; fi
  (echo "$$ or its stage $BASHPID" >"$OUT/.lock" && exec "$@" </dev/null) # it inherits the lock, and may outlive us
}
declare -A links=([generate.jsonl]=$GENERATE_OUTPUT [rm.jsonl]=$RM_OUTPUT [model]=$MODEL_OUTPUT_PATH)
stage() { # stage COMMAND... RESULT: runs the command unless its result, its last word, is there and whole
  local result=${!#} link=${links[$(basename "${!#}")]:-}
  if [[ -e $result && ! -e $result.partial && ! -e $result.ckpt ]]; then echo "# $result: done before"
  else echo "# $result"; run "$@"; fi
  ((DRY_RUN)) || [[ -z $link ]] || { mkdir -p "$(dirname "$link")" && cp -rsfT "$(realpath "$result")" "$link"; }
}
measure() { # measure NAME MODEL: log-probs of the samples under a model, for the KL in the report
  ((!KL)) || stage "${logps[@]}" --pretrain "$2" --dataset "$dir/generate.jsonl" --output_path "$dir/logps_$1.jsonl"
}
if ((!DRY_RUN)); then # one loop per OUT, and always with the same settings
  { mkdir -p "$OUT" && exec {lock}>>"$OUT/.lock"; } 2>/dev/null || die "OUT=$OUT cannot be written"
  { flock -w 5 "$lock" && echo $$ >"$OUT/.lock"; } || die "OUT=$OUT is in use by process $(<"$OUT/.lock")"
  declare -p METHOD {POLICY,RM,TEACHER,REF}_MODEL_PATH {PROMPT,SFT}_DATASET CSFT_PROMPTS REF BF16 ROLLOUT_BATCH_SIZE \
    BEST_OF_N KL {GENERATE,RM,DATA,TRAIN}_FLAGS | sed -E 's/declare \S+ //; s/(--use[_-]wandb)[= ]\S+/\1/' >"$OUT/.now"
  find -L "${inputs[@]:-/dev/null}" -samefile "$OUT" -prune -o -type f -printf '%p %s %T@\n' | sort >>"$OUT/.now"
  (cd "$here" && sha256sum iterate.sh batch_infer.py "$trainer") >>"$OUT/.now"
  [[ -e $OUT/settings ]] || cp "$OUT/.now" "$OUT/settings"
  changed=$(diff "$OUT/settings" "$OUT/.now" | sed -n 's/^< /was: /p; s/^> /now: /p' | paste -sd ' ') || true
  [[ -z $changed ]] || die "OUT=$OUT: ${changed:0:400}; set it back, take another OUT, or edit $OUT/settings"
fi

# --- the loop
[[ -z $toy ]] || run "${make_toy[@]}"
if [[ $METHOD == csft ]]; then
  stage "${score_data[@]}" --dataset "$SFT_DATASET" --output_path "$OUT/rm.jsonl"
  stage "${train[@]}" --pretrain "$policy" --dataset "$OUT/rm.jsonl" --save_path "$OUT/model"
  for asked in $CSFT_PROMPTS; do
    dir=$OUT/asked_$asked
    stage "${generate[@]}" --pretrain "$OUT/model" --iter 0 --csft_prompt="$asked" --output_path "$dir/generate.jsonl"
    stage "${score[@]}" --dataset "$dir/generate.jsonl" --output_path "$dir/scored.jsonl"
  done
  TRAINING_ITERS=-1
fi
for ((k = 0; k <= TRAINING_ITERS; k++)); do # N trainings lie between N + 1 measurements
  dir=$OUT/iter_$k
  stage "${generate[@]}" --pretrain "$policy" --iter "$k" --output_path "$dir/generate.jsonl"
  [[ "${score[*]}" != *--@(pretrain|reward_fn)* ]] || stage "${score[@]}" --dataset "$dir/generate.jsonl" \
    --post_processor "$choose" --scored_path "$dir/scored.jsonl" --output_path "$dir/rm.jsonl"
  [[ $METHOD$k == @(raft|iter_dpo)0 ]] || measure policy "$policy"
  ((k == 0)) || measure first "$POLICY_MODEL_PATH"
  [[ $METHOD != distill ]] || measure teacher "$TEACHER_MODEL_PATH"
  ((k < TRAINING_ITERS)) || break
  stage "${train[@]}" --pretrain "$policy" --dataset "$dir/$rows" --save_path "$dir/model"
  policy=$dir/model
done
run python "$here/examples/plot.py" --out "$OUT" "${truth[@]}"
