/* Training of word vectors on one slice of a text or of pairs. Compiled for a machine and for WIDTH floats in a
   row, a multiple of 16: the numbers of a vector, and zeros behind them, which stay zeros.

   Several threads may run on the same matrices without locks (Recht et al. 2011, Hogwild). With one thread the
   result depends on the arguments alone. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_WORDS 10000  /* words of a context-free stretch, as in word2vec */
#define MOST_TARGETS 128  /* words drawn for one, or nodes of its path */
#define MOST_WINDOW 1000
#define LOSS_EVERY 16     /* words of which one counts its loss */

typedef struct {
    const int32_t *tokens;      /* rows of words; below 0: a border that no context reaches beyond */
    int64_t begin, end;
    uint64_t seed;
    float rate, last_rate;      /* learning rate at the beginning and at the end of the slice */
    int32_t window, negatives;
    int32_t is_cbow, is_dynamic, is_shared;
    const uint32_t *keep;       /* word -> 2^32 times the probability of keeping it */
    int64_t num_words;
    const uint32_t *alias_limit;  /* Walker's alias table of the words that are drawn (1977) */
    const int32_t *alias;
    const int64_t *path_start;  /* hierarchical softmax, or null: where the path of each word begins */
    const int32_t *path_node;
    const float *path_label;
    const int64_t *gram_start;  /* FastText, or null: where the n-grams of each word begin */
    const int32_t *gram;
    float *in, *out, *grams;
    double loss;                /* out: sum over the words that count their loss, in nats */
    int64_t losses;             /* out: number of predictions in it */
    int64_t trained;            /* out: words that were kept */
} Slice;

