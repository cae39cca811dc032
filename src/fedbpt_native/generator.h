#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "batch.h"
#include "grammar.h"
#include "handles.h"
#include "model.h"
#include "plan.h"
#include "sampling.h"
#include "session.h"

namespace fedbpt {

// Tokens; from rows_at on, rows[n_rows][n_embd] replace their embeddings or, with shifted.n > 0 layers, rows[n][n_embd]
// are added to these layers' outputs at token rows_at and, if shifted.continued, at all later ones.
struct Input {
    std::vector<llama_token> ids;
    std::vector<float> rows;
    size_t rows_at = 0;
    ShiftedLayers shifted;

    // number of tokens whose embeddings are replaced, or of the first that is shifted; n_embd: numbers in a row
    size_t n_places(size_t n_embd) const { return rows.empty() ? 0 : shifted.n > 0 ? 1 : rows.size() / n_embd; }
};

struct Choice {
    // in the place of a token: the stream was cancelled; the logits are not finite; no token fits the grammar
    static constexpr llama_token kCancelled = -1;
    static constexpr llama_token kNotFinite = -2;
    static constexpr llama_token kNoToken = GrammarSampler::kNoToken;
    static constexpr llama_token kFull = -4;  // the context is full

    llama_token id;
    float log_prob;                                        // nats, before sampling
    std::vector<std::pair<llama_token, float>> likeliest;  // with their log-probabilities, the likeliest first
};

// Generates texts token by token under soft prompts, several in turn. One call computes at a time; other threads wait.
//
// KV is reused: a text starts from the KV of its longest common prefix, rows included, with an earlier text or with a
// head (a text up to the end of a prompt's rows); the most recently used heads are kept separately. Copies share KV
// cells. Reuse changes results only by rounding: attention sums over cells in the order in which they lie.
class Generator {
    struct Sequence;

public:
    class Stream {
    public:
        // Makes the call in flight, or the next, throw ScoringInterrupted; callable from any thread.
        void cancel() { cancelled_ = true; }

        // input tokens whose KV was reused
        size_t n_reused() const { return n_reused_; }

        // Makes its generator, owned by `generator`, live as long.
        void keep_alive(std::shared_ptr<const void> generator) { kept_ = std::move(generator); }

    private:
        friend class Generator;

        std::shared_ptr<const void> kept_;
        const Generator * generator_ = nullptr;
        SamplerPtr sampler_;
        std::optional<GrammarSampler> grammar_;
        Sequence * sequence_ = nullptr;
        size_t n_reused_ = 0;
        std::shared_ptr<char> alive_ = std::make_shared<char>();
        std::atomic<bool> cancelled_{ false };
    };

    // kv_type: as for a Scorer. Throws InputError.
    Generator(std::shared_ptr<const Model> model, int32_t n_threads, ggml_type kv_type = GGML_TYPE_F16);

    // Opens a text to continue. grammar: GBNF that the new text follows, of which the last n_said tokens of the input
    // are the beginning; empty: none. Throws InputError: an empty
    // input, an id outside the vocabulary, rows that are not finite or not within the input, an input that fills the
    // context, invalid sampling or grammar, no free slot.
    std::unique_ptr<Stream> open(Input input, const Sampling & sampling, const std::string & grammar = "",
                                 size_t n_said = 0);

    // Chooses the next token and appends it to the text. `stop` is polled every few milliseconds, on this thread; true
    // cancels. n_likeliest: number of likeliest tokens to report. Throws ScoringInterrupted; InputError if the context
    // is full.
    Choice next(Stream & stream, size_t n_likeliest, const std::function<bool()> & stop);

    // The same for several texts, whose tokens are computed in one pass. What is wrong with one of them is in its
    // Choice, and the others go on. Throws ScoringInterrupted if `stop` returned true.
    std::vector<Choice> next_all(const std::vector<Stream *> & streams, const std::vector<size_t> & n_likeliest,
                                 const std::function<bool()> & stop);

    static constexpr size_t kTexts = 8;  // slots for texts being generated, or kept for reuse

    const Model & model() const { return *model_; }
    // forward tokens computed so far
    uint64_t n_tokens() const { return n_tokens_; }
    // callable while another thread computes
    uint32_t n_cells() const { return n_cells_; }

private:
    struct Sequence {  // its KV is in the context up to n_computed
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
    Sequence * place_for(const Input & input);
    size_t live_cells() const;
    size_t adopt(Sequence & sequence, Input input);
    void keep_head(const Sequence & sequence);
    bool evict();
    void drop(Sequence & sequence);

    void ensure_context(size_t n_cells);
    void grow(size_t n_cells);
    bool read(Stream & stream, const std::function<bool()> & stop);
    bool compute_last(const std::vector<Stream *> & streams);
    void set_rows(const Sequence & sequence);
    void read_up_to(Sequence & sequence, size_t end);
    bool is_finite(int32_t output) const;
    Choice choose(Stream & stream, int32_t output, size_t n_likeliest);
    void compute_part(Sequence & sequence, size_t end);
    bool decode(bool is_long);
    void reset();
    void check_own(const Stream & stream) const;
    void uncompute_last(Sequence & sequence);

    std::shared_ptr<const Model> model_;
    Session session_;
    std::atomic<uint32_t> n_cells_{ 0 };
    Batch batch_;
    std::vector<Sequence> sequences_;
    std::atomic<uint64_t> n_tokens_{ 0 };
    uint64_t clock_ = 0;

    std::mutex mutex_;
};

}  // namespace fedbpt
