#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "batch.h"
#include "model.h"
#include "plan.h"
#include "sampling.h"
#include "session.h"
#include "text_kv.h"

namespace fedbpt {

struct MemoryUse {
    uint64_t weights = 0, kv = 0, compute = 0;  // bytes
    uint64_t gpu = 0;                           // the part of these in a GPU's own memory
};

// How texts are continued: until max_tokens, the model's end of text, or one of `stops` in the answer.
struct Continuing {
    Sampling sampling;  // the seed is that of text 0 of the plan; each text has its own, the same for all candidates
    size_t max_tokens = 0;
    std::vector<std::string> stops;
};

// An answer: its tokens without the end of text, and their bytes up to a stop string.
struct Answer {
    std::vector<llama_token> ids;
    std::string text;
};

// Scores texts under soft prompts, and continues them. One call computes at a time; other threads wait.
//
// With row attention (llama-soft-prompt.h) a token's bits do not depend on the rest of its batch, so one llama_decode
// takes as many candidates as fit; without, it takes one. The KV of a text is computed by itself or, with row
// attention, with that of others, and continued from that of a text with a common prefix. So a logit does not depend on
// other candidates, their number or order, or on earlier calls, and is reproducible bit for bit.
class Scorer {
public:
    // kv_type: GGML_TYPE_F16 or GGML_TYPE_Q8_0; f32 models always have an f32 KV cache. Throws InputError.
    Scorer(std::shared_ptr<const Model> model, int32_t n_threads, ggml_type kv_type = GGML_TYPE_F16);

    // Scores the plan's texts `which[n_which]` under embeds[n_candidates][n_prompt][n_embd] into
    // out[n_candidates][n_which][n_columns]. If `states` is not null, also writes the hidden states of the plan's
    // layers at each text's last token, states[n_candidates][n_which][n_layers][n_embd]. `stop` is polled every few
    // milliseconds, on this thread; true cancels. Throws InputError, ScoringInterrupted.
    void score(Plan & plan, const int64_t * which, size_t n_which, const float * embeds, size_t n_candidates,
               size_t n_prompt, float * out, float * states, const std::function<bool()> & stop);

    // Continues the plan's texts `which[n_which]` under embeds[n_candidates][n_prompt][n_embd]: answers[n_candidates ·
    // n_which]. Up to kGenerated texts at a time, on shared KV of the texts; one that is done leaves. The plan has the
    // logits of the whole vocabulary, and rows in the cue or shifts. Throws as score does.
    std::vector<Answer> generate(Plan & plan, const int64_t * which, size_t n_which, const float * embeds,
                                 size_t n_candidates, size_t n_prompt, const Continuing & how,
                                 const std::function<bool()> & stop);

    static constexpr size_t kGenerated = 128;  // texts continued at a time

    // Makes the call in flight, if any, throw ScoringInterrupted.
    void interrupt() { interrupted_ = true; }

    MemoryUse memory() const;
    int32_t n_threads() const { return session_.n_threads(); }

private:
    struct Request {
        Plan & plan;
        const int64_t * which;
        size_t n_which;
        const float * embeds;
        size_t n_candidates;
        size_t n_prompt;
        float * states;

        size_t length(size_t i) const { return plan.length(static_cast<size_t>(which[i])); }
        const llama_token * text(size_t i) const { return plan.text(static_cast<size_t>(which[i])); }
        size_t n_tail() const { return plan.n_tail(n_prompt); }
        // tokens before the rows, or before the last token
        size_t head_of(size_t i) const { return plan.prefix().size() + length(i) - n_tail(); }

        size_t n_steps(size_t i) const { return plan.n_steps(static_cast<size_t>(which[i])); }
        // tokens read for text i: prefix, rows, text, and all but the last token of its longest continuation
        size_t n_read(size_t i) const;

        size_t n_outputs() const { return n_candidates * n_which; }
        int64_t output_of(size_t candidate, size_t i) const { return static_cast<int64_t>(candidate * n_which + i); }
    };
    struct Pack {  // texts [first, last) of the request, scored together
        size_t first, last, n_tokens, n_steps;

        size_t n_texts() const { return last - first; }
    };
    struct Step {        // a token of a continuation; its output is n_outputs() + its index in steps_
        int64_t output;  // that of the text
        size_t continuation;
        llama_token token;
    };
    struct Group {  // candidates [first, last), scored together, each in its own slot
        size_t first, last;

        size_t size() const { return last - first; }
    };

    struct Live {  // a text that is being continued
        size_t output;
        llama_seq_id seq;
        llama_pos pos;  // of the next token
        SamplerPtr sampler;
        int32_t at;  // of its output in the batch
    };

    void validate(const Request & request) const;
    void generate_group(const Request & request, const Pack & pack, const Group & group, const Continuing & how,
                        std::vector<Answer> & answers);
    llama_token choose(Live & live);
    std::vector<Pack> pack(const Request & request) const;
    size_t candidates_together(const Request & request, const std::vector<Pack> & packs) const;
    void ensure_context(const Request & request, const std::vector<Pack> & packs, size_t together);

    void run(const Request & request, float * out);
    void run_alike(const Request & request, float * out);
    void score_front(const Request & request, const Pack & pack, const Group & group, bool first_pack, float * out);
    void add_continuations(const Request & request, size_t candidate, size_t i, const llama_seq_id * seqs,
                           llama_pos pos);
    void set_prompt(const Request & request, size_t candidate, llama_pos pos);
    void score_cue(const Request & request, const Pack & pack, size_t together, float * out);
    void score_group(const Request & request, const Pack & pack, const Group & group, size_t slots, bool resumes,
                     float * out);
    void compute_states(const Request & request, const Pack & pack, size_t slots);
    bool resumes_alike(const Request & request, const Pack & pack, const Group & group, size_t slots, float * out);

    const float * rows_of(const Request & request, size_t candidate) const {
        return request.embeds + candidate * request.n_prompt * static_cast<size_t>(model_->n_embd());
    }
    void restore_texts(const Request & request, const Pack & pack, size_t slots);
    std::vector<llama_token> head_tokens(const Request & request, size_t i) const;
    TextKvPtr compute_alone(const Request & request, size_t i);
    void compute_together(const Request & request, const std::vector<size_t> & missing, std::vector<TextKvPtr> & texts);
    void decode_prefix(const Request & request);
    // Called after each pass with the states of all its outputs, padding too: [n][n_layers][n_embd], or null.
    using StatesOf = std::function<void(const float * states, size_t n)>;
    void decode(const Request & request, float * out, bool resumes = false, const StatesOf & take = {});
    void read_whole(const Request & request, int64_t output, const float * logits, float * out) const;
    std::shared_ptr<const Model> model_;
    Session session_;
    uint32_t n_seq_max_ = 0;  // of the session's context
    TextKvIndex texts_[2];    // with LongRoPE's short and long factors
    bool is_long_ = false;
    Batch batch_;
    std::vector<llama_seq_id> seqs_;  // scratch
    std::vector<Step> steps_;         // those in the batch
    std::vector<float> states_;       // of the batch's tokens, where candidates resume from a layer
    std::vector<int8_t> can_resume_;  // by layer; -1: not tried

    mutable std::mutex mutex_;
    std::atomic<bool> interrupted_{ false };
};

}  // namespace fedbpt