static inline uint64_t draw(uint64_t *state) {  /* splitmix64 (Steele et al. 2014) */
    uint64_t z = (*state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

static inline float dot(const float *restrict a, const float *restrict b) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += a[i] * b[i];
    return sum;
}

static inline void add_scaled(float *restrict to, float by, const float *restrict from) {
    for (int i = 0; i < WIDTH; i++) to[i] += by * from[i];
}

static inline void add(float *restrict to, const float *restrict from) {
    for (int i = 0; i < WIDTH; i++) to[i] += from[i];
}

static inline void fetch(const float *row) {
    for (int i = 0; i < WIDTH; i += 16) __builtin_prefetch(row + i, 1, 3);
}

static inline double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

/* One prediction: `hidden` tells the rows of `out` with the label 1 from those with the label 0. Each row moves by
   its gradient of the logistic loss times -rate, and that of `hidden` is added to `step`. */
static inline void learn(const float *restrict hidden, float *restrict step, float *restrict out,
                         const int32_t *rows, const float *labels, int count, float rate, double *loss) {
    float f[MOST_TARGETS] __attribute__((aligned(64)));
    for (int t = 0; t < count; t++) f[t] = dot(hidden, out + (int64_t)rows[t] * WIDTH);
    if (loss)
        for (int t = 0; t < count; t++) *loss += softplus(labels[t] > 0.5f ? -f[t] : f[t]);
    for (int t = 0; t < count; t++) f[t] = (labels[t] - 1.0f / (1.0f + expf(-f[t]))) * rate;
    for (int t = 0; t < count; t++) {
        float *restrict row = out + (int64_t)rows[t] * WIDTH;
        const float g = f[t];
        for (int i = 0; i < WIDTH; i++) {
            step[i] += g * row[i];
            row[i] += g * hidden[i];
        }
    }
}

/* The rows that word is told apart by: its path, or itself and drawn ones, of which those equal to it are left
   out. Returns their number. */
static inline int targets_of(const Slice *s, int32_t word, uint64_t *state, int32_t *rows, float *labels) {
    if (s->path_start) {
        const int64_t start = s->path_start[word];
        const int count = (int)(s->path_start[word + 1] - start);
        memcpy(rows, s->path_node + start, count * sizeof *rows);
        memcpy(labels, s->path_label + start, count * sizeof *labels);
        for (int t = 0; t < count; t++) fetch(s->out + (int64_t)rows[t] * WIDTH);
        return count;
    }
    int count = 1;
    rows[0] = word;
    labels[0] = 1;
    fetch(s->out + (int64_t)word * WIDTH);
    for (int n = 0; n < s->negatives; n++) {
        const uint64_t bits = draw(state);
        int32_t drawn = (int32_t)(((bits >> 32) * (uint64_t)s->num_words) >> 32);
        if ((uint32_t)bits >= s->alias_limit[drawn]) drawn = s->alias[drawn];
        if (drawn == word) continue;
        rows[count] = drawn;
        labels[count++] = 0;
        fetch(s->out + (int64_t)drawn * WIDTH);
    }
    return count;
}

/* Add the vectors of a word: its own, and those of its n-grams. Returns their number. */
static inline int add_parts(const Slice *s, int32_t word, float *restrict sum) {
    add(sum, s->in + (int64_t)word * WIDTH);
    if (!s->gram_start) return 1;
    const int64_t start = s->gram_start[word], stop = s->gram_start[word + 1];
    for (int64_t g = start; g < stop; g++) add(sum, s->grams + (int64_t)s->gram[g] * WIDTH);
    return 1 + (int)(stop - start);
}

static inline void move_parts(const Slice *s, int32_t word, const float *restrict step) {
    add(s->in + (int64_t)word * WIDTH, step);
    if (!s->gram_start) return;
    const int64_t start = s->gram_start[word], stop = s->gram_start[word + 1];
    for (int64_t g = start; g < stop; g++) add(s->grams + (int64_t)s->gram[g] * WIDTH, step);
}

static inline void fetch_parts(const Slice *s, int32_t word) {
    fetch(s->in + (int64_t)word * WIDTH);
    if (!s->gram_start) return;
    const int64_t start = s->gram_start[word], stop = s->gram_start[word + 1];
    for (int64_t g = start; g < stop; g++) fetch(s->grams + (int64_t)s->gram[g] * WIDTH);
}

static inline void scale(float *restrict row, float by) {
    for (int i = 0; i < WIDTH; i++) row[i] *= by;
}

/* CBOW: the mean of the context predicts the word; each part of it moves by the whole gradient of the mean, as in
   word2vec. */
static void predict_word(const Slice *s, const int32_t *context, int count, const int32_t *rows, const float *labels,
                         int targets, float rate, double *loss) {
    float hidden[WIDTH] __attribute__((aligned(64))) = {0}, step[WIDTH] __attribute__((aligned(64))) = {0};
    int parts = 0;
    for (int c = 0; c < count; c++) parts += add_parts(s, context[c], hidden);
    scale(hidden, 1.0f / parts);
    learn(hidden, step, s->out, rows, labels, targets, rate, loss);
    for (int c = 0; c < count; c++) move_parts(s, context[c], step);
}

/* Skip-gram of one pair, in word2vec's direction: the vector of the context word predicts the word. */
static void predict_from(const Slice *s, int32_t context, const int32_t *rows, const float *labels, int targets,
                         float rate, double *loss) {
    float step[WIDTH] __attribute__((aligned(64))) = {0};
    float *row = s->in + (int64_t)context * WIDTH;
    learn(row, step, s->out, rows, labels, targets, rate, loss);
    add(row, step);
}

/* Skip-gram with n-grams, in fastText's direction: the word's parts predict each word of the context by their sum over
   the number of n-grams, as in gensim, which is a little longer than their mean. All parts move by its gradient, and
   it moves as they do; they are read and written once. */
static void predict_context(const Slice *s, int32_t word, const int32_t *context, int count, float rate,
                            uint64_t *state, double *loss, int64_t *losses) {
    float hidden[WIDTH] __attribute__((aligned(64))) = {0}, moved[WIDTH] __attribute__((aligned(64))) = {0};
    int32_t rows[MOST_TARGETS];
    float labels[MOST_TARGETS];
    const int parts = add_parts(s, word, hidden), grams = parts > 1 ? parts - 1 : 1;
    scale(hidden, 1.0f / grams);
    for (int c = 0; c < count; c++) {
        float step[WIDTH] __attribute__((aligned(64))) = {0};
        const int targets = targets_of(s, context[c], state, rows, labels);
        learn(hidden, step, s->out, rows, labels, targets, rate, loss);
        add_scaled(hidden, (float)parts / grams, step);
        add(moved, step);
        if (loss) ++*losses;
    }
    move_parts(s, word, moved);
}

static void train_stretch(Slice *s, const int32_t *words, int count, float rate, uint64_t *state) {
    int32_t rows[2][MOST_TARGETS], context[2 * MOST_WINDOW];
    float labels[2][MOST_TARGETS];
    int targets[2] = {0, 0};
    const int ahead = !s->gram_start || s->is_cbow;  /* targets of the next word are drawn and fetched early */
    if (ahead) targets[0] = targets_of(s, words[0], state, rows[0], labels[0]);
    for (int at = 0; at < count; at++) {
        const int now = at & 1, next = now ^ 1;
        if (ahead && at + 1 < count) targets[next] = targets_of(s, words[at + 1], state, rows[next], labels[next]);
        if (at + s->window + 1 < count) fetch_parts(s, words[at + s->window + 1]);
        const int reach = s->is_dynamic ? 1 + (int)(((draw(state) >> 32) * (uint64_t)s->window) >> 32) : s->window;
        const int first = at > reach ? at - reach : 0, last = at + reach < count ? at + reach : count - 1;
        double *loss = s->trained++ % LOSS_EVERY ? NULL : &s->loss;
        int held = 0;
        for (int c = first; c <= last; c++)
            if (c != at) context[held++] = words[c];
        if (!held) continue;
        if (s->is_cbow) {
            predict_word(s, context, held, rows[now], labels[now], targets[now], rate, loss);
            if (loss) s->losses++;
        } else if (s->gram_start) {
            predict_context(s, words[at], context, held, rate, state, loss, &s->losses);
        } else {
            for (int c = 0; c < held; c++) {
                if (c && !s->is_shared) targets[now] = targets_of(s, words[at], state, rows[now], labels[now]);
                predict_from(s, context[c], rows[now], labels[now], targets[now], rate, loss);
                if (loss) s->losses++;
            }
        }
    }
}

void train_slice(Slice *s) {
    int32_t words[MOST_WORDS];
    uint64_t state = s->seed;
    const float length = s->end > s->begin ? (float)(s->end - s->begin) : 1;
    int held = 0;
    s->loss = 0;
    s->losses = s->trained = 0;
    for (int64_t at = s->begin; at < s->end; at++) {
        const int32_t word = s->tokens[at];
        if (word >= 0 && (s->keep[word] == UINT32_MAX || (uint32_t)(draw(&state) >> 32) <= s->keep[word]))
            words[held++] = word;
        if (held == MOST_WORDS || (held && (word < 0 || at + 1 == s->end))) {
            const float done = (float)(at - s->begin) / length;
            train_stretch(s, words, held, s->rate + (s->last_rate - s->rate) * done, &state);
            held = 0;
        }
    }
}

/* The parts of the above that tests compare with a reference. */
void learn_word(const Slice *s, const int32_t *context, int count, const int32_t *rows, const float *labels,
                int targets, float rate, double *loss) {
    if (s->is_cbow) predict_word(s, context, count, rows, labels, targets, rate, loss);
    else
        for (int c = 0; c < count; c++) predict_from(s, context[c], rows, labels, targets, rate, loss);
}

typedef struct {
    const int32_t *word, *other;
    const float *count;
    int64_t begin, end;
    float rate, x_max, power;
    float *in, *out, *in_bias, *out_bias;                  /* rows of WIDTH, and a number for each word */
    float *in_square, *out_square, *in_bias_square, *out_bias_square;  /* AdaGrad: sums of squared gradients */
    double loss;                                           /* out: sum of f(x) (w u + b + c - log x)^2 / 2 */
} Pairs;

/* GloVe: weighted least squares by AdaGrad (Pennington et al. 2014, equation 8). */
void train_pairs(Pairs *p) {
    p->loss = 0;
    for (int64_t at = p->begin; at < p->end; at++) {
        if (at + 8 < p->end) {
            const int64_t i = (int64_t)p->word[at + 8] * WIDTH, j = (int64_t)p->other[at + 8] * WIDTH;
            fetch(p->in + i); fetch(p->in_square + i); fetch(p->out + j); fetch(p->out_square + j);
        }
        const int32_t a = p->word[at], b = p->other[at];
        float *restrict w = p->in + (int64_t)a * WIDTH, *restrict u = p->out + (int64_t)b * WIDTH;
        float *restrict ws = p->in_square + (int64_t)a * WIDTH, *restrict us = p->out_square + (int64_t)b * WIDTH;
        const float x = p->count[at];
        const float apart = dot(w, u) + p->in_bias[a] + p->out_bias[b] - logf(x);
        const float g = apart * (x < p->x_max ? powf(x / p->x_max, p->power) : 1.0f);
        p->loss += 0.5 * (double)g * apart;
        for (int i = 0; i < WIDTH; i++) {
            const float gw = g * u[i], gu = g * w[i];
            w[i] -= p->rate * gw / sqrtf(ws[i]);
            u[i] -= p->rate * gu / sqrtf(us[i]);
            ws[i] += gw * gw;
            us[i] += gu * gu;
        }
        p->in_bias[a] -= p->rate * g / sqrtf(p->in_bias_square[a]);
        p->out_bias[b] -= p->rate * g / sqrtf(p->out_bias_square[b]);
        p->in_bias_square[a] += g * g;
        p->out_bias_square[b] += g * g;
    }
}
