#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "batch.h"
#include "handles.h"
#include "model.h"
#include "session.h"

namespace fedbpt {

// How a token is chosen by llama.cpp's samplers. temperature 0: the most likely one.
struct Sampling {
    float temperature = 0.0f;
    float top_p = 1.0f;
    int32_t top_k = 0;  // 0: all
    uint32_t seed = 0;
};

// Tokens, those from rows_at on embedded as rows[n_rows][n_embd] instead.
struct Input {
    std::vector<llama_token> ids;
    std::vector<float> rows;
    size_t rows_at = 0;
};

struct Choice {
    llama_token id;
    float log_prob;                                        // nats, as the model has it: before any sampler
    std::vector<std::pair<llama_token, float>> likeliest;  // and their log-probabilities, the most likely first
};

// Generates texts token by token under soft prompts, several at a time by turns. One call computes at a time: a second
// thread's waits.
//
// What was computed is kept: a text begins with the KV of the longest beginning that it shares, rows included, with a
// text before it, or with a head (all up to the end of a prompt's rows), of which the last few used are kept apart.
// Copies share their cells. So a text depends on its own input alone but for rounding: attention sums over cells in the
// order in which they lie.
class Generator {
    struct Sequence;

public:
    class Stream {
    public:
        // From any thread: makes the call in flight, or the next, throw ScoringInterrupted.
        void cancel() { cancelled_ = true; }

        // tokens of the text so far whose KV was there already as it began
        size_t n_reused() const { return n_reused_; }

    private:
        friend class Generator;

        SamplerPtr sampler_;
        Sequence * sequence_ = nullptr;
        size_t n_reused_ = 0;
        std::shared_ptr<char> alive_ = std::make_shared<char>();
        std::atomic<bool> cancelled_{ false };
    };

    // kv_type: as for a Scorer. Throws InputError.
    Generator(std::shared_ptr<const Model> model, int32_t n_threads, ggml_type kv_type = GGML_TYPE_F16);

    // A text to go on with. Throws InputError: an empty input, an id outside the vocabulary, rows that are not finite
    // or not within the input, an input that fills the context, sampling that makes no sense, too many texts at once.
    std::unique_ptr<Stream> open(Input input, const Sampling & sampling);

    // The next token, which is part of the text from then on. `stop` is asked every few milliseconds, on this thread,
    // whether to give up. n_likeliest: how many to name beside it. Throws ScoringInterrupted; InputError where the
    // context is full.
    Choice next(Stream & stream, size_t n_likeliest, const std::function<bool()> & stop);

    const Model & model() const { return *model_; }
    // forward tokens computed so far
    uint64_t n_tokens() const { return n_tokens_; }
    uint32_t n_cells() const { return session_.n_cells(); }

private:
    struct Sequence {  // whose KV is in the context up to n_computed
        Input input;
        size_t n_computed = 0;
        llama_seq_id id = 0;
        bool is_head = false;
        bool is_long = false;  // computed with LongRoPE's long factors
        uint64_t last_used = 0;
        std::weak_ptr<char> owner;  // a stream's alive_

        bool is_live() const { return !owner.expired(); }
    };

    void validate(const Input & input, const Sampling & sampling) const;
    size_t common(const Input & a, const Input & b) const;
    const float * row_of(const Input & input, size_t i) const;
    bool is_long(const Input & input) const { return model_->is_long(input.ids.size()); }

    Sequence * oldest(bool is_head);
    size_t adopt(Sequence & sequence, Input input);
    void keep_head(const Sequence & sequence);
    bool evict();
    void drop(Sequence & sequence);

    void ensure_context(size_t n_cells);
    void grow(size_t n_cells);
    const float * compute(Sequence & sequence);
    void compute_part(Sequence & sequence, size_t end);
    void reset();

    std::shared_ptr<const Model> model_;
    Session session_;
    Batch batch_;
    std::vector<Sequence> sequences_;
    std::atomic<uint64_t> n_tokens_{ 0 };
    uint64_t clock_ = 0;

    std::mutex mutex_;
};

}  // namespace fedbpt
